"""Distribution matching distillation with its GAN term (DMD2: Yin et al. 2024, arXiv 2405.14867;
the gradient is DMD's, arXiv 2311.18828, Eq. 7 and 8, without their factor α_t, as in the authors'
code).

Generated images are diffused, and two networks estimate x_0 from them: the teacher, which was
trained on real images, and a fake-score network, trained on generated ones. The generator
follows the difference. A logit head on the fake-score network's encoder tells diffused real images
from diffused generated ones.

The weights of the GAN are the paper's on ImageNet, and the teacher has no guidance, as there.
Departures: one generator is trained at ADD's four timesteps (the paper's one-step generator is
trained on pure noise alone, its multi-step one on inputs drawn by sampling, which did not help
here, toy/experiments.md). The fake-score network is updated twice, not 5 times, for each update of
the generator, which thus gets about twice as many in the same time. It sees t between LOW and HIGH
alone. GAN and matching share t and noise. Adam's β_1 is 0, not 0.9.
"""

import torch

from add import Denoiser, randn_like
from toy.rivals.training import (
    EncoderDiscriminator,
    Training,
    gan_discriminator_loss,
    gan_generator_loss,
)
from toy.teacher import training_target

FAKE_UPDATES = 2  # of the fake-score network, for each of the generator
GENERATOR_GAN, FAKE_GAN = 3e-3, 1e-2  # weights of the GAN term in either loss
LOW, HIGH = 0.02, 0.98  # of T: the timesteps at which distributions are matched


def matching_gradient(x_hat, real, fake):
    """(x̂_fake - x̂_real) / mean |x̂ - x̂_real|, the mean over each image; all (B, C, H, W)."""
    scale = (x_hat - real).abs().mean((1, 2, 3), keepdim=True)
    return (fake - real) / scale.clamp(min=1e-6)


class DMD2(Training):
    """See the module. The generator's inputs and its sampling are ADD's."""

    TITLE = "DMD2"
    LEARNING_RATES = (1e-4, 3e-4, 1e-3)
    BETA1 = 0.0

    def __init__(self, *arguments, **more):
        super().__init__(*arguments, **more)
        teacher = self.teacher
        self.critic = EncoderDiscriminator(teacher.network)
        self.fake = Denoiser(
            self.critic.network, self.schedule, teacher.prediction, clip=teacher.clip
        )
        optimizer = self.adam(self.critic.parameters(), self.steps)
        self.move_generator = self.descent("generator", self.optimizer, self.generator_loss)
        self.move_fake = self.descent("fake", optimizer, self.fake_loss)

    def generate(self, x_0, labels):
        """x̂_0 (B, C, H, W) from diffused images, or from pure noise at τ_n."""
        s = self.student.draw_timesteps(len(x_0), self.device, self.generator)
        x_s = self.student.diffuse(x_0, randn_like(x_0, self.generator), s)
        return self.student(x_s, s, labels)

    def draw_timesteps(self, n):
        """(n,) timesteps t between LOW and HIGH."""
        T = len(self.schedule)
        return int(LOW * T) + self.uniform(int(HIGH * T) - int(LOW * T), n)

    def generator_loss(self, images, labels):
        """(a scalar,): the GAN's loss, plus one whose gradient with respect to x̂_0 is the matching
        gradient over the number of elements."""
        x_hat = self.generate(self.denoiser.encode(images), labels)
        t = self.draw_timesteps(len(x_hat))
        x_t = self.schedule.diffuse(x_hat, randn_like(x_hat, self.generator), t)
        self.critic.requires_grad_(False)
        with torch.no_grad():
            real = self.teacher(x_t, t, labels)
            fake = self.fake(x_t, t, labels)
            moved = x_hat - matching_gradient(x_hat, real, fake)
        matching = (x_hat - moved).square().mean() / 2
        adversarial = gan_generator_loss(self.critic(x_t, t, labels))
        self.critic.requires_grad_(True)
        return (matching + GENERATOR_GAN * adversarial,)

    def fake_loss(self, images, labels):
        """(a scalar,): the loss of a diffusion model (the teacher's in its training) on generated
        images, plus the GAN's."""
        x_0 = self.denoiser.encode(images)
        with torch.no_grad():
            x_hat = self.generate(x_0, labels)
        t, noise = self.draw_timesteps(len(x_0)), randn_like(x_0, self.generator)
        x_t = self.schedule.diffuse(x_hat, noise, t)
        target = training_target(x_hat, noise, *self.schedule.coefficients(t), self.fake.prediction)
        output, middle = self.fake.network.with_middle(x_t, t, labels)
        denoising = (output - target).square().mean()
        real_t = self.schedule.diffuse(x_0, randn_like(x_0, self.generator), t)
        real, fake = self.critic(real_t, t, labels), self.critic.judge(middle)
        return (denoising + FAKE_GAN * gan_discriminator_loss(real, fake),)

    def step(self, i):
        """One iteration: the fake-score network's updates, then the generator's."""
        for _ in range(FAKE_UPDATES):
            other, _ = self.move_fake(*next(self.batches))
        log, _ = self.move_generator(*next(self.batches))
        self.after_step()
        return log | other
