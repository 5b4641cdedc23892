"""The one training loop of the toy: progress bar, CSV log, checkpoints, resume. Every stage runs through it."""

import csv
import math
import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm


class TrainingError(Exception):
    """A run that cannot go on; the message is one line."""


def save(path, state):
    """torch.save to a temporary name, then rename: a checkpoint is complete or not there."""
    temporary = Path(f"{path}.tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load(path, device="cpu"):
    """A checkpoint's dictionary; tensors and plain values only. TrainingError if the file is not one."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise TrainingError(f"{path} is not a readable checkpoint ({type(error).__name__}); remove it to start over") from error


class GeneratorState:
    """A torch.Generator with the state_dict interface of everything else that a checkpoint holds."""

    def __init__(self, generator):
        self.generator = generator

    def state_dict(self):
        return {"state": self.generator.get_state()}

    def load_state_dict(self, state):
        self.generator.set_state(state["state"].cpu())


@contextmanager
def postponed_interrupt():
    """Inside, the first Ctrl-C only fills the list that this yields, so that a step is never cut in half; the second
    one interrupts at once."""
    received = []

    def handler(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)

    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, previous)


def run_loop(folder, label, parts, step, steps, key, *, checkpoint_seconds=60, log_every=10):
    """Call step(i) for i = 0 … steps-1 and keep folder/checkpoint.pt and folder/log.csv; returns the seconds spent.

    parts maps names to what a checkpoint holds (anything with state_dict and load_state_dict); step returns a dict of
    0-d tensors, which are averaged over log_every steps into a row of the log. A checkpoint is written every
    checkpoint_seconds, at the end, and on Ctrl-C (KeyboardInterrupt follows); one that is there already, under the same
    key, is gone on from. Raises TrainingError when a logged value is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "checkpoint.pt"
    start, seconds, rows, pending = 0, 0.0, [], []
    if path.exists() and (state := load(path))["key"] == key:
        start, seconds, rows, pending = (state[name] for name in ("step", "seconds", "rows", "pending"))
        try:
            for name, part in parts.items():
                part.load_state_dict(state[name])
        except (RuntimeError, KeyError, ValueError) as error:
            raise TrainingError(f"{path} does not fit this version's networks; remove {folder} to start over") from error
    began = saved = time.time()

    def checkpoint(done):
        progress = {"key": key, "step": done, "finished": done == steps, "seconds": seconds + time.time() - began, "rows": rows, "pending": pending}
        save(path, progress | {name: part.state_dict() for name, part in parts.items()})
        write_csv(folder / "log.csv", rows)

    with postponed_interrupt() as interrupted:
        bar = tqdm(range(start, steps), initial=start, total=steps, desc=label, mininterval=1, smoothing=0.05)
        for i in bar:
            pending.append(step(i))
            done = i + 1
            if done % log_every == 0 or done == steps:
                row = {name: torch.stack([p[name] for p in pending]).float().mean().item() for name in pending[0]}
                pending.clear()
                if bad := [name for name, value in row.items() if not math.isfinite(value)]:
                    raise TrainingError(f"{label}: {', '.join(bad)} is not finite near step {done}; stopped")
                rows.append({"step": done} | row)
                bar.set_postfix({name: f"{value:.3g}" for name, value in row.items()})
            if interrupted or done == steps or time.time() - saved > checkpoint_seconds:
                checkpoint(done)
                saved = time.time()
            if interrupted:
                raise KeyboardInterrupt
    return seconds + time.time() - began


def write_csv(path, rows):
    """Write rows (dictionaries with the same keys) with a header."""
    with open(path, "w", newline="") as file:
        if not rows:
            return
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def warm_up_then_decay(step, steps, warm_up=50, floor=0.02):
    """Factor on a learning rate: rises linearly over warm_up steps, stays at 1, falls linearly over the second half."""
    return min(1.0, (step + 1) / warm_up) * min(1.0, max(floor, 2 * (1 - step / steps)))
