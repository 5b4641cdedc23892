"""DiffAugment (Zhao et al. 2020): differentiable augmentation of what a discriminator sees, real
and generated alike."""

import torch
from torch import nn


def _uniform(images, low, high, generator):
    draws = torch.empty(len(images), 1, 1, 1, device=images.device)
    return draws.uniform_(low, high, generator=generator)


def _integers(images, low, high, generator):
    """(B, 1) whole numbers, low and high among them."""
    shape, device = (len(images), 1), images.device
    return torch.randint(low, high + 1, shape, device=device, generator=generator)


def color(images, generator=None):
    """Brightness ± 0.5, saturation x 0…2, contrast x 0.5…1.5."""
    images = images + _uniform(images, -0.5, 0.5, generator)
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * _uniform(images, 0, 2, generator)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * _uniform(images, 0.5, 1.5, generator)


def translation(images, generator=None, ratio=0.125):
    """Shift by up to ratio of height and width; what comes in at the border is zero."""
    sources, inside = [], []  # of rows and columns, (B, H) and (B, W)
    for n in images.shape[2:]:
        most = int(ratio * n + 0.5)
        steps = torch.arange(n, device=images.device)
        source = steps + _integers(images, -most, most, generator)
        inside.append((source >= 0) & (source < n))
        sources.append(source.clamp(0, n - 1))
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    rows, columns = sources[0][:, :, None], sources[1][:, None, :]
    moved = images.permute(0, 2, 3, 1)[batch, rows, columns].permute(0, 3, 1, 2)
    return moved * (inside[0][:, None, :, None] & inside[1][:, None, None, :])


def cutout(images, generator=None, ratio=0.2):
    """A square of ratio of height and width becomes zero, anywhere, partly outside too; the ratio
    is StyleGAN-T's."""
    cut = []
    for n in images.shape[2:]:
        size = int(ratio * n + 0.5)
        first = _integers(images, 0, n - size % 2, generator) - size // 2
        place = torch.arange(n, device=images.device)
        cut.append((place >= first) & (place < first + size))
    return images * ~(cut[0][:, None, :, None] & cut[1][:, None, None, :])


AUGMENTATIONS = {"color": color, "translation": translation, "cutout": cutout}


class Augmented(nn.Module):
    """A feature network behind augmentations, one draw for each image from a generator.

    ValueError for an unknown name, and for features that read latents.
    """

    def __init__(self, features, names, generator=None):
        super().__init__()
        if unknown := [name for name in names if name not in AUGMENTATIONS]:
            known = ", ".join(AUGMENTATIONS)
            raise ValueError(f"augment={unknown[0]!r} is unknown; choose from {known}")
        if names and getattr(features, "space", "pixel") != "pixel":
            raise ValueError(f"augment={names} is for images; these features read latents")
        self.features, self.names, self._generator = features, names, generator

    def forward(self, images):
        """Token maps of images (B, C, H, W), with the gradient to the images."""
        for name in self.names:
            images = AUGMENTATIONS[name](images, self._generator)
        return self.features(images)
