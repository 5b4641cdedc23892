"""The paper's Table 2 and Figure 7 at toy scale: ADD, other ways to few steps, and the teacher's
fast samplers, on one teacher a seed: python toy/compare.py --dataset glyphs

Each rival (toy/rivals/) has the student's network, data and batch size, and as many steps as take
the time of ADD's: the pace of both is measured side by side. Each method's learning rate, ADD's
too, is the best of three on seed 0, by the geometric mean of its distances. What the table shows
are other seeds.

A finished training is kept as a small file and not done again. Stop with Ctrl-C at any time: the
same command goes on, and a rival that was stopped begins anew. Writes OUT/compare-DATASET.md and
.png, and the files beside them. Once --seeds 0 has found the learning rates, two seeds can be run
at once: --seeds 1 in one terminal, --seeds 2 in another. The files do not tell what code a rival
had: remove its own after changing it.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # see toy/run.py

import dataclasses
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from add import ddim
from common import markdown, timing
from common.checkpoints import write_text
from toy.distil import prepare
from toy.loop import TrainingError, run_loop
from toy.rivals.consistency import Consistency
from toy.rivals.dmd2 import DMD2
from toy.rivals.pairs import SHARE, draw_pairs
from toy.rivals.progressive import Progressive
from toy.rivals.reflow import Reflow
from toy.rivals.regression import Regression
from toy.rivals.ufogen import UFOGen
from toy.samplers import dpm_solver
from toy.testbed import (
    FIGURES,
    Testbed,
    base_settings,
    clean,
    make_parser,
    of_seed,
    run_program,
    show,
    sources,
    verdict,
)

TUNING_SEED = 0
SAMPLERS = {"DDIM": ddim, "DPM-Solver++(2M)": dpm_solver}  # of the teacher
TEACHER_STEPS = (50, 25, 8, 4, 1)
TRIAL_STEPS, WARM_UP = 24, 4  # of each phase, for a rival's pace; and how many are not counted


@dataclass(frozen=True)
class Method:
    """A way to train a student: a rival, or ADD with changed settings."""

    name: str  # of its files, and for --only
    title: str
    steps: tuple
    rates: tuple  # learning rates to choose from
    rival: type | None = None
    settings: dict = field(default_factory=dict)


def of_rival(name, rival):
    """The Method of a subclass of toy.rivals.training.Training."""
    return Method(name, rival.TITLE, rival.STEPS, rival.LEARNING_RATES, rival)


ADD = Method("add", "ADD", (1, 2, 4), (1e-4, 3e-4, 1e-3))
COUNTED = {1: "one step", 2: "two steps", 4: "four steps"}
METHODS = {
    method.name: method
    for method in (
        ADD,
        # In the place of StyleGAN-T++: ADD's discriminator, and no diffusion model to start from.
        Method(
            "adversarial",
            "adversarial only, random start",
            (1,),
            (1e-4, 3e-4, 1e-3),
            settings=dict(distil_lambda=0.0, distil_init="random"),
        ),
        of_rival("consistency", Consistency),
        of_rival("dmd2", DMD2),
        of_rival("progressive", Progressive),
        of_rival("reflow", Reflow),
        of_rival("regression", Regression),
        of_rival("ufogen", UFOGen),
    )
}


def wanted_methods(only):
    """ADD, and the methods of these names, or all. ValueError for an unknown one."""
    for name in only:
        if name not in METHODS:
            raise ValueError(f"--only {name}: no such method; choose from {', '.join(METHODS)}")
    return [m for m in METHODS.values() if not only or m is ADD or m.name in only]


# Training =========================================================================================


def paces(steps, phases, device, clock=time.perf_counter):
    """Mean seconds of a call of each of these functions of an iteration's number, which are called
    in turn: what slows the machine for a while slows all of them.

    There are TRIAL_STEPS rounds a phase; the first WARM_UP of each do not count.
    """
    seconds = [0.0] * len(steps)
    for i in range(TRIAL_STEPS * phases):
        for k, step in enumerate(steps):
            timing.synchronize(device)
            began = clock()
            step(i)
            timing.synchronize(device)
            if i % TRIAL_STEPS >= WARM_UP:
                seconds[k] += clock() - began
    return [total / (TRIAL_STEPS - WARM_UP) / phases for total in seconds]


def train_rival(rival, stage, teacher, lr, guidance, add_step, clock=time.perf_counter):
    """(the finished training, seconds that it took, its number of steps). It takes the time of
    ADD's iterations; the pace of both is measured before, on copies that are thrown away."""
    clean(stage)  # an unfinished training had another number of steps
    iterations, spent, pairs = stage.settings.distil_steps, 0.0, {}
    if rival.PAIRS:
        (pace,) = paces([add_step], 1, stage.device, clock)
        began, seconds = clock(), SHARE * iterations * pace
        pairs["pairs"] = draw_pairs(stage, teacher, guidance, seconds, clock)
        spent = clock() - began
    trial = rival(stage, teacher, lr, TRIAL_STEPS * rival.PHASES, guidance, **pairs)
    add_pace, pace = paces([add_step, trial.step], rival.PHASES, stage.device, clock)
    del trial  # a GPU's memory need not hold two
    steps = max(rival.PHASES, round((iterations * add_pace - spent) / pace))
    training = rival(stage, teacher, lr, steps, guidance, **pairs)
    spent += run_loop(stage, rival.TITLE, {}, training.step, steps)
    training.finish()
    return training, spent, steps


# Cells: one training of one method, learning rate and seed ========================================


def settings_of(method, lr, base):
    """The settings of a method's cell. A rival has its own learning rate in the cell's name."""
    changes = {} if method.rival else method.settings | {"distil_student_lr": lr}
    return dataclasses.replace(base, **changes)


def cell_name(method, lr):
    """dmd2-0.0001"""
    return f"{method.name}-{lr:g}"


def find(cells, method, lr, base, fingerprint=None):
    """The stored cell of these settings (and of this machine: see Cells.read) that has the method's
    numbers of steps, or none because the training failed; else None."""
    cell = cells.read(cell_name(method, lr), settings_of(method, lr, base), fingerprint)
    fits = cell and [row["steps"] for row in cell["rows"]] in ([], list(method.steps))
    return cell if fits else None


def best_rate(cells, method, base):
    """The learning rate with the least distance on TUNING_SEED, the geometric mean over the
    method's numbers of steps; None if no training came to its end."""
    tuning, distances = of_seed(base, TUNING_SEED), {}
    for lr in method.rates:
        cell = find(cells, method, lr, tuning)
        if cell and cell["rows"]:
            distances[lr] = statistics.geometric_mean(row["fd"] for row in cell["rows"])
    return min(distances, key=distances.get) if distances else None


def score_teacher(cells, bed):
    """Measure the teacher's samplers, unless there is their cell."""
    base = bed.settings
    if cells.read("teacher", base, bed.data.fingerprint):
        return
    print(f"teacher, seed {base.seed}", flush=True)
    teacher, scorer = bed.teacher(base), bed.scorer
    guidance = scorer.guided(teacher)[2]
    rows = [
        scorer.teacher(teacher, steps, guidance, name, sampler)
        for name, sampler in SAMPLERS.items()
        for steps in TEACHER_STEPS
    ]
    cells.write("teacher", base, bed, rows, 0)


def of_a_rival(bed, method, lr, guidance):
    """(rows, seconds of training, what else its cell keeps)."""
    base = bed.settings
    folder = bed.folder / cell_name(method, lr)
    stage = dataclasses.replace(bed.stage("distil", base), folder=folder)
    add_step = prepare(*bed.ingredients(base))[2]
    training, seconds, steps = train_rival(
        method.rival, stage, bed.teacher(base), lr, guidance, add_step
    )
    rows = [bed.scorer.sampled(training.sample, k, method.title) for k in method.steps]
    clean(stage)
    pairs = {"pairs": len(training.pairs.noise)} if method.rival.PAIRS else {}
    return rows, seconds, {"steps": steps} | pairs


def run_cell(cells, bed, method, lr):
    """Train, score and keep one. A training that stops at infinite numbers leaves a cell without
    rows, which says why."""
    base, settings = bed.settings, settings_of(method, lr, bed.settings)
    print(f"{method.title}, learning rate {lr:g}, seed {base.seed}", flush=True)
    try:
        if method.rival:
            guidance = cells.read("teacher", base)["rows"][0]["guidance"]
            rows, seconds, more = of_a_rival(bed, method, lr, guidance)
        else:
            rows, seconds = bed.add(settings, method.steps)
            more = {"steps": settings.distil_steps}
    except (TrainingError, FloatingPointError) as error:  # the latter: in the trial
        print(f"  {error}", flush=True)
        rows, seconds, more = [], 0, {"error": str(error)}
    more["learning_rate"] = lr
    cells.write(cell_name(method, lr), settings, bed, rows, seconds, **more)


def run_cells(arguments, cells, device):
    """Every missing cell: the learning rates on TUNING_SEED, then the best one on each seed."""
    wanted = wanted_methods(arguments.only)
    for seed in dict.fromkeys([TUNING_SEED, *arguments.seeds]):
        base = base_settings(arguments, seed, device)
        bed = Testbed(arguments.work, base, device)
        score_teacher(cells, bed)
        for method in wanted:
            rates = method.rates
            if seed != TUNING_SEED:
                rates = [lr for lr in (best_rate(cells, method, base),) if lr is not None]
            for lr in rates:
                if find(cells, method, lr, base, bed.data.fingerprint) is None:
                    run_cell(cells, bed, method, lr)


# The page =========================================================================================


@dataclass
class Line:
    """A line of the table; figures and minutes are by seed."""

    method: str
    steps: int
    figures: dict  # of FIGURES, and milliseconds; distances are multiples of the teacher's in 50
    minutes: dict
    lr: float | None


def seconds_per_evaluation(rows):
    """Of one image, from all rows of a teacher. All networks of the table are as large, and one
    row's own time would be mostly noise."""
    seconds = sum(1 / row["images_per_second"] for row in rows)
    return seconds / sum(row["evaluations"] for row in rows)


def lines_of(cells, rates, base, seeds):
    """[Line] of whatever cells there are, in the order of the methods' names; rates is {method's
    name: its learning rate or None}."""
    lines, bases = [], [of_seed(base, seed) for seed in seeds]
    found = {b.seed: cells.read("teacher", b) for b in bases}
    teachers = {seed: cell["rows"] for seed, cell in found.items() if cell}
    pace = {seed: seconds_per_evaluation(rows) for seed, rows in teachers.items()}

    def add(name, steps, rows, minutes, lr):
        """rows: {seed: row}."""
        figures = {f: {seed: row[f] for seed, row in rows.items()} for f in FIGURES}
        figures["fd"] = {seed: row["fd"] / teachers[seed][0]["fd"] for seed, row in rows.items()}
        figures["milliseconds"] = {
            seed: 1000 * row["evaluations"] * pace[seed] for seed, row in rows.items()
        }
        lines.append(Line(name, steps, figures, minutes, lr))

    if teachers:
        for row in next(iter(teachers.values())):
            same = ("name", "steps")
            rows = {
                seed: next(r for r in found if all(r[k] == row[k] for k in same))
                for seed, found in teachers.items()
            }
            add(f"teacher, {row['name']}", row["steps"], rows, {}, None)
    for name, lr in rates.items():
        method = METHODS[name]
        found = {b.seed: lr and find(cells, method, lr, b) for b in bases if b.seed in teachers}
        found = {seed: cell for seed, cell in found.items() if cell and cell["rows"]}
        for steps in method.steps if found else ():
            rows = {
                seed: next(row for row in cell["rows"] if row["steps"] == steps)
                for seed, cell in found.items()
            }
            minutes = {seed: cell["seconds"] / 60 for seed, cell in found.items()}
            add(method.title, steps, rows, minutes, lr)
    return sorted(lines, key=lambda line: (line.method.lower(), -line.steps))


def contested(lines):
    """ADD's numbers of steps that another method has, too."""
    mine = [line.steps for line in lines if line.method == ADD.title]
    return [steps for steps in ADD.steps if steps in mine and len(ranked(lines, steps)) > 1]


def mean(values):
    """Of {seed: figure}."""
    return statistics.mean(values.values())


def ranked(lines, steps):
    """The lines of so many steps, the least distance first."""
    lines = [line for line in lines if line.steps == steps]
    return sorted(lines, key=lambda line: mean(line.figures["fd"]))


def conclusion(lines, steps):
    """Sentences: who is best in one of the contested numbers of steps, and how ADD compares, or
    the second if ADD is the best."""
    first, *others = ranked(lines, steps)
    other = next((line for line in others if line.method == ADD.title), others[0])
    better, worse = first.figures["fd"], other.figures["fd"]
    noise = {
        "holds": "The difference is more than noise.",
        "does not hold": "Most seeds say the opposite, beyond noise.",
        "within noise": "The difference is within noise.",
        "too few seeds": "One seed cannot tell whether that is noise.",
    }
    distances = f"{show(better)}; {other.method} {show(worse)}"
    text = f"In {COUNTED[steps]} {first.method} has the shortest distance ({distances})."
    return f"{text} {noise[verdict(better, worse)]}"


def table(lines, contests):
    """Lines of the Markdown table. The best rows of the contested numbers of steps are bold."""
    head = ["", "steps", "ms an image", "distance, ×", "precision", "recall", "accuracy"]
    head += ["training, minutes", "learning rate", "seeds"]
    best, rows = [ranked(lines, steps)[0] for steps in contests], []
    for line in lines:
        figures = [show(line.figures[f]) for f in FIGURES]
        lr = "" if line.lr is None else f"{line.lr:g}"
        milliseconds = show(line.figures["milliseconds"], 3)
        row = [line.method, line.steps, milliseconds, *figures, show(line.minutes), lr]
        row += [len(line.figures["fd"])]
        rows.append([f"**{cell}**" if line in best and cell != "" else cell for cell in row])
    return markdown.table(head, rows)


def draw(path, lines):
    """Distance over milliseconds an image, a line and a marker for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for i, name in enumerate(dict.fromkeys(line.method for line in lines)):
        mine = [line for line in lines if line.method == name]
        x, y = ([mean(line.figures[f]) for line in mine] for f in ("milliseconds", "fd"))
        axes.plot(x, y, marker="osD^vPX*<>"[i % 10], color=f"C{i % 10}", linewidth=1, label=name)
        for line, *where in zip(mine, x, y, strict=True):
            offset = dict(xytext=(4, 4), textcoords="offset points", fontsize=7)
            axes.annotate(str(line.steps), where, **offset)
    axes.set(xscale="log", yscale="log", xlabel="milliseconds an image (numbers: steps)")
    axes.set_ylabel(f"Fréchet distance, × the teacher's in {TEACHER_STEPS[0]} steps")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def at_the_edges(rates):
    """Sentences on the methods whose learning rate is the smallest or the largest of their own."""
    sentences = []
    for edge, i in (("smallest", 0), ("largest", -1)):
        names = [METHODS[name].title for name, lr in rates.items() if lr == METHODS[name].rates[i]]
        if names:
            sentences.append(f"The {edge} of its three rates was the best of {', '.join(names)}.")
    return sentences + ["A wider search may bring these closer."] if sentences else []


def write_page(out, cells, base, arguments, command):
    """OUT.md and OUT.png from whatever cells there are, of all seeds but the one that chose the
    learning rates, unless it is the only one."""
    methods, tuning = wanted_methods(arguments.only), of_seed(base, TUNING_SEED)
    rates = {method.name: best_rate(cells, method, base) for method in methods}
    bases = [of_seed(base, seed) for seed in cells.seeds("teacher")]
    there = [b.seed for b in bases if cells.read("teacher", b)]
    seeds = [seed for seed in there if seed != TUNING_SEED] or there
    lines = lines_of(cells, rates, base, seeds)
    contests = contested(lines)
    read = [find(cells, m, lr, tuning) for m in methods for lr in m.rates]
    read += [find(cells, m, rates[m.name], b) for m in methods for b in bases if rates[m.name]]
    commits, machines = sources([*read, *(cells.read("teacher", b) for b in bases)])
    failed = [m.title for m in methods if rates[m.name] is None]
    page = [
        f"# Table 2 on {base.dataset}",
        "",
        f"`{command}` · {base.distil_steps} ADD iterations · {machines} · commit {commits}",
        "",
        f"Mean ± standard deviation over {'seeds' if len(seeds) > 1 else 'seed'} "
        f"{', '.join(map(str, seeds))}. Distances are multiples of that seed's teacher's in "
        f"{TEACHER_STEPS[0]} DDIM steps. The teacher has its best guidance. Milliseconds are the "
        "evaluations of the network times the mean time of one.",
        "",
        *(f"- {conclusion(lines, steps)}" for steps in contests),
        *([f"- No training of {', '.join(failed)} came to its end."] if failed else []),
        "",
        "All methods have the same teacher, data, batch and size of network. A rival takes the "
        "time of ADD's iterations, by the pace of both side by side, and the drawing of pairs "
        "from the teacher counts. Without distillation there are as many iterations as ADD's. Each "
        f"method's learning rate is the best of its own three on seed {TUNING_SEED}, by the "
        "geometric mean of its distances. "
        f"{' '.join(at_the_edges(rates))} ADD's other settings come from earlier trials "
        "(toy/experiments.md), some on these seeds; those of the rivals from their papers. ADD, "
        "DMD2 and UFOGen use the teacher without guidance, the others with it. The best of many "
        "rows is tested as if it had been the only one.",
        "",
        *table(lines, contests),
        "",
        f"![distance over time an image]({out.name}.png)",
        "",
    ]
    write_text(out.with_suffix(".md"), "\n".join(page))
    draw(out.with_suffix(".png"), lines)


def main(argv=None):
    """Exit codes as of toy/run.py."""
    only = f"methods ({', '.join(METHODS)}); ADD is always among them"
    parser = make_parser("toy/compare.py", __doc__, "1,2,3", only)
    return run_program(parser, "compare", argv, run_cells, write_page)


if __name__ == "__main__":
    sys.exit(main())
