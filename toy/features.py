"""The discriminator's feature network F: a plain ViT trained on the run's own data, or the real DINOv2."""

import torch
import torch.nn.functional as F
from torch import nn

from add import augment_noise, descend, readout
from toy.data import Batches
from toy.loop import GeneratorState, run_loop
from toy.networks import ViT

NOISE = 0.6  # most that an F which denoises is shown


def make_features(folder, data, settings, device, key):
    """(F, seconds): maps images to token maps; has width, levels (how many maps) and summary(images) → (B, width)."""
    if settings.features == "dinov2":
        return DinoV2().to(device).requires_grad_(False).eval(), 0.0
    return train_vit(folder, data, settings, device, key)


def patches_of(images, patch):
    """(B, N, C patch²): the pixels that each of a ViT's tokens stands for, in the tokens' order."""
    return F.unfold(images, patch, stride=patch).mT


def train_vit(folder, data, settings, device, key):
    """(ViT, seconds). Its class token learns to name the class ("classify"), or to hold the whole image, from which a
    small decoder rebuilds it, and the class besides ("summarize"); the same of noisy images, each patch token giving
    its clean patch ("denoise"): then no faint pattern moves its features; or it stays as it was initialised ("none").
    """
    torch.manual_seed(settings.seed + 2)
    channels, size = data.train_images.shape[1], data.train_images.shape[-1]
    vit = ViT(channels, size, settings.features_patch, settings.features_width, settings.features_depth)
    classify = nn.Linear(vit.width, len(data.classes))
    rebuild = nn.Sequential(nn.Linear(vit.width, 256), nn.GELU(), nn.Linear(256, channels * size**2))
    patch = nn.Linear(vit.width, channels * vit.patch**2)
    networks = nn.ModuleList([vit, classify, rebuild, patch]).to(device)
    optimizer = torch.optim.AdamW(networks.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=settings.features_steps)
    batches = Batches(data.train_images, data.train_labels, 128, settings.seed + 2)
    generator = torch.Generator(device).manual_seed(settings.seed + 2)
    objective = settings.features_objective

    def step(i):
        images, labels = (x.to(device) for x in next(batches))
        tokens = vit.states(augment_noise(images, generator, NOISE) if objective == "denoise" else images)[-1]
        summary = tokens[:, 0]
        log = {"class": F.cross_entropy(classify(summary), labels)}
        loss = log["class"]
        if objective in ("summarize", "denoise"):
            log["rebuild"] = F.mse_loss(rebuild(summary), images.flatten(1))
            loss = 0.1 * loss + 4 * log["rebuild"]
        if objective == "denoise":
            log["patch"] = F.mse_loss(patch(tokens[:, 1:]), patches_of(images, vit.patch))
            loss = loss + 4 * log["patch"]
        descend(loss, optimizer, "features F")
        schedule.step()
        return {name: loss.detach() for name, loss in log.items()}

    parts = {
        "networks": networks, "optimizer": optimizer, "schedule": schedule, "batches": batches,
        "generator": GeneratorState(generator),
    }  # fmt: skip
    steps = 0 if objective == "none" else settings.features_steps
    seconds = run_loop(folder, "features F", parts, step, steps, key, settings)
    return vit.eval().requires_grad_(False), seconds


class DinoV2(nn.Module):
    """DINOv2 ViT-S/14 from torch.hub at 112 x 112: (B, 64, 384) tokens after the embedding and blocks 2, 5, 8, 11."""

    width, levels, size, blocks = 384, 5, 112, (2, 5, 8, 11)

    def __init__(self):
        super().__init__()
        try:
            self.network = torch.hub.load("facebookresearch/dinov2", "dinov2_vits14", verbose=False)
        except Exception as error:  # whatever a missing network, cache or certificate raises
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"--features dinov2: torch.hub cannot load it ({reason}); it needs the network once, or a filled "
                "torch.hub cache; use --features trained without one"
            ) from error
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None])

    def _states(self, images):
        images = ((images + 1) / 2).expand(-1, 3, -1, -1)
        images = F.interpolate(images, (self.size, self.size), mode="bicubic", align_corners=False)
        x = self.network.prepare_tokens_with_masks((images - self.mean) / self.std)
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
