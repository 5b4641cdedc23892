"""add.py, section 7: who moves in which half, the cheap step against the naive one, what a step costs, its errors."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    NoBackward,
    assert_refused,
    column,
    draws,
    generator,
    gradients,
    make_add,
    make_batch,
    moved,
    naive_c_img,
    naive_discriminator_loss,
    naive_student,
    naive_student_loss,
    sd_schedule,
    snapshot,
)
from torch import nn

from add import (
    ADD,
    AUGMENTATIONS,
    ADDConfig,
    Denoiser,
    NoiseSchedule,
    Student,
    distance,
    reconstruction_target,
    weight,
)

PREDICTIONS = ("epsilon", "v", "x_0")


def optimizers(model, lr=0.1):
    return (torch.optim.SGD(part.parameters(), lr=lr) for part in (model.student, model.discriminator.heads))


def assert_gradients_close(got, expected, rtol=1e-9, atol=1e-12):
    """Float64 rounding, some 1e-16, through a dozen layers and sums over a few hundred elements."""
    assert len(got) == len(expected)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


# --- gradient flow ---------------------------------------------------------------------------------------------------

# BIASES: a convolution's bias is undone by the batch norm behind it; the last one's gradient cancels between reals and
# fakes within the hinge's margins. So parameters of one axis may stay where they are, those of more must not.
EVERY_LOSS = [{}, {"weight": "sds", "space": "diffused"}, {"weight": "nfsd", "guidance": 7.5}, {"guidance": (2.0, 4.0)}]


@pytest.mark.parametrize("config", EVERY_LOSS)
def test_student_half_has_gradients_for_the_student_alone(config):
    model = make_add(**config)
    model.student_half(make_batch(), generator()).loss.backward()
    assert all(g is not None and g.abs().max() > 0 for g in gradients(model.student))
    for part in (model.discriminator, model.teacher):
        assert all(g is None for g in gradients(part))


@pytest.mark.parametrize("config", EVERY_LOSS)
def test_discriminator_half_has_gradients_for_the_heads_alone(config):
    model, batch = make_add(**config), make_batch()
    half = model.student_half(batch, generator())
    model.discriminator_half(half)[0].backward()
    for name, p in model.discriminator.heads.named_parameters():
        assert p.grad is not None and (p.grad.abs().max() > 1e-9 or p.ndim == 1), name  # BIASES
    for part in (model.student, model.discriminator.features, model.teacher):
        assert all(g is None for g in gradients(part))


def test_what_the_student_half_hands_on_has_no_graph():
    """Only the loss does: kept for a log, the rest must not keep the student's activations."""
    half = make_add().student_half(make_batch(), generator())
    assert half.loss.requires_grad and half.loss.shape == ()
    for x in (half.pixels, half.target, half.c_img, *half.fake_tokens, *half.log.values()):
        assert not x.requires_grad


@pytest.mark.parametrize("config", EVERY_LOSS)
def test_a_step_moves_student_and_heads_and_nothing_else(config):
    """Three steps after .train() on a parent: F and the teacher keep parameters and statistics bit for bit."""
    model, batch = make_add(augment=AUGMENTATIONS, **config), make_batch()
    nn.ModuleDict({"add": model}).train()
    before, steps = snapshot(model), optimizers(model)
    for student_optimizer, heads_optimizer in [tuple(steps)] * 3:
        model.step(batch, student_optimizer, heads_optimizer, generator())
    changed = set(moved(model, before))
    assert {name for name, p in model.named_parameters() if p.requires_grad and p.ndim > 1} <= changed  # BIASES
    assert all(name.startswith(("student.denoiser.network.", "discriminator.heads.")) for name in changed)


@pytest.mark.parametrize("wrap", [lambda m: m, nn.Sequential, lambda m: nn.Sequential(nn.Sequential(m))])
def test_frozen_networks_never_leave_eval_mode(wrap):
    model = make_add()
    parent = wrap(model)
    for mode in (True, False, True):
        assert parent.train(mode) is parent
        for frozen in (model.teacher, model.discriminator.features):
            assert not any(module.training for module in frozen.modules())
        trained = model.student.denoiser.network, model.discriminator.heads
        assert all(module.training == mode for part in trained for module in part.modules())


def test_a_fresh_add_has_its_frozen_networks_in_eval_mode():
    model = make_add()
    assert not any(m.training for part in (model.teacher, model.discriminator.features) for m in part.modules())
    assert not any(p.requires_grad for part in (model.teacher, model.discriminator.features) for p in part.parameters())
    assert all(p.requires_grad for part in (model.student, model.discriminator.heads) for p in part.parameters())


@pytest.mark.parametrize("config", EVERY_LOSS + [{"teacher_steps": 4}])
def test_the_teacher_is_never_differentiated(config):
    """Neither it nor its input: its backward raises, and it runs without gradient."""
    model = make_add(**config)
    network = model.teacher.network
    model.teacher.network = NoBackward(network).eval()
    model.student_half(make_batch(), generator()).loss.backward()
    assert network.calls and not any(with_gradient for _, with_gradient, _ in network.calls)


@pytest.mark.parametrize("space", ["pixel", "diffused"])
def test_the_target_is_a_constant_of_the_loss(space):
    """The gradient with respect to x̂ is that of c(t) ‖x̂ - target‖² with the target copied as numbers."""
    model, batch = make_add(space=space), make_batch()
    x_hat = make_batch(seed=5).x_0.requires_grad_()
    losses, target, t = model.distill(x_hat, x_hat, batch, generator())
    (got,) = torch.autograd.grad(losses.sum(), x_hat)
    numbers = torch.tensor(target.tolist(), dtype=torch.float64)
    alpha, _ = column(model.teacher.schedule, t)
    torch.testing.assert_close(got, 2 * alpha * (x_hat - numbers).detach() / x_hat[0].numel())


def test_heads_are_frozen_for_the_student_half_and_as_before_afterwards():
    """Also one that the caller had frozen, and after an error."""
    model = make_add()
    first, *others = model.discriminator.heads.parameters()
    first.requires_grad_(False)
    model.student_half(make_batch(), generator())
    assert not first.requires_grad and all(p.requires_grad for p in others)

    def fail(images):
        assert not any(p.requires_grad for p in model.discriminator.heads.parameters())
        raise RuntimeError("out of memory")

    model.discriminator.features.forward = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        model.student_half(make_batch(), generator())
    assert not first.requires_grad and all(p.requires_grad for p in others)


def test_r1_stops_at_the_heads_input():
    """F's backward raises, gradient mode or not; the heads' half never calls it."""
    model, batch = make_add(gamma=1.0), make_batch()
    model.discriminator.features = NoBackward(model.discriminator.features).eval()
    half = model.student_half(batch, generator())
    loss, log = model.discriminator_half(half)
    loss.backward()
    assert log["r1"] > 0 and all(g is not None for g in gradients(model.discriminator.heads))
    with pytest.raises(AssertionError, match="differentiated"):
        half.loss.backward()  # the student's half needs it: the trap works


# --- the cheap step is the paper's -----------------------------------------------------------------------------------


@pytest.mark.parametrize("student", PREDICTIONS)
@pytest.mark.parametrize("teacher", PREDICTIONS)
def test_student_half_equals_eq_1(student, teacher):
    """Loss and gradients, from the paper's formulas and the same draws."""
    model, batch = make_add(student=student, teacher=teacher), make_batch()
    model.discriminator.heads.eval()
    half = model.student_half(batch, generator(1))
    half.loss.backward()
    got, (s, noise, t, noise_2) = gradients(model.student), draws(model, batch, generator(1))
    assert torch.equal(half.s, s) and torch.equal(half.t, t)
    model.student.zero_grad()
    expected = naive_student_loss(model, batch, s, noise, t, noise_2)
    expected.backward()
    torch.testing.assert_close(half.loss, expected)
    assert_gradients_close(got, gradients(model.student))
    torch.testing.assert_close(half.pixels, naive_student(model, batch, s, noise).detach())


def test_cheap_step_equals_the_naive_step():
    """Three steps: fakes and their features computed again in a pass of their own, reals with a graph through F."""
    cheap, batch = make_add(gamma=0.1), make_batch(12)
    naive = copy.deepcopy(cheap)
    cheap_optimizers, (student_optimizer, heads_optimizer) = tuple(optimizers(cheap)), optimizers(naive)
    for i in range(3):
        half = cheap.step(batch, *cheap_optimizers, generator(i))

        s, noise, t, noise_2 = draws(naive, batch, generator(i))
        old_student = copy.deepcopy(naive.student)
        loss = naive_student_loss(naive, batch, s, noise, t, noise_2)
        for optimizer, value in ((student_optimizer, loss), (heads_optimizer, None)):
            if value is None:  # the fakes are those of the student before its update
                new_student, naive.student = naive.student, old_student
                value = naive_discriminator_loss(naive, batch, s, noise)
                naive.student = new_student
            naive.zero_grad()
            value.backward()
            optimizer.step()
        torch.testing.assert_close(half.log["student_loss"], loss.detach())
        torch.testing.assert_close(half.log["discriminator_loss"], value.detach())
    for (name, got), expected in zip(cheap.state_dict().items(), naive.state_dict().values(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_step_ignores_gradients_left_over():
    """A previous half's, say: both optimisers start from zero."""
    clean, batch = make_add(), make_batch()
    stale = copy.deepcopy(clean)
    for p in stale.parameters():
        if p.requires_grad:
            p.grad = torch.full_like(p, 100)
    for model in (clean, stale):
        model.step(batch, *optimizers(model), generator())
    assert moved(stale, clean.state_dict()) == []


def test_lambda_and_gamma_weigh_their_terms():
    """L(λ) = adversarial + λ distillation; L_D(γ) = hinge + γ R1; the log holds the parts."""
    batch = make_batch()
    for value in (0.0, 0.7, 2.5):
        model = make_add(lambda_=value, gamma=value)
        half = model.student_half(batch, generator())
        assert half.log["adversarial"].abs() > 1e-3 and half.log["distillation"] > 1e-3
        torch.testing.assert_close(half.loss, half.log["adversarial"] + value * half.log["distillation"])
        loss, log = model.discriminator_half(half)
        torch.testing.assert_close(loss, log["hinge"] + value * log["r1"])
        assert (log["r1"] > 0) == (value > 0)  # not even computed when it has no weight


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_real_features_carry_a_graph_only_where_r1_needs_it(gamma):
    model, batch = make_add(gamma=gamma), make_batch()
    half, seen, heads = model.student_half(batch, generator()), [], model.discriminator.heads.forward
    model.discriminator.heads.forward = lambda x, *c: seen.append([y.requires_grad for y in x]) or heads(x, *c)
    model.discriminator_half(half)
    assert seen == [[gamma > 0] * 2, [False] * 2]  # reals, fakes


def test_paper_defaults():
    config = ADDConfig()
    assert (config.lambda_, config.gamma, config.weight, config.teacher_steps) == (2.5, 1e-5, "exponential", 1)


@pytest.mark.parametrize("name", ["sds", "nfsd", "exponential"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_config_reaches_the_distillation_loss(name, reduction):
    model, batch = make_add(weight=name, sds_w="one", reduction=reduction, guidance=3.0), make_batch()
    x_hat = make_batch(seed=5).x_0
    losses, target, t = model.distill(x_hat, x_hat, batch, generator(2))
    g = generator(2)
    assert torch.equal(torch.randint(1000, (8,), generator=g), t)
    noise = torch.randn(x_hat.shape, dtype=torch.float64, generator=g)
    expected = reconstruction_target(
        model.teacher, x_hat, noise, t, batch.teacher_cond, guidance=3.0, null_cond=batch.null_cond,
        negative_cond=batch.negative_cond, nfsd=name == "nfsd",
    )  # fmt: skip
    torch.testing.assert_close(target, expected)
    c_t = weight(name, *model.teacher.schedule.coefficients(t), "one").flatten()
    torch.testing.assert_close(losses, c_t * distance(x_hat, expected, reduction))


def test_the_teacher_takes_the_students_condition_unless_given_its_own():
    model, batch = make_add(), make_batch()
    x_hat = make_batch(seed=5).x_0
    with_own = model.distill(x_hat, x_hat, batch, generator())[1]
    batch.teacher_cond = None
    with_students = model.distill(x_hat, x_hat, batch, generator())[1]
    batch.teacher_cond = batch.cond
    assert torch.equal(with_students, model.distill(x_hat, x_hat, batch, generator())[1])
    assert (with_students - with_own).abs().max() > 1e-3


def test_guidance_range_draws_one_scale_an_image():
    """With ε̂ = condition the target shows the scale: all within (2, 4), all different, and drawn under the seed."""
    schedule, batch = sd_schedule(), make_batch(64)
    model = make_add(guidance=(2.0, 4.0))
    model.teacher = Denoiser(lambda x, t, c: c[:, :1, None, None].expand_as(x), schedule)
    x_hat = torch.zeros_like(batch.x_0)

    def scales():
        _, target, t = model.distill(x_hat, x_hat, batch, generator(2))
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


def test_step_logs_what_it_says():
    """Each value against its definition, from the networks before the step."""
    model, batch = make_add(gamma=0.3), make_batch()
    model.discriminator.heads.eval()
    before = copy.deepcopy(model)
    half = model.step(batch, *optimizers(model), generator(1))
    s, noise, t, noise_2 = draws(before, batch, generator(1))
    c = batch.c_text, naive_c_img(before, batch, s)
    discriminator = before.discriminator
    real = discriminator.heads(discriminator.features(batch.x_0), *c)
    fake = discriminator.heads(discriminator.features(naive_student(before, batch, s, noise)), *c)
    alpha, _ = column(before.teacher.schedule, t)
    distillation = (alpha.flatten() * ((half.pixels - half.target) ** 2).mean((1, 2, 3))).mean()
    expected = {
        "adversarial": -sum(x.mean() for x in fake),
        "distillation": distillation,
        "student_loss": -sum(x.mean() for x in fake) + 2.5 * distillation,
        "hinge": sum(F.relu(1 - x).mean() for x in real) + sum(F.relu(1 + x).mean() for x in fake),
        "logit_real": sum(x.mean() for x in real) / 2,
        "logit_fake": sum(x.mean() for x in fake) / 2,
        "sign_real": sum(x.sign().mean() for x in real) / 2,
        "sign_fake": sum(x.sign().mean() for x in fake) / 2,
    }
    expected["discriminator_loss"] = expected["hinge"] + 0.3 * half.log["r1"]
    health = {"discriminator_won", *(f"distillation_t{t}" for t in (0, 250, 500, 750))}  # see test_health.py
    health |= {f"gradient_{name}" for name in ("adversarial", "distillation", "student", "heads")}
    assert half.log.keys() == expected.keys() | {"r1"} | health
    for name, value in expected.items():
        torch.testing.assert_close(half.log[name], value.detach(), msg=lambda m, name=name: f"{name}: {m}")


def test_a_step_is_deterministic_under_its_generator():
    batch = make_batch()
    losses = []
    for seed in (0, 0, 1):
        model = make_add(augment=AUGMENTATIONS, guidance=(1.0, 3.0))
        torch.manual_seed(len(losses))  # torch's own generator must not matter
        log = model.step(batch, *optimizers(model), generator(seed)).log
        losses.append(torch.stack([log["student_loss"], log["discriminator_loss"]]))
    assert torch.equal(losses[0], losses[1]) and (losses[0] != losses[2]).all()


def test_reals_and_fakes_are_augmented_and_the_fakes_once():
    """F sees augmented images only: two different passes, and the heads' half reads the first one's features again."""
    model, batch = make_add(augment=["color"]), make_batch()
    half = model.student_half(batch, generator(1))
    (fakes, _), = model.discriminator.features.calls
    assert (fakes - half.pixels).abs().amax((1, 2, 3)).min() > 1e-3
    g = generator(5)
    model.discriminator_half(half, g)
    _, (reals, _) = model.discriminator.features.calls
    torch.testing.assert_close(reals, AUGMENTATIONS["color"](batch.x_0, generator(5)))
    for got, expected in zip(half.fake_tokens, model.discriminator.features(fakes), strict=True):
        torch.testing.assert_close(got, expected)


def test_student_half_raises_the_logits_of_fakes_and_the_heads_half_parts_them():
    """The signs of Eq. 2 and Eq. 3, from logits alone: one small step of each."""
    model, batch = make_add(lambda_=0.0, gamma=0.0), make_batch()
    model.discriminator.heads.eval()
    s, noise, _, _ = draws(model, batch, generator())
    c = batch.c_text, naive_c_img(model, batch, s)

    def logits(model, heads):
        """Means over reals and over fakes."""
        images = batch.x_0, naive_student(model, batch, s, noise)
        return [sum(y.mean() for y in heads(model.discriminator.features(x), *c)).item() for x in images]

    old = copy.deepcopy(model)
    model.step(batch, *optimizers(model, lr=0.01), generator())
    old_heads, new_heads = old.discriminator.heads, model.discriminator.heads
    real, fake = logits(old, old_heads)
    assert logits(model, old_heads)[1] > fake + 1e-4
    new_real, new_fake = logits(old, new_heads)
    assert new_real - new_fake > real - fake + 1e-4


def test_external_loop_with_gradient_accumulation():
    """Two micro-batches of 8, loss / 2 each, are one batch of 16: local batch norm's groups are the same."""
    model, batch = make_add(), make_batch(16)
    model.discriminator.heads.eval()
    halves, drawn = [], []
    for i in range(2):
        part = copy.copy(batch)
        for name, value in vars(batch).items():
            setattr(part, name, value[8 * i : 8 * i + 8])
        drawn.append(draws(model, part, generator(i)))
        half = model.student_half(part, generator(i))
        (half.loss / 2).backward()
        halves.append(half)
    accumulated = gradients(model.student)
    for half in halves:
        (model.discriminator_half(half)[0] / 2).backward()
    accumulated_heads = gradients(model.discriminator.heads)
    assert_gradients_close(accumulated, gradients(model.student), 0, 0)

    model.zero_grad()
    s, noise, t, noise_2 = (torch.cat(x) for x in zip(*drawn, strict=True))
    naive_student_loss(model, batch, s, noise, t, noise_2).backward()
    assert_gradients_close(accumulated, gradients(model.student))
    model.zero_grad()
    naive_discriminator_loss(model, batch, s, noise).backward()
    assert_gradients_close(accumulated_heads, gradients(model.discriminator.heads))


# --- what a step costs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "teacher_calls"),
    [
        ({}, 1),
        ({"guidance": 3.0}, 2),
        ({"guidance": (2.0, 4.0)}, 2),
        ({"weight": "nfsd", "guidance": 7.5}, 3),
        ({"teacher_steps": 2}, 2),
        ({"teacher_steps": 4}, 4),
        ({"teacher_steps": 4, "guidance": 3.0}, 8),
    ],
)
def test_calls_per_step(config, teacher_calls):
    """One student forward; F once over the fakes with gradient, once over the reals without; the teacher without."""
    model, batch = make_add(**config), make_batch()
    half = model.step(batch, *optimizers(model), generator())
    student, teacher, features = (
        x.calls for x in (model.student.denoiser.network, model.teacher.network, model.discriminator.features)
    )
    assert [with_gradient for _, with_gradient, _ in student] == [True]
    assert [with_gradient for _, with_gradient, _ in teacher] == [False] * teacher_calls
    (fakes, with_gradient), (reals, without) = features
    assert with_gradient and not without
    assert torch.equal(fakes, half.pixels) and torch.equal(reals, batch.x_0)


def test_several_teacher_steps_are_ddim_at_equal_spacing():
    """k = 4 from t: t, 3t/4, t/2, t/4 rounded down; the target is the last one's x̂_0 by the formula."""
    model, batch = make_add(teacher_steps=4), make_batch()
    x_hat, (s, _, t, noise) = make_batch(seed=5).x_0, draws(model, batch, generator())
    target = reconstruction_target(model.teacher, x_hat, noise, t, batch.cond, steps=4)
    asked = [x for x, _, _ in model.teacher.network.calls]
    assert [x.tolist() for x in asked] == [[i * k // 4 for i in t.tolist()] for k in (4, 3, 2, 1)]
    alpha, sigma = column(model.teacher.schedule, t)
    x_t = alpha * x_hat + sigma * noise
    for tau in asked:
        alpha, sigma = column(model.teacher.schedule, tau)
        if tau is not asked[0]:
            x_t = alpha * x_0 + sigma * eps
        eps = model.teacher.network(x_t, tau, batch.cond).detach()
        x_0 = (x_t - sigma * eps) / alpha
    torch.testing.assert_close(target, x_0)


def test_teacher_timesteps_cover_the_schedule_except_zero_snr():
    """T = 2: both t occur; but with α_T = 0 nothing of x̂_θ is left at the last, and only t = 0 does."""
    for last, expected in ((0.1, [0, 1]), (0.0, [0])):
        schedule = NoiseSchedule(torch.tensor([0.9, last], dtype=torch.float64))
        model = make_add(schedule=schedule, student="v", teacher="v", timesteps=(0, 1))
        assert model.student_half(make_batch(64), generator()).t.unique().tolist() == expected


# --- conditions of the discriminator ---------------------------------------------------------------------------------


def test_c_img_is_zero_at_tau_n_for_fakes_and_for_their_real_partners():
    """The heads are called three times in a step and are told the same each time."""
    model, batch = make_add(), make_batch(32)
    told, heads = [], model.discriminator.heads.forward
    model.discriminator.heads.forward = lambda *inputs: told.append(inputs[1:]) or heads(*inputs)
    before = batch.c_img.clone()
    half = model.step(batch, *optimizers(model), generator())
    terminal = half.s == 999
    assert 0 < terminal.sum() < 32
    assert (half.c_img[terminal] == 0).all() and torch.equal(half.c_img[~terminal], before[~terminal])
    assert torch.equal(batch.c_img, before)
    assert len(told) == 3
    for c_text, c_img in told:
        assert torch.equal(c_text, batch.c_text) and torch.equal(c_img, half.c_img)


def test_a_step_without_conditions():
    model, batch = make_add(), make_batch()
    model.discriminator.heads = type(model.discriminator.heads)([4, 6], hidden=5, kernel=3).double()
    batch.c_text = batch.c_img = None
    half = model.step(batch, *optimizers(model), generator())
    assert half.c_img is None and half.log["r1"] > 0


# --- latent spaces ---------------------------------------------------------------------------------------------------


def test_student_works_in_its_own_space_and_the_discriminator_in_pixels():
    """encode(x) = 2x: the network sees α 2 x_0 + σ ε at s < τ_n, F sees decode(x̂) and the reals as they are."""
    model, batch = make_add(), make_batch(32)
    denoiser = model.student.denoiser
    denoiser.encode, denoiser.decode = (lambda x: 2 * x), (lambda z: z / 2 + 1)
    half = model.step(batch, *optimizers(model), generator(1))
    s, noise, _, _ = draws(model, batch, generator(1))
    (_, _, x_s), = denoiser.network.calls
    alpha, sigma = column(denoiser.schedule, s)
    below = s < 999
    torch.testing.assert_close(x_s[below], (alpha * 2 * batch.x_0 + sigma * noise)[below])
    assert torch.equal(x_s[~below], noise[~below])
    fakes, reals = (images for images, _ in model.discriminator.features.calls)
    before = make_add()
    before.student.denoiser.encode = denoiser.encode
    x_hat = before.student(x_s, s, batch.cond)
    torch.testing.assert_close(fakes, (x_hat / 2 + 1).detach())
    assert torch.equal(reals, batch.x_0) and torch.equal(half.pixels, fakes)


@pytest.mark.parametrize("space", ["pixel", "diffused"])
def test_features_of_the_students_space_see_what_it_diffuses(space):
    """encode(x) = 2x: F sees x̂_θ and 2 x_0. Nothing is decoded, unless the distance is taken in pixels."""
    model, batch, decoded = make_add(space=space), make_batch(32), []
    for denoiser in (model.student.denoiser, model.teacher):
        denoiser.encode, denoiser.decode = (lambda x: 2 * x), (lambda z: decoded.append(len(z)) or z / 2)
    model.discriminator.space = "diffused"
    before = snapshot(model.student)
    half = model.step(batch, *optimizers(model), generator(1))
    fakes, reals = (images for images, _ in model.discriminator.features.calls)
    assert torch.equal(fakes, half.x_hat) and torch.equal(reals, 2 * batch.x_0)
    assert decoded == ([32, 32] if space == "pixel" else []) and (half.pixels is None) == (space == "diffused")
    assert half.log["gradient_adversarial"] > 0 and half.log["gradient_distillation"] > 0 and moved(model.student, before)


def test_a_clipped_estimate_is_what_heads_and_teacher_get():
    model, batch = make_add(), make_batch(32)
    model.student.denoiser.clip = lambda x: x.clamp(-0.1, 0.1)
    half = model.student_half(batch, generator(1))
    assert half.pixels.abs().max() == pytest.approx(0.1) and half.pixels.std() > 0.01
    assert torch.equal(model.discriminator.features.calls[0][0], half.pixels)
    _, _, t, noise = draws(model, batch, generator(1))
    torch.testing.assert_close(model.teacher.network.calls[0][2], model.teacher.schedule.diffuse(half.pixels, noise, t))


class PoolingCodec:
    """A teacher's latents: 2x2 means, tripled; `with_gradient` tells under which mode encode ran."""

    def __init__(self):
        self.with_gradient = []

    def encode(self, pixels):
        self.with_gradient.append(torch.is_grad_enabled())
        return 3 * F.avg_pool2d(pixels, 2)

    def decode(self, latents):
        return F.interpolate(torch.sin(latents), scale_factor=2)


@pytest.mark.parametrize("space", ["pixel", "diffused"])
def test_teacher_with_other_latents(space):
    """The student's pixels are encoded anew; the gradient goes through encode only where d is taken in latents."""
    model, batch, codec = make_add(shared_latents=False, space=space), make_batch(), PoolingCodec()
    teacher = model.teacher
    teacher.encode, teacher.decode = codec.encode, codec.decode
    x_hat = make_batch(seed=5).x_0.requires_grad_()
    pixels = torch.tanh(2 * x_hat)  # the student's own decoder
    losses, target, t = model.distill(x_hat, pixels, batch, generator(4))
    (got,) = torch.autograd.grad(losses.sum(), x_hat)
    assert codec.with_gradient == [space == "diffused"]

    g = generator(4)
    assert torch.equal(t, torch.randint(1000, (8,), generator=g))
    noise = torch.randn(8, 3, 2, 2, dtype=torch.float64, generator=g)
    alpha, sigma = column(teacher.schedule, t)
    z = 3 * F.avg_pool2d(torch.tanh(2 * x_hat), 2)
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


@pytest.mark.parametrize("space", ["pixel", "diffused"])
def test_shared_latents_are_diffused_as_they_are(space):
    """No second encoding; in pixels d compares decoded images, the student's with its graph, in latents the latents."""
    model, batch = make_add(space=space), make_batch()
    model.teacher.encode, model.teacher.decode = None, lambda z: torch.sin(z)
    x_hat = make_batch(seed=5).x_0.requires_grad_()
    losses, target, t = model.distill(x_hat, torch.sin(x_hat), batch, generator(4))
    g = generator(4)
    torch.randint(1000, (8,), generator=g)
    noise = torch.randn(x_hat.shape, dtype=torch.float64, generator=g)
    expected, compared = reconstruction_target(model.teacher, x_hat, noise, t, batch.teacher_cond), x_hat
    if space == "pixel":
        expected, compared = torch.sin(expected), torch.sin(x_hat)
    torch.testing.assert_close(target, expected)
    alpha, _ = column(model.teacher.schedule, t)
    loss = alpha.flatten() * (compared - expected).square().mean((1, 2, 3))
    torch.testing.assert_close(losses, loss)
    gradient, wanted = (torch.autograd.grad(x.sum(), x_hat)[0] for x in (losses, loss))
    torch.testing.assert_close(gradient, wanted)


# --- errors ----------------------------------------------------------------------------------------------------------


def without(name, **config):
    batch = make_batch()
    setattr(batch, name, None)
    return make_add(**config).student_half(batch, generator())


def target_in_steps(steps):
    model, batch = make_add(), make_batch()
    t = torch.full((8,), 500)
    null = {"null_cond": batch.null_cond, "negative_cond": batch.negative_cond}
    reconstruction_target(model.teacher, batch.x_0, batch.x_0, t, batch.cond, steps=steps, nfsd=True, **null)


ONE = torch.ones(1)
ERRORS = {
    "weight": (lambda: ADDConfig(weight="snr"), ["weight='snr'", "'exponential'", "'sds'", "'nfsd'"]),
    "weight()": (lambda: weight("snr", ONE, ONE), ["weight='snr'", "'exponential'", "'sds'", "'nfsd'"]),
    "sds_w": (lambda: ADDConfig(sds_w="two"), ["sds_w='two'", "'one'", "'sigma_squared'"]),
    "weight(w)": (lambda: weight("sds", ONE, ONE, "two"), ["sds_w='two'", "'one'", "'sigma_squared'"]),
    "space": (lambda: ADDConfig(space="latent"), ["space='latent'", "'pixel'", "'diffused'"]),
    "reduction": (lambda: ADDConfig(reduction="max"), ["reduction='max'", "'mean'", "'sum'"]),
    "distance(reduction)": (lambda: distance(ONE, ONE, "max"), ["reduction='max'", "'mean'", "'sum'"]),
    "distance shapes": (lambda: distance(torch.ones(2, 3), torch.ones(2, 1)), ["x (2, 3)", "y (2, 1)", "one shape"]),
    "lambda_ < 0": (lambda: ADDConfig(lambda_=-1.0), ["lambda_=-1.0", "finite", "at least 0"]),
    "lambda_ nan": (lambda: ADDConfig(lambda_=float("nan")), ["lambda_=nan", "finite", "at least 0"]),
    "guidance range that falls": (lambda: ADDConfig(guidance=(4.0, 2.0)), ["guidance=(4.0, 2.0)", "rising"]),
    "guidance nan": (lambda: ADDConfig(guidance=float("nan")), ["guidance=nan", "finite"]),
    "teacher_steps 1.5": (lambda: ADDConfig(teacher_steps=1.5), ["teacher_steps=1.5", "whole"]),
    "gamma inf": (lambda: ADDConfig(gamma=float("inf")), ["gamma=inf", "finite", "at least 0"]),
    "gamma < 0": (lambda: ADDConfig(gamma=-1e-5), ["gamma=-1e-05", "finite", "at least 0"]),
    "teacher_steps": (lambda: ADDConfig(teacher_steps=0), ["teacher_steps=0", "at least 1"]),
    "teacher_steps of nfsd": (lambda: ADDConfig(weight="nfsd", teacher_steps=2), ["teacher_steps=2", "'nfsd'"]),
    "steps of an nfsd target": (lambda: target_in_steps(2), ["teacher_steps=2", "'nfsd'", "teacher_steps=1"]),
    "guidance without null_cond": (lambda: without("null_cond", guidance=2.0), ["guidance=2.0", "null_cond"]),
    "range without null_cond": (lambda: without("null_cond", guidance=(2.0, 3.0)), ["guidance=", "null_cond"]),
    "nfsd without null_cond": (lambda: without("null_cond", weight="nfsd"), ["'nfsd'", "null_cond"]),
    "nfsd without negative_cond": (lambda: without("negative_cond", weight="nfsd"), ["'nfsd'", "negative_cond"]),
    "c_text missing": (lambda: without("c_text"), ["c_text", "None", "(8, 4)"]),
    "c_img missing": (lambda: without("c_img"), ["c_img", "None", "(8, 5)"]),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_argument_value_and_what_is_allowed(case):
    assert_refused(*ERRORS[case])


def test_teacher_steps_of_one_are_allowed_with_nfsd():
    assert ADDConfig(weight="nfsd", teacher_steps=1).weight == "nfsd"
    target_in_steps(1)


def test_a_student_that_is_its_own_teacher_is_refused():
    """Freezing the teacher would freeze the student, silently."""
    network = nn.Linear(1, 1)
    denoiser = Denoiser(network, NoiseSchedule.cosine(), "v")
    with pytest.raises(ValueError, match="share parameters.*deepcopy"):
        ADD(Student(denoiser), denoiser, nn.Identity())
    assert all(p.requires_grad for p in network.parameters())
