"""full/data.py: three sources, one stream; split, shuffled, resumable to the sample; what is broken
is counted."""

import io
import json
import random
import tarfile

import pytest
import tiny_checkpoints as tiny
import torch
from PIL import Image

from full import data
from full.settings import Settings


def settings(path, **more):
    return Settings(
        data=str(path), **(dict(resolution=32, batch=2, workers=0, shuffle_window=4) | more)
    )


def jpeg(colour, size=(40, 48)):
    file = io.BytesIO()
    Image.new("RGB", size, (colour, 255 - colour, 7)).save(file, "JPEG")
    return file.getvalue()


def write_shard(path, samples):
    """samples: (key, {suffix: bytes})."""
    with tarfile.open(path, "w") as tar:
        for key, files in samples:
            for suffix, content in files.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    """Four shards of five samples: 0-0 … 3-4, one of them with its caption in JSON."""
    for s in range(4):
        samples = [
            (f"{s}{i}", {"jpg": jpeg(40 * s + i), "txt": f"{s}-{i}".encode()}) for i in range(5)
        ]
        samples[3] = (
            f"{s}3",
            {"jpg": jpeg(40 * s + 3), "json": json.dumps({"caption": f"{s}-3"}).encode()},
        )
        write_shard(tmp_path / f"{s:03d}.tar", samples)
    return tmp_path


def captions(settings, count, rank=0, world=1, state=None):
    """The first batches' captions, and the loader's state after them."""
    loader = data.make_loader(settings, rank, world)
    if state:
        loader.load_state_dict(state)
    batches = iter(loader)
    return [c for _ in range(count) for c in next(batches)["caption"]], loader.state_dict()


@pytest.mark.parametrize("spelling", ["{}", "{}/*.tar", "{}/{{000..003}}.tar"])
def test_an_epoch_of_shards_is_every_sample_once_in_shuffled_order(shards, spelling):
    found, _ = captions(settings(spelling.format(shards)), 10)
    every = [f"{s}-{i}" for s in range(4) for i in range(5)]
    assert sorted(found) == every and found != every
    assert captions(settings(shards), 10)[0] == found
    assert captions(settings(shards, seed=1), 10)[0] != found
    second = captions(settings(shards), 20)[0][20:]
    assert sorted(second) == every and second != found


def test_processes_and_workers_share_an_epoch_without_overlap(shards):
    parts = [captions(settings(shards, batch=5, workers=2), 2, rank, 2)[0] for rank in (0, 1)]
    assert sorted(parts[0] + parts[1]) == [f"{s}-{i}" for s in range(4) for i in range(5)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["shards", "folder"])
def test_resumed_after_any_batch_the_stream_goes_on_where_it_was(shards, tmp_path, kind, workers):
    path = shards if kind == "shards" else tiny.write_images(tmp_path / "images", 14, (40, 40))
    chosen = settings(path, workers=workers)
    whole, _ = captions(chosen, 16)
    for after in (1, 4, 11) if workers == 0 else (5,):
        _, state = captions(chosen, after)
        assert captions(chosen, 16 - after, state=state)[0] == whole[2 * after :]


def test_a_window_is_emptied_before_the_next_is_read(shards):
    chosen = settings(shards, shuffle_window=2)
    source, left = data.open_source(chosen), []
    windows = source.windows

    def watched(*place, **more):
        for after, window in windows(*place, **more):
            yield after, window
            left.append(len(window))

    source.windows = watched
    samples = iter(data.Stream(source, chosen))
    assert len({next(samples)["caption"] for _ in range(5)}) == 5
    assert left == [0, 0]


def test_a_folder_with_captions_beside_images_or_in_metadata(tmp_path):
    folder = tiny.write_images(tmp_path / "images", 6, (40, 40))
    beside = captions(settings(folder), 3)[0]
    assert sorted(beside) == [f"colours number {i}" for i in range(6)]
    lines = [
        json.dumps({"file_name": f"{i:03d}.jpg", "text": f"number {i} é"}, ensure_ascii=False)
        for i in range(6)
    ]
    (folder / "metadata.jsonl").write_text("\n".join(lines), "utf-8")
    assert sorted(captions(settings(folder), 3)[0]) == [f"number {i} é" for i in range(6)]


def test_a_hugging_face_data_set(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tiny.write_images(tmp_path / "images", 4, (40, 40))
    for file in folder.glob("*.txt"):
        file.unlink()
    (folder / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": f"{i:03d}.jpg", "text": f"{i}"}) for i in range(4))
    )
    (folder / "002.jpg").write_bytes(b"no image")
    chosen = settings(f"hf:{folder}")
    assert set(captions(chosen, 3)[0]) == {"0", "1", "3"}
    with pytest.raises(
        data.DataError, match="--hf-caption captoin: no such column; there are image, text"
    ):
        data.open_source(settings(f"hf:{folder}", hf_caption="captoin"))


def test_images_are_cropped_in_the_centre(tmp_path):
    image = Image.new("RGB", (100, 50), (255, 0, 0))
    image.paste((0, 0, 255), (25, 0, 75, 50))  # the middle square is blue
    file = io.BytesIO()
    image.save(file, "PNG")
    pixels = data.prepare(file.getvalue(), None, settings(tmp_path))
    assert pixels.shape == (3, 32, 32)
    assert torch.allclose(
        pixels[:, 4:-4, 4:-4].mean((1, 2)), torch.tensor([-1.0, -1.0, 1.0]), atol=0.02
    )


def test_what_is_broken_is_skipped_and_counted(tmp_path):
    good = [(f"{i}", {"jpg": jpeg(9 * i), "txt": f"{i}".encode()}) for i in range(8)]
    good[1] = ("1", {"jpg": b"no image", "txt": b"1"})
    good[2] = ("2", {"jpg": jpeg(5)})  # no caption
    good[3] = ("3", {"txt": b"3"})  # no image
    good[4] = ("4", {"jpg": jpeg(5, (8, 90)), "txt": b"4"})  # too small
    write_shard(tmp_path / "a.tar", good)
    whole = tmp_path / "a.tar"
    batches = iter(data.make_loader(settings(whole, min_size=16, batch=4)))
    seen = [next(batches) for _ in range(2)]  # two epochs
    assert sorted(seen[0]["caption"]) == ["0", "5", "6", "7"] == sorted(seen[1]["caption"])
    assert sum(b["skipped"] for b in seen) in range(4, 9)


def test_a_shard_cut_short_gives_what_it_has(tmp_path):
    write_shard(
        tmp_path / "a.tar",
        [(f"{i}", {"jpg": jpeg(9 * i), "txt": f"{i}".encode()}) for i in range(8)],
    )
    whole = (tmp_path / "a.tar").read_bytes()
    sixth = [i for i in range(len(whole)) if whole.startswith(b"\xff\xd8\xff", i)][5]
    (tmp_path / "a.tar").write_bytes(whole[: sixth + 200])
    batches = iter(data.make_loader(settings(tmp_path)))
    seen = [next(batches) for _ in range(12)]
    assert {c for b in seen for c in b["caption"]} == {"0", "1", "2", "3", "4"}
    assert sum(b["skipped"] for b in seen) > 0


MISTAKES = {
    "no captions": (lambda d: (d / "x.jpg").write_bytes(jpeg(1)), "1 images and no captions"),
    "empty": (lambda d: None, "no images there"),
    "metadata": (
        lambda d: (d / "metadata.jsonl").write_text('{"file_name": 3'),
        "metadata.jsonl, line 1",
    ),
    "outside": (
        lambda d: (d / "metadata.jsonl").write_text('{"file_name": "../a.jpg", "text": ""}'),
        "lies outside",
    ),
}


@pytest.mark.parametrize("make, message", MISTAKES.values(), ids=MISTAKES)
def test_a_folder_without_data_is_refused(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(data.DataError, match=message):
        data.open_source(settings(tmp_path))


def test_nothing_usable_and_too_few_shards_are_refused(shards):
    words = (
        "no usable sample; 0 were unreadable; the last problem: 40×48 is smaller than --min-size 99"
    )
    with pytest.raises(data.DataError, match=words):
        next(iter(data.make_loader(settings(shards, min_size=99))))
    with pytest.raises(data.DataError, match="4 shards for 5 reading processes"):
        next(iter(data.make_loader(settings(shards), 0, 5)))
    with pytest.raises(data.DataError, match="nowhere.tar is not there"):
        data.open_source(settings(shards / "nowhere.tar"))


def test_a_shard_whose_name_is_a_command_is_read_and_not_run(tmp_path, monkeypatch):
    """webdataset runs what follows "pipe:" in a shell; a file of such a name is a file."""
    monkeypatch.chdir(tmp_path)
    name = "pipe:touch ran;#.tar"
    write_shard(
        tmp_path / name, [(str(i), {"jpg": jpeg(i), "txt": b"a caption"}) for i in range(2)]
    )
    for where in (".", "*.tar"):
        source = data.open_source(settings(where))
        assert len(list(source.samples(source.urls[0]))) == 2
    assert not (tmp_path / "ran").exists()


def test_names_inside_a_shard_write_nothing_anywhere(tmp_path, monkeypatch):
    """Paths that climb out, absolute ones and links: what a shard holds is read, never unpacked."""
    (tmp_path / "data").mkdir()
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    names = ["../up", "../../further", str(tmp_path / "absolute"), "plain"]
    with tarfile.open(tmp_path / "data" / "a.tar", "w") as tar:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for name in names:
            for suffix, content in (("jpg", jpeg(9)), ("txt", name.encode())):
                info = tarfile.TarInfo(f"{name}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    before = sorted(tmp_path.rglob("*"))
    seen = [
        c
        for _, batch in zip(range(6), data.make_loader(settings(tmp_path / "data")), strict=False)
        for c in batch["caption"]
    ]
    assert set(seen) <= set(names) and "plain" in seen
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "make",
    [lambda: 1 / 0, lambda: [].get("x"), lambda: None + 1],
    ids=["arithmetic", "attribute", "type"],
)
def test_whatever_a_broken_sample_raises_is_counted_and_the_first_are_named(tmp_path, make, capsys):
    class Source:
        def windows(self, epoch, part, parts, start=0):
            yield 1, [make, lambda: (jpeg(1), "fine"), make]

    samples = iter(data.Stream(Source(), settings(tmp_path)))
    first = next(samples)
    assert first["caption"] == "fine" and next(samples)["skipped"] + first["skipped"] >= 2
    for _ in range(10):
        next(samples)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10 and all(
        "a sample is skipped" in line and "Error: " in line for line in lines
    )
    assert lines[-1].endswith("later ones are only counted")


def test_images_that_min_size_leaves_out_are_no_bad_files(tmp_path):
    class Source:
        def windows(self, epoch, part, parts, start=0):
            yield 1, [lambda: (jpeg(1, (20, 20)), "small"), lambda: (jpeg(1), "fine")]

    samples = iter(data.Stream(Source(), settings(tmp_path, min_size=40)))
    for _ in range(3):
        sample = next(samples)
        assert sample["caption"] == "fine" and sample["skipped"] == 0


def test_a_skipped_sample_is_named_by_file_row_or_key(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tiny.write_images(tmp_path / "images", 3, (40, 40))
    (folder / "001.jpg").write_bytes(b"no image")
    shard = tmp_path / "0.tar"
    write_shard(
        shard, [("good", {"jpg": jpeg(1), "txt": b"a"}), ("bad", {"jpg": b"no image", "txt": b"b"})]
    )
    rows = tiny.write_images(tmp_path / "rows", 3, (40, 40))
    for file in rows.glob("*.txt"):
        file.unlink()
    (rows / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": f"{i:03d}.jpg", "text": f"{i}"}) for i in range(3))
    )
    (rows / "001.jpg").write_bytes(b"no image")
    for where, name in (
        (folder, f"{folder / '001.jpg'}: "),
        (shard, f"{shard}, bad: "),
        (f"hf:{rows}", "row 1: "),
    ):
        samples = iter(data.Stream(data.open_source(settings(where)), settings(where)))
        for _ in range(4):
            next(samples)
        assert f"a sample is skipped ({name}UnidentifiedImageError" in capsys.readouterr().err


def test_images_are_mirrored_and_cropped_anywhere_where_that_is_asked_for(tmp_path):
    """Pixel columns are numbered by their red: the crop is 32 in a row, in either order."""
    picture, file, mirrored, firsts = Image.new("RGB", (80, 32)), io.BytesIO(), set(), set()
    picture.putdata([(3 * x, 0, 0) for _ in range(32) for x in range(80)])
    picture.save(file, "PNG")
    for seed in range(8):
        pixels = data.prepare(
            file.getvalue(), random.Random(seed), settings(tmp_path, random_crop=True, flip=True)
        )
        columns = ((pixels[0, 0] + 1) * 127.5 / 3).round().int().tolist()
        way = columns[1] - columns[0]
        assert columns == list(range(columns[0], columns[0] + 32 * way, way)) and abs(way) == 1
        mirrored.add(way < 0)
        firsts.add(min(columns))
    assert mirrored == {True, False} and len(firsts) > 4
