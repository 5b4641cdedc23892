"""Keep finished runs of the toy, and their tables in README.md, results/ and toy/experiments.md.

python results/keep.py RUN NAME   copies the report of the run folder RUN, with its pictures and
                                  numbers, to results/NAME
python results/keep.py            fills the pages' tables from results/ (the former does it, too)

In a page a table stands between a marker and `<!-- end -->`:
`<!-- report: NAME -->` is the table of one run's numbers.
`<!-- summary: GROUP GROUP … -->` has a row for each group, the runs results/GROUP-seed*: their
mean and, in parentheses, the least and the largest.
`<!-- short: GROUP GROUP … -->` likewise, with fewer columns.
`<!-- judges: GROUP GROUP … -->` has a row for each judge of toy/judge.py and each group.
"""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import markdown
from toy.report import best_teacher, goals, meets

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
JUDGES = "judges.json"  # kept where toy/judge.py has been run
PAGES = ("README.md", "results/README.md", "toy/experiments.md")
PATH = r"[ =]('[^']*'|[^\s`]+)"  # as a shell would take it, up to the ` behind the command


def keep(run, name):
    """Copy the files of a finished run to results/name, without where its data lay and where it
    was. OSError if one is missing, ValueError if its judges scored an earlier training."""
    contents = {file: (run / file).read_bytes() for file in KEPT}
    if (run / JUDGES).exists():
        contents[JUDGES] = (run / JUDGES).read_bytes()
        scored, judged = (json.loads(contents[file]) for file in ("results.json", JUDGES))
        if judged["key"] != scored["key"]:
            raise ValueError(f"{run / JUDGES} is of an earlier training; run toy/judge.py again")
    for file in ("report.md", "config.json"):
        text = re.sub("--data-dir" + PATH, "--data-dir DIR", contents[file].decode())
        text = re.sub(" --out" + PATH, "", text)
        contents[file] = re.sub(r'("data_dir": )"[^"]*"', r'\1"DIR"', text).encode()
    (RESULTS / name).mkdir(exist_ok=True)
    (RESULTS / name / JUDGES).unlink(missing_ok=True)
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
    found = [run.parent.name for run in RESULTS.glob(f"{group}-seed*/report.md")]
    seeds = {name: name.rpartition("-seed")[2] for name in found}
    return sorted((name for name in found if seeds[name].isdecimal()), key=lambda n: int(seeds[n]))


def load(name, file):
    """A JSON file of a kept run."""
    return json.loads((RESULTS / name / file).read_text())


def spread(values, digits=3):
    """The mean and, of several values, the least and the largest."""
    mean, low, high = (
        f"{x:.{digits}f}" for x in (sum(values) / len(values), min(values), max(values))
    )
    return f"{mean} ({low} to {high})" if len(values) > 1 else mean


CLOSENESS = (
    "distance, 1 step, ×",
    "distance, 2 steps, ×",
    "distance, 4 steps, ×",
    "precision, 1 step",
    "recall, 1 step, ×",
)


def by_steps(rows):
    """{steps: row}"""
    return {row["steps"]: row for row in rows}


def closeness_cells(pairs):
    """Cells for CLOSENESS, from [({steps: the student's row}, the teacher's row)] of some seeds."""
    cells = [spread([s[k]["fd"] / t["fd"] for s, t in pairs], 2) for k in (1, 2, 4)]
    mine = sum(s[1]["precision"] for s, _ in pairs) / len(pairs)
    its = sum(t["precision"] for _, t in pairs) / len(pairs)
    cells.append(f"{mine:.3f} (teacher {its:.3f})")
    return [*cells, spread([s[1]["recall"] / t["recall"] for s, t in pairs], 2)]


def short(groups, folder="results/"):
    """Lines of the table with a row for each group: the student's main numbers."""
    rows = []
    for group in groups:
        names = seeds_of(group)
        every = [load(name, "results.json")["results"] for name in names]
        pairs = [(by_steps(results["student"]), best_teacher(results)) for results in every]
        accuracy = [sum(s[k]["accuracy"] for s, _ in pairs) / len(names) for k in (1, 4)]
        row = [f"[{group}]({folder}{names[0]}/report.md)", str(len(names)), *closeness_cells(pairs)]
        rows.append([*row, ", ".join(f"{100 * a:.1f} %" for a in accuracy)])
    head = ["run", "seeds", *CLOSENESS, "accuracy, 1 and 4 steps"]
    return markdown.table(head, rows)


def summary(groups, folder="results/"):
    """Lines of the table with a row for each group: what the goals are about, in bold where the
    mean misses its goal. folder is where the page finds the runs."""
    rows = []
    for group in groups:
        names = seeds_of(group)
        measured = [
            goals(load(name, "results.json")["results"], load(name, "config.json")["preset"])
            for name in names
        ]
        head, row = ["run", "seeds"], [f"[{group}]({folder}{names[0]}/report.md)", str(len(names))]
        for of_seeds in zip(*measured, strict=True):
            what, _, goal, _ = of_seeds[0]
            values = [value for _, value, _, _ in of_seeds]
            head.append(f"{what} ({goal})")
            met = meets(sum(values) / len(values), goal)
            row.append(spread(values) if met else f"**{spread(values)}**")
        seconds = [int(cells(table(name, "Seconds").splitlines()[-1])[-1]) for name in names]
        head.append("minutes")
        row.append(f"{sum(seconds) / len(seconds) / 60:.0f}")
        rows.append(row)
    return markdown.table(head, rows)


def judges(groups, folder="results/"):
    """Lines of the table with a row for each judge of each group: the student's distance over the
    teacher's, and one step's precision and recall."""
    rows = []
    for group in groups:
        names = seeds_of(group)
        stored = [load(name, JUDGES) for name in names]
        if len({judged["iterations"] for judged in stored}) > 1:
            raise ValueError(f"results/{group}-seed*/{JUDGES}: not all with the same --iterations")
        every = [judged["judges"] for judged in stored]
        link = f"[{group}]({folder}{names[0]}/{JUDGES})"
        for judge in every[0]:
            scores = [judged[judge] for judged in every]
            pairs = [(by_steps(of["student"]), of["teacher"]) for of in scores]
            rows.append([link, judge, *closeness_cells(pairs)])
    return markdown.table(["run", "features", *CLOSENESS], rows)


def fill(text, page="README.md"):
    """A page's text with its tables as results/ has them. ValueError if a marker has no end, or no
    run its name."""
    folder = {"README.md": "results/", "results/README.md": ""}.get(page, "../results/")

    def tables(match):
        kind, names, old = match[1], match[2].split(), match[3]
        marker = f"<!-- {kind}: {match[2]} -->"
        if "<!--" in old:
            raise ValueError(f"{page}: `{marker}` has no `<!-- end -->`")
        there = is_kept if kind == "report" else seeds_of
        if missing := [name for name in names if not there(name)]:
            raise ValueError(f"{page}: `{marker}` names {missing[0]}, which is not in results/")
        if kind == "report":
            lines = [table(names[0], "Numbers")]
        else:
            lines = {"summary": summary, "short": short, "judges": judges}[kind](names, folder)
        return "\n".join([marker, *lines, "<!-- end -->"])

    marked = r"<!-- (report|summary|short|judges): ([^>]*?) -->\n(.*?)<!-- end -->"
    return re.sub(marked, tables, text, flags=re.DOTALL)


def main(argv):
    """Exit codes: 0 done, 2 a user's mistake (one line says which)."""
    if len(argv) not in (0, 2):
        print(__doc__, file=sys.stderr)
        return 2
    root = RESULTS.parent
    try:
        if argv:
            keep(Path(argv[0]), argv[1])
        filled = {page: fill((root / page).read_text(), page) for page in PAGES}
        for page, text in filled.items():
            (root / page).write_text(text)
    except (OSError, ValueError, KeyError) as error:
        what = f"a file of a run has no {error}" if isinstance(error, KeyError) else error
        print(f"results/keep.py: {what}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
