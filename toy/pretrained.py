"""Feature networks F that others have trained, fetched once by torch.hub: DINOv2 and EfficientNet.

They see images of any size, grey or coloured, enlarged and normalised by ImageNet's statistics.
"""

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional

from common.errors import brief
from common.features import readout
from common.images import resize


class Pretrained(nn.Module):
    """Holds what load() gives as `network`. ValueError where it cannot be had."""

    def __init__(self, name, load):
        super().__init__()
        try:
            self.network = load()
        except Exception as error:  # whatever a missing network, cache or certificate raises
            raise ValueError(
                f"--features {name}: torch.hub cannot load it ({brief(error)}); it needs internet "
                "access once, or a filled torch.hub cache; offline, use --features convolutional"
            ) from error
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None])

    def prepare(self, images, size):
        """(B, 3, size, size), normalised."""
        images = resize(((images + 1) / 2).expand(-1, 3, -1, -1), size, antialias=False)
        return (images - self.mean) / self.std


class DinoV2(Pretrained):
    """DINOv2 ViT-S/14 at 112 x 112: (B, 64, 384) tokens after the embedding and blocks 2, 5, 8, 11,
    the paper's F at a smaller size."""

    width, channels, size, blocks = 384, [384] * 5, 112, (2, 5, 8, 11)

    def __init__(self):
        repository = "facebookresearch/dinov2"
        super().__init__(
            "dinov2", lambda: torch.hub.load(repository, "dinov2_vits14", verbose=False)
        )

    def _states(self, images):
        x = self.network.prepare_tokens_with_masks(self.prepare(images, self.size))
        states = [x]
        for i, block in enumerate(self.network.blocks):
            x = block(x)
            if i in self.blocks:
                states.append(x)
        return states

    def forward(self, images):
        return [readout(x) for x in self._states(images)]

    def summary(self, images):
        """The normalised class token (B, 384)."""
        return self.network.norm(self._states(images)[-1])[:, 0]


class EfficientNet(Pretrained):
    """torchvision's EfficientNet-B0, a classifier of ImageNet, at 128 x 128, with the maps of four
    resolutions that Projected GANs use (Sauer et al. 2021). The finest is folded 2×2 into channels:
    (B, 256, 96), (B, 256, 40), (B, 64, 112) and (B, 16, 320) tokens."""

    width, channels, size, stages = 320, [96, 40, 112, 320], 128, (2, 3, 5, 7)

    def __init__(self):
        from torchvision import models

        super().__init__("efficientnet", lambda: models.efficientnet_b0(weights="IMAGENET1K_V1"))

    def _maps(self, images):
        x, maps = self.prepare(images, self.size), []
        for i, stage in enumerate(self.network.features[: self.stages[-1] + 1]):
            x = stage(x)
            if i in self.stages:
                maps.append(x)
        return maps

    def forward(self, images):
        finest, *others = self._maps(images)
        maps = [functional.pixel_unshuffle(finest, 2), *others]
        return [rearrange(x, "b c h w -> b (h w) c") for x in maps]

    def summary(self, images):
        """The last map, averaged over positions (B, 320)."""
        return self._maps(images)[-1].mean((2, 3))
