"""What the rivals share: a copy of the teacher in training, and a discriminator on its encoder.

A rival is a subclass of Training. It says what one step is (step) and how its images are drawn
(sample).

All have the toy's standardised pixels. All clip their estimates of x_0, as the teacher and ADD's
student do; UFOGen's authors do not in training. Without clipping in training one step of
consistency distillation had ten times the distance (one trial of 960 steps).
"""

import copy

import torch
from torch import nn
from torch.nn import functional

from toy.data import Batches
from toy.distil import make_student
from toy.graphs import recorded
from toy.loop import backward, make_adam, make_ema, update


class Training:
    """The student, a trainable copy of the teacher, with what moves it: Adam, ADD's schedule of the
    learning rate, and a moving average with ADD's share of the training as its memory.

    stage has the data, settings and device; guidance is the teacher's, a number.
    """

    TITLE = ""  # in the table
    LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3)  # of which compare.py finds the best
    STEPS = (1, 2, 4)  # at which the method is scored
    BETA1 = 0.9  # of Adam (β_2 is 0.99, as ADD's)
    PHASES = 1  # of equal numbers of steps; the steps of one phase take equal time
    PAIRS = False  # whether it learns from the teacher's samples (pairs.py)

    def __init__(self, stage, teacher, lr, steps, guidance=1.0):
        data, settings, device = stage.data, stage.settings, stage.device
        seed = settings.seed_of("distil")
        torch.manual_seed(seed)
        self.settings, self.device, self.base_lr, self.steps = settings, device, lr, steps
        self.teacher, self.guidance, self.schedule = teacher, guidance, teacher.schedule
        self.student = make_student(teacher, settings).to(device)
        self.denoiser = self.student.denoiser
        self.network = self.denoiser.network
        images, labels = data.train_images.to(device), data.train_labels.to(device)
        flip = settings.flip == "true"
        self.batches = Batches(images, labels, settings.distil_batch, seed, flip)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.start(steps)

    def start(self, steps):
        """Begin to train the network for that many steps: a fresh optimiser and average."""
        settings, self.lr = self.settings, []
        half_life = max(1, settings.distil_ema * steps / settings.distil_steps)
        self.ema = make_ema(self.network, settings.distil_batch, half_life)
        self.optimizer = self.adam(self.network.parameters(), steps)

    def adam(self, parameters, steps):
        """Adam at this training's learning rate, which after_step changes."""
        optimizer, schedule = make_adam(parameters, self.base_lr, self.BETA1, steps)
        self.lr.append(schedule)
        return optimizer

    def descent(self, name, optimizer, loss_of):
        """A function of tensors that moves the optimiser's weights down loss_of's first result. It
        returns (log, the other results). The gradient is recorded on a GPU, as ADD's is."""

        @recorded(self.device, [self.generator])
        def gradient(*tensors):
            loss, *others = loss_of(*tensors)
            return loss.detach(), backward(loss, optimizer), others  # no graph is kept

        def descend(*tensors):
            loss, norm, others = gradient(*tensors)
            update(optimizer, name, loss, norm)
            return {f"{name}_loss": loss, f"gradient_{name}": norm}, others

        return descend

    def after_step(self):
        """Move the average and the learning rates."""
        self.ema.update_parameters(self.network)
        for schedule in self.lr:
            schedule.step()

    def finish(self):
        """Give the network its average, after the last step."""
        self.network.load_state_dict(self.ema.module.state_dict())
        self.student.eval().requires_grad_(False)

    def sample(self, noise, labels, steps, generator=None):
        """Images (B, C, H, W) in pixels, from unit noise, as add.Student draws them."""
        return self.student.sample(noise, labels, steps, generator=generator)

    def null(self, labels):
        """The empty condition for each label, (B,)."""
        return torch.full_like(labels, self.teacher.network.classes)

    def of_teacher(self, x_t, t, labels):
        """(x̂_0, ε̂) of the teacher at its guidance, without gradient."""
        with torch.no_grad():
            return self.teacher.predict(x_t, t, labels, self.guidance, self.null(labels))

    def uniform(self, high, n):
        """(n,) integers below high."""
        return torch.randint(high, (n,), device=self.device, generator=self.generator)


class EncoderDiscriminator(nn.Module):
    """A logit (B,) for each diffused image (B, C, H, W) at t (B,) of the class labels (B,).

    It is a copy of the teacher's whole U-Net, with a small head on its encoder's last map. DMD2's
    fake-score network is that U-Net; UFOGen leaves the decoder unused.
    """

    def __init__(self, network):
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(True)
        width = network.map_channels[-1]
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width)
        self.last = nn.Linear(width, 1)
        self.to(next(network.parameters()).device)

    def forward(self, x_t, t, labels):
        return self.judge(self.network.encode(x_t, t, labels)[-1])

    def judge(self, h):
        """The logits from the encoder's last map (B, C, H', W')."""
        return self.last(functional.silu(self.norm(self.conv(h))).mean((2, 3)))[:, 0]


def gan_generator_loss(fake_logits):
    """-log D(fake), the non-saturating loss (Goodfellow et al. 2014), a scalar."""
    return functional.softplus(-fake_logits).mean()


def gan_discriminator_loss(real_logits, fake_logits):
    """-log D(real) - log(1 - D(fake)), a scalar."""
    return functional.softplus(-real_logits).mean() + functional.softplus(fake_logits).mean()
