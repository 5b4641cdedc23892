"""--teacher: a public one, on a tiny pipeline of diffusers' own classes."""

import json
import shutil
import sys

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torchvision.utils import save_image
from toy_runs import TINY

from toy import run, sample
from toy.demo import make_draw
from toy.features import TeacherEncoder
from toy.public import make_public


def make_pipeline(scheduler=None, **more):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=32,
        block_out_channels=(16, 32),
        layers_per_block=2,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **more,
    )
    return DDPMPipeline(unet, scheduler or DDPMScheduler())


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    folder = tmp_path_factory.mktemp("public") / "ddpm"
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A hundred colour pictures of each of two classes."""
    folder = tmp_path_factory.mktemp("pictures")
    g = torch.Generator().manual_seed(0)
    for name in "ab":
        (folder / name).mkdir()
        for i in range(100):
            save_image(torch.rand(3, 32, 32, generator=g), folder / name / f"{i:02}.png")
    return folder


def denoiser_of(pipe):
    texts = {"unet": pipe.unet.to_json_string(), "scheduler": pipe.scheduler.to_json_string()}
    denoiser = make_public(texts, 2, bf16=False)
    denoiser.network.unet.load_state_dict(pipe.unet.state_dict())
    return denoiser.eval()


@torch.no_grad()
def test_its_estimate_is_that_of_diffusers_scheduler():
    pipe = make_pipeline()
    denoiser, x_t = denoiser_of(pipe), torch.randn(3, 3, 32, 32)
    for t in (10, 500, 900):
        output = pipe.unet(x_t, t).sample
        theirs = pipe.scheduler.step(output, t, x_t).pred_original_sample
        ours = denoiser(x_t, torch.full((3,), t), torch.zeros(3, dtype=torch.long))
        assert torch.allclose(ours, theirs, atol=1e-5) and ours.abs().max() <= 1


@torch.no_grad()
def test_its_encoder_gives_the_maps_of_a_whole_pass():
    denoiser, seen = denoiser_of(make_pipeline()), []
    network, x_t, t = denoiser.network, torch.randn(2, 3, 32, 32), torch.tensor([7, 300])
    first, second = network.unet.down_blocks
    for module in (*first.resnets, *second.attentions, network.unet.mid_block):
        module.register_forward_hook(lambda module, args, out: seen.append(out))
    network(x_t, t, None)
    whole = list(seen)
    maps = network.encode(x_t, t, None)
    assert len(maps) == len(whole) == 5
    assert all(torch.equal(a, b) for a, b in zip(maps, whole, strict=True))
    assert [x.shape[1] for x in maps] == network.map_channels == [16, 16, 32, 32, 32]
    tokens = TeacherEncoder(denoiser, seed=0)(torch.rand(2, 3, 32, 32))
    assert [tuple(x.shape[1:]) for x in tokens] == [(256, 64)] * 2 + [(256, 32)] * 3


def test_it_is_distilled_and_kept(public, pictures, tmp_path, capsys):
    teacher, out = shutil.copytree(public, tmp_path / "ddpm"), tmp_path / "run"
    flags = ["--dataset", "folder", "--data-dir", str(pictures), "--out", str(out)]
    tiny = [flag for flag in TINY if flag not in ("--dataset", "glyphs")]
    assert run.main([*tiny, *flags, "--teacher", str(teacher)]) == 0
    results = json.loads((out / "results.json").read_text())["results"]
    assert {row["guidance"] for row in results["teacher"]} == {1.0}
    kept = torch.load(out / "teacher" / "checkpoint.pt", weights_only=True)["ema"]
    state = torch.load(out / "distil" / "student.pt", weights_only=True)
    moved = [k for k, w in state["network"].items() if not torch.equal(w, kept[f"module.{k}"])]
    assert len(moved) == len(list(state["network"]))
    report = (out / "report.md").read_text()
    assert "| – |" in report and "class accuracy, one step" not in report
    # Nothing is fetched again: not for the rest of the run, nor for drawing.
    shutil.rmtree(teacher)
    assert run.main([*tiny, *flags, "--teacher", str(teacher), "--distil-steps", "3"]) == 0
    grid = tmp_path / "grid.png"
    sample.main(["--run", str(out), "--n", "4", "--out", str(grid)])
    assert grid.exists()
    draw, classes, _ = make_draw(out)
    drawn, _, of_teacher, _ = draw(classes[0], 1, 0)
    assert drawn.shape == of_teacher.shape
    capsys.readouterr()


def test_what_cannot_be_a_teacher_is_refused_before_anything_is_trained(
    public, pictures, tmp_path, capsys, monkeypatch
):
    colour = ["--dataset", "folder", "--data-dir", str(pictures)]
    tiny = [flag for flag in TINY if flag not in ("--dataset", "glyphs")]

    def refused(teacher, line, *more):
        assert run.main([*tiny, *more, "--out", str(tmp_path / "run"), "--teacher", teacher]) == 2
        assert line in capsys.readouterr().err
        assert not (tmp_path / "run" / "metric").exists()

    grey = ("--dataset", "glyphs")
    refused(str(public), "draws 3×32×32, but the data is 1×32×32", *grey)
    refused(str(tmp_path / "none"), "none: no diffusers DDPM pipeline can be loaded", *colour)
    for line, unfit in (
        ("has classes; name another pipeline", dict(class_embed_type="timestep")),
        ("has classes", dict(num_class_embeds=2)),
        ("predicts variances, too", dict(out_channels=6)),
        ("centres its input", dict(center_input_sample=True)),
        ("has 500 timesteps", dict(scheduler=DDPMScheduler(num_train_timesteps=500))),
        ("at zero terminal SNR", dict(scheduler=DDPMScheduler(rescale_betas_zero_snr=True))),
    ):
        make_pipeline(**unfit).save_pretrained(tmp_path / "unfit")
        refused(str(tmp_path / "unfit"), line, *colour)
    refused(str(public), "no --distil-guidance other than 1", *colour, "--distil-guidance", "2")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    refused(str(public), "needs diffusers; python -m pip install", *colour)
