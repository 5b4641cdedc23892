"""How long ADD trains until one step of the student is as close to the test images as its teacher's
8, 25 and 50: python toy/time_to_quality.py --run runs/glyphs-cpu

Data, metric network, teacher and settings are those of a run of toy/run.py; flags of toy/run.py
that start with --distil change the training. The clock stands still while the student is scored.
Writes NAME.json, NAME.md and NAME.png.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # see toy/run.py

import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from add import Student
from common import timing
from common.checkpoints import CheckpointError, one_line, read_last
from common.flags import add_flags, from_dict
from toy import data as datasets
from toy.data import to_float
from toy.distil import prepare
from toy.features import TRAINED, TeacherEncoder, make_features
from toy.loop import Stage, TrainingError
from toy.metrics import embed, frechet_distance, train_metric_net
from toy.run import pick_device, set_threads
from toy.samplers import balanced_labels, noise_for, sample_student, sample_teacher
from toy.settings import Settings, stage_key
from toy.teacher import make_teacher

TEACHER_STEPS = (8, 25, 50)


class Run:
    """A run folder whose stages up to the teacher are done."""

    def __init__(self, folder, given, device):
        config = json.loads((folder / "config.json").read_text())["settings"]
        self.settings, self.device = from_dict(Settings, config | given), device
        s = self.settings
        self.data = datasets.load(
            s.dataset, s.data_dir, seed=s.seed, size=s.size, limit=s.limit or None
        )

        if s.distil_widths:
            raise ValueError(f"--run {folder}: its student has another size than its teacher")
        trained = ["metric", "teacher"]
        if s.features in TRAINED:
            trained.append("features")

        def stage(name):
            key = stage_key(s, name, self.data.fingerprint)
            if name in trained:  # or it would be trained anew, in that folder
                state = read_last(folder / name / "checkpoint.pt") or {}
                if state.get("key") != key or not state["finished"]:
                    raise ValueError(f"--run {folder}: {name} is unfinished, or of other data")
            return Stage(folder / name, self.data, s, device, key)

        features, _ = make_features(stage("features"))
        self.metric_net, _ = train_metric_net(stage("metric"))
        self.teacher, _ = make_teacher(stage("teacher"))
        self.features = features or TeacherEncoder(self.teacher, s.seed)
        self.stage = stage("distil")
        n = s.eval_images
        self.labels = balanced_labels(n, len(self.data.classes), device)
        self.noise = noise_for(n, self.data.train_images.shape[1:], s.seed + 5, device)
        test = to_float(self.data.test_images)
        self.test_features = embed(self.metric_net, test, device)[0]

    def distance(self, images):
        """The Fréchet distance of generated images."""
        features = embed(self.metric_net, images.cpu(), self.device)[0]
        return frechet_distance(features, self.test_features)

    def of_the_teacher(self):
        """{steps: distance} at the best of the guidances."""
        return {
            steps: min(
                self.distance(sample_teacher(self.teacher, self.noise, self.labels, steps, g))
                for g in self.settings.eval_guidances
            )
            for steps in TEACHER_STEPS
        }

    def train(self, every):
        """[(step, seconds, distance)] of the student's moving average in one step."""
        torch.manual_seed(self.settings.seed + 4)
        student, parts, step = prepare(self.stage, self.teacher, self.features)
        denoiser = student.denoiser
        rows, seconds = [], 0.0
        for done in range(1, self.settings.distil_steps + 1):
            began = time.perf_counter()
            step(done - 1)
            timing.synchronize(self.device)
            seconds += time.perf_counter() - began
            if done % every == 0 or done == self.settings.distil_steps:
                trained, denoiser.network = denoiser.network, parts["ema"].module
                average = Student(denoiser, student.timesteps).eval()
                seed = self.settings.seed + 6
                distance = self.distance(sample_student(average, self.noise, self.labels, 1, seed))
                denoiser.network = trained
                student.train()
                rows.append((done, seconds, distance))
                print(f"step {done}, {seconds:.0f} s: distance {distance:.2f}", flush=True)
        return rows


def passed(rows, goal):
    """(step, seconds) of the first row from which on every distance is at most the goal; None if
    there is none."""
    last = next((i for i in reversed(range(len(rows))) if rows[i][2] > goal), -1)
    return rows[last + 1][:2] if last + 1 < len(rows) else None


def draw(path, rows, teacher):
    """The student's distance over time, with the teacher's as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    axes.plot([r[1] / 60 for r in rows], [r[2] for r in rows], marker=".", label="student, 1 step")
    for steps, distance in teacher.items():
        axes.axhline(distance, linestyle="--", linewidth=1, color="grey")
        axes.annotate(f"teacher, {steps} steps", (rows[-1][1] / 60, distance), ha="right")
    axes.set(xlabel="minutes of ADD", ylabel="Fréchet distance", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def parse_arguments(argv):
    """(arguments, {setting: value} of those given)."""
    parser = argparse.ArgumentParser(
        prog="toy/time_to_quality.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of a toy/run.py")
    parser.add_argument("--device", help="cuda, mps or cpu; default: the first that is there")
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's choice")
    parser.add_argument("--every", type=int, default=100, help="iterations between scores (100)")
    parser.add_argument(
        "--out", type=Path, default=Path("time-to-quality"), help="NAME (time-to-quality)"
    )
    add_flags(parser.add_argument_group("settings of toy/run.py (--distil… alone)"), Settings)
    arguments = parser.parse_args(argv)
    arguments.argv = sys.argv[1:] if argv is None else argv
    own = {"run", "device", "threads", "every", "out", "argv"}
    return arguments, {name: value for name, value in vars(arguments).items() if name not in own}


def main(argv=None):
    """Exit codes: 0 done, 2 a user's mistake (one line says which)."""
    arguments, given = parse_arguments(argv)
    try:
        if other := [name for name in given if not name.startswith("distil_")]:
            flag = other[0].replace("_", "-")
            raise ValueError(f"--{flag}: the run's own; only --distil… can be changed here")
        if arguments.every < 1:
            raise ValueError(f"--every {arguments.every}: must be at least 1")
        set_threads(arguments.threads)
        if not (arguments.run / "teacher" / "checkpoint.pt").exists():
            raise ValueError(f"--run {arguments.run}: no teacher there; toy/run.py trains one")
        device = pick_device(arguments.device)
        torch.backends.cudnn.benchmark = True  # as toy/run.py has it
        run = Run(arguments.run, given, device)
        teacher = run.of_the_teacher()
        print(f"teacher: {teacher}", flush=True)
        rows = run.train(arguments.every)
    except (ValueError, OSError, datasets.DataError, TrainingError, CheckpointError) as error:
        print(f"toy/time_to_quality.py: {one_line(error)}", file=sys.stderr)
        return 2
    command = " ".join(["python toy/time_to_quality.py", *arguments.argv])
    cells = []
    for steps, distance in teacher.items():
        at = passed(rows, distance)
        reached = (f"{at[0]}", f"{at[1] / 60:.1f}") if at else ("not reached", "–")
        cells.append([steps, f"{distance:.2f}", *reached])
    head = ["teacher's steps", "its distance", "ADD iterations until one step is closer", "minutes"]
    lines = [f"`{command}`, {timing.machine(device)}.", "", *timing.table(head, cells), ""]
    stored = {
        "command": command,
        "machine": timing.machine(device),
        "teacher": teacher,
        "rows": rows,
    }
    timing.keep(arguments.out, stored, lines)
    draw(arguments.out.with_suffix(".png"), rows, teacher)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
