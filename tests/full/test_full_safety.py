"""No file that full/ reads can run code, and no image or caption can end a run."""

import pickle
import random
import shutil

import pytest
import torch
from full_runs import flags, last, log_of, train
from PIL import Image
from trust import Bomb

from common.checkpoints import write
from full import data, run, sample
from full.settings import Settings


def test_no_file_that_is_loaded_can_run_code(checkpoints, whole, tmp_path, capsys, monkeypatch):
    """A pickle with a call in it in the place of checkpoints and of every network's weights:
    refused, never run."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    target = tmp_path / "ran"
    torch.save({"x": Bomb(target)}, tmp_path / "bomb.pt")
    bombs = ((tmp_path / "bomb.pt").read_bytes(), pickle.dumps(Bomb(target)))
    diffusion, text = "diffusion_pytorch_model.bin", "pytorch_model.bin"
    places = [
        ("backbone", "sd15", f"unet/{diffusion}"),
        ("backbone", "sd15", f"vae/{diffusion}"),
        ("backbone", "sd15", f"text_encoder/{text}"),
        ("backbone", "sdxl", f"text_encoder_2/{text}"),
        ("teacher", "sdxl", f"unet/{diffusion}"),
        ("vae", "taesd", diffusion),
        ("features", "dino", text),
        ("c_img", "dino-large", text),
        ("c_text", "clip", "open_clip_pytorch_model.bin"),
    ]
    for setting, source, place in places:
        for bomb in bombs:
            folder = shutil.copytree(checkpoints / source, tmp_path / "copy")
            for weight in (folder / place).parent.glob("*.safetensors"):
                weight.unlink()
            (folder / place).write_bytes(bomb)
            code = run.main(flags(checkpoints, tmp_path / "run", **{setting: folder}))
            err = capsys.readouterr().err.splitlines()[-1]
            assert code == 2 and not target.exists() and str(folder) in err, (place, err)
            if setting == "backbone":  # a pipeline like any other
                code = sample.main(
                    [
                        "--pipeline",
                        str(folder),
                        "--prompt",
                        "a fox",
                        "--out",
                        str(tmp_path / "drawn"),
                    ]
                )
                err = capsys.readouterr().err.splitlines()[-1]
                assert code == 2 and not target.exists() and f"--pipeline {folder}" in err, (
                    place,
                    err,
                )
            shutil.rmtree(folder)
    out = shutil.copytree(whole, tmp_path / "resumed")
    for place in ("training.pt", "process_0.pt"):
        (last(out) / place).unlink()
        write(last(out) / place, {"step": 5, "x": Bomb(target)})  # with this program's checksum
        assert (
            run.main([*flags(checkpoints, out), "--resume", str(last(out))]) == 2
            and not target.exists()
        )
        assert (
            f"{place} is not a readable checkpoint (Weights only load failed"
            in capsys.readouterr().err
        )
        shutil.rmtree(out)
        out = shutil.copytree(whole, tmp_path / "resumed")
    torch.load(tmp_path / "bomb.pt", weights_only=False)
    assert target.exists()  # a real bomb


PICTURES = {
    "8-bit palette": (lambda f: Image.new("P", (80, 80)).save(f, "PNG"), True),
    "16-bit": (
        lambda f: Image.fromarray(torch.full((80, 80), 40000).to(torch.uint16).numpy()).save(
            f, "PNG"
        ),
        True,
    ),
    "CMYK": (lambda f: Image.new("CMYK", (80, 80)).save(f, "JPEG"), True),
    "1×1": (lambda f: Image.new("RGB", (1, 1)).save(f, "PNG"), True),
    "20,000 wide": (lambda f: Image.new("L", (20_000, 64)).save(f, "PNG"), True),
    "empty": (lambda f: f.write_bytes(b""), False),
    "text": (lambda f: f.write_text("not an image"), False),
    "truncated": (
        lambda f: (
            Image.effect_noise((80, 80), 50).save(f, "JPEG") or f.write_bytes(f.read_bytes()[:600])
        ),
        False,
    ),
    "bomb": (lambda f: f.write_bytes(b"P5 60000 60000 255 "), False),
}


@pytest.mark.parametrize("make, usable", PICTURES.values(), ids=PICTURES)
def test_any_picture_becomes_an_image_or_is_refused(tmp_path, make, usable):
    file = tmp_path / "x.img"
    make(file)
    settings = Settings(resolution=64, random_crop=True)
    if usable:
        image = data.prepare(file.read_bytes(), random.Random(0), settings)
        assert image.shape == (3, 64, 64) and -1 <= image.min() and image.max() <= 1
        if file.read_bytes()[:4] == b"\x89PNG" and make is PICTURES["16-bit"][0]:
            assert image.mean().item() == pytest.approx(40000 / 32768 - 1, abs=0.01)
    else:
        with pytest.raises((OSError, ValueError, SyntaxError, Image.DecompressionBombError)):
            data.prepare(file.read_bytes(), random.Random(0), settings)


def test_captions_of_any_kind_train_and_bad_samples_are_limited(checkpoints, tmp_path, capsys):
    folder = shutil.copytree(checkpoints / "images", tmp_path / "images")
    for i, text in enumerate(
        [
            "",
            "雪の中の狐",
            "лиса в снегу",
            "ثعلب في الثلج",
            "🦊" * 50,
            "long " * 2000,
            "a\n\nb",
            "\u202eß",
        ]
    ):
        (folder / f"{i:03d}.txt").write_text(text, "utf-8")
    train(checkpoints, tmp_path / "a", data=folder, steps=3)
    assert log_of(tmp_path / "a")[-1]["skipped"] == 0
    for i in range(3):
        (folder / f"{i:03d}.jpg").write_bytes(b"broken")
    train(checkpoints, tmp_path / "b", data=folder, steps=3, max_bad_files=9)
    assert log_of(tmp_path / "b")[-1]["skipped"] >= 3
    assert run.main(flags(checkpoints, tmp_path / "c", data=folder, steps=3, max_bad_files=2)) == 2
    assert "--max-bad-files 2: " in capsys.readouterr().err.splitlines()[-1]
