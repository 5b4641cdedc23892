"""full/bench.py, on tiny checkpoints."""

import json

import pytest
import torch
from full_runs import flags

from full import bench
from full.plan.labels import HEADS


def bench_flags(checkpoints, out, *more, **settings):
    """Those of a short run, less what a benchmark has not."""
    given = flags(checkpoints, out, data=None, workers=None, tracker=None, **settings)
    return [*given, "--iterations", "2", "--debug", *more]


def test_a_stopwatch_gives_each_part_its_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    watch = bench.Stopwatch(torch.device("cpu"))
    now[0] = 1
    with watch.inside("student"):
        now[0] = 3
        with watch.inside("VAE"):
            now[0] = 7
        now[0] = 8
    now[0] = 16
    watch.part = "student, backward"
    now[0] = 32
    watch.part = HEADS
    assert watch.seconds == {HEADS: 1 + 8, "student": 2 + 1, "VAE": 4, "student, backward": 16}


@pytest.mark.parametrize("backbone", ["sd15", "sdxl"])
def test_a_tiny_benchmark_writes_its_figures(checkpoints, tmp_path, backbone, capsys):
    out = tmp_path / "speed"
    assert bench.main(bench_flags(checkpoints, out, "--batches", "1,3", backbone=backbone)) == 0
    stored = json.loads(out.with_suffix(".json").read_text())
    assert [row["batch"] for row in stored["batches"]] == [1, 3]
    for row in stored["batches"]:
        assert len(row["seconds"]) == 2 and row["flops"] > 0 and row["planned"] > 0
        parts = row["parts"]
        expected = {"student", "student, backward", "teacher", "VAE decodes x_hat, backward", HEADS}
        assert expected <= set(parts) and all(part["seconds"] > 0 for part in parts.values())
    text = out.with_suffix(".md").read_text()
    assert text in capsys.readouterr().out and "| teacher |" in text


def test_what_does_not_fit_ends_it(checkpoints, tmp_path, monkeypatch):
    def time(self, batch, iterations):
        if batch == 4:
            raise torch.OutOfMemoryError
        return real(self, batch, iterations)

    real = bench.Bench.time
    monkeypatch.setattr(bench.Bench, "time", time)
    out = tmp_path / "speed"
    assert bench.main(bench_flags(checkpoints, out, "--batches", "2,4,8")) == 0
    stored = json.loads(out.with_suffix(".json").read_text())["batches"]
    assert [row["batch"] for row in stored] == [2, 4] and stored[1]["failed"] == "out of memory"
    assert "| 4 | out of memory |" in out.with_suffix(".md").read_text()


def test_mistakes_are_one_line(tmp_path, capsys):
    for more, line in (
        (["--iterations", "0"], "--iterations, --batches: must be at least 1"),
        (["--random", str(tmp_path), "--backbone", "x"], "--random: --backbone must be one of"),
    ):
        assert bench.main(more) == 2
        assert line in capsys.readouterr().err
