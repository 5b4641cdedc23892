"""Hours of training: memory stays flat and no file but the logs grows. python -m pytest -m long -n
0 -s tests/full/test_soak.py (ADD_SOAK_MINUTES, 120 unless set). The toy and full/ run side by side,
one thread each."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from full_runs import ROOT, flags

PAGE = os.sysconf("SC_PAGE_SIZE")
ENDLESS = 10**7


def slope(points):
    """Least-squares slope of (x, y) pairs."""
    x, y = torch.tensor(points, dtype=torch.float64).T
    return ((x - x.mean()) @ (y - y.mean()) / (x - x.mean()).square().sum()).item()


def test_slope_by_hand():
    assert slope([(0, 1.0), (1, 3.0), (2, 5.0), (3, 7.0)]) == pytest.approx(2)


class Watched:
    """A run that never ends by itself, and its memory (hours, MiB) and files (bytes; logs aside)
    since its first checkpoint."""

    def __init__(self, name, folder, first, log, arguments):
        self.name, self.folder, self.first, self.log = name, folder, first, folder / log
        command = [sys.executable, ROOT / name / "run.py", *map(str, arguments)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.began, self.memory, self.sizes = time.time(), [], []

    def _processes(self):
        """This one and the loader's workers."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [self.process.pid, *map(int, children.split())]

    def look(self):
        assert self.process.poll() is None, f"{self.name} ended by itself"
        if not any(self.folder.glob(self.first)):
            return
        pages = sum(
            int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self._processes()
        )
        self.memory.append(((time.time() - self.began) / 3600, pages * PAGE / 2**20))
        self.sizes.append(0)
        for where, _, files in os.walk(self.folder):  # folders and files come and go meanwhile
            for file in files:
                path = os.path.join(where, file)
                if not file.endswith((".csv", ".jsonl")) and ".tmp" not in os.path.relpath(
                    path, self.folder
                ):
                    with contextlib.suppress(OSError):
                        self.sizes[-1] += os.path.getsize(path)

    def stop(self):
        """Asks it to save and leave; prints what was seen: (growth of memory over the whole, its
        mean, files' sizes)."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=300)
        assert self.process.returncode == 143
        memory, sizes = self.memory[len(self.memory) // 10 :], self.sizes[len(self.sizes) // 10 :]
        hours, mean = memory[-1][0] - memory[0][0], sum(y for _, y in memory) / len(memory)
        sizes = sorted(sizes)[
            len(sizes) // 20 : -len(sizes) // 20
        ]  # without the moments at which a file has two names
        rows = self.log.read_text().count("\n")
        print(
            f"\n{self.name}: {60 * hours:.0f} minutes, {rows} rows of the log, {mean:.1f} MiB, "
            f"slope {slope(memory):+.2f} MiB an hour, "
            f"files {sizes[0]} to {sizes[-1]} bytes, log {self.log.stat().st_size} bytes"
        )
        return slope(memory) * hours, mean, sizes


@pytest.mark.long
def test_a_long_run_keeps_its_memory_and_its_files(checkpoints, tmp_path):
    minutes = float(os.environ.get("ADD_SOAK_MINUTES", 120))
    toy = [
        "--preset",
        "tiny",
        "--dataset",
        "glyphs",
        "--device",
        "cpu",
        "--threads",
        "1",
        "--precision",
        "fp32",
        "--out",
        tmp_path / "toy",
        "--distil-steps",
        ENDLESS,
        "--checkpoint-seconds",
        5,
    ]
    full = flags(
        checkpoints, tmp_path / "full", steps=ENDLESS, save_every=20, workers=1, log_every=10
    )
    runs = [
        Watched("toy", tmp_path / "toy", "distil/checkpoint.pt", "distil/log.csv", toy),
        Watched("full", tmp_path / "full", "checkpoints/*/training.pt", "log.jsonl", full),
    ]
    try:
        while time.time() - runs[0].began < 60 * minutes:
            time.sleep(2)
            for run in runs:
                run.look()
        for run in runs:
            growth, mean, sizes = run.stop()
            assert abs(growth) < 0.03 * mean, run.name  # over the whole soak
            assert sizes[-1] < 1.02 * sizes[0], run.name
    finally:
        for run in runs:
            run.process.kill()
