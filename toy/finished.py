"""Read what a finished toy/run.py has left in its folder. Every function raises TrainingError or
CheckpointError, whose message is one line, if that is missing or cannot be read."""

import copy
import json
from contextlib import contextmanager

import torch

from add import Student
from common.checkpoints import read, read_last
from common.errors import one_line
from common.flags import from_dict
from toy.loop import TrainingError
from toy.networks import has_bf16
from toy.public import make_public
from toy.settings import Settings, stage_key
from toy.teacher import Standardize, make_denoiser, resized

MALFORMED = (LookupError, TypeError, AttributeError, RuntimeError, ValueError)


@contextmanager
def _reading(folder, path, what):
    """Raise TrainingError if a file of the run is missing, or is not `what`."""
    try:
        yield
    except FileNotFoundError as error:
        raise TrainingError(
            f"--run {folder}: no finished run there ({path} is missing); "
            "python toy/run.py makes one"
        ) from error
    except ImportError as error:
        missing = f"needs {error.name}; python -m pip install -r full/requirements.txt"
        raise TrainingError(f"--run {folder}: {missing}") from error
    except (OSError, *MALFORMED) as error:
        raise TrainingError(
            f"{path} is not {what} of this version ({one_line(error)[:200]}); run it again"
        ) from error


def load_settings(folder):
    """The run's Settings."""
    path = folder / "config.json"
    with _reading(folder, path, "the settings"):
        return from_dict(Settings, json.loads(path.read_text())["settings"])


def load_results(folder):
    """(what evaluate.py measured, the key of the stage `eval` that it belongs to)."""
    path = folder / "results.json"
    with _reading(folder, path, "the results"):
        stored = json.loads(path.read_text())
        return stored["results"], stored["key"]


def load_student(folder):
    """(Student on the CPU, image shape (C, H, W), class names)."""
    path = folder / "distil" / "student.pt"
    with _reading(folder, path, "a student"):
        if not path.exists():
            raise FileNotFoundError(path)
        state = read(path)
        settings, classes = from_dict(Settings, state["settings"]), tuple(state["classes"])
        if settings.conditional:
            standardize = Standardize(state["mean"], state["std"])
            size = settings.of_students_size
            denoiser = make_denoiser(state["shape"][0], len(classes), size, standardize)
        else:
            denoiser = make_public(state["public"], len(classes), settings.precision == "bf16")
        denoiser.network.load_state_dict(state["network"])
        denoiser.network.bf16 &= has_bf16(torch.device("cpu"))  # emulated, it would be slow
        student = Student(denoiser, settings.distil_timesteps).eval().requires_grad_(False)
        return student, tuple(state["shape"]), classes


def load_teacher(folder, student):
    """The frozen teacher, trained here or public, on the CPU; `student` is the run's."""
    path = folder / "teacher" / "checkpoint.pt"
    teacher, settings = copy.deepcopy(student.denoiser), load_settings(folder)
    if settings.distil_widths:  # the student has another size
        teacher = resized(student.denoiser, settings)
        teacher.network.bf16 = student.denoiser.network.bf16
    with _reading(folder, path, "a teacher"):
        state = read_last(path)
        if state is None:
            raise FileNotFoundError(path)
        weights = {
            name.removeprefix("module."): x
            for name, x in state["ema"].items()
            if name.startswith("module.")
        }
        teacher.network.load_state_dict(weights)
    return teacher.eval().requires_grad_(False)


def check_whole(folder, fingerprint):
    """TrainingError unless the teacher, the student and the results are all of the settings that
    config.json has, and of the data with that fingerprint. They are not after a run in the same
    folder with other settings, which was interrupted."""
    settings, (_, scored) = load_settings(folder), load_results(folder)
    teacher = read_last(folder / "teacher" / "checkpoint.pt")
    path = folder / "distil" / "student.pt"
    with _reading(folder, path, "a student"):
        trained = from_dict(Settings, read(path)["settings"])

    def key(stage, of=settings):
        return stage_key(of, stage, fingerprint)

    whole = teacher and teacher["finished"] and teacher["key"] == key("teacher")
    if not (whole and key("distil", trained) == key("distil") and scored == key("eval")):
        raise TrainingError(
            f"--run {folder}: its teacher, student and results are not all of the settings and "
            "data of its config.json; "
            f"python toy/run.py --resume --out {folder} brings them up to date"
        )
