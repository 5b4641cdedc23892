"""Counts floating-point operations and live bytes of whatever runs inside; full/'s plan and the
benchmarks use it."""

import contextlib
import weakref
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Meter(TorchDispatchMode):
    """Counts, for each part, operations of matrix products, convolutions and attention by precision
    (`flops`), and the peak of live bytes by kind (`peaks`). `live` is what lives now.

    Bytes are those of tensors that are made inside, or were given to add(). PyTorch's
    FlopCounterMode refuses autograd.grad.
    """

    def __init__(self, part=None):
        super().__init__()
        self.part, self.kind = part, "activations"
        self.flops, self.live, self.peaks, self.storages = Counter(), Counter(), {}, {}

    def compute(self, func, args, kwargs):
        """Run the operation."""
        return func(*args, **kwargs)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = self.compute(func, args, kwargs)
        given = {x.untyped_storage()._cdata for x in args if isinstance(x, torch.Tensor)}
        tensors = [
            t
            for t in (out if isinstance(out, (tuple, list)) else (out,))
            if isinstance(t, torch.Tensor)
        ]
        for t in tensors:
            if t.untyped_storage()._cdata not in given:  # neither a view nor changed in place
                self.add(t)
        if count := flop_registry.get(func._overloadpacket):
            # GPUs may compute float32 as TF32: it counts under that name.
            rate = "tf32" if tensors[0].dtype == torch.float32 else "bf16"
            self.flops[self.part, rate] += count(*args, **kwargs, out_val=out)
        return out

    def add(self, tensor, kind=None):
        """Counts a tensor's storage once, while it lives; given a kind, under that, even if it was
        counted before."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.storages:
            size, kind = storage.nbytes(), kind or self.kind
            self.storages[key] = weakref.ref(storage, lambda _: self._drop(key)), size, kind
            self.live[kind] += size
            if self.live.total() > self.peaks.get(self.part, Counter()).total():
                self.peaks[self.part] = self.live.copy()
        elif kind:
            alive, size, before = self.storages[key]
            self.storages[key] = alive, size, kind
            self.live[before] -= size
            self.live[kind] += size

    def _drop(self, key):
        _, size, kind = self.storages.pop(key)
        self.live[kind] -= size

    @contextlib.contextmanager
    def inside(self, part, kind="activations"):
        """What is made inside belongs to this part and is of this kind."""
        before = self.part, self.kind
        self.part, self.kind = part, kind
        try:
            yield
        finally:
            self.part, self.kind = before


def measure(function):
    """({"bf16" or "tf32": floating-point operations}, most bytes of tensors at once) of a call."""
    with Meter() as meter:
        function()
    flops = {rate: n for (_, rate), n in meter.flops.items()}
    return flops, max((peak.total() for peak in meter.peaks.values()), default=0)


def least_seconds(flops, rates):
    """Seconds that {rate: operations} take at {rate: operations a second}."""
    return sum(n / rates[rate] for rate, n in flops.items())
