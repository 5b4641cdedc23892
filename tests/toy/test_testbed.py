"""toy/testbed.py, toy/ablate.py, toy/time_to_quality.py: cells, the rule by which claims hold, a
table of two rows, a curve."""

import dataclasses
import json
import math
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from toy_runs import TINY, call, main_in_process, stage_at

from toy import ablate, testbed, time_to_quality
from toy.demo import make_draw
from toy.distil import Distillation
from toy.finished import load_student, load_teacher
from toy.loop import NotFinite
from toy.settings import Settings
from toy.testbed import Cells, difference, mean_and_spread, quotient, sources, verdict


def seeds(*values):
    return dict(enumerate(values))


@pytest.mark.parametrize(
    "better, worse, expected",
    [
        # Logarithms of the ratios 1, 2, 3: deviation 1, t of 2 degrees 4.303, noise 2.484 > 2.
        (seeds(1, 1, 1), seeds(math.e, math.e**2, math.e**3), "within noise"),
        # 1.6, 2, 2.4: noise 0.994 < 2. Seeds that are far apart do not matter, only their ratios.
        (seeds(1, 10, 100), seeds(math.e**1.6, 10 * math.e**2, 100 * math.e**2.4), "holds"),
        (seeds(math.e**1.6, math.e**2, math.e**2.4), seeds(1, 1, 1), "does not hold"),
        # One common seed.
        ({0: 1.0, 1: 2.0}, {1: 9.0, 2: 9.0}, "too few seeds"),
        ({}, {}, "too few seeds"),
    ],
)
def test_a_claim_holds_where_ratios_differ_from_one_by_more_than_noise(better, worse, expected):
    assert verdict(better, worse) == expected


def test_the_spread_is_the_samples():
    assert mean_and_spread([1.0, 2.0, 3.0]) == (2, 1)
    assert mean_and_spread([5.0])[0] == 5 and math.isnan(mean_and_spread([5.0])[1])


def test_a_difference_is_paired_and_bold_beyond_noise():
    # Mean 0.2, deviation 0.1, t of 2 degrees 4.303: noise 0.248. Of 0.19, 0.2, 0.21: 0.025.
    assert difference({0: 0.5, 1: 0.6, 2: 0.7}, {0: 0.4, 1: 0.4, 2: 0.4}) == "+0.20 ± 0.25"
    assert difference(seeds(0.19, 0.2, 0.21), seeds(0, 0, 0)) == "**+0.20 ± 0.02**"
    assert difference(seeds(0, 0, 0), seeds(0.19, 0.2, 0.21)) == "**-0.20 ± 0.02**"
    assert difference({0: 0.5}, {0: 0.25, 1: 9}) == "+0.25" and difference({}, {0: 1}) == ""


def test_a_quotient_is_paired_and_bold_if_one_lies_outside_its_interval():
    # Logarithms 1.6, 2, 2.4: noise 0.994; 1, 2, 3: noise 2.484.
    far = seeds(math.e**1.6, 10 * math.e**2, 100 * math.e**2.4)
    assert quotient(far, seeds(1, 10, 100)) == "**7.39 (2.74 to 19.96)**"
    assert quotient(seeds(1, 10, 100), far) == "**0.14 (0.05 to 0.37)**"
    near = seeds(math.e, math.e**2, math.e**3)
    assert quotient(near, seeds(1, 1, 1)) == "7.39 (0.62 to 88.62)"
    assert quotient({0: 3.0, 2: 9.0}, {0: 2.0, 1: 5.0}) == "1.50" and quotient({}, {0: 1}) == ""


def test_rows_of_other_seeds_than_the_bases_are_compared_on_the_common_ones():
    def cells(distances):  # in one step, {seed: multiple of the teacher's}
        teacher = {"rows": [row(2.0)]}
        return {s: ({"rows": [row(2 * x)]}, teacher) for s, x in distances.items()}

    found = {name: {} for name in ablate.ROWS}
    found["base"] = cells({0: 1.0, 1: 2.0, 2: 4.0, 3: 100.0})
    found["c-none"] = cells({0: 2.0, 1: 4.0, 2: 8.0, 9: 1.0})
    _, _, usual, none = ablate.table(found)
    assert usual.startswith("| **the base** | 0, 1, 2, 3 | 26.75 ± 48.85 |  |")
    assert "| 0, 1, 2, 9 | 3.75 ± 3.10 | **2.00 (2.00 to 2.00)** |" in none
    _, _, claim = ablate.judge(ablate.PAPER, found, "")
    assert "| `base` 2.33 ± 1.53, `c-none` 4.67 ± 3.06 | holds |" in claim


def test_sources_name_each_commit_and_machine_once():
    cells = [dict(commit=c, machine="m", settings={"precision": "bf16"}) for c in "bab"]
    cells.append(dict(commit="b", machine="m", settings={"precision": "fp32"}))
    assert sources(iter([None, *cells])) == ("a, b", "m, bf16; m, fp32")


def row(fd, steps=1):
    return dict(fd=fd, precision=0.5, recall=0.25, accuracy=0.75, steps=steps)


def test_a_cell_counts_for_its_own_settings_and_data_alone(tmp_path):
    cells, base = Cells(tmp_path), Settings(seed=1)
    bed = SimpleNamespace(device=torch.device("cpu"), data=SimpleNamespace(fingerprint="mine"))
    origin = "mine", base.precision
    cells.write("teacher", base, bed, [row(4.0, 50)], 0)
    cells.write("base", base, bed, [row(2.0), row(1.0, 4)], 60)
    assert cells.read("base", base)["seconds"] == 60
    assert cells.read("base", base, origin)
    assert not cells.read("base", base, ("another", base.precision))
    assert cells.read("base", dataclasses.replace(base, data_dir="elsewhere"))
    # Of a trained F the number of steps matters, of the teacher's encoder it does not.
    assert not cells.read("base", dataclasses.replace(base, features_steps=7))
    encoder = dataclasses.replace(base, features="teacher")
    cells.write("encoder", encoder, bed, [], 60)
    assert cells.read("encoder", dataclasses.replace(encoder, features_steps=7))
    assert not cells.read("encoder", dataclasses.replace(base, features_steps=7))
    # Multiples of the teacher's distance.
    assert ablate.collect(ablate.read_all(cells, base), "base", 1, "fd") == {1: 0.5}
    assert ablate.collect(ablate.read_all(cells, base), "base", 4, "fd") == {1: 0.25}
    assert ablate.collect(ablate.read_all(cells, base), "base", 4, "accuracy") == {1: 0.75}
    elsewhere = dataclasses.replace(base, precision="fp32")  # a machine without bf16
    assert cells.read("base", elsewhere)
    assert not cells.read("base", elsewhere, ("mine", "fp32"))
    # A page leaves out what is of another machine than the teacher's cell of that seed.
    cells.write("teacher", elsewhere, bed, [row(4.0, 50)], 0)
    assert ablate.collect(ablate.read_all(cells, base), "base", 1, "fd") == {}
    cells.write("teacher", base, bed, [row(4.0, 50)], 0)
    for change in (dict(distil_steps=9999), dict(teacher_steps=9)):
        other = dataclasses.replace(base, **change)
        assert not cells.read("base", other)
        with pytest.raises(ValueError, match="no cells of these settings; leave out --page"):
            ablate.read_all(cells, other)
    stored = json.loads((tmp_path / "base-seed1.json").read_text())
    assert stored["commit"] and stored["machine"]
    (tmp_path / "base-seed1.json").write_text("{}")
    with pytest.raises(ValueError, match="base-seed1.json: no cell of this version; remove it"):
        cells.read("base", base)


def test_every_row_is_one_valid_change_and_every_claim_is_of_rows():
    names = [row.name for row in ablate.ROWS.values()]
    assert len(names) == 1 + sum(len(rows) for _, rows in ablate.GROUPS.values())
    base, seen = Settings(**testbed.CELL), set()
    for row in ablate.ROWS.values():
        settings = ablate.settings_of(row, base)
        assert settings not in seen  # and each is another one
        seen.add(settings)
    for claim in (*ablate.PAPER, *ablate.DESIGN):
        assert {claim.better, claim.worse} <= ablate.ROWS.keys()


FLAGS = "--preset tiny --device cpu --threads 1 --limit 64 --budget 2 --seeds 0".split()


def test_two_cells_and_what_is_there_is_not_done_again(tmp_path, capsys):
    where = ["--work", tmp_path / "work", "--out", tmp_path]
    code, out, err = call("ablate.py", *FLAGS, *where, "--only", "adversarial")
    assert code == 0, err
    assert out.count("seed 0\n") == 2 and out.endswith("ablation-glyphs.md\n")
    page = (tmp_path / "ablation-glyphs.md").read_text()
    assert "| **the base** | 0 |" in page
    assert "| d) Losses: adversarial alone (λ = 0) (`adversarial`) | 0 |" in page
    assert " CPU, 1 thread, torch " in page and "heads instead of four" not in page
    assert "too few seeds" in page and (tmp_path / "ablation-glyphs.png").exists()
    cells = {path.stem: path.stat().st_mtime_ns for path in tmp_path.glob("ablation-glyphs/*")}
    assert cells.keys() == {"base-seed0", "adversarial-seed0", "teacher-seed0"}
    lambdas = [
        json.loads((tmp_path / "ablation-glyphs" / f"{name}-seed0.json").read_text())["settings"][
            "distil_lambda"
        ]
        for name in ("base", "adversarial")
    ]
    assert lambdas == [Settings().distil_lambda, 0]
    # Trained heads and students are gone, teachers stay.
    kept = {path.name.split("-")[0] for path in (tmp_path / "work" / "glyphs-seed0").iterdir()}
    assert kept == {"metric", "teacher"}
    code, _ = main_in_process(ablate, [*FLAGS, *where, "--only", "adversarial,lambda-0.5"], capsys)
    assert code == 0
    now = {path.stem: path.stat().st_mtime_ns for path in tmp_path.glob("ablation-glyphs/*")}
    assert now.keys() - cells.keys() == {"lambda-0.5-seed0"} and cells.items() <= now.items()
    # --page describes them all and trains nothing.
    code, _ = main_in_process(ablate, [*FLAGS, *where, "--only", "d,g", "--page"], capsys)
    page = (tmp_path / "ablation-glyphs.md").read_text()
    assert code == 0 and "(`lambda-0.5`) | 0 |" in page and "--only d,g` · seeds 0" in page
    assert len(list(tmp_path.glob("ablation-glyphs/*"))) == len(now)


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--only", "z"], "--only z: no such group or row; choose from a, b, c"),
        (["--seeds", "0,x"], "argument --seeds: invalid numbers value: '0,x'"),
        (["--seeds=-1,0"], "argument --seeds: -1,0: seeds start at 0"),
        (["--threads", "-1"], "--threads -1: must be from 1 to 1024"),
        (["--budget", "-1"], "--budget -1: must be at least 1"),
    ],
)
def test_mistakes_are_named(flags, says, tmp_path, capsys):
    code, err = main_in_process(ablate, [*FLAGS, *flags, "--out", tmp_path], capsys)
    assert code == 2 and says in err


def test_a_student_of_another_size_trains_from_its_own_teacher_and_is_loaded(tmp_path):
    """A whole run: the second teacher is a stage, and toy/sample.py finds the student's size."""
    flags = ["--limit", "64", "--distil-widths", "8,24", "--out", tmp_path / "run"]
    code, out, err = call("run.py", *TINY, *flags)
    assert code == 0, err
    assert "second teacher" in (tmp_path / "run" / "report.md").read_text()
    student, *_ = load_student(tmp_path / "run")
    assert student.denoiser.network.map_channels == [8, 24, 24]
    teachers = [tmp_path / "run" / name / "checkpoint.pt" for name in ("second", "teacher")]
    widths = [torch.load(path, weights_only=True)["network"] for path in teachers]
    assert [w["middle.1.norm1.weight"].numel() for w in widths] == [24, 16]
    # The page with sliders shows either.
    draw, classes, _ = make_draw(tmp_path / "run")
    drawn, _, of_teacher, _ = draw(classes[7], 1, 0)
    assert drawn.shape == of_teacher.shape and (drawn != of_teacher).any()
    teacher = load_teacher(tmp_path / "run", student)
    trained = torch.load(teachers[1], weights_only=True)["ema"]
    for name, weight in teacher.network.state_dict().items():
        assert torch.equal(weight, trained[f"module.{name}"])
    assert not teacher.training


def test_a_training_that_breaks_leaves_no_folder(tmp_path, monkeypatch):
    def broken(stage, *_):
        stage.folder.mkdir(parents=True)
        raise NotFinite("ADD, step 3: student loss is nan")

    stage = stage_at(tmp_path / "work" / "distil-key")
    monkeypatch.setattr(testbed, "distil", broken)
    with pytest.raises(NotFinite):
        testbed.Testbed.add(SimpleNamespace(ingredients=lambda _: (stage, None)), Settings())
    assert not stage.folder.exists()


def test_a_row_that_breaks_is_left_out_and_the_others_are_done(tmp_path, monkeypatch, capsys):
    def add(bed, settings):
        if settings.distil_lambda == 0:
            raise NotFinite("ADD, step 3: student loss is nan", "; --skip-nonfinite N")
        return [row(2.0), row(1.0, 4)], 1.0

    monkeypatch.setattr(ablate.Testbed, "add", add)
    where = ["--work", tmp_path / "work", "--out", tmp_path]
    only = ["--only", "adversarial,lambda-0.5"]
    assert main_in_process(ablate, [*FLAGS, *where, *only], capsys)[0] == 0
    page = (tmp_path / "ablation-glyphs.md").read_text()
    assert "(`lambda-0.5`) | 0 |" in page and "adversarial`)" not in page
    assert "`adversarial` diverged on seed 0." in page
    cell = json.loads((tmp_path / "ablation-glyphs" / "adversarial-seed0.json").read_text())
    assert cell["rows"] == [] and cell["error"].endswith("loss is nan")
    # A teacher that is gone from --work comes out the same here, and nothing is said.
    teacher = tmp_path / "ablation-glyphs" / "teacher-seed0.json"
    shutil.rmtree(tmp_path / "work")
    flags = [*FLAGS, *where, "--only", "lambda-2.5"]
    assert main_in_process(ablate, flags, capsys)[0] == 0
    # Cells of one that comes out otherwise are not joined.
    cell = json.loads(teacher.read_text())
    cell["rows"][0]["fd"] += 1
    teacher.write_text(json.dumps(cell))
    shutil.rmtree(tmp_path / "work")
    flags = [*FLAGS, *where, "--only", "guidance-2"]
    for _ in range(2):
        code, err = main_in_process(ablate, flags, capsys)
        assert code == 2 and "--out: its cells of seed 0 are of another teacher" in err
    assert not (tmp_path / "ablation-glyphs" / "guidance-2-seed0.json").exists()


def test_a_goal_is_passed_where_no_later_distance_is_above_it():
    rows = [dict(iteration=i, fd=fd) for i, fd in enumerate((9.0, 3.0, 5.0, 4.0, 2.0))]
    assert time_to_quality.passed(rows, 4)["iteration"] == 3
    assert time_to_quality.passed(rows, 9)["iteration"] == 0
    assert time_to_quality.passed(rows, 1) is None


def test_a_stopped_curve_goes_on_to_the_same_figures(tmp_path, capsys, monkeypatch):
    where = ["--work", tmp_path / "work", "--out", tmp_path, "--every", "2"]
    flags = [*FLAGS, *where, "--budget", "5"]
    assert main_in_process(time_to_quality, flags, capsys)[0] == 0
    folder = tmp_path / "time-to-quality-glyphs"
    cell = json.loads((folder / "curve-seed0.json").read_text())
    assert [row["iteration"] for row in cell["rows"]] == [2, 4, 5]
    assert cell["rows"][-1]["seconds"] == pytest.approx(cell["seconds"], abs=0.06)
    teacher = json.loads((folder / "teacher-seed0.json").read_text())["rows"]
    assert [row["steps"] for row in teacher] == [8, 25, 50]
    page = (tmp_path / "time-to-quality-glyphs.md").read_text()
    assert "| 50 |" in page and (tmp_path / "time-to-quality-glyphs.png").exists()
    # Scores do not touch what trains on.
    seldom = [*flags, "--every", "5"]  # another curve, which is done anew
    assert main_in_process(time_to_quality, seldom, capsys)[0] == 0
    (last,) = json.loads((folder / "curve-seed0.json").read_text())["rows"]
    assert last["fd"] == cell["rows"][-1]["fd"] != cell["rows"][-2]["fd"]
    (folder / "curve-seed0.json").unlink()
    stopped = iter([False] * 3 + [True])
    step = Distillation.step

    def stopping(self, i):
        if next(stopped):
            signal.raise_signal(signal.SIGTERM)
        return step(self, i)

    monkeypatch.setattr(Distillation, "step", stopping)
    code, err = main_in_process(time_to_quality, flags, capsys)
    assert code == 143 and "stopped by SIGTERM; the same command continues" in err
    assert not (folder / "curve-seed0.json").exists()
    monkeypatch.undo()
    assert main_in_process(time_to_quality, flags, capsys)[0] == 0
    again = json.loads((folder / "curve-seed0.json").read_text())
    same = ("iteration", "fd", "precision", "recall", "accuracy")
    for before, now in zip(cell["rows"], again["rows"], strict=True):
        assert all(before[name] == now[name] for name in same)
    # Nor is a curve held against another teacher's distances.
    teacher[0]["fd"] += 1
    cell = json.loads((folder / "teacher-seed0.json").read_text()) | {"rows": teacher}
    (folder / "teacher-seed0.json").write_text(json.dumps(cell))
    shutil.rmtree(tmp_path / "work")
    assert main_in_process(time_to_quality, flags, capsys)[0] == 0  # its curve is done
    (folder / "curve-seed0.json").unlink()
    code, err = main_in_process(time_to_quality, flags, capsys)
    assert code == 2 and "--out: its cells of seed 0 are of another teacher" in err


def test_scores_every_zero_iterations_are_refused(tmp_path, capsys):
    flags = [*FLAGS, "--out", tmp_path, "--every", "0"]
    code, err = main_in_process(time_to_quality, flags, capsys)
    assert code == 2 and "--every 0: must be at least 1" in err
