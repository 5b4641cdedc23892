"""The methods of Table 2, and how their finished trainings are found: a cell for each method,
learning rate and seed.
"""

import dataclasses
import statistics
from dataclasses import dataclass, field

from toy.rivals.consistency import Consistency
from toy.rivals.dmd2 import DMD2
from toy.rivals.progressive import Progressive
from toy.rivals.reflow import Reflow
from toy.rivals.regression import Regression
from toy.rivals.ufogen import UFOGen
from toy.settings import Settings
from toy.testbed import origin_of, with_seed

TUNING_SEED = 0  # on which a learning rate is chosen
VERSION = 2  # of the rivals' code: raise it when that changes, and older cells are made anew


@dataclass(frozen=True)
class Method:
    """A way to train a student: a rival, or ADD with changed settings."""

    name: str  # of its files, and for --only
    title: str
    steps: tuple
    rates: tuple  # learning rates to choose from
    rival: type | None = None
    settings: dict = field(default_factory=dict)


def rival_method(name, rival):
    """The Method of a subclass of toy.rivals.training.Training."""
    return Method(name, rival.TITLE, rival.STEPS, rival.LEARNING_RATES, rival)


ADD = Method(
    "add",
    "ADD",
    (1, 2, 4),
    (3e-5, 1e-4, 3e-4),
    settings=dict(features=Settings.features),
)
METHODS = {
    method.name: method
    for method in (
        ADD,
        Method(
            "add-encoder",
            "ADD, F the teacher's encoder",
            ADD.steps,
            (*ADD.rates, 1e-3),
            settings=dict(features="teacher"),
        ),
        # In the place of StyleGAN-T++: a discriminator, and no diffusion model to start from.
        Method(
            "adversarial",
            "adversarial only, random start",
            (1,),
            (1e-4, 3e-4, 1e-3),
            # It is scored in one step, so it is trained on pure noise alone, where c_img is zero.
            # Its F is the base's.
            settings=dict(
                distil_lambda=0.0,
                distil_init="random",
                distil_timesteps=(999,),
                distil_c_img=False,
            ),
        ),
        rival_method("consistency", Consistency),
        rival_method("dmd2", DMD2),
        rival_method("progressive", Progressive),
        rival_method("reflow", Reflow),
        rival_method("regression", Regression),
        rival_method("ufogen", UFOGen),
    )
}


def wanted_methods(only):
    """ADD, and the methods of these names, or all. ValueError for an unknown one."""
    for name in only:
        if name not in METHODS:
            raise ValueError(f"--only {name}: no such method; choose from {', '.join(METHODS)}")
    return [m for m in METHODS.values() if not only or m is ADD or m.name in only]


# Cells ============================================================================================


def settings_of(method, lr, base):
    """The settings of a method's cell. A rival has its own learning rate in the cell's name."""
    changes = {} if method.rival else method.settings | {"distil_student_lr": lr}
    return dataclasses.replace(base, **changes)


def cell_name(method, lr):
    """dmd2-0.0001"""
    return f"{method.name}-{lr:g}"


def find(cells, method, lr, base, origin):
    """The stored cell of these settings and origin (see Cells.read), or None. It must have the
    method's numbers of steps, or no rows (the training failed); a rival's must be of VERSION."""
    cell = cells.read(cell_name(method, lr), settings_of(method, lr, base), origin)
    fits = cell and [row["steps"] for row in cell["rows"]] in ([], list(method.steps))
    if fits and method.rival:
        fits = cell.get("version") == VERSION
    return cell if fits else None


def tuning_cells(cells, method, base):
    """{learning rate: its cell on TUNING_SEED, or None}."""
    tuning = with_seed(base, TUNING_SEED)
    teacher = cells.read("teacher", tuning)
    return {
        lr: teacher and find(cells, method, lr, tuning, origin_of(teacher)) for lr in method.rates
    }


def best_rate(tried):
    """The learning rate with the least distance, the geometric mean over the method's numbers of
    steps, of {learning rate: cell or None}. None if one has not been tried, or all failed."""
    distances = {
        lr: statistics.geometric_mean(row["fd"] for row in cell["rows"])
        for lr, cell in tried.items()
        if cell and cell["rows"]
    }
    return min(distances, key=distances.get) if distances and all(tried.values()) else None
