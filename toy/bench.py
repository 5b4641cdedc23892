"""What a training step and a sample cost beside the bare networks in them: python toy/bench.py

What is compared is measured in turns, in one process. The networks have random weights, which stay
what they are. Writes NAME.json and NAME.md.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # see toy/run.py

import argparse
import copy
import dataclasses
import statistics
import sys
import time
from functools import cached_property, partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from add import hinge_discriminator, hinge_student, r1, randn_like
from common import markdown, timing
from common.meter import least_seconds, measure
from common.origin import commit, machine
from toy.data import Dataset, to_float
from toy.distil import Distillation, make_batch
from toy.features import TeacherEncoder
from toy.graphs import recorded
from toy.loop import Stage
from toy.networks import has_bf16
from toy.program import exit_code, pick_device, set_threads
from toy.samplers import sample_student, sample_teacher
from toy.settings import PRESETS, Settings
from toy.teacher import Standardize, make_denoiser

CLASSES, CHANNELS = 10, 1


class Bench:
    """The networks of a run at some settings, a batch of noise for data, and every piece of an
    iteration as a function without arguments."""

    def __init__(self, settings, device):
        torch.backends.cudnn.benchmark = True  # as toy/run.py has it
        # Pieces that run alone leave gradients that mean nothing: no optimiser may act on them.
        settings = dataclasses.replace(settings, distil_student_lr=1e-12, distil_heads_lr=1e-12)
        self.settings, self.device = settings, device
        torch.manual_seed(0)
        size, batch = settings.size, settings.distil_batch
        images = torch.randint(256, (max(512, batch), CHANNELS, size, size), dtype=torch.uint8)
        labels = torch.arange(len(images)) % CLASSES
        classes = tuple("0123456789")
        data = Dataset("noise", images, labels, images, labels, classes)
        self.teacher = make_denoiser(CHANNELS, CLASSES, settings, Standardize(0, 0.5)).to(device)
        for parameter in self.teacher.parameters():  # where training starts from zeros, too
            torch.nn.init.normal_(parameter, std=0.05)
        self.teacher.eval().requires_grad_(False)
        self.features = TeacherEncoder(self.teacher, seed=0)
        stage = Stage(None, data, settings, device, key="")
        self.training = Distillation(stage, self.teacher, self.features)
        self.student, self.step = self.training.student, partial(self.training.step, 0)
        self.x_0 = to_float(images[:batch]).to(device)
        self.labels = labels[:batch].to(device)
        self.t = torch.full((batch,), 500, device=device)

    @cached_property
    def counted(self):
        """{piece or "ADD step": (floating-point operations, most bytes of tensors at once)}.
        Counted on a CPU: a recorded graph shows neither."""
        cpu = torch.device("cpu")
        bench = self if self.device == cpu else Bench(self.settings, cpu)
        functions = bench.pieces() | {"ADD step": bench.step}
        bench.step()  # the optimisers' state and the gradients are there before
        return {name: measure(function) for name, function in functions.items()}

    def pieces(self):
        """{name: function} of the floor: what an iteration cannot do without."""
        settings, heads, features = self.settings, self.training.heads, self.features
        network, x, labels, t = self.student.denoiser.network, self.x_0, self.labels, self.t
        batch = make_batch(x, labels, features, CLASSES, settings)
        conditions = (batch.c_text, batch.c_img)
        gradient = torch.randn_like(x)
        tokens = [h.detach() for h in features(x)]
        gradients = [torch.randn_like(h) for h in tokens]

        def leaves():
            return [h.clone().requires_grad_() for h in tokens]

        def student():
            network.zero_grad()
            network(x, t, labels).backward(gradient)

        def teacher():
            with torch.no_grad():
                self.teacher.network(x, t, labels)

        def generated():
            torch.autograd.backward(features(x.clone().requires_grad_()), gradients)

        def real():
            with torch.no_grad():
                features(x)

        def c_img():
            with torch.no_grad():
                features.summary(x)

        def heads_of_the_student():
            heads.requires_grad_(False)
            hinge_student(heads(leaves(), *conditions)).mean().backward()
            heads.requires_grad_(True)

        def heads_of_their_own():
            heads.zero_grad()
            inputs = leaves()
            with torch.nn.utils.parametrize.cached():
                real, fake = heads(inputs, *conditions), heads(tokens, *conditions)
            hinge = hinge_discriminator(real, fake)
            (hinge.mean() + settings.distil_gamma * r1(real, inputs).mean()).backward()

        def optimizers():
            self.training.student_optimizer.step()
            self.training.heads_optimizer.step()

        self.step()  # gives every parameter a gradient
        pieces = {
            "student, forward and backward": student,
            "teacher, forward": teacher,
            "F, forward and backward, generated images": generated,
            "F, forward, real images": real,
            "F, forward, for c_img": c_img,
            "heads, student's half": heads_of_the_student,
            "heads, discriminator's half": heads_of_their_own,
        }
        replay = recorded(self.device, [self.features.generator], [heads])
        pieces = {name: replay(function) for name, function in pieces.items()}
        average = partial(self.training.ema.update_parameters, network)
        return pieces | {"optimisers": optimizers, "moving average": average}

    def naive(self):
        """An iteration as public re-implementations write it: the student runs again for the
        heads' half, F sees its images twice, and R1 goes through F to the pixels. The moving
        average is updated parameter by parameter, each logged value is read separately, and no
        CUDA graph is used."""
        settings, heads, features = self.settings, copy.deepcopy(self.training.heads), self.features
        student = copy.deepcopy(self.student)
        network, teacher = student.denoiser.network, self.teacher
        average = copy.deepcopy(network)
        optimizers = [
            torch.optim.Adam(p.parameters(), 1e-12, (0.0, 0.99), foreach=False)
            for p in (network, heads)
        ]
        generator = torch.Generator(self.device).manual_seed(0)

        def iteration():
            x_0, labels = self.x_0, self.labels
            batch = make_batch(x_0, labels, features, CLASSES, settings)
            s = student.draw_timesteps(len(x_0), x_0.device, generator)
            z_0 = student.denoiser.encode(x_0)
            x_s = student.diffuse(z_0, randn_like(z_0, generator), s)
            unseen = student.is_terminal(s)[:, None]
            conditions = batch.c_text, batch.c_img.masked_fill(unseen, 0)

            z = student(x_s, s, labels)
            x_hat = student.denoiser.decode(z)
            heads.requires_grad_(False)
            logits = heads(features(x_hat), *conditions)
            adversarial = hinge_student(logits).mean()
            heads.requires_grad_(True)
            T, n, device = len(teacher.schedule), len(x_0), x_0.device
            t = torch.randint(T, (n,), device=device, generator=generator)
            with torch.no_grad():
                z_t = teacher.schedule.diffuse(z, randn_like(z, generator), t)
                target = teacher.decode(teacher(z_t, t, labels))
                c_t = teacher.schedule.coefficients(t)[0].flatten()
            distillation = (c_t * (x_hat - target).square().flatten(1).mean(1)).mean()
            optimizers[0].zero_grad()
            (adversarial + settings.distil_lambda * distillation).backward()
            optimizers[0].step()

            with torch.no_grad():
                fake = features(student.denoiser.decode(student(x_s, s, labels)))
            pixels = x_0.clone().requires_grad_()
            real = heads(features(pixels), *conditions)
            hinge = hinge_discriminator(real, heads(fake, *conditions)).mean()
            total = sum(logits.sum() for logits in real)
            (slope,) = torch.autograd.grad(total, pixels, create_graph=True)
            penalty = slope.square().flatten(1).sum(1).mean()
            optimizers[1].zero_grad()
            (hinge + settings.distil_gamma * penalty).backward()
            optimizers[1].step()
            with torch.no_grad():
                for mine, its in zip(average.parameters(), network.parameters(), strict=True):
                    mine.mul_(0.999).add_(its, alpha=0.001)
            return [value.item() for value in (adversarial, distillation, hinge, penalty)]

        return iteration


def compared(head, seconds, pairs):
    """({"seconds", "ratios"}, lines of both tables) of {name: seconds of each round} and of
    {title: (numerator, denominator)}, names of those."""
    against = {title: timing.ratios(seconds[a], seconds[b]) for title, (a, b) in pairs.items()}
    rows = [[name, timing.milliseconds(values)] for name, values in seconds.items()]
    lines = markdown.table([head, "ms"], rows) + [""]
    lines += markdown.table(["", "×"], [[name, timing.multiples(v)] for name, v in against.items()])
    return {"seconds": seconds, "ratios": against}, lines


def step(bench, repeats):
    """The ADD step against its floor, and against a naive one."""
    pieces = bench.pieces()
    functions = pieces | {"ADD step": bench.step, "naive step": bench.naive()}
    seconds = timing.alternate(functions, bench.device, repeats)
    floor = [sum(values) for values in zip(*(seconds[name] for name in pieces), strict=True)]
    pairs = {
        "ADD step / sum of the pieces": ("ADD step", "sum of the pieces"),
        "naive step / ADD step": ("naive step", "ADD step"),
    }
    return compared("", seconds | {"sum of the pieces": floor}, pairs)


def sampling(bench, repeats):
    """The student's steps against bare passes of its network, and the teacher at several steps."""
    x, labels, t = bench.x_0, bench.labels, bench.t
    student, network = bench.student.eval(), bench.student.denoiser.network

    def passes(count):
        with torch.no_grad():
            for _ in range(count):
                network(x, t, labels)

    functions, pairs = {}, {}
    for k in (1, 2, 4):
        functions[f"student, {k}"] = partial(sample_student, student, x, labels, k, 0)
        functions[f"bare passes, {k}"] = partial(passes, k)
        pairs[f"student, {k} / bare passes"] = f"student, {k}", f"bare passes, {k}"
    for k in (8, 25, 50):
        name = f"teacher, {k}, guidance 2"
        functions[name] = partial(sample_teacher, bench.teacher, x, labels, k, 2.0)
        pairs[f"{name} / student, 1"] = name, "student, 1"
    seconds = timing.alternate(functions, bench.device, repeats)
    student.train()
    return compared(f"{len(x)} images", seconds, pairs)


def limits(bench, repeats):
    """Achieved FLOP/s. The share of the limit is the time that the arithmetic takes at the fastest
    rate measured here, a large matrix product's or convolution's, over the measured time.
    """
    types = {"tf32": torch.float32}
    if bench.settings.precision == "bf16":
        types["bf16"] = torch.bfloat16
    machine = {rate: timing.limits(bench.device, dtype) for rate, dtype in types.items()}
    flops = {name: counts[0] for name, counts in bench.counted.items()}
    flops = {name: n for name, n in flops.items() if n}
    flops |= {name: measure(f)[0] for of_type in machine.values() for name, f in of_type.items()}
    functions = bench.pieces() | {"ADD step": bench.step}
    for of_type in machine.values():
        functions |= of_type
    functions = {name: functions[name] for name in flops}
    seconds = timing.alternate(functions, bench.device, repeats)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    speed = {name: sum(flops[name].values()) / middle[name] for name in flops}
    rates = {rate: max(speed[name] for name in of_type) for rate, of_type in machine.items()}
    least = {name: least_seconds(flops[name], rates) for name in flops}
    rows = [
        [
            name,
            f"{sum(flops[name].values()) / 1e9:.2f}",
            f"{speed[name] / 1e9:.1f}",
            f"{least[name] / middle[name]:.0%}",
        ]
        for name in flops
    ]
    stored = {"flops": flops, "flops_per_second": speed, "least_seconds": least}
    return stored, markdown.table(["", "GFLOP", "GFLOP/s", "share of the limit"], rows)


def growth(bench, repeats):
    """How the ADD step's time grows with the batch, the image's side and the network."""
    base, variants = bench.settings, {}
    for batch in (1, 8, 32, 128, 512):
        variants["batch", batch] = dict(distil_batch=batch)
    for size in (16, 32, 64):
        variants["image side", size] = dict(size=size)
    for factor in (1, 2, 4, 8):  # of the network's operations: channels grow by the root
        widths = tuple(8 * round(w * factor**0.5 / 8) for w in base.teacher_widths)
        variants["network ×", factor] = dict(teacher_widths=widths)
    others = {
        key: Bench(dataclasses.replace(base, **change), bench.device)
        for key, change in variants.items()
    }
    functions = {key: other.step for key, other in others.items()}
    seconds = timing.alternate(functions, bench.device, repeats)
    rows, fits = [], {}
    for what in dict.fromkeys(kind for kind, _ in variants):
        sizes = [size for kind, size in variants if kind == what]
        medians = [statistics.median(seconds[what, size]) for size in sizes]
        fits[what] = timing.exponent(sizes[-3:], medians[-3:])
        for size in sizes:
            rows.append([f"{what} {size}", timing.milliseconds(seconds[what, size]), ""])
        rows[-1][-1] = f"{fits[what]:.2f}"
    stored = {f"{what} {size}": values for (what, size), values in seconds.items()}
    head = ["", "ms", "exponent of the last three"]
    return {"seconds": stored, "exponents": fits}, markdown.table(head, rows)


def _one_of_many(settings, device, threads, barrier, queue, steps):
    """In a child process: put the mean seconds of a step; all children begin at the same time."""
    torch.set_num_threads(threads)
    bench = Bench(settings, device)
    for _ in range(3):
        bench.step()
    timing.synchronize(device)
    barrier.wait(timeout=60)
    began = time.perf_counter()
    for _ in range(steps):
        bench.step()
    timing.synchronize(device)
    queue.put((time.perf_counter() - began) / steps)


def _at_once(bench, count, threads, steps):
    """[seconds of a step] of so many processes that run at once. ValueError if one fails."""
    context = torch.multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(count), context.SimpleQueue()
    given = bench.settings, bench.device, threads, barrier, queue, steps
    children = [context.Process(target=_one_of_many, args=given) for _ in range(count)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    if failed := [child.exitcode for child in children if child.exitcode]:
        raise ValueError(f"--only processes: one of {count} ended with exit code {failed[0]}")
    return [queue.get() for _ in children]


def processes(bench, repeats):
    """One process with a CPU thread, one with two, and two at once with one each."""
    kinds = {
        f"{count} process{'es' * (count > 1)}, {threads} thread{'s' * (threads > 1)}": (
            count,
            threads,
        )
        for count, threads in ((1, 1), (1, 2), (2, 1))
    }
    seconds = {name: [] for name in kinds}
    for _ in range(repeats):
        for name, kind in kinds.items():
            seconds[name].append(_at_once(bench, *kind, steps=10))
    rows = []
    for name, rounds in seconds.items():
        each = timing.milliseconds([value for values in rounds for value in values])
        speed = statistics.median(sum(1 / value for value in values) for values in rounds)
        rows.append([name, each, f"{speed:.2f}"])
    return seconds, markdown.table(["", "ms", "steps a second, all together"], rows)


def memory(bench, repeats):
    """The tensors that live at once, of each piece and of the ADD step."""
    peaks = {name: counts[1] for name, counts in bench.counted.items()}
    parameters = (*bench.student.parameters(), *bench.training.heads.parameters())
    size = sum(p.numel() * p.element_size() for p in parameters)
    rows = [[name, f"{peak / 2**20:.1f}"] for name, peak in peaks.items()]
    rows.append(["for scale: the weights that are trained", f"{size / 2**20:.1f}"])
    return peaks, markdown.table(["", "MiB"], rows)


SECTIONS = {f.__name__: f for f in (step, sampling, limits, growth, processes, memory)}


def parse_arguments(argv):
    """The command line."""
    parser = argparse.ArgumentParser(prog="toy/bench.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--preset", choices=tuple(PRESETS), default="cpu", help="default: cpu")
    parser.add_argument("--device", help="cuda, mps or cpu; default: the first available")
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's choice")
    parser.add_argument("--repeats", type=int, default=7, help="rounds (default 7)")
    parser.add_argument(
        "--only", choices=SECTIONS, nargs="+", default=list(SECTIONS), help="default: all of them"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("speed-toy"), help="NAME (default: speed-toy)"
    )
    return parser.parse_args(argv)


def main(argv=None):
    """Exit codes as in toy/run.py."""
    arguments = parse_arguments(argv)
    command = " ".join(["python toy/bench.py", *(sys.argv[1:] if argv is None else argv)])

    def work():
        if arguments.repeats < 1:
            raise ValueError(f"--repeats {arguments.repeats}: must be at least 1")
        set_threads(arguments.threads)
        device = pick_device(arguments.device)
        precision = "bf16" if has_bf16(device) else "fp32"
        settings = Settings(**PRESETS[arguments.preset] | {"precision": precision})
        bench = Bench(settings, device)
        stored = {
            "command": command,
            "machine": machine(device),
            "commit": commit(),
            "precision": precision,
        }
        lines = [f"`{command}`, {stored['machine']}, {precision}, commit {stored['commit']}."]
        lines += ["Medians and quartiles.", ""]
        for name in arguments.only:
            section = SECTIONS[name]
            stored[name], rows = section(bench, arguments.repeats)
            lines += [f"**{' '.join(section.__doc__.split())}**", "", *rows, ""]
            print("\n".join(lines[-len(rows) - 3 :]), flush=True)
            timing.keep(arguments.out, stored, lines)  # what is measured is not lost

    return exit_code("toy/bench.py", work, again="what was measured is kept")


if __name__ == "__main__":
    sys.exit(main())
