"""Keeps finished runs of the toy, and their tables in the README.

python results/keep.py RUN NAME   copies the report of the run folder RUN, with its pictures and figures, to results/NAME
python results/keep.py            fills README.md's tables from results/*/report.md (the former does it, too)

In the README a table stands between `<!-- report: NAME -->`, or `<!-- summary: NAME NAME … -->` with a row for each, and
`<!-- end -->`.
"""

import re
import sys
from pathlib import Path

RESULTS = Path(__file__).parent
KEPT = ("report.md", "results.json", "config.json", "comparison.png", "refinement.png", "targets.png", "cost.png", "curves.png")
SUMMARY = (
    "| run | × the teacher's distance: one step | four steps | accuracy, one step | recall, × | variance of pixels, × | of features, × | minutes | commit |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def keep(run, name):
    """results/name with the files of a finished run; where its data lay is left out."""
    (RESULTS / name).mkdir(exist_ok=True)
    for file in KEPT:
        content = (run / file).read_bytes()
        if file.endswith((".md", ".json")):
            text = content.decode()
            where = re.search(r"--data-dir (\S+)", text) or re.search(r'"data_dir": "(/[^"]*)"', text)
            content = (text.replace(where[1], "DIR") if where else text).encode()
        (RESULTS / name / file).write_bytes(content)


def table(report, heading):
    """The first table below a heading of a report, as it stands there."""
    return re.search(rf"^## {heading}\n(?:[^|\n].*)?\n*((?:\|.*\n)+)", report, re.MULTILINE)[1].rstrip()


def cells(row):
    return [cell.strip() for cell in row.strip("|").split("|")]


def summary_row(name):
    """One row: the goals that the run was held to, in bold where it missed one, its minutes and its commit."""
    report = (RESULTS / name / "report.md").read_text()
    command, seed, commit = re.search(r"`(python [^`]*)`.* seed (\d+) .* commit (\S+)", report).groups()
    goals = [cells(row) for row in table(report, "Goals").splitlines()[2:]]
    measured = [f"{value}, **goal {goal}**" if "missed" in met else value for _, value, goal, met in goals]
    seconds = int(cells(table(report, "Seconds").splitlines()[-1])[-1])
    return " | ".join([f"| [{name}](results/{name}/report.md): `{command}`, seed {seed}", *measured, f"{seconds / 60:.1f}", f"{commit} |"])


def fill(readme):
    """The README's text with its tables as results/ has them."""

    def tables(match):
        kind, names = match[1], match[2].split()
        if kind == "summary":
            lines = [SUMMARY, *(summary_row(name) for name in names)]
        else:
            report = (RESULTS / names[0] / "report.md").read_text()
            lines = [table(report, "Figures"), "", table(report, "Goals")]
        return "\n".join([f"<!-- {kind}: {match[2]} -->", *lines, "<!-- end -->"])

    return re.sub(r"<!-- (report|summary): ([^>]*?) -->\n.*?<!-- end -->", tables, readme, flags=re.DOTALL)


if __name__ == "__main__":
    if len(sys.argv) not in (1, 3):
        sys.exit(__doc__)
    if len(sys.argv) == 3:
        keep(Path(sys.argv[1]), sys.argv[2])
    readme = RESULTS.parent / "README.md"
    readme.write_text(fill(readme.read_text()))
