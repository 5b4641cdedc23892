"""The pictures of a run: samples, refinement, reconstruction targets, losses, distance against
cost."""

import matplotlib
import torch

from add import reconstruction_target
from toy.data import to_float
from toy.loop import read_log
from toy.samplers import noise_for, sample_student, sample_teacher

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend comes first: there may be no screen)

TEACHER, BEFORE, STUDENT, REAL = "#4878a8", "#e6ab02", "#d1495b", "#777777"


def tile(images, columns, pad=2):
    """(N, C, H, W) in [-1, 1] → one (H', W', C) array in [0, 1], row by row, with grey lines
    between."""
    images = (images.clamp(-1, 1).float().cpu() + 1) / 2
    n, c, h, w = images.shape
    rows = -(-n // columns)
    sheet = torch.full((c, rows * (h + pad) + pad, columns * (w + pad) + pad), 0.35)
    for i, image in enumerate(images):
        y, x = pad + (i // columns) * (h + pad), pad + (i % columns) * (w + pad)
        sheet[:, y : y + h, x : x + w] = image
    return sheet.permute(1, 2, 0).squeeze(-1).numpy()


def show(axis, images, columns, title=""):
    """Draw a tiled sheet on a matplotlib axis."""
    axis.imshow(tile(images, columns), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set_title(title, fontsize=10)
    axis.axis("off")


def _save(figure, path):
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def comparison(path, teacher, started, student, data, settings, guidance, device, each=6):
    """Teacher and student from the same noise, a row for a class, several images of each."""
    classes = min(10, len(data.classes))
    labels = torch.arange(classes, device=device).repeat_interleave(each)
    noise = noise_for(
        len(labels), data.train_images.shape[1:], settings.seed_of("pictures"), device
    )
    steps = settings.eval_steps[-1]
    real = torch.cat([data.test_images[data.test_labels == c][:each] for c in range(classes)])
    many = sample_teacher(teacher, noise, labels, steps, guidance)
    before = sample_student(started, noise, labels, 1, settings.seed_of("steps"))
    panels = [
        ("real test images", to_float(real)),
        (f"teacher, {steps} steps, guidance {guidance:g}", many),
        ("teacher, 1 step", sample_teacher(teacher, noise, labels, 1)),
        ("student before ADD, 1 step", before),
    ]
    for k in (1, 2, 4):
        if k <= len(student.timesteps):
            images = sample_student(student, noise, labels, k, settings.seed_of("steps"))
            panels.append((f"ADD student, {k} step{'s' * (k > 1)}", images))
    figure, axes = plt.subplots(1, len(panels), figsize=(2.3 * len(panels), 0.38 * classes + 0.4))
    for axis, (title, images) in zip(axes, panels, strict=True):
        show(axis, images, each, title)
    figure.tight_layout(pad=0.3)
    _save(figure, path)


def refinement(path, student, data, settings, device, columns=10):
    """The student's estimate after each of its n steps, from one noise (Fig. 4 of the paper)."""
    labels = torch.arange(columns, device=device) % len(data.classes)
    noise = noise_for(columns, data.train_images.shape[1:], settings.seed_of("pictures"), device)
    states, decode = [noise], student.denoiser.decode
    generator = torch.Generator(device).manual_seed(settings.seed_of("steps"))
    student.sample(
        noise,
        labels,
        len(student.timesteps),
        generator=generator,
        on_step=lambda s, x_s, x_hat: states.append(decode(x_hat)),
    )
    figure, axis = plt.subplots(figsize=(columns * 0.62, len(states) * 0.62))
    names = ", ".join(map(str, student.inference_timesteps(len(student.timesteps))))
    show(axis, torch.cat(states), columns, f"noise, then the student's x̂_0 at s = {names}")
    _save(figure, path)


@torch.no_grad()
def targets(path, student, teacher, data, settings, device, columns=10):
    """x_0 → x_s → x̂_θ → x̂_θ,t → x̂_ψ, the reconstruction target, for several t: what L_distill
    asks for."""
    picked = [int((data.test_labels == c % len(data.classes)).nonzero()[0]) for c in range(columns)]
    x_0, labels = to_float(data.test_images[picked]).to(device), data.test_labels[picked].to(device)
    noise = noise_for(columns, x_0.shape[1:], settings.seed_of("pictures"), device)
    s = student.tau[torch.arange(columns, device=device) % len(student.timesteps)]
    x_s = student.diffuse(teacher.encode(x_0), noise, s)
    x_hat = student(x_s, s, labels)
    sheets, names = [x_0, teacher.decode(x_s), teacher.decode(x_hat)], ["x_0", "x_s", "x̂_θ"]
    null = torch.full_like(labels, len(data.classes))
    asked = dict(
        null_cond=null,
        negative_cond=null,
        guidance=settings.distil_guidance,
        steps=settings.distil_teacher_steps,
        nfsd=settings.distil_weight == "nfsd",
    )
    for t_value in (200, 500, 800):
        t = torch.full((columns,), t_value, device=device)
        sheets.append(teacher.decode(teacher.schedule.diffuse(x_hat, noise, t)))
        target = reconstruction_target(teacher, x_hat, noise, t, labels, **asked)
        sheets.append(teacher.decode(target))
        names += [f"x̂_θ,t  t={t_value}", f"x̂_ψ  t={t_value}"]
    figure, axes = plt.subplots(len(sheets), 1, figsize=(columns * 0.62, len(sheets) * 0.66))
    for axis, images, name in zip(axes, sheets, names, strict=True):
        show(axis, images, columns)
        axis.text(-6, images.shape[2] / 2 + 2, name, ha="right", va="center", fontsize=9)
    _save(figure, path)


def curves(path, folder):
    """Losses of the teacher, if it was trained here, and of both sides of ADD."""
    figure, axes = plt.subplots(1, 4, figsize=(15, 3))
    add = read_log(folder / "distil" / "log.csv")
    if (folder / "teacher" / "log.csv").exists():
        teacher = read_log(folder / "teacher" / "log.csv")
        axes[0].plot(teacher["step"], teacher["loss"], color=TEACHER)
        axes[0].set_title("teacher: mean square error")
        axes[0].set_yscale("log")
    else:
        axes[0].set_title("teacher: a public one")
    axes[1].plot(add["step"], add["adversarial"], color=STUDENT)
    axes[1].set_title("student: adversarial, Eq. 2")
    axes[2].plot(add["step"], add["distillation"], color=STUDENT)
    axes[2].set_title("student: distillation, Eq. 4")
    axes[2].set_yscale("log")
    axes[3].plot(add["step"], add["logit_real"], color=REAL, label="mean logit, real")
    axes[3].plot(add["step"], add["logit_fake"], color=STUDENT, label="mean logit, generated")
    hinge = "hinge a head (2: blind, 0: has won)"
    axes[3].plot(add["step"], add["hinge_per_head"], color="black", label=hinge)
    axes[3].set_title("discriminator, Eq. 3")
    axes[3].legend(fontsize=7)
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    _save(figure, path)


def cost(path, results):
    """Distance against the number of network evaluations an image."""
    figure, axis = plt.subplots(figsize=(6, 3.6))
    best = [row for row in results["teacher"] if row["guidance"] == results["best_guidance"]]
    lines = (
        (best, TEACHER, "teacher (DDIM)"),
        (results["started"], BEFORE, "student before ADD"),
        (results["student"], STUDENT, "ADD student"),
    )
    for rows, color, name in lines:
        rows = sorted(rows, key=lambda row: row["evaluations"])
        x, y = ([row[column] for row in rows] for column in ("evaluations", "fd"))
        axis.plot(x, y, "o-", color=color, label=name)
    x, y = results["solver"]["evaluations"], results["solver"]["fd"]
    axis.plot(x, y, "x", color=TEACHER, label="teacher (DPM-Solver++)")
    real = f"{results['n']} real training images"
    axis.axhline(results["real"]["fd"], color=REAL, linestyle=":", label=real)
    axis.set(xscale="log", yscale="log")
    axis.set(xlabel="network evaluations an image", ylabel="Fréchet distance (metric net)")
    axis.legend()
    axis.grid(alpha=0.3, which="both")
    _save(figure, path)
