"""The paper's Table 1 at toy scale: each row one change from the base, several seeds each:
python toy/ablate.py --dataset glyphs

A finished cell (one row, one seed) is kept as a small file and not run again. Stop with Ctrl-C at
any time: the same command continues. Writes OUT/ablation-DATASET.md and .png, and the cells, in
OUT/ablation-DATASET/. Two seeds can be run at once: --seeds 0 in one terminal, --seeds 1 in
another.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # see toy/run.py

import dataclasses
import math
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import markdown
from common.checkpoints import write_text
from toy.loop import NotFinite
from toy.settings import Settings
from toy.testbed import (
    CELL,
    METRICS,
    STEPS,
    Testbed,
    base_settings,
    difference,
    log_ratios,
    make_parser,
    origin_of,
    quotient,
    run_program,
    show,
    sources,
    verdict,
    with_seed,
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
                "a larger denoiser (ViT)",
                dict(features="denoiser", features_width=192, features_depth=6),
            ),
            Row("f-convolutional", "a convolutional classifier", dict(features="convolutional")),
            Row("f-untrained", "untrained (ViT)", dict(features="untrained")),
            Row("f-dinov2", "DINOv2", dict(features="dinov2"), online=True),
            Row("f-efficientnet", "EfficientNet", dict(features="efficientnet"), online=True),
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
            # Its guidance is its paper's (Katzir et al. 2023).
            Row("nfsd", "both, NFSD", dict(distil_weight="nfsd", distil_guidance=7.5)),
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
        "Other choices",
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
# Its F is the teacher's encoder: see testbed.CELL.
BASE = Row("base", "the base")
ROWS = {row.name: row for row in (BASE, *(r for _, rows in GROUPS.values() for r in rows))}


@dataclass(frozen=True)
class Claim:
    """That one row's distance is less than another's, in that many steps."""

    text: str  # with the paper's FID of both
    better: str
    worse: str
    steps: int = 1


PAPER = [
    Claim("a) A self-supervised F is best: DINOv2, FID 20.6. (At equal size, ViT-L, it is not: "
          "DINOv2 24.0, CLIP's 23.3.)", "f-dino", "f-classifier"),
    Claim("a) A smaller F is better: FID 20.6, 24.0; CLIP 0.319, 0.302", "f-denoiser", "f-large"),
    Claim("b) c_img alone is better than c_text alone: FID 21.1, 21.2; CLIP 0.316, 0.307",
          "c-img", "c-text"),
    Claim("b) both conditions are better than none: FID 20.6, 21.2; CLIP 0.319, 0.302",
          "base", "c-none"),
    Claim("b) … than c_img alone: FID 20.6, 21.1; CLIP 0.319, 0.316", "base", "c-img"),
    Claim("c) a pretrained student is better than a random one: FID 20.6, 293.6; CLIP 0.319, "
          "0.065", "base", "start-random"),
    Claim("d) both losses are better than the adversarial one: FID 20.6, 20.8; CLIP 0.319, "
          "0.315", "base", "adversarial"),
    Claim("d) … than distillation: FID 20.6, 315.6; CLIP 0.319, 0.076",
          "base", "distillation"),
    Claim("d) the exponential weight is better than that of SDS: FID 20.6, 22.3; CLIP 0.319, "
          "0.325", "base", "sds"),
    Claim("d) … than that of NFSD: FID 20.6, 21.8; CLIP 0.319, 0.327", "base", "nfsd"),
    Claim("e) a small student is better with a small teacher: FID 20.6, 21.3; CLIP 0.319, 0.321",
          "small-small", "small-large"),
    Claim("e) a large student is better with a large teacher: FID 28.4, 29.3; CLIP 0.325, 0.314",
          "base", "large-small"),
    Claim("f) one teacher step is better than two: FID 20.6, 20.8; CLIP 0.319, 0.321",
          "base", "steps-2"),
    Claim("f) four are better than one: FID 20.3, 20.6; CLIP 0.317, 0.319 (the paper: no "
          "conclusive gain)", "steps-4", "base"),
]  # fmt: skip
DESIGN = [
    Claim("R1 helps in one step (the paper: above all beyond 128×128 pixels)", "base", "no-r1"),
    Claim("four timesteps in training help sampling in four steps", "base", "one-timestep", 4),
    Claim("the heads' local batch norm helps in one step", "base", "no-local-norm"),
]
REMARKS = {  # below the table, if it has the row
    "f-large": "The large F has seven heads instead of four, so the adversarial loss weighs more.",
    "sds": "The weight of SDS, α σ / 2, is less than half of the exponential one, α, so the "
    "distillation loss counts less, as with a smaller λ.",
    "nfsd": "NFSD asks its teacher at guidance 7.5, as in its paper.",
    "f-convolutional": "The convolutional F resembles the metric network, which may favour it. On "
    "one seed it was closer in other networks' features, too (toy/experiments.md).",
    "small-small": "In group e F changes with the teacher, whose encoder it is.",
}


def wanted_rows(only):
    """The rows of some groups or of some names, the base first."""
    if not only:
        return [row for row in ROWS.values() if not row.online]
    rows = [BASE]
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
    wanted = wanted_rows(arguments.only)
    for seed in arguments.seeds:
        base = base_settings(arguments, seed, device)
        bed = Testbed(arguments.work, base, device)
        missing = {row.name: settings_of(row, base) for row in wanted}
        # At another preset a row may be the base itself.
        missing = {n: s for n, s in missing.items() if n == "base" or s != base}
        missing = {n: s for n, s in missing.items() if not cells.read(n, s, bed.origin)}
        if teacher := cells.read("teacher", base, bed.origin):
            bed.check_teacher(teacher, missing)
        else:
            cells.write("teacher", base, bed, [bed.teacher_row()], 0)
        for name, settings in missing.items():
            print(f"{name}, seed {seed}", flush=True)
            try:
                rows, seconds = bed.add(settings)
                cells.write(name, settings, bed, rows, seconds)
            except NotFinite as error:  # the other rows can be done all the same
                print(f"  {error.cause}", flush=True)
                cells.write(name, settings, bed, [], 0, error=error.cause)


def read_all(cells, base):
    """{row's name: {seed: (its cell, its teacher's)}} of whatever cells there are."""
    found = {name: {} for name in ROWS}
    for seed, teacher in cells.teachers(base).items():
        for name, row in ROWS.items():
            settings = settings_of(row, with_seed(base, seed))
            if cell := cells.read(name, settings, origin_of(teacher)):
                found[name][seed] = cell, teacher
    return found


def collect(found, name, steps, metric):
    """{seed: value} of a row in that many steps, without the seeds whose training failed; found is
    read_all's. Distances are multiples of that seed's teacher's."""
    values = {}
    for seed, (cell, teacher) in found[name].items():
        for row in cell["rows"]:
            if row["steps"] == steps:
                unit = teacher["rows"][0]["fd"] if metric == "fd" else 1
                values[seed] = row[metric] / unit
    return values


def failures(found):
    """Sentences on the trainings that did not come to their end."""
    sentences = []
    for name, by_seed in found.items():
        seeds = [str(seed) for seed, (cell, _) in by_seed.items() if not cell["rows"]]
        if seeds:
            sentences.append(f"`{name}` diverged on seed {', '.join(seeds)}.")
    return sentences


def title_of(row):
    """Its group's letter and title, and its own text."""
    if row == BASE:
        return row.text
    letter, title = next((k, title) for k, (title, rows) in GROUPS.items() if row in rows)
    return f"{letter}) {title}: {row.text}"


def table(found):
    """Lines of the Markdown table."""
    head = ["", "seeds"]
    for steps in STEPS:
        label = f"{steps} step{'s' * (steps > 1)}"
        head += [f"distance, {label}, ×", "over the base's", "precision", "recall", "accuracy"]
    lines = []
    for row in ROWS.values():
        if seeds := collect(found, row.name, 1, "fd"):
            text = "**the base**" if row == BASE else f"{title_of(row)} (`{row.name}`)"
            line = [text, ", ".join(map(str, seeds))]
            for steps in STEPS:
                distance, *others = (collect(found, row.name, steps, f) for f in METRICS)
                usual = collect(found, BASE.name, steps, "fd") if row != BASE else {}
                line += [show(distance), quotient(distance, usual), *map(show, others)]
            lines.append(line)
    return markdown.table(head, lines)


def judge(claims, found, head):
    """Lines of a table of claims."""
    lines = []
    for claim in claims:
        names = claim.better, claim.worse
        better, worse = (collect(found, name, claim.steps, "fd") for name in names)
        if seeds := better.keys() & worse.keys():
            ours = ", ".join(
                f"`{name}` {show({seed: values[seed] for seed in seeds})}"
                for name, values in zip(names, (better, worse), strict=True)
            )
            others = [
                difference(*(collect(found, name, claim.steps, metric) for name in names))
                for metric in ("precision", "accuracy")
            ]
            lines.append([claim.text, ours, verdict(better, worse), *others])
    head = [head, "here: distance, ×", "verdict", "precision, difference", "accuracy, difference"]
    return markdown.table(head, lines)


def draw(path, found):
    """Plot each row's one-step distance over the base's: a dot for each seed, a bar at their
    geometric mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    usual = collect(found, BASE.name, 1, "fd")
    lines = [
        (title_of(row), log_ratios(collect(found, row.name, 1, "fd"), usual))
        for row in ROWS.values()
        if row != BASE
    ]
    lines = [(text, values) for text, values in lines if values][::-1]
    figure, axes = pyplot.subplots(figsize=(9, 0.8 + 0.25 * len(lines)), layout="constrained")
    axes.axvline(1, color="lightgrey")
    for i, (_, values) in enumerate(lines):
        axes.plot([math.exp(x) for x in values], [i] * len(values), ".", color="C0")
        axes.plot([math.exp(statistics.mean(values))], [i], "|", color="C3", markersize=10)
    axes.set_yticks(range(len(lines)), [text for text, _ in lines])
    axes.set(xscale="log", xlabel="Fréchet distance in one step over the base's, same seed")
    axes.set_ylim(-0.6, len(lines) - 0.4)
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write_page(out, cells, base, arguments, command):
    """OUT.md and OUT.png from whatever cells there are."""
    teachers, found = cells.teachers(base), read_all(cells, base)
    commits, machines = sources(cell for by_seed in found.values() for cell, _ in by_seed.values())
    seeds = ", ".join(map(str, teachers))
    fd, precision, recall, accuracy = (
        show({seed: cell["rows"][0][name] for seed, cell in teachers.items()}) for name in METRICS
    )
    remarks = [text for name, text in REMARKS.items() if collect(found, name, 1, "fd")]
    remarks += failures(found)
    lines = [
        f"# Table 1 on {base.dataset}",
        "",
        f"`{command}` · seeds {seeds} · {base.distil_steps} ADD iterations a cell · {machines} · "
        f"commit {commits}",
        "",
        "Every row is one change from the base: toy/run.py with "
        f"`--features {base.features} --distil-steps {base.distil_steps}`. An F that is trained "
        f"has {base.features_steps} iterations. Mean ± standard deviation over the row's "
        f"seeds. Distances are multiples of the teacher's in {base.eval_steps[-1]} steps, which is "
        f"{fd} (precision {precision}, recall {recall}, accuracy {accuracy}). *Over the base's* "
        "divides the row's distance by the base's, seed by seed: the geometric mean and its "
        "95 % interval, bold if 1 lies outside.",
        "",
        *table(found),
        "",
        f"![one-step distances over the base's]({out.name}.png)",
        "",
        *([" ".join(remarks), ""] if remarks else []),
        "## What the paper concludes",
        "",
        "Rows of the same seed share their teacher and data, so they are compared seed by seed. A "
        "claim *holds*, or *does not hold*, if a t test on the logarithms of the ratios of the "
        "distances says so at 95 %; otherwise it is *within noise*. The last two columns are the "
        "first row's precision and accuracy minus the second's, ± the 95 % margin; a difference "
        "beyond it is bold. Of so many claims one may hold, or not, by chance. The paper's "
        "numbers are FID and CLIP score on COCO, of one training each.",
        "",
        *judge(PAPER, found, "the paper"),
        "",
    ]
    asserted = judge(DESIGN, found, "assertion")
    if len(asserted) > 2:  # more than a head
        lines += ["## What it asserts without numbers", "", *asserted, ""]
    write_text(out.with_suffix(".md"), "\n".join(lines))
    draw(out.with_suffix(".png"), found)


def main(argv=None):
    """Exit codes as in toy/run.py."""
    only = f"groups ({', '.join(GROUPS)}) or rows; the base is always among them"
    changes = CELL | {"features_steps": 600}  # enough for a ViT; the kept cells'
    parser = make_parser("toy/ablate.py", __doc__, "0,1,2", only, changes)
    return run_program(parser, "ablation", argv, run_cells, write_page)


if __name__ == "__main__":
    sys.exit(main())
