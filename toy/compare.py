"""The paper's Table 2 and Figure 7 at toy scale: ADD, other ways to few steps, and the teacher's
fast samplers, on one teacher a seed: python toy/compare.py --dataset glyphs

Each rival (toy/rivals/) has the student's network, data and batch size, and as many steps as fit
into the time of ADD's iterations with the teacher's encoder as F: the pace of both is measured side
by side. Each method's learning
rate, ADD's too, is the best of three or four on seed 0, by the geometric mean of its distances. The
table shows other seeds.

A finished training is kept as a small file and not done again. Stop with Ctrl-C at any time: the
same command continues, and a rival that was stopped begins anew. Writes OUT/compare-DATASET.md and
.png, and the cells, in OUT/compare-DATASET/. Once --seeds 0 has found the learning rates, two seeds
can be run at once: --seeds 1 in one terminal, --seeds 2 in another.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # see toy/run.py

import dataclasses
import gc
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from add import ddim
from common import timing
from toy.compare_page import write_page
from toy.distil import Distillation
from toy.loop import NotFinite, run_loop
from toy.methods import (
    METHODS,
    TUNING_SEED,
    VERSION,
    best_rate,
    cell_name,
    find,
    settings_of,
    tuning_cells,
    wanted_methods,
)
from toy.rivals.pairs import SHARE, draw_pairs
from toy.samplers import dpm_solver
from toy.testbed import Testbed, base_settings, clean, make_parser, run_program

SAMPLERS = {"DDIM": ddim, "DPM-Solver++(2M)": dpm_solver}  # of the teacher
TEACHER_STEPS = (50, 25, 8, 4, 1)
TRIAL_STEPS, WARM_UP = 24, 4  # of each phase, for a rival's pace; and how many are not counted


# Training =========================================================================================


def paces(steps, phases, device, clock=time.perf_counter):
    """Mean seconds of a call of each step(i), i being the iteration's number. They are called in
    turn, so that a slow moment of the machine slows all of them.

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


def train_rival(rival, stage, teacher, lr, guidance, step_of_add, clock=time.perf_counter):
    """(the finished training, seconds that it took, its number of steps). It takes the time of
    ADD's iterations; the pace of both is measured before, on copies that are thrown away.
    step_of_add() makes ADD's step, a function of the iteration's number."""
    clean(stage)  # an unfinished training had another number of steps
    iterations, spent, pairs = stage.settings.distil_steps, 0.0, {}
    add_step = step_of_add()
    if rival.PAIRS:
        (pace,) = paces([add_step], 1, stage.device, clock)
        began, seconds = clock(), SHARE * iterations * pace
        pairs["pairs"] = draw_pairs(stage, teacher, guidance, seconds, clock)
        spent = clock() - began
    trial = rival(stage, teacher, lr, TRIAL_STEPS * rival.PHASES, guidance, **pairs)
    add_pace, pace = paces([add_step, trial.step], rival.PHASES, stage.device, clock)
    del trial, add_step  # a GPU's memory need not hold them
    gc.collect()  # a training refers to itself
    steps = max(rival.PHASES, round((iterations * add_pace - spent) / pace))
    training = rival(stage, teacher, lr, steps, guidance, **pairs)
    spent += run_loop(stage, rival.TITLE, {}, training.step, steps)
    training.finish()
    return training, spent, steps


def score_teacher(cells, bed):
    """The cell of the teacher's samplers."""
    base = bed.settings
    print(f"teacher, seed {base.seed}", flush=True)
    teacher, scorer = bed.teacher(base), bed.scorer
    guidance = scorer.guided(teacher)[2]
    rows = [
        scorer.teacher(teacher, steps, guidance, name, sampler)
        for name, sampler in SAMPLERS.items()
        for steps in TEACHER_STEPS
    ]
    cells.write("teacher", base, bed, rows, 0)


def train_and_score_rival(bed, method, lr, guidance):
    """(rows, seconds of training, what else its cell keeps)."""
    base = bed.settings
    folder = bed.folder / cell_name(method, lr)
    stage = dataclasses.replace(bed.stage("distil", base), folder=folder)

    def step_of_add():
        return Distillation(*bed.ingredients(base)).step

    try:
        training, seconds, steps = train_rival(
            method.rival, stage, bed.teacher(base), lr, guidance, step_of_add
        )
    finally:
        clean(stage)
    rows = [bed.scorer.sampled(training.sample, k, method.title) for k in method.steps]
    pairs = {"pairs": len(training.pairs.noise)} if method.rival.PAIRS else {}
    return rows, seconds, {"steps": steps} | pairs


def run_cell(cells, bed, method, lr):
    """Train and score a method at a learning rate, and keep its cell. One that diverges leaves a
    cell without rows, which says why."""
    base, settings = bed.settings, settings_of(method, lr, bed.settings)
    print(f"{method.title}, learning rate {lr:g}, seed {base.seed}", flush=True)
    try:
        if method.rival:
            guidance = cells.read("teacher", base)["rows"][0]["guidance"]
            rows, seconds, more = train_and_score_rival(bed, method, lr, guidance)
        else:
            rows, seconds = bed.add(settings, method.steps)
            more = {"steps": settings.distil_steps}
    except (NotFinite, FloatingPointError) as error:  # the latter: in the trial
        cause = getattr(error, "cause", str(error))
        print(f"  {cause}", flush=True)
        rows, seconds, more = [], 0, {"error": cause}
    more |= {"learning_rate": lr, "version": VERSION}
    cells.write(cell_name(method, lr), settings, bed, rows, seconds, **more)


def run_cells(arguments, cells, device):
    """Every missing cell: the learning rates on TUNING_SEED, then the best one on each seed."""
    wanted = wanted_methods(arguments.only)
    for seed in dict.fromkeys([TUNING_SEED, *arguments.seeds]):
        base = base_settings(arguments, seed, device)
        bed = Testbed(arguments.work, base, device)
        if seed == TUNING_SEED:
            tasks = [(method, lr) for method in wanted for lr in method.rates]
        else:
            tasks = [(method, best_rate(tuning_cells(cells, method, base))) for method in wanted]
        missing = [
            (method, lr)
            for method, lr in tasks
            if lr is not None and find(cells, method, lr, base, bed.origin) is None
        ]
        if teacher := cells.read("teacher", base, bed.origin):
            bed.check_teacher(teacher, missing)
        else:
            score_teacher(cells, bed)
        for method, lr in missing:
            run_cell(cells, bed, method, lr)


def main(argv=None):
    """Exit codes as in toy/run.py."""
    only = f"methods ({', '.join(METHODS)}); ADD is always among them"
    parser = make_parser("toy/compare.py", __doc__, "1,2,3", only)
    return run_program(parser, "compare", argv, run_cells, write_page)


if __name__ == "__main__":
    sys.exit(main())
