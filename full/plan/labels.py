"""The parts of full/train.py's iteration, by name: for the plan, which counts them without weights,
and for the benchmark, which times them."""

import torch

from full.train import Trainer

STUDENT, HEADS, STEP = "student", "heads, R1, losses", "optimisers, average"


class Labelled(Trainer):
    """A Trainer whose meter is told which part of an iteration is at work.

    The meter has `part`, which is set where a backward pass comes to another one, and
    inside(part, kind), a context. What belongs to no other part is HEADS.
    """

    meter = None

    def label_parts(self):
        """Called once, when all networks are in place."""
        add, denoiser = self.add, self.add.student.denoiser
        for backbone in {self.backbone, self.teacher_backbone}:
            self._label(backbone, "text", "text encoders")
        if self.text_features:
            self._label(self.text_features.network, "encode_text", "c_text")
        if self.image_features:
            self._label(self.image_features, "summary", "c_img")
        self._label(denoiser, "encode", "VAE encodes x_0")
        self._label(self.network, "forward", STUDENT)
        self._label(denoiser, "decode", "VAE decodes x_hat")
        self._label(add.discriminator.features, "forward", "F of x_hat", "F of x_0")
        self._label(add.discriminator.heads, "forward", HEADS)
        self._label(add.teacher, "encode", "VAE encodes for the teacher")
        self._label(add.teacher.network, "forward", "teacher")
        self._label(add.teacher, "decode", "VAE decodes the target")
        self._label(self.optimizer, "step", STEP, kind="optimiser")
        self._label(self.heads_optimizer, "step", STEP, kind="heads")
        self._label(self.ema, "update", STEP)
        backward = self.accelerator.backward

        def whole_backward(loss):  # the part that it ends in is not what comes after it
            with self.meter.inside(HEADS):
                backward(loss)

        self.accelerator.backward = whole_backward

    def _label(self, owner, name, part, without_gradient=None, kind="activations"):
        """Lets the meter see what owner.name does as `part`, and what its backward does as "part,
        backward"."""
        function = getattr(owner, name)

        def call(*args, **kwargs):
            with self.meter.inside(
                part if torch.is_grad_enabled() else without_gradient or part, kind
            ):
                out = function(*args, **kwargs)
            last = out[-1] if isinstance(out, list) else out  # whose gradient is complete first
            if torch.is_tensor(last) and last.requires_grad:
                backward = part if part == HEADS else f"{part}, backward"
                last.register_hook(lambda g: setattr(self.meter, "part", backward))
            return out

        setattr(owner, name, call)
