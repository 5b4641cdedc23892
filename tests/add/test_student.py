"""add.py, section 3: the student's timesteps, its input and its sampler."""

import math

import pytest
import torch
from helpers import TinyNet, assert_refused, generator, sd_schedule

from add import Denoiser, Student


def images(seed=0):
    return torch.randn(4, 3, 4, 4, dtype=torch.float64, generator=generator(seed))


def conditions():
    return torch.randn(4, 3, dtype=torch.float64, generator=generator(9))


def student(timesteps=(249, 499, 749, 999), prediction="v", **codec):
    return Student(Denoiser(TinyNet().double(), sd_schedule(), prediction, **codec), timesteps)


# --- what it is trained at ------------------------------------------------------------------------


def test_timesteps_are_drawn_uniformly_from_T_student():
    """Four values, each a quarter of 40,000 within five standard errors (87 each)."""
    s = student().draw_timesteps(40_000, generator=generator())
    values, counts = s.unique(return_counts=True)
    assert values.tolist() == [249, 499, 749, 999]
    assert (counts - 10_000).abs().max() < 5 * math.sqrt(40_000 * 0.25 * 0.75)
    assert torch.equal(s, student().draw_timesteps(40_000, generator=generator()))


@pytest.mark.parametrize("timesteps", [(249, 499, 749, 999), (100, 499)])
def test_input_is_pure_noise_at_tau_n_and_diffused_below(timesteps):
    """At τ_n, here also one that is not T - 1, x_s is the noise bit for bit whatever x_0 is."""
    network, x_0, noise = student(timesteps), images(), images(seed=1)
    low, last = timesteps[0], timesteps[-1]
    s = torch.tensor([last, low, last, low])
    assert network.is_terminal(s).tolist() == [True, False, True, False]
    x_s = network.diffuse(x_0, noise, s)
    assert torch.equal(x_s[::2], noise[::2])
    assert torch.equal(x_s[::2], network.diffuse(100 * x_0 + 7, noise, s)[::2])
    alpha, sigma = sd_schedule().alpha[low], sd_schedule().sigma[low]
    torch.testing.assert_close(x_s[1::2], alpha * x_0[1::2] + sigma * noise[1::2])


def test_student_reads_pure_noise_with_the_schedules_own_alpha():
    """An ε-student at 999: x̂_0 = (ε - σ ε̂) / α with α_999 = 0.0683, not with α = 0."""
    network, noise, s = student(prediction="epsilon"), images(), torch.full((4,), 999)
    eps_hat = network.denoiser.network(noise, s, conditions())
    expected = (noise - 0.99766723 * eps_hat) / 0.06826491
    torch.testing.assert_close(network(noise, s, conditions()), expected, rtol=1e-5, atol=1e-5)


# --- sampling -------------------------------------------------------------------------------------

TRAILING = [(1, (999,)), (2, (999, 499)), (3, (999, 749, 499)), (4, (999, 749, 499, 249))]


@pytest.mark.parametrize(("steps", "expected"), TRAILING)
def test_trailing_timesteps(steps, expected):
    assert student().inference_timesteps(steps) == expected


def test_trailing_timesteps_spread_over_all_that_were_trained():
    """Of eight, three: 0, 8/3 and 16/3 places below the last, rounded down."""
    assert student(tuple(range(100, 900, 100))).inference_timesteps(3) == (800, 600, 300)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_sampling_diffuses_each_estimate_with_fresh_noise(steps):
    """k steps ask the student k times; every state is seen; x_s = α x̂ + σ fresh; the last x̂ is
    decoded, once."""
    network, noise, cond = student(decode=lambda x: 5 * x + 1), images(), conditions()
    seen, g = [], generator(3)
    out = network.sample(noise, cond, steps, generator=g, on_step=lambda *state: seen.append(state))
    calls = network.denoiser.network.calls[:]
    assert len(calls) == steps and not any(with_gradient for _, with_gradient, _ in calls)
    assert tuple(tau for tau, _, _ in seen) == network.inference_timesteps(steps)
    assert [t.tolist() for t, _, _ in calls] == [[tau] * 4 for tau, _, _ in seen]

    schedule, g, x_s = sd_schedule(), generator(3), noise
    for i, (tau, state, x_hat) in enumerate(seen):
        if i:
            fresh = torch.randn(noise.shape, dtype=noise.dtype, generator=g)
            x_s = schedule.alpha[tau] * seen[i - 1][2] + schedule.sigma[tau] * fresh
        torch.testing.assert_close(state, x_s)
        torch.testing.assert_close(x_hat, network(x_s, torch.full((4,), tau), cond))
    torch.testing.assert_close(out, 5 * seen[-1][2] + 1)
    assert not out.requires_grad


def test_sampling_is_deterministic_under_a_seed():
    """Two steps depend on the generator, through the fresh noise; one step on the first noise
    alone."""
    network, noise, cond = student(), images(), conditions()
    one, two = (
        [network.sample(noise, cond, steps, generator=generator(seed)) for seed in (0, 0, 1)]
        for steps in (1, 2)
    )
    assert torch.equal(one[0], one[1]) and torch.equal(one[0], one[2])
    assert torch.equal(two[0], two[1]) and (two[0] - two[2]).abs().max() > 1e-3
    assert (network.sample(images(seed=8), cond) - one[0]).abs().max() > 1e-3


def test_one_step_is_the_default_and_a_checkpoint_holds_the_network_alone():
    network, seen = student(), []
    network.sample(images(), conditions(), on_step=lambda tau, *_: seen.append(tau))
    assert seen == [999]
    assert all(name.startswith("denoiser.network.") for name in network.state_dict())


def test_a_step_that_begins_above_tau_n_is_diffused_to_it():
    """Asked for τ_n as the second step: there x̂ is diffused, not thrown away for pure noise."""
    network, seen = student((249, 499)), []
    keep = lambda tau, x_s, x_hat: seen.append((x_s, x_hat))  # noqa: E731
    network.sample(
        images(), conditions(), timesteps=(999, 499), generator=generator(), on_step=keep
    )
    alpha = network.denoiser.schedule.alpha[499]
    noise = torch.randn(images().shape, dtype=torch.float64, generator=generator())
    sigma = network.denoiser.schedule.sigma[499]
    torch.testing.assert_close(seen[1][0], alpha * seen[0][1] + sigma * noise)


def test_timesteps_overrule_steps():
    """Three of the released models' demo: (999, 899, 799, 699), which this student was not even
    trained at."""
    network, seen, timesteps = student(), [], (999, 899, 799)
    network.sample(
        images(), conditions(), 1, timesteps=timesteps, on_step=lambda *x: seen.append(x[0])
    )
    assert seen == [999, 899, 799]
    assert [t[0].item() for t, _, _ in network.denoiser.network.calls] == [999, 899, 799]


# --- errors ---------------------------------------------------------------------------------------


def sample(*args, **options):
    return lambda: student().sample(images(), conditions(), *args, **options)


ERRORS = {  # what is done wrong → what the message must say
    "no timesteps": (lambda: student(()), ["timesteps=()", "0…999"]),
    "falling": (lambda: student((999, 499)), ["timesteps=(999, 499)", "rise"]),
    "equal": (lambda: student((499, 499)), ["timesteps=(499, 499)", "strictly"]),
    "beyond T": (lambda: student((499, 1000)), ["timesteps=(499, 1000)", "0…999"]),
    "negative": (lambda: student((-1, 499)), ["timesteps=(-1, 499)", "0…999"]),
    "no steps": (lambda: student().inference_timesteps(0), ["steps=0", "1…4"]),
    "more steps than trained for": (sample(5), ["steps=5", "1…4"]),
    "sampling beyond T": (sample(timesteps=(1000,)), ["t=1000", "0…999"]),
    "sampling nowhere": (sample(timesteps=()), ["timesteps=()", "must fall strictly", "an entry"]),
    "sampling upwards": (sample(timesteps=(499, 999)), ["timesteps=(499, 999)", "fall strictly"]),
    "sampling twice": (sample(timesteps=(999, 999)), ["timesteps=(999, 999)", "fall strictly"]),
}


@pytest.mark.parametrize("case", ERRORS)
def test_student_errors_name_argument_value_and_what_is_allowed(case):
    assert_refused(*ERRORS[case])
