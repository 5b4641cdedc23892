"""Writes report.md: what was run, what it cost, the table, whether the goals were met, the
pictures."""

from common import markdown
from common.checkpoints import write_text
from common.origin import commit, machine
from toy.loop import read_log

# What the student must reach, as the README says; all but accuracy are ratios to the teacher's.
GOALS = {
    "cpu": dict(fd=0.8, few=0.7, accuracy=0.98, recall=0.85, variance=0.8),
    "long": dict(fd=0.5, few=0.5, accuracy=0.99, recall=0.95, variance=0.9),
}
GOALS["gpu"] = GOALS["long"]
COLOUR = dict(fd=1.0, few=0.8, recall=0.75)  # whatever the preset


def best_teacher(results):
    """The teacher's row at its most steps and best guidance: what the student is compared with."""
    rows = [row for row in results["teacher"] if row["guidance"] == results["best_guidance"]]
    return max(rows, key=lambda row: row["steps"])


def meets(value, goal):
    """Whether a value meets a goal such as "≤ 0.8"."""
    sign, limit = goal.split()
    return value <= float(limit) if sign == "≤" else value >= float(limit)


def goals(results, preset):
    """[(what, value, goal, met)] of the student; × divides by the teacher's number."""
    colour = results.get("colour", False)
    teacher, goal = best_teacher(results), COLOUR if colour else GOALS.get(preset, GOALS["cpu"])
    by_steps = {row["steps"]: row for row in results["student"]}
    one, few = by_steps[min(by_steps)], {k: row for k, row in by_steps.items() if k > 1}

    def ratio(row, name):
        return row[name] / max(teacher[name], 1e-9)

    rows = []

    def at_most(limit, what, value):
        rows.append((what, value, f"≤ {limit:g}"))

    def at_least(limit, what, value):
        rows.append((what, value, f"≥ {limit:g}"))

    at_most(goal["fd"], "distance, one step, ×", ratio(one, "fd"))
    for k, row in few.items():
        at_most(goal["few"], f"distance, {k} steps, ×", ratio(row, "fd"))
    if {2, 4} <= set(by_steps):
        growth = by_steps[4]["fd"] / max(by_steps[2]["fd"], 1e-9)
        at_most(1.1, "distance, 4 steps, × that of 2", growth)
    conditional = results.get("conditional", True)
    for k, row in by_steps.items() if conditional else ():
        what = f"class accuracy, {'one step' if k == 1 else f'{k} steps'}"
        if k in (1, 4) and colour:
            less = row["accuracy"] - teacher["accuracy"]
            at_least(-0.03, f"{what}, less the teacher's", less)
        elif k in (1, 4):
            at_least(goal["accuracy"], what, row["accuracy"])
    if not colour:
        less = one["precision"] - teacher["precision"]
        at_least(-0.01, "precision, one step, less the teacher's", less)
    at_least(goal["recall"], "recall, one step, ×", ratio(one, "recall"))
    for of in ("pixels", "features") if conditional and not colour else ():
        what = f"within-class variance of {of}, one step, ×"
        at_least(goal["variance"], what, ratio(one, f"variance_{of}"))
    return [(what, value, goal, meets(value, goal)) for what, value, goal in rows]


def table(results):
    """The Markdown table of every measured row."""
    real, has_fid, rows = results["real"], "fid_images" in results, []
    head = ["", "steps", "guidance", "evaluations", "Fréchet distance ↓", "class accuracy"]
    head += ["precision", "recall", "variance (pixels, features; × real)", "images/s"]
    if has_fid:
        head.append(f"FID ({results['fid_images']:,})")
    teachers, students = results["teacher"], [*results["started"], *results["student"]]
    for row in [real, *teachers, results["solver"], *students]:
        asked = [row[name] for name in ("steps", "guidance", "evaluations")]
        steps, guidance, evaluations = ("" if x is None else f"{x:g}" for x in asked)
        name = f"**{row['name']}**" if row["name"] == "ADD student" else row["name"]
        ratios = (row[v] / real[v] for v in ("variance_pixels", "variance_features"))
        variance = " · ".join(f"{x:.2f}" for x in ratios)
        speed = f"{row['images_per_second']:.0f}" if "images_per_second" in row else ""
        fid = f"{row['fid']:.2f}" if "fid" in row else ""
        distance, recall = (
            f"{row[metric]:.2f}" + (f" ± {row[margin]:.2f}" if margin in row else "")
            for metric, margin in (("fd", "fd_margin"), ("recall", "recall_margin"))
        )
        accuracy = f"{row['accuracy']:.1%}"
        if not results.get("conditional", True) and row is not real:
            accuracy = variance = "–"  # nobody asked for a class
        cells = [name, steps, guidance, evaluations, distance, accuracy, f"{row['precision']:.2f}"]
        rows.append([*cells, recall, variance, speed, *([fid] if has_fid else [])])
    return markdown.table(head, rows)


# Column of distil/log.csv → what the report says of it; toy/README.md has the healthy ranges.
HEALTH = {
    "hinge_per_head": "hinge, a head",
    "sign_real": "sign rate, real",
    "sign_fake": "sign rate, generated",
    "r1": "R1",
    "gradient_adversarial": "gradient at the output, adversarial",
    "gradient_distillation": "gradient at the output, distillation",
}


def health(log):
    """Lines on the last tenth of the ADD stage's log ({column: [values]}), and whether the
    discriminator had won there: half of the iterations or more in which it tells 19 of 20 tokens
    right, real and generated."""
    tail = {name: values[-max(1, len(values) // 10) :] for name, values in log.items()}
    mean = {name: sum(values) / len(values) for name, values in tail.items()}
    means = [f"{mean[name]:.3g}" for name in HEALTH] + [f"{log['nonfinite'][-1]:.0f}"]
    lines = [*markdown.table([*HEALTH.values(), "steps skipped, not finite"], [means]), ""]
    if mean["discriminator_won"] >= 0.5:
        lines += [
            "**The discriminator has won**: it tells 19 of 20 tokens right, and the student learns "
            "little more. Lower --distil-heads-lr.",
            "",
        ]
    return lines


def explanation(results, guidances):
    """What the numbers of the table are."""
    n, tests = f"{results['n']:,}", f"{results['test_images']:,}"
    return (
        "The Fréchet distance is taken in the 64 features of this run's metric network (a small "
        f"CNN, {results['metric_accuracy']:.1%} accurate on the test images, trained apart "
        "from the discriminator's F), "
        f"between {n} generated images and the {tests} test images. "
        "It is not FID and is comparable only within this report. "
        f"{n} real training images in the place of generated ones give the first row; "
        f"all training images give a distance of {results['floor']:.2f}. "
        f"Precision and recall: k-NN, k = 5, against {min(results['n'], results['test_images']):,} "
        "test images. "
        f"±: 95 % confidence interval over draws of {n} images (jackknife). "
        "Variance: within a class, mean over the classes. "
        "The teacher's guidance is the one with the least distance at "
        f"{results['search_steps']} steps, of {', '.join(f'{g:g}' for g in guidances)}; the "
        "student uses none."
    )


PICTURES = """## Pictures

The student refines its own estimate, with fresh noise between steps:

![refinement](refinement.png)

What the distillation loss asks for, row by row: a real image x_0; x_s, diffused from it; the \
student's estimate x̂_θ; then, for three t, x̂_θ diffused and the teacher's estimate, the target:

![reconstruction targets](targets.png)

![distance against network evaluations](cost.png)

![losses](curves.png)
"""


def write_report(folder, data, settings, preset, command, results, seconds, device, memory_gib):
    """folder/report.md."""
    judged = [
        [what, f"{value:.3f}", goal, "met" if met else "**missed**"]
        for what, value, goal, met in goals(results, preset)
    ]
    spent = [f"{s:.0f}" for s in [*seconds.values(), sum(seconds.values())]]
    lines = [
        f"# ADD on {data.name}",
        "",
        f"`{command}` · preset `{preset}` · seed {settings.seed} · {machine(device)} · "
        f"{settings.precision} · commit {commit()}",
        "",
        f"{len(data.train_images):,} training images, {results['test_images']:,} held-out test "
        f"images, {len(data.classes)} classes.",
        "",
        "![teacher and student from the same noise](comparison.png)",
        "",
        "## Numbers",
        "",
        *table(results),
        "",
        explanation(results, settings.eval_guidances),
        "",
        "## Goals",
        "",
        *markdown.table(["student against its teacher", "measured", "goal", ""], judged),
        "",
        "## Health",
        "",
        "Means over the last tenth of the ADD stage's log; "
        "[what they should be](../../toy/README.md#what-the-log-tells).",
        "",
        *health(read_log(folder / "distil" / "log.csv")),
        "## Seconds",
        "",
        *markdown.table([*seconds, "all"], [spent]),
        "",
        f"Peak memory of the process: {memory_gib:.2f} GiB. "
        "A stage that was reused counts with the seconds it once took.",
        "",
        PICTURES,
    ]
    write_text(folder / "report.md", "\n".join(lines))
