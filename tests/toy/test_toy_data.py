"""toy/data.py: MNIST and its like, read and fetched without a network, files only in tmp_path."""

import pickle
import socket
from pathlib import Path
from urllib.error import URLError

import numpy
import pytest
import torch
import torchvision
from toy_runs import error_of
from trust import Bomb

from toy.data import _CIFAR, DataError, load

IDX = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Downloads fail as they do half-way: a part of a file written, much printed, then an error of
    several lines."""

    def download(self):
        assert socket.getdefaulttimeout(), "a network that hangs would hang the run"
        Path(self.raw_folder).mkdir(parents=True)
        Path(self.raw_folder, IDX[0]).write_bytes(b"half")
        print("noise")
        raise URLError("first line\nno network")

    for kind in ("MNIST", "FashionMNIST"):
        monkeypatch.setattr(getattr(torchvision.datasets, kind), "download", download)


def write_idx(root, n_train=5, n_test=3, folder="MNIST"):
    """Tiny idx files; returns the (N, 28, 28) images of both splits."""
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    random = numpy.random.default_rng(0)
    splits = []
    for n, images, labels in ((n_train, *IDX[:2]), (n_test, *IDX[2:])):
        pixels = random.integers(1, 256, (n, 28, 28), dtype=numpy.uint8)
        header = numpy.array([0x803, n, 28, 28], dtype=">i4").tobytes()
        (raw / images).write_bytes(header + pixels.tobytes())
        header = numpy.array([0x801, n], dtype=">i4").tobytes()
        (raw / labels).write_bytes(header + bytes(i % 10 for i in range(n)))
        splits.append(torch.from_numpy(pixels))
    return splits


@pytest.mark.parametrize(
    "name, folder, title, first",
    [
        ("mnist", "MNIST", "MNIST", "0"),
        ("fashion-mnist", "FashionMNIST", "Fashion-MNIST", "T-shirt/top"),
    ],
)
def test_idx_files_are_read_and_framed_in_black(tmp_path, name, folder, title, first):
    train, test = write_idx(tmp_path, folder=folder)
    data = load(name, tmp_path)
    assert data.name == f"{title} (5 training images)" and data.classes[0] == first
    for images, expected in ((data.train_images, train), (data.test_images, test)):
        assert images.shape == (len(expected), 1, 32, 32) and images.dtype == torch.uint8
        assert torch.equal(images[:, 0, 2:-2, 2:-2], expected)
        assert images.long().sum() == expected.long().sum()  # so the frame is all zero
    assert data.train_labels.tolist() == [0, 1, 2, 3, 4] and data.train_labels.dtype == torch.int64


def test_limit_keeps_the_first_images(tmp_path):
    train, _ = write_idx(tmp_path)
    data = load("mnist", tmp_path, limit=2)
    kept = (data.train_images, data.train_labels, data.test_images, data.test_labels)
    assert [len(x) for x in kept] == [2, 2, 2, 2]
    assert torch.equal(data.train_images[:, 0, 2:-2, 2:-2], train[:2])
    assert data.name == "MNIST (2 training images)"


def test_auto_takes_mnist_on_disk(tmp_path):
    write_idx(tmp_path)
    assert load("auto", tmp_path).name == "MNIST (5 training images)"


def test_auto_falls_back_to_glyphs_and_leaves_nothing_behind(tmp_path, capfd):
    # Again, since the first attempt must not have left half a file that the second takes for MNIST.
    for _ in range(2):
        assert load("auto", tmp_path / "data", limit=10).name == "glyphs (built in)"
    assert [path for path in tmp_path.rglob("*") if path.name != "data"] == []
    assert socket.getdefaulttimeout() is None
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines() == [f"MNIST is not in {tmp_path / 'data'}: trying to download it"] * 2


@pytest.mark.parametrize(
    "name, kind, title",
    [("auto", "MNIST", "MNIST"), ("fashion-mnist", "FashionMNIST", "Fashion-MNIST")],
)
def test_what_is_missing_is_downloaded(tmp_path, monkeypatch, name, kind, title):
    (tmp_path / "data" / kind / "raw").mkdir(parents=True)
    (tmp_path / "data" / kind / "raw" / IDX[0]).write_bytes(b"one file of four, and that one torn")
    dataset, root = getattr(torchvision.datasets, kind), tmp_path / "data"
    monkeypatch.setattr(dataset, "download", lambda self: write_idx(Path(self.root), folder=kind))
    assert load(name, root).name == f"{title} (5 training images)"
    found = sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())
    assert found == sorted(Path(kind, "raw", name) for name in IDX)


def test_a_dataset_asked_for_by_name_is_never_replaced(tmp_path):
    message = error_of("mnist", tmp_path)
    where = (f"--data-dir {tmp_path}", str(tmp_path / "MNIST/raw"), *IDX)
    for part in ("--dataset mnist", "no network", *where, "--dataset glyphs"):
        assert part in message


# auto does not pass silently over files that are there but damaged.
@pytest.mark.parametrize("name", ["mnist", "auto"])
def test_damaged_files_are_named(tmp_path, name):
    write_idx(tmp_path)
    (tmp_path / "MNIST/raw" / IDX[0]).write_bytes(b"half")
    message = error_of(name, tmp_path)
    assert f"--data-dir {tmp_path}" in message and "remove" in message


def test_images_and_labels_must_match_in_number(tmp_path):
    write_idx(tmp_path, n_train=5)
    header = numpy.array([0x801, 4], dtype=">i4").tobytes()
    (tmp_path / "MNIST/raw" / IDX[1]).write_bytes(header + bytes(4))
    assert "5 images but 4 labels" in error_of("mnist", tmp_path)


def test_unknown_name_and_impossible_size_are_errors(tmp_path):
    assert "--dataset mnits" in error_of("mnits", tmp_path)
    assert "fashion-mnist" in error_of("mnits", tmp_path)
    write_idx(tmp_path)
    assert "32x32" in error_of("mnist", tmp_path, size=64)


def test_cifar10_is_laid_out_channels_first(tmp_path, monkeypatch):
    pixels = numpy.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=numpy.uint8)

    class Tiny:  # torchvision's own reader insists on the real files' checksums
        classes, data, targets = ["airplane", "automobile"], pixels, [0, 1, 1, 0]

        def __init__(self, root, train, download):
            pass

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Tiny)
    monkeypatch.setattr("toy.data._fetch", lambda name, root: None)
    data = load("cifar10", tmp_path)
    assert data.name == "CIFAR-10 (4 training images)"
    assert data.classes == ("airplane", "automobile")
    assert data.train_images.shape == (4, 3, 32, 32) and data.train_labels.tolist() == [0, 1, 1, 0]
    assert data.train_images[2, 1, 5, 9] == int(pixels[2, 5, 9, 1])


def test_a_pickle_in_the_place_of_cifars_is_not_run(tmp_path):
    """torchvision reads CIFAR-10's files by pickle, but none whose checksum is not the published
    one."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for file in _CIFAR:
        (folder / file).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(DataError, match="cannot read CIFAR-10"):
        load("cifar10", tmp_path)
    assert not (tmp_path / "ran").exists()
