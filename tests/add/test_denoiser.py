"""add.py, section 2: denoisers, what their networks' outputs are read as, DDIM."""

import pytest
import torch
from helpers import TinyNet, assert_refused, generator, read_output, sd_schedule
from hypothesis import given, settings, strategies
from torch import nn

from add import Denoiser, NoiseSchedule, ddim, to_x_0_and_epsilon

PREDICTIONS = ("epsilon", "v", "x_0")


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def images(n=4, channels=3, side=4, seed=0):
    shape = (n, channels, side, side)
    return torch.randn(shape, dtype=torch.float64, generator=generator(seed))


def conditions(n=4, seed=9):
    return torch.randn(n, 3, dtype=torch.float64, generator=generator(seed))


def tiny(prediction="epsilon", **options):
    return Denoiser(TinyNet().double(), sd_schedule(), prediction, **options)


# --- conversions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("prediction", "output"), [("epsilon", -1.0), ("v", -2.2), ("x_0", 2.0)])
def test_conversion_by_hand(prediction, output):
    """α = 0.6, σ = 0.8, x_0 = 2, ε = -1: x_t = 0.4 and v = -0.6 - 1.6 = -2.2."""
    x_t, alpha, sigma = numbers(0.4), numbers(0.6), numbers(0.8)
    x_0, epsilon = to_x_0_and_epsilon(numbers(output), x_t, alpha, sigma, prediction)
    torch.testing.assert_close(x_0, numbers(2.0))
    torch.testing.assert_close(epsilon, numbers(-1.0))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_conversions_invert_each_other(prediction):
    """At every t the pair read from any output makes x_t again, and the exact output gives back x_0
    and ε."""
    schedule, t = sd_schedule(), torch.arange(1000)
    x_0, noise, (alpha, sigma) = images(1000, 1, 2), images(1000, 1, 2, 1), schedule.coefficients(t)
    x_t = schedule.diffuse(x_0, noise, t)
    output = {"epsilon": noise, "v": alpha * noise - sigma * x_0, "x_0": x_0}[prediction]
    # 1e-12: rounding of 2e-16, times at most 1 / α_999 = 15 or 1 / σ_0 = 34
    pair = to_x_0_and_epsilon(output, x_t, alpha, sigma, prediction)
    for got, expected in zip(pair, (x_0, noise), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    any_output = images(1000, 1, 2, seed=2)
    x_hat, eps_hat = to_x_0_and_epsilon(any_output, x_t, alpha, sigma, prediction)
    torch.testing.assert_close(alpha * x_hat + sigma * eps_hat, x_t, rtol=0, atol=1e-12)


VALUE = strategies.floats(-100, 100)


@settings(max_examples=100, deadline=None)
@given(VALUE, VALUE, strategies.floats(0.01, 0.99), strategies.sampled_from(PREDICTIONS))
def test_any_output_is_read_back_as_what_it_was_made_of(x_0, noise, alpha_squared, prediction):
    alpha, sigma = numbers(alpha_squared).sqrt(), numbers(1 - alpha_squared).sqrt()
    x_0, noise = numbers(x_0), numbers(noise)
    output = {"epsilon": noise, "v": alpha * noise - sigma * x_0, "x_0": x_0}[prediction]
    back = to_x_0_and_epsilon(output, alpha * x_0 + sigma * noise, alpha, sigma, prediction)
    torch.testing.assert_close(torch.cat(back), torch.cat([x_0, noise]), rtol=1e-9, atol=1e-9)


# --- denoiser -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_denoiser_reads_its_network_at_each_samples_t(prediction):
    """predict gives the pair; a call gives x̂_0 alone."""
    denoiser, schedule = tiny(prediction), sd_schedule()
    x_t, t, cond = images(), torch.tensor([1, 998, 249, 30]), conditions()
    alpha, sigma = schedule.alpha[t].view(-1, 1, 1, 1), schedule.sigma[t].view(-1, 1, 1, 1)
    expected = read_output(prediction, denoiser.network(x_t, t, cond), x_t, alpha, sigma)
    for got, value in zip(denoiser.predict(x_t, t, cond), expected, strict=True):
        torch.testing.assert_close(got, value)
    torch.testing.assert_close(denoiser(x_t, t, cond), expected[0])


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("guidance", [0.0, 3.0, numbers(0.0, 1.0, 2.0, 7.5)])
def test_guidance_extrapolates_both_estimates(prediction, guidance):
    """x̂(∅) + g (x̂(y) - x̂(∅)), in x_0 and in ε alike, for a float and for one scale a sample."""
    denoiser = tiny(prediction)
    x_t, t, cond, null = images(), torch.tensor([1, 998, 249, 30]), conditions(), conditions(seed=5)
    scale = guidance.view(-1, 1, 1, 1) if torch.is_tensor(guidance) else guidance
    guided = denoiser.predict(x_t, t, cond, guidance, null)
    pairs = denoiser.predict(x_t, t, cond), denoiser.predict(x_t, t, null)
    for got, y, empty in zip(guided, *pairs, strict=True):
        torch.testing.assert_close(got, empty + scale * (y - empty), rtol=1e-10, atol=1e-10)
    assert torch.equal(denoiser(x_t, t, cond, guidance, null), guided[0])


def test_guidance_of_one_asks_the_network_once():
    denoiser, t = tiny(), torch.tensor([1, 2, 3, 4])
    denoiser(images(), t, conditions(), 1.0)
    assert len(denoiser.network.calls) == 1
    denoiser(images(), t, conditions(), 2.0, conditions())
    assert len(denoiser.network.calls) == 3


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_clipped_estimate_takes_epsilon_along_and_ends_the_gradient_beyond(guidance):
    """x_t = α x̂_0 + σ ε̂ still; within the range nothing changes. DDIM diffuses the clipped
    estimate."""
    x, cond, t = images().requires_grad_(), conditions(), torch.tensor([3, 400, 800, 999])
    plain = tiny("v")
    free = plain(x, t, cond, guidance, 0 * cond)
    limit = free.abs().median().item()
    clip = lambda x: x.clamp(-limit, limit)  # noqa: E731
    clipped = Denoiser(plain.network, plain.schedule, "v", clip=clip)
    x_0, epsilon = clipped.predict(x, t, cond, guidance, 0 * cond)
    torch.testing.assert_close(x_0, clip(free))
    torch.testing.assert_close(plain.schedule.diffuse(x_0, epsilon, t), x)
    beyond = free.abs() > limit
    inside, outside = (
        torch.autograd.grad(x_0[which].sum(), x, retain_graph=True)[0]
        for which in (~beyond, beyond)
    )
    assert inside.any() and not outside.any()
    two = ddim(clipped, x, [t, t // 2], cond)
    x_t = plain.schedule.diffuse(*clipped.predict(x, t, cond), t // 2)
    torch.testing.assert_close(two, clipped(x_t, t // 2, cond))
    assert two.abs().max() == limit


@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_half_precision_output_keeps_x_0_in_float32(prediction, input_dtype):
    """At t = 999, where ε̂ is divided by α = 0.07, a bfloat16 x̂_0 would be off by up to 0.06."""
    schedule, output = NoiseSchedule.scaled_linear(), images().bfloat16()
    denoiser = Denoiser(lambda x, t, cond: output, schedule, prediction)
    x_t = images(seed=1).to(input_dtype)
    x_0 = denoiser(x_t, torch.full((4,), 999), None)
    assert x_0.dtype == torch.float32
    alpha, sigma = schedule.alpha[999].double(), schedule.sigma[999].double()
    exact, _ = read_output(prediction, output.double(), x_t.double(), alpha, sigma)
    torch.testing.assert_close(x_0.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", ["v", "x_0"])
def test_zero_terminal_snr_is_open_to_v_and_x_0(prediction):
    """At α_T = 0 a v-network's x̂_0 is -v and its ε̂ is x_t; an x_0-network's x̂_0 is its output."""
    schedule, x_t, output = sd_schedule().zero_terminal_snr(), images(), images(seed=1)
    denoiser = Denoiser(lambda x, t, c: output, schedule, prediction)
    x_0, eps = denoiser.predict(x_t, torch.full((4,), 999), None)
    torch.testing.assert_close(x_0, -output if prediction == "v" else output)
    torch.testing.assert_close(eps, x_t)


def test_a_vaes_methods_stay_out_of_the_module_tree():
    """A student that lists its VAE among its parameters would train it."""
    vae = nn.Linear(2, 2)
    denoiser = tiny("v", encode=vae.forward, decode=vae.forward)
    assert {id(p) for p in vae.parameters()}.isdisjoint(id(p) for p in denoiser.parameters())
    assert not any("code" in name for name in denoiser.state_dict())


# --- DDIM -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_against_the_formula(prediction):
    """x_{t'} = α_t' x̂_0 + σ_t' ε̂: the same ε̂, no fresh noise; x̂_0 of the last step comes out."""
    denoiser, x, cond = tiny(prediction), images(), conditions()
    path = [torch.tensor(p) for p in ([998, 600, 77, 5], [499, 300, 38, 2], [0, 0, 0, 0])]

    def columns(t):
        schedule = denoiser.schedule
        return schedule.alpha[t].view(-1, 1, 1, 1), schedule.sigma[t].view(-1, 1, 1, 1)

    x_t = x
    for t, following in zip(path, path[1:] + [None], strict=True):
        output = denoiser.network(x_t, t, cond)
        x_0, eps = read_output(prediction, output, x_t, *columns(t))
        if following is not None:
            alpha, sigma = columns(following)
            x_t = alpha * x_0 + sigma * eps
    torch.testing.assert_close(ddim(denoiser, x, path, cond), x_0)


def test_ddim_passes_guidance_on_at_every_step():
    denoiser, t, x = tiny(), torch.full((4,), 700), images()
    told = conditions(), 4.0, conditions(seed=5)
    x_t = denoiser.schedule.diffuse(*denoiser.predict(x, t, *told), t // 2)
    expected = denoiser(x_t, t // 2, *told)
    torch.testing.assert_close(ddim(denoiser, x, [t, t // 2], *told), expected)


# --- errors ---------------------------------------------------------------------------------------

ERRORS = {  # what is done wrong → what the message must say
    "prediction": (lambda: tiny("eps"), ["prediction='eps'", "'epsilon'", "'v'", "'x_0'"]),
    "ε at zero terminal SNR": (
        lambda: Denoiser(TinyNet(), sd_schedule().zero_terminal_snr(), "epsilon"),
        ["prediction='epsilon'", "alpha_T, which is 0", "pure noise"],
    ),
    "guidance without null_cond": (
        lambda: tiny()(images(), torch.tensor([1, 2, 3, 4]), conditions(), 2.5),
        ["guidance=2.5", "needs null_cond"],
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_denoiser_errors_name_argument_value_and_what_is_allowed(case):
    assert_refused(*ERRORS[case])
