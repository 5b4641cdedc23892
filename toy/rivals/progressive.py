"""Progressive distillation (Salimans & Ho 2022, arXiv 2202.00512): a student learns to do in one
step what its teacher does in two; then it is the teacher of the next.

Phases of 8, 4, 2 and 1 steps share the iterations equally. The first teacher is guided, and its
student learns the guided step (Meng et al. 2023, without their condition on the guidance).
"""

import copy

import torch

from add import Student, append_dims, randn_like
from toy.rivals.training import Training
from toy.samplers import denoise, trailing_timesteps

PHASE_STEPS = (8, 4, 2, 1)  # of the student of each phase


def rewound(z_t, z_after, alpha, sigma, alpha_after, sigma_after):
    """x̃, the x_0 for which one DDIM step goes from z_t to z_after (Alg. 2); all (B, C, H, W) or
    (B, 1, 1, 1)."""
    ratio = sigma_after / sigma
    return (z_after - ratio * z_t) / (alpha_after - ratio * alpha)


def weight(alpha, sigma):
    """max(SNR, 1): "truncated SNR" (§4)."""
    return (alpha / sigma).square().clamp(min=1)


class Progressive(Training):
    """See the module."""

    TITLE = "progressive distillation"
    PHASES = len(PHASE_STEPS)

    def __init__(self, *arguments, **more):
        self.phase, self.kept = -1, {}  # kept: {steps: Denoiser} of finished phases
        super().__init__(*arguments, **more)
        if self.steps < self.PHASES:
            raise ValueError(f"steps={self.steps}: {self.PHASES} phases need one each; train more")

    def begin_phase(self):
        """End the phase before, whose student is the teacher from now on, and begin the next."""
        if self.phase >= 0:
            self.end_phase()
        self.phase += 1
        self.phase_steps = PHASE_STEPS[self.phase]
        # Of its teacher, which takes twice as many: the student's are every other one.
        grid = trailing_timesteps(len(self.schedule), 2 * self.phase_steps)
        self.grid = torch.tensor(grid, device=self.device)
        self.student = Student(self.denoiser, sorted(grid[::2])).to(self.device)
        begin, end = (-(-(self.phase + j) * self.steps // self.PHASES) for j in (0, 1))
        self.start(end - begin)
        self.descend = self.descent("student", self.optimizer, self.loss)

    def end_phase(self):
        """Keep the phase's student: the average of its weights."""
        self.network.load_state_dict(self.ema.module.state_dict())
        student = copy.deepcopy(self.denoiser).eval().requires_grad_(False)
        self.kept[self.phase_steps] = self.teacher = student
        self.guidance = 1.0  # the student has learned the guided step

    def target(self, z_t, i, labels):
        """(x̃, α_t, σ_t) for z_t (B, C, H, W) at the student's step i (B,): two DDIM steps of the
        teacher, the last of all to the clean image, where α = 1 and σ = 0."""
        last = len(self.grid) - 1
        t, middle, after = (self.grid[(2 * i + j).clamp(max=last)] for j in range(3))
        x_0, epsilon = self.of_teacher(z_t, t, labels)
        z_middle = self.schedule.diffuse(x_0, epsilon, middle)
        x_0, epsilon = self.of_teacher(z_middle, middle, labels)
        clean = append_dims(2 * i + 2 > last)
        alpha_after, sigma_after = self.schedule.coefficients(after)
        alpha_after = alpha_after.masked_fill(clean, 1)
        sigma_after = sigma_after.masked_fill(clean, 0)
        z_after = alpha_after * x_0 + sigma_after * epsilon
        alpha, sigma = self.schedule.coefficients(t)
        return rewound(z_t, z_after, alpha, sigma, alpha_after, sigma_after), alpha, sigma

    def loss(self, images, labels):
        """max(SNR, 1) ‖x̃ - x̂_0‖², (a scalar,). Steps begin at diffused images, the first at pure
        noise, as in sampling."""
        x_0 = self.denoiser.encode(images)
        i = self.uniform(self.phase_steps, len(x_0))
        z_t = self.student.diffuse(x_0, randn_like(x_0, self.generator), self.grid[2 * i])
        target, alpha, sigma = self.target(z_t, i, labels)
        x_hat = self.student(z_t, self.grid[2 * i], labels)
        return ((weight(alpha, sigma) * (x_hat - target).square()).mean(),)

    def step(self, i):
        """One iteration, in the phase that i falls in."""
        if i * self.PHASES // self.steps > self.phase:
            self.begin_phase()
        log, _ = self.descend(*next(self.batches))
        self.after_step()
        return log

    def finish(self):
        self.end_phase()

    def sample(self, noise, labels, steps, generator=None):
        """Images by DDIM with the student of that many steps."""
        student = self.kept[steps]
        return student.decode(denoise(student, noise, labels, steps))
