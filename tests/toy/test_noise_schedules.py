"""toy/teacher.py: the linear and the cosine schedule."""

import math

import pytest
import torch

from toy.teacher import SCHEDULES, cosine_schedule, linear_schedule


def test_linear_schedule():
    """β runs evenly from 1e-4 to 0.02; ᾱ is its running product, here in Python's floats."""
    schedule, product = linear_schedule(), 1.0
    for i in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
        if i in (0, 1, 500, 999):
            assert schedule.alpha[i].item() == pytest.approx(math.sqrt(product), rel=1e-5)


def test_cosine_schedule():
    """ᾱ_t = f(t + 1) / f(0) wherever β is below its cap of 0.999, which only the last one
    reaches."""
    schedule = cosine_schedule()

    def f(u):
        return math.cos(math.pi / 2 * (u / 1000 + 0.008) / 1.008) ** 2

    for t in (0, 1, 400, 998):
        assert schedule.alpha[t].item() ** 2 == pytest.approx(f(t + 1) / f(0), rel=1e-4)
    assert schedule.alpha[999].item() ** 2 == pytest.approx(0.001 * f(999) / f(0), rel=1e-3)


def test_the_names_of_the_settings():
    made = {name: make().alpha for name, make in SCHEDULES.items()}
    assert list(made) == ["scaled_linear", "linear", "cosine"]
    assert torch.equal(made["linear"], linear_schedule().alpha)
    assert torch.equal(made["cosine"], cosine_schedule().alpha)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_each_schedule_preserves_variance_and_noise_grows(name):
    schedule = SCHEDULES[name]()
    torch.testing.assert_close(schedule.alpha**2 + schedule.sigma**2, torch.ones(1000))
    assert (schedule.alpha.diff() < 0).all() and (schedule.sigma.diff() > 0).all()
    assert len(SCHEDULES[name](T=7)) == 7


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_each_schedule_rescales_to_zero_terminal_snr_exactly(name):
    """α_T = 0 and σ_T = 1 bit for bit, α_0 kept, and √ᾱ shifted and scaled linearly (Lin et al.,
    Alg. 1)."""
    old = SCHEDULES[name]()
    new = old.zero_terminal_snr()
    assert new.alpha[-1].item() == 0.0 and new.sigma[-1].item() == 1.0
    torch.testing.assert_close(new.alpha[0], old.alpha[0], rtol=2e-7, atol=0)
    torch.testing.assert_close(new.alpha**2 + new.sigma**2, torch.ones(1000))
    a = old.alpha.double()
    exact = (a - a[-1]) * a[0] / (a[0] - a[-1])
    torch.testing.assert_close(new.alpha.double(), exact, rtol=1e-6, atol=1e-7)
