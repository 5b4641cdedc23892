"""A few iterations of full/train.py's Trainer with draws and data that do not depend on how a batch
is divided: run by test_full_distributed.py, alone or under torchrun. Arguments: MODE OUT, then
full/run.py's flags.

MODE is whole (one process, 16 images), accumulate (twice 8), ddp or fsdp (two processes with 8
each).
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter

import add
from common.flags import from_dict
from full import checkpoint, parts, run, train
from full.settings import Settings

TOTAL, ITERATIONS = 16, 3


class Tape:
    """Stands in for torch inside add.py: every draw is made for all 16 samples, and the caller gets
    its rows."""

    rows, iteration, count = slice(0, TOTAL), 0, 0

    def __getattr__(self, name):
        return getattr(torch, name)

    def turn_to(self, iteration, rows):
        self.iteration, self.rows, self.count = iteration, rows, 0

    def _generator(self):
        self.count += 1
        return torch.Generator().manual_seed(100 * self.iteration + self.count)

    def randn(self, shape, dtype=None, device=None, generator=None):
        return torch.randn((TOTAL, *shape[1:]), dtype=dtype, generator=self._generator())[self.rows]

    def randint(self, high, shape, device=None, generator=None):
        return torch.randint(high, (TOTAL, *shape[1:]), generator=self._generator())[self.rows]


def raw_batch(iteration, rows):
    generator = torch.Generator().manual_seed(iteration)
    images = torch.rand(TOTAL, 3, 64, 64, generator=generator) * 2 - 1
    return {
        "image": images[rows],
        "caption": [f"number {i}" for i in range(TOTAL)][rows],
        "skipped": 0,
    }


def shard_on_cpu(accelerator):
    """accelerate never chooses FSDP on CPUs: make it believe that it has."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        transformer_cls_names_to_wrap=["BasicTransformerBlock", "ResnetBlock2D"],
        state_dict_type="FULL_STATE_DICT",
    )
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin


def watch_types(trainer):
    """{what: types} of the student's activations, of ε as it leaves, and of gradients that FSDP2
    averages, from now on."""
    types = {"activations": set(), "epsilon": set(), "averaged": set()}
    unet = getattr(trainer.network, "module", trainer.network).unet  # within DDP, or not
    unet.mid_block.register_forward_hook(lambda module, _, out: types["activations"].add(out.dtype))
    trainer.network.register_forward_hook(lambda module, _, out: types["epsilon"].add(out.dtype))
    reduce_scatter = DefaultReduceScatter.__call__

    def watched(self, output_tensor, input_tensor, *rest, **more):
        types["averaged"].add(input_tensor.dtype)
        return reduce_scatter(self, output_tensor, input_tensor, *rest, **more)

    DefaultReduceScatter.__call__ = watched
    return types


def make_trainer(mode, flags):
    """A Trainer of full/run.py's flags, with its networks as the mode divides them."""
    arguments, given = run.parse_arguments(flags)
    settings = from_dict(Settings, given)
    accelerator = parts.make_accelerator(settings, arguments.out)
    if mode == "fsdp":
        shard_on_cpu(accelerator)
    trainer = train.Trainer(settings, accelerator, arguments.out)
    for optimizer in (trainer.optimizer, trainer.heads_optimizer):
        for group in optimizer.param_groups:
            # Adam's division by a gradient that is nearly 0 would magnify its rounding.
            group["eps"] = 1.0
    return trainer


def iterate(trainer, iteration, rows, tape):
    """(log, last student's half, last batch) of an iteration on the micro-batches of these rows."""
    student_half, pending = trainer.add.student_half, list(rows)

    def with_own_draws(batch, generator):
        tape.turn_to(iteration, pending.pop(0))
        return student_half(batch, generator)

    trainer.add.student_half = with_own_draws
    batches = [trainer.make_batch(raw_batch(iteration, r)) for r in rows]
    log, half = trainer.iteration(batches)
    trainer.add.student_half = student_half
    return log, half, batches[-1]


def validate_with_another_average(trainer, half, batch, tape):
    """Sampling with the average, here one far from the weights, must leave no trace in what
    follows."""
    with torch.no_grad():
        for shadow in trainer.ema.shadows:
            shadow.mul_(1.5)
    add.torch = torch
    trainer.validate(half, batch)
    add.torch = tape


def state_of(trainer):
    """The student's weights, whole where they are sharded."""
    state = checkpoint.network_state(trainer)
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()}


def frozen_of(trainer):
    """This process's part of what is not trained."""
    frozen = (p.detach() for p in trainer.network.parameters() if not p.requires_grad)
    return [p.to_local().clone() if hasattr(p, "to_local") else p.clone() for p in frozen]


def assert_a_checkpoint_comes_back(trainer, rows, tape):
    """Save it, move on, load it."""
    trainer.folder.mkdir(parents=True, exist_ok=True)
    state, frozen = state_of(trainer), frozen_of(trainer)
    checkpoint.save(trainer)
    iterate(trainer, 9, rows, tape)
    moved = checkpoint.network_state(trainer)
    checkpoint.resume(trainer, "auto")
    again = checkpoint.network_state(trainer)
    assert all(map(torch.equal, frozen_of(trainer), frozen))
    if trainer.accelerator.is_main_process:
        assert any(not torch.equal(moved[k], state[k]) for k in state)
        assert all(torch.equal(again[k], state[k]) for k in state), "it did not come back"


def main(mode, out, *flags):
    trainer = make_trainer(mode, flags)
    accelerator = trainer.accelerator
    add.torch = tape = Tape()
    halves = (slice(0, 8), slice(8, 16))
    mine = halves[accelerator.process_index :][:1]
    rows = {"whole": (slice(0, TOTAL),), "accumulate": halves}.get(mode, mine)
    types = watch_types(trainer)
    for iteration in range(ITERATIONS):
        log, half, batch = iterate(trainer, iteration, rows, tape)
        if iteration == 0:
            validate_with_another_average(trainer, half, batch, tape)
    types["parameters"] = {p.dtype for p in trainer.trained}
    results = {
        "network": state_of(trainer),
        "log": {k: accelerator.reduce(v, "mean") for k, v in log.items()},
        "sharded": sum(hasattr(p, "full_tensor") for p in trainer.trained),
        "types": {k: sorted(map(str, v)) for k, v in types.items()},
    }
    with trainer.ema.swapped():
        results["average"] = checkpoint.network_state(trainer)
    if mode in ("ddp", "fsdp"):
        assert_a_checkpoint_comes_back(trainer, rows, tape)
    results["heads"] = trainer.add.discriminator.heads.state_dict()
    if accelerator.is_main_process:
        torch.save(results, out)
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
