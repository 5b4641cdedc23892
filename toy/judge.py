"""Score a finished run again, in the features of other networks:
python toy/judge.py --run runs/auto-cpu

A student may be close to the test images in one network's features only. The judges here are of
other kinds than the run's metric network: three ViTs, trained on the run's training images as a
classifier, by DINO and as a denoiser; the teacher's encoder; and coarse pixels. The ViTs are kept
in RUN/judges for the next time. Writes RUN/judges.json and prints a table.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # see toy/run.py

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import markdown
from common.checkpoints import write_text
from common.origin import commit, machine
from toy.data import to_float
from toy.features import TeacherEncoder, make_features
from toy.finished import check_whole, load_results, load_settings, load_student, load_teacher
from toy.loop import Stage
from toy.metrics import closeness
from toy.networks import has_bf16
from toy.program import exit_code, load_data, pick_device, set_threads
from toy.report import best_teacher
from toy.samplers import balanced_labels, noise_for, sample_student, sample_teacher
from toy.settings import COUNT, stage_key

VITS = {
    "classifier": "a classifying ViT",
    "dino": "a ViT trained by DINO",
    "denoiser": "a denoising ViT",
}
METRIC_NETWORK = "the run's metric network"
ENCODER = "the teacher's encoder"
COARSE = 4  # side, in pixels, of the squares that the last judge averages
FRESH = 1000  # added to the run's seed, so that no ViT is the F that the student was trained with


def parse_arguments(argv):
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="toy/judge.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished toy/run.py")
    parser.add_argument(
        "--iterations", type=int, default=600, help="training steps of each ViT (default: 600)"
    )
    parser.add_argument("--device", help="cuda, mps or cpu; default: the first available")
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's choice")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


@torch.no_grad()
def embed(judge, images, device):
    """Embeddings (N, D), on the CPU, of images (N, C, H, W)."""
    return torch.cat([judge(chunk.to(device)).cpu() for chunk in images.split(250)])


def make_judges(run, iterations, data, settings, teacher, device):
    """{name: a function from images (B, C, H, W) to embeddings (B, D)}."""
    judges, seed = {}, (settings.seed + FRESH) % 2**31
    for kind, name in VITS.items():
        changes = dict(features=kind, features_steps=iterations, seed=seed)
        own = dataclasses.replace(settings, **changes)
        print(f"judge: {name}", flush=True)
        key = stage_key(own, "features", data.fingerprint)
        network, _ = make_features(Stage(run / "judges" / kind, data, own, device, key))
        judges[name] = network.summary
    itself = " (this run's F)" if settings.features == "teacher" else ""
    judges[ENCODER + itself] = TeacherEncoder(teacher, 0).summary

    def coarse(images):
        return functional.avg_pool2d(images, COARSE).flatten(1)

    return judges | {f"pixels, averaged over {COARSE}×{COARSE}": coarse}


def draw(student, teacher, data, settings, results):
    """(the teacher's images at its most steps and best guidance, {steps: the student's}), from the
    noise of the run's own evaluation."""
    device, n = teacher.schedule.alpha.device, results["n"]
    noise = noise_for(n, data.train_images.shape[1:], settings.seed_of("noise"), device)
    labels = balanced_labels(n, len(data.classes), device)
    best, seed = best_teacher(results), settings.seed_of("steps")
    print(f"drawing {n} images of the teacher in {best['steps']} steps", flush=True)
    by_teacher = sample_teacher(teacher, noise, labels, best["steps"], best["guidance"])
    counts = [row["steps"] for row in results["student"]]
    return by_teacher, {k: sample_student(student, noise, labels, k, seed) for k in counts}


def by_the_metric_network(results):
    """What the run's own evaluation measured, as the judges' scores are kept."""
    return {
        "teacher": best_teacher(results),
        "student": results["student"],
        "real": results["real"],
    }


def table(judged):
    """Lines of a Markdown table, from {judge: its scores}."""
    rows = []
    for judge, scores in judged.items():
        teacher, students = scores["teacher"], scores["student"]
        row = [judge, f"{teacher['fd']:.3g}"]
        row += [f"{it['fd'] / teacher['fd']:.2f}" for it in (*students, scores["real"])]
        row += [f"{teacher[k]:.2f}, {students[0][k]:.2f}" for k in ("precision", "recall")]
        rows.append(row)
    counts = [row["steps"] for row in judged[METRIC_NETWORK]["student"]]
    steps = [f"student, {k} step{'s' * (k > 1)}, ×" for k in counts]
    head = ["features", "teacher's distance", *steps, "training images, ×"]
    head += ["precision: teacher, 1 step", "recall: teacher, 1 step"]
    return markdown.table(head, rows)


def load(run, device):
    """(settings, data, student, teacher, results, their key) of a finished run, on the device.
    TrainingError if they do not belong together."""
    settings, (results, key) = load_settings(run), load_results(run)
    student, *_ = load_student(run)
    teacher, data = load_teacher(run, student), load_data(settings)
    check_whole(run, data.fingerprint)
    for network in (student.denoiser.network, teacher.network):  # emulated, it would be slow
        network.bf16 = settings.precision == "bf16" and has_bf16(device)
    return settings, data, student.to(device), teacher.to(device), results, key


def score_run(arguments):
    """Score the run with every judge; write and print the table."""
    most = COUNT[1]
    if not 1 <= arguments.iterations <= most:
        raise ValueError(f"--iterations {arguments.iterations}: must be from 1 to {most}")
    run, device = arguments.run, pick_device(arguments.device)
    set_threads(arguments.threads)
    settings, data, student, teacher, results, key = load(run, device)
    judges = make_judges(run, arguments.iterations, data, settings, teacher, device)
    by_teacher, by_student = draw(student, teacher, data, settings, results)
    real = to_float(data.train_images[: results["n"]])
    test = to_float(data.test_images)

    def scores(judge):
        features = embed(judge, test, device)
        teachers, *students, reals = (
            closeness(embed(judge, images, device), features)
            for images in (by_teacher, *by_student.values(), real)
        )
        students = [{"steps": k} | row for k, row in zip(by_student, students, strict=True)]
        return {"teacher": teachers, "student": students, "real": reals}

    judged = {METRIC_NETWORK: by_the_metric_network(results)}
    judged |= {name: scores(judge) for name, judge in judges.items()}
    origin = {"key": key, "commit": commit(), "machine": machine(device)}
    origin["iterations"] = arguments.iterations
    write_text(run / "judges.json", json.dumps(origin | {"judges": judged}, indent=1) + "\n")
    print("\n".join(["", *table(judged), "", str(run / "judges.json")]))


def main(argv=None):
    """Exit codes as in toy/run.py."""
    arguments = parse_arguments(argv)
    return exit_code("toy/judge.py", lambda: score_run(arguments), arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
