"""FID and CLIP score of student and teacher: python full/evaluate.py --pipeline DIR --teacher sd21 --coco DIR --out DIR

Every row of the table is an image for each of 5,000 captions of COCO2017: the teacher under DPM-Solver++ at 25 and 8
steps, the student at 1, 2 and 4. Writes evaluation.md, .json and .png, and the images as full/sample.py does: the same
command goes on after an interruption, and full/vote.py can show them.
"""

import argparse
import dataclasses
import hashlib
import json
import logging
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError

import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from common.flags import add_flags, check_choices, flag, option
from full.sample import call_of, load_pipeline
from full.settings import DTYPES, from_name, torch_dtype

CAPTIONS = "annotations/captions_val2017.json"
LIBRARIES = ("torch", "diffusers", "torchmetrics", "torch-fidelity", "open_clip_torch")
LABELS = {"teacher": "teacher, DPM-Solver++", "student": "student"}
COLOURS = {"teacher": "#4878a8", "student": "#d1495b"}
PAPER = """The paper's own numbers, for reference, not measured here (Table 2: SD1.5, its CLIP scores times 100):

| | steps | FID ↓ | CLIP ↑ | seconds |
|---|---|---|---|---|
| DPM Solver | 25 | 20.1 | 31.8 | 0.88 |
| DPM Solver | 8 | 31.7 | 32.0 | 0.34 |
| ADD-M | 1 | 19.7 | 32.6 | 0.09 |"""


@dataclass(frozen=True)
class Evaluation:
    """The flags. ValueError, in one line, for values that cannot be."""

    pipeline: str = option("", "the student: a pipeline folder of full/run.py, or a hub repository")
    teacher: str = option("", "sd15, sd21, sdxl, a diffusers folder or a hub repository; empty: the student alone")
    coco: str = option("", f"folder in COCO's layout: val2017/*.jpg and {CAPTIONS}")
    out: str = option("evaluation", "folder of the results and images")
    images: int = option(5000, "captions, and images of each row: the first by COCO's image id")
    student_steps: tuple[int, ...] = option((1, 2, 4), "the student's rows")
    teacher_steps: tuple[int, ...] = option((25, 8), "the teacher's rows")
    teacher_guidance: float = option(7.5, "the teacher's classifier-free guidance (1: none); the student has none")
    resolution: int = option(0, "height and width of the images (0: the student's own)")
    batch: int = option(8, "images drawn or measured at once; it changes no result")
    seed: int = option(0, "of the first image; each further one adds 1")
    timed: int = option(5, "calls at batch 1 whose median is the seconds an image")
    inception: str = option("", "file of torch-fidelity's Inception weights for FID (empty: download)")
    clip: str = option("ViT-g-14/laion2b_s12b_b42k", "model of the CLIP score: an open_clip MODEL/WEIGHTS, or a folder")
    device: str = option("", "empty: cuda if it is there, else cpu")
    dtype: str = option("auto", "of the pipelines: fp16, bf16, fp32; auto: fp32 on a CPU, else fp16", ("auto", *DTYPES))

    def __post_init__(self):
        check_choices(self)
        for name, remedy in (("pipeline", "the folder that full/run.py wrote"), ("coco", "COCO's folder")):
            if not getattr(self, name):
                raise ValueError(f"--{name}: none given; name {remedy}")
        least = dict(images=2, student_steps=1, teacher_steps=1, teacher_guidance=1, resolution=0, batch=1, timed=1)
        for name, low in least.items():
            value = getattr(self, name)
            if value == () or min(value if isinstance(value, tuple) else (value,)) < low:
                raise ValueError(f"--{flag(name)} {value}: must be at least {low}")


@dataclass(frozen=True)
class Sample:
    """An image of COCO, its caption, the file name and the seed of what is drawn for it."""

    file: Path
    caption: str
    name: str
    seed: int


def brief(error):
    """An error's kind and the beginning of its message, on one line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:150] if str(error).strip() else ''}"


def chunks(items, n):
    """A list in lists of n."""
    return [items[i : i + n] for i in range(0, len(items), n)]


# What is measured, and with what -------------------------------------------------------------------------------------


def read_coco(folder, count, seed):
    """(the first `count` samples by image id, hash of all captions); an image's caption is the one of the lowest id."""
    path, images = Path(folder) / CAPTIONS, Path(folder) / "val2017"
    for needed, there in (("val2017", images.is_dir()), (CAPTIONS, path.is_file())):
        if not there:
            raise ValueError(f"--coco {folder}: has no {needed}; name a folder with val2017/ and {CAPTIONS}")
    try:
        content = json.loads(path.read_text("utf-8"))
        files = {image["id"]: image["file_name"] for image in content["images"]}
        annotations = sorted(content["annotations"], key=lambda a: a["id"], reverse=True)  # the lowest id comes last
        captions = {a["image_id"]: " ".join(a["caption"].split()) for a in annotations}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{CAPTIONS} is not COCO's captions ({brief(error)})"
        raise ValueError(f"--coco {folder}: {what}; unpack it again") from error
    there = set(os.listdir(images))
    found = [(files[i], captions[i]) for i in sorted(files) if i in captions and files[i] in there]
    if len(found) < count:
        raise ValueError(f"--images {count}: {folder} has {len(found)} with captions; ask for fewer, or add the others")
    samples = [Sample(images / f, c, f"{Path(f).stem}.png", seed + i) for i, (f, c) in enumerate(found[:count])]
    return samples, hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]


def load_fid(path):
    """torchmetrics' FID on 2048 Inception features, resized as in the original, that is, without antialiasing."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as url
    from torchmetrics.image.fid import FrechetInceptionDistance

    try:
        # Read here first, for the library unpickles anything: what passes is weights and nothing else.
        if path:
            torch.load(path, map_location="cpu", weights_only=True)
        else:
            torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
        options = {"antialias": False, "reset_real_features": False}
        return FrechetInceptionDistance(feature_extractor_weights_path=path or None, **options)
    except (OSError, RuntimeError, LookupError, EOFError, UnpicklingError, AttributeError, TypeError) as error:
        where = f"{path}: no Inception weights" if path else "(none given): the download failed"
        raise ValueError(f"--inception {where} ({brief(error)}); fetch {url} and name that file") from error


class ClipScore:
    """100 cos of the embeddings of an image and its caption, by an open_clip model."""

    def __init__(self, name):
        import open_clip

        model, _, weights = name.partition("/")
        if not weights or model not in open_clip.list_models():
            model, weights = name if name.startswith("hf-hub:") else f"local-dir:{name}", None
        logging.disable()  # open_clip would report an error a second time
        try:
            self.network, self.preprocess = open_clip.create_model_from_pretrained(model, pretrained=weights)
            self.tokenize = open_clip.get_tokenizer(model)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            what = f"neither an open_clip MODEL/WEIGHTS that can be had nor a folder of one ({brief(error)})"
            raise ValueError(f"--clip {name}: {what}; download it elsewhere and name the folder") from error
        finally:
            logging.disable(logging.NOTSET)
        self.network.requires_grad_(False).eval()

    def __call__(self, images, captions):
        """(B,) scores of B PIL images and B texts, on the CPU."""
        device = next(self.network.parameters()).device
        pixels = torch.stack([self.preprocess(image) for image in images]).to(device)
        image = self.network.encode_image(pixels, normalize=True)
        text = self.network.encode_text(self.tokenize(captions).to(device), normalize=True)
        return 100 * (image * text).sum(1).float().cpu()


def load_models(evaluation, device):
    """{"teacher": pipeline, "student": pipeline} on the CPU, or the student alone; the teacher with DPM-Solver++."""
    from diffusers import AutoPipelineForText2Image, DPMSolverMultistepScheduler


    name = evaluation.dtype if evaluation.dtype != "auto" else "fp32" if device.type == "cpu" else "fp16"
    models = {}
    for model, given in (("teacher", "teacher"), ("student", "pipeline")):
        if path := from_name(getattr(evaluation, given)):
            models[model] = pipe = load_pipeline(AutoPipelineForText2Image, path, torch_dtype(name), f"--{given}")
            if getattr(pipe, "safety_checker", None) is not None:
                pipe.safety_checker = None  # it would blacken images, and take time that is not the model's
            if model == "teacher":
                solver = {"algorithm_type": "dpmsolver++", "solver_order": 2, "timestep_spacing": "linspace"}
                pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, **solver)
    return models


def rows_of(evaluation, models, size):
    """The table's rows, the teacher's first; "call" is what the pipeline is called with. ValueError for more steps than
    the student was trained for."""
    calls, g = [], evaluation.teacher_guidance
    for k in evaluation.teacher_steps if "teacher" in models else ():
        calls.append(("teacher", k, g, {"num_inference_steps": k, "guidance_scale": g}))
    for k in evaluation.student_steps:
        calls.append(("student", k, 0.0, call_of(models["student"], evaluation.pipeline, k, "--student-steps")))
    rows = [{"model": m, "steps": k, "guidance": g, "call": call, "folder": f"{m}-{k}"} for m, k, g, call in calls]
    for row in rows:
        row["evaluations"] = row["steps"] * (2 if row["guidance"] > 1 else 1)  # with the caption and without
        row["call"] |= {"height": size, "width": size}
    return rows


# Drawing and measuring -----------------------------------------------------------------------------------------------


def fingerprint(pipe):
    """A hash of the weights: a longer training may have written another student to the same folder."""
    digest = hashlib.sha256()
    for _, part in sorted(pipe.components.items()):
        for key, x in part.state_dict().items() if isinstance(part, torch.nn.Module) else ():
            digest.update(key.encode())
            digest.update(x.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def draw(pipe, row, samples, folder, settings, batch):
    """Draw those images of a row that its folder lacks; what other settings drew there is removed first. ValueError for
    a folder that is not ours."""
    record, text = folder / "settings.json", json.dumps(settings, indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    if not record.exists() and any(folder.iterdir()):
        raise ValueError(f"--out {folder.parent}: {folder.name}/ in it holds other files; name another folder")
    if not record.exists() or record.read_text("utf-8") != text:
        for path in folder.glob("*.png"):
            path.unlink()
        record.write_text(text, "utf-8")
    told = [{"file_name": s.name, "text": s.caption, "seed": s.seed, "steps": row["steps"]} for s in samples]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in told), "utf-8")
    missing = [s for s in samples if not (folder / s.name).exists()]
    for some in tqdm(chunks(missing, batch), desc=folder.name, unit="batch", disable=None):
        # Each image has a generator of its own, on the CPU: its noise depends on neither batch nor device.
        generators = [torch.Generator().manual_seed(s.seed) for s in some]
        images = pipe([s.caption for s in some], generator=generators, **row["call"]).images
        for s, image in zip(some, images, strict=True):
            image.save(folder / "unfinished.tmp", "PNG")
            os.replace(folder / "unfinished.tmp", folder / s.name)


def seconds_per_image(pipe, row, caption, timed):
    """Median of `timed` calls at batch 1 after one to warm up: text encoder, U-Net, decoder, to a PIL image."""
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
        "weights": fingerprint(pipe), "dtype": str(pipe.dtype), "device": pipe.device.type, "captions": captions,
        "seed": evaluation.seed, "scheduler": json.loads(pipe.scheduler.to_json_string(), parse_constant=str),
    }  # fmt: skip
    for row in rows:
        folder = Path(evaluation.out) / row["folder"]
        draw(pipe, row, samples, folder, settings | {"call": row["call"]}, evaluation.batch)
        row["seconds"] = seconds_per_image(pipe, row, samples[0].caption, evaluation.timed)


def add_real(fid, samples, size, batch):
    """COCO's images into FID's real half, resized and centre-cropped as full/data.py does for training."""
    from full.data import prepare
    from full.settings import Settings

    settings = Settings(resolution=size)
    for some in chunks(samples, batch):
        images = []
        for s in some:
            try:
                images.append(((prepare(s.file.read_bytes(), None, settings)[0] + 1) * 127.5).round().to(torch.uint8))
            except (OSError, ValueError) as error:
                raise ValueError(f"--coco: {s.file} cannot be read ({brief(error)}); unpack it again") from error
        fid.update(torch.stack(images).to(fid.device), real=True)


def measure(fid, clip, folder, samples, batch):
    """{"fid", "clip"} of a row's images: FID and the mean CLIP score."""
    fid.reset()
    scores = []
    for some in chunks(samples, batch):
        images = [Image.open(folder / s.name).convert("RGB") for s in some]
        fid.update(torch.stack([pil_to_tensor(image) for image in images]).to(fid.device), real=False)
        scores.append(clip(images, [s.caption for s in some]))
    return {"fid": float(fid.compute()), "clip": float(torch.cat(scores).mean())}


def find_device(name):
    """torch's device of that name, or the best there is. ValueError if it is not there."""
    try:
        return torch.empty(1, device=name or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: is not there ({brief(error)}); leave the flag out, or name cpu") from error


def evaluate(evaluation):
    """Draw, measure and write; returns what evaluation.json holds. What may fail comes before the hours of drawing."""
    from full.export import commit

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
    result = {
        "rows": rows, "resolution": size, "dtype": dtype, "commit": commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}, {platform.machine()}",
        "versions": {name: version(name) for name in LIBRARIES}, "settings": dataclasses.asdict(evaluation),
    }  # fmt: skip
    (out / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    (out / "evaluation.md").write_text("\n".join(report(result)), "utf-8")
    plot(result, out / "evaluation.png")
    return result


# The result ----------------------------------------------------------------------------------------------------------


def table(rows):
    """Lines of Markdown."""
    columns = ("model", "steps", "guidance", "U-Net evaluations", "FID ↓", "CLIP ↑", "seconds/image")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for r in rows:
        guidance = f"{r['guidance']:g}" if r["guidance"] > 1 else "none"
        scores = f"{r['fid']:.2f} | {r['clip']:.2f} | {r['seconds']:.3g}"
        lines.append(f"| {LABELS[r['model']]} | {r['steps']} | {guidance} | {r['evaluations']} | {scores} |")
    return lines


def report(result):
    """The lines of evaluation.md."""
    e, size, v = result["settings"], result["resolution"], result["versions"]
    n, seed = e["images"], e["seed"]
    lines = [f"# {e['pipeline']}{' beside ' if e['teacher'] else ''}{e['teacher']}", "", *table(result["rows"]), ""]
    lines += ["![FID and CLIP score against seconds an image](evaluation.png)", ""]
    lines += [
        f"- {n:,} images a row, {size}×{size}, seeds {seed} to {seed + n - 1}: one for each of the first images of "
        "COCO val2017 by id, from its caption of the lowest id.",
        f"- FID: torchmetrics {v['torchmetrics']}, Inception of torch-fidelity {v['torch-fidelity']}, 2048 features, "
        f"resized without antialiasing; against those images of COCO, centre-cropped and resized to {size}×{size}.",
        f"- CLIP: mean of 100 cos, open_clip {v['open_clip_torch']}, {e['clip']}, float32.",
        f"- Seconds: median of {e['timed']} calls at batch 1 after a warm-up, from prompt to image, in "
        f"{result['dtype']} on {result['device']}.",
        f"- torch {v['torch']}, diffusers {v['diffusers']}, commit {result['commit']}.",
    ]
    if n < 2048:
        lines.append(
            f"- **Fewer images than Inception's 2048 features: with {n:,} the covariances are singular and FID is "
            "biased upwards. Compare it within this table only.**"
        )
    return [*lines, "", PAPER, ""]


def plot(result, path):
    """FID and CLIP score against seconds an image: Figure 7 with these for its ELO."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    labels = {"fid": "FID, lower is better", "clip": "CLIP score, higher is better"}
    for axis, (key, label) in zip(axes, labels.items(), strict=True):
        for model in dict.fromkeys(r["model"] for r in result["rows"]):
            rows = sorted((r for r in result["rows"] if r["model"] == model), key=lambda r: r["seconds"])
            x, y = [r["seconds"] for r in rows], [r[key] for r in rows]
            axis.plot(x, y, "o-", color=COLOURS[model], label=LABELS[model])
            for r in rows:
                text, place = f"{r['steps']} step{'s' * (r['steps'] > 1)}", (r["seconds"], r[key])
                axis.annotate(text, place, (6, 6), textcoords="offset points", fontsize=9, color=COLOURS[model])
        axis.set(xscale="log", xlabel="seconds an image, batch 1", ylabel=label)
        axis.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_locator=NullLocator())
        axis.margins(x=0.22, y=0.15)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    n, size, where = result["settings"]["images"], result["resolution"], f"{result['device']}, {result['dtype']}"
    figure.suptitle(f"{n:,} captions of COCO val2017, {size}×{size}, {where}", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv=None):
    """Exit codes: 0 done, 2 a user's mistake (one line says which), 130 interrupted: the same command goes on."""
    parser = argparse.ArgumentParser(prog="full/evaluate.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_flags(parser, Evaluation)
    given = vars(parser.parse_args(argv))
    debug = given.pop("debug")
    try:
        evaluation = Evaluation(**given)
        result = evaluate(evaluation)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except ValueError as error:
        if debug:
            raise
        print(f"full/evaluate.py: {error}", file=sys.stderr)
        return 2
    print("\n".join(table(result["rows"])), f"written: {evaluation.out}/evaluation.md", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
