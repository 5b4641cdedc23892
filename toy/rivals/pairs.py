"""Pairs of noise and the teacher's image from it, which two rivals learn from.

Drawing them is part of the training: it takes half of the training time.
"""

import time
from dataclasses import dataclass

import torch

from toy.rivals.training import Training
from toy.samplers import BATCH, denoise

SHARE = 0.5  # of the training time
DDIM_STEPS = 25  # of a sample


@dataclass(frozen=True)
class Pairs:
    """N pairs."""

    noise: torch.Tensor  # z (N, C, H, W)
    images: torch.Tensor  # x (N, C, H, W) in the space that is diffused
    labels: torch.Tensor  # (N,)


def draw_pairs(stage, teacher, guidance, seconds, clock=time.perf_counter):
    """Pairs, drawn in batches until that many seconds are over, one batch at the least."""
    device, classes = stage.device, len(stage.data.classes)
    generator = torch.Generator(device).manual_seed(stage.settings.seed_of("pairs"))
    shape, drawn, began = stage.data.train_images.shape[1:], [], clock()
    while not drawn or clock() - began < seconds:
        noise = torch.randn(BATCH, *shape, device=device, generator=generator)
        labels = torch.randint(classes, (BATCH,), device=device, generator=generator)
        images = denoise(teacher, noise, labels, DDIM_STEPS, guidance)
        if device.type != "cpu":
            images.sum().item()  # the clock waits for a GPU
        drawn.append((noise, images, labels))
    return Pairs(*(torch.cat(parts) for parts in zip(*drawn, strict=True)))


class OnPairs(Training):
    """A training on pairs instead of data; loss(noise, images, labels) is the rival's."""

    PAIRS = True

    def __init__(self, *arguments, pairs, **more):
        super().__init__(*arguments, **more)
        self.pairs = pairs
        self.descend = self.descent("student", self.optimizer, self.drawn_loss)

    def drawn_loss(self):
        """The loss of a batch of pairs, drawn with replacement."""
        i = self.uniform(len(self.pairs.noise), self.settings.distil_batch)
        return (self.loss(self.pairs.noise[i], self.pairs.images[i], self.pairs.labels[i]),)

    def step(self, i):
        """One iteration."""
        log, _ = self.descend()
        self.after_step()
        return log
