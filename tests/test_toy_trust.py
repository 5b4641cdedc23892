"""toy/run.py under what happens to long runs: stopped at any step, killed, a full disk, bad files, bad flags, bad numbers."""

import dataclasses
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies
from test_checkpoints import Bomb
from test_toy_parts import rows_of
from test_toy_run import STAGES, TINY, call, finished, main_in_process  # noqa: F401  (finished is a fixture)

from checkpoints import CheckpointError, read, read_last
from flags import add_flags, flag, from_dict, show
from toy import distil, features, metrics, run, start, teacher
from toy.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
STEPS = dict(metric=4, features=4, teacher=6, pairs=2, start=4, distil=6)  # of the tiny preset


def same(a, b):
    """Equal to the bit, in nested dictionaries and lists."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list | tuple) else a == b


def assert_same_run(a, b):
    """Weights, averages, optimisers, generators, data order and logged losses of every stage; the figures, too."""
    for stage in STAGES:
        x, y = (read(folder / stage / "checkpoint.pt") for folder in (a, b))
        for part in x.keys() - {"seconds", "log"}:  # the log's length in bytes depends on how a clock's numbers are written
            assert same(x[part], y[part]), (stage, part)
        assert rows_of(a / stage / "log.csv") == rows_of(b / stage / "log.csv"), stage
    x, y = (json.loads((folder / "results.json").read_text())["results"] for folder in (a, b))
    strip = lambda rows: [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]  # noqa: E731
    assert all(strip(x[k]) == strip(y[k]) for k in ("teacher", "started", "student")) and x["real"] == y["real"]


def stopping(run_loop, stage, at, number):
    """run_loop, whose stage gets a signal in the midst of that step."""

    def loop(folder, label, parts, step, *rest, **more):
        def cut(i):
            if folder.name == stage and i == at:
                signal.raise_signal(number)
            return step(i)

        return run_loop(folder, label, parts, cut, *rest, **more)

    return loop


@pytest.mark.parametrize("seed", [0, 1])
def test_stopped_in_every_stage_and_resumed_is_as_if_never_stopped(finished, tmp_path, seed, monkeypatch, capsys):  # noqa: F811
    draw, out = random.Random(seed), tmp_path / "run"
    for n, (stage, steps) in enumerate(STEPS.items()):
        number, at = draw.choice([signal.SIGINT, signal.SIGTERM]), draw.randrange(steps)
        with monkeypatch.context() as patch:
            for module in (metrics, features, teacher, start, distil):
                patch.setattr(module, "run_loop", stopping(module.run_loop, stage, at, number))
            code = run.main([*TINY, "--out", str(out), *(["--resume"] if n else [])])
        assert code == 128 + number and "--resume" in capsys.readouterr().err
        assert read(out / stage / "checkpoint.pt")["step"] == at + 1
    assert run.main(["--resume", "--out", str(out), "--device", "cpu", "--threads", "1"]) == 0
    assert_same_run(finished[0], out)


def test_the_same_command_gives_the_same_run(finished, tmp_path):  # noqa: F811
    assert run.main([*TINY, "--out", str(tmp_path / "again")]) == 0
    assert_same_run(finished[0], tmp_path / "again")


def kill_and_resume(folder, whole, times, seed):
    """Kill a run -9 so many times at random moments, checkpoints being written after every step, and finish it."""
    longer = [*TINY, "--teacher-steps", "60", "--distil-steps", "60"]
    flags, began = [*longer, "--out", folder, "--checkpoint-seconds", "0"], time.time()
    assert call("run.py", *longer, "--out", whole)[0] == 0
    duration = time.time() - began
    draw, progress = random.Random(seed), 0
    for _ in range(times):
        command = [sys.executable, ROOT / "toy" / "run.py", *map(str, flags), *(["--resume"] if (folder / "config.json").exists() else [])]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        time.sleep(duration * (0.2 + 0.8 * draw.random()))  # the first fifth is imports
        process.kill()
        err = process.communicate()[1]
        assert process.returncode in (-signal.SIGKILL, 0) and "Traceback" not in err and "damaged" not in err
        states = [read_last(folder / stage / "checkpoint.pt") for stage in STAGES]  # none of them is torn
        done = sum(state["step"] for state in states if state)
        assert done >= progress
        progress = done
    code, _, err = call("run.py", *flags, *(["--resume"] if (folder / "config.json").exists() else []))
    assert code == 0, err
    assert_same_run(whole, folder)
    return progress


def test_killed_three_times_it_goes_on(tmp_path):
    assert kill_and_resume(tmp_path / "run", tmp_path / "whole", 3, seed=0) > 0


@pytest.mark.long
def test_killed_twenty_times_it_goes_on(tmp_path):
    assert kill_and_resume(tmp_path / "run", tmp_path / "whole", 20, seed=1) > 0


def test_a_full_disk_ends_in_one_line_and_the_run_goes_on_when_there_is_room(finished, tmp_path, capsys):  # noqa: F811
    folder = shutil.copytree(finished[0], tmp_path / "run")
    (folder / "teacher" / "checkpoint.pt.tmp").symlink_to("/dev/full")
    changed = [*TINY, "--out", folder, "--teacher-lr", "0.002"]
    code, err = main_in_process(run, changed, capsys)
    last = err.strip().splitlines()[-1]
    assert code == 2 and last.startswith(f"toy/run.py: {folder}/teacher/checkpoint.pt: cannot be written: the disk is full")
    assert read(folder / "teacher" / "checkpoint.pt")["finished"]  # the one of before
    assert main_in_process(run, [*changed, "--resume"], capsys)[0] == 0


@pytest.mark.parametrize("where", ["/sys/run", "file"])
def test_a_folder_that_cannot_be_made_ends_in_one_line(tmp_path, where, capsys):
    (tmp_path / "file").write_text("")
    out = tmp_path / where / "run" if where == "file" else Path(where)
    code, err = main_in_process(run, [*TINY, "--out", out], capsys)
    assert code == 2 and str(out) in err.splitlines()[-1] and "Traceback" not in err


def test_what_is_not_finite_stops_the_run_or_is_skipped_and_counted(finished, tmp_path, capsys, monkeypatch):  # noqa: F811
    folder, target, calls = shutil.copytree(finished[0], tmp_path / "run"), teacher.training_target, []

    def broken(*arguments):
        calls.append(0)
        return target(*arguments) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(teacher, "training_target", broken)
    changed = [*TINY, "--out", folder, "--teacher-lr", "0.002"]
    code, err = main_in_process(run, changed, capsys)
    assert code == 2 and "teacher, step 3: teacher loss is nan; the last good checkpoint: " in err.splitlines()[-1]
    calls.clear()
    assert main_in_process(run, [*changed, "--skip-nonfinite", "1"], capsys)[0] == 0
    log = (folder / "teacher" / "log.csv").read_text().splitlines()
    assert dict(zip(log[0].split(","), log[-1].split(","), strict=True))["nonfinite"] == "1"


def test_no_file_of_a_run_can_run_code(finished, tmp_path, capsys):  # noqa: F811
    """A pickle with a call in it in the place of every file that is loaded: refused, or made anew, never run."""
    target = tmp_path / "ran"
    for place in [*(f"{stage}/checkpoint.pt" for stage in STAGES), "distil/student.pt", "results.json", "config.json"]:
        folder = shutil.copytree(finished[0], tmp_path / "run", dirs_exist_ok=True)
        for form in (pickle.dumps, lambda x: torch.save(x, tmp_path / "saved.pt") or (tmp_path / "saved.pt").read_bytes()):
            (folder / place).write_bytes(form({"key": Bomb(target), "network": Bomb(target)}))
            main_in_process(run, ["--resume", "--out", folder, "--device", "cpu", "--threads", "1"], capsys)
            arguments = ["--run", folder, "--out", tmp_path / "x.png"]
            assert "Traceback" not in main_in_process(run.report and __import__("toy.sample").sample, arguments, capsys)[1]
            assert not target.exists(), place
        shutil.rmtree(folder)


def test_a_checkpoint_that_only_seems_to_fit_is_named(finished, tmp_path, capsys):  # noqa: F811
    from checkpoints import write

    folder = shutil.copytree(finished[0], tmp_path / "run")
    path = folder / "teacher" / "checkpoint.pt"
    state = read(path)
    for change in ({"network": {}}, {"optimizer": None}, {"log": "x", "pending": None}):
        write(path, state | change)
        code, err = main_in_process(run, [*TINY, "--out", folder], capsys)
        assert code == 2 and f"{path} does not fit" in err.splitlines()[-1] and "Traceback" not in err


@pytest.mark.parametrize("text", ["", "[]", "{", '{"preset": "tiny"}', '{"preset": "tiny", "settings": {"teacher_stepz": 1}}',
                                  '{"preset": "tiny", "settings": {"teacher_steps": "many"}}'])  # fmt: skip
def test_a_config_that_is_none_is_named(tmp_path, text, capsys):
    (tmp_path / "config.json").write_text(text)
    code, err = main_in_process(run, ["--resume", "--out", tmp_path], capsys)
    assert code == 2 and str(tmp_path / "config.json") in err.splitlines()[-1] and "Traceback" not in err


FIELDS = {f.name: f for f in dataclasses.fields(Settings)}
BAD = ["0", "-1", "nan", "inf", "-inf", "1e300", str(10**30), "words", "", "1,,2", "ß"]


@pytest.mark.parametrize("name", FIELDS)
def test_every_flag_takes_a_value_or_names_itself(name, capsys):
    """Zero, negative, no number, huge and of the wrong type: settings that are within the limits, or one line."""
    for text in BAD:
        try:
            made = run.configure(*(lambda a, g: (a, g, torch.device("cpu")))(*run.parse_arguments([f"--{flag(name)}={text}"])))[0]
        except ValueError as error:
            assert f"--{flag(name)}" in str(error) and "\n" not in str(error)
        except SystemExit as stop:
            assert stop.code == 2 and f"--{flag(name)}" in capsys.readouterr().err.splitlines()[-1]
        else:
            value, (low, high) = getattr(made, name), FIELDS[name].metadata["limits"]
            numbers = [x for x in (value if isinstance(value, tuple) else (value,)) if isinstance(x, int | float)]
            assert all(low <= x <= high for x in numbers)


NUMBER = strategies.floats(allow_nan=False, allow_infinity=False)
SOME = strategies.fixed_dictionaries({}, optional={
    "teacher_lr": strategies.floats(1e-12, 1e3), "distil_timesteps": strategies.lists(strategies.integers(0, 999), min_size=1).map(tuple),
    "distil_c_s": strategies.booleans(), "eval_guidances": strategies.lists(strategies.floats(-100, 100), min_size=1).map(tuple),
    "teacher_steps": strategies.integers(1, 10**7), "data_dir": strategies.text(strategies.characters(exclude_categories=["Cs", "Cc"]), min_size=1),
})  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(SOME)
def test_settings_go_through_the_command_line_and_json_unchanged(values):
    import argparse

    made, parser = Settings(**values), argparse.ArgumentParser()
    add_flags(parser, Settings)
    arguments = [f"--{flag(name)}={show(value)}" for name, value in values.items()]
    assert Settings(**vars(parser.parse_args(arguments))) == made
    assert from_dict(Settings, json.loads(json.dumps(dataclasses.asdict(made)))) == made
