"""What tests of long runs share: equal to the bit, files that bite, kills, small disks, flags."""

import contextlib
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from common.flags import flag

ROOT = Path(__file__).resolve().parent.parent
BAD = ["0", "-1", "nan", "inf", "-inf", "1e300", str(10**30), "words", "", "1,,2", "ß"]


def same(a, b):
    """Equal to the bit, in nested dictionaries and lists."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def newest(folder, pattern):
    """When the last of those files was written; 0 where there are none."""
    times = []
    for file in folder.glob(pattern):
        with contextlib.suppress(OSError):  # renamed just now
            times.append(file.stat().st_mtime)
    return max(times, default=0)


def kill_while_it_writes(process, folder, pattern, seconds):
    """kill -9, so long after the process has written its first file; its stderr. RuntimeError if it
    does not write."""
    began = time.time()
    while process.poll() is None and newest(folder, pattern) < began:
        time.sleep(0.02)
        if time.time() - began > 120:
            raise RuntimeError("nothing was written")
    time.sleep(seconds)
    process.kill()
    return process.communicate()[1]


def on_a_small_disk(folder, size, command, resume):
    """A command when folder is a tmpfs of that size, and its resumption when there is room: (exit
    code, output), the checkpoints there in between (all of them whole, or it fails), (exit code,
    output). Skips where nothing can be mounted."""
    folder.mkdir()
    alone = ["unshare", "--mount", "--map-root-user"]
    mount = [*alone, "mount", "-t", "tmpfs", "none", folder]
    if not shutil.which("unshare") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    look = folder.parent / "look.py"
    look.write_text(f"""import pathlib, sys
sys.path.insert(0, {str(ROOT)!r})
from common import checkpoints
for file in sorted(pathlib.Path({str(folder)!r}).rglob("*.pt*")):
    checkpoints.verify(file)
    print(file.relative_to({str(folder)!r}))""")
    mark = "== the next part =="
    script = f"""mount -t tmpfs -o size={size} none {folder}
        {command} 2>&1; echo "{mark}$?"
        {sys.executable} {look} 2>&1; echo "{mark}"
        mount -o remount,size=64m {folder}; {command} {resume} 2>&1; echo "{mark}$?" """
    done = subprocess.run(
        [*alone, "sh", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    first, there, second, code = done.stdout.split(mark)
    return (int(there.split("\n")[0]), first), there.split("\n")[1:-1], (int(code), second)


def assert_takes_a_value_or_names_itself(field, configure, capsys):
    """Zero, negative, no number, huge and of the wrong type: settings that are within the limits,
    or one line."""
    name = field.name
    for text in BAD:
        try:
            made = configure([f"--{flag(name)}={text}"])
        except ValueError as error:
            assert f"--{flag(name)}" in str(error) and "\n" not in str(error)
        except SystemExit as stop:
            line = capsys.readouterr().err.splitlines()[-1]
            assert stop.code == 2 and f"--{flag(name)}" in line
        else:
            value, (low, high) = getattr(made, name), field.metadata["limits"]
            values = value if isinstance(value, tuple) else (value,)
            assert all(low <= x <= high for x in values if isinstance(x, int | float))
