"""Grids for the eye: validation prompts in 1, 2 and 4 steps, and what the distillation loss asks
for."""

from pathlib import Path

import torch
from PIL import Image
from torchvision.utils import make_grid

PROMPTS = (
    "a photo of a lighthouse on a cliff in a storm, long exposure",
    "a bowl of ramen on a wooden table, top view",
    "an oil painting of a fox reading a newspaper",
    "portrait of an old fisherman, detailed skin, soft light",
)


def read_prompts(path):
    """The lines of a file that are not empty, or prompts of our own. ValueError if the file has
    none."""
    if not path:
        return list(PROMPTS)
    try:
        lines = [line.strip() for line in Path(path).read_text("utf-8").splitlines()]
    except OSError as error:
        raise ValueError(f"--prompts {path}: cannot be read ({error.strerror})") from error
    if not any(lines):
        raise ValueError(f"--prompts {path}: has no line with a prompt")
    return [line for line in lines if line]


def to_array(images, columns):
    """Images (B, 3, H, W) in [-1, 1] as one (H', W', 3) uint8 array."""
    grid = make_grid(images.float().cpu().clamp(-1, 1), nrow=columns, padding=4)
    return ((grid + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()


def validation(student, backbone, settings):
    """{"steps_k": grid}: every prompt from the same noise in k = 1, 2, 4 steps (as many as
    T_student allows)."""
    prompts, size, n = read_prompts(settings.prompts), settings.resolution, settings.batch
    device, counts = backbone.device, [k for k in (1, 2, 4) if k <= len(student.timesteps)]
    shape = (backbone.pipe.unet.config.in_channels, size // 8, size // 8)
    images = {k: [] for k in counts}
    for i in range(0, len(prompts), n):  # a batch that can be trained can be sampled
        some = prompts[i : i + n]
        cond = backbone.with_sizes(backbone.text(some), size)
        for k in counts:
            generator = torch.Generator(device).manual_seed(settings.seed + i)
            noise = torch.randn((len(some), *shape), device=device, generator=generator)
            images[k].append(student.sample(noise, cond, k, generator=generator).float().cpu())
    return {f"steps_{k}": to_array(torch.cat(x), min(len(prompts), 8)) for k, x in images.items()}


@torch.no_grad()
def targets(batch, half, add, settings, columns=8):
    """x_0, the student's x̂_θ and the teacher's x̂_ψ of a batch, a row each."""
    target = half.target if settings.space == "pixel" else add.teacher.decode(half.target[:columns])
    pixels = half.pixels
    if pixels is None:
        pixels = add.student.denoiser.decode(half.x_hat[:columns])
    rows = [x[:columns].float().cpu() for x in (batch.x_0, pixels, target)]
    return to_array(torch.cat(rows), len(rows[0]))


def write(grids, folder, step):
    """folder/NAME_STEP.png for every grid."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in grids.items():
        Image.fromarray(array).save(folder / f"{name}_{step:07d}.png")
