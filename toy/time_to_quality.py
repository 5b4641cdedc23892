"""How long ADD trains until one student step comes as close to the test images as 8, 25 and 50
steps of its teacher: python toy/time_to_quality.py --dataset glyphs

The clock stands still while the student is scored. A finished seed is kept as a small file and not
run again. Stop with Ctrl-C at any time: the same command continues. Writes
OUT/time-to-quality-DATASET.md and .png, and the seeds' files, in OUT/time-to-quality-DATASET/.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # see toy/run.py

import copy
import dataclasses
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import markdown, timing
from common.checkpoints import write_text
from toy.distil import Distillation
from toy.loop import run_loop
from toy.testbed import (
    Testbed,
    base_settings,
    clean,
    make_parser,
    origin_of,
    run_program,
    show,
    sources,
    with_seed,
)

TEACHER_STEPS = (8, 25, 50)
EVERY = 100


class Curve:
    """Scores of the student's moving average in the course of its training: what a checkpoint
    holds, so that a resumed run has all of them."""

    def __init__(self):
        self.rows, self.seconds = [], 0.0

    def state_dict(self):
        return {"rows": self.rows, "seconds": self.seconds}

    def load_state_dict(self, state):
        self.rows, self.seconds = state["rows"], state["seconds"]


def train(bed, every):
    """(Curve of an ADD training, its stage)."""
    stage, teacher, features, second = bed.ingredients(bed.settings)
    # Not the folder of the same training without scores: neither can resume the other.
    folder = stage.folder.with_name(f"curve-{every}-{stage.key}")
    stage = dataclasses.replace(stage, folder=folder)
    training = Distillation(stage, teacher, features, second)
    average, curve = copy.deepcopy(training.student).eval(), Curve()
    average.denoiser.network = training.ema.module.eval()
    steps = stage.settings.distil_steps

    def step(i):
        began = time.perf_counter()
        log = training.step(i)
        timing.synchronize(stage.device)
        curve.seconds += time.perf_counter() - began
        done = i + 1
        if done % every == 0 or done == steps:
            row = bed.scorer.student(average, 1)
            curve.rows.append({"iteration": done, "seconds": curve.seconds} | row)
        return log

    run_loop(stage, "ADD", training.parts | {"curve": curve}, step, steps)
    return curve, stage


def passed(rows, distance):
    """The first row from which on all are within that distance; None if the last is not."""
    last = next((i for i in reversed(range(len(rows))) if rows[i]["fd"] > distance), -1)
    return rows[last + 1] if last + 1 < len(rows) else None


def run_cells(arguments, cells, device):
    """Every missing seed."""
    if arguments.every < 1:
        raise ValueError(f"--every {arguments.every}: must be at least 1")
    for seed in arguments.seeds:
        base = base_settings(arguments, seed, device)
        bed = Testbed(arguments.work, base, device)
        curve = cells.read("curve", base, bed.origin)
        missing = not curve or curve.get("every", EVERY) != arguments.every
        if stored := cells.read("teacher", base, bed.origin):
            bed.check_teacher(stored, missing)
        else:
            teacher = bed.teacher(base)
            guidance = bed.scorer.guided(teacher)[2]
            rows = [bed.scorer.teacher(teacher, steps, guidance) for steps in TEACHER_STEPS]
            cells.write("teacher", base, bed, rows, 0)
        if missing:
            curve, stage = train(bed, arguments.every)
            cells.write("curve", base, bed, curve.rows, curve.seconds, every=arguments.every)
            clean(stage)


def table(teachers, curves):
    """Lines of the Markdown table, from {seed: rows} of both."""
    head = ["teacher's steps", "its distance", "seeds that pass it", "iterations", "minutes"]
    cells = []
    for i, steps in enumerate(TEACHER_STEPS):
        distances = {seed: rows[i]["fd"] for seed, rows in teachers.items()}
        at = {seed: passed(curves[seed], distance) for seed, distance in distances.items()}
        at = {seed: row for seed, row in at.items() if row}
        iterations = show({seed: row["iteration"] for seed, row in at.items()}, 0)
        minutes = show({seed: row["seconds"] / 60 for seed, row in at.items()}, 1)
        seeds = f"{len(at)} of {len(distances)}"
        cells.append([steps, show(distances), seeds, iterations or "–", minutes or "–"])
    return markdown.table(head, cells)


def draw(path, teachers, curves):
    """Each seed's distance over iterations, in multiples of its teacher's in 50 steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for i, (seed, rows) in enumerate(curves.items()):
        *fewer, most = (row["fd"] for row in teachers[seed])
        x, y = [row["iteration"] for row in rows], [row["fd"] / most for row in rows]
        axes.plot(x, y, marker=".", color=f"C{i}", label=f"student, 1 step, seed {seed}")
        for distance, style in zip(fewer, (":", "--"), strict=True):
            axes.axhline(distance / most, linestyle=style, linewidth=1, color=f"C{i}")
    axes.axhline(1, linewidth=1, color="grey")
    axes.set(xlabel="ADD iterations", yscale="log")
    axes.set_ylabel("Fréchet distance, × the teacher's in 50 steps")
    axes.legend(title="dotted: teacher, 8 steps; dashed: 25")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write_page(out, cells, base, arguments, command):
    """OUT.md and OUT.png."""
    found = cells.teachers(base)
    stored = {s: cells.read("curve", with_seed(base, s), origin_of(t)) for s, t in found.items()}
    stored = {seed: cell for seed, cell in stored.items() if cell}
    commits, machines = sources(stored.values())
    curves = {seed: cell["rows"] for seed, cell in stored.items()}
    teachers = {seed: found[seed]["rows"] for seed in curves}
    every = " or ".join(sorted({str(cell.get("every", EVERY)) for cell in stored.values()}))
    lines = [
        f"# Time to quality on {base.dataset}",
        "",
        f"`{command}` · seeds {', '.join(map(str, curves))} · {machines} · commit {commits}",
        "",
        f"How long ADD trains (`--features {base.features}`, {base.distil_steps} iterations in "
        f"all, scored every {every}) until one step of the student is, and stays, closer to the "
        "test images than the teacher at its best guidance.",
        "",
        *table(teachers, curves),
        "",
        f"![distance over iterations]({out.name}.png)",
        "",
    ]
    write_text(out.with_suffix(".md"), "\n".join(lines))
    draw(out.with_suffix(".png"), teachers, curves)


def main(argv=None):
    """Exit codes as in toy/run.py."""
    parser = make_parser("toy/time_to_quality.py", __doc__, "0,1,2", changes={})
    parser.add_argument(
        "--every", type=int, default=EVERY, help=f"iterations between scores (default: {EVERY})"
    )
    return run_program(parser, "time-to-quality", argv, run_cells, write_page)


if __name__ == "__main__":
    sys.exit(main())
