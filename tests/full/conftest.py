"""Tiny checkpoints, and what is made of them once for all tests."""

import contextlib
import copy
import io
import json
import shutil
from dataclasses import replace

import pytest
import tiny_checkpoints as tiny
from accelerate.state import AcceleratorState
from diffusers import UNet2DConditionModel
from full_coco import load_fid, write_coco, write_student
from full_coco import run as evaluate_into
from full_plans import forbid_network, settings
from full_runs import FIVE, train
from PIL import Image

from full import run
from full.plan import plan
from full.study import evaluate

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


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


@pytest.fixture(scope="session")
def whole(checkpoints, tmp_path_factory):
    """A run of five iterations of two micro-batches that was never stopped."""
    out = tmp_path_factory.mktemp("whole")
    train(checkpoints, out, **FIVE)
    return out


@pytest.fixture(scope="session")
def bare(checkpoints, tmp_path_factory):
    """The same without weights and images: json alone."""
    root = tmp_path_factory.mktemp("bare")
    for file in checkpoints.rglob("*.json"):
        (root / file.relative_to(checkpoints)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, root / file.relative_to(checkpoints))
    return root


@pytest.fixture(scope="session")
def planned(bare):
    """planned(gpus, setting=value …): a Plan of the tiny checkpoint, measured once for each
    precision."""
    made = {}

    def make(gpus=8, precision="fp32", **more):
        key = gpus > 1, precision
        if key not in made:
            made[key] = plan.Plan(settings(bare, precision=precision), gpus)
        it = copy.copy(made[key])
        it.gpus, it.settings = gpus, replace(it.settings, **more)
        return it

    return make


@pytest.fixture(scope="session")
def sd15():
    """(exit code, report, Plan) of run.py --backbone sd15 on eight A100, without a network."""
    made, build = [], plan.Plan
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(plan, "Plan", lambda *args: made.append(build(*args)) or made[0])
        forbid_network(patch)
        code = run.main(
            [
                "--backbone",
                "sd15",
                "--batch",
                "4",
                "--plan",
                "--gpus",
                "8",
                "--gpu",
                "a100-80",
                "--debug",
            ]
        )
    return code, out.getvalue(), made[0]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Folder of checkpoints, students and a COCO."""
    root = tmp_path_factory.mktemp("world")
    tiny.write_sd(root / "sd15")
    tiny.write_sd(root / "other", seed=3)
    tiny.write_sdxl(root / "sdxl", seed=9)
    tiny.write_open_clip(root / "clip")
    write_student(root / "student", root / "other")
    write_student(root / "uneven", root / "other", timesteps=(99, 799, 999))
    write_coco(root / "coco")
    return root


@pytest.fixture
def tiny_features(monkeypatch):
    monkeypatch.setattr(evaluate, "load_fid", load_fid)


@pytest.fixture
def unet_calls(monkeypatch):
    """Appended to at every call of a U-Net: (timestep, batch)."""
    calls, forward = [], UNet2DConditionModel.forward

    def spy(self, sample, timestep, *more, **named):
        calls.append((int(timestep), len(sample)))
        return forward(self, sample, timestep, *more, **named)

    monkeypatch.setattr(UNet2DConditionModel, "forward", spy)
    return calls


@pytest.fixture(scope="session")
def done(world, tmp_path_factory):
    """A finished evaluation: (folder, evaluation.json's content). Not to be written to."""
    out = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "load_fid", load_fid)
        return out, evaluate_into(world, out)


@pytest.fixture
def copied(done, tmp_path):
    """A copy of it that may be written to."""
    return shutil.copytree(done[0], tmp_path / "out")


@pytest.fixture
def folders(tmp_path):
    """Two models, five prompts; an image's colour tells its model."""
    for model, colour in (("ours", (200, 0, 0)), ("theirs", (0, 0, 200))):
        folder = tmp_path / model
        folder.mkdir()
        for i in range(5):
            Image.new("RGB", (8, 8), colour).save(folder / f"{i:04d}.png")
        lines = [
            json.dumps({"file_name": f"{i:04d}.png", "text": f"<b>prompt {i}</b>"})
            for i in range(5)
        ]
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    return [f"{model}={tmp_path / model}" for model in ("ours", "theirs")]


@pytest.fixture
def browser():
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, NAMES)), None)
    assert path, (
        f"none of {', '.join(NAMES)} is on the PATH; install one (Debian: apt-get install chromium)"
    )
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=QUIET)
        yield running
        running.close()
