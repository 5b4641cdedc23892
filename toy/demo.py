"""Draws digits while you choose: python toy/demo.py --run runs/auto-cpu

A local page for a finished run: class, steps and seed; the student beside its teacher at 50 steps,
from the same noise, with the milliseconds of each. Needs gradio. The first line of the output says
where the page is.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.checkpoints import CheckpointError
from common.errors import one_line
from common.flags import add_page_flags
from toy.finished import load_results, load_student, load_teacher
from toy.loop import TrainingError
from toy.pictures import tile
from toy.samplers import noise_for, sample_student, sample_teacher

REFUSED = (ValueError, OSError, LookupError, RuntimeError, TrainingError, CheckpointError)
COUNT, COLUMNS, SCALE = 16, 4, 4  # images, in a row, screen pixels of each pixel


def parse_arguments(argv):
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="toy/demo.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished toy/run.py")
    add_page_flags(parser)
    return parser.parse_args(argv)


def make_draw(run):
    """(a function of class name, steps and seed that gives student's and teacher's images, each
    with its time; the names of the classes; how many steps there are)."""
    student, shape, classes = load_student(run)
    teacher, guidance = load_teacher(run, student), load_results(run)[0]["best_guidance"]

    def timed(sampler, *arguments):
        began = time.perf_counter()
        sheet = tile(sampler(*arguments), COLUMNS)
        milliseconds = 1000 * (time.perf_counter() - began)
        large = sheet.repeat(SCALE, 0).repeat(SCALE, 1)
        return large, f"{milliseconds:.0f} ms for {COUNT} images"

    def draw(name, steps, seed):
        seed = int(seed or 0)
        noise = noise_for(COUNT, shape, seed, torch.device("cpu"))
        labels = torch.full((COUNT,), classes.index(name))
        return (
            *timed(sample_student, student, noise, labels, int(steps), seed + 1),
            *timed(sample_teacher, teacher, noise, labels, 50, guidance),
        )

    return draw, classes, len(student.timesteps)


def make_page(draw, classes, steps):
    """The page, a gradio Blocks."""
    import gradio

    with gradio.Blocks(title="ADD", analytics_enabled=False) as page:
        with gradio.Row():
            name = gradio.Dropdown(list(classes), value=classes[0], label="class")
            number = gradio.Radio(list(range(1, steps + 1)), value=1, label="steps of the student")
            seed = gradio.Number(0, precision=0, label="seed")
        outputs = []
        with gradio.Row():
            for who in ("student", "teacher, 50 steps"):
                with gradio.Column():
                    gradio.Markdown(who)
                    outputs += [
                        gradio.Image(show_label=False, format="png", interactive=False),
                        gradio.Textbox(label="time", interactive=False),
                    ]
        changes = [page.load, name.change, number.change, seed.change]
        gradio.on(
            changes,
            draw,
            [name, number, seed],
            outputs,
            trigger_mode="always_last",
            show_progress="hidden",
        )
    return page


def main(argv=None):
    """Exit codes: 0 done, 2 it cannot be done (one line says why)."""
    arguments = parse_arguments(argv)
    try:
        page = make_page(*make_draw(arguments.run))
        page.launch(server_name=arguments.host, server_port=arguments.port)
    except ModuleNotFoundError:
        print("toy/demo.py: needs gradio; python -m pip install gradio", file=sys.stderr)
        return 2
    except REFUSED as error:
        print(f"toy/demo.py: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
