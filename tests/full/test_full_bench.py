"""full/bench.py, on tiny checkpoints."""

import json
from types import SimpleNamespace

import pytest
import torch
from full_runs import flags

from common.meter import least_seconds
from full import bench, random_weights
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


def test_the_least_time_is_each_precision_at_its_own_rate():
    flops = {("student", "bf16"): 80, ("student", "tf32"): 10, (HEADS, "tf32"): 5}
    rates = {"bf16": 40, "tf32": 5}
    parts = bench.by_part(flops).items()
    assert {name: least_seconds(n, rates) for name, n in parts} == {"student": 2 + 2, HEADS: 1}


@pytest.mark.parametrize(
    "name, gib, gpu",
    [
        ("NVIDIA H100 80GB HBM3", 79.1, "h100-80"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40"),
        ("NVIDIA GeForce RTX 4090", 23.5, "rtx4090-24"),
        ("NVIDIA B200", 178, "h200-141"),  # unknown: the largest that is no larger
        ("NVIDIA T4", 15, "rtx4090-24"),
    ],
)
def test_the_plan_is_of_the_gpu_that_is_there(name, gib, gpu, monkeypatch):
    properties = SimpleNamespace(total_memory=gib * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert bench.gpu_of(torch.device("cuda")) == gpu
    assert bench.gpu_of(torch.device("cpu")) == "a100-80"


@pytest.mark.parametrize("backbone", ["sd15", "sdxl"])
def test_a_tiny_benchmark_writes_its_figures(checkpoints, tmp_path, backbone, capsys):
    out = tmp_path / "speed"
    assert bench.main(bench_flags(checkpoints, out, "--batches", "1,3", backbone=backbone)) == 0
    stored = json.loads(out.with_suffix(".json").read_text())
    assert [row["batch"] for row in stored["batches"]] == [1, 3]
    for row in stored["batches"]:
        assert len(row["seconds"]) == 2 and row["flops"] > 0 and row["planned"] > 0
        least = sum(part["least_seconds"] for part in row["parts"].values())
        assert row["least_seconds"] == pytest.approx(least)
        parts = row["parts"]
        assert row["planned"] == max(part["planned"] for part in parts.values()) > 0
        expected = {"student", "student, backward", "teacher", "VAE decodes x_hat, backward", HEADS}
        assert expected <= set(parts) and all(part["seconds"] > 0 for part in parts.values())
    text = out.with_suffix(".md").read_text()
    assert text in capsys.readouterr().out and "| teacher |" in text


def test_random_weights_stand_in_for_the_networks(checkpoints, tmp_path, monkeypatch):
    """The folder's networks, where the flags name no others."""
    names = {"backbone": "sd15", "features": "dino", "c_img": "dino-large", "c_text": "clip"}
    asked = []

    def settings_for(backbone, folder):
        asked.append((backbone, folder))
        return {setting: str(folder / name) for setting, name in names.items()}

    monkeypatch.setattr(random_weights, "settings_for", settings_for)
    given = dict.fromkeys(["features", "c_img", "c_text"])
    more = ["--backbone", "sd15", "--random", str(checkpoints), "--batches", "1"]
    assert bench.main(bench_flags(checkpoints, tmp_path / "speed", *more, **given)) == 0
    assert asked == [("sd15", checkpoints)]
    stored = json.loads((tmp_path / "speed.json").read_text())["settings"]
    assert stored["features"] == str(checkpoints / "dino")


def test_a_compiled_network_is_timed_as_a_whole(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    assert bench.main(bench_flags(checkpoints, tmp_path / "speed", compile="true")) == 0
    stored = json.loads((tmp_path / "speed.json").read_text())["batches"]
    assert stored[0]["parts"] == {} and len(stored[0]["seconds"]) == 2


@pytest.mark.parametrize(
    "error, what",
    [
        (torch.OutOfMemoryError(), "out of memory"),
        (RuntimeError("too many elements\nat ..."), "RuntimeError: too many elements"),
    ],
)
def test_what_does_not_fit_ends_it(checkpoints, tmp_path, monkeypatch, error, what):
    def time(self, batch, iterations):
        if batch == 4:
            raise error
        return real(self, batch, iterations)

    real = bench.Bench.time
    monkeypatch.setattr(bench.Bench, "time", time)
    out = tmp_path / "speed"
    assert bench.main(bench_flags(checkpoints, out, "--batches", "2,4,8")) == 0
    stored = json.loads(out.with_suffix(".json").read_text())["batches"]
    assert [row["batch"] for row in stored] == [2, 4] and stored[1]["failed"] == what
    assert f"| 4 | {what} |" in out.with_suffix(".md").read_text()


def test_mistakes_are_one_line(tmp_path, capsys):
    for more, line in (
        (["--iterations", "0"], "--iterations, --batches: must be at least 1"),
        (["--random", str(tmp_path), "--backbone", "x"], "--random: --backbone must be one of"),
    ):
        assert bench.main(more) == 2
        assert line in capsys.readouterr().err
