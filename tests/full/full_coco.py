"""A COCO of six images, students and a teacher for full/study/evaluate.py, and what it leaves."""

import json
import shutil
from pathlib import Path

import numpy as np
import tiny_checkpoints as tiny
import torch
from PIL import Image
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from full.backbones import Backbone
from full.export import save_pipeline
from full.settings import Settings
from full.study import evaluate, metrics

ROOT = Path(__file__).resolve().parent.parent.parent
REAL_LOAD_FID = evaluate.load_fid
IDS = [7, 21, 3, 400, 15, 9]  # in no order; sorted: 3, 7, 9, 15, 21, 400
N = 5


class Means(nn.Module):
    """A feature network that a hand can follow: the means of red and green, uint8 images in."""

    num_features = 2

    def forward(self, images):
        return images.double().mean((2, 3))[:, :2]


def load_fid(path):
    """What stands in for evaluate.load_fid."""
    return FrechetInceptionDistance(Means(), reset_real_features=False)


def write_coco(folder, ids=IDS):
    """COCO's layout: two captions for each image, that of the higher id first."""
    (folder / "annotations").mkdir(parents=True)
    tiny.write_images(folder / "drawn", len(ids), size=(80, 72), seed=4)
    (folder / "val2017").mkdir()
    for k, i in enumerate(ids):
        (folder / "drawn" / f"{k:03d}.jpg").rename(folder / "val2017" / f"{i:012d}.jpg")
    shutil.rmtree(folder / "drawn")
    images = [{"id": i, "file_name": f"{i:012d}.jpg"} for i in ids]
    annotations = [{"id": 100 - i, "image_id": i, "caption": f"second of {i}"} for i in ids]
    annotations += [{"id": 50 - i, "image_id": i, "caption": f" colours \n of {i}"} for i in ids]
    write_captions(folder, images, annotations)
    return folder


def write_captions(folder, images, annotations):
    (folder / metrics.CAPTIONS).write_text(
        json.dumps({"images": images, "annotations": annotations})
    )


def write_student(folder, base, **settings):
    """The base's own weights, saved as full/run.py saves a student's."""
    backbone = Backbone(str(base), torch.float32, torch.device("cpu"))
    state = {f"unet.{k}": x for k, x in backbone.pipe.unet.state_dict().items()}
    settings = Settings(backbone=str(base), resolution=64, save_dtype="fp32", **settings)
    save_pipeline(folder, backbone, state, settings)


def arguments(world, out, **changes):
    """A command line; values None leave a flag out."""
    given = dict(
        pipeline=world / "student",
        teacher=world / "sd15",
        coco=world / "coco",
        clip=world / "clip",
        out=out,
        images=N,
        teacher_steps="3,2",
        batch=3,
        timed=1,
        device="cpu",
    )
    pairs = [
        (f"--{k.replace('_', '-')}", str(v)) for k, v in (given | changes).items() if v is not None
    ]
    return [text for pair in pairs for text in pair]


def run(world, out, **changes):
    """evaluation.json's content."""
    assert evaluate.main([*arguments(world, out, **changes), "--debug"]) == 0
    return json.loads((out / "evaluation.json").read_text())


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def pictures(out):
    """{row/name: pixels} of all images."""
    return {str(path.relative_to(out)): pixels(path) for path in sorted(out.glob("*-*/*.png"))}


def times(out):
    return {path: path.stat().st_mtime_ns for path in out.glob("*-*/*.png")}
