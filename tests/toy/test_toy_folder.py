"""toy/data.py: a folder of pictures, its split, and files that are no pictures."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from toy_runs import error_of

from toy.data import DataError, check_splits, load


def write_pictures(folder, n, *, side=(40, 40), start=0):
    """n coloured pictures, each of one colour, whose green gives its number."""
    folder.mkdir(parents=True)
    for i in range(n):
        Image.new("RGB", side, (200, start + i, 10)).save(folder / f"{i:03}.png")


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
    # A limit keeps every class.
    assert load("folder", tmp_path, limit=2).train_labels.tolist() == [0, 1]


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_folder_with_its_own_split(tmp_path, held_out):
    write_pictures(tmp_path / "train" / "x", 3)
    write_pictures(tmp_path / held_out / "x", 1, start=50)
    data = load("folder", tmp_path)
    assert data.classes == ("x",)
    assert data.train_images[:, 1, 0, 0].tolist() == [0, 1, 2]
    assert data.test_images[:, 1, 0, 0].tolist() == [50]


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
    assert data.train_images.shape[1] == data.test_images.shape[1] == 1
    assert data.train_images.unique().tolist() == [7]


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


def _truncated(path):
    Image.effect_noise((80, 80), 50).save(path)
    path.write_bytes(path.read_bytes()[:300])


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
    "truncated": (_truncated, None),
    "empty": (lambda p: p.write_bytes(b""), None),
    "text": (lambda p: p.write_text("not a picture"), None),
    "bomb": (lambda p: p.write_bytes(b"P5 60000 60000 255 "), None),
}


@pytest.mark.parametrize("write, mean", KINDS.values(), ids=KINDS)
def test_any_picture_of_a_folder_is_read_or_named_or_left_out_and_counted(
    tmp_path, write, mean, capsys
):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("L", (8, 8), 120 + i).save(tmp_path / name / f"{i}.png")
    odd = tmp_path / "a" / "9.png"
    write(odd)
    if mean is not None:
        images = load("folder", tmp_path, size=8).train_images
        assert len(images) == 6 - 1 and (images.float().mean((1, 2, 3)) - mean).abs().min() < 1.5
        return
    says = f"cannot read {odd}.*--max-bad-files 1 would leave it out"
    with pytest.raises(DataError, match=says) as error:
        load("folder", tmp_path, size=8)
    assert "\n" not in str(error.value)
    assert len(load("folder", tmp_path, size=8, max_bad_files=1).train_images) == 4
    err = capsys.readouterr().err
    assert str(odd) in err and "left out" in err
    write(tmp_path / "b" / "9.png")
    with pytest.raises(DataError, match="--max-bad-files 2 would"):
        load("folder", tmp_path, size=8, max_bad_files=1)


def test_a_class_whose_files_are_all_bad_is_named(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(3):
            path = tmp_path / name / f"{i}.png"
            Image.new("L", (8, 8)).save(path) if name == "a" else path.write_text("")
    with pytest.raises(DataError, match="no training image of class b"):
        check_splits(load("folder", tmp_path, size=8, max_bad_files=9))


def test_a_class_without_test_images_and_too_few_test_images_are_named(tmp_path):
    for split, classes in (("train", "ab"), ("test", "ab")):
        for name in classes:
            write_pictures(tmp_path / split / name, 10, side=(8, 8))
    data = load("folder", tmp_path, size=8)
    check_splits(data)  # twenty are enough
    with pytest.raises(DataError, match="19 test images; at least 20 are needed"):
        check_splits(replace(data, test_images=data.test_images[1:]))
    with pytest.raises(DataError, match="no test image of class b"):
        check_splits(replace(data, test_labels=data.test_labels * 0))
