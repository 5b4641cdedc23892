"""add.py, sections 6 and 7: what the teacher is asked, its target, and the spaces of the losses."""

import pytest
import torch
from helpers import column, draws, generator, make_add, make_batch, moved, optimizers, snapshot
from torch.nn import functional

from add import (
    Denoiser,
    NoiseSchedule,
    Student,
    distance,
    distillation_weight,
    reconstruction_target,
)

# --- the configuration reaches the loss -----------------------------------------------------------


@pytest.mark.parametrize("name", ["sds", "nfsd", "exponential"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_config_reaches_the_distillation_loss(name, reduction):
    config = {"weight": name, "sds_w": torch.ones_like, "reduction": reduction, "guidance": 3.0}
    model, batch = make_add(**config), make_batch()
    x_hat, g = make_batch(seed=5).x_0, generator(2)
    losses, target, t = model.distillation_loss(x_hat, x_hat, batch, generator(2))
    assert torch.equal(torch.randint(1000, (8,), generator=g), t)
    noise = torch.randn(x_hat.shape, dtype=torch.float64, generator=g)
    told = {"null_cond": batch.null_cond, "negative_cond": batch.negative_cond, "guidance": 3.0}
    expected = reconstruction_target(
        model.teacher, x_hat, noise, t, batch.teacher_cond, nfsd=name == "nfsd", **told
    )
    torch.testing.assert_close(target, expected)
    c_t = distillation_weight(name, *model.teacher.schedule.coefficients(t), torch.ones_like)
    torch.testing.assert_close(losses, c_t.flatten() * distance(x_hat, expected, reduction))


def test_the_teacher_takes_the_students_condition_unless_given_its_own():
    model, batch = make_add(), make_batch()
    x_hat = make_batch(seed=5).x_0

    def target():
        return model.distillation_loss(x_hat, x_hat, batch, generator())[1]

    with_own = target()
    batch.teacher_cond = None
    with_students = target()
    batch.teacher_cond = batch.cond
    assert torch.equal(with_students, target())
    assert (with_students - with_own).abs().max() > 1e-3


def test_guidance_range_draws_one_scale_an_image():
    """With ε̂ = condition the target shows the scale: all within (2, 4), all different, and drawn
    under the seed."""
    model, batch = make_add(guidance=(2.0, 4.0)), make_batch(64)
    schedule = model.teacher.schedule
    model.teacher = Denoiser(lambda x, t, c: c[:, :1, None, None].expand_as(x), schedule)
    x_hat = torch.zeros_like(batch.x_0)

    def scales():
        _, target, t = model.distillation_loss(x_hat, x_hat, batch, generator(2))
        alpha, sigma = column(schedule, t)
        g = generator(2)
        torch.randint(1000, (64,), generator=g)
        x_t = sigma * torch.randn(x_hat.shape, dtype=torch.float64, generator=g)
        eps_hat = ((x_t - alpha * target) / sigma)[:, 0, 0, 0]
        null, cond = batch.null_cond[:, 0], batch.teacher_cond[:, 0]
        return (eps_hat - null) / (cond - null)

    drawn = scales()
    assert 2 - 1e-6 <= drawn.min() < 2.3 and 3.7 < drawn.max() <= 4 + 1e-6
    assert drawn.diff().abs().min() > 1e-9 and torch.equal(drawn, scales())


def test_several_teacher_steps_are_ddim_at_equal_spacing():
    """k = 4 from t: t, 3t/4, t/2, t/4 rounded down; the target is the last one's x̂_0 by the
    formula."""
    model, batch = make_add(teacher_steps=4), make_batch()
    x_hat, (_, _, t, noise) = make_batch(seed=5).x_0, draws(model, batch, generator())
    target = reconstruction_target(model.teacher, x_hat, noise, t, batch.cond, steps=4)
    asked = [x for x, _, _ in model.teacher.network.calls]
    assert [x.tolist() for x in asked] == [[i * k // 4 for i in t.tolist()] for k in (4, 3, 2, 1)]
    x_0, eps = x_hat, noise
    for tau in asked:
        alpha, sigma = column(model.teacher.schedule, tau)
        x_t = alpha * x_0 + sigma * eps
        eps = model.teacher.network(x_t, tau, batch.cond).detach()
        x_0 = (x_t - sigma * eps) / alpha
    torch.testing.assert_close(target, x_0)


def test_the_configs_teacher_steps_reach_the_target():
    model, batch = make_add(teacher_steps=2), make_batch()
    half = model.student_half(batch, generator())
    _, _, t, noise = draws(model, batch, generator())
    expected = reconstruction_target(
        model.teacher, half.x_hat, noise, t, batch.teacher_cond, steps=2
    )
    torch.testing.assert_close(half.target, expected)


def test_teacher_timesteps_cover_the_schedule_except_zero_snr():
    """T = 2: both t occur; but with α_T = 0 nothing of x̂_θ is left at the last, and only t = 0
    does."""
    for last, expected in ((0.1, [0, 1]), (0.0, [0])):
        schedule = NoiseSchedule(torch.tensor([0.9, last], dtype=torch.float64))
        model = make_add(schedule=schedule, student="v", teacher="v", timesteps=(0, 1))
        assert model.student_half(make_batch(64), generator()).t.unique().tolist() == expected


def test_the_teachers_schedule_weighs_and_times_the_loss_whatever_the_students():
    """Two timesteps of the teacher, three of the student, of which the last has zero SNR."""
    model, batch = (
        make_add(schedule=NoiseSchedule(torch.tensor([0.81, 0.36])), timesteps=(0, 1)),
        make_batch(64),
    )
    own = NoiseSchedule(torch.tensor([0.9, 0.5, 0.0]))
    network, model.student = model.student.denoiser.network, None
    model.student = Student(Denoiser(network, own, "v"), (0, 1, 2))
    x_hat = make_batch(64, seed=5).x_0
    losses, target, t = model.double().distillation_loss(x_hat, x_hat, batch, generator())
    assert t.unique().tolist() == [0, 1]
    c_t = torch.tensor([0.9, 0.6], dtype=torch.float64)[t]
    torch.testing.assert_close(losses, c_t * distance(x_hat, target), rtol=1e-6, atol=0)


def test_a_range_of_guidance_gives_each_image_of_nfsd_a_scale():
    """Images of 4 × 2: a scale an image, not one a column."""
    model, batch = make_add(weight="nfsd", guidance=(2.0, 8.0)), make_batch(64)
    schedule = model.teacher.schedule
    model.teacher = Denoiser(lambda x, t, c: c[:, :1, None, None].expand_as(x), schedule)
    batch.negative_cond = batch.null_cond = torch.zeros_like(batch.null_cond)
    batch.teacher_cond = torch.ones_like(batch.teacher_cond)
    x_hat = batch.x_0[..., :2].contiguous()
    _, target, t = model.distillation_loss(x_hat, x_hat, batch, generator(2))
    alpha, sigma = column(schedule, t)
    scales = (x_hat - target) * alpha / sigma  # δ_D is 0 here, δ_C is 1
    assert (scales.flatten(1).std(1) < 1e-6).all()
    each = scales[:, 0, 0, 0]
    assert 2 <= each.min() < 3 and 7 < each.max() <= 8


def test_neither_codec_leaves_a_graph():
    """The VAE may not be frozen by whoever owns it."""
    model, modes, scale = make_add(), [], torch.ones((), dtype=torch.float64, requires_grad=True)

    def codec(x):
        modes.append(torch.is_grad_enabled())
        return x * scale

    model.student.denoiser.encode = codec
    model.teacher.decode = codec
    half = model.student_half(make_batch(), generator())
    assert modes == [False, False] and not half.target.requires_grad


# --- the spaces of student, teacher and discriminator ---------------------------------------------


def test_student_works_in_its_own_space_and_the_discriminator_in_pixels():
    """encode(x) = 2x: the network sees α 2 x_0 + σ ε at s < τ_n, F sees decode(x̂) and the reals as
    they are."""
    model, batch = make_add(), make_batch(32)
    denoiser = model.student.denoiser
    denoiser.encode, denoiser.decode = (lambda x: 2 * x), (lambda z: z / 2 + 1)
    half, _ = model.step(batch, *optimizers(model), generator(1))
    s, noise, _, _ = draws(model, batch, generator(1))
    ((_, _, x_s),) = denoiser.network.calls
    alpha, sigma = column(denoiser.schedule, s)
    below = s < 999
    torch.testing.assert_close(x_s[below], (alpha * 2 * batch.x_0 + sigma * noise)[below])
    assert torch.equal(x_s[~below], noise[~below])
    fakes, reals = (images for images, _ in model.discriminator.features.calls)
    x_hat = make_add().student(x_s, s, batch.cond)  # the student before its update
    torch.testing.assert_close(half.x_hat, x_hat.detach())
    torch.testing.assert_close(fakes, (x_hat / 2 + 1).detach())
    assert torch.equal(reals, batch.x_0) and torch.equal(half.pixels, fakes)


@pytest.mark.parametrize("space", ["pixel", "latent"])
def test_features_of_the_students_space_see_what_it_diffuses(space):
    """encode(x) = 2x: F sees x̂_θ and 2 x_0. Nothing is decoded, unless the distance is taken in
    pixels."""
    model, batch, decoded = make_add(space=space), make_batch(32), []
    for denoiser in (model.student.denoiser, model.teacher):
        denoiser.encode = lambda x: 2 * x
        denoiser.decode = lambda z: decoded.append(len(z)) or z / 2
    model.discriminator.space = "latent"
    half = model.student_half(batch, generator(1))
    gradients = torch.autograd.grad(half.loss, list(half.views.values()), retain_graph=True)
    assert all(x.abs().max() > 0 for x in gradients)
    model.discriminator_half(half)
    fakes, reals = (images for images, _ in model.discriminator.features.calls)
    assert torch.equal(fakes, half.x_hat) and torch.equal(reals, 2 * batch.x_0)
    assert decoded == ([32, 32] if space == "pixel" else [])
    assert (half.pixels is None) == (space == "latent")
    before = snapshot(model.student)
    model.step(batch, *optimizers(model), generator(1))
    assert moved(model.student, before)


def test_a_clipped_estimate_is_what_heads_and_teacher_get():
    model, batch = make_add(), make_batch(32)
    model.student.denoiser.clip = lambda x: x.clamp(-0.1, 0.1)
    half = model.student_half(batch, generator(1))
    assert half.pixels.abs().max() == pytest.approx(0.1) and half.pixels.std() > 0.01
    assert torch.equal(model.discriminator.features.calls[0][0], half.pixels)
    _, _, t, noise = draws(model, batch, generator(1))
    x_t = model.teacher.schedule.diffuse(half.pixels, noise, t)
    torch.testing.assert_close(model.teacher.network.calls[0][2], x_t)


class PoolingCodec:
    """A teacher's latents: 2x2 means, tripled; `with_gradient` tells under which mode encode
    ran."""

    def __init__(self):
        self.with_gradient = []

    def encode(self, pixels):
        self.with_gradient.append(torch.is_grad_enabled())
        return 3 * functional.avg_pool2d(pixels, 2)

    def decode(self, latents):
        return functional.interpolate(torch.sin(latents), scale_factor=2)


@pytest.mark.parametrize("space", ["pixel", "latent"])
def test_teacher_with_other_latents(space):
    """The student's pixels are encoded anew; the gradient goes through encode only where d is taken
    in latents."""
    model, batch = make_add(shared_latents=False, space=space), make_batch()
    teacher, codec = model.teacher, PoolingCodec()
    teacher.encode, teacher.decode = codec.encode, codec.decode
    x_hat, g = make_batch(seed=5).x_0.requires_grad_(), generator(4)
    pixels = torch.tanh(2 * x_hat)  # the student's own decoder
    losses, target, t = model.distillation_loss(pixels, x_hat, batch, generator(4))
    (got,) = torch.autograd.grad(losses.sum(), x_hat)
    assert codec.with_gradient == [space == "latent"]

    assert torch.equal(t, torch.randint(1000, (8,), generator=g))
    noise = torch.randn(8, 3, 2, 2, dtype=torch.float64, generator=g)
    alpha, sigma = column(teacher.schedule, t)
    z = 3 * functional.avg_pool2d(torch.tanh(2 * x_hat), 2)
    with torch.no_grad():
        z_t = alpha * z + sigma * noise
        expected = (z_t - sigma * teacher.network(z_t, t, batch.teacher_cond)) / alpha
        if space == "pixel":
            expected = codec.decode(expected)
    torch.testing.assert_close(target, expected)
    compared = torch.tanh(2 * x_hat) if space == "pixel" else z
    loss = alpha.flatten() * (compared - expected).square().mean((1, 2, 3))
    torch.testing.assert_close(losses, loss)
    torch.testing.assert_close(got, torch.autograd.grad(loss.sum(), x_hat)[0])
    assert got.abs().max() > 0


def test_the_student_half_hands_pixels_to_a_teacher_with_other_latents():
    """Also where the distance is measured in latents, which are the teacher's."""
    model, batch = make_add(shared_latents=False, space="latent"), make_batch()
    model.student.denoiser.encode = lambda x: 2 * x
    model.student.denoiser.decode = lambda z: torch.sin(z)
    codec = PoolingCodec()
    model.teacher.encode, model.teacher.decode = codec.encode, codec.decode
    half = model.student_half(batch, generator(1))
    torch.testing.assert_close(half.pixels, torch.sin(half.x_hat))
    assert torch.equal(half.views["distillation"], half.pixels)
    alpha, _ = column(model.teacher.schedule, half.t)
    distances = (codec.encode(half.pixels) - half.target).square().mean((1, 2, 3))
    torch.testing.assert_close(half.distillation, alpha.flatten() * distances)


@pytest.mark.parametrize("space", ["pixel", "latent"])
def test_shared_latents_are_diffused_as_they_are(space):
    """No second encoding; in pixels d compares decoded images, the student's with its graph, in
    latents the latents."""
    model, batch = make_add(space=space), make_batch()
    model.teacher.encode, model.teacher.decode = None, lambda z: torch.sin(z)
    x_hat, g = make_batch(seed=5).x_0.requires_grad_(), generator(4)
    compared = torch.sin(x_hat) if space == "pixel" else x_hat
    losses, target, t = model.distillation_loss(compared, x_hat, batch, generator(4))
    torch.randint(1000, (8,), generator=g)
    noise = torch.randn(x_hat.shape, dtype=torch.float64, generator=g)
    expected = reconstruction_target(model.teacher, x_hat, noise, t, batch.teacher_cond)
    if space == "pixel":
        expected = torch.sin(expected)
    torch.testing.assert_close(target, expected)
    alpha, _ = column(model.teacher.schedule, t)
    loss = alpha.flatten() * (compared - expected).square().mean((1, 2, 3))
    torch.testing.assert_close(losses, loss)
    gradient, wanted = (
        torch.autograd.grad(x.sum(), x_hat, retain_graph=True)[0] for x in (losses, loss)
    )
    torch.testing.assert_close(gradient, wanted)
    assert gradient.abs().max() > 0
