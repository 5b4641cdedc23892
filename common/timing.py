"""What the benchmarks share: functions timed in turn, what a machine can do."""

import gc
import json
import math
import statistics
import time

import torch

from common.checkpoints import write_text


def synchronize(device):
    """Wait for a GPU, so that a clock read next means something."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def alternate(functions, device, repeats=7, least=0.05):
    """{name: [seconds of a call, one for each round]} of functions without arguments.

    In every round each is called in turn, for at least `least` seconds, so that a slow moment of
    the machine meets all of them.
    """

    def clock(function, calls):
        synchronize(device)
        began = time.perf_counter()
        for _ in range(calls):
            function()
        synchronize(device)
        return (time.perf_counter() - began) / calls

    calls = {}
    for name, function in functions.items():
        clock(function, 1)  # libraries choose their algorithms, a GPU records
        calls[name] = max(1, math.ceil(least / clock(function, 1)))
    seconds = {name: [] for name in functions}
    gc.collect()
    gc.disable()
    try:
        for _ in range(repeats):
            for name, function in functions.items():
                seconds[name].append(clock(function, calls[name]))
    finally:
        gc.enable()
    return seconds


def quartiles(values):
    """(first quartile, median, third quartile); of one value three times it."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))


def ratios(numerator, denominator):
    """Quotients of two functions' seconds, round by round."""
    return [a / b for a, b in zip(numerator, denominator, strict=True)]


def limits(device, dtype, size=None):
    """{name: function}: a matrix product and a convolution, large enough to show what the machine
    can do with numbers of that type."""
    size = size or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    x = torch.randn(32, size // 8, 32, 32, device=device, dtype=dtype)
    w = torch.randn(size // 8, size // 8, 3, 3, device=device, dtype=dtype)
    kind = str(dtype).removeprefix("torch.")
    return {
        f"matrix product, {size}, {kind}": lambda: a @ b,
        f"convolution 3×3, {size // 8} channels, {kind}": lambda: torch.conv2d(x, w, padding=1),
    }


def exponent(sizes, seconds):
    """p of the fit seconds = a · sizes^p, by least squares in the logarithms."""
    x, y = [math.log(s) for s in sizes], [math.log(s) for s in seconds]
    return statistics.linear_regression(x, y).slope


def in_milliseconds(seconds):
    """Three digits, or all before the point."""
    value = 1e3 * seconds
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def milliseconds(values):
    """Median and quartiles of seconds, as a cell."""
    low, middle, high = map(in_milliseconds, quartiles(values))
    return f"{middle} ({low} to {high})"


def multiples(values):
    """Median and quartiles of ratios, as a cell."""
    low, middle, high = (f"{value:.2f}" for value in quartiles(values))
    return f"{middle} ({low} to {high})"


def keep(out, stored, lines):
    """Write NAME.json, which holds `stored`, and NAME.md, which has the lines. OSError."""
    write_text(out.with_name(f"{out.name}.json"), json.dumps(stored, indent=1) + "\n")
    write_text(out.with_name(f"{out.name}.md"), "\n".join(lines))
