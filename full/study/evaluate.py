"""FID and CLIP score of student and teacher.

python full/evaluate.py --pipeline DIR --teacher sd21 --coco DIR --out DIR

Every row of the table is an image for each of 5,000 captions of COCO2017: the teacher under
DPM-Solver++ at 25 and 8 steps, the student at 1, 2 and 4. Writes evaluation.md, .json and .png, and
the images as full/sample.py does. The same command continues after an interruption, and
full/vote.py can show the images.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from common.errors import brief, one_line
from common.fid import load_fid
from common.flags import add_flags, check_choices, flag, option
from common.origin import commit
from full.sample import call_of, load_pipeline, usual_dtype
from full.settings import DTYPES, from_name, torch_dtype
from full.study.metrics import (
    CAPTIONS,
    ClipScore,
    add_real,
    chunks,
    measure,
    read_coco,
)
from full.study.report import plot, report, table

LIBRARIES = ("torch", "diffusers", "torchmetrics", "torch-fidelity", "open_clip_torch")


@dataclass(frozen=True)
class Evaluation:
    """The flags. ValueError, in one line, for values that are not allowed."""

    pipeline: str = option("", "the student: a pipeline folder of full/run.py, or a hub repository")
    teacher: str = option(
        "", "sd15, sd21, sdxl, a diffusers folder or a hub repository; empty: the student alone"
    )
    coco: str = option("", f"folder in COCO's layout: val2017/*.jpg and {CAPTIONS}")
    out: str = option("evaluation", "folder of the results and images")
    images: int = option(5000, "captions, and images of each row: the first by COCO's image id")
    student_steps: tuple[int, ...] = option((1, 2, 4), "the student's rows")
    teacher_steps: tuple[int, ...] = option((25, 8), "the teacher's rows")
    teacher_guidance: float = option(
        7.5, "the teacher's classifier-free guidance (1: none); the student has none"
    )
    resolution: int = option(0, "height and width of the images (0: the student's own)")
    batch: int = option(8, "images drawn or measured at once; it changes no result")
    seed: int = option(0, "of the first image; each further one adds 1")
    timed: int = option(5, "calls at batch 1 whose median is the seconds an image")
    inception: str = option(
        "", "file of torch-fidelity's Inception weights for FID (empty: download)"
    )
    clip: str = option(
        "ViT-g-14/laion2b_s12b_b42k",
        "model of the CLIP score: an open_clip MODEL/WEIGHTS, or a folder",
    )
    device: str = option("", "empty: cuda if it is there, else cpu")
    dtype: str = option(
        "auto",
        "of the pipelines: fp16, bf16, fp32; auto: fp32 on a CPU, else fp16",
        ("auto", *DTYPES),
    )

    def __post_init__(self):
        check_choices(self)
        for name, remedy in (
            ("pipeline", "the folder that full/run.py wrote"),
            ("coco", "COCO's folder"),
        ):
            if not getattr(self, name):
                raise ValueError(f"--{name}: none given; name {remedy}")
        least = dict(
            images=2,
            student_steps=1,
            teacher_steps=1,
            teacher_guidance=1,
            resolution=0,
            batch=1,
            timed=1,
        )
        for name, low in least.items():
            value = getattr(self, name)
            if value == () or min(value if isinstance(value, tuple) else (value,)) < low:
                raise ValueError(f"--{flag(name)} {value}: must be at least {low}")


def load_models(evaluation, device):
    """{"teacher": pipeline, "student": pipeline} on the CPU, or the student alone; the teacher with
    DPM-Solver++."""
    from diffusers import AutoPipelineForText2Image, DPMSolverMultistepScheduler

    name, models = evaluation.dtype, {}
    if name == "auto":
        name = usual_dtype(device)
    for model, given in (("teacher", "teacher"), ("student", "pipeline")):
        if path := from_name(getattr(evaluation, given)):
            models[model] = pipe = load_pipeline(
                AutoPipelineForText2Image, path, torch_dtype(name), f"--{given}"
            )
            if getattr(pipe, "safety_checker", None) is not None:
                # It would blacken images, and take time that is not the model's.
                pipe.safety_checker = None
            if model == "teacher":
                solver = {
                    "algorithm_type": "dpmsolver++",
                    "solver_order": 2,
                    "timestep_spacing": "linspace",
                }
                pipe.scheduler = DPMSolverMultistepScheduler.from_config(
                    pipe.scheduler.config, **solver
                )
    return models


def rows_of(evaluation, models, size):
    """The table's rows, the teacher's first; "call" is what the pipeline is called with. ValueError
    for more steps than the student was trained for."""
    calls, g = [], evaluation.teacher_guidance
    for k in evaluation.teacher_steps if "teacher" in models else ():
        calls.append(("teacher", k, g, {"num_inference_steps": k, "guidance_scale": g}))
    for k in evaluation.student_steps:
        calls.append(
            (
                "student",
                k,
                0.0,
                call_of(models["student"], evaluation.pipeline, k, "--student-steps"),
            )
        )
    rows = [
        {"model": m, "steps": k, "guidance": g, "call": call, "folder": f"{m}-{k}"}
        for m, k, g, call in calls
    ]
    for row in rows:
        # Guidance takes two, with the caption and without.
        row["evaluations"] = row["steps"] * (2 if row["guidance"] > 1 else 1)
        row["call"] |= {"height": size, "width": size}
    return rows


def fingerprint(pipe):
    """A hash of the weights: a longer training may have written another student to the same
    folder."""
    digest = hashlib.sha256()
    for _, part in sorted(pipe.components.items()):
        for key, x in part.state_dict().items() if isinstance(part, torch.nn.Module) else ():
            digest.update(key.encode())
            digest.update(x.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def draw(pipe, row, samples, folder, settings, batch):
    """Draw those images of a row that its folder lacks; what other settings drew there is removed
    first. ValueError for a folder that is not ours."""
    record, text = folder / "settings.json", json.dumps(settings, indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    if not record.exists() and any(folder.iterdir()):
        raise ValueError(
            f"--out {folder.parent}: {folder.name}/ in it holds other files; name another folder"
        )
    if not record.exists() or record.read_text("utf-8") != text:
        for path in folder.glob("*.png"):
            path.unlink()
        record.write_text(text, "utf-8")
    told = [
        {"file_name": s.name, "text": s.caption, "seed": s.seed, "steps": row["steps"]}
        for s in samples
    ]
    (folder / "metadata.jsonl").write_text(
        "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in told), "utf-8"
    )
    missing = [s for s in samples if not (folder / s.name).exists()]
    for some in tqdm(chunks(missing, batch), desc=folder.name, unit="batch", disable=None):
        # Each image has a generator of its own, on the CPU: its noise depends on neither batch nor
        # device.
        generators = [torch.Generator().manual_seed(s.seed) for s in some]
        images = pipe([s.caption for s in some], generator=generators, **row["call"]).images
        for s, image in zip(some, images, strict=True):
            image.save(folder / "unfinished.tmp", "PNG")
            os.replace(folder / "unfinished.tmp", folder / s.name)


def seconds_per_image(pipe, row, caption, timed):
    """Median of `timed` calls at batch 1 after one to warm up: text encoder, U-Net, decoder, to a
    PIL image."""
    seconds = []
    for _ in range(timed + 1):
        start = time.perf_counter()
        pipe(caption, generator=torch.Generator().manual_seed(0), **row["call"])
        if pipe.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def draw_rows(pipe, rows, samples, captions, evaluation):
    """Draw every row of one model, and add "seconds" an image to each."""
    settings = {
        "weights": fingerprint(pipe),
        "dtype": str(pipe.dtype),
        "device": pipe.device.type,
        "captions": captions,
        "seed": evaluation.seed,
        "scheduler": json.loads(pipe.scheduler.to_json_string(), parse_constant=str),
    }
    for row in rows:
        folder = Path(evaluation.out) / row["folder"]
        draw(pipe, row, samples, folder, settings | {"call": row["call"]}, evaluation.batch)
        row["seconds"] = seconds_per_image(pipe, row, samples[0].caption, evaluation.timed)


def find_device(name):
    """torch's device of that name, or the best there is. ValueError if it is not there."""
    best = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(1, device=name or best).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device {name}: is not there ({brief(error)}); leave the flag out, or name cpu"
        ) from error


def evaluate(evaluation):
    """Draw, measure and write; returns what evaluation.json holds. What may fail comes before the
    hours of drawing."""
    out, batch, device = Path(evaluation.out), evaluation.batch, find_device(evaluation.device)
    samples, captions = read_coco(evaluation.coco, evaluation.images, evaluation.seed)
    fid, clip = load_fid(evaluation.inception).to(device), ClipScore(evaluation.clip)
    models = load_models(evaluation, device)
    unet, dtype = models["student"].unet.config, str(models["student"].dtype).removeprefix("torch.")
    size = evaluation.resolution or unet.sample_size * models["student"].vae_scale_factor
    rows = rows_of(evaluation, models, size)
    add_real(fid, samples, size, batch)

    for model in list(models):  # one at a time on the device
        own = [row for row in rows if row["model"] == model]
        draw_rows(models.pop(model).to(device), own, samples, captions, evaluation)
    clip.network.to(device)
    for row in rows:
        row |= measure(fid, clip, out / row["folder"], samples, batch)
    where = f"{device}, {platform.machine()}"
    result = {
        "rows": rows,
        "resolution": size,
        "dtype": dtype,
        "commit": commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else where,
        "versions": {name: version(name) for name in LIBRARIES},
        "settings": dataclasses.asdict(evaluation),
    }
    (out / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    (out / "evaluation.md").write_text("\n".join(report(result)), "utf-8")
    plot(result, out / "evaluation.png")
    return result


def main(argv=None):
    """Exit codes: 0 done, 2 a user's mistake (one line says which), 130 interrupted: the same
    command continues."""
    parser = argparse.ArgumentParser(
        prog="full/evaluate.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_flags(parser, Evaluation)
    given = vars(parser.parse_args(argv))
    debug = given.pop("debug")
    try:
        evaluation = Evaluation(**given)
        result = evaluate(evaluation)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues from here", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if debug:
            raise
        print(f"full/evaluate.py: {one_line(error)}", file=sys.stderr)
        return 2
    print("\n".join(table(result["rows"])), f"written: {evaluation.out}/evaluation.md", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
