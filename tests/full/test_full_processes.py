"""full/run.py in processes of its own, one or two: they agree, and survive what kills them."""

import json
import os
import random
import signal
import time

import pytest
from full_runs import ROOT, finish, flags, last, launch, log_of, train
from trust import kill_while_it_writes, same

from common.checkpoints import read


def test_two_processes_resume_to_the_bit_also_after_a_torn_checkpoint(checkpoints, tmp_path):
    """One run of three steps; one of two, gone on with; and the first with the second process's
    last file cut: both processes go on from the checkpoint before."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"

    def train_two(out, steps, *more):
        code, err = finish(
            launch(2, *flags(checkpoints, out, steps=steps, batch=2, save_every=1), *more)
        )
        assert code == 0, err[-3000:]
        return err

    def same_as_cut():
        assert [f.name for f in sorted(last(cut).iterdir())] == [
            "process_0.pt",
            "process_1.pt",
            "training.pt",
        ]
        return all(same(read(last(whole) / file.name), read(file)) for file in last(cut).iterdir())

    train_two(whole, 3)
    train_two(cut, 2)
    train_two(cut, 3, "--resume", "auto")
    assert same_as_cut()
    path = last(whole) / "process_1.pt"
    path.write_bytes(path.read_bytes()[:-40])
    err = train_two(whole, 3, "--resume", "auto")
    assert err.count(f"{path} is not a checkpoint of this program, or is cut short") == 1
    assert same_as_cut()


def broken(checkpoints, out, *what, **more):
    """full_broken.py in two processes, three steps, each saved: (their exit codes, stderr)."""
    more = flags(checkpoints, out, steps=3, batch=2, save_every=1, **more)
    err = finish(launch(2, *what, *more, script=ROOT / "tests" / "full" / "full_broken.py"))[1]
    return [int((out / f"exit_{rank}").read_text()) for rank in (0, 1)], err


def test_two_processes_agree_on_what_one_of_them_saw(checkpoints, tmp_path):
    """Images that are no numbers reach the second process alone: both stop, or both skip the
    step."""
    codes, err = broken(checkpoints, tmp_path / "a", "images", 1, 2)
    assert codes == [2, 2] and err.count("step 2: not finite: ") == 2, err[-3000:]
    assert read(last(tmp_path / "a") / "training.pt")["step"] == 1
    codes, err = broken(checkpoints, tmp_path / "b", "images", 1, 2, skip_nonfinite=1)
    assert codes == [0, 0], err[-3000:]
    assert [row["nonfinite"] for row in log_of(tmp_path / "b")] == [0, 1, 1]
    state = read(last(tmp_path / "b") / "training.pt")
    assert state["step"] == 3
    assert [read(last(tmp_path / "b") / f"process_{rank}.pt")["nonfinite"] for rank in (0, 1)] == [
        1,
        1,
    ]
    assert all(x.isfinite().all() for x in state["network"].values())


def test_two_processes_leave_when_one_of_them_cannot_write(checkpoints, tmp_path):
    codes, err = broken(checkpoints, tmp_path, "disk", 1, 2)
    assert codes == [2, 2], err[-3000:]
    assert (
        "process_1.pt: cannot be written: the disk is full" in err
        and "another process could not write its part" in err
    )
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["step_0000001"]


def assert_it_survives_kills(checkpoints, tmp_path, times, seed):
    """Kill a run -9 so many times at random moments of its training, a checkpoint being written
    after every iteration, and finish it: what was there is there and can be read, and it ends as if
    it had never been killed."""
    out, draw, kills, more = (
        tmp_path / "run",
        random.Random(seed),
        0,
        dict(steps=25 * times, batch=2, save_every=1),
    )
    train(checkpoints, tmp_path / "whole", **more)
    while kills < times:
        process, folder = (
            launch(1, *flags(checkpoints, out, **more), "--resume", "auto"),
            out / "checkpoints",
        )
        err = kill_while_it_writes(process, folder, "step_*/training.pt", 2 * draw.random())
        assert process.returncode == -signal.SIGKILL, (
            "the run was over before it had been killed often enough"
        )
        assert "Traceback" not in err and "looking for the checkpoint before it" not in err, err[
            -2000:
        ]
        kills += 1
        step = max(read(f / "training.pt")["step"] for f in folder.glob("step_*[0-9]"))
        logged = [
            json.loads(x)["step"]
            for x in (out / "log.jsonl").read_text().splitlines(True)
            if x.endswith("\n")
        ]
        assert step >= max(logged) - 1
    train(checkpoints, out, "--resume", "auto", **more)
    assert same(read(last(out) / "training.pt"), read(last(tmp_path / "whole") / "training.pt"))
    assert not list((out / "checkpoints").glob("*.tmp"))


@pytest.mark.long
def test_killed_twenty_times_it_goes_on(checkpoints, tmp_path):
    assert_it_survives_kills(checkpoints, tmp_path, 20, seed=1)


def test_killed_once_it_goes_on(checkpoints, tmp_path):
    assert_it_survives_kills(checkpoints, tmp_path, 1, seed=0)


def test_a_signal_to_the_whole_group_saves_although_workers_get_it_too(checkpoints, tmp_path):
    """What `timeout` and torchrun send: SIGTERM to the trainer and to its loader's workers."""
    more = flags(checkpoints, tmp_path, steps=500, batch=2, workers=2, save_every=100)
    process = launch(1, *more, own_group=True)
    while process.poll() is None and not (tmp_path / "log.jsonl").exists():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and "Traceback" not in err, err[-2000:]
    assert read(last(tmp_path) / "training.pt")["step"] > 0
