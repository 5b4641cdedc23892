"""Checkpoints of the real sizes with random weights: all of full/ at full size, without a download.

python full/random_weights.py sd21 DIR writes DIR/sd21, and beside it the default networks of the
discriminator: DIR/dinov2-s, DIR/dinov2-l and DIR/ViT-g-14. They draw noise; they are for measuring
time and memory.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import AutoModel, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from full.plan.architectures import TEXT_ENCODERS, UNETS, VAE, VITS, text_config

# Of open_clip's ViT-g-14.
TEXT_TOWER = {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24}


def byte_tokenizer(pad="<|endoftext|>"):
    """A CLIP tokenizer of single bytes: nobody's vocabulary, but the real class and length."""
    # CLIP's printable stand-ins for the 256 bytes.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    vocabulary = [*symbols, *(s + "</w>" for s in symbols), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={s: i for i, s in enumerate(vocabulary)},
        merges=[],
        pad_token=pad,
        model_max_length=77,
    )


def scheduler(prediction="epsilon"):
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def write_backbone(name, folder):
    """A pipeline folder of sd15, sd21 or sdxl in bfloat16."""
    unet = UNet2DConditionModel(**UNETS[name])
    vae = AutoencoderKL(**VAE, scaling_factor=0.13025 if name == "sdxl" else 0.18215)
    kinds = CLIPTextModel, CLIPTextModelWithProjection
    texts = [
        kind(text_config(*c)).eval() for kind, c in zip(kinds, TEXT_ENCODERS[name], strict=False)
    ]
    common = dict(
        vae=vae, text_encoder=texts[0], tokenizer=byte_tokenizer(), unet=unet, scheduler=scheduler()
    )
    if name == "sdxl":
        pipe = StableDiffusionXLPipeline(
            **common, text_encoder_2=texts[1], tokenizer_2=byte_tokenizer("!")
        )
    else:
        pipe = StableDiffusionPipeline(
            **common, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipe.to(dtype=torch.bfloat16).save_pretrained(folder)


def write_text_tower(folder, tower, width):
    """A folder that open_clip reads as local-dir, with the text tower in full and a token of a
    vision tower."""
    import open_clip

    folder.mkdir(parents=True, exist_ok=True)
    vision = {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16}
    config = {"embed_dim": width, "vision_cfg": vision, "text_cfg": tower}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {}})
    )
    torch.save(open_clip.model.CLIP(**config).state_dict(), folder / "open_clip_pytorch_model.bin")


def write_all(backbone, folder):
    """A backbone and the discriminator's default networks, those that are not there yet."""
    torch.manual_seed(0)
    writers = {backbone: lambda path: write_backbone(backbone, path)}
    for name in ("dinov2-s", "dinov2-l"):
        writers[name] = AutoModel.from_config(VITS[name]).save_pretrained
    writers["ViT-g-14"] = lambda path: write_text_tower(path, TEXT_TOWER, width=1024)
    for name, writer in writers.items():
        if not (folder / name).exists():
            part = folder / f"{name}.part"
            shutil.rmtree(part, ignore_errors=True)
            writer(part)
            part.rename(folder / name)


def settings_for(backbone, folder):
    """Write the networks that are missing; return the settings of full/run.py that select them."""
    write_all(backbone, folder)
    names = {"backbone": backbone, "features": "dinov2-s", "c_img": "dinov2-l"}
    return {k: str(folder / name) for k, name in (names | {"c_text": "ViT-g-14"}).items()}


def main(argv=None):
    """Exit code 0."""
    parser = argparse.ArgumentParser(
        prog="full/random_weights.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("backbone", choices=tuple(UNETS))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args(argv)
    write_all(arguments.backbone, arguments.folder)


if __name__ == "__main__":
    main()
