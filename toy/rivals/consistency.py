"""Consistency distillation (Song et al. 2023, arXiv 2303.01469, Alg. 2; with guidance it is latent
consistency distillation, Luo et al. 2023, here without their condition on the guidance): all points
of a path of the teacher get one estimate of its end.

At each timestep the student should agree with its own moving average, evaluated after one more DDIM
step of the teacher. At the smallest timestep the target is the teacher's x̂_0; the papers instead
have a network that is the identity there.
"""

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from add import Denoiser, Student, append_dims, distance, randn_like
from toy.rivals.training import Training
from toy.samplers import trailing_timesteps

TIMESTEPS = 20  # evenly spaced; the last is 999. With 40 one step was worse in a short training
TARGET_DECAY = 0.95  # of the average that gives targets; the one that is scored is slower


class Consistency(Training):
    """See the module. Sampling with fresh noise (their Alg. 1) is add.Student's."""

    TITLE = "consistency distillation"

    def __init__(self, *arguments, **more):
        super().__init__(*arguments, **more)
        grid = sorted(trailing_timesteps(len(self.schedule), TIMESTEPS))
        self.student = Student(self.denoiser, grid).to(self.device)
        average = get_ema_multi_avg_fn(TARGET_DECAY)
        self.average = AveragedModel(self.network, multi_avg_fn=average)
        self.target_denoiser = Denoiser(
            self.average.module, self.schedule, self.teacher.prediction, clip=self.teacher.clip
        )
        self.descend = self.descent("student", self.optimizer, self.loss)

    def target(self, x_s, n, labels):
        """The average's x̂_0 (B, C, H, W) one DDIM step of the teacher from x_s, which is at
        timestep n (B,) of the grid, counted from 0; the teacher's x̂_0 where n = 0."""
        tau = self.student.tau
        x_0, epsilon = self.of_teacher(x_s, tau[n], labels)
        s = tau[(n - 1).clamp(min=0)]
        with torch.no_grad():
            x_hat = self.target_denoiser(self.schedule.diffuse(x_0, epsilon, s), s, labels)
        return torch.where(append_dims(n == 0), x_0, x_hat)

    def loss(self, images, labels):
        """‖x̂_θ(x_s, s) - target‖², (a scalar,)."""
        x_0 = self.denoiser.encode(images)
        n = self.uniform(TIMESTEPS, len(x_0))
        s = self.student.tau[n]
        x_s = self.student.diffuse(x_0, randn_like(x_0, self.generator), s)
        return (distance(self.student(x_s, s, labels), self.target(x_s, n, labels)).mean(),)

    def step(self, i):
        """One iteration."""
        log, _ = self.descend(*next(self.batches))
        self.average.update_parameters(self.network)
        self.after_step()
        return log
