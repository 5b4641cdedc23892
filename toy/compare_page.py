"""The page of Table 2: what compare.py's finished trainings say."""

import statistics
from dataclasses import dataclass

from common import markdown
from common.checkpoints import write_text
from toy.methods import ADD, METHODS, TUNING_SEED, best_rate, find, tuning_cells, wanted_methods
from toy.testbed import METRICS, origin_of, quotient, show, sources, verdict, with_seed

COUNTED = {1: "one step", 2: "two steps", 4: "four steps"}


@dataclass
class Line:
    """A line of the table; metrics and minutes are by seed."""

    method: str
    steps: int
    metrics: dict  # of METRICS, and milliseconds; distances are multiples of the teacher's in 50
    minutes: dict
    lr: float | None


def seconds_per_evaluation(rows):
    """Of one image, from all rows of a teacher. All networks of the table have the same size, and
    one row's own time would be mostly noise."""
    seconds = sum(1 / row["images_per_second"] for row in rows)
    return seconds / sum(row["evaluations"] for row in rows)


def lines_of(teachers, found, rates):
    """[Line] of the cells that have rows, in the order of the methods' names.

    teachers is {seed: its teacher's rows}, found {method's name: {seed: cell}}, rates {method's
    name: learning rate}.
    """
    lines = []
    pace = {seed: seconds_per_evaluation(rows) for seed, rows in teachers.items()}

    def add(name, steps, rows, minutes, lr):
        """rows: {seed: row}."""
        metrics = {f: {seed: row[f] for seed, row in rows.items()} for f in METRICS}
        metrics["fd"] = {seed: row["fd"] / teachers[seed][0]["fd"] for seed, row in rows.items()}
        metrics["milliseconds"] = {
            seed: 1000 * row["evaluations"] * pace[seed] for seed, row in rows.items()
        }
        lines.append(Line(name, steps, metrics, minutes, lr))

    for i, row in enumerate(next(iter(teachers.values()))):  # all have the same samplers
        by_seed = {seed: rows[i] for seed, rows in teachers.items()}
        add(f"teacher, {row['name']}", row["steps"], by_seed, {}, None)
    for name, by_seed in found.items():
        trained = {seed: cell for seed, cell in by_seed.items() if cell["rows"]}
        for i, steps in enumerate(METHODS[name].steps if trained else ()):
            rows = {seed: cell["rows"][i] for seed, cell in trained.items()}
            minutes = {seed: cell["seconds"] / 60 for seed, cell in trained.items()}
            add(METHODS[name].title, steps, rows, minutes, rates[name])
    return sorted(lines, key=lambda line: (line.method.lower(), -line.steps))


def contested(lines):
    """ADD's numbers of steps that another method has, too."""
    mine = [line.steps for line in lines if line.method == ADD.title]
    return [steps for steps in ADD.steps if steps in mine and len(ranked(lines, steps)) > 1]


def mean(values):
    """Of {seed: value}."""
    return statistics.mean(values.values())


def shared_seeds(lines):
    """The seeds that all of these lines have."""
    return sorted(set.intersection(*(set(line.metrics["fd"]) for line in lines)))


def ranked(lines, steps):
    """The lines with that many steps, sorted by distance over the seeds that all of them have; []
    if they share none."""
    lines = [line for line in lines if line.steps == steps]
    seeds = shared_seeds(lines) if lines else []
    ordered = sorted(lines, key=lambda line: sum(line.metrics["fd"][seed] for seed in seeds))
    return ordered if seeds else []


def conclusion(lines, steps):
    """Sentences: who is best in one of the contested numbers of steps, and how the best of ADD
    compares, or if ADD is the best, with whichever F, the best of the rivals."""
    first, *others = ranked(lines, steps)
    ours = first.method.startswith(ADD.title)
    other = next((x for x in others if x.method.startswith(ADD.title) != ours), others[0])
    seeds = shared_seeds([first, *others])
    better, worse = ({seed: line.metrics["fd"][seed] for seed in seeds} for line in (first, other))
    noise = {
        "holds": "The difference is more than noise.",
        "does not hold": "Most seeds say the opposite, beyond noise.",
        "within noise": "The difference is within noise.",
        "too few seeds": "One seed cannot tell whether that is noise.",
    }
    distances = f"{show(better)}; {other.method} {show(worse)}"
    text = f"In {COUNTED[steps]} {first.method} has the shortest distance ({distances})."
    return f"{text} {noise[verdict(better, worse)]}"


def table(lines, contests):
    """Lines of the Markdown table. The methods' names are bold where they are best in one of the
    contested numbers of steps."""
    head = ["", "steps", "ms an image", "distance, ×", "over ADD's", "precision", "recall"]
    head += ["accuracy", "training, minutes", "learning rate", "seeds"]
    best, rows = [ranked(lines, steps)[0] for steps in contests], []
    adds = {line.steps: line.metrics["fd"] for line in lines if line.method == ADD.title}
    for line in lines:
        name = f"**{line.method}**" if line in best else line.method
        distance, *metrics = (show(line.metrics[f]) for f in METRICS)
        rival = line.method != ADD.title
        over = quotient(line.metrics["fd"], adds.get(line.steps, {})) if rival else ""
        lr = "" if line.lr is None else f"{line.lr:g}"
        milliseconds = show(line.metrics["milliseconds"], 3)
        row = [name, line.steps, milliseconds, distance, over, *metrics, show(line.minutes), lr]
        rows.append([*row, len(line.metrics["fd"])])
    return markdown.table(head, rows)


def draw(path, lines):
    """Distance over milliseconds an image, a line and a marker for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for i, name in enumerate(dict.fromkeys(line.method for line in lines)):
        mine = [line for line in lines if line.method == name]
        x, y = ([mean(line.metrics[f]) for line in mine] for f in ("milliseconds", "fd"))
        axes.plot(x, y, marker="osD^vPX*<>h"[i % 11], color=f"C{i % 10}", linewidth=1, label=name)
        for line, *where in zip(mine, x, y, strict=True):
            offset = dict(xytext=(4, 4), textcoords="offset points", fontsize=7)
            axes.annotate(str(line.steps), where, **offset)
    axes.set(xscale="log", yscale="log", xlabel="milliseconds an image (numbers: steps)")
    axes.set_ylabel("Fréchet distance, × the teacher's in 50 steps")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def at_the_edges(rates):
    """Sentences on the methods whose learning rate is the smallest or the largest of their own."""
    sentences = []
    for edge, i in (("smallest", 0), ("largest", -1)):
        names = [METHODS[name].title for name, lr in rates.items() if lr == METHODS[name].rates[i]]
        if names:
            sentences.append(f"The {edge} rate tried was best for {', '.join(names)}.")
    return sentences + ["A wider search may bring these closer."] if sentences else []


def gaps(tried, found, seeds):
    """Sentences on the methods that are not in the table, or not with every seed.

    tried is {method's name: {learning rate: cell on the tuning seed or None}}.
    """
    sentences = []
    for name, by_rate in tried.items():
        title, by_seed = METHODS[name].title, found[name]
        if not all(by_rate.values()):
            sentences.append(f"{title} is not trained yet, or not at every rate.")
        elif not any(cell["rows"] for cell in by_rate.values()):
            sentences.append(f"{title} diverged at every learning rate.")
        else:
            diverged = [str(seed) for seed, cell in by_seed.items() if not cell["rows"]]
            missing = [str(seed) for seed in seeds if seed not in by_seed]
            if diverged:
                sentences.append(f"{title} diverged on seed {', '.join(diverged)}.")
            if missing:
                sentences.append(f"{title} is not trained yet on seed {', '.join(missing)}.")
    return sentences


def write_page(out, cells, base, arguments, command):
    """OUT.md and OUT.png from whatever cells there are, of all seeds but the one that chose the
    learning rates, unless it is the only one. ValueError if there are none of ADD."""
    methods, teachers = wanted_methods(arguments.only), cells.teachers(base)
    tried = {method.name: tuning_cells(cells, method, base) for method in methods}
    if not any(tried[ADD.name].values()):
        raise ValueError(
            f"--out: {cells.folder} has no training of ADD at these settings; leave out --page, or "
            "name another folder"
        )
    rates = {name: best_rate(by_rate) for name, by_rate in tried.items()}
    seeds = [seed for seed in teachers if seed != TUNING_SEED] or [TUNING_SEED]
    found = {method.name: {} for method in methods}
    for method in methods:
        for seed in seeds if rates[method.name] else ():
            origin = origin_of(teachers[seed])
            cell = find(cells, method, rates[method.name], with_seed(base, seed), origin)
            found[method.name] |= {seed: cell} if cell else {}
    lines = lines_of({seed: teachers[seed]["rows"] for seed in seeds}, found, rates)
    contests = contested(lines)
    read = [cell for by_rate in tried.values() for cell in by_rate.values()]
    read += [cell for by_seed in found.values() for cell in by_seed.values()]
    commits, machines = sources([*read, *teachers.values()])
    page = [
        f"# Table 2 on {base.dataset}",
        "",
        f"`{command}` · {base.distil_steps} ADD iterations · {machines} · commit {commits}",
        "",
        f"Mean ± standard deviation over {'seeds' if len(seeds) > 1 else 'seed'} "
        f"{', '.join(map(str, seeds))}. Distances are multiples of that seed's teacher's in "
        "50 DDIM steps. *Over ADD's* divides the row's distance by ADD's in as many steps, seed by "
        "seed: the geometric mean and its 95 % interval, bold if 1 lies outside. The teacher has "
        "its best guidance. Milliseconds are the evaluations of the network times the mean time of "
        "one. A method's name is bold where it has the shortest distance in one, two or four "
        "steps.",
        "",
        *(f"- {conclusion(lines, steps)}" for steps in contests),
        *(f"- {sentence}" for sentence in gaps(tried, found, seeds)),
        "",
        "All methods have the same teacher, data, batch and size of network. ADD trains for "
        f"{base.distil_steps} iterations, with either F, and so does *adversarial only*, with "
        f"`--features {base.features}`. Their minutes include the training of F. A rival trains "
        "as long as so many iterations of ADD take with that F, at the pace of both measured "
        "side by side; drawing pairs from the teacher counts. Each method's learning rate is the "
        f"best of three or four on seed {TUNING_SEED}, by the geometric mean of its distances.",
        "",
        *([" ".join(edges), ""] if (edges := at_the_edges(rates)) else []),
        "ADD's other settings come from earlier trials on seeds 0, 1 and 2, but its F was chosen "
        "on seeds 3, 4 and 5 of glyphs (toy/experiments.md). "
        "The rivals' are their papers', with the departures named in toy/rivals/. ADD and DMD2 "
        "use the teacher without guidance; progressive and consistency distillation, 2-rectified "
        "flow and regression at its best guidance. UFOGen and *adversarial only* do not use it. "
        "The tests do not correct for picking the best of many rows.",
        "",
        *table(lines, contests),
        "",
        f"![distance over time an image]({out.name}.png)",
        "",
    ]
    write_text(out.with_suffix(".md"), "\n".join(page))
    draw(out.with_suffix(".png"), lines)
