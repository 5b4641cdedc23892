"""The toy's training loop, which every stage runs through: progress bar, CSV log, checkpoints,
resume."""

import csv
import io
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from common.checkpoints import read_last, write
from common.device import peak_memory
from common.stopping import Stopped, postponed_signals
from toy.data import Batches, Dataset
from toy.settings import Settings


class TrainingError(Exception):
    """A run that cannot go on; the message is one line."""


class NotFinite(TrainingError):
    """A training met a value that is not finite; a rerun would, too. `cause` says where."""

    def __init__(self, cause, advice=""):
        super().__init__(cause + advice)
        self.cause = cause


@dataclass(frozen=True, eq=False)
class Stage:
    """What a stage of a run works with."""

    folder: Path  # of its checkpoints and its log
    data: Dataset
    settings: Settings
    device: torch.device
    key: str  # what its result depends on (settings.stage_key)


class GeneratorState:
    """A torch.Generator with the state_dict interface of all else that a checkpoint holds."""

    def __init__(self, generator):
        self.generator = generator

    def state_dict(self):
        return {"state": self.generator.get_state()}

    def load_state_dict(self, state):
        self.generator.set_state(state["state"].cpu())


CLOCKED = ("steps_per_second", "memory_gib")  # columns of the log that differ from run to run


def backward(loss, optimizer, clip=math.inf):
    """Give the optimiser's parameters their gradient, clipped to a norm. Returns its norm before
    that."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return torch.nn.utils.clip_grad_norm_(parameters, clip)


def update(optimizer, name, loss, norm):
    """A step of the optimiser. FloatingPointError, which says of what, if the loss or the norm of
    its gradient is not finite: then no weight has moved."""
    for what, value in (("loss", loss.detach()), ("gradient", norm)):
        if not value.isfinite():
            raise FloatingPointError(f"{name} {what} is {value.item()}")
    optimizer.step()


def descend(loss, optimizer, name, clip=math.inf):
    """backward and update; returns the norm of the gradient."""
    norm = backward(loss, optimizer, clip)
    update(optimizer, name, loss, norm)
    return norm


def fit(stage, name, label, networks, loss_of, lr, weight_decay):
    """Train a list of networks on batches of 128 images, by AdamW and one cycle of its learning
    rate; returns the seconds.

    loss_of(images, labels, generator) is a dict whose "loss" is the sum. name is the stage's, as
    settings.py has it; label is what messages call it.
    """
    data, settings, device = stage.data, stage.settings, stage.device
    steps, seed = getattr(settings, f"{name}_steps"), settings.seed_of(name)
    networks = nn.ModuleList(networks).to(device)
    trained = [p for p in networks.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    flip = settings.flip == "true"
    batches = Batches(data.train_images, data.train_labels, 128, seed, flip)
    generator = torch.Generator(device).manual_seed(seed)

    def step(i):
        images, labels = (x.to(device) for x in next(batches))
        log = loss_of(images, labels, generator)
        descend(log["loss"], optimizer, label)
        schedule.step()
        return {k: value.detach() for k, value in log.items()}

    parts = {
        "networks": networks,
        "optimizer": optimizer,
        "schedule": schedule,
        "batches": batches,
        "generator": GeneratorState(generator),
    }
    return run_loop(stage, label, parts, step, steps)


class Log:
    """A CSV that grows row by row; opened at a checkpoint's length, what was written after that is
    cut off."""

    def __init__(self, path, length=0):
        self.path, self.names = path, None
        if length and path.exists() and path.stat().st_size >= length:
            os.truncate(path, length)
            with open(path, newline="") as file:
                self.names = next(csv.reader(file))
        else:
            path.write_bytes(b"")

    def add(self, row):
        """Write a row; columns that the first one had not are left out."""
        text, first = io.StringIO(), self.names is None
        self.names = list(row) if first else self.names
        writer = csv.DictWriter(text, self.names, extrasaction="ignore", lineterminator="\n")
        if first:
            writer.writeheader()
        writer.writerow(row)
        with open(self.path, "a", newline="") as file:
            file.write(text.getvalue())

    def length(self):
        """Bytes so far, all of them on the disk."""
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())
            return file.seek(0, os.SEEK_END)


class Window:
    """The steps since the last row of the log; the next row is their mean."""

    def __init__(self, pending, skipped):
        self.pending, self.skipped, self.began, self.count = pending, skipped, time.time(), 0

    def row(self, device):
        """{column: value} of the steps, which are forgotten. Skipped steps have no values; None if
        all were skipped."""
        if not self.pending:
            return None
        columns = {name: [step[name] for step in self.pending] for name in self.pending[0]}
        row = {name: torch.stack(x).float().mean().item() for name, x in columns.items()}
        speed = self.count / max(time.time() - self.began, 1e-9)
        self.pending.clear()
        self.began, self.count = time.time(), 0
        clocked = {"steps_per_second": speed, "memory_gib": peak_memory(device)}
        return row | {"nonfinite": self.skipped} | clocked


def run_loop(stage, label, parts, step, steps, *, log_every=10):
    """Call step(i) for i = 0 … steps-1 and keep checkpoint.pt and log.csv in the stage's folder;
    returns the seconds spent.

    parts maps names to what a checkpoint holds: anything with state_dict and load_state_dict. step
    returns a dict of 0-d tensors; their means over log_every steps are a row of the log.

    A checkpoint is written every checkpoint_seconds, at the end, and on Ctrl-C or SIGTERM (Stopped
    follows). If the last complete one in the folder has the stage's key, the loop goes on from it.

    A step that raises FloatingPointError, or returns a value that is not finite, ends the run with
    NotFinite. The first skip_nonfinite steps that raise are skipped and counted in the log instead.
    """
    loop = Loop(stage, label, parts, step, steps)
    loop.run(log_every)
    return loop.seconds()


class Loop:
    """What run_loop keeps between steps."""

    def __init__(self, stage, label, parts, step, steps):
        self.stage, self.label, self.parts, self.step, self.steps = stage, label, parts, step, steps
        stage.folder.mkdir(parents=True, exist_ok=True)
        self.path = stage.folder / "checkpoint.pt"
        self.start, self.seconds_before, self.window = 0, 0.0, Window([], 0)
        self.saved_step = None  # of the last checkpoint under the stage's key
        length = self.resume()
        self.log = Log(stage.folder / "log.csv", length)
        self.began = self.saved = time.time()

    def seconds(self):
        """Spent in the loop, with what a run that was stopped had spent."""
        return self.seconds_before + time.time() - self.began

    def resume(self):
        """Take everything from the last complete checkpoint, if it has the stage's key. Returns the
        log's length in bytes there, or 0."""
        state = read_last(self.path)
        if not state or state.get("key") != self.stage.key:
            return 0
        try:
            self.start = self.saved_step = int(state["step"])
            self.seconds_before, length = float(state["seconds"]), int(state["log"])
            self.window = Window(list(state["pending"]), int(state["skipped"]))
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise TrainingError(
                f"{self.path} does not fit this version's networks; remove {self.stage.folder} to "
                "start over"
            ) from error
        return length

    def checkpoint(self, done):
        """Write what resume reads, after that many steps."""
        progress = {
            "key": self.stage.key,
            "step": done,
            "finished": done == self.steps,
            "seconds": self.seconds(),
            "log": self.log.length(),
            "pending": self.window.pending,
            "skipped": self.window.skipped,
        }
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        write(self.path, progress | parts)
        self.saved, self.saved_step = time.time(), done

    def attempt(self, i):
        """Step i, whose values go to the log unless it may be skipped."""
        try:
            values = self.step(i)
        except FloatingPointError as error:
            if self.window.skipped >= self.stage.settings.skip_nonfinite:
                raise self.error(i, error, "; --skip-nonfinite N skips N such steps") from error
            self.window.skipped += 1
            return
        if values:  # all of them in one copy from the device
            together = torch.stack([v.detach().float() for v in values.values()]).cpu()
            values = dict(zip(values, together, strict=True))
        # Something other than a loss or its gradient is seen when the step is done.
        if infinite := [f"{k} is {v.item()}" for k, v in values.items() if not v.isfinite()]:
            raise self.error(i, ", ".join(infinite))
        self.window.pending.append(values)

    def error(self, i, what, remedy=""):
        """The NotFinite of step i."""
        last = "none was written yet"
        if self.saved_step is not None:
            last = f"{self.path} is of step {self.saved_step}"
        return NotFinite(
            f"{self.label}, step {i + 1}: {what}",
            f"; the last good checkpoint: {last}{remedy}",
        )

    def run(self, log_every):
        """All steps that are left."""
        with postponed_signals() as stopped:
            left, pace = range(self.start, self.steps), dict(mininterval=1, smoothing=0.05)
            bar = tqdm(left, initial=self.start, total=self.steps, desc=self.label, **pace)
            for i in bar:
                self.attempt(i)
                self.window.count += 1
                done = i + 1
                last = done == self.steps
                if done % log_every == 0 or last:
                    self.add_row(done, bar)
                if stopped or last or self.overdue():
                    self.checkpoint(done)
                if stopped:
                    raise Stopped(stopped[0])

    def overdue(self):
        """Whether the last checkpoint is older than checkpoint_seconds."""
        return time.time() - self.saved > self.stage.settings.checkpoint_seconds

    def add_row(self, done, bar):
        """The window's means go to the log and the progress bar."""
        if row := self.window.row(self.stage.device):
            self.log.add({"step": done} | row)
            hidden = CLOCKED if row["nonfinite"] else (*CLOCKED, "nonfinite")
            bar.set_postfix({k: f"{v:.3g}" for k, v in row.items() if k not in hidden})


def read_log(path):
    """{column: [floats]} of a stage's log.csv."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise TrainingError(f"{path} is empty; remove {path.parent} to have that stage done again")
    return {name: [float(row[name] or "nan") for row in rows] for name in rows[0]}


def make_ema(network, batch, half_life):
    """A moving average of the weights in which an image counts half after `half_life` more images
    have been seen."""
    return AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.5 ** (batch / half_life)))


def make_adam(parameters, lr, beta1, steps):
    """(Adam with β_2 = 0.99, the schedule of its learning rate over that many steps)."""
    optimizer = torch.optim.Adam(parameters, lr, (beta1, 0.99), fused=True)
    factor = torch.optim.lr_scheduler.LambdaLR
    return optimizer, factor(optimizer, lambda i: warm_up_then_decay(i, steps))


def warm_up_then_decay(step, steps, warm_up=50, floor=0.02):
    """Factor on a learning rate: rises linearly over warm_up steps, stays at 1, falls linearly over
    the second half."""
    return min(1.0, (step + 1) / warm_up) * min(1.0, max(floor, 2 * (1 - step / steps)))
