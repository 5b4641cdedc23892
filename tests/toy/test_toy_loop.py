"""toy/loop.py: the training loop, its log and its checkpoints."""

import math
import signal

import pytest
import torch
from torch import nn
from toy_runs import rows_of, stage_at

from common.checkpoints import read
from toy.data import Batches
from toy.loop import GeneratorState, TrainingError, make_ema, read_log, run_loop, warm_up_then_decay


class Counter:
    """A stage in miniature: a random walk whose position, generator and data order the checkpoint
    must carry."""

    def __init__(self, stop_at=None):
        self.generator = torch.Generator().manual_seed(0)
        self.network = nn.Linear(1, 1)
        nn.init.zeros_(self.network.weight)
        images = torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1, 1)
        self.batches = Batches(images, torch.arange(10), 3, seed=0)
        self.stop_at = stop_at

    def step(self, i):
        if i == self.stop_at:
            # Ctrl-C in the midst of a step: the step is still completed.
            signal.raise_signal(signal.SIGINT)
        _, labels = next(self.batches)
        with torch.no_grad():
            self.network.weight += torch.rand(1, generator=self.generator) * labels.sum()
        return {"w": self.network.weight.detach().clone().squeeze()}

    def run(self, folder, steps=25, key="k"):
        parts = {"n": self.network, "g": GeneratorState(self.generator), "b": self.batches}
        run_loop(stage_at(folder, key), "test", parts, self.step, steps, log_every=4)
        return self.network.weight.item(), rows_of(folder / "log.csv")


@pytest.mark.parametrize("stop_at", [0, 3, 10, 24])
def test_a_loop_interrupted_at_any_step_ends_as_if_never_interrupted(tmp_path, stop_at):
    whole = Counter().run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        Counter(stop_at).run(tmp_path / "cut")
    assert read(tmp_path / "cut" / "checkpoint.pt")["step"] == stop_at + 1
    assert Counter().run(tmp_path / "cut") == whole


def test_a_checkpoint_of_other_settings_is_not_used(tmp_path):
    first = Counter().run(tmp_path, key="a")
    assert Counter().run(tmp_path, key="b") == first  # begun anew, not gone on from
    assert read(tmp_path / "checkpoint.pt")["key"] == "b"


def test_the_log_averages_over_its_window(tmp_path):
    def step(i):
        return {"x": torch.tensor([1.0, 3.0, 5.0][i])}

    run_loop(stage_at(tmp_path), "test", {}, step, 3, log_every=2)
    rows = [(r["step"], r["x"], r["nonfinite"]) for r in rows_of(tmp_path / "log.csv")]
    assert rows == [("2", "2.0", "0"), ("3", "5.0", "0")]


def test_a_log_is_cut_back_to_the_checkpoint_it_is_resumed_from(tmp_path):
    whole = Counter().run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        Counter(10).run(tmp_path / "cut")
    with open(tmp_path / "cut" / "log.csv", "a") as file:
        file.write("12,9.9,0,1,1\n16,9")  # rows that a crash left behind, the last one torn
    assert Counter().run(tmp_path / "cut") == whole
    (tmp_path / "cut" / "log.csv").unlink()  # gone: begun anew, and a report says so
    assert Counter().run(tmp_path / "cut")[1] == []
    with pytest.raises(TrainingError, match="log.csv is empty; remove"):
        read_log(tmp_path / "cut" / "log.csv")


def failing(*steps):
    """A step that is not finite at those numbers."""

    def step(i):
        if i in steps:
            raise FloatingPointError("teacher loss is nan")
        return {"loss": torch.tensor(float(i))}

    return step


def test_what_is_not_finite_stops_the_run_and_names_step_loss_and_checkpoint(tmp_path):
    says = r"test, step 6: teacher loss is nan; .*none was written yet; --skip-nonfinite N"
    with pytest.raises(TrainingError, match=says):
        run_loop(stage_at(tmp_path), "test", {}, failing(5), 9)
    with pytest.raises(TrainingError, match=r"step 6: .*checkpoint.pt is of step 5"):
        run_loop(stage_at(tmp_path, checkpoint_seconds=0), "test", {}, failing(5), 9)
    assert read(tmp_path / "checkpoint.pt")["step"] == 5
    with pytest.raises(TrainingError, match="none was written yet"):  # that one is another run's
        run_loop(stage_at(tmp_path, "another key"), "test", {}, failing(5), 9)
    values = {"x": torch.ones(()), "other": torch.tensor(math.inf)}
    # Not a loss: seen when the step is done.
    with pytest.raises(TrainingError, match=r"step 1: other is inf"):
        run_loop(stage_at(tmp_path / "b"), "test", {}, lambda i: values, 9)


def test_skipped_steps_are_counted_and_their_values_nowhere(tmp_path):
    def logged(name, *bad):
        stage = stage_at(tmp_path / name, skip_nonfinite=2)
        run_loop(stage, "test", {}, failing(*bad), 4, log_every=2)
        rows = rows_of(tmp_path / name / "log.csv")
        return [(row["step"], row["loss"], row["nonfinite"]) for row in rows]

    assert logged("a", 1, 2) == [("2", "0.0", "1"), ("4", "3.0", "2")]
    assert logged("b", 0, 1) == [("4", "2.5", "2")]  # the first window has nothing
    with pytest.raises(TrainingError, match="step 4: "):
        logged("c", 1, 2, 3)


def test_a_checkpoint_of_another_architecture_is_named(tmp_path):
    def train(network):
        zero = {"x": torch.zeros(())}
        run_loop(stage_at(tmp_path), "test", {"n": network}, lambda i: zero, 1)

    train(nn.Linear(1, 1))
    with pytest.raises(TrainingError, match="checkpoint.pt does not fit.*remove"):
        train(nn.Linear(2, 1))


def test_learning_rate_rises_stays_and_falls():
    factors = [warm_up_then_decay(i, 1000) for i in (0, 24, 49, 500, 750, 999)]
    assert factors == pytest.approx([0.02, 0.5, 1, 1, 0.5, 0.02])


def test_an_average_forgets_half_in_its_half_life():
    network = nn.Linear(1, 1)
    nn.init.ones_(network.weight)
    ema = make_ema(network, batch=12, half_life=300)
    ema.update_parameters(network)  # the first is a copy
    nn.init.zeros_(network.weight)
    for _ in range(300 // 12):
        ema.update_parameters(network)
    assert ema.module.weight.item() == pytest.approx(0.5)
