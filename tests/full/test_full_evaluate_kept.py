"""full/evaluate.py: what is kept and said, and mistakes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoPipelineForText2Image
from full_coco import REAL_LOAD_FID, ROOT, N, arguments, pictures, pixels, run, times
from PIL import Image
from torch import nn

from full.study import evaluate, metrics, report, vote

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation"),
    pytest.mark.usefixtures("tiny_features"),
]


# What is kept -------------------------------------------------------------------------------------


def test_a_second_run_draws_only_what_is_missing(world, copied, unet_calls):
    before, images = times(copied), pictures(copied)
    gone = copied / "student-2" / "000000000009.png"
    gone.unlink()
    run(world, copied)
    after = times(copied)
    assert {p for p in before if before[p] != after[p]} == {gone} and len(before) == 5 * N
    assert abs(pixels(gone) - images["student-2/000000000009.png"]).max() <= 1
    # The five rows' warm-ups and timed calls, and two steps for one image.
    assert (
        len(unet_calls) == 2 * (3 + 2 + 1 + 2 + 4) + 2 and max(n for _, n in unet_calls[-14:]) == 1
    )


def test_fewer_images_use_those_that_are_there(world, copied):
    before, of_all = (
        times(copied),
        json.loads((copied / "evaluation.json").read_text())["rows"][0]["fid"],
    )
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
        content = json.loads((folder / metrics.CAPTIONS).read_text())
        for a in content["annotations"]:
            a["caption"] = a["caption"].upper() + "!"
        (folder / metrics.CAPTIONS).write_text(json.dumps(content))
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


def test_an_interrupted_run_keeps_what_it_drew_and_no_half_image(
    world, done, tmp_path, monkeypatch, capsys
):
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
    assert "the same command continues" in capsys.readouterr().err
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


# The result ---------------------------------------------------------------------------------------


def test_the_report_has_the_rows_in_order_and_says_how_they_came_about(world, done):
    out, result = done
    text = (out / "evaluation.md").read_text("utf-8")
    lines = text.splitlines()
    top = lines.index(
        "| model | steps | guidance | U-Net evaluations | FID ↓ | CLIP ↑ | seconds/image |"
    )
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines[top + 2 : top + 7]
    ]
    names = [["teacher, DPM-Solver++", "3", "7.5", "6"], ["teacher, DPM-Solver++", "2", "7.5", "4"]]
    assert [row[:4] for row in rows] == names + [["student", k, "none", k] for k in "124"]
    for cells, row in zip(rows, result["rows"], strict=True):
        numbers = [row["fid"], row["clip"], row["seconds"]]
        assert [float(c) for c in cells[4:]] == pytest.approx(numbers, rel=0.006, abs=0.0051)
        assert 0 < row["seconds"] < 10
    assert lines[top + 7] == "" and f"# {world / 'student'} beside {world / 'sd15'}" == lines[0]
    for words in (
        "- 5 images a row, 64×64, seeds 0 to 4",
        "median of 1 calls at batch 1",
        "float32 on cpu",
        f"commit {result['commit']}",
        f"{world / 'clip'}, float32",
        "with 5 the covariances are singular",
        "paper's own numbers, for reference, not measured here",
        "| ADD-M | 1 | 19.7 | 32.6 | 0.09 |",
        "torchmetrics 1.",
        "diffusers 0.",
    ):
        assert words in text, words
    assert result["settings"]["images"] == N and result["settings"]["teacher_steps"] == [3, 2]


def test_a_report_of_2048_images_does_not_warn(done):
    _, result = done
    for n, warned in ((2047, True), (2048, False)):
        text = "\n".join(report.report(result | {"settings": result["settings"] | {"images": n}}))
        assert ("Fewer images" in text) == warned


def test_the_plot_shows_every_row(done, tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    _, result = done
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    report.plot(result, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").size == (1200, 480)
    for axis, key in zip(figures[0].axes, ("fid", "clip"), strict=True):
        assert axis.get_xscale() == "log"
        for line, model in zip(axis.lines, ("teacher", "student"), strict=True):
            rows = {(r["seconds"], r[key]) for r in result["rows"] if r["model"] == model}
            assert set(zip(*line.get_data(), strict=True)) == rows and line.get_label().startswith(
                model
            )
        labels = {(t.get_text(), t.xy) for t in axis.texts}
        texts = ["3 steps", "2 steps", "1 step", "2 steps", "4 steps"]
        assert labels == {
            (t, (r["seconds"], r[key])) for t, r in zip(texts, result["rows"], strict=True)
        }


def test_seconds_are_the_median_after_a_warm_up(monkeypatch):
    clock, lasts = [0.0], iter((50.0, 3.0, 1.0, 2.0, 9.0, 4.0))
    monkeypatch.setattr(evaluate.time, "perf_counter", lambda: clock[0])

    class Pipe:
        device = torch.device("cpu")

        def __call__(self, caption, generator, num_inference_steps):
            assert (caption, num_inference_steps) == ("a fox", 2)
            clock[0] += next(lasts)

    assert (
        evaluate.seconds_per_image(Pipe(), {"call": {"num_inference_steps": 2}}, "a fox", 5) == 3.0
    )
    assert next(lasts, None) is None


def test_the_images_can_be_voted_on(done):
    out, _ = done
    folders, prompts = vote.read_images(
        [f"ours={out / 'student-1'}", f"theirs={out / 'teacher-3'}"]
    )
    assert prompts == {f"{i:012d}.png": f"colours of {i}" for i in (3, 7, 9, 15, 21)}


# Mistakes -----------------------------------------------------------------------------------------


def coco_with(text):
    def write(world, folder):
        shutil.copytree(world / "coco", folder / "coco")
        path = folder / "coco" / metrics.CAPTIONS
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
    "pipeline": (
        {"pipeline": "/nowhere"},
        ["--pipeline /nowhere: cannot be loaded, as a pipeline folder"],
    ),
    "teacher": (
        {"teacher": "/nowhere"},
        ["--teacher /nowhere: cannot be loaded, as a pipeline folder"],
    ),
    "coco's folder": ({"coco": "/nowhere"}, ["--coco /nowhere: has no val2017", "name a folder"]),
    "no captions": (
        coco_with(None),
        ["--coco", "has no annotations/captions_val2017.json", "name a folder"],
    ),
    "not JSON": (
        coco_with("hello"),
        ["--coco", "is not COCO's captions (JSONDecodeError", "unpack it again"],
    ),
    "other JSON": (
        coco_with('{"images": []}'),
        ["--coco", "is not COCO's captions (KeyError: 'annotations'"],
    ),
    "odd JSON": (
        coco_with('{"images": [], "annotations": [{"id": 1, "image_id": 2, "caption": 3}]}'),
        ["not COCO's"],
    ),
    "a broken image": (
        broken_image,
        ["--coco", "000000000009.jpg cannot be read", "unpack it again"],
    ),
    "more images": ({"images": 7}, ["--images 7:", "has 6 with captions", "ask for fewer"]),
    "too few images": ({"images": 1}, ["--images 1: must be at least 2"]),
    "student's steps": (
        {"student_steps": "1,5"},
        ["--student-steps 5: this student was trained for 1…4 steps"],
    ),
    "0 steps": ({"student_steps": "1,0"}, ["--student-steps (1, 0): must be at least 1"]),
    "no steps": ({"teacher_steps": ""}, ["--teacher-steps (): must be at least 1"]),
    "guidance": ({"teacher_guidance": 0}, ["--teacher-guidance 0.0: must be at least 1"]),
    "resolution": ({"resolution": 60}, ["--resolution 60: must be a multiple of 8"]),
    "negative resolution": ({"resolution": -8}, ["--resolution -8: must be at least 0"]),
    "batch": ({"batch": 0}, ["--batch 0: must be at least 1"]),
    "timed": ({"timed": 0}, ["--timed 0: must be at least 1"]),
    "dtype": ({"dtype": "fp8"}, ["--dtype fp8: unknown; choose one of auto, fp16"]),
    "device": ({"device": "abacus"}, ["--device abacus: is not there", "cpu"]),
    "clip": (
        {"clip": "/nowhere"},
        ["--clip /nowhere: neither an open_clip MODEL/WEIGHTS", "name the folder"],
    ),
    "clip's name alone": (
        {"clip": "ViT-g-14"},
        ["--clip ViT-g-14: neither", "Directory", "not found"],
    ),
    "clip's weights": (
        {"clip": "ViT-g-14/nonsense"},
        ["--clip ViT-g-14/nonsense: neither", "not a known tag"],
    ),
    "clip without weights": (
        clip_without_weights,
        ["--clip", "Required pretrained weights", "name the folder"],
    ),
}


@pytest.mark.parametrize("change, words", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_of_an_evaluation_ends_in_one_line(
    world, tmp_path, capsys, caplog, change, words
):
    changes = change(world, tmp_path) if callable(change) else change
    assert evaluate.main(arguments(world, tmp_path / "out", **changes)) == 2
    lines = [
        line
        for line in capsys.readouterr().err.splitlines()
        if "it/s]" not in line and line.strip()
    ]
    assert len(lines) == 1 and lines[0].startswith("full/evaluate.py: --"), lines
    assert all(word in lines[0] for word in words), lines[0]
    assert (
        not [r for r in caplog.records if r.levelname == "ERROR"]
        and not (tmp_path / "out").exists()
    )


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
    where = (
        "(automatic): the download failed (OSError: Name"
        if kind == "offline"
        else f"{path}: no Inception weights"
    )
    assert line.startswith(f"full/evaluate.py: --inception {where}")
    assert line.endswith("/weights-inception-2015-12-05-6726825d.pth and name that file")
    assert not sprung.exists()


def test_debug_shows_the_traceback(world, tmp_path):
    with pytest.raises(ValueError, match="--images 1"):
        evaluate.main([*arguments(world, tmp_path, images=1), "--debug"])


def test_help_names_the_flags_and_needs_no_diffusers():
    command = [sys.executable, "-X", "importtime", ROOT / "full" / "evaluate.py", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (
        shown.returncode == 0
        and "--teacher-guidance" in shown.stdout
        and "--inception" in shown.stdout
    )
    assert "diffusers" not in shown.stderr and "open_clip" not in shown.stderr
