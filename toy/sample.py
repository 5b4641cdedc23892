"""Draw images from a finished run:
python toy/sample.py --run runs/auto-cpu --steps 1 --class 7 --seed 0 --out grid.png"""

import argparse
import sys
from pathlib import Path

import torch
from torchvision.utils import save_image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.checkpoints import CheckpointError
from common.errors import one_line
from toy import loop
from toy.finished import load_student
from toy.samplers import noise_for, sample_student


def parse_arguments(argv):
    """The command line."""
    parser = argparse.ArgumentParser(prog="toy/sample.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished toy/run.py")
    parser.add_argument("--steps", type=int, default=1, help="student steps, 1 to 4 (default 1)")
    parser.add_argument(
        "--class", dest="label", help="a class by name or number; default: every class in turn"
    )
    parser.add_argument("--n", type=int, default=64, help="how many images (default 64)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    parser.add_argument(
        "--out", type=Path, default=Path("grid.png"), help="PNG to write (default grid.png)"
    )
    parser.add_argument(
        "--scale", type=int, default=2, help="pixels of the PNG for each of the image's (default 2)"
    )
    return parser.parse_args(argv)


def class_number(label, classes):
    """The number of a class given by name or number. ValueError if there is none such."""
    if label in classes:
        return classes.index(label)
    if label.isdigit() and int(label) < len(classes):
        return int(label)
    known = f"{', '.join(classes)}, or numbers 0…{len(classes) - 1}"
    raise ValueError(f"--class {label}: no such class; there are {known}")


def draw(arguments):
    """Write the grid."""
    for name in ("n", "scale", "steps"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} {getattr(arguments, name)}: must be at least 1")
    student, shape, classes = load_student(arguments.run)
    noise = noise_for(arguments.n, shape, arguments.seed, torch.device("cpu"))
    if arguments.label is None:
        labels = torch.arange(arguments.n) % len(classes)
    else:
        labels = torch.full((arguments.n,), class_number(arguments.label, classes))
    images = sample_student(student, noise, labels, arguments.steps, arguments.seed + 1)
    images = (images + 1) / 2
    for axis in (2, 3):
        images = images.repeat_interleave(arguments.scale, axis)
    columns = 10 if arguments.label is None else max(1, round(arguments.n**0.5))
    save_image(images, arguments.out, nrow=columns, padding=arguments.scale, pad_value=0.35)


def main(argv=None):
    """Exit codes: 0 done, 2 a user's mistake (one line says which)."""
    arguments = parse_arguments(argv)
    try:
        draw(arguments)
    except (ValueError, OSError, loop.TrainingError, CheckpointError) as error:
        print(f"toy/sample.py: {one_line(error)}", file=sys.stderr)
        return 2
    print(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
