"""Distils the teacher into a student with add.py: the plain loop around ADD.step."""

import dataclasses

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from add import ADD, ADDConfig, Batch, Discriminator, DiscriminatorHeads, Student
from checkpoints import one_line, read, write
from flags import from_dict
from toy.data import Batches
from toy.loop import GeneratorState, TrainingError, run_loop, warm_up_then_decay
from toy.networks import has_bf16
from toy.settings import Settings
from toy.start import pair_loss
from toy.teacher import Standardize, make_denoiser


def build_add(student, teacher, features, classes, settings, device):
    """add.ADD with fresh heads on every level of F."""
    c_text, c_s = settings.distil_c_text, settings.distil_c_s
    heads = DiscriminatorHeads(
        [features.width] * features.levels,
        text_dim=classes * c_text + len(settings.distil_timesteps) * c_s,
        image_dim=features.width if settings.distil_c_img else 0,
        hidden=settings.distil_head_width,
        kernel=settings.distil_head_kernel,
        c_map=settings.distil_c_map,
        deviation=settings.distil_deviation,
    )
    config = ADDConfig(
        lambda_=settings.distil_lambda,
        gamma=settings.distil_gamma,
        weight=settings.distil_weight,
        guidance=settings.distil_guidance,
        teacher_steps=settings.distil_teacher_steps,
        condition_on_s=c_s,
    )
    return ADD(student, teacher, Discriminator(features, heads, settings.distil_augment), config).to(device).train()


def make_batch(images, labels, features, classes, settings):
    """add.Batch of labelled images: the class is the condition of the denoisers, and one-hot that of the heads."""
    null = torch.full_like(labels, classes)
    c_text = F.one_hot(labels, classes).float() if settings.distil_c_text else None
    c_img = None
    if settings.distil_c_img:
        with torch.no_grad():
            c_img = features.summary(images)
    # NFSD's negative prompt has no counterpart among classes: with ∅ in its place δ_D is 0 above the threshold.
    return Batch(images, labels, null_cond=null, negative_cond=null, c_text=c_text, c_img=c_img)


def distil(folder, data, settings, student, teacher, pairs, features, device, key):
    """(student with the EMA weights, seconds); also writes folder/student.pt, all that toy/sample.py needs.

    pairs (start.Pairs, or None) go on to hold each noise to its image and, below τ_n, the student to the data.
    """
    torch.manual_seed(settings.seed + 4)
    classes, steps = len(data.classes), settings.distil_steps
    add = build_add(student, teacher, features, classes, settings, device)
    network = student.denoiser.network
    ema = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(settings.distil_ema))
    betas = (settings.distil_beta1, 0.99)
    student_optimizer = torch.optim.Adam(network.parameters(), lr=settings.distil_student_lr, betas=betas)
    heads_optimizer = torch.optim.Adam(add.discriminator.heads.parameters(), lr=settings.distil_heads_lr, betas=betas)
    lr = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: warm_up_then_decay(i, steps))
        for optimizer in (student_optimizer, heads_optimizer)
    ]
    batches = Batches(data.train_images, data.train_labels, settings.distil_batch, settings.seed + 4)
    generator = torch.Generator(device).manual_seed(settings.seed + 4)

    def step(i):
        images, labels = (x.to(device) for x in next(batches))
        order = labels.argsort(stable=True)  # groups of (nearly) one class: their deviation is that within the class
        images, labels = images[order], labels[order]
        batch = make_batch(images, labels, features, classes, settings)
        extra, anchor = 0.0, {}
        if pairs is not None and settings.distil_anchor:
            loss = pair_loss(student, pairs, len(images) // 2, generator).mean()
            extra, anchor = settings.distil_anchor * loss, {"pairs": loss.detach()}
        log = anchor | add.step(batch, student_optimizer, heads_optimizer, generator, extra).log
        ema.update_parameters(network)
        for schedule in lr:
            schedule.step()
        return log | {"hinge_per_head": log["hinge"] / features.levels}

    parts = {
        "student": network, "ema": ema, "heads": add.discriminator.heads, "student_optimizer": student_optimizer,
        "heads_optimizer": heads_optimizer, "student_lr": lr[0], "heads_lr": lr[1], "batches": batches,
        "generator": GeneratorState(generator),
    }  # fmt: skip
    seconds = run_loop(folder, "ADD", parts, step, steps, key, settings)
    network.load_state_dict(ema.module.state_dict())
    write(folder / "student.pt", {
        "settings": dataclasses.asdict(settings), "classes": list(data.classes),
        "shape": list(data.train_images.shape[1:]), "network": network.state_dict(),
        "mean": teacher.encode.mean, "std": teacher.encode.std,
    })  # fmt: skip
    return student.eval().requires_grad_(False), seconds


def load_student(folder):
    """(Student on the CPU, image shape (C, H, W), class names) of a finished run. TrainingError if it is none."""
    path = folder / "distil" / "student.pt"
    if not path.exists():
        raise TrainingError(f"--run {folder}: no finished run there ({path} is missing); python toy/run.py makes one")
    state = read(path)
    try:
        settings, classes = from_dict(Settings, state["settings"]), tuple(state["classes"])
        denoiser = make_denoiser(state["shape"][0], len(classes), settings, Standardize(state["mean"], state["std"]))
        denoiser.network.load_state_dict(state["network"])
        denoiser.network.bf16 &= has_bf16(torch.device("cpu"))  # emulated, it would be slow
    except (LookupError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise TrainingError(f"{path} is not a student of this version ({one_line(error)[:200]}); train it again") from error
    return Student(denoiser, settings.distil_timesteps).eval().requires_grad_(False), tuple(state["shape"]), classes
