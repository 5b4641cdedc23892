"""What full/study/evaluate.py measured, as Markdown and as a plot."""

from common import markdown

LABELS = {"teacher": "teacher, DPM-Solver++", "student": "student"}
COLOURS = {"teacher": "#4878a8", "student": "#d1495b"}
PAPER = """The paper's own numbers, for reference, not measured here (Table 2: SD1.5, its CLIP
scores times 100):

| | steps | FID ↓ | CLIP ↑ | seconds |
|---|---|---|---|---|
| DPM Solver | 25 | 20.1 | 31.8 | 0.88 |
| DPM Solver | 8 | 31.7 | 32.0 | 0.34 |
| ADD-M | 1 | 19.7 | 32.6 | 0.09 |"""


def table(rows):
    """Lines of Markdown."""
    head = ["model", "steps", "guidance", "U-Net evaluations", "FID ↓", "CLIP ↑", "seconds/image"]
    lines = []
    for r in rows:
        guidance = f"{r['guidance']:g}" if r["guidance"] > 1 else "none"
        scores = [f"{r['fid']:.2f}", f"{r['clip']:.2f}", f"{r['seconds']:.3g}"]
        lines.append([LABELS[r["model"]], r["steps"], guidance, r["evaluations"], *scores])
    return markdown.table(head, lines)


def report(result):
    """The lines of evaluation.md."""
    e, size, v = result["settings"], result["resolution"], result["versions"]
    n, seed = e["images"], e["seed"]
    lines = [
        f"# {e['pipeline']}{' beside ' if e['teacher'] else ''}{e['teacher']}",
        "",
        *table(result["rows"]),
        "",
    ]
    lines += ["![FID and CLIP score against seconds an image](evaluation.png)", ""]
    lines += [
        f"- {n:,} images a row, {size}×{size}, seeds {seed} to {seed + n - 1}: one for each of the "
        "first images of COCO val2017 by id, from its caption of the lowest id.",
        f"- FID: torchmetrics {v['torchmetrics']}, Inception of torch-fidelity "
        f"{v['torch-fidelity']}, 2048 features, resized without antialiasing; against those images "
        f"of COCO, centre-cropped and resized to {size}×{size}.",
        f"- CLIP: mean of 100 cos, open_clip {v['open_clip_torch']}, {e['clip']}, float32.",
        f"- Seconds: median of {e['timed']} calls at batch 1 after a warm-up, from prompt to "
        f"image, in {result['dtype']} on {result['device']}.",
        f"- torch {v['torch']}, diffusers {v['diffusers']}, commit {result['commit']}.",
    ]
    if n < 2048:
        lines.append(
            f"- **Fewer images than Inception's 2048 features: with {n:,} the covariances are "
            "singular and FID is biased upwards. Compare it within this table only.**"
        )
    return [*lines, "", PAPER, ""]


def plot(result, path):
    """FID and CLIP score against seconds an image: Figure 7 with these for its ELO."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    labels = {"fid": "FID, lower is better", "clip": "CLIP score, higher is better"}
    for axis, (key, label) in zip(axes, labels.items(), strict=True):
        for model in dict.fromkeys(r["model"] for r in result["rows"]):
            rows = sorted(
                (r for r in result["rows"] if r["model"] == model), key=lambda r: r["seconds"]
            )
            x, y = [r["seconds"] for r in rows], [r[key] for r in rows]
            axis.plot(x, y, "o-", color=COLOURS[model], label=LABELS[model])
            for r in rows:
                text, place = f"{r['steps']} step{'s' * (r['steps'] > 1)}", (r["seconds"], r[key])
                axis.annotate(
                    text,
                    place,
                    (6, 6),
                    textcoords="offset points",
                    fontsize=9,
                    color=COLOURS[model],
                )
        axis.set(xscale="log", xlabel="seconds an image, batch 1", ylabel=label)
        axis.xaxis.set(
            major_locator=LogLocator(subs=(1, 2, 5)),
            major_formatter="{x:g}",
            minor_locator=NullLocator(),
        )
        axis.margins(x=0.22, y=0.15)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    n, size = result["settings"]["images"], result["resolution"]
    where = f"{result['device']}, {result['dtype']}"
    figure.suptitle(f"{n:,} captions of COCO val2017, {size}×{size}, {where}", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)
