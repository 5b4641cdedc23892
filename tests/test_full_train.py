"""full/run.py on tiny checkpoints, through the real loading code: every backbone, mixed pairs, LoRA, resume, and the
saved pipeline against add.py's own sampler."""

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import tiny_checkpoints as tiny
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, AutoPipelineForText2Image, UNet2DConditionModel

from add import Student
from common.flags import from_dict
from full import run, sample
from full.backbones import Backbone, make_student_denoiser
from full.settings import Settings
from full.train import Trainer

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Folder of tiny checkpoints and data."""
    root = tmp_path_factory.mktemp("checkpoints")
    tiny.write_sd(root / "sd15")
    tiny.write_sd(root / "v", "v_prediction", seed=5, width=48)
    tiny.write_sdxl(root / "sdxl", seed=9)
    tiny.write_dino(root / "dino")
    tiny.write_dino(root / "dino-large", width=32, seed=1)
    tiny.write_open_clip(root / "clip")
    tiny.write_taesd(root / "taesd")
    tiny.write_images(root / "images")
    return root


@pytest.fixture
def another_precision():
    """accelerate keeps the first precision that a process asks for: forget it, before and after."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def flags(root, out, backbone="sd15", **settings):
    """The command line of a short run; values None leave a flag out."""
    defaults = dict(
        backbone=root / backbone, features=root / "dino", c_img=root / "dino-large", c_text=root / "clip",
        data=root / "images", resolution=64, batch=4, steps=2, precision="fp32", workers=0, validate_every=0, log_every=1,
        save_dtype="fp32", tracker="none", student_lr=1e-3,
    )  # fmt: skip
    pairs = [(f"--{k.replace('_', '-')}", str(v)) for k, v in (defaults | settings).items() if v is not None]
    return ["--out", str(out), *(text for pair in pairs for text in pair)]


def train(root, out, *more, **settings):
    assert run.main([*flags(root, out, **settings), "--debug", *more]) == 0
    return out / "pipeline"


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights(pipeline):
    from safetensors.torch import load_file

    return load_file(pipeline / "unet" / "diffusion_pytorch_model.safetensors")


def same_image_as_our_sampler(pipeline, out, steps, timesteps=None):
    """The pipeline's latents and Student.sample's, from the same noise and the same generator's state."""
    settings = from_dict(Settings, json.loads((out / "config.json").read_text())["settings"])
    pipe = AutoPipelineForText2Image.from_pretrained(pipeline, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    call = {"timesteps": timesteps} if timesteps else {"num_inference_steps": steps}
    theirs = pipe("colours", guidance_scale=0.0, output_type="latent", generator=torch.Generator().manual_seed(3), **call).images

    backbone = Backbone(str(pipeline), torch.float32, torch.device("cpu"))
    latents = backbone.load_latents(settings)
    student = Student(make_student_denoiser(backbone, latents, settings), settings.timesteps)
    student.denoiser.decode = lambda z: z
    cond = backbone.with_sizes(backbone.text(["colours"]), torch.tensor([[64, 64, 0, 0, 64, 64]]))
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    ours = student.sample(noise, cond, steps, generator=generator)
    scale = backbone.pipe.vae.config.scaling_factor
    assert ours.abs().max() > 1
    assert torch.allclose(theirs, ours, atol=3e-4 * float(ours.abs().max())), (theirs - ours).abs().max()
    return scale


@pytest.mark.usefixtures("another_precision")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backbone", ["sd15", "v", "sdxl"])
def test_each_backbone_trains_and_its_pipeline_samples_as_add_does(checkpoints, tmp_path, backbone, precision):
    pipeline = train(checkpoints, tmp_path, backbone=backbone, precision=precision)
    before, after = weights(checkpoints / backbone), weights(pipeline)
    assert before.keys() == after.keys()
    assert sum(not torch.equal(before[k], after[k]) for k in before) > 0.9 * len(before)
    for row in log_of(tmp_path):
        assert row["distillation"] > 0 and row["r1"] > 0 and row["gradient_norm"] > 0 and row["skipped"] == 0
    for steps in (1, 2, 4):
        same_image_as_our_sampler(pipeline, tmp_path, steps)
    card = (pipeline / "README.md").read_text()
    assert str(checkpoints / "images") in card and "--student-lr" in card and "guidance_scale=0.0" in card


def test_a_student_with_uneven_timesteps_samples_as_add_does(checkpoints, tmp_path):
    pipeline = train(checkpoints, tmp_path, timesteps="99,799,999")
    same_image_as_our_sampler(pipeline, tmp_path, 2, timesteps=[999, 799])
    assert sample.timesteps_of(pipeline, 2) == [999, 799]
    assert "timesteps=[999]" in (pipeline / "README.md").read_text()


@pytest.mark.parametrize("student, teacher", [("sd15", "sdxl"), ("sdxl", "v")])
def test_mixed_pairs_of_other_latents_and_predictions(checkpoints, tmp_path, monkeypatch, student, teacher):
    run_of, kept = Trainer.run, []
    monkeypatch.setattr(Trainer, "run", lambda trainer: (kept.append(trainer.backbone.pipe.unet.device.type), run_of(trainer))[1])
    train(checkpoints, tmp_path, backbone=student, teacher=checkpoints / teacher)
    assert kept == ["meta"]  # nobody uses the backbone's own frozen U-Net here: it takes no memory
    assert all(row["distillation"] > 0 for row in log_of(tmp_path))


@pytest.mark.parametrize("more", [
    {"weight": "nfsd", "guidance": "7.5"}, {"weight": "sds", "space": "latent"}, {"guidance": "3,8", "teacher_steps": 2},
    {"vae": "TAESD"}, {"c_text": "none", "c_img": "none"}, {"augment": "", "features_crop": 0},
    {"features_size": 56, "features_crop": 1.0}, {"ema": 0, "clip": 0}, {"init": "random"},
    {"vae_slicing": "false", "checkpointing": "false"},
], ids=lambda more: " ".join(more))  # fmt: skip
def test_every_variant_of_the_method_runs(checkpoints, tmp_path, more):
    if "vae" in more:
        more = {"vae": checkpoints / "taesd"}
    train(checkpoints, tmp_path, **more)
    assert all(row["r1"] > 0 for row in log_of(tmp_path))


@pytest.mark.parametrize("backbone, space", [("sd15", "latent"), ("sdxl", "latent"), ("v", "pixel")])
def test_with_the_teachers_encoder_as_f_nothing_is_decoded_for_the_discriminator(checkpoints, tmp_path, monkeypatch, backbone, space):
    decode, calls = AutoencoderKL.decode, []
    monkeypatch.setattr(AutoencoderKL, "decode", lambda vae, z, *a, **k: (calls.append(len(z)), decode(vae, z, *a, **k))[1])
    train(checkpoints, tmp_path, backbone=backbone, space=space, features="teacher", vae_slicing="false")
    assert bool(calls) == (space == "pixel")
    assert all(row["r1"] > 0 and row["gradient_adversarial"] > 0 and row["gradient_distillation"] > 0 for row in log_of(tmp_path))


def test_the_teachers_encoder_resumes_with_its_own_draws(checkpoints, tmp_path):
    whole = train(checkpoints, tmp_path / "whole", steps=4, save_every=2, features="teacher", space="latent", validate_every=2)
    train(checkpoints, tmp_path / "cut", steps=2, save_every=2, features="teacher", space="latent")
    cut = train(checkpoints, tmp_path / "cut", "--resume", "auto", steps=4, save_every=2, features="teacher", space="latent")
    a, b = weights(whole), weights(cut)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert (tmp_path / "whole" / "pictures" / "targets_0000004.png").exists()


def test_lora_trains_adapters_and_is_merged_into_the_pipeline(checkpoints, tmp_path):
    pipeline = train(checkpoints, tmp_path, lora_rank=2)
    before, after = weights(checkpoints / "sd15"), weights(pipeline)
    changed = {k for k in before if not torch.allclose(before[k], after[k], atol=1e-7)}
    assert before.keys() == after.keys() and changed
    assert all(any(f".{n}." in k for n in ("to_q", "to_k", "to_v", "to_out")) for k in changed)


@pytest.mark.parametrize("backbone", ["sd15", "sdxl"])
def test_the_base_with_the_saved_adapter_draws_what_the_merged_pipeline_draws(checkpoints, tmp_path, backbone):
    pipeline = train(checkpoints, tmp_path, backbone=backbone, lora_rank=2, student_lr=0.1, warm_up=0)
    merged, base, adapted = (
        AutoPipelineForText2Image.from_pretrained(folder, dtype=torch.float32) for folder in (pipeline, checkpoints / backbone, checkpoints / backbone)
    )
    adapted.load_lora_weights(pipeline)
    images = []
    for pipe in (merged, base, adapted):
        pipe.scheduler = merged.scheduler
        call = dict(num_inference_steps=2, guidance_scale=0.0, output_type="latent", height=64, width=64)
        images.append(pipe("a", generator=torch.Generator().manual_seed(0), **call).images)
    changed = (images[0] - images[1]).abs().max()
    assert changed > 1e-2 * images[0].abs().max()
    assert (images[0] - images[2]).abs().max() < 1e-3 * changed
    assert "load_lora_weights" in (pipeline / "README.md").read_text()


@pytest.mark.usefixtures("another_precision")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_is_as_if_never_stopped(checkpoints, tmp_path, precision):
    whole = train(checkpoints, tmp_path / "whole", steps=4, save_every=2, precision=precision)
    train(checkpoints, tmp_path / "cut", steps=2, save_every=2, precision=precision)
    cut = train(checkpoints, tmp_path / "cut", "--resume", "auto", steps=4, save_every=2, precision=precision)
    a, b = weights(whole), weights(cut)
    assert all(torch.equal(a[k], b[k]) for k in a)
    strip = lambda rows: [{k: v for k, v in row.items() if k not in ("images_per_second", "memory_gib")} for row in rows]  # noqa: E731
    assert strip(log_of(tmp_path / "whole")) == strip(log_of(tmp_path / "cut"))


def test_the_pipeline_has_the_average_of_the_weights(checkpoints, tmp_path):
    pipeline = train(checkpoints, tmp_path, steps=3, ema=0.9, warm_up=0)
    state = torch.load(tmp_path / "checkpoints" / "step_0000003" / "training.pt", weights_only=True)
    saved = weights(pipeline)
    assert all(torch.equal(saved[k.removeprefix("unet.")], x) for k, x in state["average"].items())
    assert any(not torch.equal(x, state["network"][k]) for k, x in state["average"].items())


def test_sample_writes_images_and_says_what_they_show(checkpoints, tmp_path):
    pipeline = train(checkpoints, tmp_path / "run")
    out = tmp_path / "samples"
    arguments = ["--pipeline", str(pipeline), "--prompt", "a", "--prompt", "ß", "--count", "2", "--steps", "2", "--out", str(out)]
    assert sample.main(arguments) == 0
    first = [(out / f"{i:04d}.png").read_bytes() for i in range(4)]
    assert len(set(first)) == 4
    assert [json.loads(x)["text"] for x in (out / "metadata.jsonl").read_text("utf-8").splitlines()] == ["a", "a", "ß", "ß"]
    assert sample.main(arguments) == 0 and first == [(out / f"{i:04d}.png").read_bytes() for i in range(4)]
    image = ["--image", str(out / "0000.png"), "--strength", "0.5", "--steps", "2", "--out", str(tmp_path / "i2i")]
    assert sample.main(["--pipeline", str(pipeline), "--prompt", "a", *image]) == 0
    assert (tmp_path / "i2i" / "0000.png").read_bytes() not in first


@pytest.mark.parametrize("steps, strength, length", [(1, 1, 1), (1, 0.5, 2), (2, 0.5, 4), (1, 0.3, 4), (3, 0.3, 10), (4, 1, 4)])
def test_the_schedule_is_as_long_as_its_share_needs(steps, strength, length):
    assert sample.schedule_length(steps, strength) == length
    assert int(length * strength) == steps


def test_image_to_image_takes_as_many_steps_as_asked(checkpoints, tmp_path, capsys, monkeypatch):
    pipeline = train(checkpoints, tmp_path)
    forward, calls = UNet2DConditionModel.forward, []
    monkeypatch.setattr(UNet2DConditionModel, "forward", lambda unet, x, t, *a, **k: (calls.append(int(t)), forward(unet, x, t, *a, **k))[1])
    start = ["--pipeline", str(pipeline), "--prompt", "a", "--image", str(checkpoints / "images" / "000.jpg"), "--out", str(tmp_path / "i2i")]
    assert sample.main(start) == 0 and calls == [499]
    calls.clear()
    assert sample.main([*start, "--steps", "2"]) == 0 and calls == [499, 249]
    assert sample.main([*start, "--strength", "0.2"]) == 2
    assert "--strength 0.2: this student has 4 timesteps, of which that leaves 0" in capsys.readouterr().err


@pytest.mark.usefixtures("another_precision")
def test_bf16_survives_checkpoints_and_resume(checkpoints, tmp_path, monkeypatch, capsys):
    """What a student's middle block gives, in every iteration before and after a save and after --resume."""
    iteration, seen = Trainer.iteration, {}

    def watched(trainer, batches):
        hook = trainer.network.unet.mid_block.register_forward_hook(lambda m, i, out: types.add(out.dtype))
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


MISTAKES = {
    "wrong repository": ({"backbone": "nobody/nothing"}, ["nobody/nothing", "no diffusers pipeline"]),
    "no data": ({"data": None}, ["--data"]),
    "no such folder": ({"data": "/nowhere"}, ["--data /nowhere"]),
    "unknown choice": ({"weight": "sdss"}, ["--weight sdss", "exponential"]),
    "features": ({"features": "/nowhere"}, ["--features /nowhere"]),
    "c_text": ({"c_text": "/nowhere"}, ["--c-text /nowhere"]),
    "F of other latents": ({"features": "teacher", "teacher": "SDXL"}, ["--features teacher", "other latents"]),
    "random LoRA": ({"init": "random", "lora_rank": 4}, ["--lora-rank 4", "--init random"]),
    "resolution": ({"resolution": 60}, ["--resolution 60", "multiple of 8"]),
    "features size": ({"features_size": 30}, ["--features-size 30", "14"]),
    "resume": ({"--resume": "/nowhere"}, ["--resume /nowhere"]),
}


@pytest.mark.parametrize("change, words", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_ends_in_one_line(checkpoints, tmp_path, capsys, monkeypatch, change, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    more = [x for k, v in change.items() if k.startswith("--") for x in (k, v)]
    settings = {k: checkpoints / "sdxl" if v == "SDXL" else v for k, v in change.items() if not k.startswith("--")}
    assert run.main([*flags(checkpoints, tmp_path, **settings), *more]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("full/run.py: ") and all(word in message for word in words), message


def test_the_teacher_of_nfsd_has_the_guidance_of_its_paper():
    assert (Settings().guidance, Settings(weight="nfsd").guidance, Settings(weight="nfsd", guidance=(3.0,)).guidance) == ((1.0,), (7.5,), (3.0,))


def test_help_shows_every_setting_and_needs_no_diffusers():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / "full" / "run.py", "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0 and "--teacher-steps" in done.stdout and "T_student" in done.stdout
    assert "diffusers" not in done.stderr


def test_a_text_encoder_without_weights_is_refused(checkpoints, tmp_path, capsys):
    folder = shutil.copytree(checkpoints / "clip", tmp_path / "clip")
    (folder / "open_clip_pytorch_model.bin").unlink()
    assert run.main(flags(checkpoints, tmp_path / "run", c_text=folder)) == 2
    assert f"--c-text {folder}: neither an open_clip MODEL/WEIGHTS nor a folder of one" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["shards", "hugging face"])
def test_the_other_sources_train_too(checkpoints, tmp_path, monkeypatch, kind):
    """The folder's images and captions as webdataset shards, and as a data set that the datasets library reads."""
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
        lines = [json.dumps({"file_name": f.name, "text": f.with_suffix(".txt").read_text()}) for f in files]
        (tmp_path / "set" / "metadata.jsonl").write_text("\n".join(lines))
        data = f"hf:{tmp_path / 'set'}"
    train(checkpoints, tmp_path / "run", data=data)
    assert all(row["distillation"] > 0 and row["skipped"] == 0 for row in log_of(tmp_path / "run"))


@pytest.mark.parametrize("missing", ["vae", "unet/diffusion_pytorch_model.safetensors", "text_encoder/config.json", "model_index.json", "tokenizer"])
def test_a_checkpoint_with_files_missing_ends_in_one_line(checkpoints, tmp_path, capsys, missing):
    folder = shutil.copytree(checkpoints / "sd15", tmp_path / "sd15")
    shutil.rmtree(folder / missing) if (folder / missing).is_dir() else (folder / missing).unlink()
    assert run.main(flags(checkpoints, tmp_path / "run", backbone=folder)) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith(f"full/run.py: {folder}: ") and "Traceback" not in message
