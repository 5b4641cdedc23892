"""What only a GPU shows: python -m pytest -m gpu -n 0"""

import json
import warnings

import pytest
import torch

from toy import bench, distil, graphs, run, teacher
from toy.settings import PRESETS, Settings

pytestmark = pytest.mark.gpu
TINY = "--preset tiny --dataset glyphs --device cuda --precision fp32 --deterministic true".split()


def load(folder, file):
    return torch.load(folder / file, weights_only=True, map_location="cpu")


def train(folder, *flags):
    """The weights of the student."""
    assert run.main([*TINY, "--out", str(folder), *flags]) == 0
    return load(folder, "distil/student.pt")["network"]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    return folder, train(folder)


def test_a_recorded_step_draws_and_trains_as_one_that_is_not(recorded, tmp_path, monkeypatch):
    for module in (distil, teacher):
        monkeypatch.setattr(module, "recorded", lambda *args, **kwargs: lambda function: function)
    slow = train(tmp_path)
    for name, w in recorded[1].items():
        torch.testing.assert_close(w, slow[name], rtol=1e-3, atol=1e-4)
    for stage in ("teacher", "distil"):
        states = [load(folder, f"{stage}/checkpoint.pt") for folder in (recorded[0], tmp_path)]
        assert torch.equal(*(s["generator"]["state"] for s in states))


def test_deterministic_runs_are_equal_to_the_bit(recorded, tmp_path):
    again = train(tmp_path)
    assert all(torch.equal(w, again[name]) for name, w in recorded[1].items())


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(recorded, tmp_path, monkeypatch):
    steps = []

    class Interrupted(Exception):
        pass

    def update(*arguments):
        steps.append(1)
        if len(steps) == 8:
            raise Interrupted
        return real(*arguments)

    real = distil.update
    monkeypatch.setattr(distil, "update", update)
    with pytest.raises(Interrupted):
        run.main([*TINY, "--out", str(tmp_path), "--checkpoint-seconds", "0"])
    monkeypatch.setattr(distil, "update", real)
    again = train(tmp_path, "--resume")
    assert all(torch.equal(w, again[name]) for name, w in recorded[1].items())


def test_a_replay_that_is_not_finite_moves_nothing_and_ends_the_run(tmp_path, monkeypatch, capsys):
    class Bad(distil.Batches):
        drawn = 0

        def __next__(self):
            images, labels = super().__next__()
            self.drawn += 1
            return (images * torch.nan if self.drawn == 3 else images), labels

    monkeypatch.setattr(distil, "Batches", Bad)
    assert run.main([*TINY, "--out", str(tmp_path), "--checkpoint-seconds", "0"]) == 2
    assert "ADD, step 3: student loss is nan; the last good checkpoint" in capsys.readouterr().err
    state = load(tmp_path, "distil/checkpoint.pt")
    assert state["step"] == 2 and all(w.isfinite().all() for w in state["student"].values())


def test_a_recorded_function_is_replayed_with_new_arguments_and_new_draws():
    device, calls = torch.device("cuda"), []
    generator = torch.Generator(device).manual_seed(0)

    @graphs.recorded(device, [generator])
    def noisy(x):
        calls.append(1)
        return x + torch.randn(x.shape, device=device, generator=generator)

    zeros = [noisy(torch.zeros(1000, device=device)).clone() for _ in range(3)]
    one = noisy(torch.ones(1000, device=device)).clone()
    assert len(calls) == graphs.WARM_UP + 1
    assert not torch.equal(zeros[0], zeros[1]) and one.mean().item() == pytest.approx(1, abs=0.15)
    same = torch.Generator(device).manual_seed(0)
    for x in zeros:
        assert torch.equal(x, torch.randn(1000, device=device, generator=same))


def test_a_step_waits_for_the_device_only_to_check_losses_and_gradients():
    """Twice for each half, and once for the batch's place in the data: no weight may move after a
    loss that is not finite. Nothing else waits."""
    step = bench.Bench(Settings(**PRESETS["tiny"]), torch.device("cuda")).step
    for _ in range(graphs.WARM_UP + 2):
        step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchronizing" in str(w.message)]
    assert 4 <= len(waits) <= 5


def test_the_log_counts_memory_of_the_gpu(recorded):
    text = (recorded[0] / "distil" / "log.csv").read_text().splitlines()
    row = dict(zip(text[0].split(","), text[-1].split(","), strict=True))
    assert float(row["memory_gib"]) > 0
    assert json.loads((recorded[0] / "results.json").read_text())["results"]["n"] == 64


def test_the_benchmark_times_recorded_pieces(tmp_path):
    flags = ["--preset", "tiny", "--device", "cuda", "--repeats", "2"]
    assert bench.main([*flags, "--out", str(tmp_path / "speed")]) == 0
    stored = json.loads((tmp_path / "speed.json").read_text())
    assert set(bench.SECTIONS) < set(stored) and "naive step" in stored["step"]["seconds"]
    assert min(stored["limits"]["flops_per_second"].values()) > 0
