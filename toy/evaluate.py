"""Scores the teacher and the student, and times them; report.py shows what comes out."""

import time

import torch

from add import ddim
from toy.data import to_float
from toy.metrics import embed, frechet_distance, measure
from toy.samplers import balanced_labels, dpm_solver, noise_for, sample_student, sample_teacher

SOLVER_STEPS = 10  # of DPM-Solver++, about as good as 50 of DDIM


def synchronize(device):
    """Wait for a GPU, so that a clock read next means something."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def evaluate(data, settings, metric_net, teacher, started, student, device):
    """{"real": row, "teacher": [rows], "student": [rows], …}: every figure of the report, from
    settings.eval_images images each. The teacher's guidance is the one of settings.eval_guidances
    with the least distance at eval_search_steps; its last row is a faster sampler's.
    """
    n, shape = settings.eval_images, data.train_images.shape[1:]
    labels, noise = (
        balanced_labels(n, len(data.classes), device),
        noise_for(n, shape, settings.seed + 5, device),
    )
    test = to_float(data.test_images)
    test_features, predicted = embed(metric_net, test, device)

    def row(name, steps, guidance, draw, evaluations):
        synchronize(device)
        began = time.time()
        images = draw()
        synchronize(device)
        seconds = time.time() - began
        figures = measure(metric_net, images.cpu(), labels.cpu(), test, test_features, device)
        print(
            f"  {name}, {steps} steps, guidance {guidance:g}: distance {figures['fd']:.2f}",
            flush=True,
        )
        return figures | {
            "name": name,
            "steps": steps,
            "guidance": guidance,
            "evaluations": evaluations,
            "images_per_second": n / seconds,
        }

    def teacher_row(steps, guidance, name="teacher", sampler=ddim):
        evaluations = steps * (2 if guidance != 1 else 1)
        return row(
            name,
            steps,
            guidance,
            lambda: sample_teacher(teacher, noise, labels, steps, guidance, sampler),
            evaluations,
        )

    best = settings.eval_steps[-1]
    search = (
        min(settings.eval_search_steps or best, best) if len(settings.eval_guidances) > 1 else best
    )
    candidates = [teacher_row(search, g) for g in settings.eval_guidances]
    guidance = min(candidates, key=lambda r: r["fd"])["guidance"]
    teacher_rows = candidates + [
        teacher_row(steps, guidance) for steps in settings.eval_steps if steps != search
    ]
    teacher_rows.sort(key=lambda r: (r["steps"], r["guidance"]))

    counts = sorted({k for k in (1, 2, 4) if k <= len(student.timesteps)})

    def student_rows(name, network):
        return [
            row(
                name,
                k,
                1.0,
                lambda k=k: sample_student(network, noise, labels, k, settings.seed + 6),
                k,
            )
            for k in counts
        ]

    train, train_labels = to_float(data.train_images[:n]), data.train_labels[:n]
    every_train = embed(metric_net, to_float(data.train_images), device)[0]
    real = measure(metric_net, train, train_labels, test, test_features, device)
    return {
        "n": n,
        "test_images": len(test),
        "metric_accuracy": (predicted == data.test_labels).float().mean().item(),
        "floor": frechet_distance(
            every_train, test_features
        ),  # all training images: what no sampler can be below
        "real": real
        | {"name": "real training images", "steps": None, "guidance": None, "evaluations": None},
        "best_guidance": guidance,
        "search_steps": search,
        "teacher": teacher_rows,
        "solver": teacher_row(
            min(SOLVER_STEPS, best), guidance, "teacher, DPM-Solver++", dpm_solver
        ),
        "started": student_rows("student before ADD", started),
        "student": student_rows("ADD student", student),
    }
