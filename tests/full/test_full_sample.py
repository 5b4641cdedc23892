"""full/sample.py: what it draws from a pipeline of full/run.py, and in how many steps."""

import json
import shutil

import huggingface_hub
import pytest
from diffusers import UNet2DConditionModel
from full_runs import train
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image

from full import sample


def test_sample_writes_images_and_says_what_they_show(checkpoints, tmp_path):
    pipeline = train(checkpoints, tmp_path / "run")
    out = tmp_path / "samples"
    arguments = [
        "--pipeline",
        str(pipeline),
        "--prompt",
        "a",
        "--prompt",
        "ß",
        "--count",
        "2",
        "--steps",
        "2",
        "--out",
        str(out),
    ]
    assert sample.main(arguments) == 0
    first = [(out / f"{i:04d}.png").read_bytes() for i in range(4)]
    assert len(set(first)) == 4
    assert [
        json.loads(x)["text"] for x in (out / "metadata.jsonl").read_text("utf-8").splitlines()
    ] == ["a", "a", "ß", "ß"]
    assert sample.main(arguments) == 0 and first == [
        (out / f"{i:04d}.png").read_bytes() for i in range(4)
    ]
    image = [
        "--image",
        str(out / "0000.png"),
        "--strength",
        "0.5",
        "--steps",
        "2",
        "--out",
        str(tmp_path / "i2i"),
    ]
    assert sample.main(["--pipeline", str(pipeline), "--prompt", "a", *image]) == 0
    assert (tmp_path / "i2i" / "0000.png").read_bytes() not in first


@pytest.mark.parametrize(
    "steps, strength, length",
    [(1, 1, 1), (1, 0.5, 2), (2, 0.5, 4), (1, 0.3, 4), (3, 0.3, 10), (4, 1, 4)],
)
def test_the_schedule_is_as_long_as_its_share_needs(steps, strength, length):
    assert sample.schedule_length(steps, strength) == length
    assert int(length * strength) == steps


class Watched:
    """A pipeline that keeps the images that it starts from."""

    def __init__(self, pipe, images):
        self.pipe, self.images = pipe, images

    def __getattr__(self, name):
        return getattr(self.pipe, name)

    def __call__(self, *args, **more):
        self.images.append(more["image"])
        return self.pipe(*args, **more)


def test_the_timesteps_of_a_pipeline_on_the_hub_are_fetched(tmp_path, monkeypatch):
    (tmp_path / "add.json").write_text('{"timesteps": [99, 999]}')

    def download(name, file):
        if name == "someone/else":
            raise EntryNotFoundError("no add.json")
        return tmp_path / file

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert sample.timesteps_of("someone/add", 2) == [999, 99]
    assert sample.timesteps_of("someone/else", 2) is None


def test_image_to_image_takes_as_many_steps_as_asked(checkpoints, tmp_path, capsys, monkeypatch):
    pipeline = train(checkpoints, tmp_path)
    forward, calls = UNet2DConditionModel.forward, []
    monkeypatch.setattr(
        UNet2DConditionModel,
        "forward",
        lambda unet, x, t, *a, **k: (calls.append(int(t)), forward(unet, x, t, *a, **k))[1],
    )
    start = [
        "--pipeline",
        str(pipeline),
        "--prompt",
        "a",
        "--image",
        str(checkpoints / "images" / "000.jpg"),
        "--out",
        str(tmp_path / "i2i"),
    ]
    assert sample.main(start) == 0 and calls == [499]
    calls.clear()
    assert sample.main([*start, "--steps", "2"]) == 0 and calls == [499, 249]
    turned = Image.new("RGB", (300, 150))  # a camera's: EXIF says that it lies on its side
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.paste((255, 255, 255), (0, 0, 150, 150))
    turned.save(tmp_path / "turned.jpg", exif=exif)
    kind, images = sample.place, []
    monkeypatch.setattr(sample, "place", lambda *a: Watched(kind(*a), images))
    start[5] = str(tmp_path / "turned.jpg")
    assert sample.main(start) == 0
    assert images[0].size == (64, 64)
    assert images[0].getpixel((32, 2))[0] > 250 > 5 > images[0].getpixel((32, 61))[0]
    assert sample.main([*start, "--strength", "0.2"]) == 2
    assert (
        "--strength 0.2: this student has 4 timesteps, of which that leaves 0"
        in capsys.readouterr().err
    )


def test_a_pipelines_list_of_timesteps_that_is_none_is_named(whole, tmp_path, capsys):
    folder = shutil.copytree(whole / "pipeline", tmp_path / "pipeline")
    for text in (
        "{",
        "[]",
        '{"timesteps": ["x"]}',
        "{}",
        '{"timesteps": [Infinity]}',
        '{"timesteps": "199"}',
        '{"timesteps": [499, 99]}',
    ):
        (folder / "add.json").write_text(text)
        assert (
            sample.main(
                ["--pipeline", str(folder), "--prompt", "a fox", "--out", str(tmp_path / "drawn")]
            )
            == 2
        )
        assert str(folder / "add.json") in capsys.readouterr().err.splitlines()[-1]
