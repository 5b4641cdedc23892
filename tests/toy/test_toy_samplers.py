"""toy/samplers.py: DDIM's timesteps, DPM-Solver++, and what the samplers hand to the networks."""

import torch
from torch import nn

from add import Denoiser, NoiseSchedule, Student, ddim
from toy.samplers import dpm_solver, sample_student, sample_teacher, trailing_timesteps
from toy.teacher import cosine_schedule


def test_teacher_timesteps_trail():
    assert trailing_timesteps(1000, 4) == [999, 749, 499, 249]
    assert trailing_timesteps(1000, 50)[-1] == 19


def test_dpm_solvers_third_step_as_the_paper_writes_it():
    """Lu et al. 2022, Alg. 2: D = (1 + 1/2r) x̂_0 - 1/2r x̂_0', x = σ'/σ x - α' (exp(-h) - 1) D,
    r = h'/h."""
    schedule = NoiseSchedule.scaled_linear().double()

    class Odd(nn.Module):
        def forward(self, x_t, t, cond):
            return (x_t * t[:, None, None, None] / 500).sin()

    denoiser, z = Denoiser(Odd(), schedule, "x_0"), torch.randn(1, 1, 2, 2, dtype=torch.float64)
    steps = [torch.tensor([t]) for t in (950, 600, 40)]
    alpha, sigma = schedule.alpha[[950, 600, 40]], schedule.sigma[[950, 600, 40]]
    h = (alpha / sigma).log().diff()
    x_0 = denoiser(z, steps[0], None)
    x = sigma[1] / sigma[0] * z - alpha[1] * (torch.exp(-h[0]) - 1) * x_0
    r, later = h[0] / h[1], denoiser(x, steps[1], None)
    d = (1 + 1 / (2 * r)) * later - 1 / (2 * r) * x_0
    x = sigma[2] / sigma[1] * x - alpha[2] * (torch.exp(-h[1]) - 1) * d
    torch.testing.assert_close(dpm_solver(denoiser, z, steps, None), denoiser(x, steps[2], None))


def test_dpm_solver_is_ddim_where_there_is_nothing_to_extrapolate_from():
    """One step, two, and the second of three after pure noise, where λ = -∞."""

    class Half(nn.Module):
        def forward(self, x_t, t, cond):
            return x_t * (1 - t / 1000)[:, None, None, None]

    z = torch.randn(2, 1, 2, 2)
    schedules = (cosine_schedule(), cosine_schedule().zero_terminal_snr())
    plain, zero = (Denoiser(Half(), schedule, "x_0") for schedule in schedules)
    for denoiser, steps, same in (
        (plain, [700], True),
        (plain, [700, 90], True),
        (zero, [999, 500, 20], True),
        (zero, [998, 500, 20], False),
    ):
        steps = [torch.full((2,), t) for t in steps]
        found, plain_steps = (sampler(denoiser, z, steps, None) for sampler in (dpm_solver, ddim))
        assert torch.allclose(found, plain_steps, atol=1e-6) is same


def test_samplers_ask_for_each_class_and_repeat_under_a_seed():
    """With a network that paints its label, every image must get its own, in order."""

    class Painter(nn.Module):
        classes = 9

        def forward(self, x, t, label):
            return (label.float() / 10)[:, None, None, None].expand_as(x)

    denoiser = Denoiser(Painter(), NoiseSchedule.scaled_linear(), "x_0")
    labels, noise = torch.arange(600) % 9, torch.randn(600, 1, 2, 2)
    expected = (labels / 10)[:, None, None, None].expand_as(noise)
    torch.testing.assert_close(sample_teacher(denoiser, noise, labels, 3), expected)
    torch.testing.assert_close(sample_teacher(denoiser, noise, labels, 1, 2.0), 2 * expected - 0.9)
    found = sample_student(Student(denoiser), noise, labels, 4, seed=0)
    torch.testing.assert_close(found, expected)
