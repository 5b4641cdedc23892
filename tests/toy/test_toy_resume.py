"""toy/run.py under what happens to long runs: stopped or killed, a full disk, bad numbers."""

import json
import random
import shlex
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from toy_runs import STAGES, TINY, call, main_in_process, rows_of, stage_at, start
from trust import kill_while_it_writes, on_a_small_disk, same

from common.checkpoints import read, read_last, write
from common.stopping import Stopped
from toy import data, distil, features, loop, program, run, teacher

STEPS = dict(features=4, metric=4, teacher=6, distil=6)  # of the tiny preset


def assert_same_run(a, b):
    """Weights, averages, optimisers, generators, data order and logged losses of every stage; the
    figures, too."""
    stages = [{path.parent.name for path in folder.glob("*/checkpoint.pt")} for folder in (a, b)]
    assert stages[0] == stages[1] >= set(STAGES[1:])
    for stage in stages[0]:
        x, y = (read(folder / stage / "checkpoint.pt") for folder in (a, b))
        # The log's length in bytes depends on how a clock's numbers are written.
        for part in x.keys() - {"seconds", "log"}:
            assert same(x[part], y[part]), (stage, part)
        assert rows_of(a / stage / "log.csv") == rows_of(b / stage / "log.csv"), stage

    def strip(rows):
        return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]

    x, y = (json.loads((folder / "results.json").read_text())["results"] for folder in (a, b))
    assert all(strip(x[k]) == strip(y[k]) for k in ("teacher", "started", "student"))
    assert x["real"] == y["real"]


def stopping(run_loop, stage, at, number):
    """run_loop, whose stage gets a signal in the midst of that step."""

    def loop(where, label, parts, step, *rest, **more):
        def cut(i):
            if where.folder.name == stage and i == at:
                signal.raise_signal(number)
            return step(i)

        return run_loop(where, label, parts, cut, *rest, **more)

    return loop


@pytest.mark.parametrize(
    "seed, more",
    [
        (0, []),
        (1, ["--precision", "bf16", "--features", "denoiser", "--flip", "true"]),
        (2, ["--features", "teacher"]),
    ],
)
def test_stopped_in_every_stage_and_resumed_is_as_if_never_stopped(
    finished, tmp_path, seed, more, monkeypatch, capsys
):
    draw, out, whole = random.Random(seed), tmp_path / "run", finished[0]
    command, stages = [*TINY, *more], STEPS
    if "teacher" in more:  # its encoder is F, which has no training of its own
        stages = {k: v for k, v in STEPS.items() if k != "features"}
    if more:
        whole = tmp_path / "whole"
        assert run.main([*command, "--out", str(whole)]) == 0
    for n, (stage, steps) in enumerate(stages.items()):
        number, at = draw.choice([signal.SIGINT, signal.SIGTERM]), draw.randrange(steps)
        with monkeypatch.context() as patch:
            for module in (loop, teacher, distil):
                patch.setattr(module, "run_loop", stopping(module.run_loop, stage, at, number))
            code = run.main([*command, "--out", str(out), *(["--resume"] if n else [])])
        assert code == 128 + number and "--resume" in capsys.readouterr().err
        assert read(out / stage / "checkpoint.pt")["step"] == at + 1
    assert run.main(["--resume", "--out", str(out), "--device", "cpu", "--threads", "1"]) == 0
    assert_same_run(whole, out)


@pytest.mark.parametrize("kind", ["classifier", "dino", "convolutional"])
def test_an_f_that_was_stopped_ends_as_if_it_never_was(tmp_path, monkeypatch, kind):
    labels, images = torch.arange(64) % 2, torch.randint(256, (64, 1, 8, 8), dtype=torch.uint8)
    noise = data.Dataset("noise", images, labels, images, labels, ("a", "b"))
    own = dict(features=kind, features_steps=6, features_width=16, features_depth=1)
    whole, cut = (stage_at(tmp_path / name, data=noise, **own) for name in ("whole", "cut"))
    expected, _ = features.make_features(whole)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "run_loop", stopping(loop.run_loop, "cut", 2, signal.SIGINT))
        with pytest.raises(Stopped):
            features.make_features(cut)
    resumed, _ = features.make_features(cut)
    assert same(expected.state_dict(), resumed.state_dict())
    a, b = (read(stage.folder / "checkpoint.pt")["networks"] for stage in (whole, cut))
    assert same(a, b)  # DINO's average and centre among them


def test_the_same_command_gives_the_same_run(finished, tmp_path):
    assert run.main([*TINY, "--out", str(tmp_path / "again")]) == 0
    assert_same_run(finished[0], tmp_path / "again")


def test_deterministic_algorithms_train_too(tmp_path):
    code, _, err = call("run.py", *TINY, "--out", tmp_path, "--deterministic", "true")
    assert code == 0, err


def assert_it_survives_kills(tmp_path, times, seed):
    """Kill a run -9 so many times at random moments of its training, checkpoints being written
    after every step, and finish it: each time it goes on from the last step but at most one, and it
    ends as if it had never been killed."""
    folder, whole, draw, kills = tmp_path / "run", tmp_path / "whole", random.Random(seed), 0
    longer = [*TINY, "--teacher-steps", str(100 * times), "--distil-steps", str(40 * times)]
    assert call("run.py", *longer, "--out", whole, timeout=1800)[0] == 0
    command = [*longer, "--out", folder, "--checkpoint-seconds", "0"]
    while kills < times:
        resume = ["--resume"] if (folder / "config.json").exists() else []
        process = start("run.py", *command, *resume)
        err = kill_while_it_writes(process, folder, "*/checkpoint.pt", 2 * draw.random())
        assert process.returncode == -signal.SIGKILL, "the run was over too early"
        assert "Traceback" not in err and "looking for the one before it" not in err
        kills += 1
        for stage in STAGES:
            if state := read_last(folder / stage / "checkpoint.pt"):
                rows = rows_of(folder / stage / "log.csv")
                logged = [int(row["step"]) for row in rows if row["nonfinite"] is not None]
                assert state["step"] >= max(logged, default=0) - 1, stage
    code, _, err = call("run.py", *longer, "--out", folder, "--resume", timeout=1800)
    assert code == 0 and "looking for the one before it" not in err, err
    assert_same_run(whole, folder)


def test_killed_three_times_it_goes_on(tmp_path):
    assert_it_survives_kills(tmp_path, 3, seed=0)


@pytest.mark.long
def test_killed_twenty_times_it_goes_on(tmp_path):
    assert_it_survives_kills(tmp_path, 20, seed=1)


def test_a_full_disk_ends_in_one_line_and_the_run_goes_on_when_there_is_room(
    finished, tmp_path, capsys
):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    (folder / "teacher" / "checkpoint.pt.tmp").symlink_to("/dev/full")
    changed = [*TINY, "--out", folder, "--teacher-lr", "0.002"]
    code, err = main_in_process(run, changed, capsys)
    last = err.strip().splitlines()[-1]
    assert code == 2
    assert last.startswith(
        f"toy/run.py: {folder}/teacher/checkpoint.pt: cannot be written: the disk is full"
    )
    assert read(folder / "teacher" / "checkpoint.pt")["finished"]  # the one of before
    assert main_in_process(run, [*changed, "--resume"], capsys)[0] == 0


def test_a_small_disk_that_fills_up_leaves_what_was_whole_and_the_run_goes_on(tmp_path):
    """The metric network and F fit on it, the teacher does not."""
    folder = tmp_path / "disk"
    flags = [*TINY, "--features", "denoiser", "--out", str(folder / "run")]
    command = shlex.join([sys.executable, "toy/run.py", *flags])
    first, there, second = on_a_small_disk(folder, "5000k", command, "--resume")
    assert first[0] == 2
    assert first[1].splitlines()[-1] == (
        f"toy/run.py: {folder}/run/teacher/checkpoint.pt: cannot be written: the disk is full; "
        "make room, or name another folder; the checkpoint before it is intact"
    )
    assert there == ["run/features/checkpoint.pt", "run/metric/checkpoint.pt"]
    assert second[0] == 0, second[1][-2000:]
    assert "teacher:   0%" in second[1]
    assert "metric network:   0%" not in second[1]
    assert "features F:   0%" not in second[1]


@pytest.mark.parametrize("where", ["/sys/run", "file"])
def test_a_folder_that_cannot_be_made_ends_in_one_line(tmp_path, where, capsys):
    (tmp_path / "file").write_text("")
    out = tmp_path / where / "run" if where == "file" else Path(where)
    code, err = main_in_process(run, [*TINY, "--out", out], capsys)
    assert code == 2 and str(out) in err.splitlines()[-1] and "Traceback" not in err


def test_what_is_not_finite_stops_the_run_or_is_skipped_and_counted(
    finished, tmp_path, capsys, monkeypatch
):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    target, calls = teacher.training_target, []

    def broken(*arguments):
        calls.append(0)
        return target(*arguments) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(teacher, "training_target", broken)
    changed = [*TINY, "--out", folder, "--teacher-lr", "0.002"]
    code, err = main_in_process(run, changed, capsys)
    assert code == 2
    says = "teacher, step 3: teacher loss is nan; the last good checkpoint: "
    assert says in err.splitlines()[-1]
    calls.clear()
    assert main_in_process(run, [*changed, "--skip-nonfinite", "1"], capsys)[0] == 0
    log = (folder / "teacher" / "log.csv").read_text().splitlines()
    assert dict(zip(log[0].split(","), log[-1].split(","), strict=True))["nonfinite"] == "1"


def test_an_unfinished_run_is_neither_gone_on_with_nor_thrown_away_unasked(
    finished, tmp_path, capsys
):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    path = folder / "teacher" / "checkpoint.pt"
    write(path, read(path) | {"finished": False, "step": 3})
    code, err = main_in_process(run, [*TINY, "--out", folder], capsys)
    assert code == 2
    assert "teacher is unfinished, at step 3; --resume continues it" in err.splitlines()[-1]
    assert read(path)["step"] == 3


def test_a_resumed_auto_run_keeps_its_data_and_its_precision(tmp_path, monkeypatch, capsys):
    """Glyphs stood in for MNIST, which could not be had; that it can be had now changes nothing."""
    monkeypatch.setattr(data, "_fetch", lambda name, root: "no network")
    monkeypatch.setattr(program, "has_bf16", lambda device: True)
    flags = ["--preset", "tiny", "--device", "cpu", "--threads", "1", "--out", tmp_path]
    assert main_in_process(run, flags, capsys)[0] == 0
    monkeypatch.setattr(data, "_fetch", lambda name, root: None)
    monkeypatch.setattr(program, "has_bf16", lambda device: False)
    assert main_in_process(run, [*flags, "--resume"], capsys)[0] == 0
    stored = json.loads((tmp_path / "config.json").read_text())["settings"]
    assert (stored["dataset"], stored["precision"]) == ("glyphs", "bf16")
    new = tmp_path / "new"
    assert main_in_process(run, [*flags, "--dataset", "glyphs", "--out", new], capsys)[0] == 0
    assert json.loads((new / "config.json").read_text())["settings"]["precision"] == "fp32"


@pytest.mark.parametrize("kind, flip", [("cifar10", "true"), ("glyphs", "false")])
def test_cifar10_is_mirrored_unless_told_otherwise(tmp_path, monkeypatch, kind, flip):
    images, labels = torch.zeros(20, 1, 32, 32, dtype=torch.uint8), torch.arange(20) % 2
    small = data.Dataset("small", images, labels, images, labels, ("a", "b"), kind)
    monkeypatch.setattr(data, "load", lambda *_, **__: small)
    monkeypatch.delattr(run, "make_features")
    with pytest.raises(NameError, match="make_features"):  # the settings are written before
        run.main([*TINY, "--out", str(tmp_path)])
    assert json.loads((tmp_path / "config.json").read_text())["settings"]["flip"] == flip
