"""full/run.py on tiny checkpoints, through the real loading code: every backbone, mixed pairs,
LoRA, resume, and the saved pipeline against add.py's own sampler."""

import dataclasses
import json
import re
import shutil
import tarfile

import pytest
import torch
from diffusers import AutoencoderKL, AutoPipelineForText2Image
from full_runs import log_of, losses_of, train, weights
from torchvision.transforms.functional import pil_to_tensor

from add import Student
from common.flags import from_dict
from full import run, sample
from full.backbones import Backbone, make_student_denoiser
from full.settings import Settings, torch_dtype
from full.train import Trainer


def same_image_as_our_sampler(pipeline, out, steps, timesteps=None):
    """The pipeline's latents and Student.sample's, from the same noise and the same generator's
    state."""
    settings = from_dict(Settings, json.loads((out / "config.json").read_text())["settings"])
    pipe = AutoPipelineForText2Image.from_pretrained(pipeline, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    call = {"timesteps": timesteps} if timesteps else {"num_inference_steps": steps}
    theirs = pipe(
        "colours",
        guidance_scale=0.0,
        output_type="latent",
        generator=torch.Generator().manual_seed(3),
        **call,
    ).images

    backbone = Backbone(str(pipeline), torch.float32, torch.device("cpu"))
    latents = backbone.load_latents(settings)
    student = Student(make_student_denoiser(backbone, latents, settings), settings.timesteps)
    student.denoiser.decode = lambda z: z
    cond = backbone.with_sizes(backbone.text(["colours"]), 64)
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    ours = student.sample(noise, cond, steps, generator=generator)
    scale = backbone.pipe.vae.config.scaling_factor
    assert ours.abs().max() > 1
    assert torch.allclose(theirs, ours, atol=3e-4 * float(ours.abs().max())), (
        (theirs - ours).abs().max()
    )
    return scale


@pytest.mark.usefixtures("another_precision")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backbone", ["sd15", "v", "sdxl"])
def test_each_backbone_trains_and_its_pipeline_samples_as_add_does(
    checkpoints, tmp_path, backbone, precision
):
    pipeline = train(checkpoints, tmp_path, backbone=backbone, precision=precision)
    before, after = weights(checkpoints / backbone), weights(pipeline)
    assert before.keys() == after.keys()
    assert sum(not torch.equal(before[k], after[k]) for k in before) > 0.9 * len(before)
    for row in log_of(tmp_path):
        assert (
            row["distillation"] > 0
            and row["r1"] > 0
            and row["gradient_norm"] > 0
            and row["skipped"] == 0
        )
    for steps in (1, 2, 4):
        same_image_as_our_sampler(pipeline, tmp_path, steps)
    card = (pipeline / "README.md").read_text()
    assert (
        str(checkpoints / "images") in card
        and "--student-lr" in card
        and "guidance_scale=0.0" in card
    )


def test_a_student_with_uneven_timesteps_samples_as_add_does(checkpoints, tmp_path):
    pipeline = train(checkpoints, tmp_path, timesteps="99,799,999")
    same_image_as_our_sampler(pipeline, tmp_path, 2, timesteps=[999, 799])
    assert sample.timesteps_of(pipeline, 2) == [999, 799]
    card = (pipeline / "README.md").read_text()
    assert "timesteps=[999]" in card and "| `--timesteps` | `99,799,999` |" in card


def test_sdxl_is_trained_with_the_sizes_that_its_pipeline_samples_with(
    checkpoints, tmp_path, monkeypatch
):
    make_batch, batches = Trainer.make_batch, []

    def watched(trainer, raw):
        batches.append(make_batch(trainer, raw))
        return batches[-1]

    monkeypatch.setattr(Trainer, "make_batch", watched)
    train(checkpoints, tmp_path, backbone="sdxl", weight="nfsd", steps=1)
    batch = batches[0]
    for cond in (batch.cond, batch.null_cond, batch.negative_cond):
        assert cond["added_cond_kwargs"]["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]] * 4


@pytest.mark.parametrize("student, teacher", [("sd15", "sdxl"), ("sdxl", "v")])
def test_mixed_pairs_of_other_latents_and_predictions(
    checkpoints, tmp_path, monkeypatch, student, teacher
):
    run_of, kept = Trainer.run, []
    monkeypatch.setattr(
        Trainer,
        "run",
        lambda trainer: (kept.append(trainer.backbone.pipe.unet.device.type), run_of(trainer))[1],
    )
    train(checkpoints, tmp_path, backbone=student, teacher=checkpoints / teacher)
    assert kept == ["meta"]  # nobody uses the backbone's own frozen U-Net here: it takes no memory
    assert all(row["distillation"] > 0 for row in log_of(tmp_path))


@pytest.mark.parametrize(
    "more",
    [
        {"weight": "nfsd", "guidance": "7.5"},
        {"weight": "sds", "space": "latent"},
        {"guidance": "3,8", "teacher_steps": 2},
        {"vae": "TAESD"},
        {"c_text": "none", "c_img": "none"},
        {"augment": "", "features_crop": 0},
        {"features_size": 56, "features_crop": 1.0},
        {"ema": 0, "clip": 0},
        {"init": "random"},
        {"vae_slicing": "false", "checkpointing": "false"},
    ],
    ids=lambda more: " ".join(more),
)
def test_every_variant_of_the_method_runs(checkpoints, tmp_path, more):
    if "vae" in more:
        more = {"vae": checkpoints / "taesd"}
    train(checkpoints, tmp_path, **more)
    assert all(row["r1"] > 0 for row in log_of(tmp_path))


@pytest.mark.parametrize(
    "backbone, space", [("sd15", "latent"), ("sdxl", "latent"), ("v", "pixel")]
)
def test_with_the_teachers_encoder_as_f_nothing_is_decoded_for_the_discriminator(
    checkpoints, tmp_path, monkeypatch, backbone, space
):
    decode, calls = AutoencoderKL.decode, []
    monkeypatch.setattr(
        AutoencoderKL,
        "decode",
        lambda vae, z, *a, **k: (calls.append(len(z)), decode(vae, z, *a, **k))[1],
    )
    train(
        checkpoints,
        tmp_path,
        backbone=backbone,
        space=space,
        features="teacher",
        vae_slicing="false",
    )
    assert bool(calls) == (space == "pixel")
    assert all(
        row["r1"] > 0 and row["gradient_adversarial"] > 0 and row["gradient_distillation"] > 0
        for row in log_of(tmp_path)
    )


def test_the_teachers_encoder_resumes_with_its_own_draws(checkpoints, tmp_path):
    whole = train(
        checkpoints,
        tmp_path / "whole",
        steps=4,
        save_every=2,
        features="teacher",
        space="latent",
        validate_every=2,
    )
    train(checkpoints, tmp_path / "cut", steps=2, save_every=2, features="teacher", space="latent")
    cut = train(
        checkpoints,
        tmp_path / "cut",
        "--resume",
        "auto",
        steps=4,
        save_every=2,
        features="teacher",
        space="latent",
    )
    a, b = weights(whole), weights(cut)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert (tmp_path / "whole" / "pictures" / "targets_0000004.png").exists()


@pytest.mark.usefixtures("another_precision")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_lora_trains_adapters_and_is_merged_into_the_pipeline(checkpoints, tmp_path, precision):
    pipeline = train(checkpoints, tmp_path, lora_rank=2, precision=precision)
    before, after = weights(checkpoints / "sd15"), weights(pipeline)
    changed = {k for k in before if not torch.equal(before[k], after[k])}  # nothing is rounded
    assert before.keys() == after.keys() and changed
    assert all(any(f".{n}." in k for n in ("to_q", "to_k", "to_v", "to_out")) for k in changed)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_lora_keeps_the_frozen_base_in_the_dtype_of_frozen_networks(checkpoints, precision):
    settings = Settings(lora_rank=2, precision=precision)
    backbone = Backbone(str(checkpoints / "sd15"), torch.float32, torch.device("cpu"))
    network = make_student_denoiser(backbone, backbone.load_latents(settings), settings).network
    types = {(p.requires_grad, p.dtype) for p in network.parameters()}
    assert types == {(True, torch.float32), (False, torch_dtype(precision))}


@pytest.mark.parametrize("backbone", ["sd15", "sdxl"])
def test_the_base_with_the_saved_adapter_draws_what_the_merged_pipeline_draws(
    checkpoints, tmp_path, backbone
):
    pipeline = train(
        checkpoints, tmp_path, backbone=backbone, lora_rank=2, student_lr=0.1, warm_up=0
    )
    merged, base, adapted = (
        AutoPipelineForText2Image.from_pretrained(folder, dtype=torch.float32)
        for folder in (pipeline, checkpoints / backbone, checkpoints / backbone)
    )
    adapted.load_lora_weights(pipeline)
    images = []
    for pipe in (merged, base, adapted):
        pipe.scheduler = merged.scheduler
        call = dict(
            num_inference_steps=2, guidance_scale=0.0, output_type="latent", height=64, width=64
        )
        images.append(pipe("a", generator=torch.Generator().manual_seed(0), **call).images)
    changed = (images[0] - images[1]).abs().max()
    assert changed > 1e-2 * images[0].abs().max()
    assert (images[0] - images[2]).abs().max() < 1e-3 * changed


@pytest.mark.parametrize("backbone, lora_rank", [("sd15", 0), ("v", 0), ("sdxl", 0), ("sdxl", 2)])
def test_the_code_on_the_model_card_draws(checkpoints, tmp_path, backbone, lora_rank):
    """In the default --save-dtype, as a user pastes it, but for the GPU."""
    settings = dict(backbone=backbone, lora_rank=lora_rank, save_dtype=None)
    settings |= dict(student_lr=0.1, warm_up=0, ema=0) if lora_rank else {}
    pipeline = train(checkpoints, tmp_path, **settings)
    blocks = re.findall("```python\n(.*?)```", (pipeline / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 1 + bool(lora_rank)
    images = []
    for block in blocks:
        assert "torch.float16" in block and block.count('.to("cuda")') == 1
        scope = {}
        torch.manual_seed(0)
        exec(block.replace("DIR", str(pipeline)).replace('.to("cuda")', ""), scope)
        assert scope["image"].size == (64, 64)
        images.append(pil_to_tensor(scope["image"]).float())
    if lora_rank:  # merged in or added, the adapter does the same, and something
        scope["pipe"].unload_lora_weights()
        torch.manual_seed(0)
        base = scope["pipe"]("a lighthouse in a storm", **scope["call"]).images[0]
        changed = (pil_to_tensor(base).float() - images[1]).abs().mean()
        assert (images[0] - images[1]).abs().mean() < 0.1 * changed


@pytest.mark.usefixtures("another_precision")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_is_as_if_never_stopped(checkpoints, tmp_path, precision):
    whole = train(checkpoints, tmp_path / "whole", steps=4, save_every=2, precision=precision)
    train(checkpoints, tmp_path / "cut", steps=2, save_every=2, precision=precision)
    cut = train(
        checkpoints,
        tmp_path / "cut",
        "--resume",
        "auto",
        steps=4,
        save_every=2,
        precision=precision,
    )
    a, b = weights(whole), weights(cut)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "cut")


def test_the_pipeline_has_the_average_of_the_weights(checkpoints, tmp_path):
    pipeline = train(checkpoints, tmp_path, steps=3, ema=0.9, warm_up=0)
    state = torch.load(tmp_path / "checkpoints" / "step_0000003" / "training.pt", weights_only=True)
    saved = weights(pipeline)
    assert all(torch.equal(saved[k.removeprefix("unet.")], x) for k, x in state["average"].items())
    assert any(not torch.equal(x, state["network"][k]) for k, x in state["average"].items())


@pytest.mark.usefixtures("another_precision")
def test_bf16_survives_checkpoints_and_resume(checkpoints, tmp_path, monkeypatch, capsys):
    """What a student's middle block gives, in every iteration before and after a save and after
    --resume."""
    iteration, seen = Trainer.iteration, {}

    def watched(trainer, batches):
        hook = trainer.network.unet.mid_block.register_forward_hook(
            lambda m, i, out: types.add(out.dtype)
        )
        types = seen.setdefault(trainer.step, set())
        result = iteration(trainer, batches)
        hook.remove()
        return result

    monkeypatch.setattr(Trainer, "iteration", watched)
    train(checkpoints, tmp_path, precision="bf16", steps=2, save_every=1)
    assert "--precision bf16: without a CUDA GPU" in capsys.readouterr().err
    train(checkpoints, tmp_path, "--resume", "auto", precision="bf16", steps=4)
    assert seen == {step: {torch.bfloat16} for step in range(4)}
    assert {x.dtype for x in weights(tmp_path / "pipeline").values()} == {torch.float32}


def test_the_teacher_of_nfsd_has_the_guidance_of_its_paper():
    asked = (
        Settings(),
        Settings(weight="nfsd"),
        Settings(weight="nfsd", guidance=(3.0,)),
        Settings(guidance=(2.0, 3.0)),
    )
    assert [s.teacher_guidance for s in asked] == [1.0, 7.5, 3.0, (2.0, 3.0)]


def test_a_resumed_run_with_another_weight_has_that_weights_guidance(tmp_path):
    """What follows from other settings is not stored as if it had been given."""
    kept = dataclasses.asdict(Settings(weight="nfsd", features="teacher"))
    (tmp_path / "config.json").write_text(json.dumps({"settings": kept}))
    argv = ["--out", str(tmp_path), "--resume", "auto"]
    argv += ["--weight", "exponential", "--features", "dino-s"]
    settings = run.configure(*run.parse_arguments(argv))
    assert settings.teacher_guidance == 1.0
    assert settings.augmentations == ("color", "translation", "cutout")


@pytest.mark.parametrize("kind", ["shards", "hugging face"])
def test_the_other_sources_train_too(checkpoints, tmp_path, monkeypatch, kind):
    """The folder's images and captions as webdataset shards, and as a data set that the datasets
    library reads."""
    files = sorted((checkpoints / "images").glob("*.jpg"))
    if kind == "shards":
        for n in range(2):
            with tarfile.open(tmp_path / f"{n:03d}.tar", "w") as tar:
                for file in files[n::2]:
                    tar.add(file, file.name)
                    tar.add(file.with_suffix(".txt"), file.with_suffix(".txt").name)
        data = f"{tmp_path}/{{000..001}}.tar"
    else:
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
        (tmp_path / "set").mkdir()
        for file in files:
            shutil.copy(file, tmp_path / "set")
        lines = [
            json.dumps({"file_name": f.name, "text": f.with_suffix(".txt").read_text()})
            for f in files
        ]
        (tmp_path / "set" / "metadata.jsonl").write_text("\n".join(lines))
        data = f"hf:{tmp_path / 'set'}"
    train(checkpoints, tmp_path / "run", data=data)
    assert all(row["distillation"] > 0 and row["skipped"] == 0 for row in log_of(tmp_path / "run"))
