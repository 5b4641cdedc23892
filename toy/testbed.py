"""What ablate.py and compare.py share: the data, metric network and teachers of a seed, trained
once; cells, each one training's figures in a small file; means and spreads of seeds.
"""

import dataclasses
import json
import math
import shutil
import statistics
from functools import cached_property
from pathlib import Path

from add import Student
from common import timing
from common.checkpoints import write_text
from toy import data as datasets
from toy.distil import distil
from toy.evaluate import Scorer
from toy.features import TeacherEncoder, make_features
from toy.loop import Stage
from toy.metrics import train_metric_net
from toy.report import commit
from toy.settings import stage_key
from toy.teacher import make_teacher

STEPS = (1, 4)  # at which a student is scored
FIGURES = ("fd", "precision", "recall", "accuracy")  # of the tables


class Testbed:
    """One data set and seed, at settings that run.resolve has seen. Whatever is trained lies in a
    folder that its settings name, so that no cell trains a network that another one has trained."""

    def __init__(self, folder, settings, device):
        self.settings, self.device = settings, device
        self.data = datasets.load(
            settings.dataset, Path(settings.data_dir), seed=settings.seed, size=settings.size,
            limit=settings.limit or None,
        )  # fmt: skip
        datasets.check_classes(self.data)
        self.folder = folder / f"{self.data.kind}-seed{settings.seed}"

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

    def add(self, **changes):
        """(figures of the student at STEPS, seconds of training, stage) of an ADD training whose
        settings differ from the testbed's by the changes."""
        settings = dataclasses.replace(self.settings, **changes)
        teacher, other = self.teacher(settings), settings.for_second_teacher
        second = self.teacher(other) if other else None
        features, _ = make_features(self.stage("features", settings))
        stage = self.stage("distil", settings)
        features = features or TeacherEncoder(teacher, settings.seed)
        student, seconds = distil(stage, teacher, features, second)
        # A student of one timestep is sampled at the others, too.
        student = Student(student.denoiser, self.settings.distil_timesteps)
        return [self.scorer.student(student, k) for k in STEPS], seconds, stage

    def of_the_teacher(self):
        """The teacher's row at most steps and best guidance."""
        teacher = self.teacher(self.settings)
        guidance = self.scorer.guided(teacher)[2]
        return self.scorer.teacher(teacher, self.settings.eval_steps[-1], guidance)


class Cells:
    """Finished cells in a folder, one JSON each: results/ablation-glyphs/ROW-seed0.json."""

    def __init__(self, folder):
        self.folder = folder

    def _path(self, row, seed):
        return self.folder / f"{row}-seed{seed}.json"

    def seeds(self, row):
        """The seeds of which there is a cell, of whatever settings."""
        found = self.folder.glob(f"{row}-seed*.json")
        return sorted(int(path.stem.rpartition("-seed")[2]) for path in found)

    def read(self, row, settings, fingerprint=None):
        """The cell of these settings, their seed among them, and of data with that fingerprint
        (None: any); None if there is none. ValueError if the file is no cell."""
        path = self._path(row, settings.seed)
        if not path.exists():
            return None
        try:
            cell = json.loads(path.read_text())
            fits = cell["settings"] == stored_settings(settings)
            fits &= fingerprint in (None, cell["data"])
            return cell if fits and cell["rows"] else None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: no cell of this version; remove it") from error

    def write(self, row, settings, bed, rows, seconds):
        """Keep a cell: the rows are a Scorer's."""
        cell = {
            "row": row,
            "commit": commit(),
            "machine": timing.machine(bed.device),
            "data": bed.data.fingerprint,
            "seconds": round(seconds, 1),
            "settings": stored_settings(settings),
            "rows": rows,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self._path(row, settings.seed), json.dumps(cell, indent=1) + "\n")


def stored_settings(settings):
    """As JSON gives them back, without where the data lie."""
    values = json.loads(json.dumps(dataclasses.asdict(settings)))
    return {name: value for name, value in values.items() if name != "data_dir"}


def clean(stage):
    """Remove a finished training's folder; its figures are kept."""
    shutil.rmtree(stage.folder, ignore_errors=True)


# Means, spreads, and when two means differ ========================================================

# 97.5 % quantiles of Student's t, by degrees of freedom.
STUDENT_T = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306}


def mean_and_spread(values):
    """(mean, standard deviation) of some numbers; of one: (it, nan)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def verdict(better, worse):
    """ "holds" if `better` is below `worse` by more than noise, "does not hold" if it is above by
    more than that, "within noise" in between, "too few seeds" if they share less than two.

    Both are {seed: figure > 0}. A seed's rows share their teacher and data, so they are compared in
    pairs: a t test on the logarithms of the ratios, at 95 %.
    """
    ratios = [math.log(worse[seed] / better[seed]) for seed in better.keys() & worse.keys()]
    n = len(ratios)
    if n < 2:
        return "too few seeds"
    noise = STUDENT_T.get(n - 1, 2.262) * statistics.stdev(ratios) / math.sqrt(n)
    if abs(statistics.mean(ratios)) <= noise:
        return "within noise"
    return "holds" if statistics.mean(ratios) > 0 else "does not hold"
