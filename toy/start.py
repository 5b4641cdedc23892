"""Where the student starts: as a copy of the teacher, or as what the teacher's own pairs of noise and image, and the
data, make of it.

From pure noise the teacher's one-step x̂_0 is nearly the mean of its class, whatever the noise. A student that starts
there has to find every way of drawing a digit through a small discriminator, and finds few of them. The teacher's own
sampler says which noise becomes which image; a short regression on such pairs (Luhman & Luhman 2021) hands that to the
student, blurred, and ADD starts with all the variety there is. Below τ_n, where x_s shows what the image is, the student
goes on learning from the data. Not in the paper, whose teachers are stronger.
"""

import copy

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from add import Student, descend
from toy.data import to_float
from toy.loop import GeneratorState, run_loop, warm_up_then_decay
from toy.samplers import BATCH, balanced_labels, denoise, dpm_solver, noise_for


class Pairs:
    """Pairs of noise and the image that the teacher makes of it, in the space that is diffused, classes in turn; and, for
    the timesteps below τ_n, the data itself."""

    def __init__(self, teacher, data, settings, device):
        n = settings.pairs_number
        self.real, self.real_labels = data.train_images.to(device), data.train_labels.to(device)
        self.noise = noise_for(n, self.real.shape[1:], settings.seed + 10, device)  # (N, C, H, W)
        self.images = torch.zeros_like(self.noise)
        self.labels = balanced_labels(n, teacher.network.classes, device)
        self.teacher, self.steps, self.guidance = teacher, settings.pairs_steps, settings.pairs_guidance
        self.chunks = -(-n // BATCH)

    def draw(self, i):
        """Make the images of the i-th chunk; returns their deviation, for the log."""
        chunk = slice(i * BATCH, (i + 1) * BATCH)
        self.images[chunk] = denoise(self.teacher, self.noise[chunk], self.labels[chunk], self.steps, self.guidance, dpm_solver)
        return {"deviation": self.images[chunk].std()}

    def state_dict(self):
        """The teacher's images alone: the noise comes from the seed."""
        return {"images": self.images}

    def load_state_dict(self, state):
        """ValueError if they are not as many, or of another shape."""
        if state["images"].shape != self.images.shape:
            raise ValueError(f"images {tuple(state['images'].shape)} instead of {tuple(self.images.shape)}")
        self.images.copy_(state["images"])


def draw_pairs(folder, teacher, data, settings, device, key):
    """(Pairs, seconds); (None, 0) where the student starts as a copy of the teacher."""
    if settings.start == "teacher":
        return None, 0.0
    pairs = Pairs(teacher, data, settings, device)
    return pairs, run_loop(folder, "teacher's pairs", {"pairs": pairs}, pairs.draw, pairs.chunks, key, settings)


def pair_loss(student, pairs, n, generator):
    """‖x̂_θ(x_s, s) - x‖² of n samples, a mean over elements, (n,): at τ_n x is a pair's image, and its noise the input; below
    it x is a real image, with fresh noise. The estimate is not clipped here: a pixel that is black by mistake would have no
    gradient."""
    device = pairs.noise.device
    s = student.draw_timesteps(n, device, generator)
    i, j = (torch.randint(len(x), (n,), device=device, generator=generator) for x in (pairs.noise, pairs.real))
    real = student.denoiser.encode(to_float(pairs.real[j]))
    fresh = torch.randn(real.shape, device=device, generator=generator)
    at_end = student.is_terminal(s)
    y, at_end = torch.where(at_end, pairs.labels[i], pairs.real_labels[j]), at_end[:, None, None, None]
    x, noise = torch.where(at_end, pairs.images[i], real), torch.where(at_end, pairs.noise[i], fresh)
    x_hat, _ = student.denoiser(student.diffuse(x, noise, s), s, y, clip=False)
    return (x_hat - x).square().flatten(1).mean(1)


def make_student(folder, teacher, pairs, settings, device, key):
    """(Student, seconds): the teacher's copy, and what the pairs teach it, if there are any; it draws s as ADD wants it."""
    denoiser = copy.deepcopy(teacher).requires_grad_(True)
    for_add = Student(denoiser, settings.distil_timesteps, settings.distil_terminal_share or None).train()
    if pairs is None:
        return for_add, 0.0
    student = Student(denoiser, settings.distil_timesteps, settings.start_terminal_share).train()
    network, steps = student.denoiser.network, settings.start_steps
    ema = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(settings.distil_ema))
    optimizer = torch.optim.Adam(network.parameters(), lr=settings.start_lr, betas=(0.9, 0.99))
    lr = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: warm_up_then_decay(i, steps))
    generator = torch.Generator(device).manual_seed(settings.seed + 11)

    def step(i):
        loss = pair_loss(student, pairs, settings.distil_batch, generator).mean()
        descend(loss, optimizer, "student's start")
        lr.step()
        ema.update_parameters(network)
        return {"loss": loss.detach()}

    parts = {"network": network, "ema": ema, "optimizer": optimizer, "lr": lr, "generator": GeneratorState(generator)}
    seconds = run_loop(folder, "student's start", parts, step, steps, key, settings)
    network.load_state_dict(ema.module.state_dict())
    return for_add, seconds
