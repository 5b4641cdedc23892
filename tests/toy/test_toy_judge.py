"""toy/judge.py: a finished run in the features of other networks."""

import itertools
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional
from toy_runs import main_in_process

from common.checkpoints import read, write
from toy import judge
from toy.data import to_float
from toy.finished import load_results, load_settings, load_student, load_teacher
from toy.loop import TrainingError
from toy.metrics import frechet_distance
from toy.program import load_data
from toy.samplers import balanced_labels, noise_for, sample_student, sample_teacher
from toy.settings import Settings

FLAGS = "--iterations 4 --device cpu --threads 1".split()


@pytest.fixture(scope="module")
def judged(finished, tmp_path_factory):
    """A copy of a finished run that has been judged."""
    run = tmp_path_factory.mktemp("judged") / "run"
    shutil.copytree(finished[0], run)
    assert judge.main(["--run", str(run), *FLAGS]) == 0
    return run


def test_the_pixels_judge_has_the_distances_of_coarse_pixels(judged):
    settings, (results, key) = load_settings(judged), load_results(judged)
    data, n = load_data(settings), settings.eval_images
    assert json.loads((judged / "judges.json").read_text())["key"] == key
    student, shape, _ = load_student(judged)
    teacher = load_teacher(judged, student)
    noise = noise_for(n, shape, settings.seed_of("noise"), torch.device("cpu"))
    labels = balanced_labels(n, 10, torch.device("cpu"))
    images = {
        "teacher": sample_teacher(
            teacher, noise, labels, settings.eval_steps[-1], results["best_guidance"]
        ),
        1: sample_student(student, noise, labels, 1, settings.seed_of("steps")),
        4: sample_student(student, noise, labels, 4, settings.seed_of("steps")),
        "real": to_float(data.train_images[:n]),
    }
    test = functional.avg_pool2d(to_float(data.test_images), 4).flatten(1)
    scores = json.loads((judged / "judges.json").read_text())["judges"]["pixels, averaged over 4×4"]
    found = {"teacher": scores["teacher"], "real": scores["real"]}
    found |= {row["steps"]: row for row in scores["student"]}
    assert list(found) == ["teacher", "real", 1, 2, 4]
    for name, drawn in images.items():
        expected = frechet_distance(functional.avg_pool2d(drawn, 4).flatten(1), test)
        assert found[name]["fd"] == pytest.approx(expected, rel=1e-4)


def test_the_metric_networks_row_is_the_runs_own(judged):
    results = json.loads((judged / "results.json").read_text())["results"]
    scores = json.loads((judged / "judges.json").read_text())["judges"][judge.METRIC_NETWORK]
    assert scores["student"] == results["student"] and scores["real"] == results["real"]
    assert scores["teacher"]["steps"] == 4 and scores["teacher"] in results["teacher"]
    assert scores["teacher"]["guidance"] == results["best_guidance"]


def test_the_vits_are_three_of_their_own_and_are_used_again(judged, capsys):
    kinds = ("classifier", "dino", "denoiser")
    paths = [judged / "judges" / kind / "checkpoint.pt" for kind in kinds]
    embeds = [
        next(w for w in torch.load(p, weights_only=True)["networks"].values() if w.ndim > 1)
        for p in paths
    ]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(embeds, 2))
    before = [path.stat().st_mtime_ns for path in paths]
    scores = (judged / "judges.json").read_text()
    assert judge.main(["--run", str(judged), *FLAGS]) == 0
    assert [path.stat().st_mtime_ns for path in paths] == before
    assert json.loads((judged / "judges.json").read_text()) == json.loads(scores)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + 6 and lines[2].startswith("| the run's metric network | ")


def test_a_judge_is_not_the_f_of_the_run(monkeypatch, tmp_path):
    """A run whose own F is a classifying ViT gets another one as judge."""
    seeds = []
    monkeypatch.setattr(
        judge,
        "make_features",
        lambda stage: seeds.append(stage.settings.seed) or (SimpleNamespace(summary=None), 0.0),
    )
    monkeypatch.setattr(judge, "TeacherEncoder", lambda *_: SimpleNamespace(summary=None))
    data, settings = SimpleNamespace(fingerprint="data"), Settings(features="classifier", seed=3)
    judge.make_judges(tmp_path, 5, data, settings, None, torch.device("cpu"))
    assert seeds == [1003] * 3
    settings = Settings(features="teacher", seed=2**31 - 1)
    names = judge.make_judges(tmp_path, 5, data, settings, None, torch.device("cpu"))
    assert seeds[3:] == [999] * 3 and "the teacher's encoder (this run's F)" in names


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--iterations", "0"], "--iterations 0: must be from 1 to 10000000"),
        (["--run", "nowhere"], "--run nowhere: no finished run there (nowhere/config.json"),
    ],
)
def test_a_mistake_gives_one_line(judged, arguments, named, capsys):
    code, err = main_in_process(judge, ["--run", judged, *arguments], capsys)
    assert code == 2 and named in err and err.count("\n") == 1


def change(path, change):
    """Change what is in a checkpoint."""
    state = read(path)
    change(state)
    write(path, state)


@pytest.mark.parametrize("part", ["config", "teacher", "another teacher", "student"])
def test_a_run_whose_parts_do_not_belong_together_is_not_judged(judged, part, tmp_path, capsys):
    """As after Ctrl-C in a run with other settings in the same folder."""
    run = shutil.copytree(judged, tmp_path / "run")
    teacher, student = run / "teacher" / "checkpoint.pt", run / "distil" / "student.pt"
    if part == "config":
        config = json.loads((run / "config.json").read_text())
        config["settings"]["distil_lambda"] = 3.0
        (run / "config.json").write_text(json.dumps(config))
    elif part == "teacher":
        change(teacher, lambda state: state.update(finished=False))
    elif part == "another teacher":
        change(teacher, lambda state: state.update(key="another"))
    else:
        change(student, lambda state: state["settings"].update(distil_lambda=3.0))
    code, err = main_in_process(judge, ["--run", run, *FLAGS], capsys)
    assert code == 2 and "are not all of the settings" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "files, named",
    [
        ({"config.json": "{"}, "config.json is not the settings of this version"),
        ({"config.json": '{"settings": {}}'}, "checkpoint.pt is missing"),
        ({"config.json": '{"settings": {"seed": "x"}}'}, "is not the settings"),
        ({}, "no finished run there"),
    ],
)
def test_a_teacher_that_is_not_there_gives_one_line(tmp_path, files, named):
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    with pytest.raises(TrainingError, match=named) as caught:
        load_teacher(tmp_path, SimpleNamespace(denoiser=None))
    assert "\n" not in str(caught.value)
