"""Keeps finished runs of the toy, and their tables in the README.

python results/keep.py RUN NAME   copies the report of the run folder RUN, with its pictures and
                                  figures, to results/NAME
python results/keep.py            fills README.md's tables from results/ (the former does it, too)

In the README a table stands between `<!-- report: NAME -->`, or `<!-- summary: GROUP GROUP … -->`,
and `<!-- end -->`. A group is the runs results/GROUP-seed*; its row has their mean and, in
brackets, the least and the largest.
"""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from toy.report import goals, meets

RESULTS = Path(__file__).resolve().parent

KEPT = (
    "report.md",
    "results.json",
    "config.json",
    "comparison.png",
    "refinement.png",
    "targets.png",
    "cost.png",
    "curves.png",
)
PATH = r"[ =]('[^']*'|[^\s`]+)"  # as a shell would take it, up to the ` behind the command


def keep(run, name):
    """results/name with the files of a finished run, without where its data lay and where it was.
    OSError if one is missing."""
    contents = {file: (run / file).read_bytes() for file in KEPT}
    for file in ("report.md", "config.json"):
        text = re.sub("--data-dir" + PATH, "--data-dir DIR", contents[file].decode())
        text = re.sub(" --out" + PATH, "", text)
        contents[file] = re.sub(r'("data_dir": )"[^"]*"', r'\1"DIR"', text).encode()
    (RESULTS / name).mkdir(exist_ok=True)
    for file, content in contents.items():
        (RESULTS / name / file).write_bytes(content)


def table(name, heading):
    """The first table below a heading of a kept report, as it stands there. ValueError if there is
    none."""
    section = re.search(
        rf"^## {heading}\n(.*?)(?=^## |\Z)",
        (RESULTS / name / "report.md").read_text(),
        re.MULTILINE | re.DOTALL,
    )
    found = re.search(r"(?:^\|.*\n?)+", section[1], re.MULTILINE) if section else None
    if found is None:
        raise ValueError(f"results/{name}/report.md has no table below '## {heading}'")
    return found[0].rstrip()


def cells(row):
    """The cells of a table's row."""
    return [cell.strip() for cell in row.strip("|").split("|")]


def is_kept(name):
    """Whether there is a kept run of that name."""
    return (RESULTS / name / "report.md").exists()


def seeds_of(group):
    """The kept runs of a group, in the order of their seeds."""
    return sorted(run.parent.name for run in RESULTS.glob(f"{group}-seed*/report.md"))


def summary(groups):
    """Lines of the table with a row for each group: what the goals are about, in bold where the
    mean misses its goal."""
    lines = []
    for group in groups:
        names = seeds_of(group)
        measured, minutes = [], []
        for name in names:
            stored, config = (
                json.loads((RESULTS / name / file).read_text())
                for file in ("results.json", "config.json")
            )
            measured.append(goals(stored["results"], config["preset"]))
            minutes.append(int(cells(table(name, "Seconds").splitlines()[-1])[-1]) / 60)
        if not lines:
            columns = [
                "run",
                "seeds",
                *(f"{what} ({goal})" for what, _, goal, _ in measured[0]),
                "minutes",
            ]
            lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        row = [f"[{group}](results/{names[0]}/report.md)", str(len(names))]
        for same in zip(*measured, strict=True):
            values, goal = [value for _, value, _, _ in same], same[0][2]
            mean = sum(values) / len(values)
            text = f"{mean:.3f}"
            if len(values) > 1:
                text += f" ({min(values):.3f} to {max(values):.3f})"
            row.append(text if meets(mean, goal) else f"**{text}**")
        lines.append("| " + " | ".join([*row, f"{sum(minutes) / len(minutes):.0f}"]) + " |")
    return lines


def fill(readme):
    """The README's text with its tables as results/ has them. ValueError if a marker has no end, or
    no run its name."""

    def tables(match):
        kind, names, old = match[1], match[2].split(), match[3]
        if "<!--" in old:
            raise ValueError(f"README.md: `<!-- {kind}: {match[2]} -->` has no `<!-- end -->`")
        there = seeds_of if kind == "summary" else is_kept
        if missing := [name for name in names if not there(name)]:
            raise ValueError(
                f"README.md: `<!-- {kind}: {match[2]} -->` names {missing[0]}, "
                "which is not in results/"
            )
        lines = summary(names) if kind == "summary" else [table(names[0], "Figures")]
        return "\n".join([f"<!-- {kind}: {match[2]} -->", *lines, "<!-- end -->"])

    return re.sub(
        r"<!-- (report|summary): ([^>]*?) -->\n(.*?)<!-- end -->", tables, readme, flags=re.DOTALL
    )


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
