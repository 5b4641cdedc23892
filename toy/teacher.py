"""Trains the teacher: a class-conditional diffusion model of pixels (Ho et al. 2020)."""

import math

import torch

from add import Denoiser, NoiseSchedule
from toy.data import Batches, to_float
from toy.graphs import recorded
from toy.loop import GeneratorState, backward, make_adam, make_ema, run_loop, update
from toy.networks import UNet


def linear_schedule(T=1000, beta_start=1e-4, beta_end=0.02):
    """β linear in t (Ho et al. 2020)."""
    return NoiseSchedule.from_betas(torch.linspace(beta_start, beta_end, T))


def cosine_schedule(T=1000, offset=0.008):
    """ᾱ_t = f(t + 1) / f(0), f(u) = cos²(π/2 (u/T + offset) / (1 + offset)): Nichol & Dhariwal
    2021."""
    u = torch.arange(T + 1, dtype=torch.float64)
    f = torch.cos(math.pi / 2 * (u / T + offset) / (1 + offset)) ** 2
    return NoiseSchedule.from_betas((1 - f[1:] / f[:-1]).clamp(max=0.999).float())


SCHEDULES = {
    "scaled_linear": NoiseSchedule.scaled_linear,
    "linear": linear_schedule,
    "cosine": cosine_schedule,
}


class Standardize:
    """Pixels in [-1, 1] → the space that is diffused, with mean 0 and deviation 1, as a latent
    model's VAE and scale do.

    Noise schedules are made for such data. Digits have mean -0.8: at α_T > 0 the pure noise that
    sampling starts from would look to the network like an image much too bright.
    """

    def __init__(self, mean, std):
        self.mean, self.std = mean, std

    @classmethod
    def of(cls, images):
        """From the training images, float (N, C, H, W)."""
        return cls(images.mean().item(), images.std().item())

    def __call__(self, images):
        return (images - self.mean) / self.std

    def inverse(self, z):
        """Back to pixels."""
        return z * self.std + self.mean

    def clip(self, z):
        """z with its pixels in [-1, 1]; what is infinite stays so, or nobody would notice."""
        return torch.where(z.isinf(), z, z.clamp(self(-1), self(1)))


def make_denoiser(channels, classes, settings, standardize):
    """An untrained class-conditional U-Net with the noise schedule of the settings."""
    schedule = SCHEDULES[settings.teacher_schedule]()
    if settings.teacher_zero_snr:
        schedule = schedule.zero_terminal_snr()
    network = UNet(
        channels,
        classes,
        settings.teacher_widths,
        settings.teacher_blocks,
        bf16=settings.precision == "bf16",
        dropout=settings.teacher_dropout,
    )
    space = (standardize, standardize.inverse, standardize.clip)
    return Denoiser(network, schedule, settings.teacher_prediction, *space)


def resized(denoiser, settings):
    """An untrained denoiser for the same images and classes, of the settings' size."""
    network = denoiser.network
    channels = network.stem.in_channels // network.patch**2
    return make_denoiser(channels, network.classes, settings, denoiser.encode)


def training_target(x_0, noise, alpha, sigma, prediction):
    """What the network should give: ε, v = α ε - σ x_0, or x_0."""
    return {"epsilon": noise, "v": alpha * noise - sigma * x_0, "x_0": x_0}[prediction]


def make_teacher(stage):
    """(frozen Denoiser, seconds): trained here, or a public one."""
    if stage.settings.conditional:
        return train_teacher(stage)
    from toy.public import public_teacher

    return public_teacher(stage), 0.0


def train_teacher(stage):
    """(Denoiser with the EMA weights, seconds)."""
    data, settings, device = stage.data, stage.settings, stage.device
    torch.manual_seed(settings.seed_of("teacher"))
    classes, steps = len(data.classes), settings.teacher_steps
    standardize = Standardize.of(to_float(data.train_images))
    denoiser = make_denoiser(data.train_images.shape[1], classes, settings, standardize).to(device)
    network, schedule = denoiser.network, denoiser.schedule
    ema = make_ema(network, settings.teacher_batch, settings.teacher_ema)
    optimizer, lr = make_adam(network.parameters(), settings.teacher_lr, 0.9, steps)
    images, labels = data.train_images.to(device), data.train_labels.to(device)
    flip, share = settings.flip == "true", settings.teacher_label_dropout
    batches = Batches(images, labels, settings.teacher_batch, settings.seed_of("teacher"), flip)
    generator = torch.Generator(device).manual_seed(settings.seed_of("teacher"))

    @recorded(device, generators=[generator])
    def gradient(images, labels):
        x_0 = denoiser.encode(images)
        t = torch.randint(len(schedule), (len(x_0),), device=device, generator=generator)
        noise = torch.randn(x_0.shape, device=device, generator=generator)
        dropped = torch.rand(len(x_0), device=device, generator=generator) < share
        output = network(schedule.diffuse(x_0, noise, t), t, labels.masked_fill(dropped, classes))
        target = training_target(x_0, noise, *schedule.coefficients(t), denoiser.prediction)
        loss = (output - target).square().mean()
        return loss, backward(loss, optimizer, clip=1.0)

    def step(i):
        loss, norm = gradient(*next(batches))
        update(optimizer, "teacher", loss, norm)
        lr.step()
        ema.update_parameters(network)
        return {"loss": loss.detach(), "gradient": norm}

    parts = {
        "network": network,
        "ema": ema,
        "optimizer": optimizer,
        "lr": lr,
        "batches": batches,
        "generator": GeneratorState(generator),
    }
    seconds = run_loop(stage, "teacher", parts, step, steps)
    network.load_state_dict(ema.module.state_dict())
    return denoiser.eval().requires_grad_(False), seconds
