"""common/checkpoints.py: nothing torn is ever read, nothing lost but the file being written,
nothing run that was only to be read."""

import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from trust import ROOT, Bomb, same

from common.checkpoints import CheckpointError, read, read_last, write, write_text
from common.errors import one_line

STATE = {
    "weights": torch.arange(1000.0),
    "step": 3,
    "rows": [{"loss": 0.5}],
    "names": ["a", "ß"],
    "none": None,
}


@pytest.fixture
def path(tmp_path):
    """Two checkpoints, of steps 3 and 4."""
    path = tmp_path / "checkpoint.pt"
    write(path, STATE)
    write(path, STATE | {"step": 4})
    return path


def test_the_last_two_are_kept_and_are_what_was_saved(path):
    assert same(read(path), STATE | {"step": 4}) and same(read(f"{path}.previous"), STATE)
    names = sorted(p.name for p in path.parent.iterdir())
    assert names == ["checkpoint.pt", "checkpoint.pt.previous"]
    assert same(torch.load(path, weights_only=True), STATE | {"step": 4})  # any program can


def test_every_truncation_is_noticed_and_the_one_before_is_used(path, capsys):
    whole = path.read_bytes()
    says = f"^{path} is not a checkpoint of this program, or is cut short$"
    for length in (0, 1, 10, len(whole) // 2, len(whole) - 26, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=says):
            read(path)
        assert read_last(path)["step"] == 3
        assert str(path) in capsys.readouterr().err


def test_every_flipped_byte_is_noticed(path):
    whole = path.read_bytes()
    for i in random.Random(0).sample(range(len(whole)), 50):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        with pytest.raises(CheckpointError, match="damaged|cut short"):
            read(path)


def test_where_none_can_be_read_it_says_so_and_where_none_is_it_is_none(path, tmp_path):
    assert read_last(tmp_path / "other.pt") is None
    for file in tmp_path.iterdir():
        file.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"no copy of it can be read; remove .*\* to"):
        read_last(path)


def test_between_the_two_renamings_the_one_before_is_there(path):
    os.replace(path, f"{path}.previous")  # where a kill -9 may fall
    assert read_last(path)["step"] == 4


def test_code_in_a_file_does_not_run(path, tmp_path):
    """A pickle and a torch.save file with a call in them, the latter with this program's checksum,
    too."""
    target = tmp_path / "ran"
    torch.save({"x": Bomb(target)}, tmp_path / "torch.pt")
    path.write_bytes((tmp_path / "torch.pt").read_bytes())
    with pytest.raises(CheckpointError):
        read(path)
    write(path, {"x": Bomb(target)})
    with pytest.raises(CheckpointError, match="is not a readable checkpoint"):
        read(path)
    path.write_bytes(pickle.dumps(Bomb(target)))
    with pytest.raises(CheckpointError):
        read(path)
    assert not target.exists()
    torch.load(tmp_path / "torch.pt", weights_only=False)  # the bomb is a real one
    assert target.exists()


def test_a_full_disk_is_named_and_the_checkpoint_stays(path):
    Path(f"{path}.tmp").symlink_to("/dev/full")
    says = f"^{path}: cannot be written: the disk is full; .*intact$"
    with pytest.raises(CheckpointError, match=says):
        write(path, STATE | {"step": 5})
    assert read(path)["step"] == 4 and read(f"{path}.previous")["step"] == 3
    assert len(list(path.parent.iterdir())) == 2
    Path(f"{path}.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError) as error:
        write_text(path, "text")
    assert one_line(error.value) == "the disk is full; make room, or name another folder"
    assert read(path)["step"] == 4


def test_a_folder_that_cannot_be_written_is_named():
    says = "/sys/checkpoint.pt: cannot be written: no permission"
    with pytest.raises(CheckpointError, match=says):
        write("/sys/checkpoint.pt", STATE)


def test_a_state_that_cannot_be_saved_leaves_the_checkpoint(path):
    with pytest.raises(Exception, match="pickle"):
        write(path, {"a": lambda: None})
    assert read(path)["step"] == 4 and len(list(path.parent.iterdir())) == 2


WRITER = """
import sys, torch
sys.path.insert(0, {root!r})
from common.checkpoints import write
step = 0
while True:
    step += 1
    write({path!r}, {{"step": step, "weights": torch.full((500_000,), float(step))}})
    print(step, flush=True)
"""


def test_kill_9_while_writing_loses_one_checkpoint_at_the_most(tmp_path):
    """A process that does nothing but write is killed at random moments; what it said was written
    is there, or newer."""
    path, draw = tmp_path / "checkpoint.pt", random.Random(1)
    command = [sys.executable, "-c", WRITER.format(root=str(ROOT), path=str(path))]
    for _ in range(4):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert int(process.stdout.readline()) == 1
        time.sleep(draw.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        told = [1, *map(int, process.communicate()[0].split())][-1]
        state = read_last(path)
        assert told <= state["step"] <= told + 1 and (state["weights"] == state["step"]).all()
