"""--inception: FID besides the toy's own distance."""

import json
import shutil

import pytest
import torch
from toy_runs import TINY

from toy import run


class CountingFid:
    """In the place of torchmetrics': the distance is the number of generated images so far."""

    def __init__(self):
        self.real, self.generated, self.calls = [], [], 0

    def to(self, device):
        return self

    def update(self, images, real):
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, 32, 32)
        (self.real if real else self.generated).append(images.clone())

    def reset(self):  # keeps the real ones, as asked for in load_fid
        self.generated = []

    def compute(self):
        self.calls += 1
        return torch.tensor(float(sum(map(len, self.generated)) + self.calls / 10))


def test_the_student_and_its_measure_get_an_fid(finished, tmp_path, monkeypatch, capsys):
    folder, fid, asked = shutil.copytree(finished[0], tmp_path / "run"), CountingFid(), []

    def load_fid(path):
        asked.append(path)
        return fid

    monkeypatch.setattr(run, "load_fid", load_fid)
    flags = ["--out", str(folder), "--inception", "auto", "--inception-images", "120"]
    assert run.main([*TINY, *flags]) == 0
    assert asked == [""]
    results = json.loads((folder / "results.json").read_text())["results"]
    assert [row["fid"] for row in results["student"]] == pytest.approx([120.2, 120.3, 120.4])
    teachers = [row for row in results["teacher"] if "fid" in row]
    assert [(row["steps"], row["fid"]) for row in teachers] == [(4, pytest.approx(120.1))]
    assert teachers[0]["guidance"] == results["best_guidance"]
    assert sum(map(len, fid.real)) == 256  # of TINY's --limit
    assert "FID (120) |" in (folder / "report.md").read_text()
    assert "| 120.20 |" in capsys.readouterr().out


def test_inception_that_cannot_be_had_is_told_before_anything_is_trained(tmp_path, capsys):
    flags = ["--out", str(tmp_path / "run"), "--inception", str(tmp_path / "none.pth")]
    assert run.main([*TINY, *flags]) == 2
    assert "none.pth: no Inception weights" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metric").exists()
