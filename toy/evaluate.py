"""Scores the teacher and the student, and times them; report.py shows what comes out."""

import time
from functools import partial

from add import ddim
from common.timing import synchronize
from toy.data import to_float, to_uint8
from toy.metrics import embed, frechet_distance, measure
from toy.report import best_teacher
from toy.samplers import balanced_labels, dpm_solver, noise_for, sample_student, sample_teacher

SOLVER_STEPS = 10  # of DPM-Solver++, about as good as 50 of DDIM


def evaluate(data, settings, metric_net, teacher, started, student, device, fid=None):
    """{"real": row, "teacher": [rows], "student": [rows], …}: every figure of the report, each from
    eval_images images.

    The teacher's guidance is the one of eval_guidances with the least distance at
    eval_search_steps. "solver" is a row of the teacher with a faster sampler. With fid (load_fid)
    the student's rows, and the one that it is held against, have "fid" as well.
    """
    n, shape = settings.eval_images, data.train_images.shape[1:]
    labels = balanced_labels(n, len(data.classes), device)
    noise = noise_for(n, shape, settings.seed + 5, device)
    test = to_float(data.test_images)
    test_features, predicted = embed(metric_net, test, device)

    def row(name, steps, guidance, draw, evaluations):
        synchronize(device)
        began = time.time()
        images = draw()
        synchronize(device)
        seconds = time.time() - began
        figures = measure(metric_net, images.cpu(), labels.cpu(), test_features, device)
        asked = f"{name}, {steps} steps, guidance {guidance:g}"
        print(f"  {asked}: distance {figures['fd']:.2f}", flush=True)
        return figures | {
            "name": name,
            "steps": steps,
            "guidance": guidance,
            "evaluations": evaluations,
            "images_per_second": n / seconds,
        }

    def teacher_row(steps, guidance, name="teacher", sampler=ddim):
        def draw():
            return sample_teacher(teacher, noise, labels, steps, guidance, sampler)

        return row(name, steps, guidance, draw, evaluations=steps * (2 if guidance != 1 else 1))

    best = settings.eval_steps[-1]
    search = best
    if len(settings.eval_guidances) > 1:
        search = min(settings.eval_search_steps or best, best)
    candidates = [teacher_row(search, g) for g in settings.eval_guidances]
    guidance = min(candidates, key=lambda r: r["fd"])["guidance"]
    others = [steps for steps in settings.eval_steps if steps != search]
    teacher_rows = candidates + [teacher_row(steps, guidance) for steps in others]
    teacher_rows.sort(key=lambda r: (r["steps"], r["guidance"]))
    solver_steps = min(SOLVER_STEPS, best)

    counts = sorted({k for k in (1, 2, 4) if k <= len(student.timesteps)})

    def student_rows(name, network):
        def draw(k):
            return sample_student(network, noise, labels, k, settings.seed + 6)

        return [row(name, k, 1.0, partial(draw, k), evaluations=k) for k in counts]

    train, train_labels = to_float(data.train_images[:n]), data.train_labels[:n]
    unasked = ("steps", "guidance", "evaluations")  # of real images
    every_train = embed(metric_net, to_float(data.train_images), device)[0]
    real = measure(metric_net, train, train_labels, test_features, device)
    results = {
        "n": n,
        "test_images": len(test),
        "conditional": settings.conditional,
        "metric_accuracy": (predicted == data.test_labels).float().mean().item(),
        "floor": frechet_distance(every_train, test_features),  # what no sampler can be below
        "real": real | {"name": "real training images"} | dict.fromkeys(unasked),
        "best_guidance": guidance,
        "search_steps": search,
        "teacher": teacher_rows,
        "solver": teacher_row(solver_steps, guidance, "teacher, DPM-Solver++", dpm_solver),
        "started": student_rows("student before ADD", started),
        "student": student_rows("ADD student", student),
    }
    if fid is not None:
        results["fid_images"] = settings.inception_images
        add_fid(fid, results, data, settings, teacher, student, device)
    return results


def add_fid(fid, results, data, settings, teacher, student, device):
    """Give the student's rows, and the teacher's at most steps and best guidance, their FID:
    inception_images generated images against all training images."""
    n, shape = settings.inception_images, data.train_images.shape[1:]
    labels = balanced_labels(n, len(data.classes), device)
    noise = noise_for(n, shape, settings.seed + 7, device)

    def update(images, real):
        for chunk in images.split(100):
            fid.update(chunk.expand(-1, 3, -1, -1).to(device), real=real)

    update(data.train_images, real=True)
    best = best_teacher(results)
    for row in (best, *results["student"]):
        if row is best:
            images = sample_teacher(teacher, noise, labels, row["steps"], row["guidance"])
        else:
            images = sample_student(student, noise, labels, row["steps"], settings.seed + 8)
        fid.reset()
        update(to_uint8(images), real=False)
        row["fid"] = float(fid.compute())
        print(f"  {row['name']}, {row['steps']} steps: FID {row['fid']:.2f}", flush=True)
