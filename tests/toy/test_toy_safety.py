"""toy/run.py and toy/sample.py on files of another version, and on files meant to run code."""

import pickle
import shutil

import pytest
from toy_runs import STAGES, TINY, main_in_process
from trust import Bomb

from common.checkpoints import read, write
from toy import run, sample


def test_no_file_of_a_run_can_run_code(finished, tmp_path, capsys):
    """A pickle with a call in it in the place of every file that is loaded: refused, or made anew,
    never run."""
    target, resume = tmp_path / "ran", ["--resume", "--device", "cpu", "--threads", "1"]
    checkpoints = [f"{stage}/checkpoint.pt" for stage in STAGES]
    for place in [*checkpoints, "distil/student.pt", "results.json", "config.json"]:
        folder = shutil.copytree(finished[0], tmp_path / "run", dirs_exist_ok=True)
        (folder / place).unlink()
        if place.endswith(".pt"):
            write(folder / place, {"key": Bomb(target)})  # with this program's checksum
        else:
            (folder / place).write_bytes(pickle.dumps({"key": Bomb(target)}))
        err = main_in_process(run, [*resume, "--out", folder], capsys)[1]
        assert "Traceback" not in err and not target.exists(), place
        if "checkpoint" in place:
            assert f"{folder / place} is not a readable checkpoint (Weights only load failed" in err
        shutil.rmtree(folder)
    folder = shutil.copytree(finished[0], tmp_path / "run")
    write(folder / "distil" / "student.pt", {"network": Bomb(target)})
    code, err = main_in_process(sample, ["--run", folder, "--out", tmp_path / "x.png"], capsys)
    assert code == 2
    assert "student.pt is not a readable checkpoint (Weights only load failed" in err
    assert not target.exists()


def test_a_student_of_another_version_is_named(finished, tmp_path, capsys):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    path = folder / "distil" / "student.pt"
    state = read(path)
    for change in ({"network": {}}, {"settings": {"old_name": 1}}, {"shape": []}):
        write(path, state | change)
        code, err = main_in_process(sample, ["--run", folder, "--out", tmp_path / "x.png"], capsys)
        assert code == 2
        assert f"{path} is not a student of this version" in err.splitlines()[-1]
        assert "Traceback" not in err


def test_a_checkpoint_that_only_seems_to_fit_is_named(finished, tmp_path, capsys):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    path = folder / "teacher" / "checkpoint.pt"
    state = read(path)
    for change in ({"network": {}}, {"optimizer": None}, {"log": "x", "pending": None}):
        write(path, state | change)
        code, err = main_in_process(run, [*TINY, "--out", folder], capsys)
        assert code == 2
        assert f"{path} does not fit" in err.splitlines()[-1]
        assert "Traceback" not in err


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"preset": "tiny"}',
        '{"preset": "tiny", "settings": {"teacher_stepz": 1}}',
        '{"preset": "tiny", "settings": {"teacher_steps": "many"}}',
    ],
)
def test_a_config_that_is_none_is_named(tmp_path, text, capsys):
    (tmp_path / "config.json").write_text(text)
    code, err = main_in_process(run, ["--resume", "--out", tmp_path], capsys)
    assert code == 2
    assert str(tmp_path / "config.json") in err.splitlines()[-1]
    assert "Traceback" not in err
