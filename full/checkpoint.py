"""A run's checkpoints: all that a Trainer has, in folders that are complete or not there."""

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from torch.distributed.checkpoint import state_dict as dcp

from common.checkpoints import CheckpointError, read, sync_folder, verify, write, write_text
from common.errors import one_line

KEEP, VERSION = 2, 2  # checkpoints that stay; their form
WHOLE = {"full_state_dict": True, "cpu_offload": True}  # of sharded networks and optimisers


def saved(folder):
    """The checkpoints of a run's folder, the oldest first."""
    return sorted((folder / "checkpoints").glob("step_*[0-9]"))


def network_state(trainer):
    """The trainable parameters, whole and on the CPU. Every process calls it, the first has
    them."""
    if trainer.sharded:
        options = dcp.StateDictOptions(**WHOLE, ignore_frozen_params=True)
        return dcp.get_model_state_dict(trainer.network, options=options)
    if not trainer.accelerator.is_main_process:
        return {}
    network = trainer.accelerator.unwrap_model(trainer.network, keep_torch_compile=False)
    parameters = network.named_parameters()
    return {k: p.detach().to("cpu", copy=True) for k, p in parameters if p.requires_grad}


def load_network_state(trainer, state):
    """The reverse of network_state; sharded, the first process has what all load."""
    if trainer.sharded:
        options = dcp.StateDictOptions(
            full_state_dict=True, broadcast_from_rank0=True, strict=False
        )
        dcp.set_model_state_dict(trainer.network, state, options=options)
    else:
        network = trainer.accelerator.unwrap_model(trainer.network, keep_torch_compile=False)
        network.load_state_dict(state, strict=False)


def optimizer_state(trainer):
    """The state of the student's optimiser, whole and on the CPU if it is sharded."""
    inner = trainer.optimizer.optimizer
    if not trainer.sharded:
        return inner.state_dict()
    options = dcp.StateDictOptions(**WHOLE)
    return dcp.get_optimizer_state_dict(trainer.network, inner, options=options)


def load_optimizer_state(trainer, state):
    """The reverse of optimizer_state."""
    inner = trainer.optimizer.optimizer
    if not trainer.sharded:
        return inner.load_state_dict(state)
    options = dcp.StateDictOptions(**WHOLE)
    dcp.set_optimizer_state_dict(trainer.network, inner, state, options=options)


def shared_state(trainer):
    """What all processes have in common. Every process calls it, the first one has it."""
    network = network_state(trainer)
    with trainer.ema.swapped():
        average = network_state(trainer)
    return {
        "version": VERSION,
        "data": trainer.settings.data,
        "step": trainer.step,
        "processes": trainer.accelerator.num_processes,
        "workers": trainer.settings.workers,
        "network": network,
        "average": average,
        "optimizer": optimizer_state(trainer),
        "heads": trainer.add.discriminator.heads.state_dict(),
        "heads_optimizer": trainer.heads_optimizer.state_dict(),
    }


def own_state(trainer):
    """What each process has for itself: its place in the data, its generators, its counts."""
    own = {
        "data": trainer.loader.state_dict(),
        "generator": trainer.generator.get_state(),
        "torch": torch.get_rng_state(),
        "skipped": trainer.skipped,
        "nonfinite": trainer.nonfinite,
        "won": trainer.won.tolist(),
    }
    if generator := getattr(trainer.features, "generator", None):
        own["features_generator"] = generator.get_state()
    return own


def load(trainer, state, own):
    """The reverse of shared_state and own_state."""
    load_network_state(trainer, state["average"])
    trainer.ema.restart()
    load_network_state(trainer, state["network"])
    load_optimizer_state(trainer, state["optimizer"])
    trainer.add.discriminator.heads.load_state_dict(state["heads"])
    trainer.heads_optimizer.load_state_dict(state["heads_optimizer"])
    trainer.loader.load_state_dict(own["data"])
    trainer.generator.set_state(own["generator"])
    if "features_generator" in own:
        trainer.features.generator.set_state(own["features_generator"])
    torch.set_rng_state(own["torch"])
    trainer.step = state["step"]
    trainer.skipped, trainer.nonfinite = own["skipped"], own["nonfinite"]
    trainer.won = torch.tensor(own["won"], dtype=torch.bool, device=trainer.device)


def save(trainer):
    """FOLDER/checkpoints/step_…: complete, or not there under that name; the last KEEP stay.
    CheckpointError, in all processes, where one of them could not write its part."""
    accelerator, first = trainer.accelerator, trainer.accelerator.is_main_process
    target = trainer.folder / "checkpoints" / f"step_{trainer.step:07d}"
    temporary = target.with_suffix(".tmp")
    state = shared_state(trainer)
    if first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    own, failed = own_state(trainer), None
    try:
        if first:
            write(temporary / "training.pt", state)
        write(temporary / f"process_{accelerator.process_index}.pt", own)
    except CheckpointError as error:
        failed = error
    failures = torch.tensor([float(failed is not None)], device=trainer.device)
    if accelerator.reduce(failures, "sum").item():  # all of them leave
        if first:
            shutil.rmtree(temporary, ignore_errors=True)  # a full disk needs the room
        raise failed or CheckpointError(f"{temporary}: another process could not write its part")
    if first:
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        sync_folder(target.parent)
        for torn in target.parent.glob("step_*.tmp"):  # of saves that were killed
            shutil.rmtree(torn)
        for old in saved(trainer.folder)[:-KEEP]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def is_whole(folder):
    """Whether every file of a checkpoint is; if not, a line says which one is not."""
    try:
        for file in folder.glob("*.pt"):
            verify(file)
        (folder / "training.pt").stat()
    except (CheckpointError, OSError) as error:
        message = f"{one_line(error)}; looking for the checkpoint before it"
        print(message, file=sys.stderr, flush=True)
        return False
    return True


def last(trainer):
    """The last checkpoint that is whole, or None; the first process looks for all of them.
    CheckpointError where there are some and none is whole."""
    found = [None]
    if trainer.accelerator.is_main_process:
        folders = saved(trainer.folder)
        whole = next(filter(is_whole, reversed(folders)), None)
        found = [str(whole) if whole else False if folders else None]
    if (chosen := broadcast_object_list(found)[0]) is False:
        folder = trainer.folder / "checkpoints"
        raise CheckpointError(
            f"--resume auto: no checkpoint in {folder} can be read; remove it to start over"
        )
    return chosen


def resume(trainer, where):
    """Go on from a checkpoint's folder, or from the last whole one ("auto"; none there: from the
    start). CheckpointError for one that cannot be read, or is of another run."""
    found = where == "auto"
    if found and (where := last(trainer)) is None:
        return
    where, accelerator = Path(where), trainer.accelerator
    # One copy in memory for all processes of a machine; last() has verified what it found.
    state = _read(where, "training.pt", mmap=True, check=not found)
    for name, now in (("version", VERSION), ("data", trainer.settings.data)):
        if state.get(name) != now:
            raise CheckpointError(
                f"--resume {where}: its {name} is {state.get(name)}, not {now}; "
                "start over in another --out"
            )
    if state["processes"] != accelerator.num_processes:
        raise CheckpointError(
            f"--resume {where}: written by {state['processes']} processes, this run has "
            f"{accelerator.num_processes}; start as many"
        )
    if state["workers"] != trainer.settings.workers:  # each has its own place in the data
        raise CheckpointError(
            f"--resume {where}: written with --workers {state['workers']}, this run has "
            f"{trainer.settings.workers}; leave the flag out"
        )
    own = _read(where, f"process_{accelerator.process_index}.pt")
    try:
        load(trainer, state, own)
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"--resume {where}: is of other networks or settings ({one_line(error)})"
        ) from error
    if accelerator.is_main_process:
        forget_later(trainer)


def _read(where, name, **options):
    try:
        return read(where / name, **options)
    except CheckpointError as error:
        raise CheckpointError(f"--resume {where}: {error}") from error


def forget_later(trainer):
    """Remove what was done after the checkpoint that was loaded: it is done again."""
    for folder in saved(trainer.folder):
        if int(folder.name.removeprefix("step_")) > trainer.step:
            shutil.rmtree(folder)
    log = trainer.folder / "log.jsonl"
    if log.exists():
        lines = [x for x in log.read_text().splitlines(keepends=True) if x.endswith("\n")]
        kept = (line for line in lines if json.loads(line)["step"] <= trainer.step)
        write_text(log, "".join(kept))
