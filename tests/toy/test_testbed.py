"""toy/testbed.py, toy/ablate.py: cells, the rule by which claims hold, a table of two rows."""

import dataclasses
import json
import math

import pytest
import torch
from toy_runs import call, main_in_process

from toy import ablate
from toy.settings import Settings
from toy.testbed import Cells, mean_and_spread, verdict

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "better, worse, expected",
    [
        # Pooled deviation 1, t of 4 degrees 2.776: noise is 2.776 √(2/3) = 2.267.
        ([9.0, 10.0, 11.0], [11.3, 12.3, 13.3], "holds"),
        ([9.0, 10.0, 11.0], [11.2, 12.2, 13.2], "within noise"),
        ([11.3, 12.3, 13.3], [9.0, 10.0, 11.0], "does not hold"),
        ([9.0, 10.0], [100.0], "too few seeds"),
        # Deviations 0 and 2 over (2, 3) seeds: variance 8/3, t of 3 degrees 3.182, noise 4.743.
        ([1.0, 1.0], [3.7, 5.7, 7.7], "within noise"),
        ([1.0, 1.0], [3.8, 5.8, 7.8], "holds"),
    ],
)
def test_a_claim_holds_where_means_differ_by_more_than_noise(better, worse, expected):
    assert verdict(better, worse) == expected


def test_the_spread_is_the_samples():
    assert mean_and_spread([1.0, 2.0, 3.0]) == (2, 1)
    assert mean_and_spread([5.0])[0] == 5 and math.isnan(mean_and_spread([5.0])[1])


def row(fd, steps=1):
    return dict(fd=fd, precision=0.5, recall=0.25, accuracy=0.75, steps=steps)


def test_a_cell_counts_for_its_own_settings_and_budget_alone(tmp_path):
    cells, base = Cells(tmp_path), Settings(seed=1)
    cells.write("teacher", base, CPU, [row(4.0, 50)], 0)
    cells.write("default", base, CPU, [row(2.0), row(1.0, 4)], 60)
    assert cells.has("default", 1, base) and not cells.has("default", 0, base)
    assert cells.has("default", 1, dataclasses.replace(base, data_dir="elsewhere"))
    assert not cells.has("default", 1, dataclasses.replace(base, distil_gamma=0))
    # Multiples of the teacher's distance.
    assert ablate.collect(cells, base, "default", 1, "fd") == [0.5]
    assert ablate.collect(cells, base, "default", 4, "fd") == [0.25]
    assert ablate.collect(cells, base, "default", 4, "accuracy") == [0.75]
    longer = dataclasses.replace(base, distil_steps=9999)
    assert ablate.collect(cells, longer, "default", 1, "fd") == []
    stored = json.loads((tmp_path / "default-seed1.json").read_text())
    assert stored["commit"] and stored["machine"] and stored["seconds"] == 60
    (tmp_path / "default-seed1.json").write_text("{}")
    with pytest.raises(ValueError, match="default-seed1.json: no cell of this version; remove it"):
        cells.read("default", 1)


def test_every_row_is_one_valid_change_and_every_claim_is_of_rows():
    names = [row.name for row in ablate.ROWS.values()]
    assert len(names) == 1 + sum(len(rows) for _, rows in ablate.GROUPS.values())
    base, seen = Settings(), set()
    for row in ablate.ROWS.values():
        settings = ablate.settings_of(row, base)
        assert settings not in seen  # and each is another one
        seen.add(settings)
    for claim in ablate.CLAIMS:
        assert {claim.better, claim.worse} <= ablate.ROWS.keys()


FLAGS = "--preset tiny --device cpu --threads 1 --limit 64 --budget 2 --seeds 0".split()


def test_two_cells_and_what_is_there_is_not_done_again(tmp_path, capsys):
    where = ["--work", tmp_path / "work", "--out", tmp_path]
    code, out, err = call("ablate.py", *FLAGS, *where, "--only", "adversarial")
    assert code == 0, err
    assert out.count("seed 0\n") == 2 and out.endswith("ablation-glyphs.md\n")
    page = (tmp_path / "ablation-glyphs.md").read_text()
    assert "| **default** | 1 |" in page and "| d) Losses: adversarial alone (λ = 0) | 1 |" in page
    assert "too few seeds" in page and (tmp_path / "ablation-glyphs.png").exists()
    cells = {path.stem: path.stat().st_mtime_ns for path in tmp_path.glob("ablation-glyphs/*")}
    assert cells.keys() == {"default-seed0", "adversarial-seed0", "teacher-seed0"}
    lambdas = [
        json.loads((tmp_path / "ablation-glyphs" / f"{name}-seed0.json").read_text())["settings"][
            "distil_lambda"
        ]
        for name in ("default", "adversarial")
    ]
    assert lambdas == [Settings().distil_lambda, 0]
    # Trained heads and students are gone, teachers stay.
    kept = {path.name.split("-")[0] for path in (tmp_path / "work" / "glyphs-seed0").iterdir()}
    assert kept == {"metric", "teacher"}
    code, _ = main_in_process(ablate, [*FLAGS, *where, "--only", "adversarial,lambda-0.5"], capsys)
    assert code == 0
    now = {path.stem: path.stat().st_mtime_ns for path in tmp_path.glob("ablation-glyphs/*")}
    assert now.keys() - cells.keys() == {"lambda-0.5-seed0"} and cells.items() <= now.items()


def test_an_unknown_row_is_refused(tmp_path, capsys):
    code, err = main_in_process(ablate, [*FLAGS, "--only", "z", "--out", tmp_path], capsys)
    assert code == 2 and "--only z: no such group or row; choose from a, b, c" in err
