"""add.py, section 1: noise schedules and the forward process."""

import math

import pytest
import torch
from helpers import assert_refused, generator, sd_schedule
from hypothesis import given, settings, strategies

from add import NoiseSchedule


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


# --- schedules ------------------------------------------------------------------------------------


def test_from_betas_by_hand():
    """ᾱ = 0.9, 0.9 · 0.5, 0.9 · 0.5 · 0.8."""
    schedule = NoiseSchedule.from_betas(numbers(0.1, 0.5, 0.2))
    torch.testing.assert_close(schedule.alpha, numbers(0.9, 0.45, 0.36).sqrt())
    torch.testing.assert_close(schedule.sigma, numbers(0.1, 0.55, 0.64).sqrt())
    assert len(schedule) == 3


def test_stable_diffusion_numbers():
    """Those of the released models, to the digits known (float32 keeps seven)."""
    schedule = NoiseSchedule.scaled_linear()
    alpha = {249: 0.821847, 499: 0.526944, 749: 0.237957, 999: 0.06826491}
    for t, value in alpha.items():
        assert schedule.alpha[t].item() == pytest.approx(value, abs=6e-7)
    assert schedule.sigma[999].item() == pytest.approx(0.99766723, abs=1e-7)
    assert schedule.alpha[999].item() == pytest.approx(0.06826491, abs=1e-7)
    assert schedule.alpha[0].item() == pytest.approx(math.sqrt(1 - 0.00085), abs=1e-7)


def test_variance_is_preserved_and_noise_grows():
    schedule = NoiseSchedule.scaled_linear()
    torch.testing.assert_close(schedule.alpha**2 + schedule.sigma**2, torch.ones(1000))
    assert (schedule.alpha.diff() < 0).all() and (schedule.sigma.diff() > 0).all()
    assert len(NoiseSchedule.scaled_linear(T=7)) == 7


def test_betas_are_multiplied_in_float64():
    """Small β lose their product in float32; the schedule must not: 1000 times 1 - 1e-4 within
    float32's half unit."""
    schedule = NoiseSchedule.from_betas(torch.full((1000,), 1e-4))
    exact = math.sqrt((1 - torch.tensor(1e-4).double().item()) ** 1000)
    assert abs(schedule.alpha[-1].item() - exact) < 6e-8


def test_zero_terminal_snr_is_exact():
    """α_T = 0 and σ_T = 1 bit for bit, α_0 kept, and √ᾱ shifted and scaled linearly (Lin et al.,
    Alg. 1)."""
    old = NoiseSchedule.scaled_linear()
    new = old.zero_terminal_snr()
    assert new.alpha[-1].item() == 0.0 and new.sigma[-1].item() == 1.0
    torch.testing.assert_close(new.alpha[0], old.alpha[0], rtol=2e-7, atol=0)
    torch.testing.assert_close(new.alpha**2 + new.sigma**2, torch.ones(1000))
    a = old.alpha.double()
    exact = (a - a[-1]) * a[0] / (a[0] - a[-1])
    torch.testing.assert_close(new.alpha.double(), exact, rtol=1e-6, atol=1e-7)
    assert new.has_zero_terminal_snr and not old.has_zero_terminal_snr and len(new) == len(old)


def test_zero_terminal_snr_by_hand():
    """α = 0.9, 0.6, 0.3 becomes 0.9, 0.45, 0: minus 0.3, times 0.9 / 0.6."""
    schedule = NoiseSchedule(numbers(0.9, 0.6, 0.3) ** 2).zero_terminal_snr()
    torch.testing.assert_close(schedule.alpha, numbers(0.9, 0.45, 0.0))
    torch.testing.assert_close(schedule.sigma, numbers(0.19, 0.7975, 1.0).sqrt())


def test_a_schedule_is_no_part_of_a_checkpoint():
    """It is a setting: a checkpoint of another schedule must not overwrite it."""
    assert sd_schedule().state_dict() == {}


def test_a_schedule_may_stay_level_and_a_batch_may_be_empty():
    schedule = NoiseSchedule(numbers(0.5, 0.5, 0.25))
    alpha, sigma = schedule.coefficients(torch.arange(0))
    assert alpha.shape == sigma.shape == (0, 1, 1, 1)


# --- forward process ------------------------------------------------------------------------------


def test_diffuse_by_hand():
    """ᾱ = 0.64 and 0.36: x_t = 0.8 x_0 + 0.6 ε and 0.6 x_0 + 0.8 ε, each sample at its own t."""
    schedule = NoiseSchedule(numbers(0.64, 0.36))
    x_0, noise = numbers(1, 2).view(2, 1, 1, 1), numbers(10, -5).view(2, 1, 1, 1)
    for t, expected in (([0, 1], (6.8, -2.8)), ([1, 0], (8.6, -1.4))):
        x_t = schedule.diffuse(x_0, noise, torch.tensor(t))
        torch.testing.assert_close(x_t.flatten(), numbers(*expected))


def test_coefficients_broadcast_over_images():
    schedule = sd_schedule()
    alpha, sigma = schedule.coefficients(torch.tensor([3, 998]))
    assert alpha.shape == sigma.shape == (2, 1, 1, 1)
    assert alpha[1].item() == schedule.alpha[998].item()
    assert sigma[0].item() == schedule.sigma[3].item()


@pytest.mark.parametrize("t", [0, 249, 999])
def test_forward_process_statistics(t):
    """Mean α_t x_0 and standard deviation σ_t, each within five of its standard errors."""
    schedule, n = NoiseSchedule.scaled_linear(), 40_000
    x_0 = torch.tensor([0.7, -0.9]).view(1, 2, 1, 1).expand(n, -1, -1, -1)
    noise = torch.randn(x_0.shape, generator=generator(t))
    x_t = schedule.diffuse(x_0, noise, torch.full((n,), t))
    alpha, sigma = schedule.alpha[t].item(), schedule.sigma[t].item()
    for channel, value in enumerate((0.7, -0.9)):
        assert abs(x_t[:, channel].mean().item() - alpha * value) < 5 * sigma / math.sqrt(n)
        assert abs(x_t[:, channel].std().item() - sigma) < 5 * sigma / math.sqrt(2 * n)


# --- errors ---------------------------------------------------------------------------------------


def coefficients(*t, **kind):
    return lambda: sd_schedule().coefficients(torch.tensor(t, **kind))


def diffuse(x_0, noise, n):
    """x_0 and noise of these shapes, with n timesteps."""
    x_0, noise = (torch.zeros(shape, dtype=torch.float64) for shape in (x_0, noise))
    return lambda: sd_schedule().diffuse(x_0, noise, torch.arange(n))


ALLOWED = ["alphas_cumprod=", "(T,)", "fall monotonically", "[0, 1)"]
ERRORS = {  # what is done wrong → what the message must say
    "two axes": (lambda: NoiseSchedule(torch.full((3, 2), 0.5)), [*ALLOWED, "(3, 2)"]),
    "rising once": (lambda: NoiseSchedule(numbers(0.5, 0.25, 0.375)), [*ALLOWED, "0.25…0.5"]),
    "rising": (lambda: NoiseSchedule(numbers(0.25, 0.5)), [*ALLOWED, "0.25…0.5"]),
    "no noise": (lambda: NoiseSchedule(numbers(1.0, 0.5)), [*ALLOWED, "0.5…1.0"]),
    "above 1": (lambda: NoiseSchedule(numbers(1.5, 0.5)), [*ALLOWED, "0.5…1.5"]),
    "below 0": (lambda: NoiseSchedule(numbers(0.5, -0.25)), [*ALLOWED, "-0.25…0.5"]),
    "nan": (lambda: NoiseSchedule(numbers(0.5, math.nan)), [*ALLOWED, "nan"]),
    "float t": (coefficients(1.0), ["t is (1,), torch.float32", "integers"]),
    "t of two axes": (coefficients([1], [1]), ["t is (2, 1)", "(B,)"]),
    "t too large": (coefficients(5, 1000), ["t=5…1000", "0…999"]),
    "t negative": (coefficients(-1, 7), ["t=-1…7", "0…999"]),
    "a schedule in bfloat16": (
        lambda: sd_schedule().bfloat16().coefficients(torch.tensor([1])),
        ["the schedule torch.bfloat16", "float32"],
    ),
    "noise of another shape": (
        diffuse((2, 3, 4, 4), (2, 3, 4, 5), 2),
        ["x_0, noise, t are [(2, 3, 4, 4), (2, 3, 4, 5), (2,)]", "(B, C, H, W) twice"],
    ),
    "one t for two images": (
        diffuse((2, 3, 4, 4), (2, 3, 4, 4), 1),
        ["x_0, noise, t are [(2, 3, 4, 4), (2, 3, 4, 4), (1,)]", "then (B,)"],
    ),
    "images without channels": (
        diffuse((2, 4, 4), (2, 4, 4), 2),
        ["x_0, noise, t are [(2, 4, 4), (2, 4, 4), (2,)]", "(B, C, H, W) twice"],
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_schedule_errors_name_argument_value_and_what_is_allowed(case):
    assert_refused(*ERRORS[case])


# --- schedules that hypothesis thinks of ----------------------------------------------------------

BETAS = strategies.lists(strategies.floats(1e-6, 0.999), min_size=2, max_size=50)


@settings(max_examples=100, deadline=None)
@given(BETAS.map(lambda x: torch.tensor(x, dtype=torch.float64)))
def test_any_betas_preserve_variance_and_lose_signal(betas):
    schedule = NoiseSchedule.from_betas(betas)
    ones = torch.ones(len(betas), dtype=torch.float64)
    torch.testing.assert_close(schedule.alpha**2 + schedule.sigma**2, ones)
    assert (schedule.alpha.diff() <= 0).all()
    assert schedule.alpha[0] ** 2 == pytest.approx(1 - betas[0].item())
    if schedule.alpha[-1] < schedule.alpha[0]:
        rescaled = schedule.zero_terminal_snr()
        assert (
            rescaled.alpha[-1] == 0 and rescaled.sigma[-1] == 1 and rescaled.has_zero_terminal_snr
        )
        assert rescaled.alpha[0].item() == pytest.approx(schedule.alpha[0].item())
