"""What the toy's programs have in common: device and threads, data, what "auto" comes to, exit
codes."""

import dataclasses
import sys
from pathlib import Path

import torch

from common.checkpoints import CheckpointError
from common.errors import one_line
from common.stopping import Stopped, stop_on_signals
from toy import data as datasets
from toy.loop import TrainingError
from toy.networks import has_bf16


def pick_device(name):
    """CUDA, then MPS, then the CPU; or the one asked for. ValueError if it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    available = [device for device, is_there in (there | {"cpu": True}).items() if is_there]
    absent = f"--device {name}: not available here"
    if name and name.split(":")[0] not in available:
        raise ValueError(f"{absent}; this machine has {', '.join(available)}")
    try:
        return torch.empty(0, device=name or available[0]).device
    except RuntimeError as error:
        raise ValueError(f"{absent} ({one_line(error)[:150]})") from error


def set_threads(count):
    """So many CPU threads; None leaves them. ValueError for a number that cannot be."""
    if count is not None:
        if not 1 <= count <= 1024:
            raise ValueError(f"--threads {count}: must be from 1 to 1024")
        torch.set_num_threads(count)


def load_data(settings):
    """The data set of these settings. DataError if it cannot be had or has too few classes."""
    data = datasets.load(
        settings.dataset,
        Path(settings.data_dir),
        seed=settings.seed_of("data"),
        size=settings.size,
        limit=settings.limit or None,
        max_bad_files=settings.max_bad_files,
    )
    datasets.check_splits(data)
    return data


def resolve(settings, kind, device):
    """The settings with what "auto" comes to for this kind of data and device, and without what a
    public teacher cannot do. A resumed run must not come to anything else."""
    precision, flip = settings.precision, settings.flip
    if precision == "auto":
        precision = "bf16" if has_bf16(device) else "fp32"
    if flip == "auto":
        flip = "true" if kind == "cifar10" else "false"
    changes = dict(dataset=kind, precision=precision, flip=flip)
    if not settings.conditional:  # there are no classes to guide by, nor to judge by
        changes |= dict(eval_guidances=(1.0,), distil_c_text=False)
    return dataclasses.replace(settings, **changes)


def exit_code(program, work, debug=False, again="the same command continues"):
    """Call work() and return the exit code: 0 done, 2 failed (one line says why); stopped, after
    saving, 130 by Ctrl-C, 143 by SIGTERM, 142 by --max-minutes (a second signal: at once)."""
    stop_on_signals()
    try:
        work()
    except Stopped as stopped:
        print(f"\nstopped by {stopped}; {again}", file=sys.stderr)
        return stopped.code
    except (ValueError, OSError, datasets.DataError, TrainingError, CheckpointError) as error:
        if debug:
            raise
        print(f"{program}: {one_line(error)}", file=sys.stderr)
        return 2
    return 0
