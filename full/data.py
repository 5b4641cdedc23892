"""Images with captions from webdataset shards, a folder, or a Hugging Face data set: endless, split
by process and worker, in an order that a seed fixes, and resumable to the sample.

Every source deals its samples out in windows, each shuffled as a whole; the position in a stream is
an epoch, a window's place and a count of samples within it, which is all that a checkpoint needs to
hold. Samples that cannot be read are skipped and counted.
"""

import glob
import io
import json
import os
import random
import sys
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader
from torchvision.transforms.functional import pil_to_tensor

from common.images import to_rgb

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
TOLD = 10  # bad samples that a reading process names
CAPTION_KEYS = ("text", "caption", "prompt")  # in a JSON record, the first that is there


class DataError(ValueError):
    """Data that cannot be had or used; the message is one line."""


class TooSmall(ValueError):
    """An image that --min-size leaves out."""


def caption_of(record):
    """The caption in a JSON record. ValueError if it holds none."""
    for key in CAPTION_KEYS:
        if isinstance(record.get(key), str):
            return record[key]
    raise ValueError(f"no {', '.join(CAPTION_KEYS)}")


# --------------------------------------------------------------------------------------------------
# Sources: windows(epoch, part, parts, start) yields (start of the next window, [raw sample]); a raw
# sample is a function of no argument that gives (image file's bytes, caption)
# --------------------------------------------------------------------------------------------------


class Listed:
    """A source whose samples have numbers; subclasses know how many there are and read one: (bytes,
    caption)."""

    def __init__(self, settings):
        self.seed, self.window = settings.seed, settings.shuffle_window

    def windows(self, epoch, part, parts, start=0):
        """See above; start is the number of the first sample. DataError for fewer samples than
        parts."""
        if len(self) < parts:
            raise DataError(
                f"--data: {len(self)} samples for {parts} reading processes (GPUs × --workers); "
                "use fewer"
            )
        order = list(range(len(self)))
        random.Random(f"{self.seed} {epoch}").shuffle(order)
        mine = order[part::parts]
        for i in range(start, len(mine), self.window):
            yield i + self.window, [partial(self.read, j) for j in mine[i : i + self.window]]


class Folder(Listed):
    """Images with a .txt beside each, or a metadata.jsonl of file_name and text. DataError without
    captions."""

    def __init__(self, folder, settings):
        super().__init__(settings)
        metadata, self.captions = folder / "metadata.jsonl", {}
        if metadata.exists():
            for number, line in enumerate(metadata.read_text("utf-8").splitlines(), 1):
                try:
                    record = json.loads(line)
                    self.captions[folder / record["file_name"]] = caption_of(record)
                except (ValueError, KeyError, AttributeError, TypeError) as error:
                    raise DataError(
                        f"{metadata}, line {number}: no object with file_name and text ({error})"
                    ) from None
            self.files = sorted(self.captions)
            if outside := [
                f for f in self.files if not f.resolve().is_relative_to(folder.resolve())
            ]:
                raise DataError(f"{metadata}: {outside[0]} lies outside of the folder")
        else:
            images = sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)
            self.files = [f for f in images if f.with_suffix(".txt").exists()]
            if images and not self.files:
                raise DataError(
                    f"--data {folder}: {len(images)} images and no captions; put a .txt beside "
                    "each, or a metadata.jsonl there"
                )
        if not self.files:
            raise DataError(
                f"--data {folder}: no images there ({', '.join(IMAGE_SUFFIXES)}), nor shards (.tar)"
            )

    def __len__(self):
        return len(self.files)

    def name(self, i):
        """What a message calls sample i."""
        return str(self.files[i])

    def read(self, i):
        """(image file's bytes, caption) of sample i."""
        file = self.files[i]
        if self.captions:
            return file.read_bytes(), self.captions[file]
        return file.read_bytes(), file.with_suffix(".txt").read_text("utf-8").strip()


class Hub(Listed):
    """A Hugging Face data set, or a folder that datasets can read, downloaded as a whole."""

    def __init__(self, name, settings):
        import datasets

        super().__init__(settings)
        try:
            table = datasets.load_dataset(name, split=settings.hf_split)
        except Exception as error:  # the library raises many kinds
            raise DataError(
                f"--data hf:{name}: cannot be loaded ({str(error).strip().splitlines()[0]})"
            ) from error
        self.image, self.caption = settings.hf_image, settings.hf_caption
        for flag, column in (("hf-image", self.image), ("hf-caption", self.caption)):
            if column not in table.column_names:
                raise DataError(
                    f"--{flag} {column}: no such column; there are {', '.join(table.column_names)}"
                )
        # Not decoded by the library, where one broken image ends the iteration.
        self.table = table.cast_column(self.image, datasets.Image(decode=False))

    def __len__(self):
        return len(self.table)

    def name(self, i):
        """What a message calls sample i."""
        return f"row {i}"

    def read(self, i):
        """(image file's bytes, caption) of sample i."""
        row = self.table[i]
        image = row[self.image]
        if not isinstance(row[self.caption], str):
            raise ValueError(f"row {i} has no caption")
        return image["bytes"] or Path(image["path"]).read_bytes(), row[self.caption]


class Shards:
    """webdataset shards, each read from its beginning; the order of shards is drawn anew for every
    epoch. One that was cut within a file is noticed and counted, one cut between two files just
    ends early."""

    def __init__(self, urls, seed, window):
        self.urls, self.seed, self.window = urls, seed, window

    def samples(self, url):
        """Raw samples of a shard in its order; what cannot be read becomes a sample that raises."""
        from webdataset.tariterators import group_by_keys, tar_file_expander, url_opener

        failed = []

        def note(error):
            failed.append(error)
            return True  # webdataset goes on

        files = tar_file_expander(url_opener([{"url": url}], handler=note), handler=note)
        for sample in group_by_keys(files, handler=note):
            while failed:
                yield partial(self.fail, url, failed.pop(0))
            yield partial(self.unpack, sample)
        while failed:
            yield partial(self.fail, url, failed.pop(0))

    @staticmethod
    def fail(url, error):
        """A sample that could not be read: OSError."""
        raise OSError(f"{url}: {error}")

    @staticmethod
    def unpack(files):
        """(image bytes, caption) of a shard's sample, {suffix: content}. ValueError without one of
        them."""
        image = next((files[s[1:]] for s in IMAGE_SUFFIXES if s[1:] in files), None)
        if image is None:
            raise ValueError(f"{files['__key__']}: no {', '.join(IMAGE_SUFFIXES)}")
        if "txt" in files:
            return image, files["txt"].decode("utf-8").strip()
        if "json" in files:
            return image, caption_of(json.loads(files["json"]))
        raise ValueError(f"{files['__key__']}: neither txt nor json")

    def windows(self, epoch, part, parts, start=(0, 0)):
        """See above; start is (shard, sample in it). DataError for fewer shards than parts."""
        if len(self.urls) < parts:
            raise DataError(
                f"--data: {len(self.urls)} shards for {parts} reading processes (GPUs × "
                "--workers); use fewer workers, or more shards"
            )
        order = list(self.urls)
        random.Random(f"{self.seed} {epoch}").shuffle(order)
        mine = order[part::parts]
        for number in range(start[0], len(mine)):
            skip = start[1] if number == start[0] else 0
            window, seen = [], 0
            for sample in self.samples(mine[number]):
                seen += 1
                if seen > skip:
                    window.append(sample)
                if len(window) == self.window:
                    yield (number, seen), window
                    window = []
            if window:
                yield (number + 1, 0), window


def open_source(settings):
    """The source that --data names. DataError if there is none."""
    data = settings.data
    if not data:
        raise DataError("--data: missing; give a folder, webdataset shards or hf:NAME")
    if data.startswith("hf:"):
        return Hub(data[3:], settings)
    folder = Path(data)
    if folder.is_dir() and not (urls := sorted(map(str, folder.glob("*.tar")))):
        return Folder(folder, settings)
    if not folder.is_dir():
        from webdataset.shardlists import expand_urls

        urls = [
            f
            for url in expand_urls(data)
            for f in (sorted(glob.glob(url)) if "*" in url else [url])
        ]
        if not urls:
            raise DataError(f"--data {data}: no file of such a name")
        if missing := [url for url in urls if ":" not in url and not Path(url).is_file()]:
            raise DataError(f"--data {data}: {missing[0]} is not there")
    # A file by its whole path: webdataset would run the rest of a name that begins with "pipe:" as
    # a command.
    urls = [str(Path(url).absolute()) if Path(url).is_file() else url for url in urls]
    return Shards(urls, settings.seed, settings.shuffle_window)


# --------------------------------------------------------------------------------------------------
# The stream
# --------------------------------------------------------------------------------------------------


def prepare(data, draw, settings):
    """An image file's bytes → (3, R, R) in [-1, 1]. ValueError or OSError if it is broken or too
    small."""
    image = Image.open(io.BytesIO(data))
    width, height = image.size
    if min(width, height) < settings.min_size:
        raise TooSmall(f"{width}×{height} is smaller than --min-size {settings.min_size}")
    image, size = to_rgb(image), settings.resolution
    width, height = image.size  # turned, perhaps
    scale = size / min(width, height)
    image = image.resize(
        (max(size, round(width * scale)), max(size, round(height * scale))),
        Image.Resampling.LANCZOS,
    )
    if settings.flip and draw.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    room = image.width - size, image.height - size
    left, top = (draw.randint(0, n) if settings.random_crop else n // 2 for n in room)
    return pil_to_tensor(image.crop((left, top, left + size, top + size))).float() / 127.5 - 1


def name_of(sample):
    """What a raw sample is called in its source: its file, its row, or its shard and key."""
    first = getattr(sample, "args", ("",))[0]
    if isinstance(first, dict):
        return f"{first.get('__url__', 'a shard')}, {first['__key__']}"
    return sample.func.__self__.name(first) if isinstance(first, int) else str(first)


class Stream(IterableDataset):
    """Endless samples of one process; in a loader's worker, that worker's share of them."""

    def __init__(self, source, settings, rank=0, world=1):
        self.source, self.settings, self.rank, self.world = source, settings, rank, world
        self.epoch, self.start, self.position = 0, None, 0

    def state_dict(self):
        return {"epoch": self.epoch, "start": self.start, "position": self.position}

    def load_state_dict(self, state):
        start = state["start"]
        self.epoch, self.position = state["epoch"], state["position"]
        self.start = tuple(start) if isinstance(start, list) else start

    def __iter__(self):
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        part, parts = self.rank * workers + number, self.world * workers
        skipped, told, good, reason = 0, 0, False, ""
        while True:
            place = {} if self.start is None else {"start": self.start}
            good |= bool(place or self.position)  # the rest of an epoch may well be empty
            for after, window in self.source.windows(self.epoch, part, parts, **place):
                draw = random.Random(f"{self.settings.seed} {self.epoch} {part} {self.start}")
                draw.shuffle(window)
                seeds = [draw.random() for _ in window]
                for sample, seed in list(zip(window, seeds, strict=True))[self.position :]:
                    self.position += 1
                    try:
                        data, caption = sample()
                        image = prepare(data, random.Random(seed), self.settings)
                    except TooSmall as error:  # asked for: not a bad file
                        reason = str(error)
                        continue
                    # Whatever libraries raise on broken files; a week's run outlives it.
                    except Exception as error:
                        skipped, told = skipped + 1, told + 1
                        reason = f"{type(error).__name__}: {error}"
                        if told <= TOLD:
                            last = "; later ones are only counted" if told == TOLD else ""
                            what = f"{name_of(sample)}: {' '.join(reason.split())[:300]}"
                            print(
                                f"--data: a sample is skipped ({what}){last}",
                                file=sys.stderr,
                                flush=True,
                            )
                        continue
                    yield {"image": image, "caption": caption, "skipped": skipped}
                    skipped, good = 0, True
                window.clear()  # its files need not be in memory while the next is read
                self.start, self.position = after, 0
            if not good:
                raise DataError(
                    f"--data {self.settings.data}: no usable sample; {skipped} were unreadable; "
                    f"the last problem: {reason}"
                )
            self.epoch, self.start = self.epoch + 1, None


def collate(samples):
    """Stacked images, a list of captions, and how many samples were skipped on the way to these."""
    return {
        "image": torch.stack([s["image"] for s in samples]),
        "caption": [s["caption"] for s in samples],
        "skipped": sum(s["skipped"] for s in samples),
    }


def _own_group(worker):
    """A signal to the run's process group does not reach its workers: they end when the trainer has
    saved and ends."""
    os.setpgid(0, 0)


def make_loader(settings, rank=0, world=1):
    """A loader of endless batches for one process, with state_dict and load_state_dict. DataError
    as above."""
    stream = Stream(open_source(settings), settings, rank, world)
    return StatefulDataLoader(
        stream,
        settings.batch,
        num_workers=settings.workers,
        collate_fn=collate,
        worker_init_fn=_own_group,
    )
