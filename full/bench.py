"""What an iteration of full/run.py costs on this machine, part by part, beside what --plan says:
python full/bench.py --backbone sdxl --random /tmp/weights --batches 1,4,8

--random DIR: networks of the real sizes with random weights, written to DIR unless they are there;
nothing is downloaded. Images and captions are made up. Every other flag is full/run.py's. Writes
NAME.json and NAME.md.
"""

import argparse
import contextlib
import dataclasses
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import markdown, timing
from common.checkpoints import CheckpointError
from common.device import be_deterministic
from common.errors import brief, one_line
from common.flags import add_flags, from_dict
from common.meter import least_seconds, measure
from common.origin import commit, machine
from full import random_weights
from full.parts import make_accelerator
from full.plan.labels import HEADS, Labelled
from full.plan.plan import GPUS, Plan
from full.settings import BACKBONES, Settings


class Stopwatch:
    """Seconds, and on CUDA the peak of allocated bytes, of each part between two waits for the
    device."""

    def __init__(self, device):
        self.device, self.seconds, self.peaks = device, Counter(), Counter()
        self._part = HEADS
        self._start()

    def _start(self):
        timing.synchronize(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.began = time.perf_counter()

    @property
    def part(self):
        """The part at work; setting it ends the one before."""
        return self._part

    @part.setter
    def part(self, part):
        timing.synchronize(self.device)
        self.seconds[self._part] += time.perf_counter() - self.began
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            self.peaks[self._part] = max(self.peaks[self._part], peak)
        self._part = part
        self._start()

    @contextlib.contextmanager
    def inside(self, part, kind=None):
        """What is done inside belongs to this part."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before


class NoMeter:
    """A meter that waits for nothing, for the time of whole iterations."""

    part = HEADS

    @contextlib.contextmanager
    def inside(self, part, kind=None):
        """Nothing is noted."""
        yield


class Bench(Labelled):
    """full/run.py's trainer on made-up batches."""

    def __init__(self, settings, folder):
        # The trainer makes a loader, which needs an image; nothing is read from it.
        Image.new("RGB", (8, 8)).save(folder / "0.png")
        (folder / "0.txt").write_text("nothing")
        settings = dataclasses.replace(settings, data=str(folder), workers=0, tracker="none")
        super().__init__(settings, make_accelerator(settings, folder), folder)
        self.meter = NoMeter()
        if not settings.compile:  # a compiled network does not tell when its parts begin
            self.label_parts()

    def time(self, batch, iterations):
        """{name: value} of iterations with that batch, after two to warm up."""
        cuda, size = self.device.type == "cuda", self.settings.resolution
        raw = {"image": torch.rand(batch, 3, size, size) * 2 - 1, "caption": ["a picture"] * batch}

        def iterate():
            timing.synchronize(self.device)
            began = time.perf_counter()
            self.iteration([self.make_batch(raw)])
            timing.synchronize(self.device)
            return time.perf_counter() - began

        for _ in range(2):
            iterate()
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        seconds = [iterate() for _ in range(iterations)]
        peak = torch.cuda.max_memory_allocated(self.device) if cuda else None
        row = {"batch": batch, "seconds": seconds, "peak": peak, "parts": {}}
        if not self.settings.compile:
            self.meter = watch = Stopwatch(self.device)
            iterate()
            watch.part = HEADS
            self.meter = NoMeter()
            row["parts"] = {
                part: {"seconds": s, "peak": watch.peaks[part]} for part, s in watch.seconds.items()
            }
        return row

    def beside_the_plan(self, row, plan, rates):
        """Add what --plan says of that batch: bytes, operations, and at these rates the least
        seconds, of the whole and of its parts."""
        batch, peaks = row["batch"], plan.peaks("one GPU", row["batch"])
        flops = plan.operations(batch)
        least = {part: least_seconds(n, rates) for part, n in by_part(flops).items()}
        row |= {"planned": plan.total("one GPU", batch), "flops": sum(flops.values())}
        row["least_seconds"] = sum(least.values())
        for name, part in row["parts"].items():
            part["least_seconds"] = least.get(name, 0)
            part["planned"] = sum(peaks.get(name, {}).values())


def gpu_of(device):
    """The plan's name of this machine's GPU. Otherwise the largest that the plan knows and that is
    no larger; for a CPU, a100-80."""
    if device.type != "cuda":
        return "a100-80"
    name = torch.cuda.get_device_name(device).lower().replace(" ", "")
    total = torch.cuda.get_device_properties(device).total_memory
    for key in GPUS:
        if key.split("-")[0] in name and abs(GPUS[key].memory / total - 1) < 0.2:
            return key
    fitting = [key for key in GPUS if GPUS[key].memory <= total] or ["rtx4090-24"]
    return max(fitting, key=lambda key: GPUS[key].memory)


def limits(device, precision):
    """{rate: operations a second} of a matrix product, for the plan's two rates: of the type that
    the networks compute in, and of float32 as make_accelerator lets torch compute."""
    half = torch.bfloat16 if precision == "bf16" else torch.float32
    rates = {}
    for rate, dtype in (("bf16", half), ("tf32", torch.float32)):
        name, product = next(iter(timing.limits(device, dtype).items()))
        seconds = timing.alternate({name: product}, device, repeats=5)[name]
        rates[rate] = sum(measure(product)[0].values()) / statistics.median(seconds)
    return rates


def by_part(flops):
    """{part: {rate: operations}} of {(part, rate): operations}."""
    parts = defaultdict(dict)
    for (part, rate), n in flops.items():
        parts[part][rate] = n
    return parts


def whole_iterations(measured, gpu):
    """Lines of the table with a row for each batch."""
    rows = []
    for row in measured:
        if "failed" in row:
            rows.append([row["batch"], row["failed"], "", "", "", ""])
            continue
        middle = statistics.median(row["seconds"])
        rows.append(
            [
                row["batch"],
                timing.milliseconds(row["seconds"]),
                f"{row['batch'] / middle:.3g}",
                f"{row['peak'] / 1e9:.1f}" if row["peak"] else "–",
                f"{row['planned'] / 1e9:.1f}",
                f"{row['least_seconds'] / middle:.0%}",
            ]
        )
    head = ["batch", "ms", "images/s", "GB", f"GB, --plan on {gpu}", "share of the limit"]
    return markdown.table(head, rows)


def parts_of(row):
    """Lines of the table with a row for each part of an iteration."""
    total = sum(part["seconds"] for part in row["parts"].values())
    rows = [
        [
            name,
            timing.in_milliseconds(part["seconds"]),
            f"{part['seconds'] / total:.0%}",
            f"{part['least_seconds'] / part['seconds']:.0%}" if part["least_seconds"] else "–",
            f"{part['peak'] / 1e9:.1f}" if part["peak"] else "–",
            f"{part['planned'] / 1e9:.1f}" if part["planned"] else "–",
        ]
        for name, part in sorted(row["parts"].items(), key=lambda item: -item[1]["seconds"])
    ]
    head = [f"batch {row['batch']}, one iteration", "ms", "share of the time"]
    head += ["share of the limit", "GB", "GB, --plan"]
    return markdown.table(head, rows)


def write_page(out, origin, settings, rates, gpu, measured):
    """Keep and return the lines of the page; origin has command, machine and commit."""
    lines = [
        f"`{origin['command']}`, {origin['machine']}, {settings.precision}, "
        f"{settings.resolution} px, commit {origin['commit']}.",
        "",
        "Whole iterations: medians and quartiles. Parts: one iteration that waits for the device "
        "between them, so that their sum is more than the whole. Share of the limit: the time that "
        "the arithmetic takes at the rate of a matrix product measured here "
        f"({rates['bf16'] / 1e12:.3g} TFLOP/s in {settings.precision}, "
        f"{rates['tf32'] / 1e12:.3g} in float32), over the measured time. What checkpointing "
        "computes twice counts twice.",
        "",
        *whole_iterations(measured, gpu),
        "",
    ]
    if divided := [row for row in measured if row.get("parts")]:
        lines += [*parts_of(divided[-1]), ""]
    stored = origin | {
        "flops_per_second": rates,
        "gpu": gpu,
        "settings": dataclasses.asdict(settings),
        "batches": measured,
    }
    timing.keep(out, stored, lines)
    return lines


def run(arguments, given):
    """Measure, and write the page anew after every batch."""
    if arguments.random:
        backbone = given.pop("backbone", Settings.backbone)
        given = random_weights.settings_for(backbone, arguments.random) | given
    settings = from_dict(Settings, given)
    if settings.deterministic:
        be_deterministic()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(settings, Path(folder))
        device, measured = bench.device, []
        rates, gpu = limits(device, settings.precision), gpu_of(device)
        plan = Plan(settings, 1, gpu)
        origin = {  # before a page that git knows is changed
            "command": " ".join(["python full/bench.py", *arguments.argv]),
            "machine": machine(device),
            "commit": commit(),
        }
        for batch in arguments.batches:
            try:
                row = bench.time(batch, arguments.iterations)
            except torch.OutOfMemoryError:
                row = {"batch": batch, "failed": "out of memory"}
            except RuntimeError as error:  # a kernel that takes no tensor so large
                row = {"batch": batch, "failed": brief(error)}
            else:
                bench.beside_the_plan(row, plan, rates)
            measured.append(row)
            lines = write_page(arguments.out, origin, settings, rates, gpu, measured)
            if "failed" in row:
                break
    print("\n".join(lines))


def parse_arguments(argv):
    """(arguments, {setting: value} of those given)."""
    parser = argparse.ArgumentParser(
        prog="full/bench.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--random", type=Path, metavar="DIR", help="random weights of the real sizes, in DIR"
    )
    parser.add_argument(
        "--batches",
        type=lambda text: [int(n) for n in text.split(",")],
        default=[8],
        metavar="N,…",
        help="batch sizes, rising; the first that does not fit ends it (default: 8)",
    )
    parser.add_argument("--iterations", type=int, default=5, help="timed ones a batch (default 5)")
    parser.add_argument(
        "--out", type=Path, default=Path("speed-full"), help="NAME (default: speed-full)"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_flags(parser.add_argument_group("settings of full/run.py"), Settings)
    arguments = parser.parse_args(argv)
    arguments.argv = sys.argv[1:] if argv is None else argv
    own = {"random", "batches", "iterations", "out", "debug", "argv"}
    return arguments, {name: value for name, value in vars(arguments).items() if name not in own}


def main(argv=None):
    """Exit codes: 0 done, 2 a user's mistake (one line says which)."""
    arguments, given = parse_arguments(argv)
    try:
        if arguments.iterations < 1 or min(arguments.batches) < 1:
            raise ValueError("--iterations, --batches: must be at least 1")
        if arguments.random and given.get("backbone", Settings.backbone) not in BACKBONES:
            raise ValueError(f"--random: --backbone must be one of {', '.join(BACKBONES)}")
        run(arguments, given)
    except (ValueError, OSError, CheckpointError) as error:
        if arguments.debug:
            raise
        print(f"full/bench.py: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
