"""Hours of training: memory stays flat and no file but the logs grows. python -m pytest -m long -s tests/test_soak.py
(ADD_SOAK_MINUTES, 120 unless set)."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_toy_run import ROOT, TINY

PAGE = os.sysconf("SC_PAGE_SIZE")


def slope(points):
    """Least-squares slope of (x, y) pairs."""
    x, y = torch.tensor(points, dtype=torch.float64).T
    return ((x - x.mean()) @ (y - y.mean()) / (x - x.mean()).square().sum()).item()


def test_slope_by_hand():
    assert slope([(0, 1.0), (1, 3.0), (2, 5.0), (3, 7.0)]) == pytest.approx(2)


@pytest.mark.long
def test_a_long_run_keeps_its_memory_and_its_files(tmp_path):
    minutes, folder = float(os.environ.get("ADD_SOAK_MINUTES", 120)), tmp_path / "run"
    command = [sys.executable, ROOT / "toy" / "run.py", *TINY, "--out", folder, "--distil-steps", str(10**7), "--checkpoint-seconds", "5"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    began, memory, sizes = time.time(), [], []
    while time.time() - began < 60 * minutes:
        time.sleep(2)
        assert process.poll() is None
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
        if (folder / "distil" / "checkpoint.pt").exists():  # the stage is under way
            memory.append(((time.time() - began) / 3600, pages * PAGE / 2**20))
            sizes.append(sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and f.suffix not in (".csv", ".tmp")))
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=120)
    assert process.returncode == 143
    memory, sizes = memory[len(memory) // 10 :], sizes[len(sizes) // 10 :]
    growth, mean = slope(memory), sum(y for _, y in memory) / len(memory)
    print(f"\n{minutes:g} minutes: {mean:.1f} MiB, slope {growth:+.2f} MiB an hour, files {min(sizes)} to {max(sizes)} bytes, "
          f"log {(folder / 'distil' / 'log.csv').stat().st_size} bytes")  # fmt: skip
    assert abs(growth) * minutes / 60 < 0.03 * mean  # over the whole soak
    assert max(sizes) < 1.02 * min(sizes)
