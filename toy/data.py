"""The toy's images: MNIST and its like, a folder of one's own pictures, or digits drawn here from
fonts ("glyphs").

Images are kept as uint8, (N, C, H, W), and become float32 in [-1, 1] only in the batch that needs
them.
"""

import contextlib
import hashlib
import io
import os
import socket
import sys
import tempfile
import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from common.images import to_rgb
from toy.glyphs import glyphs
from toy.settings import DATASETS


class DataError(Exception):
    """The data asked for cannot be had. The message is one line: what, why, what to do about it."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training images and held-out test images, wholly in memory."""

    name: str  # what to call it in a report
    train_images: Tensor  # (N, C, H, W) uint8
    train_labels: Tensor  # (N,) int64
    test_images: Tensor  # (M, C, H, W) uint8, held out
    test_labels: Tensor  # (M,) int64
    classes: tuple[str, ...]
    kind: str = "glyphs"  # its name for --dataset

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits that change with any pixel, label or class name."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for tensor in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().numpy())
        return digest.hexdigest()[:16]


def to_float(images):
    """uint8 → float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """Float in [-1, 1] → uint8, rounded; what lies outside is clamped. `to_float`'s inverse."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class Batches:
    """Endless shuffled batches of (float images (B, C, H, W) in [-1, 1], labels (B,)).

    Each epoch is a fresh permutation, and a batch may straddle two, so every image is seen equally
    often. The order depends on the seed alone. `images` may be uint8 or float, on any device. With
    flip, half of an epoch's images are mirrored.
    """

    def __init__(self, images, labels, batch_size, seed, flip=False):
        assert len(images) == len(labels) > 0, f"{len(images)} images but {len(labels)} labels"
        self.images, self.labels, self.batch_size, self.flip = images, labels, batch_size, flip
        self.generator = torch.Generator().manual_seed(seed)
        self._start_epoch()

    def _start_epoch(self):
        # All that a resumed run needs to draw the same permutation.
        self.epoch_start = self.generator.get_state()
        self.order = torch.randperm(len(self.images), generator=self.generator)
        if self.flip:
            self.mirrored = torch.rand(len(self.images), generator=self.generator) < 0.5
        self.position = 0

    def __iter__(self):
        return self

    def __next__(self):
        parts, mirrored, missing = [], [], self.batch_size
        while missing:
            if self.position == len(self.order):
                self._start_epoch()
            parts.append(self.order[self.position : self.position + missing])
            if self.flip:
                mirrored.append(self.mirrored[parts[-1]])
            self.position += len(parts[-1])
            missing -= len(parts[-1])
        index = torch.cat(parts).to(self.images.device)
        images = self.images[index]
        if self.flip:
            flipped = torch.cat(mirrored).to(images.device)[:, None, None, None]
            images = torch.where(flipped, images.flip(3), images)
        labels = self.labels[index.to(self.labels.device)]
        return images if images.is_floating_point() else to_float(images), labels

    def state_dict(self):
        return {"epoch_start": self.epoch_start, "position": self.position}

    def load_state_dict(self, state):
        self.generator.set_state(state["epoch_start"])
        self._start_epoch()
        self.position = state["position"]


# Loading by name ==================================================================================


def load(name, data_dir=None, *, seed=0, size=32, limit=None, max_bad_files=0):
    """The dataset of that name, from `data_dir` (`data` when None), with at most `limit` images in
    each split.

    auto is MNIST where it is on disk or can be downloaded, else glyphs. Any other name is that
    dataset or a DataError. `seed` draws the glyphs. `size` is the side of glyphs and folder images;
    the other sets are 32x32. Up to `max_bad_files` unreadable files of a folder are left out.
    """
    root = Path("data" if data_dir is None else data_dir)
    if name not in DATASETS:
        raise DataError(f"--dataset {name}: no such dataset; choose one of {', '.join(DATASETS)}")
    if name == "auto":
        name = "glyphs" if _fetch("mnist", root) else "mnist"
    if name == "glyphs":
        data = _load_glyphs(seed, size, limit)
    elif name == "folder":
        data = _load_folder(root, size, limit, max_bad_files)
    else:
        data = _load_torchvision(name, root, size, limit)
    return replace(data, kind=name)


FEWEST_TESTS = 20  # test images, for k-NN metrics and a covariance


def check_splits(data):
    """DataError if a class has no image in a split, or there are too few test images to measure
    against: a --limit that is too small, a small folder, or one whose files are all bad."""
    for split, labels in (("training", data.train_labels), ("test", data.test_labels)):
        if gone := [c for i, c in enumerate(data.classes) if not (labels == i).any()]:
            raise DataError(
                f"--dataset {data.kind}: no {split} image of class {gone[0]}; add some, remove the "
                "class, or, if --limit is given, raise it"
            )
    if (tests := len(data.test_images)) < FEWEST_TESTS:
        raise DataError(
            f"--dataset {data.kind}: {tests} test images; at least {FEWEST_TESTS} are needed to "
            f"measure by; add images (one in {_HELD_OUT} of a folder without test/ is held out), "
            "or, if --limit is given, raise it"
        )


def _count(images):
    return f"({len(images):,} training images)"


_TEST_SEED = 2**31  # added for the test images: no seed below it trains on what another tests on


def _load_glyphs(seed, size, limit):
    n_train, n_test = (n if limit is None else min(n, limit) for n in (20_000, 10_000))
    train, test = glyphs(n_train, seed, size), glyphs(n_test, seed + _TEST_SEED, size)
    return Dataset("glyphs (built in)", *train, *test, classes=tuple("0123456789"))


# MNIST, Fashion-MNIST, CIFAR-10 ===================================================================

_KINDS = ("images-idx3", "labels-idx1")
_IDX = tuple(f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in _KINDS)
_CIFAR = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
# name: (torchvision's class, what people call it, its folder under --data-dir, the files in it)
_TORCHVISION = {
    "mnist": ("MNIST", "MNIST", "MNIST/raw", _IDX),
    "fashion-mnist": ("FashionMNIST", "Fashion-MNIST", "FashionMNIST/raw", _IDX),
    "cifar10": ("CIFAR10", "CIFAR-10", "cifar-10-batches-py", _CIFAR),
}
_SILENT_SECONDS = 10  # a network that says nothing for this long counts as absent


def _load_torchvision(name, root, size, limit):
    kind, title, folder, files = _TORCHVISION[name]
    if size != 32:
        raise DataError(
            f"--dataset {name}: {title} is 32x32 here, not {size}x{size}; "
            "take another size or dataset"
        )
    if reason := _fetch(name, root):
        raise DataError(
            f"--dataset {name}: {title} is not in --data-dir {root} and cannot be downloaded "
            f"({reason}); put {', '.join(files)} into {root / folder}, "
            "or use --dataset glyphs, which needs no files"
        )
    try:
        train, test = (_read_torchvision(kind, root, split, limit) for split in (True, False))
    except Exception as error:  # torchvision raises all sorts on damaged files
        raise DataError(
            f"--dataset {name}: cannot read {title} in --data-dir {root} ({_last_line(error)}); "
            f"remove {root / folder} to have it downloaded again, or use --dataset glyphs"
        ) from error
    return Dataset(f"{title} {_count(train[0])}", *train[:2], *test)


def _read_torchvision(kind, root, train, limit):
    """(images (N, C, 32, 32) uint8, labels (N,), class names)."""
    from torchvision import datasets

    source = getattr(datasets, kind)(root, train=train, download=False)
    images = torch.as_tensor(source.data)[:limit]
    labels = torch.as_tensor(source.targets)[:limit].long()
    if len(source.data) != len(source.targets):
        raise ValueError(f"{len(source.data)} images but {len(source.targets)} labels")
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    border = (32 - images.shape[-1]) // 2  # the 28x28 sets get a black frame: 32 halves more often
    classes = tuple(name.split(" - ")[0] for name in source.classes)  # MNIST says "0 - zero"
    return functional.pad(images, [border] * 4).contiguous(), labels, classes


def _fetch(name, root):
    """Have the files of a torchvision dataset under `root`, downloading them if need be. Returns
    why not, or None."""
    kind, title, folder, files = _TORCHVISION[name]
    if all((root / folder / file).is_file() for file in files):
        return None
    print(f"{title} is not in {root}: trying to download it", file=sys.stderr, flush=True)
    try:
        _download(kind, root)
    except Exception as error:  # no network, a full disk, a damaged archive ...
        return _last_line(error)
    return None


def _download(kind, root):
    """Download into a scratch folder and move whole files from there, so that a broken-off download
    leaves nothing."""
    from torchvision import datasets

    root.mkdir(parents=True, exist_ok=True)
    timeout, noise = socket.getdefaulttimeout(), io.StringIO()
    socket.setdefaulttimeout(_SILENT_SECONDS)
    try:
        with (
            tempfile.TemporaryDirectory(prefix=".download-", dir=root) as scratch,
            contextlib.redirect_stdout(noise),
            contextlib.redirect_stderr(noise),
        ):
            getattr(datasets, kind)(scratch, download=True)
            for file in [path for path in Path(scratch).rglob("*") if path.is_file()]:
                target = root / file.relative_to(scratch)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
    finally:
        socket.setdefaulttimeout(timeout)


def _last_line(error):
    """The last line of an error's message: torchvision's longer ones end with the cause."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


# A folder of pictures: CLASS/picture, or train/CLASS/picture and test/CLASS/picture ===============

_HELD_OUT = 10  # without a test folder, one picture in ten of each class is held out
_REMEDY = "give --data-dir a folder that holds one folder of images per class"


def _load_folder(root, size, limit, max_bad_files):
    train, test, classes = _split_folder(root)
    bad = []
    train_images, train_labels = _read_pictures(train[:limit], size, bad, max_bad_files)
    test_images, test_labels = _read_pictures(test[:limit], size, bad, max_bad_files)
    both = (train_images, test_images)
    if all((images == images[:, :1]).all() for images in both):  # all grey: one channel will do
        train_images, test_images = (images[:, :1].contiguous() for images in both)
    name = f"folder {root} {_count(train_images)}"
    return Dataset(name, train_images, train_labels, test_images, test_labels, classes)


def _split_folder(root):
    """(training pictures, test pictures, class names), the pictures being (path, label) pairs."""
    if not root.is_dir():
        raise DataError(f"--dataset folder: --data-dir {root} is not a folder; {_REMEDY}")
    held_out = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if held_out and (root / "train").is_dir():
        train, test = _list_pictures(root / "train"), _list_pictures(held_out)
        if train.keys() != test.keys():
            odd = ", ".join(sorted(train.keys() ^ test.keys()))
            raise DataError(
                f"--dataset folder: {root / 'train'} and {held_out} hold different classes "
                f"({odd}); give both the same class folders"
            )
    else:
        pictures = _list_pictures(root)
        for name, paths in pictures.items():
            if len(paths) < 2:
                raise DataError(
                    f"--dataset folder: {root / name} holds a single image, and one must be held "
                    "out; add images to it or remove it"
                )
        test = {name: paths[::_HELD_OUT] for name, paths in pictures.items()}
        train = {
            name: [p for i, p in enumerate(paths) if i % _HELD_OUT]
            for name, paths in pictures.items()
        }
    return _interleave(train), _interleave(test), tuple(train)


def _list_pictures(root):
    """{class name: sorted paths} of the class folders in `root`, in the order of their names."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        raise DataError(f"--dataset folder: --data-dir {root} holds no class folders; {_REMEDY}")
    pictures = {
        f.name: sorted(p for p in f.iterdir() if p.suffix.lower() in IMG_EXTENSIONS)
        for f in folders
    }
    for name, paths in pictures.items():
        if not paths:
            raise DataError(
                f"--dataset folder: no image in --data-dir {root / name}; add some, or {_REMEDY}"
            )
    return pictures


def _interleave(pictures):
    """(path, label) pairs, the first of every class, then the second ...: `limit` then keeps all
    the classes."""
    labelled = enumerate(pictures.values())
    ranked = [(i, label, path) for label, paths in labelled for i, path in enumerate(paths)]
    return [(path, label) for _, label, path in sorted(ranked)]


def _read_pictures(pictures, size, bad, max_bad_files):
    """(images (N, 3, size, size) uint8, labels (N,)): the shorter side scaled to `size`, the centre
    cropped. Up to max_bad_files that cannot be read are listed in bad and left out."""
    from PIL import Image, ImageOps
    from torchvision.transforms.functional import pil_to_tensor

    images, labels = [], []
    for path, label in pictures:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                picture = to_rgb(Image.open(path))
        except Exception as error:  # PIL raises a dozen kinds on damaged files
            bad.append(path)
            what = f"cannot read {path} ({_last_line(error)})"
            if len(bad) > max_bad_files:
                raise DataError(
                    f"--dataset folder: {what}; replace it or remove it from --data-dir; "
                    f"--max-bad-files {len(bad)} would leave it out"
                ) from error
            said = f"{what}: left out, as one of --max-bad-files {max_bad_files}"
            print(said, file=sys.stderr, flush=True)
            continue
        images.append(pil_to_tensor(ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)))
        labels.append(label)
    if not images:
        raise DataError(f"--dataset folder: not one of {len(pictures)} images can be read")
    return torch.stack(images), torch.tensor(labels)
