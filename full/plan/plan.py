"""What a run needs, before a GPU is rented: python full/run.py --plan --gpus 8 --gpu a100-80

Iterations at two batches are measured without weights (dry_run.py), and other batches are on the
straight lines through them. This file adds models of memory under FSDP2 and of the time of
arithmetic and communication.
"""

import bisect
import dataclasses
import math
from collections import Counter

from full.plan.dry_run import DryRun
from full.plan.labels import STUDENT

# Share of the peak rates that is reached. With 8 images or more it was 10 to 15 % on an H100 and an
# H200 (results/gpu.md). Slower GPUs may reach more.
UTILISATION = 0.12
# Share of the links' rates: an assumption, about what NCCL's all-reduce has on eight A100.
LINK_UTILISATION = 0.75
# What is kept free: a share for fragments and workspaces, bytes for CUDA's context and NCCL.
FRAGMENTS, CONTEXT = 0.08, 1.5e9
NODE, NETWORK = 8, 25e9  # more GPUs than NODE talk through a network: 200 Gb/s for each, in bytes/s


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Vendors' numbers: dense bf16 with float32 sums, one direction of the link."""

    # Bytes that PyTorch has ("total capacity" in its out-of-memory messages), less than on the box.
    memory: float
    bf16: float  # operations a second; TF32 has half of it on all of these
    link: float  # bytes/s to the other GPUs of the node: NVLink, or PCIe 4.0 x16

    def rates(self):
        """Operations a second by precision."""
        return {"bf16": self.bf16, "tf32": self.bf16 / 2}


GPUS = {
    "a100-40": Gpu(39.4 * 2**30, 312e12, 300e9),
    "a100-80": Gpu(79.1 * 2**30, 312e12, 300e9),
    "h100-80": Gpu(79.1 * 2**30, 989e12, 450e9),
    "h200-141": Gpu(139.0 * 2**30, 989e12, 450e9),
    "rtx4090-24": Gpu(23.5 * 2**30, 165e12, 32e9),
    "l40s-48": Gpu(44.4 * 2**30, 362e12, 32e9),
}
KINDS = {  # of memory, as dry_run.py has them → rows of the report
    "weights": "student's weights",
    "gradients": "gradients (float32)",
    "optimiser": "optimiser, with its temporaries",
    "average": "moving average (float32)",
    "copies": "weights cast or gathered",
    "frozen": "frozen networks",
    "heads": "heads, gradients, Adam (float32)",
    "activations": "activations and the rest",
}
SHARDED = ("weights", "gradients", "optimiser", "average")  # divided among the GPUs by FSDP2
# The units of FSDP2, as in configs/eight-gpus-fsdp2.yaml.
WRAPPED = ("BasicTransformerBlock", "ResnetBlock2D")


class Plan:
    """What settings cost on `gpus` GPUs of a kind, in each of self.modes. ValueError for a GPU that
    is not known."""

    def __init__(self, settings, gpus=1, gpu="a100-80"):
        if gpu not in GPUS:
            raise ValueError(f"--gpu {gpu}: unknown; choose one of {', '.join(GPUS)}")
        if gpus < 1:
            raise ValueError(f"--gpus {gpus}: must be at least 1")
        self.settings, self.gpus, self.gpu = settings, gpus, GPUS[gpu]
        self.modes = ("DDP", "FSDP2") if gpus > 1 else ("one GPU",)
        self.capacity = self.gpu.memory * (1 - FRAGMENTS) - CONTEXT
        self.dry = DryRun(settings, whole_gradients=gpus > 1 or settings.accumulate > 1)
        low = min(settings.batch, 8)  # larger ones take long, image by image through the VAE
        self.batches = low, 2 * low
        self.measured = [self.dry.measure(batch) for batch in self.batches]
        self.width = 2 if settings.precision == "bf16" else 4  # bytes of a number that FSDP2 sends
        network = self.dry.network
        self.parameters, self.heads = count(network), count(self.dry.add.discriminator.heads)
        self.trained = sum(p.numel() for p in self.dry.trained)
        # What FSDP2 has whole: all that is in no unit, the unit at work and the next; then their
        # gradients.
        units = [count(m) for m in network.modules() if type(m).__name__ in WRAPPED]
        self.gathered = 2 * self.width * (self.parameters - sum(units) + 2 * max(units, default=0))

    def line(self, low, high, batch):
        """Numbers at a batch, on the straight lines through those measured."""
        share = (batch - self.batches[0]) / (self.batches[1] - self.batches[0])
        return {
            k: low.get(k, 0) + (high.get(k, 0) - low.get(k, 0)) * share for k in {**low, **high}
        }

    # Memory ---------------------------------------------------------------------------------------

    def peaks(self, mode, batch):
        """{part: {kind: bytes of one GPU}} when the part is at its highest."""
        s, ((_, low, low_held), (_, high, high_held)) = self.settings, self.measured
        held = self.line(low_held, high_held, batch)
        # The last iteration's half, and what other micro-batches keep.
        rest = held["half"] + (s.accumulate - 1) * sum(held.values())
        shares = {}
        if mode == "FSDP2":
            shares = dict.fromkeys(SHARDED, 1 / self.gpus)
            # Nothing is sent between micro-batches: whole gradients, in float32 as for the sum.
            if s.accumulate > 1:
                shares["gradients"] += 1
        peaks = {}
        for part in high:
            kinds = {
                kind: n * shares.get(kind, 1)
                for kind, n in self.line(low[part], high[part], batch).items()
            }
            kinds["activations"] += rest
            peaks[part] = kinds | {"copies": self.gathered if shares else kinds.get("copies", 0)}
        return peaks

    def memory(self, mode, batch):
        """(the part that needs most, {kind: bytes of one GPU})."""
        return max(self.peaks(mode, batch).items(), key=lambda item: sum(item[1].values()))

    def total(self, mode, batch):
        """Bytes of one GPU, at the peak."""
        return sum(self.memory(mode, batch)[1].values())

    def largest_batch(self, mode):
        """Images in a micro-batch that fit; 0: not even one."""
        return bisect.bisect_left(
            range(1, 10**6), True, key=lambda batch: self.total(mode, batch) > self.capacity
        )

    # Time -----------------------------------------------------------------------------------------

    def operations(self, batch):
        """{(part, precision): operations} of a micro-batch."""
        return self.line(self.measured[0][0], self.measured[1][0], batch)

    def seconds(self, batch, *parts):
        """Of a micro-batch's arithmetic; given parts, of theirs."""
        rates = {k: rate * UTILISATION for k, rate in self.gpu.rates().items()}
        return sum(
            n / rates[k]
            for (part, k), n in self.operations(batch).items()
            if part in parts or not parts
        )

    def communication(self, mode):
        """(seconds of an iteration that the student's arithmetic may hide, seconds for the heads'
        gradients)."""
        link = LINK_UTILISATION * (
            self.gpu.link if self.gpus <= NODE else min(self.gpu.link, NETWORK)
        )
        # Seconds a byte, of a ring's gather or scatter; a sum takes both.
        hop = (self.gpus - 1) / self.gpus / link
        # Weights are gathered for forward and for backward.
        gathers = 2 * self.settings.accumulate * self.width * self.parameters
        sent = {"DDP": 2 * 4 * self.trained, "FSDP2": gathers + 4 * self.trained}.get(mode, 0)
        return hop * sent, hop * 2 * 4 * self.heads

    def hidden(self, mode, batch):
        """Seconds of arithmetic that can hide communication: DDP's, the last backward pass of the
        student."""
        if mode == "DDP":
            return self.seconds(batch, f"{STUDENT}, backward")
        return self.settings.accumulate * self.seconds(batch, STUDENT, f"{STUDENT}, backward")

    def step(self, mode, batch):
        """Seconds of an iteration."""
        student, heads = self.communication(mode)
        return (
            self.settings.accumulate * self.seconds(batch)
            + max(0, student - self.hidden(mode, batch))
            + heads
        )

    def limit(self, mode):
        """The smallest batch whose student hides all of its communication."""
        each = self.hidden(mode, 2) - self.hidden(mode, 1)
        return max(1, math.ceil(self.communication(mode)[0] / each))

    # Report ---------------------------------------------------------------------------------------

    def problem(self):
        """One line on what to do if the batch fits in no mode; None if it fits."""
        s, largest = self.settings, {mode: self.largest_batch(mode) for mode in self.modes}
        mode = max(largest, key=largest.get)
        if largest[mode] >= s.batch:
            return None
        ways = {
            "--checkpointing true": not s.checkpointing,
            "--vae-slicing true": not s.vae_slicing,
            "--vae taesd": s.vae == "kl",
            "--optimizer adamw8bit": s.optimizer == "adamw",
            "--ema 0": s.ema,
            "--lora-rank 64": not s.lora_rank,
            "more --gpus and FSDP2": True,
            "a larger --gpu": True,
        }
        fits = "none"
        if largest[mode]:
            fits = ", ".join(f"{n} ({mode})" for mode, n in largest.items())
        return (
            f"--batch {s.batch}: too little memory: {mode} needs "
            f"{self.total(mode, s.batch) / 1e9:.1f} GB, the GPU has "
            f"{self.capacity / 1e9:.1f} for it; largest --batch that fits: {fits}; less memory: "
            f"{', '.join(way for way, helps in ways.items() if helps)}"
        )

    def report(self, title):
        """Markdown, within 100 columns."""
        s = self.settings
        lines = (
            f"# {title}",
            "",
            f"{s.steps} iterations at {s.resolution}×{s.resolution}, {s.precision}: {s.batch} "
            f"images × {s.accumulate} micro-batches × {self.gpus} GPUs = "
            f"{s.batch * s.accumulate * self.gpus}.",
            "Measured without weights on torch's meta device. On an H100 the memory was right to",
            "within 7%, and the time of 8 images or more to within a third. GB = 1e9 bytes, TFLOP",
            "= 1e12 operations, and a multiply-add is two of them.",
            "",
        )
        tables = self._parameters(), self._operations(), self._memory(), self._time()
        return "\n".join([*lines, *(text for rows in tables for text in (*rows, ""))]).rstrip()

    def _parameters(self):
        s, d = self.settings, self.dry
        rows = {
            "student: U-Net": self.parameters,
            "of it trained": self.trained,
            "heads": self.heads,
            "teacher: U-Net": count(d.teacher_backbone.pipe.unet),
            "VAE": count(d.backbone.pipe.vae),
            "text encoders": sum(map(count, d.backbone.texts)),
            f"F: {tail(s.features)}": count(d.add.discriminator.features),
        }
        if d.text_features:
            rows[f"c_text: {tail(s.c_text)}"] = count(d.text_features.network)
        if d.image_features:
            rows[f"c_img: {tail(s.c_img)}"] = count(d.image_features)
        return table(
            ("parameters", "millions"), [(name, f"{n / 1e6:.2f}") for name, n in rows.items()]
        )

    def _operations(self):
        parts = Counter()
        for (part, _), n in self.operations(self.settings.batch).items():
            parts[part] += n / self.settings.batch / 1e12
        rows = [(part, f"{n:.3f}", f"{100 * n / parts.total():.1f}") for part, n in parts.items()]
        return table(
            ("one image", "TFLOP", "%"), [*rows, ("**all**", f"{parts.total():.3f}", "100.0")]
        )

    def _memory(self):
        gb = lambda numbers, digits=1: [f"{x / 1e9:.{digits}f}" for x in numbers]  # noqa: E731
        columns = [self.memory(mode, self.settings.batch) for mode in self.modes]
        further = [(self.total(mode, 2000) - self.total(mode, 1000)) / 1000 for mode in self.modes]
        peaks = [self.peaks(mode, self.settings.batch).values() for mode in self.modes]
        rows = [
            (text, *gb(kinds.get(kind, 0) for _, kinds in columns)) for kind, text in KINDS.items()
        ]
        rows += [
            ("**all, at the peak**", *gb(sum(kinds.values()) for _, kinds in columns)),
            ("which is in", *(part for part, _ in columns)),
            (
                "activations, at their own peak",
                *gb(max(k["activations"] for k in parts) for parts in peaks),
            ),
            (
                f"the GPU's, less {FRAGMENTS:.0%} and {CONTEXT / 1e9} GB",
                *gb([self.capacity] * len(columns)),
            ),
            ("each further image, at most", *gb(further, 2)),
            (
                "**largest batch that fits**",
                *(str(self.largest_batch(mode)) for mode in self.modes),
            ),
        ]
        return table((f"GB of a GPU, batch {self.settings.batch}", *self.modes), rows)

    def _time(self):
        s, columns = self.settings, [self._times(mode) for mode in self.modes]
        names = [name for name in columns[0] if self.gpus > 1 or "communication" not in name]
        return table(
            (f"time, batch {s.batch}", *self.modes),
            [(name, *(c[name] for c in columns)) for name in names],
        )

    def _times(self, mode):
        s, step = self.settings, self.step(mode, self.settings.batch)
        arithmetic = s.accumulate * self.seconds(s.batch)
        communication = sum(self.communication(mode))
        return {
            f"arithmetic at {UTILISATION:.0%} of the peak, s": f"{arithmetic:.2f}",
            f"communication at {LINK_UTILISATION:.0%} of the link (assumed), s": (
                f"{communication:.3f}"
            ),
            "communication that the student can hide, s": f"{self.hidden(mode, s.batch):.3f}",
            "communication is the limit below batch": str(self.limit(mode)),
            "**one iteration, s**": f"{step:.2f}",
            "images/s, all GPUs": f"{s.batch * s.accumulate * self.gpus / step:.1f}",
            f"days for {s.steps} iterations": f"{s.steps * step / 86400:.2f}",
            "**GPU-hours**": f"{s.steps * step * self.gpus / 3600:.1f}",
        }


def count(network):
    """Its parameters."""
    return sum(p.numel() for p in network.parameters())


def tail(name):
    """The end of a path that is too long for a table."""
    return name if len(name) <= 40 else "…" + name[-39:]


def table(head, rows):
    """Lines of a Markdown table: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    rule = tuple("-" * width for width in widths)
    aligned = [
        [f"{x:{'>' if i else '<'}{widths[i]}}" for i, x in enumerate(row)]
        for row in (head, rule, *rows)
    ]
    return [f"| {' | '.join(row)} |" for row in aligned]


def plan(settings, gpus=1, gpu="a100-80"):
    """(report, None or in one line what does not fit and what to do). ValueError for a name that is
    not known."""
    it = Plan(settings, gpus, gpu)
    return it.report(f"{tail(settings.backbone)} on {gpus} × {gpu}"), it.problem()
