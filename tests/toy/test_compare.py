"""toy/methods.py, compare.py, compare_page.py: equal training time, the choice of learning rates,
the page."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from toy_runs import call, main_in_process, stage_at

from common.checkpoints import CheckpointError
from toy import compare, compare_page, methods
from toy.loop import NotFinite
from toy.rivals import pairs
from toy.rivals.dmd2 import DMD2
from toy.rivals.regression import Regression
from toy.settings import Settings
from toy.testbed import Cells

CPU = torch.device("cpu")


class Clocked:
    """A training whose steps take seconds of a clock that only it moves."""

    TITLE, PAIRS, PHASES, now, finished = "clocked", False, 2, 0.0, 0

    def __init__(self, stage, teacher, lr, steps, guidance):
        self.steps = steps

    def step(self, i):
        # The steps of the second phase are faster, and the first of each are slow.
        phase, left = divmod(i, compare.TRIAL_STEPS)
        Clocked.now += 50 if left < compare.WARM_UP else (3, 1)[phase % 2]
        return {}

    def finish(self):
        Clocked.finished += 1


def taking(seconds):
    """A step of ADD that takes seconds of that clock."""

    def step(i):
        Clocked.now += seconds

    return step


def test_a_rival_takes_as_many_steps_as_fit_into_adds_time(tmp_path):
    Clocked.now, stage = 0.0, stage_at(tmp_path / "clocked", distil_steps=5)
    trial = Clocked(stage, None, 0, 12, 1)
    calls = []

    def add_step(i):
        calls.append("add")
        taking(4)(i)

    def step(i):
        calls.append("rival")
        trial.step(i)

    assert compare.paces([add_step, step], 2, CPU, lambda: Clocked.now) == [4, 2]
    assert calls == ["add", "rival"] * 2 * compare.TRIAL_STEPS  # in turn
    arguments = (stage, None, 1e-4, 1.0)
    training, seconds, steps = compare.train_rival(
        Clocked, *arguments, lambda: taking(4), lambda: Clocked.now
    )
    assert steps == training.steps == 10 and 0 <= seconds < 5  # run_loop's are the machine's
    assert Clocked.finished == 1
    steps = compare.train_rival(Clocked, *arguments, lambda: taking(0.01), lambda: Clocked.now)[2]
    assert steps == 2  # a phase one


def test_the_time_of_drawing_pairs_is_taken_off(tmp_path, monkeypatch):
    def draw(stage, teacher, guidance, seconds, clock):
        assert (guidance, seconds) == (2.0, pairs.SHARE * 20)
        Clocked.now += 12
        return "pairs"

    class OnPairs(Clocked):
        PAIRS = True

        def __init__(self, *arguments, pairs):
            assert pairs == "pairs"
            super().__init__(*arguments)

    monkeypatch.setattr(compare, "draw_pairs", draw)
    stage = stage_at(tmp_path / "clocked", distil_steps=5)
    _, seconds, steps = compare.train_rival(
        OnPairs, stage, None, 1e-4, 2.0, lambda: taking(4), lambda: Clocked.now
    )
    assert steps == 4 and 12 <= seconds < 17


BED = SimpleNamespace(device=CPU, data=SimpleNamespace(fingerprint="mine"))


def row(fd, steps=1, name="r"):
    figures = dict(fd=fd, precision=0.5, recall=0.25, accuracy=0.75)
    speed = dict(images_per_second=1000 / steps, evaluations=steps)
    return figures | speed | dict(steps=steps, name=name, guidance=1.0)


def write(cells, method, lr, base, rows, **more):
    method = methods.METHODS[method]
    settings = methods.settings_of(method, lr, base)
    more = {"version": methods.VERSION} | more
    cells.write(methods.cell_name(method, lr), settings, BED, rows, 60, **more)


def rows_of(*distances):
    return [row(fd, steps) for fd, steps in zip(distances, (1, 2, 4), strict=True)]


def test_the_best_learning_rate_has_the_least_geometric_mean_of_distances(tmp_path):
    cells, base, method = Cells(tmp_path), Settings(seed=2), methods.METHODS["dmd2"]
    tuning = dataclasses.replace(base, seed=0)

    def best(settings):
        return methods.best_rate(methods.tuning_cells(cells, method, settings))

    assert best(base) is None
    write(cells, "dmd2", 1e-3, tuning, rows_of(8.0, 2.0, 1.0))  # 2.5, and the larger mean
    write(cells, "dmd2", 1e-4, tuning, rows_of(3.0, 3.0, 3.0))
    assert best(base) is None  # not all have been tried
    write(cells, "dmd2", 3e-4, tuning, [], error="loss is nan")
    assert best(base) is None  # there is no teacher's cell
    cells.write("teacher", tuning, BED, [row(1.0, 50)], 0)
    write(cells, "dmd2", 3e-4, base, rows_of(0.1, 0.1, 0.1))  # of another seed
    assert best(base) == 1e-3
    write(cells, "dmd2", 1e-3, tuning, [row(0.1), row(0.1, 4)])  # once scored at other steps
    assert best(base) is None
    write(cells, "dmd2", 1e-3, tuning, rows_of(0.1, 0.1, 0.1), version=1)  # of other code
    assert best(base) is None
    other = dataclasses.replace(base, distil_steps=7)
    assert best(other) is None


def pages(folder, add, regression):
    """Lines of a made-up comparison over seeds 1 and 2."""
    teachers, found = {}, {"add": {}, "regression": {}}
    for i, seed in enumerate((1, 2)):
        teachers[seed] = [row(2.0, 50, "DDIM"), row(0.5, 4, "DDIM"), row(30.0, 1, "DDIM")]
        found["add"][seed] = {"seconds": 60, "rows": rows_of(*[add[i]] * 3)}
        found["regression"][seed] = {"seconds": 60, "rows": [row(regression[i])]}
    return compare_page.lines_of(teachers, found, {"add": 3e-4, "regression": 3e-4})


def test_the_table_is_bold_where_a_method_is_best_and_says_when_a_rival_wins(tmp_path):
    lines = pages(tmp_path / "a", (1.0, 1.2), (8.0, 8.4))
    assert [(line.method, line.steps) for line in lines] == [
        ("ADD", 4), ("ADD", 2), ("ADD", 1), ("regression", 1),
        ("teacher, DDIM", 50), ("teacher, DDIM", 4), ("teacher, DDIM", 1),
    ]  # fmt: skip
    assert lines[2].metrics["fd"] == {1: 0.5, 2: 0.6} and lines[2].minutes == {1: 1, 2: 1}
    assert compare_page.contested(lines) == [1, 4]  # nobody else has two steps
    assert compare_page.conclusion(lines, 1) == (
        "In one step ADD has the shortest distance (0.55 ± 0.07; regression 4.10 ± 0.14). "
        "The difference is more than noise."
    )
    page = compare_page.table(lines, compare_page.contested(lines))
    bold = [text for text in page if text.startswith("| **")]
    assert len(bold) == 2 and bold[0].startswith("| **ADD** | 1 | 1.000 ± 0.000 | 0.55 ± 0.07 |  |")
    over = "0.46 (0.14 to 1.45)"  # 0.5 and 0.417: of two seeds the margin is wide
    assert bold[1].startswith(f"| **teacher, DDIM** | 4 | 4.000 ± 0.000 | 0.25 ± 0.00 | {over} |")
    assert compare_page.conclusion(lines, 4) == (
        "In four steps teacher, DDIM has the shortest distance (0.25 ± 0.00; ADD 0.55 ± 0.07). "
        "The difference is within noise."
    )
    over = "**7.48 (3.20 to 17.48)**"  # 8 and 7
    assert f"| regression | 1 | 1.000 ± 0.000 | 4.10 ± 0.14 | {over} | 0.50 ± 0.00 |" in page[5]
    assert page[5].endswith("| 1.00 ± 0.00 | 0.0003 | 2 |")
    assert "| teacher, DDIM | 50 | 50.000 ± 0.000 | 1.00 ± 0.00 |  |" in page[6]
    lines = pages(tmp_path / "b", (2.0, 9.0), (1.8, 1.6))
    assert compare_page.conclusion(lines, 1) == (
        "In one step regression has the shortest distance (0.85 ± 0.07; ADD 2.75 ± 2.47). "
        "The difference is within noise."
    )


def test_a_mean_that_most_seeds_contradict_is_said_to_be_so():
    def line(method, distances):
        return compare_page.Line(method, 1, {"fd": distances}, {}, None)

    add = line("ADD", {1: 0.9, 2: 0.91, 3: 0.9, 4: 0.89, 5: 110.0})
    rival = line("regression", {1: 1.0, 2: 1.01, 3: 1.0, 4: 0.99, 5: 108.0})
    text = compare_page.conclusion([add, rival], 1)
    assert text.startswith("In one step regression has the shortest distance (22.40 ± ")
    assert text.endswith("Most seeds say the opposite, beyond noise.")
    # ADD with another F is compared with the best rival, not with ADD.
    better = line("ADD, F the teacher's encoder", {1: 0.5, 2: 0.51, 3: 0.52})
    text = compare_page.conclusion([better, add, rival], 1)
    assert text.startswith(
        "In one step ADD, F the teacher's encoder has the shortest distance (0.51 ± 0.01; "
        "regression 1.00 ± 0.01). The difference is more than noise."
    )
    # A seed that one of them lacks does not count.
    broken = line("regression", {1: 2.0, 2: 2.04})
    text = compare_page.conclusion([broken, line("ADD", {1: 1.0, 2: 1.02, 3: 6.0})], 1)
    assert text == (
        "In one step ADD has the shortest distance (1.01 ± 0.01; regression 2.02 ± 0.03). "
        "The difference is more than noise."
    )


def test_rates_at_the_edge_of_their_grid_are_named():
    assert compare_page.at_the_edges({"add": 1e-4, "dmd2": 3e-4, "reflow": None}) == []
    assert compare_page.at_the_edges(
        {"add": 1e-4, "dmd2": 1e-4, "reflow": 3e-3, "ufogen": 1e-4}
    ) == [
        "The smallest rate tried was best for DMD2, UFOGen.",
        "The largest rate tried was best for 2-rectified flow.",
        "A wider search may bring these closer.",
    ]


def test_the_page_hides_the_tuning_seed_and_names_what_is_missing(tmp_path):
    cells, base = Cells(tmp_path / "compare-glyphs"), Settings(dataset="glyphs")
    arguments = SimpleNamespace(only=["regression", "dmd2", "ufogen", "reflow"])

    def page():
        compare_page.write_page(tmp_path / "compare-glyphs", cells, base, arguments, "a command")
        return (tmp_path / "compare-glyphs.md").read_text()

    with pytest.raises(ValueError, match="no cells of these settings; leave out --page"):
        page()
    cells.write("teacher", base, BED, [row(2.0, 50, "DDIM"), row(30.0, 1, "DDIM")], 0)
    with pytest.raises(ValueError, match="no training of ADD at these settings; leave out --page"):
        page()
    for seed in (0, 1, 2):
        mine = dataclasses.replace(base, seed=seed)
        cells.write("teacher", mine, BED, [row(2.0, 50, "DDIM"), row(30.0, 1, "DDIM")], 0)
        for lr in methods.ADD.rates if seed == 0 else (3e-5,):
            write(cells, "add", lr, mine, rows_of(*[1 + 1e4 * lr + seed] * 3))
        for lr in Regression.LEARNING_RATES if seed == 0 else (1e-3,):
            rows = [row(abs(lr - 1e-3) + 9)] if seed < 2 else []
            write(cells, "regression", lr, mine, rows)
        for lr in DMD2.LEARNING_RATES if seed == 0 else ():
            write(cells, "dmd2", lr, mine, [])
    write(cells, "ufogen", 1e-4, base, rows_of(1.0, 1.0, 1.0))
    text = page()
    assert "over seeds 1, 2. " in text and "| ADD | 2 | 2.000 ± 0.000 | 1.40 ± 0.35 |" in text
    for sentence in (
        "In one step ADD has the shortest distance (1.15; regression 4.50). One seed cannot tell",
        "regression diverged on seed 2.",
        "DMD2 diverged at every learning rate.",
        "UFOGen is not trained yet, or not at every rate.",
        "The smallest rate tried was best for ADD. A wider search",
    ):
        assert sentence in text, sentence
    assert "| regression | 1 | 1.000 | 4.50 |" in text
    # A cell of another machine than its seed's teacher does not count.
    other = dataclasses.replace(base, seed=1, precision="fp32")
    cells.write("teacher", other, BED, [row(2.0, 50, "DDIM"), row(30.0, 1, "DDIM")], 0)
    assert "| ADD | 2 | 2.000 | 1.65 |  | 0.50 |" in page()


@pytest.mark.parametrize("error", [NotFinite, FloatingPointError])  # in training; in the trial
def test_a_method_that_breaks_leaves_a_cell_without_rows(error, tmp_path, monkeypatch):
    def broken(*arguments):
        raise error("step 3: student loss is nan")

    monkeypatch.setattr(compare, "train_and_score_rival", broken)
    cells, base = Cells(tmp_path / "cells"), Settings()
    cells.write("teacher", base, BED, [row(1.0, 50)], 0)
    bed = SimpleNamespace(settings=base, device=CPU, data=BED.data, add=broken)
    for name in ("regression", "add"):
        method = methods.METHODS[name]
        compare.run_cell(cells, bed, method, 1e-3)
        cell = methods.find(cells, method, 1e-3, base, ("mine", base.precision))
        assert cell["rows"] == [] and cell["error"] == "step 3: student loss is nan"
        assert methods.best_rate(methods.tuning_cells(cells, method, base)) is None
    with pytest.raises(CheckpointError):  # what is no answer to whether it diverges
        error = CheckpointError
        monkeypatch.setattr(compare, "train_and_score_rival", broken)
        compare.run_cell(cells, bed, methods.METHODS["dmd2"], 1e-3)


FLAGS = "--preset tiny --device cpu --threads 1 --limit 64 --budget 2 --seeds 0".split()


def test_one_rival_in_a_process_and_nothing_is_done_twice(tmp_path, capsys):
    where = ["--work", tmp_path / "work", "--out", tmp_path]
    code, out, err = call("compare.py", *FLAGS, *where, "--only", "regression")
    assert code == 0, err
    page = (tmp_path / "compare-glyphs.md").read_text()
    assert "| teacher, DPM-Solver++(2M) | 25 |" in page and "In one step " in page
    assert "Mean ± standard deviation over seed 0." in page  # there is no other
    assert sum("**" in line for line in page.splitlines()) == 2
    assert (tmp_path / "compare-glyphs.png").exists() and out.endswith("compare-glyphs.md\n")
    cells = {path.stem: path.stat().st_mtime_ns for path in tmp_path.glob("compare-glyphs/*")}
    rates = ("0.0001", "0.0003", "0.001", "0.003")
    names = {f"regression-{lr}-seed0" for lr in rates}
    names |= {f"add-{lr:g}-seed0" for lr in methods.ADD.rates}
    assert cells.keys() == names | {"teacher-seed0"}
    cell = json.loads((tmp_path / "compare-glyphs" / "regression-0.001-seed0.json").read_text())
    assert cell["seconds"] > 0 and cell["steps"] >= 1 and cell["commit"] and cell["machine"]
    assert (
        cell["pairs"] >= 100
        and cell["learning_rate"] == 0.001
        and [r["steps"] for r in cell["rows"]] == [1]
    )
    kept = {path.name.split("-")[0] for path in (tmp_path / "work" / "glyphs-seed0").iterdir()}
    assert kept == {"metric", "teacher", "features"}
    code, _ = main_in_process(compare, [*FLAGS, *where, "--only", "regression"], capsys)
    assert code == 0
    now = {path.stem: path.stat().st_mtime_ns for path in tmp_path.glob("compare-glyphs/*")}
    assert now == cells


def test_an_unknown_method_is_refused(tmp_path, capsys):
    code, err = main_in_process(compare, [*FLAGS, "--only", "z", "--out", tmp_path], capsys)
    assert code == 2 and "--only z: no such method; choose from add, add-enc" in err
