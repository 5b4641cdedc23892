"""Draw from a distilled pipeline: python full/sample.py --pipeline DIR --prompt "a fox" --out DIR

Writes 0000.png, 0001.png, … and metadata.jsonl with the prompt of each. With --image,
image-to-image from a file.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from full.settings import DTYPES, torch_dtype


def parse_arguments(argv):
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="full/sample.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pipeline", required=True, help="pipeline folder, or hub repository")
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
    parser.add_argument("--prompts", default="", help="a file of prompts, one a line")
    parser.add_argument(
        "--steps", type=int, default=1, help="network evaluations an image (default: 1)"
    )
    parser.add_argument("--count", type=int, default=1, help="images of each prompt (default: 1)")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the first image; each further one adds 1 (default: 0)",
    )
    parser.add_argument("--image", type=Path, help="start from this image instead of from noise")
    parser.add_argument(
        "--strength",
        type=float,
        default=0.5,
        help="how much of --image is redrawn, in (0, 1] (default: 0.5)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp32 on a CPU, else fp16")
    parser.add_argument("--device", help="default: cuda if it is there, else cpu")
    parser.add_argument(
        "--out", type=Path, default=Path("samples"), help="folder of the images (default: samples)"
    )
    return parser.parse_args(argv)


@functools.lru_cache  # the demo asks for every image
def trained_timesteps(name):
    """T_student of a pipeline, by folder or repository, as its add.json tells; None without one.
    ValueError."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        local = Path(name).is_dir()
        path = Path(name) / "add.json" if local else Path(hf_hub_download(str(name), "add.json"))
        text = path.read_bytes()
    except (EntryNotFoundError, FileNotFoundError):
        return None
    try:
        trained = json.loads(text)["timesteps"]
        if not trained or [t for t in range(1000) if t in trained] != trained:
            raise ValueError(f"timesteps {trained} do not rise within 0…999")
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path}: not what full/run.py wrote ({error})") from error
    return trained


def timesteps_of(name, steps):
    """The timesteps of `steps` evaluations if a pipeline was trained at others than its scheduler
    has, else None. ValueError."""
    from full.export import is_evenly_spaced

    trained = trained_timesteps(name)
    if trained is None or is_evenly_spaced(trained):
        return None
    n = len(trained)
    return [trained[n - 1 - i * n // steps] for i in range(steps)]


def load_pipeline(kind, name, dtype, flag="--pipeline"):
    """kind's pipeline by folder or repository, in a torch dtype, on the CPU, without progress bars.
    ValueError."""
    from common.errors import brief
    from full.backbones import LOAD_ERRORS

    try:
        pipe = kind.from_pretrained(name, dtype=dtype)
    except LOAD_ERRORS as error:
        what = f"cannot be loaded, as a pipeline folder or a hub repository ({brief(error)})"
        raise ValueError(f"{flag} {name}: {what}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def usual_dtype(device):
    """The name of the dtype that a pipeline samples in unless told otherwise."""
    import torch

    return "fp32" if torch.device(device).type == "cpu" else "fp16"


def place(kind, arguments):
    """kind's pipeline of --pipeline, on --device and in --dtype, or their defaults. ValueError."""
    import torch

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch_dtype(arguments.dtype or usual_dtype(device))
    return load_pipeline(kind, arguments.pipeline, dtype).to(device)


def schedule_length(steps, strength):
    """How many timesteps a schedule needs for its last share of `strength` to have `steps`: 1 and
    0.5 → 2."""
    n = int(steps / strength)
    while int(n * strength) < steps:  # the share that diffusers' image-to-image pipelines take
        n += 1
    return n


def call_of(pipe, name, steps, flag="--steps", strength=1.0):
    """The arguments of a student's call for `steps` network evaluations, of the last `strength` of
    its schedule. ValueError: more than it was trained for."""
    trained = getattr(pipe.scheduler.config, "original_inference_steps", None)
    if trained and steps > trained:
        raise ValueError(f"{flag} {steps}: this student was trained for 1…{trained} steps")
    asked, steps = steps, schedule_length(steps, strength)
    if trained and steps > trained:
        raise ValueError(
            f"--strength {strength:g}: this student has {trained} timesteps, of which that leaves "
            f"{int(trained * strength)}, fewer than {flag} {asked}; use a strength of at least "
            f"{asked / trained:g}"
        )
    custom = timesteps_of(name, steps)
    return ({"timesteps": custom} if custom else {"num_inference_steps": steps}) | {
        "guidance_scale": 0.0
    }


def sample(arguments):
    """Write the images; returns their paths. ValueError for invalid arguments."""
    import torch
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForText2Image
    from PIL import Image, ImageOps

    from common.images import to_rgb
    from full.pictures import read_prompts

    prompts = arguments.prompt + (read_prompts(arguments.prompts) if arguments.prompts else [])
    if not prompts:
        raise ValueError("--prompt: none given; give one, or a file of them with --prompts")
    if arguments.steps < 1 or arguments.count < 1:
        raise ValueError(
            f"--steps {arguments.steps}, --count {arguments.count}: must be at least 1"
        )
    if not 0 < arguments.strength <= 1:
        raise ValueError(f"--strength {arguments.strength}: must be within (0, 1]")
    pipe = place(
        AutoPipelineForImage2Image if arguments.image else AutoPipelineForText2Image, arguments
    )
    strength = arguments.strength if arguments.image else 1.0
    call = call_of(pipe, arguments.pipeline, arguments.steps, strength=strength)
    if arguments.image:
        try:
            image = to_rgb(Image.open(arguments.image))
        except OSError as error:
            raise ValueError(f"--image {arguments.image}: cannot be read ({error})") from error
        side = pipe.unet.config.sample_size * pipe.vae_scale_factor
        image = ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)
        call |= {"image": image, "strength": strength}

    arguments.out.mkdir(parents=True, exist_ok=True)
    paths = []
    with open(arguments.out / "metadata.jsonl", "w", encoding="utf-8") as metadata:
        for prompt in prompts:
            for _ in range(arguments.count):
                number = len(paths)
                generator = torch.Generator(pipe.device).manual_seed(arguments.seed + number)
                picture = pipe(prompt, generator=generator, **call).images[0]
                paths.append(arguments.out / f"{number:04d}.png")
                picture.save(paths[-1])
                record = {
                    "file_name": paths[-1].name,
                    "text": prompt,
                    "seed": arguments.seed + number,
                    "steps": arguments.steps,
                }
                metadata.write(json.dumps(record, ensure_ascii=False) + "\n")
    return paths


def main(argv=None):
    """Exit codes: 0 done, 2 it cannot be done (one line says why)."""
    arguments = parse_arguments(argv)
    try:
        paths = sample(arguments)
    except (ValueError, OSError) as error:
        from common.errors import one_line

        print(f"full/sample.py: {one_line(error)}", file=sys.stderr)
        return 2
    print(f"{len(paths)} images: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
