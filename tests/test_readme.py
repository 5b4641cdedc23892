"""The pages hold what results/ holds, and what they name is there."""

import json
import re
import shlex
import subprocess
import sys

import pytest

from results.keep import (
    KEPT,
    PAGES,
    RESULTS,
    fill,
    judges,
    keep,
    main,
    seeds_of,
    short,
    summary,
    table,
)

ROOT = RESULTS.parent
REPORT = """# ADD on digits

`COMMAND` · preset `cpu` · seed 3 · 1 CPU threads · commit abc1234

## Numbers

| | steps |
|---|---|
| teacher | 50 |

A word on data.

## Goals

| a | measured | goal | |
|---|---|---|---|
| distance | 1.1 | ≤ 1 | **missed** |
| accuracy | 0.97 | ≥ 0.95 | met |

## Seconds

| data | all |
|---|---|
| 5 | 90 |
"""


@pytest.mark.parametrize("page", PAGES)
def test_the_tables_are_those_of_the_reports(page):
    text = (ROOT / page).read_text()
    assert fill(text, page) == text, f"python results/keep.py brings {page} up to date"


def test_every_kept_run_is_in_the_summary():
    text = (ROOT / "results/README.md").read_text()
    kept = {folder.name for folder in RESULTS.iterdir() if (folder / "report.md").exists()}
    groups = " ".join(re.findall("<!-- summary: (.*?) -->", text)).split()
    assert kept == {name for group in groups for name in seeds_of(group)}


OTHER_PAGES = "toy/README.md full/README.md results/gpu.md CONTRIBUTING.md"


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES.split()])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]
    for link in links:
        path, _, heading = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        headings = re.findall("^#+ (.*)$", target.read_text(), re.MULTILINE) if heading else []
        assert not heading or heading in {
            re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in headings
        }, link
    assert links


def flags_of(script):
    """All that its --help shows."""
    shown = subprocess.check_output([sys.executable, script, "--help"], cwd=ROOT, text=True)
    return set(re.findall(r"--[a-z][\w-]*", shown))


def test_flags_of_the_toy_exist():
    """Those of a command belong to its script; one that stands alone, to any of them."""
    names = ("run", "ablate", "compare", "time_to_quality", "judge")
    known = {name: flags_of(f"toy/{name}.py") for name in names}
    used = {name: set() for name in known}
    anywhere = set().union(*known.values(), {"--plan"})  # of full/run.py
    for page in ("README.md", "toy/README.md", "toy/experiments.md"):
        text = (ROOT / page).read_text()
        spans = [*re.findall("`([^`\n]+)`", text), *re.findall("^python .*$", text, re.MULTILINE)]
        for span in spans:
            words = {w.partition("=")[0] for w in shlex.split(span) if w.startswith("--")}
            if span.startswith("--"):
                assert words <= anywhere, span
            for name in known:
                if f"python toy/{name}.py" in span:
                    used[name] |= words
    assert {"--dataset", "--preset"} <= used["run"] and "--dataset" in used["ablate"]
    assert "--run" in used["judge"]
    assert all(used[name] <= known[name] for name in known)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A results folder of the test's own."""
    monkeypatch.setattr("results.keep.RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()
    (tmp_path / "README.md").write_text("<!-- report: x -->\nold\n<!-- end -->\nprose\n")
    (tmp_path / "results/README.md").write_text("<!-- report: x -->\n<!-- end -->\nmore\n")
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy/experiments.md").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    "flags",
    [
        "--data-dir /home/me/data",
        "--data-dir /home/me/data --threads 1",
        "--data-dir '/home/me/my data'",
        "--data-dir=/home/me/data",
        "--data-dir data",
        "--data-dir .",
        "--data-dir /home/me/data --out /home/me/runs/a",
    ],
)
def test_a_kept_run_hides_where_it_and_its_data_lay_and_nothing_else(elsewhere, flags):
    run = elsewhere / "run"
    run.mkdir()
    for file in KEPT:
        (run / file).write_bytes(b"\x89 /home/me/data")
    where = shlex.split(flags.replace("=", " "))[1]
    (run / "config.json").write_text(f'{{"dataset": "mnist", "data_dir": "{where}", "seed": 3}}')
    (run / "report.md").write_text(REPORT.replace("COMMAND", f"python toy/run.py {flags}"))
    assert main([str(run), "x"]) == 0
    command = "python toy/run.py --data-dir DIR" + " --threads 1" * ("threads" in flags)
    assert (elsewhere / "results/x/report.md").read_text() == REPORT.replace("COMMAND", command)
    config = (elsewhere / "results/x/config.json").read_text()
    assert config == '{"dataset": "mnist", "data_dir": "DIR", "seed": 3}'
    assert (elsewhere / "results/x/cost.png").read_bytes() == b"\x89 /home/me/data"
    readme = (elsewhere / "README.md").read_text()
    assert "old" not in readme and readme.endswith("| teacher | 50 |\n<!-- end -->\nprose\n")
    other = (elsewhere / "results/README.md").read_text()
    assert other == readme.replace("prose", "more")
    assert table("x", "Numbers").splitlines() == ["| | steps |", "|---|---|", "| teacher | 50 |"]


def test_a_groups_row_has_mean_and_range_and_a_missed_goal_in_bold(elsewhere):
    def row(fd, accuracy, steps):
        rest = dict(precision=0.9, recall=0.8, variance_pixels=1.0, variance_features=1.0)
        return dict(fd=fd, accuracy=accuracy, guidance=2.0, steps=steps, **rest)

    for seed, one in (("x-seed0", 7.0), ("x-seed1", 8.5)):
        folder = elsewhere / "results" / seed
        folder.mkdir()
        students = [row(one, 0.99, 1), row(6.0, 0.99, 2), row(6.3, 0.97, 4)]
        students[0] |= {"precision": 0.88}
        results = {"teacher": [row(10.0, 0.99, 50)], "best_guidance": 2.0, "student": students}
        (folder / "results.json").write_text(json.dumps({"results": results}))
        (folder / "config.json").write_text('{"preset": "cpu"}')
        (folder / "report.md").write_text(REPORT)
    head, _, line = summary(["x"])
    columns = "| run | seeds | distance, one step, × (≤ 0.8) | distance, 2 steps, × (≤ 0.7) |"
    assert head.startswith(columns)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:2] == ["[x](results/x-seed0/report.md)", "2"]
    assert cells[2:4] == ["0.775 (0.700 to 0.850)", "0.600 (0.600 to 0.600)"]
    # Accuracy in four steps; minutes.
    assert cells[7] == "**0.970 (0.970 to 0.970)**"
    assert cells[-1] == "2"
    assert summary(["x"], "")[2].startswith("| [x](x-seed0/report.md) | 2 |")
    figures = "0.77 (0.70 to 0.85) | 0.60 (0.60 to 0.60) | 0.63 (0.63 to 0.63) |"
    rest = "0.880 (teacher 0.900) | 1.00 (1.00 to 1.00) | 99.0 %, 97.0 % |"
    assert short(["x"], "")[2] == f"| [x](x-seed0/report.md) | 2 | {figures} {rest}"


def test_a_groups_judges_have_a_row_each(elsewhere):
    def row(fd, steps, recall):
        return dict(fd=fd, precision=0.9, recall=recall, steps=steps)

    for seed, one in (("x-seed0", 2.0), ("x-seed1", 4.0)):
        (elsewhere / "results" / seed).mkdir()
        (elsewhere / "results" / seed / "report.md").write_text(REPORT)
        students = [row(one, 1, 0.5), row(8.0, 2, 0.6), row(9.0, 4, 0.7)]
        students[0]["precision"] = 0.88
        scores = {"teacher": row(10.0, 50, 0.4), "student": students}
        judged = {"judges": {"eye": scores, "ear": scores}, "iterations": 600}
        (elsewhere / "results" / seed / "judges.json").write_text(json.dumps(judged))
    head, _, eye, ear = judges(["x"], "")
    assert head.startswith("| run | features | distance, 1 step, × | distance, 2 steps, × |")
    figures = "0.30 (0.20 to 0.40) | 0.80 (0.80 to 0.80) | 0.90 (0.90 to 0.90) |"
    rest = "0.880 (teacher 0.900) | 1.25 (1.25 to 1.25) |"
    assert eye == f"| [x](x-seed0/judges.json) | eye | {figures} {rest}"
    assert ear == eye.replace("eye", "ear")


def test_judges_are_kept_with_the_training_that_they_scored(elsewhere, capsys):
    run, kept = elsewhere / "run", elsewhere / "results/x/judges.json"
    run.mkdir()
    for file in KEPT:
        (run / file).write_bytes(REPORT.encode())
    (run / "results.json").write_text('{"key": "a"}')
    (run / "judges.json").write_text('{"key": "a", "iterations": 600}')
    assert main([str(run), "x"]) == 0
    assert kept.read_text() == '{"key": "a", "iterations": 600}'
    (run / "results.json").write_text('{"key": "b"}')  # trained again
    assert main([str(run), "x"]) == 2
    assert f"{run / 'judges.json'} is of an earlier training" in capsys.readouterr().err
    (run / "judges.json").unlink()
    assert kept.exists() and main([str(run), "x"]) == 0 and not kept.exists()
    (run / "judges.json").write_text("{}")
    assert main([str(run), "x"]) == 2
    assert "a file of a run has no 'key'" in capsys.readouterr().err
    for seed, iterations in (("y-seed0", 600), ("y-seed1", 4)):
        (elsewhere / "results" / seed).mkdir()
        (elsewhere / "results" / seed / "report.md").write_text(REPORT)
        judged = {"iterations": iterations, "judges": {}}
        (elsewhere / "results" / seed / "judges.json").write_text(json.dumps(judged))
    with pytest.raises(ValueError, match="not all with the same --iterations"):
        judges(["y"])


def test_what_cannot_be_kept_or_filled_ends_in_one_line(elsewhere, capsys):
    run, readme = elsewhere / "run", elsewhere / "README.md"
    run.mkdir()
    before = readme.read_text()
    (run / "report.md").write_text(REPORT)
    assert main([str(run), "x"]) == 2 and "results.json" in capsys.readouterr().err
    assert not (elsewhere / "results/x").exists()  # nothing of an unfinished run
    assert main([]) == 2 and "names x, which is not in results/" in capsys.readouterr().err
    for file in KEPT:
        (run / file).write_bytes(REPORT.encode())
    readme.write_text("<!-- report: x -->\nprose\n" + before)
    assert main([str(run), "x"]) == 2
    assert "`<!-- report: x -->` has no `<!-- end -->`" in capsys.readouterr().err
    assert readme.read_text() == "<!-- report: x -->\nprose\n" + before
    with pytest.raises(ValueError, match="no table below '## Health'"):
        table("x", "Health")
    assert keep(run, "y") is None and main(["only one"]) == 2


def test_the_loop_of_ones_own_runs_as_it_stands():
    text = (ROOT / "README.md").read_text()
    code = re.search("^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[1]
    assert len(code.splitlines()) <= 30
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "torch.Size([4, 3, 32, 32])\n", done.stderr
