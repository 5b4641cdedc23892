"""toy/run.py and toy/sample.py as a user starts them: whole, interrupted, by mistake."""

import json
import platform
import shutil
import signal

import pytest
import torch
from toy_runs import STAGES, TINY, call, main_in_process, start, weights
from trust import same

from common.checkpoints import read
from toy import judge, loop, run, sample


def test_a_run_leaves_report_pictures_logs_and_checkpoints(finished):
    folder, out = finished
    assert out.splitlines()[0].startswith(
        f"data: glyphs (built in) · preset: tiny · device: {platform.machine()} CPU, 1 thread"
    )
    report = (folder / "report.md").read_text()
    for name in ("comparison", "refinement", "targets", "cost", "curves"):
        assert (folder / f"{name}.png").stat().st_size > 3000
        assert f"({name}.png)" in report
    for stage in STAGES:
        assert (folder / stage / "checkpoint.pt").exists()
        assert (folder / stage / "log.csv").read_text().count("\n") >= 2
    assert "| student before ADD | 1 | 1 | 1 |" in report
    assert "| teacher, DPM-Solver++ | 4 |" in report
    assert "| **ADD student** | 1 | 1 | 1 |" in report
    assert "| **ADD student** | 4 | 1 | 4 |" in report
    assert " · fp32 · " in report
    assert "not FID" in report and "glyphs (built in)" in report


def test_the_teacher_is_scored_at_the_guidance_that_suits_it_best(finished):
    results = json.loads((finished[0] / "results.json").read_text())["results"]
    searched = {row["guidance"]: row["fd"] for row in results["teacher"] if row["steps"] == 2}
    best = results["best_guidance"]
    assert set(searched) == {1.0, 2.0}
    assert best == min(searched, key=searched.get)
    assert results["search_steps"] == 2
    rows = [(1, best), (2, 1.0), (2, 2.0), (4, best)]
    assert [(row["steps"], row["guidance"]) for row in results["teacher"]] == rows
    evaluations = [steps * (1 + (guidance != 1)) for steps, guidance in rows]
    assert [row["evaluations"] for row in results["teacher"]] == evaluations
    solver = [results["solver"][name] for name in ("steps", "guidance", "evaluations")]
    assert solver == [4, best, 4 * (1 + (best != 1))]
    assert [row["evaluations"] for row in results["student"]] == [1, 2, 4]


@pytest.mark.parametrize(
    "flags, rows",
    [
        (["--eval-search-steps", "0"], [(1, None), (4, 1.0), (4, 2.0)]),
        # Not at more steps than it is scored at.
        (["--eval-search-steps", "9"], [(1, None), (4, 1.0), (4, 2.0)]),
        (["--eval-guidances", "1.5"], [(1, None), (4, 1.5)]),  # nothing to search for
    ],
)
def test_the_guidance_is_searched_for_at_the_steps_asked_for(finished, tmp_path, flags, rows):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    assert run.main([*TINY, "--out", str(folder), *flags]) == 0
    results = json.loads((folder / "results.json").read_text())["results"]
    best, report = results["best_guidance"], (folder / "report.md").read_text()
    for row in results["student"]:
        assert row["fd_margin"] > 0 and row["recall_margin"] >= 0
        assert f"| {row['fd']:.2f} ± {row['fd_margin']:.2f} |" in report
    expected = [(steps, best if guidance is None else guidance) for steps, guidance in rows]
    assert [(row["steps"], row["guidance"]) for row in results["teacher"]] == expected
    assert results["search_steps"] == 4
    last = {row["guidance"]: row["fd"] for row in results["teacher"] if row["steps"] == 4}
    assert best == min(last, key=last.get)


def test_finished_stages_are_reused_and_a_changed_one_is_not(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")

    def times():
        return {stage: (folder / stage / "checkpoint.pt").stat().st_mtime_ns for stage in STAGES}

    before = times()
    code, out, err = call("run.py", *TINY, "--out", folder)
    assert code == 0 and "evaluation" not in out.splitlines()
    assert before == times()
    code, out, err = call("run.py", *TINY, "--out", folder, "--distil-lambda", "5.0")
    assert code == 0 and "evaluation" in out.splitlines(), err
    after = times()
    assert [stage for stage in STAGES if before[stage] != after[stage]] == ["distil"]


def test_a_signal_from_outside_stops_a_run_after_saving(tmp_path):
    """What a cluster sends, in the midst of ADD; test_toy_resume.py goes on from there."""
    process, text = start("run.py", *TINY, "--distil-steps", "60", "--out", tmp_path), ""
    # Some steps of the stage are done.
    while not ("ADD:" in text and "loss=" in text.rsplit("ADD:", 1)[1]):
        text += process.stderr.read(1)
        assert process.poll() is None, text
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143 and "stopped by SIGTERM" in err and "--resume" in err
    state = torch.load(tmp_path / "distil" / "checkpoint.pt", weights_only=True)
    assert 0 < state["step"] < 60 and not state["finished"]


def test_max_minutes_stops_a_run_after_saving(tmp_path, capsys, monkeypatch):
    add, left = loop.Log.add, []

    def hurry(self, row):
        left.append(signal.getitimer(signal.ITIMER_REAL)[0])
        signal.setitimer(signal.ITIMER_REAL, 1e-3)
        add(self, row)

    monkeypatch.setattr(loop.Log, "add", hurry)
    flags = ["--features-steps", "1000000", "--out", str(tmp_path)]
    assert run.main([*TINY, *flags, "--max-minutes", "5"]) == 142
    assert 0 < left[0] <= 300
    assert "stopped by --max-minutes; the same command with --resume" in capsys.readouterr().err
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert not read(tmp_path / "features" / "checkpoint.pt")["finished"]
    assert run.main([*TINY, *flags, "--max-minutes", "-1"]) == 2
    assert "--max-minutes -1: must be" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        "--distil-weight nfsd --distil-guidance 7.5 --distil-c-text false",
        "--distil-weight sds --distil-teacher-steps 2 --distil-augment translation,cutout",
        "--features classifier",
    ],
)
def test_other_losses_and_conditions_give_another_student(finished, tmp_path, flags):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    assert run.main([*TINY, "--out", str(folder), *flags.split()]) == 0
    assert not same(weights(finished[0]), weights(folder))


def test_sample_draws_the_same_grid_under_the_same_seed(finished, tmp_path):
    def grid(name, *arguments):
        path = tmp_path / name
        flags = ["--run", finished[0], "--n", 9, "--out", path]
        code, out, err = call("sample.py", *flags, *arguments)
        assert code == 0 and str(path) in out, err
        return path.read_bytes()

    one = grid("a.png", "--steps", 1, "--class", 7, "--seed", 0)
    assert one.startswith(b"\x89PNG")
    assert one == grid("b.png", "--steps", 1, "--class", 7, "--seed", 0)
    assert one != grid("c.png", "--steps", 1, "--class", 7, "--seed", 1)
    assert one != grid("d.png", "--steps", 4, "--class", 7, "--seed", 0)


MISTAKES = {
    "unknown flag": (["--teacher-stepz", "3"], "--teacher-stepz"),
    "wrong type": (["--teacher-steps", "many"], "--teacher-steps"),
    "zero steps": ([*TINY, "--teacher-steps", "0"], "--teacher-steps 0"),
    "unknown preset": (["--preset", "huge"], "--preset"),
    "unknown data set": ([*TINY, "--dataset", "imagenet"], "imagenet"),
    "no such folder": ([*TINY, "--dataset", "folder", "--data-dir", "/nowhere"], "--data-dir"),
    "no such device": ([*TINY, "--device", "tpu"], "--device tpu"),
    "resume without a run": (["--resume", "--out", "/nowhere/run"], "--resume"),
    "unknown weight": ([*TINY, "--distil-weight", "sdss"], "sdss"),
    "unknown prediction": ([*TINY, "--teacher-prediction", "eps"], "eps"),
    "epsilon at zero SNR": (
        [*TINY, "--teacher-prediction", "epsilon", "--teacher-zero-snr", "true"],
        "--teacher-zero-snr",
    ),
    "unknown features": ([*TINY, "--features", "vgg"], "--features vgg"),
    "odd width": ([*TINY, "--teacher-widths", "12,16"], "--teacher-widths"),
    "student timesteps": ([*TINY, "--distil-timesteps", "10,5,999"], "--distil-timesteps 10,5,999"),
    "beyond the schedule": ([*TINY, "--distil-timesteps", "10,1000"], "--distil-timesteps 10,1000"),
    "steps of nfsd": (
        [*TINY, "--distil-weight", "nfsd", "--distil-teacher-steps", "2"],
        "--distil-teacher-steps 2",
    ),
}


@pytest.mark.parametrize("arguments, named", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_gives_one_line_that_names_it_before_anything_is_made(
    arguments, named, tmp_path, capsys
):
    code, err = main_in_process(run, ["--out", tmp_path / "run", *arguments], capsys)
    *before, last = err.strip().splitlines()
    assert code == 2 and named in last and (not before or before[0].startswith("usage:"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--class", "x"], "--class x"),
        (["--class", "10"], "--class 10"),
        (["--steps", "5"], "steps=5"),
        (["--n", "0"], "--n 0"),
    ],
)
def test_sample_mistakes(finished, arguments, named, tmp_path, capsys):
    flags = ["--run", finished[0], "--out", tmp_path / "x.png"]
    code, err = main_in_process(sample, [*flags, *arguments], capsys)
    assert code == 2 and named in err and err.count("\n") == 1


def test_sample_without_a_run(tmp_path, capsys):
    code, err = main_in_process(sample, ["--run", tmp_path], capsys)
    assert code == 2 and f"--run {tmp_path}" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "module, flags",
    [
        (run, ("--resume", "--distil-lambda", "--teacher-widths")),
        (sample, ("--run", "--steps", "--class")),
        (judge, ("--run", "--iterations")),
    ],
)
def test_help_is_complete(module, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and all(flag in out for flag in flags)
