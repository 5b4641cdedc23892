"""How the toy draws: the teacher by DDIM or DPM-Solver++, the student in a few steps, in batches,
from seeded noise."""

import torch

from add import ddim

BATCH = 100  # images drawn at once; on a CPU a larger batch is slower, an image


def balanced_labels(n, classes, device):
    """(n,) labels 0, 1, …, classes-1, 0, 1, …"""
    return torch.arange(n, device=device) % classes


def noise_for(n, shape, seed, device):
    """(n, *shape) unit noise from a seed; drawn on the CPU, so that every device gets the same."""
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed)).to(device)


def trailing_timesteps(T, steps):
    """50 steps of 1000 are 999, 979, …, 19."""
    return [T - 1 - i * T // steps for i in range(steps)]


def dpm_solver(denoiser, x_t, timesteps, cond, guidance=1.0, null_cond=None):
    """x̂_0 after DPM-Solver++(2M) steps (Lu et al. 2022, Alg. 2) from x_t at timesteps[0]; called
    as add.ddim is.

    DDIM's step, with x̂_0 extrapolated from this step and the one before, linearly in λ = log(α/σ):
    of second order. timesteps must fall strictly. At zero terminal SNR λ is -∞, and nothing is
    extrapolated from there.
    """
    schedule = denoiser.schedule

    def log_ratio(t):
        alpha, sigma = schedule.coefficients(t)
        return (alpha / sigma).log()

    before = None  # x̂_0 of the step before
    for i, t in enumerate(timesteps):
        x_0 = denoiser(x_t, t, cond, guidance, null_cond)
        if i + 1 == len(timesteps):
            return x_0
        extrapolated = x_0
        if i > 0:
            ahead = log_ratio(timesteps[i + 1]) - log_ratio(t)
            growth = ahead / (log_ratio(t) - log_ratio(timesteps[i - 1]))
            extrapolated = x_0 + growth / 2 * (x_0 - before)
        before, (alpha, sigma) = x_0, schedule.coefficients(t)
        x_t = schedule.diffuse(extrapolated, (x_t - alpha * extrapolated) / sigma, timesteps[i + 1])


@torch.no_grad()
def denoise(teacher, noise, labels, steps, guidance=1.0, sampler=ddim):
    """One batch of the teacher's images in the space that is diffused, (B, C, H, W), from unit
    noise; labels (B,)."""
    trailing = trailing_timesteps(len(teacher.schedule), steps)
    timesteps = [torch.full_like(labels, t) for t in trailing]
    null = torch.full_like(labels, teacher.network.classes)
    return sampler(teacher, noise, timesteps, labels, guidance, null)


def sample_teacher(teacher, noise, labels, steps, guidance=1.0, sampler=ddim):
    """Images (N, C, H, W) in the range of decode from unit noise; labels (N,)."""
    batches = zip(noise.split(BATCH), labels.split(BATCH), strict=True)
    images = [teacher.decode(denoise(teacher, z, y, steps, guidance, sampler)) for z, y in batches]
    return torch.cat(images)


def sample_in_batches(sample, noise, labels, steps, seed):
    """Images (N, C, H, W) from unit noise by sample(noise, labels, steps, generator=…); seed is of
    the fresh noise between steps."""
    generator = torch.Generator(noise.device).manual_seed(seed)
    batches = zip(noise.split(BATCH), labels.split(BATCH), strict=True)
    return torch.cat([sample(z, y, steps, generator=generator) for z, y in batches])


def sample_student(student, noise, labels, steps, seed):
    """Images (N, C, H, W) in the range of decode from unit noise; seed as in sample_in_batches."""
    return sample_in_batches(student.sample, noise, labels, steps, seed)
