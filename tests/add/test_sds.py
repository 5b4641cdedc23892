"""Score distillation is a special case of ADD's distillation loss (Appendix A), proved at every
timestep.

**Claim.** With c(t) = α_t w(t) / (2 σ_t) the distillation loss

    L(θ) = c(t) ‖x̂_θ - sg(x̂_ψ)‖²                                                          (Eq. 4)

with x̂_ψ the teacher's x̂_0 of x_t = α_t x̂_θ + σ_t ε', has as its gradient the one that DreamFusion
*defines* as score distillation sampling (SDS),

    ∇_θ SDS = w(t) (ε̂_ψ(x_t; t) - ε')ᵀ ∂x̂_θ/∂θ,                                             (SDS)

whatever the teacher predicts (ε, v or x_0) and whatever its guidance.

**Derivation.**

  1. One x_t, read twice. The student's image and the noise ε' made it:

         x̂_θ = (x_t - σ_t ε') / α_t.

  2. The teacher's two estimates explain it too, x_t = α_t x̂_ψ + σ_t ε̂_ψ:

         x̂_ψ = (x_t - σ_t ε̂_ψ) / α_t.

     That is the definition of ε̂ for an ε- or x_0-network; for a v-network it needs
     α_t² + σ_t² = 1. Guidance keeps it, for it mixes two such pairs with coefficients g and 1 - g,
     which add up to one.
  3. Subtract, and x_t drops out:

         x̂_θ - x̂_ψ = (σ_t / α_t) (ε̂_ψ - ε').

  4. Differentiate Eq. 4. Nothing comes through sg:

         ∇_θ L = 2 c(t) (x̂_θ - x̂_ψ)ᵀ ∂x̂_θ/∂θ.

  5. Insert 3 in 4:

         ∇_θ L = 2 c(t) (σ_t / α_t) (ε̂_ψ - ε')ᵀ ∂x̂_θ/∂θ.

  6. With c(t) = α_t w(t) / (2 σ_t) the factors cancel to w(t):  ∇_θ L = ∇_θ SDS.             ∎

With another weight step 5 still holds. The exponential c(t) = α_t leaves 2 σ_t, where SDS has w(t):
the gradients differ by the factor 2 σ_t / w(t), one number for each timestep. That is the negative
control.

Step 4 takes d in the space that was diffused. In pixels a latent model's decoder adds its Jacobian,
at both ends, and the gradient is no longer SDS: also tested. Noise-free score distillation (NFSD)
puts another residual, δ_D + g δ_C, in the place of ε̂_ψ - ε'; solving 3 for x̂_ψ gives the target
x̂_θ - (σ_t / α_t)(δ_D + g δ_C), and 4 to 6 hold as before.

**How it is tested.** All in float64, with the parameters' gradients, at t = 1 … 998 at once: 998
students side by side, one for each timestep, so that a single backward pass gives 998 gradients,
each its own. "Equal" is ‖difference‖ / ‖SDS‖ below 1e-10 at every t; rounding (1e-16, times at most
σ/α = 14 in steps 1 and 2, or 1/σ = 30) measures 1e-14.
"""

from types import SimpleNamespace

import pytest
import torch
from helpers import TinyNet, column, generator, read_output, relative, sd_schedule
from torch import nn

from add import (
    ADD,
    ADDConfig,
    Batch,
    Denoiser,
    NoiseSchedule,
    Student,
    distance,
    distillation_weight,
    nfsd_residual,
    reconstruction_target,
)

T = torch.arange(1, 999)
SHAPE = (len(T), 1, 2, 3)
TOLERANCE = 1e-10
PREDICTIONS = ("epsilon", "v", "x_0")
W = {  # w(t), as a function of σ_t
    "one": torch.ones_like,
    "sigma_squared": torch.square,
    "cubic": lambda sigma: 0.3 + sigma**3,
}


class StudentsSideBySide(nn.Module):
    """x̂_θ for each of 998 samples from parameters of its own: W_2 tanh(W_1 x + b_1) + b_2, the
    image flattened."""

    def __init__(self):
        super().__init__()
        g = generator(1)

        def parameter(*shape):
            return nn.Parameter(torch.randn(len(T), *shape, dtype=torch.float64, generator=g))

        self.W_1, self.b_1 = parameter(4, 6), parameter(4, 1)
        self.W_2, self.b_2 = parameter(6, 4), parameter(6, 1)

    def forward(self, x_s):
        h = torch.tanh(self.W_1 @ x_s.reshape(len(T), 6, 1) + self.b_1)
        return (self.W_2 @ h + self.b_2).reshape(SHAPE)


def randn(*shape, seed):
    return torch.randn(shape, dtype=torch.float64, generator=generator(seed))


@pytest.fixture
def world():
    """The students, what they look at, ε', and the teacher's conditions."""
    return SimpleNamespace(
        students=StudentsSideBySide(),
        x_s=randn(*SHAPE, seed=2),
        noise=randn(*SHAPE, seed=3),
        cond=randn(len(T), 3, seed=4),
        null=randn(len(T), 3, seed=5),
        negative=randn(len(T), 3, seed=6),
    )


def make_teacher(prediction="epsilon", **codec):
    return Denoiser(TinyNet(channels=1), sd_schedule(), prediction, **codec).double()


def parameter_gradients(students, x_hat, upstream):
    """upstreamᵀ ∂x̂_θ/∂θ, as (998, number of parameters); sampled at every t by its own student."""
    gradients = torch.autograd.grad(x_hat, tuple(students.parameters()), upstream)
    return torch.cat([g.flatten(1) for g in gradients], 1)


def gradients_of_loss(students, losses):
    """∂ losses_i / ∂θ_i, as (998, number of parameters)."""
    gradients = torch.autograd.grad(losses.sum(), tuple(students.parameters()))
    return torch.cat([g.flatten(1) for g in gradients], 1)


@torch.no_grad()
def epsilon_by_hand(teacher, x_t, cond):
    """ε̂_ψ(x_t; t) from the network's raw output."""
    alpha, sigma = column(teacher.schedule, T)
    return read_output(teacher.prediction, teacher.network(x_t, T, cond), x_t, alpha, sigma)[1]


@torch.no_grad()
def guided_epsilon_by_hand(teacher, x_t, cond, null, g):
    """ε̂(∅) + g (ε̂(y) - ε̂(∅))."""
    empty = epsilon_by_hand(teacher, x_t, null)
    return empty + g * (epsilon_by_hand(teacher, x_t, cond) - empty)


def sds_gradient(world, teacher, w, guidance):
    """The right-hand side, (SDS), as DreamFusion writes it: no loss, no target, no c(t)."""
    alpha, sigma = column(teacher.schedule, T)
    x_hat = world.students(world.x_s)
    x_t = alpha * x_hat.detach() + sigma * world.noise
    eps_hat = guided_epsilon_by_hand(teacher, x_t, world.cond, world.null, guidance)
    return parameter_gradients(world.students, x_hat, W[w](sigma) * (eps_hat - world.noise))


def target_of(world, teacher, x_hat, guidance=1.0):
    return reconstruction_target(
        teacher, x_hat, world.noise, T, world.cond, guidance=guidance, null_cond=world.null
    )


def weights_of(teacher, name, w):
    """c(t), (998,)."""
    return distillation_weight(name, *teacher.schedule.coefficients(T), W[w]).flatten()


def distillation_gradient(world, teacher, name, w, guidance):
    """The left-hand side: the gradient of Eq. 4 from the three functions that add.py is made of."""
    x_hat = world.students(world.x_s)
    target = target_of(world, teacher, x_hat, guidance)
    losses = weights_of(teacher, name, w) * distance(x_hat, target, "sum")
    return gradients_of_loss(world.students, losses)


# --- the derivation, step by step -----------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_steps_1_to_3_images_differ_as_their_noises_do(world, prediction, guidance):
    """x̂_θ - x̂_ψ = (σ_t / α_t) (ε̂_ψ - ε'), sample by sample."""
    teacher = make_teacher(prediction)
    alpha, sigma = column(teacher.schedule, T)
    x_hat = world.students(world.x_s).detach()
    x_t = alpha * x_hat + sigma * world.noise
    x_psi = target_of(world, teacher, x_hat, guidance)
    eps_hat = guided_epsilon_by_hand(teacher, x_t, world.cond, world.null, guidance)
    for got, expected in (
        (x_hat, (x_t - sigma * world.noise) / alpha),  # step 1
        (x_psi, (x_t - sigma * eps_hat) / alpha),  # step 2
        (x_hat - x_psi, sigma / alpha * (eps_hat - world.noise)),  # step 3
    ):
        assert relative(got, expected).max() < TOLERANCE


def test_step_4_nothing_comes_through_the_target(world):
    """2 c(t) (x̂_θ - x̂_ψ)ᵀ ∂x̂_θ/∂θ, with x̂_ψ a constant; and the target has no graph to come
    through."""
    teacher = make_teacher()
    alpha, sigma = column(teacher.schedule, T)
    x_hat = world.students(world.x_s)
    target = target_of(world, teacher, x_hat)
    assert not target.requires_grad
    c_t = alpha * sigma**2 / (2 * sigma)
    expected = parameter_gradients(world.students, x_hat, 2 * c_t * (x_hat - target).detach())
    got = distillation_gradient(world, teacher, "sds", "sigma_squared", 1.0)
    assert relative(got, expected).max() < TOLERANCE


@pytest.mark.parametrize("w", W)
@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_step_6_distillation_with_the_sds_weight_is_sds(world, prediction, guidance, w):
    """The claim: every timestep from 1 to 998, every kind of teacher, in the space of the student's
    parameters."""
    teacher = make_teacher(prediction)
    sds = sds_gradient(world, teacher, w, guidance)
    assert sds.shape == (998, 58)
    assert sds.norm(dim=1).min() > 1e-4  # nothing is equal because it is zero
    distillation = distillation_gradient(world, teacher, "sds", w, guidance)
    assert relative(distillation, sds).max() < TOLERANCE


@pytest.mark.parametrize("w", W)
@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_control_the_exponential_weight_is_off_by_its_factor(world, prediction, guidance, w):
    """∇L_exponential = (2 σ_t / w(t)) ∇SDS: exactly that, and at almost every t not SDS."""
    teacher = make_teacher(prediction)
    _, sigma = teacher.schedule.coefficients(T)
    factor = (2 * sigma / W[w](sigma)).reshape(-1, 1)
    exponential = distillation_gradient(world, teacher, "exponential", w, guidance)
    sds = sds_gradient(world, teacher, w, guidance)
    assert relative(exponential, factor * sds).max() < TOLERANCE
    different = relative(exponential, sds) > 1e-3
    assert torch.equal(different, (factor.flatten() - 1).abs() > 1e-3)
    assert different.sum() > 990


# --- the same from ADD.distillation_loss, as training calls it ------------------------------------


def distil(monkeypatch, world, teacher, w, guidance=1.0, decode=lambda x: x, **config):
    """ADD.distillation_loss at t = 1 … 998, with world.noise as ε': its losses, target, and their
    gradient."""
    monkeypatch.setattr(torch, "randint", lambda high, size, **_: T)
    monkeypatch.setattr(torch, "randn", lambda *size, **_: world.noise)
    config = ADDConfig(guidance=guidance, reduction="sum", sds_w=W[w], **config)
    model = ADD(Student(make_teacher()), teacher, nn.Identity(), config)
    x_hat = world.students(world.x_s)
    batch = Batch(None, world.cond, null_cond=world.null, negative_cond=world.negative)
    compared = x_hat if config.space == "latent" else decode(x_hat)
    losses, target, t = model.distillation_loss(compared, x_hat, batch)
    assert torch.equal(t, T) and losses.shape == T.shape
    return losses, target, gradients_of_loss(world.students, losses)


@pytest.mark.parametrize("space", ["pixel", "latent"])
@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_add_distill_is_made_of_those_pieces(monkeypatch, world, prediction, guidance, space):
    """Loss and gradient of the method equal those of target, weight and distance; for a pixel model
    in either space."""
    teacher = make_teacher(prediction)
    x_hat = world.students(world.x_s)
    target = target_of(world, teacher, x_hat, guidance)
    expected = weights_of(teacher, "sds", "one") * (x_hat - target).square().sum((1, 2, 3))
    losses, got, gradient = distil(
        monkeypatch, world, teacher, "one", guidance, weight="sds", space=space
    )
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(got, target)
    assert relative(gradient, gradients_of_loss(world.students, expected)).max() < TOLERANCE


@pytest.mark.parametrize("w", W)
@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_add_distill_is_sds(monkeypatch, world, prediction, guidance, w):
    teacher = make_teacher(prediction)
    sds = sds_gradient(world, teacher, w, guidance)
    _, _, gradient = distil(monkeypatch, world, teacher, w, guidance, weight="sds")
    assert relative(gradient, sds).max() < TOLERANCE


def test_a_latent_model_is_sds_in_its_latents_and_not_in_pixels(monkeypatch, world):
    """The decoder x ↦ 3x + 1 has the Jacobian 3, at both ends of d: pixel distance has 9 times the
    gradient of SDS."""

    def decode(z):
        return 3 * z + 1

    teacher = make_teacher("v", decode=decode)
    sds = sds_gradient(world, teacher, "one", 1.0)
    for space, factor in (("latent", 1), ("pixel", 9)):
        _, _, gradient = distil(
            monkeypatch, world, teacher, "one", decode=decode, weight="sds", space=space
        )
        assert relative(gradient, factor * sds).max() < TOLERANCE


# --- NFSD -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("w", W)
@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_nfsd_as_a_target_is_nfsd_as_a_residual(monkeypatch, world, prediction, guidance, w):
    """The gradient is w(t) (δ_D + g δ_C)ᵀ ∂x̂_θ/∂θ, with δ_D = ε̂(∅) for t < 200 and
    ε̂(∅) - ε̂(y_neg) from 200 on."""
    teacher = make_teacher(prediction)
    alpha, sigma = column(teacher.schedule, T)
    x_hat = world.students(world.x_s)
    x_t = alpha * x_hat.detach() + sigma * world.noise
    conditions = world.cond, world.null, world.negative
    eps_cond, eps_null, eps_neg = (epsilon_by_hand(teacher, x_t, c) for c in conditions)
    delta_C = eps_cond - eps_null
    delta_D = torch.cat([eps_null[:199], eps_null[199:] - eps_neg[199:]])  # T[199] is t = 200
    delta = delta_D + guidance * delta_C
    residual = parameter_gradients(world.students, x_hat, W[w](sigma) * delta)
    assert residual.norm(dim=1).min() > 1e-4
    _, target, gradient = distil(monkeypatch, world, teacher, w, guidance, weight="nfsd")
    assert relative(gradient, residual).max() < TOLERANCE
    expected = (x_hat - sigma / alpha * delta).detach()
    assert relative(target, expected).max() < TOLERANCE and not target.requires_grad


def test_nfsds_threshold_is_a_fifth_of_the_schedule():
    """Of T = 10: at t = 1 ε̂(∅) itself, from 2 on its difference to ε̂(y_neg); here ε̂ is the
    condition."""
    schedule = NoiseSchedule(torch.linspace(0.9, 0.1, 10, dtype=torch.float64))
    teacher = Denoiser(lambda x, t, c: c.view(-1, 1, 1, 1).expand_as(x), schedule)
    cond, null, negative = (torch.full((3,), c, dtype=torch.float64) for c in (5.0, 2.0, 0.5))
    x_t, t = randn(3, 1, 2, 2, seed=0), torch.tensor([1, 2, 9])
    residual = nfsd_residual(teacher, x_t, t, cond, null, negative, 10.0)
    assert residual[:, 0, 0, 0].tolist() == [2 + 10 * 3.0, 1.5 + 10 * 3.0, 1.5 + 10 * 3.0]


# --- the weights and the distance, alone ----------------------------------------------------------


def test_weights_by_hand():
    """α = 0.6, σ = 0.8: c = 0.6; 0.6 w / 1.6 with w = 1 or 0.64."""
    alpha, sigma = torch.tensor(0.6), torch.tensor(0.8)
    assert distillation_weight("exponential", alpha, sigma).item() == pytest.approx(0.6)
    for name in ("sds", "nfsd"):
        for w, expected in (([torch.ones_like], 0.375), ([torch.square], 0.24), ([], 0.24)):
            c_t = distillation_weight(name, alpha, sigma, *w)
            assert c_t.item() == pytest.approx(expected)


def test_exponential_weight_falls_with_t_down_to_alpha_T():
    coefficients = sd_schedule().coefficients(torch.arange(1000))
    c_t = distillation_weight("exponential", *coefficients).flatten()
    assert (c_t.diff() < 0).all() and c_t[999].item() == pytest.approx(0.06826491, abs=1e-7)


def test_distance_by_hand():
    """(1, 2)² of four elements, 5² of four: one value a sample."""
    y = torch.tensor([[1.0, -2.0, 0.0, 0.0], [0.0, 0.0, 5.0, 0.0]]).view(2, 1, 2, 2)
    x = torch.zeros_like(y)
    assert distance(x, y, "sum").tolist() == [5.0, 25.0]
    assert distance(x, y, "mean").tolist() == distance(x, y).tolist() == [1.25, 6.25]


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("name", ["exponential", "sds"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_gradcheck_of_the_loss(prediction, name, reduction):
    """Central differences of Eq. 4 in the student's parameters, the target held where it is: sg,
    read literally."""
    teacher, student = make_teacher(prediction), TinyNet(channels=1, hidden=2, seed=7).double()
    t = torch.tensor([1, 500, 998])
    names, parameters = zip(*student.named_parameters(), strict=True)
    x_s, noise = randn(3, 1, 2, 2, seed=0), randn(3, 1, 2, 2, seed=1)
    cond, null = randn(3, 3, seed=2), randn(3, 3, seed=3)

    def x_hat(*values):
        weights = dict(zip(names, values, strict=True))
        return torch.func.functional_call(student, weights, (x_s, t, cond))

    target = reconstruction_target(
        teacher, x_hat(*parameters), noise, t, cond, guidance=3.0, null_cond=null
    )
    c_t = distillation_weight(name, *teacher.schedule.coefficients(t)).flatten()

    def losses(*values):
        return c_t * distance(x_hat(*values), target, reduction)

    assert torch.autograd.gradcheck(losses, parameters)
