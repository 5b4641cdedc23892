"""Distils the teacher into a student with add.py."""

import copy
import dataclasses

import torch
from torch import nn
from torch.nn import functional

from add import ADD, ADDConfig, Batch, Discriminator, DiscriminatorHeads, LocalBatchNorm, Student
from common.augment import Augmented
from common.checkpoints import write
from common.health import heads_log, student_log, watch
from toy.data import Batches
from toy.features import TeacherEncoder
from toy.graphs import recorded
from toy.loop import (
    GeneratorState,
    backward,
    make_adam,
    make_ema,
    run_loop,
    update,
)
from toy.teacher import resized


def make_student(teacher, settings, second=None):
    """The student before ADD, without dropout: a trainable copy of the teacher (§3.1), or of a
    second one of another size; with --distil-init random a network of its size, untrained."""
    denoiser = copy.deepcopy(second or teacher)
    if settings.distil_init == "random":
        torch.manual_seed(settings.seed_of("distil"))
        denoiser = resized(teacher, settings.of_students_size).to(teacher.schedule.alpha.device)
    for module in denoiser.requires_grad_(True).modules():
        if isinstance(module, nn.Dropout):
            # It keeps a long training from overfitting; here it would only add noise to x_hat.
            module.p = 0.0
    return Student(denoiser, settings.distil_timesteps)


def build_add(student, teacher, features, classes, settings, device, generator=None):
    """add.ADD with fresh heads, one for each token map of F; the generator draws augmentations."""
    heads = DiscriminatorHeads(
        features.channels,
        text_dim=classes if settings.distil_c_text else 0,
        image_dim=features.width if settings.distil_c_img else 0,
        hidden=settings.distil_head_width,
        kernel=settings.distil_head_kernel,
        c_map=settings.distil_c_map,
        norm=LocalBatchNorm if settings.distil_local_norm else nn.Identity,
    )
    config = ADDConfig(
        lambda_=settings.distil_lambda,
        gamma=settings.distil_gamma,
        weight=settings.distil_weight,
        guidance=settings.distil_guidance,
        teacher_steps=settings.distil_teacher_steps,
    )
    if settings.distil_augment:
        features = Augmented(features, settings.distil_augment, generator)
    return ADD(student, teacher, Discriminator(features, heads), config).to(device).train()


def make_batch(images, labels, features, classes, settings):
    """add.Batch of labelled images.

    The class conditions the denoisers. The heads get it as c_text, one-hot with mean square 1, and
    F's summary of x_0 as c_img, with mean square 1/8. c_img tells the class, too: a louder one
    makes heads neglect c_text, and with it the class at τ_n, where c_img is zero.
    """
    null = torch.full_like(labels, classes)
    c_text = c_img = None
    if settings.distil_c_text:
        c_text = classes**0.5 * functional.one_hot(labels, classes).float()
    if settings.distil_c_img:
        with torch.no_grad():
            summary = functional.normalize(features.summary(images), dim=1)
        c_img = (features.width / 8) ** 0.5 * summary
    # NFSD's negative prompt has no counterpart among classes: with ∅ in its place δ_D is 0 above
    # the threshold.
    return Batch(images, labels, null_cond=null, negative_cond=null, c_text=c_text, c_img=c_img)


class Distillation:
    """An ADD training: `step` is one iteration for run_loop, `student` is what it trains, and
    `parts` are what a checkpoint keeps.

    features: F, or None for the teacher's encoder; second: see make_student.
    """

    def __init__(self, stage, teacher, features, second=None):
        data, settings, device = stage.data, stage.settings, stage.device
        seed = settings.seed_of("distil")
        torch.manual_seed(seed)
        self.settings, self.classes, self.T = settings, len(data.classes), len(teacher.schedule)
        self.features = features or TeacherEncoder(teacher, settings.seed_of("features"))
        self.student = make_student(teacher, settings, second)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.generators = {"generator": self.generator}
        if hasattr(self.features, "generator"):  # F that diffuses what it sees
            self.generators["features_generator"] = self.features.generator
        self.add = build_add(
            self.student, teacher, self.features, self.classes, settings, device, self.generator
        )
        self.network, self.heads = self.student.denoiser.network, self.add.discriminator.heads
        self.ema = make_ema(self.network, settings.distil_batch, settings.distil_ema)
        beta1, steps = settings.distil_beta1, settings.distil_steps
        self.student_optimizer, self.student_lr = make_adam(
            self.network.parameters(), settings.distil_student_lr, beta1, steps
        )
        self.heads_optimizer, self.heads_lr = make_adam(
            self.heads.parameters(), settings.distil_heads_lr, beta1, steps
        )
        images, labels = data.train_images.to(device), data.train_labels.to(device)
        flip = settings.flip == "true"
        self.batches = Batches(images, labels, settings.distil_batch, seed, flip)
        # ADD.step in its two halves, each of which a GPU records.
        record = recorded(device, self.generators.values(), modules=[self.heads])
        self.student_half = record(self._student_half)
        self.discriminator_half = record(self._discriminator_half)

    def _student_half(self, images, labels):
        batch = make_batch(images, labels, self.features, self.classes, self.settings)
        half = self.add.student_half(batch, self.generator)
        gradients = watch(half)
        norm = backward(half.loss, self.student_optimizer)
        log = {"student_loss": half.loss, "gradient_student": norm}
        return half, log | student_log(half, self.T) | gradients

    def _discriminator_half(self, student):
        half = self.add.discriminator_half(student)
        norm, log = backward(half.loss, self.heads_optimizer), heads_log(half)
        return log | {
            "discriminator_loss": half.loss,
            "gradient_heads": norm,
            "hinge_per_head": log["hinge"] / len(self.heads),
        }

    def step(self, i):
        """One iteration; its log."""
        half, log = self.student_half(*next(self.batches))
        update(self.student_optimizer, "student", log["student_loss"], log["gradient_student"])
        other = self.discriminator_half(half)
        loss, norm = other["discriminator_loss"], other["gradient_heads"]
        update(self.heads_optimizer, "discriminator", loss, norm)
        self.ema.update_parameters(self.network)
        self.student_lr.step()
        self.heads_lr.step()
        return log | other

    @property
    def parts(self):
        """{name: what has a state_dict}."""
        parts = {
            "student": self.network,
            "ema": self.ema,
            "heads": self.heads,
            "student_optimizer": self.student_optimizer,
            "heads_optimizer": self.heads_optimizer,
            "student_lr": self.student_lr,
            "heads_lr": self.heads_lr,
            "batches": self.batches,
        }
        return parts | {name: GeneratorState(g) for name, g in self.generators.items()}


def distil(stage, teacher, features, second=None):
    """(student with the EMA weights, seconds); also writes folder/student.pt, all that
    toy/sample.py needs. features, second: see Distillation."""
    data, settings = stage.data, stage.settings
    training = Distillation(stage, teacher, features, second)
    seconds = run_loop(stage, "ADD", training.parts, training.step, settings.distil_steps)
    student, network = training.student, training.network
    network.load_state_dict(training.ema.module.state_dict())
    state = {
        "settings": dataclasses.asdict(settings),
        "classes": list(data.classes) if settings.conditional else ["any"],
        "public": getattr(network, "description", None),
        "shape": list(data.train_images.shape[1:]),
        "network": network.state_dict(),
        "mean": teacher.encode.mean,
        "std": teacher.encode.std,
    }
    write(stage.folder / "student.pt", state)
    return student.eval().requires_grad_(False), seconds
