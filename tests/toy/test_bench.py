"""toy/bench.py and common/timing.py."""

import copy
import json

import pytest
import torch

from common import timing
from common.meter import measure
from toy import bench
from toy.distil import build_add, make_batch
from toy.settings import PRESETS, Settings


def test_the_clock_takes_turns():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = timing.alternate(functions, torch.device("cpu"), repeats=3, least=0)
    assert calls == list("aabb") + list("ab") * 3  # two calls each to warm up
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_median_and_quartiles_ratios_and_exponents_by_hand():
    assert timing.quartiles([4, 1, 3, 2, 5]) == (2, 3, 4)
    assert timing.quartiles([7]) == (7, 7, 7)
    assert timing.ratios([2, 9], [1, 3]) == [2, 3]
    assert timing.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert timing.milliseconds([0.001, 0.002, 0.003]) == "2 (1.5 to 2.5)"
    assert timing.milliseconds([0.9, 1.3, 12.3]) == "1,300 (1,100 to 6,800)"


def test_operations_and_live_memory_of_a_product():
    a, b = torch.randn(8, 16), torch.randn(16, 32)

    def twice():  # the first product is gone when the second is made
        a @ b
        return (a @ b).sum()

    flops, peak = measure(twice)
    assert flops == {"tf32": 2 * 2 * 8 * 16 * 32} and peak == 4 * 8 * 32 + 4
    x = torch.randn(8, requires_grad=True)
    measure(lambda: torch.autograd.grad(x.square().sum(), x, create_graph=True))


def test_the_naive_iteration_has_the_losses_of_add():
    """The same draws, so the same two terms of Eq. 1."""
    settings = Settings(**PRESETS["tiny"] | {"precision": "fp32"})
    ours = bench.Bench(settings, torch.device("cpu"))
    student, features = copy.deepcopy(ours.student), ours.features
    add = build_add(student, ours.teacher, features, 10, settings, ours.device)
    add.discriminator.heads.load_state_dict(ours.training.heads.state_dict())
    before = features.generator.get_state()
    adversarial, distillation, *_ = ours.naive()()
    features.generator.set_state(before)
    batch = make_batch(ours.x_0, ours.labels, features, 10, settings)
    half = add.student_half(batch, torch.Generator().manual_seed(0))
    assert adversarial == pytest.approx(half.adversarial.mean().item(), rel=1e-4)
    assert distillation == pytest.approx(half.distillation.mean().item(), rel=1e-4)


def test_the_pieces_have_the_operations_of_the_step():
    settings = Settings(**PRESETS["tiny"] | {"precision": "fp32"})
    ours = bench.Bench(settings, torch.device("cpu"))
    weights = copy.deepcopy(ours.student.state_dict())
    counted = {name: sum(flops.values()) for name, (flops, _) in ours.counted.items()}
    # Spectral norm's power iterations come twice in a step, and again for each piece.
    assert sum(counted.values()) == pytest.approx(2 * counted["ADD step"], rel=0.02)
    assert counted["F, forward, real images"] < counted["ADD step"] / 4
    for name, weight in ours.student.state_dict().items():
        assert torch.allclose(weight, weights[name], rtol=0, atol=1e-9), name


def test_growth_of_a_tiny_step(monkeypatch):
    """Times that are made up: quadratic in the batch, linear in the rest."""
    settings = Settings(**PRESETS["tiny"])
    ours = bench.Bench(settings, torch.device("cpu"))

    def alternate(functions, device, repeats):
        power = {"batch": 2}
        return {key: [float(key[1]) ** power.get(key[0], 1)] for key in functions}

    monkeypatch.setattr(timing, "alternate", alternate)
    stored, lines = bench.growth(ours, 1)
    exponents = {"batch": 2, "image side": 1, "network ×": 1}
    assert stored["exponents"] == pytest.approx(exponents)
    assert stored["seconds"]["batch 512"] == [512.0**2] and len(lines) == 2 + 5 + 3 + 4


def test_two_processes_take_their_steps_at_once():
    ours = bench.Bench(Settings(**PRESETS["tiny"]), torch.device("cpu"))
    seconds, lines = bench.processes(ours, 1)
    assert [[len(values) for values in rounds] for rounds in seconds.values()] == [[1], [1], [2]]
    assert all(value > 0 for rounds in seconds.values() for values in rounds for value in values)
    assert lines[-1].startswith("| 2 processes, 1 thread |")


def test_a_tiny_benchmark_writes_its_figures(tmp_path, capsys):
    flags = "--preset tiny --device cpu --repeats 1 --only step sampling limits memory".split()
    assert bench.main([*flags, "--out", str(tmp_path / "speed")]) == 0
    stored = json.loads((tmp_path / "speed.json").read_text())
    assert set(stored) == {
        "command", "machine", "commit", "precision", "step", "sampling", "limits", "memory"
    }  # fmt: skip
    step = stored["step"]
    pieces = set(step["seconds"]) - {"ADD step", "naive step", "sum of the pieces"}
    assert len(pieces) == 9
    total = sum(step["seconds"][name][0] for name in pieces)
    assert step["seconds"]["sum of the pieces"] == [pytest.approx(total)]
    ratio = step["ratios"]["ADD step / sum of the pieces"]
    assert ratio == [pytest.approx(step["seconds"]["ADD step"][0] / total)]
    assert "student, 4 / bare passes" in stored["sampling"]["ratios"]
    limits = stored["limits"]
    assert all(speed > 0 for speed in limits["flops_per_second"].values())
    assert limits["least_seconds"].keys() == limits["flops"].keys() >= {"ADD step"}
    assert stored["memory"]["ADD step"] > stored["memory"]["teacher, forward"]
    text, shown = (tmp_path / "speed.md").read_text(), capsys.readouterr().out
    assert "| ADD step |" in text and all(line in text for line in shown.splitlines())
    assert bench.main([*flags, "--repeats", "0"]) == 2
    assert "--repeats 0: must be at least 1" in capsys.readouterr().err
