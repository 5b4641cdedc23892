"""What tests of the toy share: a tiny run, ways to start it, and a teacher at random."""

import csv
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from trust import ROOT

from toy.data import DataError, Dataset, load
from toy.loop import CLOCKED, Stage
from toy.settings import Settings
from toy.teacher import Standardize, make_denoiser

TINY = "--preset tiny --dataset glyphs --device cpu --threads 1 --precision fp32".split()
STAGES = ("features", "metric", "teacher", "distil")  # the first if F is trained


def start(script, *arguments):
    """The process of a script of toy/."""
    command = [sys.executable, ROOT / "toy" / script, *map(str, arguments)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)


def call(script, *arguments, timeout=240):
    """(exit code, stdout, stderr)."""
    process = start(script, *arguments)
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def weights(folder):
    """The student's, of a finished run."""
    return torch.load(folder / "distil" / "student.pt", weights_only=True)["network"]


def main_in_process(module, arguments, capsys):
    """(exit code, stderr) of a main() called here: starting a process costs seconds."""
    try:
        code = module.main([*map(str, arguments)])
    except SystemExit as stop:  # argparse's own way out
        code = stop.code
    return code, capsys.readouterr().err


def rows_of(path):
    """A log without what a clock has a part in."""
    with open(path, newline="") as file:
        return [{k: v for k, v in row.items() if k not in CLOCKED} for row in csv.DictReader(file)]


def make_teacher(**more):
    """A teacher of three classes whose every part has a say."""
    more = {f"teacher_{k}": v for k, v in more.items()}
    settings = Settings(teacher_widths=(8, 16), precision="fp32", **more)
    torch.manual_seed(0)
    teacher = make_denoiser(1, 3, settings, Standardize(-0.5, 0.7))
    for p in teacher.parameters():
        nn.init.normal_(p, std=0.2)
    return teacher


def noise_data(n=16):
    """Random bytes of three classes, 8 × 8."""
    images = torch.randint(256, (n, 1, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    labels = torch.arange(n) % 3
    return Dataset("noise", images, labels, images, labels, ("a", "b", "c"))


def error_of(*args, **kwargs):
    """The one line of the DataError that load() ends in."""
    with pytest.raises(DataError) as caught:
        load(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def stage_at(folder, key="k", data=None, **settings):
    """A Stage on the CPU."""
    return Stage(folder, data, Settings(**settings), torch.device("cpu"), key)
