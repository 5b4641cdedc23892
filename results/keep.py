"""Keeps finished runs of the toy, and their tables in the README.

python results/keep.py RUN NAME   copies the report of the run folder RUN, with its pictures and figures, to results/NAME
python results/keep.py            fills README.md's tables from results/*/report.md (the former does it, too)

In the README a table stands between `<!-- report: NAME -->`, or `<!-- summary: NAME NAME … -->` with a row for each, and
`<!-- end -->`. A new NAME has to be put there by hand, once.
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
PATH = r"[ =]('[^']*'|[^\s`]+)"  # as a shell would take it, up to the ` behind the command


def keep(run, name):
    """results/name with the files of a finished run, without where its data lay and where it was. OSError if one is missing."""
    contents = {file: (run / file).read_bytes() for file in KEPT}
    for file in ("report.md", "config.json"):
        text = re.sub("--data-dir" + PATH, "--data-dir DIR", contents[file].decode())
        text = re.sub(" --out" + PATH, "", text)
        contents[file] = re.sub(r'("data_dir": )"[^"]*"', r'\1"DIR"', text).encode()
    (RESULTS / name).mkdir(exist_ok=True)
    for file, content in contents.items():
        (RESULTS / name / file).write_bytes(content)


def table(name, heading):
    """The first table below a heading of a kept report, as it stands there. ValueError if there is none."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", (RESULTS / name / "report.md").read_text(), re.MULTILINE | re.DOTALL)
    found = re.search(r"(?:^\|.*\n?)+", section[1], re.MULTILINE) if section else None
    if found is None:
        raise ValueError(f"results/{name}/report.md has no table below '## {heading}'")
    return found[0].rstrip()


def cells(row):
    """The cells of a table's row."""
    return [cell.strip() for cell in row.strip("|").split("|")]


def summary_row(name):
    """One row: what was measured, in brackets the goal that the run was held to, in bold if missed; minutes and commit."""
    report = (RESULTS / name / "report.md").read_text()
    command, seed, commit = re.search(r"`(python [^`]*)`.* seed (\d+) .* commit (\S+)", report).groups()
    goals = [cells(row) for row in table(name, "Goals").splitlines()[2:]]
    measured = [f"**{value} ({goal})**" if "missed" in met else f"{value} ({goal})" for _, value, goal, met in goals]
    seconds = int(cells(table(name, "Seconds").splitlines()[-1])[-1])
    return " | ".join([f"| [{name}](results/{name}/report.md): `{command}`, seed {seed}", *measured, f"{seconds / 60:.1f}", f"{commit} |"])


def fill(readme):
    """The README's text with its tables as results/ has them. ValueError if a marker has no end, or no run its name."""

    def tables(match):
        kind, names, old = match[1], match[2].split(), match[3]
        if "<!--" in old:
            raise ValueError(f"README.md: `<!-- {kind}: {match[2]} -->` has no `<!-- end -->`")
        if missing := [name for name in names if not (RESULTS / name / "report.md").exists()]:
            raise ValueError(f"README.md: `<!-- {kind}: {match[2]} -->` names {missing[0]}, which is not in results/")
        if kind == "summary":
            lines = [SUMMARY, *(summary_row(name) for name in names)]
        else:
            lines = [table(names[0], "Figures"), "", table(names[0], "Goals")]
        return "\n".join([f"<!-- {kind}: {match[2]} -->", *lines, "<!-- end -->"])

    return re.sub(r"<!-- (report|summary): ([^>]*?) -->\n(.*?)<!-- end -->", tables, readme, flags=re.DOTALL)


def main(argv):
    """Exit codes: 0 done, 2 a user's mistake (one line says which)."""
    if len(argv) not in (0, 2):
        print(__doc__, file=sys.stderr)
        return 2
    readme = RESULTS.parent / "README.md"
    try:
        if argv:
            keep(Path(argv[0]), argv[1])
        readme.write_text(fill(readme.read_text()))
    except (OSError, ValueError) as error:
        print(f"results/keep.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
