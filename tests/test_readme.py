"""The README holds what results/ holds, and what it names is there."""

import re
import subprocess
import sys

import pytest

from results.keep import RESULTS, fill, keep

ROOT = RESULTS.parent
README = (ROOT / "README.md").read_text()


def test_the_tables_are_those_of_the_reports():
    assert fill(README) == README, "python results/keep.py brings README.md up to date"
    kept = {folder.name for folder in RESULTS.iterdir() if (folder / "report.md").exists()}
    assert kept == set(re.search("<!-- summary: (.*?) -->", README)[1].split())
    for name in kept:
        figures = re.search(r"^\| real training images .*$", (RESULTS / name / "report.md").read_text(), re.MULTILINE)[0]
        assert (figures in README) == (f"<!-- report: {name} -->" in README)


@pytest.mark.parametrize("page", ["README.md", "toy/README.md", "toy/experiments.md", "full/README.md"])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]
    for link in links:
        path, _, heading = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        headings = re.findall("^#+ (.*)$", target.read_text(), re.MULTILINE) if heading else []
        assert not heading or heading in {re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in headings}, link
    assert links or page == "toy/experiments.md"


@pytest.mark.parametrize(("page", "program"), [("README.md", "toy/run.py"), ("toy/README.md", "toy/run.py")])
def test_flags_exist(page, program):
    shown = subprocess.run([sys.executable, program, "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"--[a-z][\w-]*", shown))
    other = {"--class", "--run", "--preset", "--backbone"}  # of toy/sample.py and full/run.py
    assert set(re.findall(r"`(--[a-z][\w-]*)", (ROOT / page).read_text())) - known <= other


def test_a_kept_run_hides_where_its_data_lay(tmp_path, monkeypatch):
    monkeypatch.setattr("results.keep.RESULTS", tmp_path / "results")
    run, kept = tmp_path / "run", tmp_path / "results" / "x"
    run.mkdir(), kept.parent.mkdir()
    for file in ("comparison.png", "refinement.png", "targets.png", "cost.png", "curves.png"):
        (run / file).write_bytes(b"\x89 /home/me/data")
    (run / "results.json").write_text("{}")
    (run / "config.json").write_text('{"data_dir": "/home/me/data"}')
    (run / "report.md").write_text("`python toy/run.py --data-dir /home/me/data --threads 1`")
    keep(run, "x")
    assert (kept / "report.md").read_text() == "`python toy/run.py --data-dir DIR --threads 1`"
    assert (kept / "config.json").read_text() == '{"data_dir": "DIR"}'
    assert (kept / "cost.png").read_bytes() == b"\x89 /home/me/data"


def test_a_missed_goal_is_said_in_the_summary(tmp_path, monkeypatch):
    monkeypatch.setattr("results.keep.RESULTS", tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "report.md").write_text(
        "`python toy/run.py` · preset `cpu` · seed 3 · 1 CPU threads · commit abc1234\n\n## Goals\n\n| a | measured | goal | |\n|---|---|---|---|\n"
        "| distance | 1.1 | ≤ 1 | **missed** |\n| accuracy | 0.97 | ≥ 0.95 | met |\n\n## Seconds\n\n| data | all |\n|---|---|\n| 5 | 90 |\n"
    )
    row = fill("<!-- summary: x -->\nold\n<!-- end -->").splitlines()[3]
    assert row == "| [x](results/x/report.md): `python toy/run.py`, seed 3 | 1.1, **goal ≤ 1** | 0.97 | 1.5 | abc1234 |"
