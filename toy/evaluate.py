"""Scores the teacher and the student, and times them; report.py shows what comes out."""

import time

import torch

from add import ddim
from common.timing import synchronize
from toy.data import to_float, to_uint8
from toy.metrics import embed, frechet_distance, measure
from toy.report import best_teacher
from toy.samplers import (
    balanced_labels,
    dpm_solver,
    noise_for,
    sample_in_batches,
    sample_student,
    sample_teacher,
)

SOLVER_STEPS = 10  # of DPM-Solver++, about as good as 50 of DDIM


class Scorer:
    """Draws eval_images images of a model from seeded noise, in equal numbers of each class, and
    measures them against the test images."""

    def __init__(self, data, settings, metric_net, device):
        self.data, self.settings, self.device = data, settings, device
        self.metric_net, n = metric_net, settings.eval_images
        self.labels = balanced_labels(n, len(data.classes), device)
        self.noise = noise_for(n, data.train_images.shape[1:], settings.seed_of("noise"), device)
        test = to_float(data.test_images)
        self.test_features, predicted = embed(metric_net, test, device)
        self.accuracy = (predicted == data.test_labels).float().mean().item()

    def _row(self, name, steps, guidance, evaluations, draw):
        synchronize(self.device)
        began = time.time()
        images = draw()
        synchronize(self.device)
        seconds = time.time() - began
        metrics = self._measure(images.cpu(), self.labels.cpu())
        asked = f"{name}, {steps} steps, guidance {guidance:g}"
        print(f"  {asked}: distance {metrics['fd']:.2f}", flush=True)
        return metrics | {
            "name": name,
            "steps": steps,
            "guidance": guidance,
            "evaluations": evaluations,
            "images_per_second": len(images) / seconds,
        }

    def _measure(self, images, labels):
        return measure(self.metric_net, images, labels, self.test_features, self.device)

    def real(self):
        """The row of as many training images."""
        n = self.settings.eval_images
        images, labels = to_float(self.data.train_images[:n]), self.data.train_labels[:n]
        unasked = dict.fromkeys(("steps", "guidance", "evaluations"))
        return self._measure(images, labels) | {"name": "real training images"} | unasked

    def floor(self):
        """The distance of all training images, below which no sampler can be expected."""
        features = embed(self.metric_net, to_float(self.data.train_images), self.device)[0]
        return frechet_distance(features, self.test_features)

    def teacher(self, teacher, steps, guidance, name="teacher", sampler=ddim):
        """A row of the teacher."""

        def draw():
            return sample_teacher(teacher, self.noise, self.labels, steps, guidance, sampler)

        return self._row(name, steps, guidance, steps * (2 if guidance != 1 else 1), draw)

    def guided(self, teacher):
        """(rows at the search's steps, one for each of eval_guidances, those steps, and the
        guidance with the least distance)."""
        settings, best = self.settings, self.settings.eval_steps[-1]
        search = best
        if len(settings.eval_guidances) > 1:
            search = min(settings.eval_search_steps or best, best)
        rows = [self.teacher(teacher, search, g) for g in settings.eval_guidances]
        return rows, search, min(rows, key=lambda r: r["fd"])["guidance"]

    def sampled(self, sample, steps, name):
        """A row of sample(noise, labels, steps, generator=…), which evaluates a network once a
        step."""
        seed = self.settings.seed_of("steps")

        def draw():
            with torch.no_grad():
                return sample_in_batches(sample, self.noise, self.labels, steps, seed)

        return self._row(name, steps, 1.0, steps, draw)

    def student(self, student, steps, name="ADD student"):
        """A row of a student."""
        return self.sampled(student.sample, steps, name)


def evaluate(data, settings, metric_net, teacher, started, student, device, fid=None):
    """{"real": row, "teacher": [rows], "student": [rows], …}: every number of the report, each from
    eval_images images.

    The teacher's guidance is the one of eval_guidances with the least distance at
    eval_search_steps. "solver" is a row of the teacher with a faster sampler. With fid (load_fid)
    the student's rows, and the teacher's that it is compared with, have "fid" as well.
    """
    scorer = Scorer(data, settings, metric_net, device)
    rows, search, guidance = scorer.guided(teacher)
    others = [steps for steps in settings.eval_steps if steps != search]
    rows += [scorer.teacher(teacher, steps, guidance) for steps in others]
    rows.sort(key=lambda r: (r["steps"], r["guidance"]))
    solver = min(SOLVER_STEPS, settings.eval_steps[-1])
    counts = sorted({k for k in (1, 2, 4) if k <= len(student.timesteps)})
    results = {
        "n": settings.eval_images,
        "test_images": len(data.test_images),
        "conditional": settings.conditional,
        "colour": data.train_images.shape[1] == 3,
        "metric_accuracy": scorer.accuracy,
        "floor": scorer.floor(),
        "real": scorer.real(),
        "best_guidance": guidance,
        "search_steps": search,
        "teacher": rows,
        "solver": scorer.teacher(teacher, solver, guidance, "teacher, DPM-Solver++", dpm_solver),
        "started": [scorer.student(started, k, "student before ADD") for k in counts],
        "student": [scorer.student(student, k) for k in counts],
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
    noise = noise_for(n, shape, settings.seed_of("fid"), device)

    def update(images, real):
        for chunk in images.split(100):
            fid.update(chunk.expand(-1, 3, -1, -1).to(device), real=real)

    update(data.train_images, real=True)
    best = best_teacher(results)
    for row in (best, *results["student"]):
        if row is best:
            images = sample_teacher(teacher, noise, labels, row["steps"], row["guidance"])
        else:
            images = sample_student(student, noise, labels, row["steps"], settings.seed_of("steps"))
        fid.reset()
        update(to_uint8(images), real=False)
        row["fid"] = float(fid.compute())
        print(f"  {row['name']}, {row['steps']} steps: FID {row['fid']:.2f}", flush=True)
