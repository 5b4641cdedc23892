"""toy/run.py under what happens to long runs: stopped at any step, killed, a full disk, bad files, bad flags, bad numbers."""

import contextlib
import dataclasses
import json
import pickle
import random
import shlex
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

from common.checkpoints import read, read_last, write
from common.flags import add_flags, flag, from_dict, show
from toy import data, distil, features, metrics, run, sample, teacher
from toy.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
STEPS = dict(features=4, metric=4, teacher=6, distil=6)  # of the tiny preset


def same(a, b):
    """Equal to the bit, in nested dictionaries and lists."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list | tuple) else a == b


def assert_same_run(a, b):
    """Weights, averages, optimisers, generators, data order and logged losses of every stage; the figures, too."""
    stages = [{path.parent.name for path in folder.glob("*/checkpoint.pt")} for folder in (a, b)]
    assert stages[0] == stages[1] >= set(STAGES)
    for stage in stages[0]:
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


@pytest.mark.parametrize("seed, more", [(0, []), (1, ["--precision", "bf16", "--features", "denoiser", "--flip", "true"])])
def test_stopped_in_every_stage_and_resumed_is_as_if_never_stopped(finished, tmp_path, seed, more, monkeypatch, capsys):  # noqa: F811
    draw, out, whole = random.Random(seed), tmp_path / "run", finished[0]
    command, stages = [*TINY, *more], {k: v for k, v in STEPS.items() if more or k in STAGES}
    if more:
        whole = tmp_path / "whole"
        assert run.main([*command, "--out", str(whole)]) == 0
    for n, (stage, steps) in enumerate(stages.items()):
        number, at = draw.choice([signal.SIGINT, signal.SIGTERM]), draw.randrange(steps)
        with monkeypatch.context() as patch:
            for module in (metrics, features, teacher, distil):
                patch.setattr(module, "run_loop", stopping(module.run_loop, stage, at, number))
            code = run.main([*command, "--out", str(out), *(["--resume"] if n else [])])
        assert code == 128 + number and "--resume" in capsys.readouterr().err
        assert read(out / stage / "checkpoint.pt")["step"] == at + 1
    assert run.main(["--resume", "--out", str(out), "--device", "cpu", "--threads", "1"]) == 0
    assert_same_run(whole, out)


def test_the_same_command_gives_the_same_run(finished, tmp_path):  # noqa: F811
    assert run.main([*TINY, "--out", str(tmp_path / "again")]) == 0
    assert_same_run(finished[0], tmp_path / "again")


def newest(folder, pattern):
    """When the last of those files was written; 0 where there are none."""
    times = []
    for file in folder.glob(pattern):
        with contextlib.suppress(OSError):  # renamed just now
            times.append(file.stat().st_mtime)
    return max(times, default=0)


def test_deterministic_algorithms_train_too(tmp_path):
    code, _, err = call("run.py", *TINY, "--out", tmp_path, "--deterministic", "true")
    assert code == 0, err


def kill_while_it_writes(process, folder, pattern, seconds):
    """kill -9, so long after the process has written its first file; its stderr. RuntimeError if it does not write."""
    began = time.time()
    while process.poll() is None and newest(folder, pattern) < began:
        time.sleep(0.02)
        if time.time() - began > 120:
            raise RuntimeError("nothing was written")
    time.sleep(seconds)
    process.kill()
    return process.communicate()[1]


def kill_and_resume(tmp_path, times, seed):
    """Kill a run -9 so many times at random moments of its training, checkpoints being written after every step, and
    finish it: each time it goes on from the last step but at most one, and it ends as if it had never been killed."""
    folder, whole, draw, kills = tmp_path / "run", tmp_path / "whole", random.Random(seed), 0
    longer = [*TINY, "--teacher-steps", str(100 * times), "--distil-steps", str(40 * times)]
    assert call("run.py", *longer, "--out", whole, timeout=1800)[0] == 0
    command = [sys.executable, ROOT / "toy" / "run.py", *longer, "--out", folder, "--checkpoint-seconds", "0"]
    while kills < times:
        resume = ["--resume"] if (folder / "config.json").exists() else []
        process = subprocess.Popen([*command, *resume], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        err = kill_while_it_writes(process, folder, "*/checkpoint.pt", 2 * draw.random())
        assert process.returncode == -signal.SIGKILL, "the run was over before it had been killed often enough"
        assert "Traceback" not in err and "looking for the one before it" not in err
        kills += 1
        for stage in STAGES:
            if state := read_last(folder / stage / "checkpoint.pt"):
                logged = [int(row["step"]) for row in rows_of(folder / stage / "log.csv") if row["nonfinite"] is not None]
                assert state["step"] >= max(logged, default=0) - 1, stage
    code, _, err = call("run.py", *longer, "--out", folder, "--resume", timeout=1800)
    assert code == 0 and "looking for the one before it" not in err, err
    assert_same_run(whole, folder)


def test_killed_three_times_it_goes_on(tmp_path):
    kill_and_resume(tmp_path, 3, seed=0)


@pytest.mark.long
def test_killed_twenty_times_it_goes_on(tmp_path):
    kill_and_resume(tmp_path, 20, seed=1)


def test_a_full_disk_ends_in_one_line_and_the_run_goes_on_when_there_is_room(finished, tmp_path, capsys):  # noqa: F811
    folder = shutil.copytree(finished[0], tmp_path / "run")
    (folder / "teacher" / "checkpoint.pt.tmp").symlink_to("/dev/full")
    changed = [*TINY, "--out", folder, "--teacher-lr", "0.002"]
    code, err = main_in_process(run, changed, capsys)
    last = err.strip().splitlines()[-1]
    assert code == 2 and last.startswith(f"toy/run.py: {folder}/teacher/checkpoint.pt: cannot be written: the disk is full")
    assert read(folder / "teacher" / "checkpoint.pt")["finished"]  # the one of before
    assert main_in_process(run, [*changed, "--resume"], capsys)[0] == 0


def on_a_small_disk(folder, size, command, resume):
    """A command when folder is a tmpfs of that size, and its resumption when there is room: (exit code, output), the
    checkpoints there in between (all of them whole, or it fails), (exit code, output). Skips where nothing can be mounted."""
    folder.mkdir()
    alone = ["unshare", "--mount", "--map-root-user"]
    if not shutil.which("unshare") or subprocess.run([*alone, "mount", "-t", "tmpfs", "none", folder], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    look = f"""import sys; sys.path.insert(0, {str(ROOT)!r}); from common import checkpoints; import pathlib
for file in sorted(pathlib.Path({str(folder)!r}).rglob("*.pt*")):
    checkpoints.verify(file)
    print(file.relative_to({str(folder)!r}))"""
    (folder.parent / "look.py").write_text(look)
    mark = "== the next part =="
    script = f"""mount -t tmpfs -o size={size} none {folder}
        {command} 2>&1; echo "{mark}$?"
        {sys.executable} {folder.parent / "look.py"} 2>&1; echo "{mark}"
        mount -o remount,size=64m {folder}; {command} {resume} 2>&1; echo "{mark}$?" """
    done = subprocess.run([*alone, "sh", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    first, there, second, code = done.stdout.split(mark)
    return (int(there.split("\n")[0]), first), there.split("\n")[1:-1], (int(code), second)


def test_a_small_disk_that_fills_up_leaves_what_was_whole_and_the_run_goes_on(tmp_path):
    """The metric network and F fit on it, the teacher does not."""
    folder = tmp_path / "disk"
    flags = [*TINY, "--features", "classifier", "--out", str(folder / "run")]
    command = shlex.join([sys.executable, "toy/run.py", *flags])
    first, there, second = on_a_small_disk(folder, "2900k", command, "--resume")
    assert first[0] == 2 and first[1].splitlines()[-1] == (
        f"toy/run.py: {folder}/run/teacher/checkpoint.pt: cannot be written: the disk is full; make room, or name another folder; "
        "the checkpoint before it is intact"
    )
    assert there == ["run/features/checkpoint.pt", "run/metric/checkpoint.pt"]
    assert second[0] == 0, second[1][-2000:]
    assert "teacher:   0%" in second[1] and "metric network:   0%" not in second[1] and "features F:   0%" not in second[1]


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
        (folder / place).unlink()
        if place.endswith(".pt"):
            write(folder / place, {"key": Bomb(target)})  # with this program's checksum
        else:
            (folder / place).write_bytes(pickle.dumps({"key": Bomb(target)}))
        err = main_in_process(run, ["--resume", "--out", folder, "--device", "cpu", "--threads", "1"], capsys)[1]
        assert "Traceback" not in err and not target.exists(), place
        if "checkpoint" in place:
            assert f"{folder / place} is not a readable checkpoint (Weights only load failed" in err
        shutil.rmtree(folder)
    folder = shutil.copytree(finished[0], tmp_path / "run")
    write(folder / "distil" / "student.pt", {"network": Bomb(target)})
    code, err = main_in_process(sample, ["--run", folder, "--out", tmp_path / "x.png"], capsys)
    assert code == 2 and "student.pt is not a readable checkpoint (Weights only load failed" in err and not target.exists()


def test_a_student_of_another_version_is_named(finished, tmp_path, capsys):  # noqa: F811
    folder = shutil.copytree(finished[0], tmp_path / "run")
    path = folder / "distil" / "student.pt"
    state = read(path)
    for change in ({"network": {}}, {"settings": {"old_name": 1}}, {"shape": []}):
        write(path, state | change)
        code, err = main_in_process(sample, ["--run", folder, "--out", tmp_path / "x.png"], capsys)
        assert code == 2 and f"{path} is not a student of this version" in err.splitlines()[-1] and "Traceback" not in err


def test_an_unfinished_run_is_neither_gone_on_with_nor_thrown_away_unasked(finished, tmp_path, capsys):  # noqa: F811
    folder = shutil.copytree(finished[0], tmp_path / "run")
    path = folder / "teacher" / "checkpoint.pt"
    write(path, read(path) | {"finished": False, "step": 3})
    code, err = main_in_process(run, [*TINY, "--out", folder], capsys)
    assert code == 2 and "teacher is unfinished, at step 3; --resume goes on with it" in err.splitlines()[-1]
    assert read(path)["step"] == 3


def test_a_resumed_auto_run_keeps_its_data_and_its_precision(tmp_path, monkeypatch, capsys):
    """Glyphs stood in for MNIST, which could not be had; that it can be had now changes nothing."""
    monkeypatch.setattr(data, "_fetch", lambda name, root: "no network")
    monkeypatch.setattr(run, "has_bf16", lambda device: True)
    flags = ["--preset", "tiny", "--device", "cpu", "--threads", "1", "--out", tmp_path]
    assert main_in_process(run, flags, capsys)[0] == 0
    monkeypatch.setattr(data, "_fetch", lambda name, root: None)
    monkeypatch.setattr(run, "has_bf16", lambda device: False)
    assert main_in_process(run, [*flags, "--resume"], capsys)[0] == 0
    stored = json.loads((tmp_path / "config.json").read_text())["settings"]
    assert (stored["dataset"], stored["precision"]) == ("glyphs", "bf16")
    assert main_in_process(run, [*flags, "--dataset", "glyphs", "--out", tmp_path / "new"], capsys)[0] == 0
    assert json.loads((tmp_path / "new" / "config.json").read_text())["settings"]["precision"] == "fp32"


@pytest.mark.parametrize("kind, flip", [("cifar10", "true"), ("glyphs", "false")])
def test_cifar10_is_mirrored_unless_told_otherwise(tmp_path, monkeypatch, kind, flip):
    images, labels = torch.zeros(2, 1, 32, 32, dtype=torch.uint8), torch.arange(2)
    small = data.Dataset("small", images, labels, images, labels, ("a", "b"), kind)
    monkeypatch.setattr(data, "load", lambda *_, **__: small)
    monkeypatch.delattr(run, "make_features")
    with pytest.raises(NameError, match="make_features"):  # the settings are written before
        run.main([*TINY, "--out", str(tmp_path)])
    assert json.loads((tmp_path / "config.json").read_text())["settings"]["flip"] == flip


def test_a_checkpoint_that_only_seems_to_fit_is_named(finished, tmp_path, capsys):  # noqa: F811
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


def assert_takes_a_value_or_names_itself(field, configure, capsys):
    """Zero, negative, no number, huge and of the wrong type: settings that are within the limits, or one line."""
    name = field.name
    for text in BAD:
        try:
            made = configure([f"--{flag(name)}={text}"])
        except ValueError as error:
            assert f"--{flag(name)}" in str(error) and "\n" not in str(error)
        except SystemExit as stop:
            assert stop.code == 2 and f"--{flag(name)}" in capsys.readouterr().err.splitlines()[-1]
        else:
            value, (low, high) = getattr(made, name), field.metadata["limits"]
            numbers = [x for x in (value if isinstance(value, tuple) else (value,)) if isinstance(x, int | float)]
            assert all(low <= x <= high for x in numbers)


@pytest.mark.parametrize("name", FIELDS)
def test_every_flag_takes_a_value_or_names_itself(name, capsys):
    def configure(argv):
        return run.configure(*run.parse_arguments(argv), torch.device("cpu"))[0]

    assert_takes_a_value_or_names_itself(FIELDS[name], configure, capsys)


def rising(numbers):
    return strategies.sets(numbers, min_size=1).map(lambda values: tuple(sorted(values)))


SOME = strategies.fixed_dictionaries({}, optional={
    "teacher_lr": strategies.floats(1e-12, 1e3), "distil_timesteps": rising(strategies.integers(0, 999)),
    "distil_c_text": strategies.booleans(), "eval_guidances": rising(strategies.floats(-100, 100)),
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
