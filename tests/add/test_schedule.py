"""add.py, sections 1 to 3: the forward process, denoisers and their conversions, the student and its sampler."""

import math

import pytest
import torch
from helpers import TinyNet, assert_refused, generator, read_output, sd_schedule
from hypothesis import given, settings, strategies
from torch import nn

from add import Denoiser, NoiseSchedule, Student, ddim, to_x_0_and_epsilon

PREDICTIONS = ("epsilon", "v", "x_0")


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def images(n=4, channels=3, side=4, seed=0):
    return torch.randn(n, channels, side, side, dtype=torch.float64, generator=generator(seed))


def conditions(n=4, seed=9):
    return torch.randn(n, 3, dtype=torch.float64, generator=generator(seed))


# --- schedules -------------------------------------------------------------------------------------------------------


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


def test_linear_schedule():
    """β runs evenly from 1e-4 to 0.02; ᾱ is its running product, here in Python's floats."""
    schedule, product = NoiseSchedule.linear(), 1.0
    for i in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
        if i in (0, 1, 500, 999):
            assert schedule.alpha[i].item() == pytest.approx(math.sqrt(product), rel=1e-5)


def test_cosine_schedule():
    """ᾱ_t = f(t + 1) / f(0) wherever β is below its cap of 0.999, which only the last one reaches."""
    schedule = NoiseSchedule.cosine()

    def f(u):
        return math.cos(math.pi / 2 * (u / 1000 + 0.008) / 1.008) ** 2

    for t in (0, 1, 400, 998):
        assert schedule.alpha[t].item() ** 2 == pytest.approx(f(t + 1) / f(0), rel=1e-4)
    assert schedule.alpha[999].item() ** 2 == pytest.approx(0.001 * f(999) / f(0), rel=1e-3)


@pytest.mark.parametrize("make", [NoiseSchedule.linear, NoiseSchedule.scaled_linear, NoiseSchedule.cosine])
def test_variance_is_preserved_and_noise_grows(make):
    schedule = make()
    torch.testing.assert_close(schedule.alpha**2 + schedule.sigma**2, torch.ones(1000))
    assert (schedule.alpha.diff() < 0).all() and (schedule.sigma.diff() > 0).all()
    assert len(make(T=7)) == 7


def test_betas_are_multiplied_in_float64():
    """Small β lose their product in float32; the schedule must not: 1000 times 1 - 1e-4 within float32's half unit."""
    schedule = NoiseSchedule.from_betas(torch.full((1000,), 1e-4))
    exact = math.sqrt((1 - torch.tensor(1e-4).double().item()) ** 1000)
    assert abs(schedule.alpha[-1].item() - exact) < 6e-8


@pytest.mark.parametrize("make", [NoiseSchedule.linear, NoiseSchedule.scaled_linear, NoiseSchedule.cosine])
def test_zero_terminal_snr_is_exact(make):
    """α_T = 0 and σ_T = 1 bit for bit, α_0 kept, and √ᾱ shifted and scaled linearly (Lin et al., Alg. 1)."""
    old = make()
    new = old.zero_terminal_snr()
    assert new.alpha[-1].item() == 0.0 and new.sigma[-1].item() == 1.0
    torch.testing.assert_close(new.alpha[0], old.alpha[0], rtol=2e-7, atol=0)
    torch.testing.assert_close(new.alpha**2 + new.sigma**2, torch.ones(1000))
    a = old.alpha.double()
    torch.testing.assert_close(new.alpha.double(), (a - a[-1]) * a[0] / (a[0] - a[-1]), rtol=1e-6, atol=1e-7)
    assert new.has_zero_terminal_snr and not old.has_zero_terminal_snr and len(new) == len(old)


def test_zero_terminal_snr_by_hand():
    """α = 0.9, 0.6, 0.3 becomes 0.9, 0.45, 0: minus 0.3, times 0.9 / 0.6."""
    schedule = NoiseSchedule(numbers(0.9, 0.6, 0.3) ** 2).zero_terminal_snr()
    torch.testing.assert_close(schedule.alpha, numbers(0.9, 0.45, 0.0))
    torch.testing.assert_close(schedule.sigma, numbers(0.19, 0.7975, 1.0).sqrt())


# --- forward process -------------------------------------------------------------------------------------------------


def test_diffuse_by_hand():
    """ᾱ = 0.64 and 0.36: x_t = 0.8 x_0 + 0.6 ε and 0.6 x_0 + 0.8 ε, each sample at its own t."""
    schedule = NoiseSchedule(numbers(0.64, 0.36))
    x_0, noise = numbers(1, 2).view(2, 1, 1, 1), numbers(10, -5).view(2, 1, 1, 1)
    torch.testing.assert_close(schedule.diffuse(x_0, noise, torch.tensor([0, 1])).flatten(), numbers(6.8, -2.8))
    torch.testing.assert_close(schedule.diffuse(x_0, noise, torch.tensor([1, 0])).flatten(), numbers(8.6, -1.4))


def test_coefficients_broadcast_over_images():
    alpha, sigma = sd_schedule().coefficients(torch.tensor([3, 998]))
    assert alpha.shape == sigma.shape == (2, 1, 1, 1)
    assert alpha[1].item() == sd_schedule().alpha[998].item() and sigma[0].item() == sd_schedule().sigma[3].item()


@pytest.mark.parametrize("t", [0, 249, 999])
def test_forward_process_statistics(t):
    """Mean α_t x_0 and standard deviation σ_t, each within five of its standard errors."""
    schedule, n = NoiseSchedule.scaled_linear(), 40_000
    x_0 = torch.tensor([0.7, -0.9]).view(1, 2, 1, 1).expand(n, -1, -1, -1)
    x_t = schedule.diffuse(x_0, torch.randn(x_0.shape, generator=generator(t)), torch.full((n,), t))
    alpha, sigma = schedule.alpha[t].item(), schedule.sigma[t].item()
    for channel, value in enumerate((0.7, -0.9)):
        assert abs(x_t[:, channel].mean().item() - alpha * value) < 5 * sigma / math.sqrt(n)
        assert abs(x_t[:, channel].std().item() - sigma) < 5 * sigma / math.sqrt(2 * n)


# --- denoiser --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prediction", "output"), [("epsilon", -1.0), ("v", -2.2), ("x_0", 2.0)])
def test_conversion_by_hand(prediction, output):
    """α = 0.6, σ = 0.8, x_0 = 2, ε = -1: x_t = 0.4 and v = -0.6 - 1.6 = -2.2."""
    x_0, epsilon = to_x_0_and_epsilon(numbers(output), numbers(0.4), numbers(0.6), numbers(0.8), prediction)
    torch.testing.assert_close(x_0, numbers(2.0))
    torch.testing.assert_close(epsilon, numbers(-1.0))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_conversions_invert_each_other(prediction):
    """At every t the pair read from any output makes x_t again, and the exact output gives back x_0 and ε."""
    schedule = sd_schedule()
    t = torch.arange(1000)
    x_0, noise, (alpha, sigma) = images(1000, 1, 2), images(1000, 1, 2, seed=1), schedule.coefficients(t)
    x_t = schedule.diffuse(x_0, noise, t)
    output = {"epsilon": noise, "v": alpha * noise - sigma * x_0, "x_0": x_0}[prediction]
    # 1e-12: rounding of 2e-16, times at most 1 / α_999 = 15 or 1 / σ_0 = 34
    for got, expected in zip(to_x_0_and_epsilon(output, x_t, alpha, sigma, prediction), (x_0, noise), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    x_hat, eps_hat = to_x_0_and_epsilon(images(1000, 1, 2, seed=2), x_t, alpha, sigma, prediction)
    torch.testing.assert_close(alpha * x_hat + sigma * eps_hat, x_t, rtol=0, atol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_denoiser_reads_its_network_at_each_samples_t(prediction):
    network, schedule = TinyNet().double(), sd_schedule()
    x_t, t, cond = images(), torch.tensor([1, 998, 249, 30]), conditions()
    expected = read_output(
        prediction, network(x_t, t, cond), x_t, schedule.alpha[t].view(-1, 1, 1, 1), schedule.sigma[t].view(-1, 1, 1, 1)
    )
    for got, value in zip(Denoiser(network, schedule, prediction)(x_t, t, cond), expected, strict=True):
        torch.testing.assert_close(got, value)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("guidance", [0.0, 3.0, torch.tensor([0.0, 1.0, 2.0, 7.5], dtype=torch.float64)])
def test_guidance_extrapolates_both_estimates(prediction, guidance):
    """x̂(∅) + g (x̂(y) - x̂(∅)), in x_0 and in ε alike, for a float and for one scale a sample."""
    denoiser = Denoiser(TinyNet().double(), sd_schedule(), prediction)
    x_t, t, cond, null = images(), torch.tensor([1, 998, 249, 30]), conditions(), conditions(seed=5)
    scale = guidance.view(-1, 1, 1, 1) if torch.is_tensor(guidance) else guidance
    guided, with_cond, without = denoiser(x_t, t, cond, guidance, null), denoiser(x_t, t, cond), denoiser(x_t, t, null)
    for got, y, empty in zip(guided, with_cond, without, strict=True):
        torch.testing.assert_close(got, empty + scale * (y - empty), rtol=1e-10, atol=1e-10)


def test_guidance_of_one_asks_the_network_once():
    denoiser = Denoiser(TinyNet().double(), sd_schedule())
    denoiser(images(), torch.tensor([1, 2, 3, 4]), conditions(), 1.0)
    assert len(denoiser.network.calls) == 1
    denoiser(images(), torch.tensor([1, 2, 3, 4]), conditions(), 2.0, conditions())
    assert len(denoiser.network.calls) == 3


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_clipped_estimate_takes_epsilon_along_and_ends_the_gradient_beyond(guidance):
    """x_t = α x̂_0 + σ ε̂ still; within the range nothing changes. DDIM diffuses the clipped estimate."""
    x, cond, t = images().requires_grad_(), conditions(), torch.tensor([3, 400, 800, 999])
    plain = Denoiser(TinyNet().double(), sd_schedule(), "v")
    free, _ = plain(x, t, cond, guidance, 0 * cond)
    limit = free.abs().median().item()
    clipped = Denoiser(plain.network, plain.schedule, "v", clip=lambda x: x.clamp(-limit, limit))
    x_0, epsilon = clipped(x, t, cond, guidance, 0 * cond)
    torch.testing.assert_close(x_0, free.clamp(-limit, limit))
    torch.testing.assert_close(plain.schedule.diffuse(x_0, epsilon, t), x)
    beyond = free.abs() > limit
    inside, outside = (torch.autograd.grad(x_0[which].sum(), x, retain_graph=True)[0] for which in (~beyond, beyond))
    assert inside.any() and not outside.any()
    two = ddim(clipped, x, [t, t // 2], cond)
    x_0, epsilon = clipped(x, t, cond)
    torch.testing.assert_close(two, clipped(plain.schedule.diffuse(x_0, epsilon, t // 2), t // 2, cond)[0])
    assert two.abs().max() == limit


@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_half_precision_output_keeps_x_0_in_float32(prediction, input_dtype):
    """At t = 999, where ε̂ is divided by α = 0.07, a bfloat16 x̂_0 would be off by up to 0.06."""
    schedule = NoiseSchedule.scaled_linear()
    output = images().bfloat16()
    denoiser = Denoiser(lambda x, t, cond: output, schedule, prediction)
    x_t = images(seed=1).to(input_dtype)
    x_0, _ = denoiser(x_t, torch.full((4,), 999), None)
    assert x_0.dtype == torch.float32
    alpha, sigma = schedule.alpha[999].double(), schedule.sigma[999].double()
    exact, _ = read_output(prediction, output.double(), x_t.double(), alpha, sigma)
    torch.testing.assert_close(x_0.double(), exact, rtol=1e-5, atol=1e-5)


def test_encoder_and_decoder_stay_out_of_the_module_tree():
    """A student that lists its VAE among its parameters would train it."""
    vae = nn.Linear(2, 2)
    denoiser = Denoiser(TinyNet(), sd_schedule(), "v", encode=vae, decode=vae)
    assert denoiser.encode is vae and denoiser.decode is vae
    assert {id(p) for p in vae.parameters()}.isdisjoint(id(p) for p in denoiser.parameters())
    assert not any("code" in name for name in denoiser.state_dict())


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_against_the_formula(prediction):
    """x_{t'} = α_t' x̂_0 + σ_t' ε̂: the same ε̂, no fresh noise; x̂_0 of the last step comes out."""
    schedule, network = sd_schedule(), TinyNet().double()
    x, cond = images(), conditions()
    path = [torch.tensor(p) for p in ([998, 600, 77, 5], [499, 300, 38, 2], [0, 0, 0, 0])]
    a, s = (lambda t: schedule.alpha[t].view(-1, 1, 1, 1)), (lambda t: schedule.sigma[t].view(-1, 1, 1, 1))
    x_t = x
    for t, following in zip(path, path[1:] + [None], strict=True):
        x_0, eps = read_output(prediction, network(x_t, t, cond), x_t, a(t), s(t))
        if following is not None:
            x_t = a(following) * x_0 + s(following) * eps
    torch.testing.assert_close(ddim(Denoiser(network, schedule, prediction), x, path, cond), x_0)


def test_ddim_passes_guidance_on_at_every_step():
    denoiser = Denoiser(TinyNet().double(), sd_schedule())
    t, x, cond, null = torch.tensor([700, 700, 700, 700]), images(), conditions(), conditions(seed=5)
    x_0, eps = denoiser(x, t, cond, 4.0, null)
    x_0, _ = denoiser(denoiser.schedule.diffuse(x_0, eps, t // 2), t // 2, cond, 4.0, null)
    torch.testing.assert_close(ddim(denoiser, x, [t, t // 2], cond, 4.0, null), x_0)


# --- student ---------------------------------------------------------------------------------------------------------


def student(timesteps=(249, 499, 749, 999), prediction="v", **codec):
    return Student(Denoiser(TinyNet().double(), sd_schedule(), prediction, **codec), timesteps)


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
    schedule = sd_schedule()
    torch.testing.assert_close(x_s[1::2], schedule.alpha[low] * x_0[1::2] + schedule.sigma[low] * noise[1::2])


def test_student_reads_pure_noise_with_the_schedules_own_alpha():
    """An ε-student at 999: x̂_0 = (ε - σ ε̂) / α with α_999 = 0.0683, not with α = 0."""
    network, noise, s = student(prediction="epsilon"), images(), torch.full((4,), 999)
    eps_hat = network.denoiser.network(noise, s, conditions())
    torch.testing.assert_close(
        network(noise, s, conditions()), (noise - 0.99766723 * eps_hat) / 0.06826491, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("steps", "expected"), [(1, (999,)), (2, (999, 499)), (3, (999, 749, 499)), (4, (999, 749, 499, 249))]
)
def test_trailing_timesteps(steps, expected):
    assert student().inference_timesteps(steps) == expected


def test_trailing_timesteps_spread_over_all_that_were_trained():
    """Of eight, three: 0, 8/3 and 16/3 places below the last, rounded down."""
    assert student(tuple(range(100, 900, 100))).inference_timesteps(3) == (800, 600, 300)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_sampling_diffuses_each_estimate_with_fresh_noise(steps):
    """k steps ask the student k times; every state is seen; x_s = α x̂ + σ fresh; the last x̂ is decoded, once."""
    network, noise, cond = student(decode=lambda x: 5 * x + 1), images(), conditions()
    seen = []
    out = network.sample(noise, cond, steps, generator=generator(3), on_step=lambda *state: seen.append(state))
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
    """Two steps depend on the generator, through the fresh noise; one step on the first noise alone."""
    network, noise, cond = student(), images(), conditions()
    one = [network.sample(noise, cond, 1, generator=generator(seed)) for seed in (0, 0, 1)]
    two = [network.sample(noise, cond, 2, generator=generator(seed)) for seed in (0, 0, 1)]
    assert torch.equal(one[0], one[1]) and torch.equal(one[0], one[2])
    assert torch.equal(two[0], two[1]) and (two[0] - two[2]).abs().max() > 1e-3
    assert (network.sample(images(seed=8), cond) - one[0]).abs().max() > 1e-3


def test_timesteps_overrule_steps():
    """Stability's demo: (999, 899, 799, 699), which this student was not even trained at."""
    network, seen = student(), []
    network.sample(images(), conditions(), steps=1, timesteps=(999, 899, 799), on_step=lambda *x: seen.append(x[0]))
    assert seen == [999, 899, 799]
    assert [t[0].item() for t, _, _ in network.denoiser.network.calls] == [999, 899, 799]


# --- errors ----------------------------------------------------------------------------------------------------------


def image(*shape):
    return torch.zeros(shape, dtype=torch.float64)


ERRORS = {  # what is done wrong → what the message must say: the argument, the value, what is allowed
    "alphas_cumprod of two axes": (lambda: NoiseSchedule(torch.ones(3, 2)), ["alphas_cumprod", "(3, 2)", "(T,)"]),
    "alphas_cumprod of one entry": (lambda: NoiseSchedule(torch.ones(1)), ["alphas_cumprod", "(1,)", "T > 1"]),
    "rising": (lambda: NoiseSchedule(torch.tensor([0.5, 0.6])), ["alphas_cumprod", "fall", "[0, 1)"]),
    "above 1": (lambda: NoiseSchedule(torch.tensor([1.5, 0.6])), ["alphas_cumprod", "fall", "[0, 1)"]),
    "below 0": (lambda: NoiseSchedule(torch.tensor([0.5, -0.1])), ["alphas_cumprod", "fall", "[0, 1)"]),
    "float t": (lambda: sd_schedule().coefficients(torch.tensor([1.0])), ["t ", "float32", "integers"]),
    "t of two axes": (lambda: sd_schedule().coefficients(torch.ones(2, 1).long()), ["t ", "(2, 1)", "(B,)"]),
    "t too large": (lambda: sd_schedule().coefficients(torch.tensor([5, 1000])), ["t=5…1000", "0…999"]),
    "t negative": (lambda: sd_schedule().coefficients(torch.tensor([-1, 7])), ["t=-1…7", "0…999"]),
    "noise of another shape": (
        lambda: sd_schedule().diffuse(image(2, 3, 4, 4), image(2, 3, 4, 5), torch.tensor([1, 2])),
        ["noise (2, 3, 4, 5)", "(B, C, H, W)"],
    ),
    "one t for two images": (
        lambda: sd_schedule().diffuse(image(2, 3, 4, 4), image(2, 3, 4, 4), torch.tensor([1])),
        ["t (1,)", "(B,)"],
    ),
    "images without channels": (
        lambda: sd_schedule().diffuse(image(2, 4, 4), image(2, 4, 4), torch.tensor([1, 2])),
        ["x_0 (2, 4, 4)", "(B, C, H, W)"],
    ),
    "prediction of a denoiser": (
        lambda: Denoiser(TinyNet(), sd_schedule(), "eps"),
        ["prediction='eps'", "'epsilon'", "'v'", "'x_0'"],
    ),
    "prediction of a conversion": (
        lambda: to_x_0_and_epsilon(*[torch.ones(1)] * 4, "score"),
        ["prediction='score'", "'epsilon'", "'v'", "'x_0'"],
    ),
    "ε at zero terminal SNR": (
        lambda: Denoiser(TinyNet(), sd_schedule().zero_terminal_snr(), "epsilon"),
        ["prediction='epsilon'", "zero terminal SNR", "un-rescaled", "pure noise", "'v'", "'x_0'"],
    ),
    "guidance without null_cond": (
        lambda: Denoiser(TinyNet().double(), sd_schedule())(images(), torch.tensor([1, 2, 3, 4]), conditions(), 2.5),
        ["guidance=2.5", "null_cond", "guidance=1"],
    ),
    "no timesteps": (lambda: student(()), ["timesteps=()", "0…999"]),
    "falling timesteps": (lambda: student((999, 499)), ["timesteps=(999, 499)", "rise"]),
    "equal timesteps": (lambda: student((499, 499)), ["timesteps=(499, 499)", "strictly"]),
    "timestep beyond T": (lambda: student((499, 1000)), ["timesteps=(499, 1000)", "0…999"]),
    "negative timestep": (lambda: student((-1, 499)), ["timesteps=(-1, 499)", "0…999"]),
    "no steps": (lambda: student().inference_timesteps(0), ["steps=0", "1…4"]),
    "more steps than trained for": (lambda: student().sample(images(), conditions(), 5), ["steps=5", "1…4"]),
    "sampling beyond T": (lambda: student().sample(images(), conditions(), timesteps=(1000,)), ["t=1000", "0…999"]),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_argument_value_and_what_is_allowed(case):
    assert_refused(*ERRORS[case])


@pytest.mark.parametrize("prediction", ["v", "x_0"])
def test_zero_terminal_snr_is_open_to_v_and_x_0(prediction):
    """At α_T = 0 a v-network's x̂_0 is -v and its ε̂ is x_t; an x_0-network's x̂_0 is its output."""
    schedule, x_t, output = sd_schedule().zero_terminal_snr(), images(), images(seed=1)
    x_0, eps = Denoiser(lambda x, t, c: output, schedule, prediction)(x_t, torch.full((4,), 999), None)
    torch.testing.assert_close(x_0, -output if prediction == "v" else output)
    torch.testing.assert_close(eps, x_t)


@pytest.mark.parametrize("timesteps", [(), (499, 999), (999, 999)])
def test_sampling_timesteps_must_fall(timesteps):
    network = Student(Denoiser(lambda x, t, cond: x, NoiseSchedule.cosine(), "x_0"))
    with pytest.raises(ValueError, match=r"timesteps=\(.*must fall strictly"):
        network.sample(torch.zeros(1, 1, 2, 2), None, timesteps=timesteps)


# Properties, for schedules and numbers that hypothesis thinks of -------------------------------------------------------

BETAS = strategies.lists(strategies.floats(1e-6, 0.999), min_size=2, max_size=50).map(lambda x: torch.tensor(x, dtype=torch.float64))
VALUE = strategies.floats(-100, 100)


@settings(max_examples=100, deadline=None)
@given(BETAS)
def test_any_betas_preserve_variance_and_lose_signal(betas):
    schedule = NoiseSchedule.from_betas(betas)
    torch.testing.assert_close(schedule.alpha**2 + schedule.sigma**2, torch.ones(len(betas), dtype=torch.float64))
    assert (schedule.alpha.diff() <= 0).all() and schedule.alpha[0] ** 2 == pytest.approx(1 - betas[0].item())
    if schedule.alpha[-1] < schedule.alpha[0]:
        rescaled = schedule.zero_terminal_snr()
        assert rescaled.alpha[-1] == 0 and rescaled.sigma[-1] == 1 and rescaled.has_zero_terminal_snr
        assert rescaled.alpha[0].item() == pytest.approx(schedule.alpha[0].item())


@settings(max_examples=100, deadline=None)
@given(VALUE, VALUE, strategies.floats(0.01, 0.99), strategies.sampled_from(PREDICTIONS))
def test_any_output_is_read_back_as_what_it_was_made_of(x_0, noise, alpha_squared, prediction):
    alpha, sigma = (torch.tensor(v, dtype=torch.float64).sqrt() for v in (alpha_squared, 1 - alpha_squared))
    x_0, noise = torch.tensor([x_0], dtype=torch.float64), torch.tensor([noise], dtype=torch.float64)
    output = {"epsilon": noise, "v": alpha * noise - sigma * x_0, "x_0": x_0}[prediction]
    back = to_x_0_and_epsilon(output, alpha * x_0 + sigma * noise, alpha, sigma, prediction)
    torch.testing.assert_close(torch.cat(back), torch.cat([x_0, noise]), rtol=1e-9, atol=1e-9)
