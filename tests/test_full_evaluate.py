"""full/evaluate.py on tiny checkpoints and a COCO of six images: what is drawn, measured, kept and said."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import open_clip
import pytest
import tiny_checkpoints as tiny
import torch
from diffusers import AutoPipelineForText2Image, DPMSolverMultistepScheduler, UNet2DConditionModel
from PIL import Image
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from full import evaluate, vote
from full.backbones import Backbone
from full.export import save_pipeline
from full.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
REAL_LOAD_FID = evaluate.load_fid
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")
IDS = [7, 21, 3, 400, 15, 9]  # in no order; sorted: 3, 7, 9, 15, 21, 400
N = 5


class Means(nn.Module):
    """A feature network that a hand can follow: the means of red and green, uint8 images in."""

    num_features = 2

    def forward(self, images):
        return images.double().mean((2, 3))[:, :2]


def write_coco(folder, ids=IDS):
    """COCO's layout: two captions for each image, that of the higher id first."""
    (folder / "annotations").mkdir(parents=True)
    tiny.write_images(folder / "drawn", len(ids), size=(80, 72), seed=4)
    (folder / "val2017").mkdir()
    for k, i in enumerate(ids):
        (folder / "drawn" / f"{k:03d}.jpg").rename(folder / "val2017" / f"{i:012d}.jpg")
    shutil.rmtree(folder / "drawn")
    images = [{"id": i, "file_name": f"{i:012d}.jpg"} for i in ids]
    annotations = [{"id": 100 - i, "image_id": i, "caption": f"second of {i}"} for i in ids]
    annotations += [{"id": 50 - i, "image_id": i, "caption": f" colours \n of {i}"} for i in ids]
    write_captions(folder, images, annotations)
    return folder


def write_captions(folder, images, annotations):
    (folder / evaluate.CAPTIONS).write_text(json.dumps({"images": images, "annotations": annotations}))


def write_student(folder, base, **settings):
    """The base's own weights, saved as full/run.py saves a student's."""
    backbone = Backbone(str(base), torch.float32, torch.device("cpu"))
    state = {f"unet.{k}": x for k, x in backbone.pipe.unet.state_dict().items()}
    settings = Settings(backbone=str(base), resolution=64, save_dtype="fp32", **settings)
    save_pipeline(folder, backbone, state, settings)


@pytest.fixture(scope="module")
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


@pytest.fixture(autouse=True)
def tiny_features(monkeypatch):
    monkeypatch.setattr(evaluate, "load_fid", lambda path: FrechetInceptionDistance(Means(), reset_real_features=False))


@pytest.fixture
def unet_calls(monkeypatch):
    """Appended to at every call of a U-Net: (timestep, batch)."""
    calls, forward = [], UNet2DConditionModel.forward

    def spy(self, sample, timestep, *more, **named):
        calls.append((int(timestep), len(sample)))
        return forward(self, sample, timestep, *more, **named)

    monkeypatch.setattr(UNet2DConditionModel, "forward", spy)
    return calls


def arguments(world, out, **changes):
    """A command line; values None leave a flag out."""
    given = dict(pipeline=world / "student", teacher=world / "sd15", coco=world / "coco", clip=world / "clip", out=out,
                 images=N, teacher_steps="3,2", batch=3, timed=1, device="cpu")  # fmt: skip
    pairs = [(f"--{k.replace('_', '-')}", str(v)) for k, v in (given | changes).items() if v is not None]
    return [text for pair in pairs for text in pair]


def run(world, out, **changes):
    """evaluation.json's content."""
    assert evaluate.main([*arguments(world, out, **changes), "--debug"]) == 0
    return json.loads((out / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def done(world, tmp_path_factory):
    """A finished evaluation: (folder, evaluation.json's content). Not to be written to."""
    out = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "load_fid", lambda path: FrechetInceptionDistance(Means(), reset_real_features=False))
        return out, run(world, out)


@pytest.fixture
def copied(done, tmp_path):
    """A copy of it that may be written to."""
    return shutil.copytree(done[0], tmp_path / "out")


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def pictures(out):
    """{row/name: pixels} of all images."""
    return {str(path.relative_to(out)): pixels(path) for path in sorted(out.glob("*-*/*.png"))}


def times(out):
    return {path: path.stat().st_mtime_ns for path in out.glob("*-*/*.png")}


# Captions ------------------------------------------------------------------------------------------------------------


def test_captions_are_those_of_the_lowest_id_in_the_order_of_the_images_ids(world, tmp_path):
    samples, digest = evaluate.read_coco(world / "coco", N, 30)
    assert [s.caption for s in samples] == [f"colours of {i}" for i in (3, 7, 9, 15, 21)]
    assert [s.file.name for s in samples] == [f"{i:012d}.jpg" for i in (3, 7, 9, 15, 21)]
    assert [s.name for s in samples][0] == "000000000003.png" and [s.seed for s in samples] == [30, 31, 32, 33, 34]

    folder = shutil.copytree(world / "coco", tmp_path / "coco")
    content = json.loads((folder / evaluate.CAPTIONS).read_text())
    for part in content.values():
        random.Random(0).shuffle(part)
    (folder / evaluate.CAPTIONS).write_text(json.dumps(content))
    again = evaluate.read_coco(folder, 3, 30)
    assert [s.caption for s in again[0]] == [s.caption for s in samples[:3]] and again[1] == digest


def test_images_without_a_caption_or_a_file_are_not_counted(world, tmp_path):
    folder = shutil.copytree(world / "coco", tmp_path / "coco")
    content = json.loads((folder / evaluate.CAPTIONS).read_text())
    write_captions(folder, content["images"], [a for a in content["annotations"] if a["image_id"] != 7])
    (folder / "val2017" / f"{15:012d}.jpg").unlink()
    samples, _ = evaluate.read_coco(folder, 4, 0)
    assert [s.caption for s in samples] == [f"colours of {i}" for i in (3, 9, 21, 400)]
    with pytest.raises(ValueError, match="--images 5: .* has 4 with captions"):
        evaluate.read_coco(folder, 5, 0)


# Metrics -------------------------------------------------------------------------------------------------------------


def cropped(path, size=64):
    """80×72 → size/72 of it, the middle cut out."""
    image = Image.open(path).resize((round(80 * size / 72), size), Image.Resampling.LANCZOS)
    left = (image.width - size) // 2
    return image.crop((left, 0, left + size, size))


def frechet(x, y):
    """‖μ_x − μ_y‖² + tr A + tr B − 2 tr (AB)^½ in two dimensions, where tr M^½ = √(tr M + 2 √det M)."""
    a, b = np.cov(x.T), np.cov(y.T)
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(max(0, np.linalg.det(a @ b))))
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * root


def features(arrays):
    return np.array([a.astype(float).mean((0, 1))[:2] for a in arrays])


def test_fid_is_the_closed_form_against_centre_cropped_coco(world, done):
    out, result = done
    real = features([np.asarray(cropped(world / "coco" / "val2017" / f"{i:012d}.jpg")) for i in (3, 7, 9, 15, 21)])
    for row in result["rows"]:
        drawn = features([pixels(p) for p in sorted((out / row["folder"]).glob("*.png"))])
        assert row["fid"] == pytest.approx(frechet(real, drawn), rel=1e-5) and row["fid"] > 1


def test_fid_of_a_set_against_itself_is_0_and_made_lighter_the_shift_squared(world, tmp_path):
    samples, _ = evaluate.read_coco(world / "coco", N, 0)
    images = {s.name: np.minimum(np.asarray(cropped(s.file)), 245) for s in samples}

    def measure(shift):
        for name, image in images.items():
            Image.fromarray(image + np.uint8(shift)).save(tmp_path / name)
        return evaluate.measure(fid, lambda images, captions: torch.zeros(len(images)), tmp_path, samples, 2)["fid"]

    fid = evaluate.load_fid("")
    fid.update(torch.tensor(np.stack(list(images.values()))).permute(0, 3, 1, 2), real=True)
    assert measure(0) == pytest.approx(0, abs=1e-6)
    assert measure(10) == pytest.approx(10**2 + 10**2, rel=1e-5)  # red and green; the covariances are equal


def test_clip_score_is_100_times_the_mean_cosine(world, done):
    out, result = done
    network = open_clip.create_model(f"local-dir:{world / 'clip'}").eval().requires_grad_(False)
    mean, std = np.array(open_clip.OPENAI_DATASET_MEAN), np.array(open_clip.OPENAI_DATASET_STD)
    for row in result["rows"][:1] + result["rows"][-1:]:
        cosines = []
        for path, i in zip(sorted((out / row["folder"]).glob("*.png")), (3, 7, 9, 15, 21), strict=True):
            image = np.asarray(Image.open(path).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)) / 255
            x = network.encode_image(torch.tensor((image - mean) / std).permute(2, 0, 1)[None].float())
            y = network.encode_text(open_clip.get_tokenizer("ViT-g-14")([f"colours of {i}"]))
            cosines.append(float((x @ y.T) / (x.norm() * y.norm())))
        assert row["clip"] == pytest.approx(100 * np.mean(cosines), abs=1e-3) and abs(row["clip"]) > 0.1


def test_the_real_inception_reads_weights_from_a_file(world, tmp_path, monkeypatch):
    """Random weights, two images against two: the distance of the network's own features by another formula."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    with monkeypatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: None)
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = module.FeatureExtractorInceptionV3("random", ["2048"])
    torch.manual_seed(0)
    for p in network.parameters():
        if p.ndim == 4:
            nn.init.kaiming_normal_(p, nonlinearity="relu")
    torch.save(network.state_dict(), tmp_path / "inception.pth")

    samples, _ = evaluate.read_coco(world / "coco", 2, 0)
    for s in samples:
        Image.fromarray(pixels(s.file).clip(0, 100).astype(np.uint8)).resize((64, 64)).save(tmp_path / s.name)
    fid = REAL_LOAD_FID(str(tmp_path / "inception.pth"))
    evaluate.add_real(fid, samples, 64, 2)
    found = evaluate.measure(fid, lambda images, captions: torch.zeros(2), tmp_path, samples, 2)["fid"]
    stack = lambda images: torch.stack([torch.tensor(np.asarray(i)).permute(2, 0, 1) for i in images])  # noqa: E731
    x = network(stack([cropped(s.file) for s in samples]))[0].double()
    y = network(stack([Image.open(tmp_path / s.name) for s in samples]))[0].double()
    a, b = (z - z.mean(0) for z in (x, y))
    root = torch.linalg.matrix_norm(a @ b.T, "nuc")  # tr (AB)^½, for the covariances are A = aᵀa and B = bᵀb
    expected = (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * root
    assert found == pytest.approx(float(expected), rel=1e-3) and expected > 0.01


# Drawing -------------------------------------------------------------------------------------------------------------


def test_the_teacher_draws_with_dpm_solver_and_guidance_the_student_without(world, done):
    out, _ = done
    captions = [f"colours of {i}" for i in (3, 7, 9, 15, 21)]
    teacher = AutoPipelineForText2Image.from_pretrained(world / "sd15", dtype=torch.float32)
    teacher.scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", algorithm_type="dpmsolver++", solver_order=2,
        timestep_spacing="linspace",
    )  # fmt: skip
    student = AutoPipelineForText2Image.from_pretrained(world / "student", dtype=torch.float32)
    calls = {
        "teacher-3": (teacher, {"num_inference_steps": 3, "guidance_scale": 7.5}),
        "teacher-2": (teacher, {"num_inference_steps": 2, "guidance_scale": 7.5}),
        "student-1": (student, {"num_inference_steps": 1, "guidance_scale": 0.0}),
        "student-4": (student, {"num_inference_steps": 4, "guidance_scale": 0.0}),
    }
    for row, (pipe, call) in calls.items():
        pipe.set_progress_bar_config(disable=True)
        for seed, (caption, path) in enumerate(zip(captions, sorted((out / row).glob("*.png")), strict=True)):
            image = np.asarray(pipe(caption, generator=torch.Generator().manual_seed(seed), **call).images[0])
            assert image.std() > 5 and abs(image - pixels(path)).max() <= 1


def test_each_row_evaluates_the_unet_at_its_steps_and_only_the_teacher_twice(world, tmp_path, unet_calls):
    result = run(world, tmp_path, images=4, teacher_guidance=3)
    teacher = {3: [999, 666, 333], 2: [999, 500]}
    student = {1: [999], 2: [999, 499], 4: [999, 749, 499, 249]}
    expected = []
    for doubled, rows in ((2, teacher), (1, student)):
        for timesteps in rows.values():  # four images in batches of three, a warm-up, one timed
            expected += [(t, n * doubled) for n in (3, 1, 1, 1) for t in timesteps]
    assert unet_calls == expected
    found = [(r["model"], r["steps"], r["guidance"], r["evaluations"]) for r in result["rows"]]
    assert found == [("teacher", 3, 3, 6), ("teacher", 2, 3, 4), *(("student", k, 0, k) for k in (1, 2, 4))]


def test_guidance_1_is_none_and_counts_once(world, tmp_path, unet_calls):
    result = run(world, tmp_path, images=2, teacher_guidance=1, teacher_steps="2", student_steps="1")
    assert result["rows"][0]["evaluations"] == 2 and {n for _, n in unet_calls} == {1, 2}
    assert "| teacher, DPM-Solver++ | 2 | none | 2 |" in (tmp_path / "evaluation.md").read_text()


def test_the_batch_changes_no_image(world, done, tmp_path):
    run(world, tmp_path, batch=1, teacher_steps="2", student_steps="2")
    one, three = pictures(tmp_path), pictures(done[0])
    assert len(one) == 2 * N
    for name, image in one.items():
        assert abs(image - three[name]).max() <= 1, name
    assert len({image.tobytes() for image in one.values()}) == 2 * N


def test_a_student_of_uneven_timesteps_is_drawn_at_them(world, tmp_path, unet_calls):
    run(world, tmp_path, pipeline=world / "uneven", teacher=None, student_steps="2", images=2, batch=2)
    assert unet_calls == [(t, n) for n in (2, 1, 1) for t in (999, 799)]


def test_sdxl_teaches_and_the_resolution_is_asked_for(world, tmp_path):
    result = run(world, tmp_path, teacher=world / "sdxl", resolution=32, images=2, teacher_steps="2", student_steps="1")
    assert result["resolution"] == 32
    assert all(image.shape == (32, 32, 3) and image.std() > 5 for image in pictures(tmp_path).values())


def test_a_safety_checker_blackens_nothing(world, tmp_path):
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    small = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = CLIPConfig(vision_config=small | {"image_size": 32, "patch_size": 16}, text_config=small, projection_dim=8)
    checker = StableDiffusionSafetyChecker(config)
    nn.init.constant_(checker.concept_embeds_weights, -1.0)  # everything is above this similarity
    pipe = AutoPipelineForText2Image.from_pretrained(world / "sd15", dtype=torch.float32)
    size = {"shortest_edge": 32}
    pipe.register_modules(safety_checker=checker, feature_extractor=CLIPImageProcessor(size=size, crop_size=32))
    assert np.asarray(pipe("a", num_inference_steps=1).images[0]).max() == 0
    pipe.save_pretrained(tmp_path / "careful")
    run(world, tmp_path / "out", teacher=tmp_path / "careful", images=2, teacher_steps="2", student_steps="1")
    assert all(image.std() > 5 for image in pictures(tmp_path / "out").values())


# What is kept --------------------------------------------------------------------------------------------------------


def test_a_second_run_draws_only_what_is_missing(world, copied, unet_calls):
    before, images = times(copied), pictures(copied)
    gone = copied / "student-2" / "000000000009.png"
    gone.unlink()
    run(world, copied)
    after = times(copied)
    assert {p for p in before if before[p] != after[p]} == {gone} and len(before) == 5 * N
    assert abs(pixels(gone) - images["student-2/000000000009.png"]).max() <= 1
    # The five rows' warm-ups and timed calls, and two steps for one image.
    assert len(unet_calls) == 2 * (3 + 2 + 1 + 2 + 4) + 2 and max(n for _, n in unet_calls[-14:]) == 1


def test_fewer_images_use_those_that_are_there(world, copied):
    before, of_all = times(copied), json.loads((copied / "evaluation.json").read_text())["rows"][0]["fid"]
    result = run(world, copied, images=3)
    assert times(copied) == before and result["rows"][0]["fid"] != of_all
    assert len((copied / "student-1" / "metadata.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("change", ["seed", "guidance", "captions", "weights", "resolution"])
def test_what_other_settings_drew_is_drawn_again(world, copied, tmp_path, change):
    old, images = times(copied), pictures(copied)
    changes, kept = {"timed": 2}, set()  # timed: a setting that changes no image
    if change == "seed":
        changes["seed"] = 1
    if change == "guidance":
        changes["teacher_guidance"], kept = 3, {"student-1", "student-2", "student-4"}
    if change == "resolution":
        changes["resolution"] = 72
    if change == "captions":
        changes["coco"] = folder = shutil.copytree(world / "coco", tmp_path / "coco")
        content = json.loads((folder / evaluate.CAPTIONS).read_text())
        for a in content["annotations"]:
            a["caption"] = a["caption"].upper() + "!"
        (folder / evaluate.CAPTIONS).write_text(json.dumps(content))
    if change == "weights":  # the same folder, trained on
        changes["pipeline"], kept = world / "student", {"teacher-3", "teacher-2"}
        shutil.move(world / "student", tmp_path / "student")
        shutil.copytree(tmp_path / "student", world / "student")
        pipe = AutoPipelineForText2Image.from_pretrained(world / "student", dtype=torch.float32)
        nn.init.normal_(pipe.unet.conv_out.weight)
        pipe.unet.save_pretrained(world / "student" / "unet")
    try:
        run(world, copied, **changes)
    finally:
        if change == "weights":
            shutil.rmtree(world / "student")
            shutil.move(tmp_path / "student", world / "student")
    new = times(copied)
    assert new.keys() == old.keys()
    assert {p.parent.name for p in old if old[p] == new[p]} == kept
    for name, image in pictures(copied).items():
        if change == "captions" and name.startswith("student"):
            continue  # tiny networks hardly hear a caption without guidance
        same = image.shape == images[name].shape and abs(image - images[name]).max() <= 1
        assert same == (name.split("/")[0] in kept), name


def test_an_interrupted_run_keeps_what_it_drew_and_no_half_image(world, done, tmp_path, monkeypatch, capsys):
    save, saved = Image.Image.save, []

    def interrupted(self, path, *more):
        if len(saved) == 4:
            Path(path).write_bytes(b"half of an image")
            raise KeyboardInterrupt
        saved.append(path)
        return save(self, path, *more)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", interrupted)
        assert evaluate.main(arguments(world, tmp_path)) == 130
    assert "the same command goes on" in capsys.readouterr().err
    before = times(tmp_path)
    assert len(before) == 4
    run(world, tmp_path)
    assert all(times(tmp_path)[path] == t for path, t in before.items())
    whole = pictures(done[0])
    assert all(abs(image - whole[name]).max() <= 1 for name, image in pictures(tmp_path).items())


def test_a_folder_of_other_files_is_left_alone(world, tmp_path, capsys):
    (tmp_path / "teacher-3").mkdir()
    (tmp_path / "teacher-3" / "mine.png").write_bytes(b"mine")
    assert evaluate.main(arguments(world, tmp_path)) == 2
    assert "teacher-3/ in it holds other files" in capsys.readouterr().err
    assert (tmp_path / "teacher-3" / "mine.png").read_bytes() == b"mine"


# The result ----------------------------------------------------------------------------------------------------------


def test_the_report_has_the_rows_in_order_and_says_how_they_came_about(world, done):
    out, result = done
    text = (out / "evaluation.md").read_text("utf-8")
    lines = text.splitlines()
    top = lines.index("| model | steps | guidance | U-Net evaluations | FID ↓ | CLIP ↑ | seconds/image |")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[top + 2 : top + 7]]
    names = [["teacher, DPM-Solver++", "3", "7.5", "6"], ["teacher, DPM-Solver++", "2", "7.5", "4"]]
    assert [row[:4] for row in rows] == names + [["student", k, "none", k] for k in "124"]
    for cells, row in zip(rows, result["rows"], strict=True):
        numbers = [row["fid"], row["clip"], row["seconds"]]
        assert [float(c) for c in cells[4:]] == pytest.approx(numbers, rel=0.006, abs=0.0051)
        assert 0 < row["seconds"] < 10
    assert lines[top + 7] == "" and f"# {world / 'student'} beside {world / 'sd15'}" == lines[0]
    for words in (
        "- 5 images a row, 64×64, seeds 0 to 4", "median of 1 calls at batch 1", "float32 on cpu",
        f"commit {result['commit']}", f"{world / 'clip'}, float32", "with 5 the covariances are singular",
        "paper's own numbers, for reference, not measured here", "| ADD-M | 1 | 19.7 | 32.6 | 0.09 |",
        "torchmetrics 1.", "diffusers 0.",
    ):  # fmt: skip
        assert words in text, words
    assert result["settings"]["images"] == N and result["settings"]["teacher_steps"] == [3, 2]


def test_a_report_of_2048_images_does_not_warn(done):
    _, result = done
    for n, warned in ((2047, True), (2048, False)):
        text = "\n".join(evaluate.report(result | {"settings": result["settings"] | {"images": n}}))
        assert ("Fewer images" in text) == warned


def test_the_plot_shows_every_row(done, tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    _, result = done
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    evaluate.plot(result, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").size == (1200, 480)
    for axis, key in zip(figures[0].axes, ("fid", "clip"), strict=True):
        assert axis.get_xscale() == "log"
        for line, model in zip(axis.lines, ("teacher", "student"), strict=True):
            rows = {(r["seconds"], r[key]) for r in result["rows"] if r["model"] == model}
            assert set(zip(*line.get_data(), strict=True)) == rows and line.get_label().startswith(model)
        labels = {(t.get_text(), t.xy) for t in axis.texts}
        texts = ["3 steps", "2 steps", "1 step", "2 steps", "4 steps"]
        assert labels == {(t, (r["seconds"], r[key])) for t, r in zip(texts, result["rows"], strict=True)}


def test_seconds_are_the_median_after_a_warm_up(monkeypatch):
    clock, lasts = [0.0], iter((50.0, 3.0, 1.0, 2.0, 9.0, 4.0))
    monkeypatch.setattr(evaluate.time, "perf_counter", lambda: clock[0])

    class Pipe:
        device = torch.device("cpu")

        def __call__(self, caption, generator, num_inference_steps):
            assert (caption, num_inference_steps) == ("a fox", 2)
            clock[0] += next(lasts)

    assert evaluate.seconds_per_image(Pipe(), {"call": {"num_inference_steps": 2}}, "a fox", 5) == 3.0
    assert next(lasts, None) is None


def test_the_images_can_be_voted_on(done):
    out, _ = done
    folders, prompts = vote.read_images([f"ours={out / 'student-1'}", f"theirs={out / 'teacher-3'}"])
    assert prompts == {f"{i:012d}.png": f"colours of {i}" for i in (3, 7, 9, 15, 21)}


# Mistakes ------------------------------------------------------------------------------------------------------------


def coco_with(text):
    def write(world, folder):
        shutil.copytree(world / "coco", folder / "coco")
        path = folder / "coco" / evaluate.CAPTIONS
        path.unlink() if text is None else path.write_text(text)
        return {"coco": folder / "coco"}

    return write


def broken_image(world, folder):
    shutil.copytree(world / "coco", folder / "coco")
    (folder / "coco" / "val2017" / f"{9:012d}.jpg").write_bytes(b"no image")
    return {"coco": folder / "coco"}


def clip_without_weights(world, folder):
    shutil.copytree(world / "clip", folder / "clip")
    (folder / "clip" / "open_clip_pytorch_model.bin").unlink()
    return {"clip": folder / "clip"}


MISTAKES = {
    "no pipeline": ({"pipeline": None}, ["--pipeline: none given", "full/run.py"]),
    "no coco": ({"coco": None}, ["--coco: none given", "COCO's folder"]),
    "pipeline": ({"pipeline": "/nowhere"}, ["--pipeline /nowhere: cannot be loaded, as a pipeline folder"]),
    "teacher": ({"teacher": "/nowhere"}, ["--teacher /nowhere: cannot be loaded, as a pipeline folder"]),
    "coco's folder": ({"coco": "/nowhere"}, ["--coco /nowhere: has no val2017", "name a folder"]),
    "no captions": (coco_with(None), ["--coco", "has no annotations/captions_val2017.json", "name a folder"]),
    "not JSON": (coco_with("hello"), ["--coco", "is not COCO's captions (JSONDecodeError", "unpack it again"]),
    "other JSON": (coco_with('{"images": []}'), ["--coco", "is not COCO's captions (KeyError: 'annotations'"]),
    "odd JSON": (coco_with('{"images": [], "annotations": [{"id": 1, "image_id": 2, "caption": 3}]}'), ["not COCO's"]),
    "a broken image": (broken_image, ["--coco", "000000000009.jpg cannot be read", "unpack it again"]),
    "more images": ({"images": 7}, ["--images 7:", "has 6 with captions", "ask for fewer"]),
    "too few images": ({"images": 1}, ["--images 1: must be at least 2"]),
    "student's steps": ({"student_steps": "1,5"}, ["--student-steps 5: this student was trained for 1…4 steps"]),
    "0 steps": ({"student_steps": "1,0"}, ["--student-steps (1, 0): must be at least 1"]),
    "no steps": ({"teacher_steps": ""}, ["--teacher-steps (): must be at least 1"]),
    "guidance": ({"teacher_guidance": 0}, ["--teacher-guidance 0.0: must be at least 1"]),
    "resolution": ({"resolution": 60}, ["--resolution 60: must be a multiple of 8"]),
    "negative resolution": ({"resolution": -8}, ["--resolution -8: must be at least 0"]),
    "batch": ({"batch": 0}, ["--batch 0: must be at least 1"]),
    "timed": ({"timed": 0}, ["--timed 0: must be at least 1"]),
    "dtype": ({"dtype": "fp8"}, ["--dtype fp8: unknown; choose one of auto, fp16"]),
    "device": ({"device": "abacus"}, ["--device abacus: is not there", "cpu"]),
    "clip": ({"clip": "/nowhere"}, ["--clip /nowhere: neither an open_clip MODEL/WEIGHTS", "name the folder"]),
    "clip's name alone": ({"clip": "ViT-g-14"}, ["--clip ViT-g-14: neither", "Directory", "not found"]),
    "clip's weights": ({"clip": "ViT-g-14/nonsense"}, ["--clip ViT-g-14/nonsense: neither", "not a known tag"]),
    "clip without weights": (clip_without_weights, ["--clip", "Required pretrained weights", "name the folder"]),
}  # fmt: skip


@pytest.mark.parametrize("change, words", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_ends_in_one_line(world, tmp_path, capsys, caplog, change, words):
    changes = change(world, tmp_path) if callable(change) else change
    assert evaluate.main(arguments(world, tmp_path / "out", **changes)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "it/s]" not in line and line.strip()]
    assert len(lines) == 1 and lines[0].startswith("full/evaluate.py: --"), lines
    assert all(word in lines[0] for word in words), lines[0]
    assert not [r for r in caplog.records if r.levelname == "ERROR"] and not (tmp_path / "out").exists()


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("kind", ["missing", "junk", "pickle", "other weights", "offline"])
def test_inception_that_cannot_be_had_ends_in_one_line(world, tmp_path, capsys, monkeypatch, kind):
    monkeypatch.setattr(evaluate, "load_fid", REAL_LOAD_FID)
    path, sprung = tmp_path / "inception.pth", tmp_path / "sprung"
    if kind == "junk":
        path.write_text("no weights")
    if kind in ("pickle", "other weights"):
        torch.save({"fc.weight": Trap(str(sprung)) if kind == "pickle" else torch.zeros(3)}, path)

    def fail(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    given = {} if kind == "offline" else {"inception": path}
    assert evaluate.main(arguments(world, tmp_path / "out", **given)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    where = "(none given): the download failed (OSError: Name" if kind == "offline" else f"{path}: no Inception weights"
    assert line.startswith(f"full/evaluate.py: --inception {where}")
    assert line.endswith("/weights-inception-2015-12-05-6726825d.pth and name that file")
    assert not sprung.exists()


def test_debug_shows_the_traceback(world, tmp_path):
    with pytest.raises(ValueError, match="--images 1"):
        evaluate.main([*arguments(world, tmp_path, images=1), "--debug"])


def test_help_names_the_flags_and_needs_no_diffusers():
    command = [sys.executable, "-X", "importtime", ROOT / "full" / "evaluate.py", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert shown.returncode == 0 and "--teacher-guidance" in shown.stdout and "--inception" in shown.stdout
    assert "diffusers" not in shown.stderr and "open_clip" not in shown.stderr
