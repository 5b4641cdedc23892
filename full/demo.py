"""Draws while you type: python full/demo.py --pipeline DIR

A local page for a student of full/run.py: prompt, steps, seed, and how long an image took. It is
drawn anew with every change. The first line of the output says where the page is.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.flags import add_page_flags
from full.pictures import PROMPTS
from full.sample import DTYPES, call_of, place


def parse_arguments(argv):
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="full/demo.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pipeline", required=True, help="pipeline folder, or hub repository")
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp32 on a CPU, else fp16")
    parser.add_argument("--device", help="default: cuda if it is there, else cpu")
    add_page_flags(parser)
    return parser.parse_args(argv)


def make_draw(pipe, name):
    """A function of prompt, steps and seed that gives an image and how long it took."""
    import torch

    def draw(prompt, steps, seed):
        generator = torch.Generator(pipe.device).manual_seed(int(seed or 0))
        began = time.perf_counter()
        image = pipe(prompt, generator=generator, **call_of(pipe, name, int(steps))).images[0]
        return image, f"{1000 * (time.perf_counter() - began):.0f} ms"

    return draw


def make_page(draw, steps):
    """The page, a gradio Blocks; steps is the most that the student was trained for."""
    import gradio

    with gradio.Blocks(title="ADD", analytics_enabled=False) as page:
        with gradio.Row():
            prompt = gradio.Textbox(PROMPTS[0], label="prompt", scale=4)
            number = gradio.Radio(list(range(1, steps + 1)), value=1, label="steps")
            seed = gradio.Number(0, precision=0, label="seed")
        image = gradio.Image(show_label=False, format="png", interactive=False)
        seconds = gradio.Textbox(label="time", interactive=False)
        # While an image is drawn, only the newest change waits.
        changes = [page.load, prompt.change, number.change, seed.change]
        gradio.on(
            changes,
            draw,
            [prompt, number, seed],
            [image, seconds],
            trigger_mode="always_last",
            show_progress="hidden",
        )
    return page


def main(argv=None):
    """Exit codes: 0 done, 2 it cannot be done (one line says why)."""
    arguments = parse_arguments(argv)
    try:
        from diffusers import AutoPipelineForText2Image

        pipe = place(AutoPipelineForText2Image, arguments)
        steps = getattr(pipe.scheduler.config, "original_inference_steps", None) or 4
        page = make_page(make_draw(pipe, arguments.pipeline), steps)
        page.launch(server_name=arguments.host, server_port=arguments.port)
    except (ValueError, OSError) as error:
        from common.errors import one_line

        print(f"full/demo.py: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
