"""What ablate.py, compare.py and time_to_quality.py share: the data, metric network and teachers of
a seed, trained once; cells, each one training's metrics in a small file; means and spreads of
seeds.
"""

import argparse
import dataclasses
import json
import math
import shlex
import shutil
import statistics
import sys
from functools import cached_property
from pathlib import Path

import torch

from add import Student
from common.checkpoints import write_text
from common.origin import commit, machine
from toy.distil import distil
from toy.evaluate import Scorer
from toy.features import make_features
from toy.loop import NotFinite, Stage
from toy.metrics import STUDENT_T, train_metric_net
from toy.program import exit_code, load_data, pick_device, resolve, set_threads
from toy.settings import DATASETS, PRESETS, Settings, stage_key
from toy.teacher import make_teacher

STEPS = (1, 4)  # at which a student is scored
METRICS = ("fd", "precision", "recall", "accuracy")  # of the tables
# What a cell of Tables 1 and 2 has in the place of toy/run.py's own settings: a short training, and
# the F that was the default when the kept cells were made.
CELL = dict(features="teacher", distil_steps=800, distil_ema=4_000)


class Testbed:
    """One data set and seed; the settings have been through program.resolve. Each network lies in a
    folder named by the settings that it depends on, so cells with the same teacher share it."""

    def __init__(self, folder, settings, device):
        self.settings, self.device = settings, device
        self.data = load_data(settings)
        self.folder = folder / f"{self.data.kind}-seed{settings.seed}"

    @property
    def origin(self):
        """What the cells of a seed have in common: see Cells.read."""
        return self.data.fingerprint, self.settings.precision

    def stage(self, name, settings):
        """The stage of that name, in a folder of its own."""
        key = stage_key(settings, name, self.data.fingerprint)
        return Stage(self.folder / f"{name}-{key}", self.data, settings, self.device, key)

    @cached_property
    def scorer(self):
        """Measures images of this data set."""
        metric_net, _ = train_metric_net(self.stage("metric", self.settings))
        return Scorer(self.data, self.settings, metric_net, self.device)

    def teacher(self, settings):
        """The frozen Denoiser of these settings."""
        return make_teacher(self.stage("teacher", settings))[0]

    def ingredients(self, settings):
        """What Distillation and distil() take for the ADD training of these settings."""
        teacher, other = self.teacher(settings), settings.for_second_teacher
        second = self.teacher(other) if other else None
        features, _ = make_features(self.stage("features", settings))
        return self.stage("distil", settings), teacher, features, second

    def add(self, settings, counts=STEPS):
        """(metrics of the student at these numbers of steps, seconds of training, F's among them)
        of the ADD training of these settings. Its folder is removed, also after NotFinite: what it
        could be resumed from would fail again."""
        stage, *ingredients = self.ingredients(settings)
        try:
            student, seconds = distil(stage, *ingredients)
        except NotFinite:
            clean(stage)
            raise
        # A student of one timestep is sampled at the others, too.
        student = Student(student.denoiser, self.settings.distil_timesteps)
        rows = [self.scorer.student(student, k) for k in counts]
        clean(stage)
        return rows, seconds + make_features(self.stage("features", settings))[1]

    def check_teacher(self, cell, missing):
        """ValueError if the missing cells would get another teacher than the stored one. Where
        --work lacks the teacher it is trained again, and only the same machine reproduces it."""
        stage = self.stage("teacher", self.settings)
        if not missing or (stage.folder / "checkpoint.pt").exists():
            return
        row = cell["rows"][0]
        again = self.scorer.teacher(self.teacher(self.settings), row["steps"], row["guidance"])
        if again["fd"] != row["fd"]:
            clean(stage)
            raise ValueError(
                f"--out: its cells of seed {self.settings.seed} are of another teacher (distance "
                f"{row['fd']:.2f}; trained here: {again['fd']:.2f}); name another folder, or the "
                "--work with their networks"
            )

    def teacher_row(self):
        """The teacher's row at most steps and best guidance."""
        teacher, most = self.teacher(self.settings), self.settings.eval_steps[-1]
        rows, steps, guidance = self.scorer.guided(teacher)
        if steps == most:  # then it has been measured
            return next(row for row in rows if row["guidance"] == guidance)
        return self.scorer.teacher(teacher, most, guidance)


class Cells:
    """Finished cells in a folder, one JSON each: results/ablation-glyphs/ROW-seed0.json."""

    def __init__(self, folder):
        self.folder = folder

    def _path(self, name, seed):
        return self.folder / f"{name}-seed{seed}.json"

    def read(self, name, settings, origin=None):
        """The cell of these settings, their seed among them; None if there is none. ValueError if
        the file is no cell.

        An origin, (fingerprint of the data, precision), must be the cell's. Both differ between
        machines (glyphs in single bits). All cells of a seed have the origin of its teacher's, but
        a page may show seeds of several machines.
        """
        path = self._path(name, settings.seed)
        if not path.exists():
            return None
        try:
            cell = json.loads(path.read_text())
            own, asked = cell["settings"], stored_settings(settings)
            fits = that_matter(own | {"precision": settings.precision}) == that_matter(asked)
            fits &= origin in (None, origin_of(cell))
            return cell if fits and isinstance(cell["rows"], list) else None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: no cell of this version; remove it") from error

    def teachers(self, base):
        """{seed: the teacher's cell} of whatever seeds of these settings. ValueError if there is
        none."""
        seeds = [p.stem.rpartition("-seed")[2] for p in self.folder.glob("teacher-seed*.json")]
        seeds = sorted(int(seed) for seed in seeds if seed.isdecimal())
        found = {seed: self.read("teacher", with_seed(base, seed)) for seed in seeds}
        found = {seed: cell for seed, cell in found.items() if cell}
        if not found:
            raise ValueError(f"{self.folder}: no cells of these settings; leave out --page")
        return found

    def write(self, name, settings, bed, rows, seconds, **more):
        """Keep a cell: the rows are a Scorer's."""
        cell = {
            "row": name,
            "commit": commit(),
            "machine": machine(bed.device),
            "data": bed.data.fingerprint,
            "seconds": round(seconds, 1),
            "settings": stored_settings(settings),
            "rows": rows,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self._path(name, settings.seed), json.dumps(cell | more, indent=1) + "\n")


def origin_of(cell):
    """(fingerprint of its data, its precision)."""
    return cell["data"], cell["settings"]["precision"]


def stored_settings(settings):
    """As JSON gives them back, without where the data lie."""
    values = json.loads(json.dumps(dataclasses.asdict(settings)))
    return {name: value for name, value in values.items() if name != "data_dir"}


def that_matter(stored):
    """Of stored settings: without those of a trained F where F is the teacher's encoder."""
    trained = stored["features"] != "teacher"
    return {k: v for k, v in stored.items() if trained or not k.startswith("features_")}


def clean(stage):
    """Remove a training's folder, finished or not."""
    shutil.rmtree(stage.folder, ignore_errors=True)


# Means, spreads, and when two means differ ========================================================


def mean_and_spread(values):
    """(mean, standard deviation) of some numbers; of one: (it, nan)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def mean_and_noise(values):
    """(mean, half of its 95 % confidence interval, by Student's t) of at least two numbers."""
    mean, spread = mean_and_spread(values)
    return mean, STUDENT_T[min(len(values) - 1, max(STUDENT_T))] * spread / math.sqrt(len(values))


def show(values, digits=2):
    """Mean ± standard deviation of {seed: value}, as a table's cell."""
    if not values:
        return ""
    mean, spread = mean_and_spread(list(values.values()))
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if len(values) > 1 else "")


def verdict(better, worse):
    """ "holds" if `better` is below `worse` by more than noise, "does not hold" if it is above by
    more than that, "within noise" in between, "too few seeds" if they share less than two.

    Both are {seed: value > 0}. A seed's rows share their teacher and data, so they are compared in
    pairs: a t test on the logarithms of the ratios, at 95 %.
    """
    ratios = log_ratios(worse, better)
    if len(ratios) < 2:
        return "too few seeds"
    mean, noise = mean_and_noise(ratios)
    if abs(mean) <= noise:
        return "within noise"
    return "holds" if mean > 0 else "does not hold"


def log_ratios(x, y):
    """log(x / y) for the seeds that both {seed: value > 0} have."""
    return [math.log(x[seed] / y[seed]) for seed in x.keys() & y.keys()]


def quotient(x, y):
    """Geometric mean of x / y over the seeds that both {seed: value > 0} have, and its 95 %
    interval; bold if 1 lies outside of that. A table's cell."""
    exp = math.exp
    return bold_beyond_noise(
        log_ratios(x, y),
        lambda ratio: f"{exp(ratio):.2f}",
        lambda mean, noise: f"{exp(mean):.2f} ({exp(mean - noise):.2f} to {exp(mean + noise):.2f})",
    )


def difference(x, y):
    """Mean of x - y over the seeds that both {seed: value} have, and its noise; bold if it is
    larger than that. A table's cell."""
    return bold_beyond_noise(
        [x[seed] - y[seed] for seed in x.keys() & y.keys()],
        lambda change: f"{change:+.2f}",
        lambda mean, noise: f"{mean:+.2f} ± {noise:.2f}",
    )


def bold_beyond_noise(values, show_one, show_mean):
    """A table's cell: show_one(the only value), or show_mean(mean, noise), bold where the mean is
    larger than its noise."""
    if len(values) < 2:
        return show_one(values[0]) if values else ""
    mean, noise = mean_and_noise(values)
    text = show_mean(mean, noise)
    return f"**{text}**" if abs(mean) > noise else text


def sources(cells):
    """(commits, machines with their precision) of some cells or Nones, each one string."""
    cells = [cell for cell in cells if cell]
    commits = {cell["commit"] for cell in cells}
    machines = {f"{cell['machine']}, {cell['settings']['precision']}" for cell in cells}
    return ", ".join(sorted(commits)), "; ".join(sorted(machines))


# The command lines ================================================================================


def numbers(text):
    """0,1,2 → [0, 1, 2]."""
    values = [int(n) for n in text.split(",")]
    if min(values) < 0:
        raise argparse.ArgumentTypeError(f"{text}: seeds start at 0")
    return values


def make_parser(prog, description, seeds, only="", changes=CELL):
    """The flags that the programs have; `seeds` is the default, as it is typed, `only` says what
    --only takes (there is none without it), and `changes` are settings that replace toy/run.py's,
    unless the preset names its own."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = DATASETS[1:]  # a page has one name
    parser.add_argument("--dataset", choices=kinds, default="glyphs", help="default: glyphs")
    parser.add_argument("--data-dir", default="data", help="where the data set is (default: data)")
    parser.add_argument(
        "--seeds", type=numbers, default=numbers(seeds), metavar="N,…", help=f"default: {seeds}"
    )
    if only:
        parser.add_argument(
            "--only", type=lambda text: text.split(","), default=[], metavar="NAME,…", help=only
        )
    usual = Settings(**changes).distil_steps
    iterations = f"ADD iterations of a cell (default: {usual}, or the preset's)"
    parser.add_argument("--budget", type=int, default=0, help=iterations)
    parser.set_defaults(changes=changes)
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        default="cpu",
        help="settings besides those that the program changes (default: cpu)",
    )
    parser.add_argument(
        "--limit", type=int, default=0, help="use at most so many training and so many test images"
    )
    parser.add_argument("--device", help="cuda, mps or cpu; default: the first available")
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's choice")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/testbed"),
        help="folder of trained networks (default: runs/testbed); two programs on one seed need "
        "one each",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("results"),
        help="folder of pages and cells (default: results)",
    )
    parser.add_argument(
        "--page", action="store_true", help="train nothing: write the page from the finished cells"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def run_program(parser, page, argv, run_cells, write_page):
    """Unless --page is given, call run_cells(arguments, cells, device) to make the missing cells;
    then call write_page(out, cells, base, arguments, command) and print the page's path.

    The page is OUT/PAGE-DATASET.md, its cells are in a folder of that name, `base` is
    base_settings of the first seed. Returns the exit code, as in toy/run.py.
    """
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(argv)

    def work():
        if arguments.budget < 0:
            raise ValueError(f"--budget {arguments.budget}: must be at least 1")
        set_threads(arguments.threads)
        torch.backends.cudnn.benchmark = True  # as toy/run.py has it
        device = pick_device(arguments.device)
        out = arguments.out / f"{page}-{arguments.dataset}"
        cells = Cells(out)
        if not arguments.page:
            run_cells(arguments, cells, device)
        base = base_settings(arguments, arguments.seeds[0], device)
        command = ["python", parser.prog, *(x for x in map(str, argv) if x != "--page")]
        write_page(out, cells, base, arguments, shlex.join(command))
        print(out.with_suffix(".md"))

    return exit_code(parser.prog, work, arguments.debug)


def base_settings(arguments, seed, device):
    """toy/run.py's settings with the program's changes, the preset and --budget."""
    usual = Settings(**arguments.changes | PRESETS[arguments.preset])
    budget = arguments.budget or usual.distil_steps
    settings = dataclasses.replace(
        usual,
        dataset=arguments.dataset,
        data_dir=arguments.data_dir,
        limit=arguments.limit or usual.limit,
        seed=seed,
        distil_steps=budget,
        # The average's memory is the same share of the training.
        distil_ema=max(1, usual.distil_ema * budget // usual.distil_steps),
    )
    return resolve(settings, arguments.dataset, device)


def with_seed(base, seed):
    """The same settings for another seed."""
    return dataclasses.replace(base, seed=seed)
