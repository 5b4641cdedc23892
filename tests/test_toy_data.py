"""toy/data.py: the glyphs, the loaders and their errors, the batches. Offline; files only under tmp_path."""

import dataclasses
import socket
from pathlib import Path
from urllib.error import URLError

import numpy
import pytest
import torch
import torchvision
from PIL import Image

from toy import data as toy_data
from toy.data import Batches, DataError, glyphs, load, to_float, to_uint8

IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Downloads fail as they do half-way: a part of a file written, much printed, then an error of several lines."""

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
        (raw / labels).write_bytes(numpy.array([0x801, n], dtype=">i4").tobytes() + bytes(i % 10 for i in range(n)))
        splits.append(torch.from_numpy(pixels))
    return splits


def write_pictures(folder, n, *, side=(40, 40), start=0):
    """n coloured pictures, each of one colour, whose green gives its number."""
    folder.mkdir(parents=True)
    for i in range(n):
        Image.new("RGB", side, (200, start + i, 10)).save(folder / f"{i:03}.png")


def error_of(*args, **kwargs):
    with pytest.raises(DataError) as caught:
        load(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------------------------------------------------------------
# Pixels and batches
# ---------------------------------------------------------------------------------------------------------------------


def test_to_float_and_to_uint8_are_inverse():
    levels = torch.arange(256, dtype=torch.uint8)
    images = to_float(levels)
    assert images.dtype == torch.float32 and images[0] == -1 and images[-1] == 1
    assert torch.equal(to_uint8(images), levels)
    assert to_uint8(torch.tensor([-3.0, 2.0])).tolist() == [0, 255]
    for nudge in (-0.9, 0.9):  # just short of half a level: rounded, not truncated
        assert torch.equal(to_uint8(images + nudge / 255), levels)


def numbered(n):
    return torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1), torch.arange(n)


def take(batches, n):
    return [next(batches)[1].tolist() for _ in range(n)]


def test_batches_see_every_image_once_an_epoch_across_batch_borders():
    seen = sum(take(Batches(*numbered(10), batch_size=4, seed=0), 5), [])  # 20 images, two epochs
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


def test_batches_pair_float_images_with_their_labels():
    images, labels = next(Batches(*numbered(10), batch_size=25, seed=0))  # more than two epochs in one batch
    assert images.shape == (25, 1, 1, 1) and images.dtype == torch.float32
    assert torch.equal(to_uint8(images).flatten().long(), labels)
    floats = torch.linspace(-1, 1, 10).view(10, 1, 1, 1)
    images, labels = next(Batches(floats, numbered(10)[1], batch_size=3, seed=0))
    assert torch.equal(images, floats[labels])


def test_batches_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = take(Batches(*numbered(10), batch_size=4, seed=7), 6)
    torch.manual_seed(2)
    assert take(Batches(*numbered(10), batch_size=4, seed=7), 6) == first
    assert take(Batches(*numbered(10), batch_size=4, seed=8), 6) != first


@pytest.mark.parametrize("done", [0, 1, 3, 5])  # batches before the stop: at an epoch's start, inside, at its end
def test_batches_resume_exactly(done, tmp_path):
    batches = Batches(*numbered(10), batch_size=4, seed=0)
    take(batches, done)
    torch.save(batches.state_dict(), tmp_path / "state.pt")
    expected = take(batches, 8)
    resumed = Batches(*numbered(10), batch_size=4, seed=123)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert take(resumed, 8) == expected


def test_batches_mirror_half_of_the_images_if_asked_also_when_resumed():
    images, labels = torch.rand(4000, 1, 2, 3), torch.arange(4000)
    batches, resumed = (Batches(images, labels, 1000, seed, flip=True) for seed in (0, 9))
    seen, of = (torch.cat(x) for x in zip(*(next(batches) for _ in range(4)), strict=True))
    mirrored = (seen != images[of]).flatten(1).any(1)
    assert torch.equal(seen[mirrored], images[of][mirrored].flip(3)) and abs(mirrored.sum() - 2000) < 5 * 1000**0.5
    next(batches)  # into the second epoch
    resumed.load_state_dict(batches.state_dict())
    for _ in range(4):
        assert all(map(torch.equal, next(batches), next(resumed)))


# ---------------------------------------------------------------------------------------------------------------------
# Glyphs
# ---------------------------------------------------------------------------------------------------------------------


def test_glyphs_are_deterministic():
    images, labels = glyphs(600, seed=3)
    torch.manual_seed(99)
    again, labels_again = glyphs(600, seed=3)
    assert torch.equal(images, again) and torch.equal(labels, labels_again)
    assert torch.equal(glyphs(42, seed=3)[0], images[:42])
    assert not torch.equal(glyphs(600, seed=4)[0], images)


def test_glyphs_are_balanced_and_white_on_black():
    images, labels = glyphs(1000)
    assert images.shape == (1000, 1, 32, 32) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert (labels.view(100, 10).sort(dim=1).values == torch.arange(10)).all()
    assert (images.amin(dim=(1, 2, 3)) == 0).all() and (images.amax(dim=(1, 2, 3)) > 128).all()
    ink = images.float().mean(dim=(1, 2, 3)) / 255
    assert 0.02 < ink.min() and ink.max() < 0.45


@pytest.mark.parametrize("size", [16, 32, 48])
def test_glyphs_lie_wholly_inside(size):
    images = glyphs(2000, seed=1, size=size)[0]
    assert images.shape[-2:] == (size, size)
    for edge in (images[..., 0, :], images[..., -1, :], images[..., 0], images[..., -1]):
        assert edge.max() == 0


def test_glyphs_look_like_their_class_and_not_like_one_another():
    """The nearest of 3,000 others, by plain pixel distance, mostly has the same label, yet is never the same image."""
    images, labels = glyphs(3500, seed=2)
    flat = images.flatten(1).float()
    gap, nearest = torch.cdist(flat[3000:], flat[:3000]).min(dim=1)
    assert (labels[nearest] == labels[3000:]).float().mean() > 0.8
    assert gap.min() > 100


def test_load_glyphs_holds_out_other_images():
    data = load("glyphs", None, seed=5, limit=300)
    assert data.name == "glyphs (built in)" and data.classes == tuple("0123456789")
    assert len(data.train_images) == len(data.test_images) == 300
    assert torch.equal(data.train_images, glyphs(300, seed=5)[0])
    assert torch.cdist(data.train_images.flatten(1).float(), data.test_images.flatten(1).float()).min() > 0


def test_fingerprint_follows_content():
    data = load("glyphs", None, limit=20)
    assert load("glyphs", None, limit=20).fingerprint == data.fingerprint
    for field in ("train_images", "train_labels", "test_images", "test_labels"):
        changed = getattr(data, field).clone()
        changed[-1] += 1
        assert dataclasses.replace(data, **{field: changed}).fingerprint != data.fingerprint, field
    assert dataclasses.replace(data, classes=tuple("abcdefghij")).fingerprint != data.fingerprint


# ---------------------------------------------------------------------------------------------------------------------
# MNIST and auto
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, folder, title, first",
    [("mnist", "MNIST", "MNIST", "0"), ("fashion-mnist", "FashionMNIST", "Fashion-MNIST", "T-shirt/top")],
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
    assert len(data.train_images) == len(data.test_images) == len(data.train_labels) == len(data.test_labels) == 2
    assert torch.equal(data.train_images[:, 0, 2:-2, 2:-2], train[:2])
    assert data.name == "MNIST (2 training images)"


def test_auto_takes_mnist_on_disk(tmp_path):
    write_idx(tmp_path)
    assert load("auto", tmp_path).name == "MNIST (5 training images)"


def test_auto_falls_back_to_glyphs_and_leaves_nothing_behind(tmp_path, capfd):
    for _ in range(2):  # again, since the first attempt must not have left half a file that the second takes for MNIST
        assert load("auto", tmp_path / "data", limit=10).name == "glyphs (built in)"
    assert [path for path in tmp_path.rglob("*") if path.name != "data"] == []
    assert socket.getdefaulttimeout() is None
    out, err = capfd.readouterr()
    assert out == "" and err.splitlines() == [f"MNIST is not in {tmp_path / 'data'}: trying to download it"] * 2


def test_auto_downloads_what_is_missing(tmp_path, monkeypatch):
    (tmp_path / "data/MNIST/raw").mkdir(parents=True)
    (tmp_path / "data/MNIST/raw" / IDX[0]).write_bytes(b"one file of four, and that one torn")
    monkeypatch.setattr(torchvision.datasets.MNIST, "download", lambda self: write_idx(Path(self.root)))
    assert load("auto", tmp_path / "data").name == "MNIST (5 training images)"
    found = sorted(path.relative_to(tmp_path / "data") for path in (tmp_path / "data").rglob("*") if path.is_file())
    assert found == sorted(Path("MNIST/raw", name) for name in IDX)


def test_a_dataset_asked_for_by_name_is_never_replaced(tmp_path):
    message = error_of("mnist", tmp_path)
    raw = str(tmp_path / "MNIST/raw")
    for part in ("--dataset mnist", f"--data-dir {tmp_path}", "no network", raw, *IDX, "--dataset glyphs"):
        assert part in message


@pytest.mark.parametrize("name", ["mnist", "auto"])  # auto does not pass silently over files that are there but damaged
def test_damaged_files_are_named(tmp_path, name):
    write_idx(tmp_path)
    (tmp_path / "MNIST/raw" / IDX[0]).write_bytes(b"half")
    message = error_of(name, tmp_path)
    assert f"--data-dir {tmp_path}" in message and "remove" in message


def test_images_and_labels_must_match_in_number(tmp_path):
    write_idx(tmp_path, n_train=5)
    (tmp_path / "MNIST/raw" / IDX[1]).write_bytes(numpy.array([0x801, 4], dtype=">i4").tobytes() + bytes(4))
    assert "5 images but 4 labels" in error_of("mnist", tmp_path)


def test_unknown_name_and_impossible_size_are_errors(tmp_path):
    assert "--dataset mnits" in error_of("mnits", tmp_path) and "fashion-mnist" in error_of("mnits", tmp_path)
    write_idx(tmp_path)
    assert "32x32" in error_of("mnist", tmp_path, size=64)


# ---------------------------------------------------------------------------------------------------------------------
# CIFAR-10
# ---------------------------------------------------------------------------------------------------------------------


def test_cifar10_is_laid_out_channels_first(tmp_path, monkeypatch):
    pixels = numpy.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=numpy.uint8)

    class Tiny:  # torchvision's own reader insists on the real files' checksums
        classes, data, targets = ["airplane", "automobile"], pixels, [0, 1, 1, 0]

        def __init__(self, root, train, download):
            pass

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Tiny)
    monkeypatch.setattr("toy.data._fetch", lambda name, root: None)
    data = load("cifar10", tmp_path)
    assert data.name == "CIFAR-10 (4 training images)" and data.classes == ("airplane", "automobile")
    assert data.train_images.shape == (4, 3, 32, 32) and data.train_labels.tolist() == [0, 1, 1, 0]
    assert data.train_images[2, 1, 5, 9] == int(pixels[2, 5, 9, 1])


# ---------------------------------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------------------------------


def test_folder_holds_out_every_tenth_image_of_each_class(tmp_path):
    write_pictures(tmp_path / "b_dogs", 21)
    write_pictures(tmp_path / "a_cats", 2, start=100)
    (tmp_path / ".cache").mkdir()
    (tmp_path / "a_cats" / "notes.txt").write_text("not an image")
    data = load("folder", tmp_path)
    assert data.classes == ("a_cats", "b_dogs")
    assert data.name == f"folder {tmp_path} (19 training images)"
    green = {s: getattr(data, f"{s}_images")[:, 1, 0, 0].tolist() for s in ("train", "test")}
    assert sorted(green["test"]) == [0, 10, 20, 100]
    assert sorted(green["train"] + green["test"]) == [*range(21), 100, 101]
    assert data.train_labels.tolist() == [int(g < 100) for g in green["train"]]
    assert load("folder", tmp_path, limit=2).train_labels.tolist() == [0, 1]  # a limit keeps every class


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_folder_with_its_own_split(tmp_path, held_out):
    write_pictures(tmp_path / "train" / "x", 3)
    write_pictures(tmp_path / held_out / "x", 1, start=50)
    data = load("folder", tmp_path)
    assert data.classes == ("x",)
    assert data.train_images[:, 1, 0, 0].tolist() == [0, 1, 2] and data.test_images[:, 1, 0, 0].tolist() == [50]


def test_folder_scales_the_shorter_side_and_crops_the_centre(tmp_path):
    (tmp_path / "wide").mkdir()
    picture = Image.new("RGB", (120, 40), "red")
    picture.paste("lime", (40, 0, 80, 40))
    for name in ("1.png", "2.PNG"):
        picture.save(tmp_path / "wide" / name)
    images = load("folder", tmp_path, size=24).train_images
    assert images.shape == (1, 3, 24, 24)
    assert images[0, :, 12, 12].tolist() == [0, 255, 0] and images[0, 1].min() > 200


def test_folder_of_grey_pictures_has_one_channel(tmp_path):
    write_pictures(tmp_path / "x", 1)
    Image.new("L", (32, 32), 7).save(tmp_path / "x" / "grey.png")
    assert load("folder", tmp_path).train_images.shape[1] == 3  # one coloured picture is enough
    Image.new("L", (32, 32), 9).save(tmp_path / "x" / "000.png")
    data = load("folder", tmp_path)
    assert data.train_images.shape[1] == data.test_images.shape[1] == 1 and data.train_images.unique().tolist() == [7]


def test_folder_errors(tmp_path):
    missing = tmp_path / "missing"
    message = error_of("folder", missing)
    assert f"--data-dir {missing}" in message and "--dataset folder" in message
    assert "class" in error_of("folder", tmp_path)
    (tmp_path / "empty").mkdir()
    assert f"no image in --data-dir {tmp_path / 'empty'}" in error_of("folder", tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "empty" / "only.png")
    assert "single image" in error_of("folder", tmp_path)
    (tmp_path / "empty" / "torn.png").write_bytes(b"no picture")
    message = error_of("folder", tmp_path)
    assert str(tmp_path / "empty" / "torn.png") in message and "--data-dir" in message


def test_folder_splits_must_have_the_same_classes(tmp_path):
    write_pictures(tmp_path / "train" / "x", 2)
    write_pictures(tmp_path / "train" / "y", 2)
    write_pictures(tmp_path / "test" / "x", 2)
    assert "different classes (y)" in error_of("folder", tmp_path)


def _of_16_bits(path):
    Image.fromarray(torch.full((40, 40), 40000).to(torch.uint16).numpy()).save(path)


def _of_a_transparent_white(path):
    image = Image.new("P", (40, 40), 1)
    image.putpalette([0, 0, 0, 255, 255, 255])
    image.save(path, transparency=1)


KINDS = {  # name: (writes it, mean of its pixels; None: it cannot be read)
    "palette": (lambda p: Image.new("P", (40, 40), 0).save(p), 0),
    "transparent palette": (_of_a_transparent_white, 0),
    "16-bit": (_of_16_bits, 40000 // 256),
    "CMYK": (lambda p: Image.new("CMYK", (40, 40), (0, 0, 0, 255)).save(p, "JPEG"), 0),
    "transparent": (lambda p: Image.new("RGBA", (40, 40), (255, 255, 255, 0)).save(p), 0),
    "grey with alpha": (lambda p: Image.new("LA", (40, 40), (200, 255)).save(p), 200),
    "1×1": (lambda p: Image.new("L", (1, 1), 90).save(p), 90),
    "20,000 wide": (lambda p: Image.new("L", (20_000, 3), 90).save(p), 90),
    "corrupt": (lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100)), None),
    "truncated": (lambda p: Image.effect_noise((80, 80), 50).save(p) or p.write_bytes(p.read_bytes()[:300]), None),
    "empty": (lambda p: p.write_bytes(b""), None),
    "text": (lambda p: p.write_text("not a picture"), None),
    "bomb": (lambda p: p.write_bytes(b"P5 60000 60000 255 "), None),
}  # fmt: skip


@pytest.mark.parametrize("write, mean", KINDS.values(), ids=KINDS)
def test_any_picture_of_a_folder_is_read_or_named_or_left_out_and_counted(tmp_path, write, mean, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("L", (8, 8), 120 + i).save(tmp_path / name / f"{i}.png")
    odd = tmp_path / "a" / "9.png"
    write(odd)
    if mean is not None:
        images = toy_data.load("folder", tmp_path, size=8).train_images
        assert len(images) == 6 - 1 and (images.float().mean((1, 2, 3)) - mean).abs().min() < 1.5
        return
    with pytest.raises(toy_data.DataError, match=f"cannot read {odd}.*--max-bad-files 1 would leave it out") as error:
        toy_data.load("folder", tmp_path, size=8)
    assert "\n" not in str(error.value)
    assert len(toy_data.load("folder", tmp_path, size=8, max_bad_files=1).train_images) == 4
    err = capsys.readouterr().err
    assert str(odd) in err and "left out" in err
    write(tmp_path / "b" / "9.png")
    with pytest.raises(toy_data.DataError, match="--max-bad-files 2 would"):
        toy_data.load("folder", tmp_path, size=8, max_bad_files=1)


def test_a_class_whose_files_are_all_bad_is_named(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("L", (8, 8)).save(tmp_path / name / f"{i}.png") if name == "a" else (tmp_path / name / f"{i}.png").write_text("")
    with pytest.raises(toy_data.DataError, match="no training image of class b"):
        toy_data.check_classes(toy_data.load("folder", tmp_path, size=8, max_bad_files=9))


def test_a_pickle_in_the_place_of_cifars_is_not_run(tmp_path):
    """torchvision reads CIFAR-10's files by pickle, but none whose checksum is not the published one."""
    import pickle

    from test_checkpoints import Bomb

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for file in toy_data._CIFAR:
        (folder / file).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(toy_data.DataError, match="cannot read CIFAR-10"):
        toy_data.load("cifar10", tmp_path)
    assert not (tmp_path / "ran").exists()
