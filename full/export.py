"""Writes the student as a diffusers pipeline folder that samples as add.Student.sample does, with a
model card."""

import json
import os
import shutil
from pathlib import Path

from diffusers import DiffusionPipeline, LCMScheduler
from diffusers.utils import convert_state_dict_to_diffusers

from common.origin import commit
from full.backbones import PREDICTIONS
from full.settings import DTYPES, LICENCES, as_table, torch_dtype


def make_scheduler(scheduler_config, settings):
    """LCMScheduler: it predicts x_0, adds fresh noise, predicts again, which is ADD's sampler;
    Euler's and DDPM's keep a share of the old noise. original_inference_steps makes its timesteps
    T_student's, if those are evenly spaced."""
    keys = (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "prediction_type",
    )
    rescale = settings.rescales(PREDICTIONS[scheduler_config["prediction_type"]])
    return LCMScheduler(
        **{k: scheduler_config[k] for k in keys},
        original_inference_steps=len(settings.timesteps),
        clip_sample=False,
        steps_offset=1,  # LCMScheduler does not use it; the pipelines warn at 0
        rescale_betas_zero_snr=rescale or scheduler_config.get("rescale_betas_zero_snr", False),
    )


def is_evenly_spaced(timesteps, T=1000):
    """Whether LCMScheduler's own timesteps are T_student's."""
    n = len(timesteps)
    return tuple(timesteps) == tuple((i + 1) * (T // n) - 1 for i in range(n))


def student_unet(backbone, state, settings):
    """The saved student as a plain U-Net on the CPU, and the LoRA adapter that is merged into it
    ({} without one)."""
    unet, adapter = backbone.load_student_unet(settings).cpu(), {}
    missing, unexpected = unet.load_state_dict(
        {k.removeprefix("unet."): v for k, v in state.items()}, strict=False
    )
    if unexpected or (missing and not settings.lora_rank):
        raise ValueError(
            f"the student's weights do not fit its U-Net: {(unexpected or missing)[0]}"
        )
    if settings.lora_rank:
        from peft.utils import get_peft_model_state_dict

        adapter = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
        unet.fuse_lora()
        unet.unload_lora()
    return unet, adapter


def licence_of(backbone):
    """The base model's licence: known, or as its own card has it, or "other"."""
    card = Path(backbone.path) / "README.md"
    if backbone.name in LICENCES:
        return LICENCES[backbone.name]
    for line in card.read_text("utf-8").splitlines() if card.exists() else ():
        if line.startswith("license:"):
            return line.split(":", 1)[1].strip()
    return "other"


def model_card(backbone, settings):
    """README.md of the pipeline folder: what it is, how to sample, from which data and settings,
    under what licence."""
    n, size, licence = len(settings.timesteps), settings.resolution, licence_of(backbone)
    # Without a dtype diffusers would load float32 beside the text encoders' own.
    dtype = f"dtype=torch.{DTYPES[settings.save_dtype]}"
    call = "num_inference_steps=1, guidance_scale=0.0"
    if not is_evenly_spaced(settings.timesteps):
        call = f"timesteps=[{settings.timesteps[-1]}], guidance_scale=0.0"
    lora = ""
    if settings.lora_rank:
        lora = f"""
Or add the adapter alone, `pytorch_lora_weights.safetensors`, to the base model:

```python
import torch
from diffusers import AutoPipelineForText2Image, LCMScheduler

pipe = AutoPipelineForText2Image.from_pretrained("{backbone.path}", {dtype}).to("cuda")
pipe.load_lora_weights("DIR")
pipe.scheduler = LCMScheduler.from_pretrained("DIR", subfolder="scheduler")
call = dict({call}, height={size}, width={size})
image = pipe("a lighthouse in a storm", **call).images[0]
```
"""
    return f"""---
license: {licence}
base_model: {backbone.path}
library_name: diffusers
pipeline_tag: text-to-image
tags: [adversarial-diffusion-distillation]
---
# {backbone.path}, distilled with ADD

A student of Adversarial Diffusion Distillation
([Sauer et al. 2023](https://arxiv.org/abs/2311.17042)) that samples in 1 to {n} steps, without
guidance, at {size}×{size}. DIR is this folder, or the name of its repository.

```python
import torch
from diffusers import AutoPipelineForText2Image

pipe = AutoPipelineForText2Image.from_pretrained("DIR", {dtype}).to("cuda")
image = pipe("a lighthouse in a storm", {call}).images[0]
```
{lora}
Timesteps it was trained at: {", ".join(map(str, settings.timesteps))}.
More steps than {n}, or guidance, are outside of its training.

- data: `{settings.data}`
- licence of the base model, which holds for this one: {licence}
- code: commit {commit()}

## Settings that differ from the defaults

{as_table(settings)}
"""


def save_pipeline(folder, backbone, state, settings):
    """The base pipeline, read anew, with the student's U-Net and scheduler, in settings.save_dtype:
    folder complete or not there. Of a LoRA the adapter stands beside it, as load_lora_weights reads
    it. state: the trainable parameters' names → tensors."""
    dtype, temporary = torch_dtype(settings.save_dtype), Path(f"{folder}.tmp")
    unet, adapter = student_unet(backbone, state, settings)
    unet = unet.to(dtype)
    scheduler = make_scheduler(backbone.scheduler_config, settings)
    pipe = DiffusionPipeline.from_pretrained(
        backbone.path, unet=unet, scheduler=scheduler, dtype=dtype, **backbone.extra
    )
    shutil.rmtree(temporary, ignore_errors=True)
    pipe.save_pretrained(temporary)
    if adapter:
        pipe.save_lora_weights(
            temporary,
            unet_lora_layers={name: x.to(dtype).contiguous() for name, x in adapter.items()},
        )
    (temporary / "README.md").write_text(model_card(backbone, settings), "utf-8")
    (temporary / "add.json").write_text(json.dumps({"timesteps": settings.timesteps}) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def push(folder, repository):
    """Upload a pipeline folder to the Hugging Face hub."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repository, exist_ok=True)
    api.upload_folder(folder_path=folder, repo_id=repository)
