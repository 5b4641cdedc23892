"""A user's mistakes end in one line that names them, before anything is trained."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from full_runs import ROOT, flags
from trust import assert_takes_a_value_or_names_itself

from full import run
from full.settings import Settings

MISTAKES = {
    "wrong repository": (
        {"backbone": "nobody/nothing"},
        ["nobody/nothing", "no diffusers pipeline"],
    ),
    "no data": ({"data": None}, ["--data"]),
    "no such folder": ({"data": "/nowhere"}, ["--data /nowhere"]),
    "unknown choice": ({"weight": "sdss"}, ["--weight sdss", "exponential"]),
    "features": ({"features": "/nowhere"}, ["--features /nowhere"]),
    "c_text": ({"c_text": "/nowhere"}, ["--c-text /nowhere"]),
    "F of other latents": (
        {"features": "teacher", "teacher": "SDXL"},
        ["--features teacher", "different latents"],
    ),
    "random LoRA": ({"init": "random", "lora_rank": 4}, ["--lora-rank 4", "--init random"]),
    "resolution": ({"resolution": 60}, ["--resolution 60", "multiple of 8"]),
    "timesteps that fall": ({"timesteps": "999,499"}, ["--timesteps 999,499", "rise"]),
    "a timestep too late": ({"timesteps": "499,1000"}, ["--timesteps 499,1000", "999"]),
    "guidance that falls": ({"guidance": "3,1"}, ["--guidance 3.0,1.0", "rising"]),
    "steps of nfsd": (
        {"weight": "nfsd", "teacher_steps": 2},
        ["--teacher-steps 2", "--weight nfsd"],
    ),
    "zero SNR of ε": ({"zero_snr": "true"}, ["--zero-snr true", "epsilon", "auto"]),
    "features size": ({"features_size": 30}, ["--features-size 30", "14"]),
    "resume": ({"--resume": "/nowhere"}, ["--resume /nowhere"]),
}


@pytest.mark.parametrize("change, words", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_of_a_run_ends_in_one_line(
    checkpoints, tmp_path, capsys, monkeypatch, change, words
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    more = [x for k, v in change.items() if k.startswith("--") for x in (k, v)]
    settings = {
        k: checkpoints / "sdxl" if v == "SDXL" else v
        for k, v in change.items()
        if not k.startswith("--")
    }
    assert run.main([*flags(checkpoints, tmp_path, **settings), *more]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("full/run.py: ") and all(word in message for word in words), message


def test_help_shows_every_setting_and_needs_no_diffusers():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / "full" / "run.py", "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0 and "--teacher-steps" in done.stdout and "T_student" in done.stdout
    assert "diffusers" not in done.stderr


def test_a_text_encoder_without_weights_is_refused(checkpoints, tmp_path, capsys):
    folder = shutil.copytree(checkpoints / "clip", tmp_path / "clip")
    (folder / "open_clip_pytorch_model.bin").unlink()
    assert run.main(flags(checkpoints, tmp_path / "run", c_text=folder)) == 2
    assert (
        f"--c-text {folder}: neither an open_clip MODEL/WEIGHTS nor a folder of one"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "missing",
    [
        "vae",
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "model_index.json",
        "tokenizer",
    ],
)
def test_a_checkpoint_with_files_missing_ends_in_one_line(checkpoints, tmp_path, capsys, missing):
    folder = shutil.copytree(checkpoints / "sd15", tmp_path / "sd15")
    shutil.rmtree(folder / missing) if (folder / missing).is_dir() else (folder / missing).unlink()
    assert run.main(flags(checkpoints, tmp_path / "run", backbone=folder)) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith(f"full/run.py: {folder}: ") and "Traceback" not in message


@pytest.mark.parametrize("where", ["/sys/run", "file"])
def test_a_folder_that_cannot_be_made_ends_in_one_line(checkpoints, tmp_path, where, capsys):
    (tmp_path / "file").write_text("")
    out = tmp_path / where / "run" if where == "file" else Path(where)
    assert run.main(flags(checkpoints, out)) == 2
    assert str(out) in capsys.readouterr().err.splitlines()[-1]


FIELDS = {f.name: f for f in dataclasses.fields(Settings)}


@pytest.mark.parametrize("name", FIELDS)
def test_every_flag_takes_a_value_or_names_itself(name, tmp_path, capsys):
    def configure(argv):
        return run.configure(*run.parse_arguments([*argv, "--out", str(tmp_path)]))

    assert_takes_a_value_or_names_itself(FIELDS[name], configure, capsys)


def test_a_config_that_is_none_is_named(checkpoints, tmp_path, capsys):
    for text in (
        "{",
        "[]",
        '{"settings": {"stepz": 1}}',
        json.dumps({"settings": {"steps": "many"}}),
    ):
        (tmp_path / "config.json").write_text(text)
        assert run.main([*flags(checkpoints, tmp_path), "--resume", "auto"]) == 2
        assert str(tmp_path / "config.json") in capsys.readouterr().err.splitlines()[-1]


def test_a_setting_whose_name_python_keeps_for_itself_has_a_plain_flag():
    assert run.parse_arguments(["--out", "x", "--lambda", "3"])[1] == {"lambda_": 3.0}
