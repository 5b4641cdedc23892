"""FID and CLIP score, and the images and captions of COCO2017 that they are measured on."""

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from common.errors import brief

CAPTIONS = "annotations/captions_val2017.json"


@dataclass(frozen=True)
class Sample:
    """An image of COCO, its caption, the file name and the seed of what is drawn for it."""

    file: Path
    caption: str
    name: str
    seed: int


def chunks(items, n):
    """A list in lists of n."""
    return [items[i : i + n] for i in range(0, len(items), n)]


def read_coco(folder, count, seed):
    """(the first `count` samples by image id, hash of all captions); an image's caption is the one
    of the lowest id."""
    path, images = Path(folder) / CAPTIONS, Path(folder) / "val2017"
    for needed, there in (("val2017", images.is_dir()), (CAPTIONS, path.is_file())):
        if not there:
            raise ValueError(
                f"--coco {folder}: has no {needed}; name a folder with val2017/ and {CAPTIONS}"
            )
    try:
        content = json.loads(path.read_text("utf-8"))
        files = {image["id"]: image["file_name"] for image in content["images"]}
        # The lowest id comes last.
        annotations = sorted(content["annotations"], key=lambda a: a["id"], reverse=True)
        captions = {a["image_id"]: " ".join(a["caption"].split()) for a in annotations}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{CAPTIONS} is not COCO's captions ({brief(error)})"
        raise ValueError(f"--coco {folder}: {what}; unpack it again") from error
    there = set(os.listdir(images))
    found = [(files[i], captions[i]) for i in sorted(files) if i in captions and files[i] in there]
    if len(found) < count:
        raise ValueError(
            f"--images {count}: {folder} has {len(found)} with captions; ask for fewer, or add the "
            "others"
        )
    samples = [
        Sample(images / f, c, f"{Path(f).stem}.png", seed + i)
        for i, (f, c) in enumerate(found[:count])
    ]
    return samples, hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]


class ClipScore:
    """100 cos of the embeddings of an image and its caption, by an open_clip model."""

    def __init__(self, name):
        import open_clip

        from full.features import open_clip_source  # here: --help need not wait for diffusers

        model, weights = open_clip_source(name)
        logging.disable()  # open_clip would report an error a second time
        try:
            self.network, self.preprocess = open_clip.create_model_from_pretrained(
                model, pretrained=weights
            )
            self.tokenize = open_clip.get_tokenizer(model)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ValueError(
                f"--clip {name}: neither an open_clip MODEL/WEIGHTS that can be had nor a folder "
                f"of one ({brief(error)}); download it elsewhere and name the folder"
            ) from error
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


def add_real(fid, samples, size, batch):
    """COCO's images into FID's real half, resized and centre-cropped as full/data.py does for
    training."""
    from full.data import prepare
    from full.settings import Settings

    settings = Settings(resolution=size)
    for some in chunks(samples, batch):
        images = []
        for s in some:
            try:
                images.append(
                    ((prepare(s.file.read_bytes(), None, settings) + 1) * 127.5)
                    .round()
                    .to(torch.uint8)
                )
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"--coco: {s.file} cannot be read ({brief(error)}); unpack it again"
                ) from error
        fid.update(torch.stack(images).to(fid.device), real=True)


def measure(fid, clip, folder, samples, batch):
    """{"fid", "clip"} of a row's images: FID and the mean CLIP score."""
    fid.reset()
    scores = []
    for some in chunks(samples, batch):
        images = [Image.open(folder / s.name).convert("RGB") for s in some]
        pixels = torch.stack([pil_to_tensor(image) for image in images])
        fid.update(pixels.to(fid.device), real=False)
        scores.append(clip(images, [s.caption for s in some]))
    return {"fid": float(fid.compute()), "clip": float(torch.cat(scores).mean())}
