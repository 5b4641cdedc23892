"""full/run.py under what happens to long runs: stopped, torn checkpoints, a full disk, bad
numbers."""

import errno
import json
import shlex
import shutil
import signal
import sys

import pytest
import torch
from full_runs import FIVE, assert_same_run, flags, last, log_of, train
from PIL import Image
from trust import on_a_small_disk

from add import Student
from common import checkpoints as storage
from common.checkpoints import read, write
from full import run
from full import train as full_train
from full.train import Trainer


def stop_and_resume(checkpoints, out, at, number, monkeypatch, capsys, **more):
    """Train, with a signal in the midst of the iteration after `at`, and finish."""
    iteration = Trainer.iteration

    def stopping(self, batches):
        if self.step == at:
            signal.raise_signal(number)
        return iteration(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "iteration", stopping)
        assert run.main(flags(checkpoints, out, **more)) == 128 + number
    assert (
        "--resume auto" in capsys.readouterr().err
        and read(last(out) / "training.pt")["step"] == at + 1
    )
    train(checkpoints, out, "--resume", "auto", **more)


@pytest.mark.parametrize(
    "at, number", [(0, signal.SIGTERM), (1, signal.SIGTERM), (3, signal.SIGINT)]
)
def test_stopped_at_any_step_and_resumed_is_as_if_never_stopped(
    checkpoints, whole, tmp_path, at, number, monkeypatch, capsys
):
    stop_and_resume(checkpoints, tmp_path, at, number, monkeypatch, capsys, **FIVE)
    assert_same_run(whole, tmp_path)


def test_with_workers_a_resumed_run_reads_on_where_it_stopped(
    checkpoints, tmp_path, monkeypatch, capsys
):
    more = dict(steps=7, batch=2, workers=2, save_every=2, random_crop="true", flip="true")
    train(checkpoints, tmp_path / "whole", **more)
    stop_and_resume(checkpoints, tmp_path / "cut", 4, signal.SIGTERM, monkeypatch, capsys, **more)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_run_that_is_there_is_not_written_over(checkpoints, whole, tmp_path, capsys):
    out = shutil.copytree(whole, tmp_path / "run")
    assert run.main(flags(checkpoints, out)) == 2
    assert f"--out {out}: holds a run; --resume auto continues it" in capsys.readouterr().err
    train(
        checkpoints, out, "--resume", str(out / "checkpoints" / "step_0000004"), **FIVE
    )  # not the last: that one goes
    assert_same_run(whole, out)


def test_a_torn_checkpoint_is_named_and_the_one_before_it_is_used(
    checkpoints, whole, tmp_path, capsys
):
    assert [f.name for f in sorted((whole / "checkpoints").iterdir())] == [
        "step_0000004",
        "step_0000005",
    ]  # the last two
    for file in ("training.pt", "process_0.pt"):
        out = shutil.copytree(whole, tmp_path / file)
        path = last(out) / file
        path.write_bytes(path.read_bytes()[:-40])
        with open(out / "log.jsonl", "a") as file:
            file.write(
                '{"step": 5, "torn'
            )  # and rows 5 is there as well: both are from after the checkpoint of step 4
        train(checkpoints, out, "--resume", "auto", **FIVE)
        assert (
            f"{path} is not a checkpoint of this program, or is cut short"
            in capsys.readouterr().err
        )
        assert_same_run(whole, out)
    for folder in (out / "checkpoints").iterdir():
        (folder / "training.pt").write_bytes(b"")
    assert run.main([*flags(checkpoints, out, **FIVE), "--resume", "auto"]) == 2
    assert "no checkpoint in" in capsys.readouterr().err.splitlines()[-1]


def test_a_checkpoint_of_another_number_of_workers_is_named(checkpoints, whole, tmp_path, capsys):
    out = shutil.copytree(whole, tmp_path / "run")
    assert run.main([*flags(checkpoints, out, **FIVE | {"workers": 1}), "--resume", "auto"]) == 2
    assert "written with --workers 0, this run has 1; leave the flag out" in capsys.readouterr().err
    assert json.loads((out / "config.json").read_text())["settings"]["workers"] == 0


def test_a_validation_that_fails_costs_no_iteration(checkpoints, tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(full_train.pictures, "validation", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(checkpoints, tmp_path, validate_every=2, save_every=2)
    assert read(last(tmp_path) / "training.pt")["step"] == 2


def test_many_validation_prompts_are_sampled_by_the_batch(checkpoints, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("\n".join("abcde"))
    sample, calls = Student.sample, []

    def watched(student, noise, cond, *args, **more):
        calls.append((len(noise), len(cond["encoder_hidden_states"]), args[0]))
        return sample(student, noise, cond, *args, **more)

    monkeypatch.setattr(Student, "sample", watched)
    train(checkpoints, tmp_path, batch=2, validate_every=2, prompts=tmp_path / "prompts.txt")
    assert calls == [(n, n, k) for n in (2, 2, 1) for k in (1, 2, 4)]
    width, height = Image.open(tmp_path / "pictures" / "steps_1_0000002.png").size
    assert (width, height) == (5 * 68 + 4, 72)


def test_a_checkpoint_of_another_architecture_is_named(checkpoints, whole, tmp_path, capsys):
    more = [*flags(checkpoints, tmp_path, backbone="v"), "--resume", str(last(whole))]
    assert run.main(more) == 2
    assert f"--resume {last(whole)}: is of other networks or settings" in capsys.readouterr().err


def test_a_checkpoint_of_another_data_set_or_version_is_named(checkpoints, whole, tmp_path, capsys):
    other = shutil.copytree(checkpoints / "images", tmp_path / "others")
    assert (
        run.main([*flags(checkpoints, tmp_path / "run", data=other), "--resume", str(last(whole))])
        == 2
    )
    assert f"its data is {checkpoints / 'images'}, not {other}" in capsys.readouterr().err
    folder = shutil.copytree(last(whole), tmp_path / "old")
    write(
        folder / "training.pt",
        {k: v for k, v in read(folder / "training.pt").items() if k != "version"},
    )
    assert run.main([*flags(checkpoints, tmp_path / "run"), "--resume", str(folder)]) == 2
    assert "its version is None, not 2" in capsys.readouterr().err


def test_the_same_command_gives_the_same_run(checkpoints, whole, tmp_path):
    train(checkpoints, tmp_path, **FIVE)
    assert_same_run(whole, tmp_path)


def test_a_full_disk_ends_in_one_line_and_the_last_checkpoint_stays(
    checkpoints, tmp_path, monkeypatch, capsys
):
    write, calls = storage._Summing.write, []

    def full(self, content):
        calls.append(0)
        if len(calls) > 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, content)

    out = tmp_path / "run"
    train(checkpoints, out, steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(storage._Summing, "write", full)
        assert run.main([*flags(checkpoints, out, steps=3, save_every=1), "--resume", "auto"]) == 2
    assert "the disk is full" in capsys.readouterr().err.splitlines()[-1]
    assert read(last(out) / "training.pt")["step"] == 1
    train(checkpoints, out, "--resume", "auto", steps=3, save_every=1)
    assert read(last(out) / "training.pt")["step"] == 3


def test_a_small_disk_that_fills_up_leaves_the_last_checkpoint_and_the_run_goes_on(
    checkpoints, tmp_path
):
    """There is room for one checkpoint, not for two."""
    folder = tmp_path / "disk"
    command = shlex.join(
        [sys.executable, "full/run.py", *flags(checkpoints, folder / "run", steps=2, save_every=1)]
    )
    first, there, second = on_a_small_disk(
        folder, "6m", f"ACCELERATE_USE_CPU=true {command}", "--resume auto"
    )
    line = first[1].splitlines()[-1]
    assert (
        first[0] == 2
        and "the disk is full" in line
        and f"{folder}/run/checkpoints/step_0000002" in line
    )
    assert there == [
        f"run/checkpoints/step_0000001/{name}.pt" for name in ("process_0", "training")
    ]
    assert second[0] == 0 and "from step 1" in second[1], second[1][-2000:]


def test_what_is_not_finite_stops_the_run_or_is_skipped_and_counted(
    checkpoints, tmp_path, monkeypatch, capsys
):
    make_batch, calls = Trainer.make_batch, []

    def broken(self, raw):
        calls.append(0)
        return make_batch(
            self, raw | {"image": raw["image"] * (float("nan") if len(calls) == 2 else 1)}
        )

    monkeypatch.setattr(Trainer, "make_batch", broken)
    assert run.main(flags(checkpoints, tmp_path / "a", steps=3, save_every=1)) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    for word in (
        "step 2: not finite: ",
        "adversarial",
        "gradient_norm",
        "step_0000001",
        "--skip-nonfinite N",
    ):
        assert word in message, message
    calls.clear()
    train(checkpoints, tmp_path / "b", steps=3, skip_nonfinite=1, save_every=1)
    rows = log_of(tmp_path / "b")
    assert [row["nonfinite"] for row in rows] == [0, 1, 1] and "adversarial" not in rows[1]
    states = [
        read(tmp_path / "b" / "checkpoints" / f"step_000000{n}" / "training.pt") for n in (2, 3)
    ]
    assert all(x.isfinite().all() for state in states for x in state["network"].values())


@pytest.mark.parametrize("remembered, says", [(200, True), (2, False)])
def test_the_log_says_who_has_won_most_of_the_last_iterations(
    checkpoints, tmp_path, monkeypatch, remembered, says
):
    """Three of five; none of the last two, before which the run stops and goes on."""
    real, won = full_train.heads_log, iter([1.0, 1.0, 1.0, 0.0, 0.0])
    log = lambda half: real(half) | {"discriminator_won": torch.tensor(next(won))}  # noqa: E731
    monkeypatch.setattr(full_train, "heads_log", log)
    monkeypatch.setattr(full_train, "REMEMBERED", remembered)
    train(checkpoints, tmp_path, steps=3, save_every=3)
    train(checkpoints, tmp_path, "--resume", "auto", steps=5, save_every=3)
    rows = log_of(tmp_path)
    assert [row["discriminator_won"] for row in rows] == [1, 1, 1, says, says]


def test_the_log_tells_the_health_of_a_run(checkpoints, tmp_path):
    train(checkpoints, tmp_path, steps=1, accumulate=2)
    row = log_of(tmp_path)[0]
    for name in (
        "gradient_adversarial",
        "gradient_distillation",
        "gradient_heads",
        "gradient_norm",
        "logit_real",
        "sign_fake",
        "r1",
    ):
        assert row[name] != 0, name
    assert row["distillation"] == pytest.approx(
        sum(row[f"distillation_t{t}"] for t in (0, 250, 500, 750)) / 4, rel=1e-5
    )
    assert row["nonfinite"] == 0 and row["discriminator_won"] in (0, 1)
