"""The paper's Table 1 at toy scale: each row one change from the default run, several seeds each:
python toy/ablate.py --dataset glyphs

A finished cell (one row, one seed) is kept as a small file and not done again; what is stopped by
Ctrl-C goes on from there. Writes OUT/ablation-DATASET.md and .png, and the cells beside them. Two
seeds can be run at once: --seeds 0 in one terminal, --seeds 1 in another.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # see toy/run.py

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import timing
from common.checkpoints import write_text
from toy.settings import Settings
from toy.testbed import (
    STEPS,
    Cells,
    Testbed,
    base_settings,
    clean,
    make_parser,
    mean_and_spread,
    run_program,
    show,
    verdict,
)

SMALL = (16, 32, 64)  # channels of the smaller U-Net of group e


@dataclass(frozen=True)
class Row:
    """A row of the table: what is changed."""

    name: str
    text: str
    settings: dict = field(default_factory=dict)
    online: bool = False  # needs a download, and is left out unless it is asked for


GROUPS = {
    "a": (
        "Feature network F",
        [
            Row("f-classifier", "a classifier (ViT)", dict(features="classifier")),
            Row("f-dino", "self-supervised (ViT, DINO)", dict(features="dino")),
            Row("f-denoiser", "a denoiser (ViT)", dict(features="denoiser")),
            Row(
                "f-large",
                "the same, twice as wide and deep",
                dict(features="denoiser", features_width=192, features_depth=6),
            ),
            Row("f-convolutional", "a convolutional classifier", dict(features="convolutional")),
            Row("f-untrained", "untrained (ViT)", dict(features="untrained")),
            Row("f-dinov2", "DINOv2", dict(features="dinov2"), online=True),
        ],
    ),
    "b": (
        "Conditions of the discriminator",
        [
            Row("c-none", "none", dict(distil_c_text=False, distil_c_img=False)),
            Row("c-text", "c_text, the class", dict(distil_c_img=False)),
            Row("c-img", "c_img", dict(distil_c_text=False)),
        ],
    ),
    "c": ("The student's start", [Row("start-random", "random", dict(distil_init="random"))]),
    "d": (
        "Losses",
        [
            Row("adversarial", "adversarial alone (λ = 0)", dict(distil_lambda=0.0)),
            # Adam's step does not depend on the scale of a loss.
            Row("distillation", "distillation alone (λ = 10⁶)", dict(distil_lambda=1e6)),
            Row("sds", "both, c(t) of SDS", dict(distil_weight="sds")),
            Row("nfsd", "both, c(t) of NFSD", dict(distil_weight="nfsd")),
        ],
    ),
    "e": (
        "Sizes of student and teacher",
        [
            Row("small-small", "small, small", dict(teacher_widths=SMALL)),
            Row("small-large", "small, large", dict(distil_widths=SMALL)),
            Row(
                "large-small",
                "large, small",
                dict(teacher_widths=SMALL, distil_widths=Settings.teacher_widths),
            ),
        ],
    ),
    "f": (
        "The teacher's steps",
        [
            Row("steps-2", "2", dict(distil_teacher_steps=2)),
            Row("steps-4", "4", dict(distil_teacher_steps=4)),
        ],
    ),
    "g": (
        "What the paper has no table for",
        [
            Row("zero-snr", "zero terminal SNR", dict(teacher_zero_snr=True)),
            Row("no-r1", "no R1 (γ = 0)", dict(distil_gamma=0.0)),
            Row("one-timestep", "N = 1, T_student = (999)", dict(distil_timesteps=(999,))),
            Row("lambda-0.5", "λ = 0.5", dict(distil_lambda=0.5)),
            Row("lambda-2.5", "λ = 2.5, the paper's", dict(distil_lambda=2.5)),
            Row("no-local-norm", "no local batch norm", dict(distil_local_norm=False)),
            Row("guidance-2", "the teacher's guidance 2", dict(distil_guidance=2.0)),
        ],
    ),
}
DEFAULT = Row("default", "default")
ROWS = {row.name: row for row in (DEFAULT, *(r for _, rows in GROUPS.values() for r in rows))}


@dataclass(frozen=True)
class Claim:
    """That one row's distance is less than another's, in that many steps, and what the paper says
    of it."""

    text: str
    better: str
    worse: str
    steps: int = 1


CLAIMS = [
    Claim("a) A self-supervised F beats a supervised one (20.6 with DINOv2, 23.3 with CLIP).",
          "f-dino", "f-classifier"),
    Claim("a) A larger F is no better (20.6 with ViT-S, 24.0 with ViT-L).",
          "f-denoiser", "f-large"),
    Claim("b) c_img does more than c_text (21.1, 21.2).", "c-img", "c-text"),
    Claim("b) Both conditions are best (20.6; none 21.2).", "default", "c-none"),
    Claim("c) A pretrained student is needed (20.6; random 293.6).", "default", "start-random"),
    Claim("d) Both losses beat the adversarial one (20.6, 20.8).", "default", "adversarial"),
    Claim("d) Both losses beat distillation (20.6, 315.6).", "default", "distillation"),
    Claim("d) The exponential weight beats that of SDS (20.6, 22.3).", "default", "sds"),
    Claim("d) It beats that of NFSD (20.6, 21.8).", "default", "nfsd"),
    Claim("e) A small student is no better for a larger teacher (20.6; 21.3).",
          "small-small", "small-large"),
    Claim("e) A large student is no better for a larger teacher (29.3; 28.4: it was).",
          "large-small", "default"),
    Claim("f) Two teacher steps are no better than one (20.6, 20.8).", "default", "steps-2"),
    Claim("f) Four are (20.3).", "steps-4", "default"),
    Claim("g) R1 helps.", "default", "no-r1"),
    Claim("g) Training at N = 4 timesteps helps sampling in four steps.",
          "default", "one-timestep", 4),
    Claim("g) So does the local batch norm of the heads.", "default", "no-local-norm"),
]  # fmt: skip


def wanted_rows(only):
    """The rows of some groups or of some names, the default first."""
    if not only:
        return [row for row in ROWS.values() if not row.online]
    rows = [DEFAULT]
    for name in only:
        if name in GROUPS:
            rows += [row for row in GROUPS[name][1] if not row.online]
        elif name in ROWS:
            rows += [ROWS[name]]
        else:
            known = ", ".join([*GROUPS, *ROWS])
            raise ValueError(f"--only {name}: no such group or row; choose from {known}")
    return list({row.name: row for row in rows}.values())


def settings_of(row, base):
    """The settings of a row's cell."""
    return dataclasses.replace(base, **row.settings)


def run_cells(arguments, cells, device):
    """Every missing cell."""
    for seed in arguments.seeds:
        base, bed = base_settings(arguments, seed), None
        missing = [
            row for row in arguments.rows if not cells.has(row.name, seed, settings_of(row, base))
        ]
        for row in missing:
            bed = bed or Testbed(arguments.work, base, device)
            print(f"{row.name}, seed {seed}", flush=True)
            rows, seconds, stage = bed.add(**row.settings)
            cells.write(row.name, settings_of(row, base), device, rows, seconds)
            clean(stage)
        if not cells.has("teacher", seed, base):
            bed = bed or Testbed(arguments.work, base, device)
            cells.write("teacher", base, device, [bed.of_the_teacher()], 0)


def collect(cells, base, name, steps, figure, seeds=range(100)):
    """The figure in that many steps, of each seed that has the row. Distances are multiples of that
    seed's teacher's."""
    values = []
    for seed in seeds:
        row, teacher = cells.read(name, seed), cells.read("teacher", seed)
        if row is None or teacher is None or not same_budget(row, base):
            continue
        value = next(r[figure] for r in row["rows"] if r["steps"] == steps)
        values.append(value / teacher["rows"][0]["fd"] if figure == "fd" else value)
    return values


def same_budget(cell, base):
    """Whether a cell was trained as long as these settings say."""
    names = ("distil_steps", "distil_batch", "limit")
    return all(cell["settings"][name] == getattr(base, name) for name in names)


def table(cells, base):
    """Lines of the Markdown table."""
    head = ["", "seeds"]
    for steps in STEPS:
        label = f"{steps} step{'s' * (steps > 1)}"
        head += [f"distance, {label}, ×", "precision", "recall", "accuracy"]
    lines = []

    def add(row, text):
        cell = [text, len(collect(cells, base, row.name, 1, "fd"))]
        if not cell[1]:
            return
        for steps in STEPS:
            for figure in ("fd", "precision", "recall", "accuracy"):
                cell.append(show(collect(cells, base, row.name, steps, figure)))
        lines.append(cell)

    add(DEFAULT, "**default**")
    for letter, (title, rows) in GROUPS.items():
        for row in rows:
            add(row, f"{letter}) {title}: {row.text}")
    return timing.table(head, lines)


def claims(cells, base):
    """Lines of the table of claims."""
    lines = []
    for claim in CLAIMS:
        better = collect(cells, base, claim.better, claim.steps, "fd")
        worse = collect(cells, base, claim.worse, claim.steps, "fd")
        if better and worse:
            ours = f"{claim.better} {show(better)}, {claim.worse} {show(worse)}"
            lines.append([claim.text, ours, verdict(better, worse)])
    return timing.table(["the paper's (FID)", "ours (distance, ×)", ""], lines)


def draw(path, cells, base):
    """One-step distance of every row, each seed a dot; the default's range is grey."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [(row, f"{letter}) {row.text}") for letter, g in GROUPS.items() for row in g[1]]
    rows = [(DEFAULT, "default"), *rows]
    found = [(text, collect(cells, base, row.name, 1, "fd")) for row, text in rows]
    found = [(text, values) for text, values in found if values][::-1]
    figure, axes = pyplot.subplots(figsize=(7, 0.6 + 0.25 * len(found)), layout="constrained")
    usual = found[-1][1]
    axes.axvspan(min(usual), max(usual), color="lightgrey")
    for i, (_, values) in enumerate(found):
        axes.plot(values, [i] * len(values), ".", color="C0")
        axes.plot([mean_and_spread(values)[0]], [i], "|", color="C3", markersize=10)
    axes.set_yticks(range(len(found)), [text for text, _ in found])
    axes.set(xscale="log", xlabel="Fréchet distance in one step, × the teacher's in 50")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write_page(out, cells, base, command):
    """OUT.md and OUT.png from whatever cells there are."""
    commits, machines = cells.sources()
    teachers = [cells.read("teacher", seed) for seed in range(100)]
    teachers = [cell["rows"][0] for cell in teachers if cell]
    fd, precision = (show([t[name] for t in teachers]) for name in ("fd", "precision"))
    recall, accuracy = (show([t[name] for t in teachers]) for name in ("recall", "accuracy"))
    lines = [
        f"# Table 1 on {base.dataset}",
        "",
        f"`{command}` · {base.distil_steps} ADD iterations a cell · {machines} · commit {commits}",
        "",
        "Every row is one change from the default run. Mean ± standard deviation over the seeds. "
        f"Distances are multiples of the teacher's in {base.eval_steps[-1]} steps, which is "
        f"{fd} (precision {precision}, recall {recall}, accuracy {accuracy}).",
        "",
        *table(cells, base),
        "",
        f"![one-step distances]({out.name}.png)",
        "",
        "## What the paper concludes",
        "",
        "A claim holds, or does not, if the means differ by more than the 95 % confidence interval "
        "of a difference of means, with the pooled standard deviation of both rows (Student's t "
        "test). The paper's figures are FID on COCO, of one training each.",
        "",
        *claims(cells, base),
        "",
    ]
    write_text(out.with_suffix(".md"), "\n".join(lines))
    draw(out.with_suffix(".png"), cells, base)


def main(argv=None):
    """Exit codes as of toy/run.py."""
    only = f"groups ({', '.join(GROUPS)}) or rows; the default is always among them"
    arguments = make_parser("toy/ablate.py", __doc__, "0,1,2", only).parse_args(argv)
    command = " ".join(["python toy/ablate.py", *(sys.argv[1:] if argv is None else argv)])

    def work(device):
        arguments.rows = wanted_rows(arguments.only)
        out = arguments.out / f"ablation-{arguments.dataset}"
        cells = Cells(out)
        run_cells(arguments, cells, device)
        write_page(out, cells, base_settings(arguments, arguments.seeds[0]), command)
        return out.with_suffix(".md")

    return run_program("toy/ablate.py", arguments, work)


if __name__ == "__main__":
    sys.exit(main())
