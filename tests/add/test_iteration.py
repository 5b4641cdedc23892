"""add.py, section 7: the cheap iteration against the paper's, written naively; what it costs."""

import copy

import pytest
import torch
from helpers import (
    assert_gradients_close,
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
    optimizers,
)
from torch.nn import functional

from add import DiscriminatorHeads
from common.augment import AUGMENTATIONS

PREDICTIONS = ("epsilon", "v", "x_0")

# --- the cheap step is the paper's ----------------------------------------------------------------


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
    """Three steps: fakes and their features computed again in a pass of their own, reals with a
    graph through F."""
    cheap, batch = make_add(gamma=0.1), make_batch(12)
    naive = copy.deepcopy(cheap)
    cheap_optimizers, (student_optimizer, heads_optimizer) = optimizers(cheap), optimizers(naive)
    for i in range(10):
        student, heads = cheap.step(batch, *cheap_optimizers, generator(i))

        s, noise, t, noise_2 = draws(naive, batch, generator(i))
        old_student = copy.deepcopy(naive.student)
        student_loss = naive_student_loss(naive, batch, s, noise, t, noise_2)
        naive.zero_grad()
        student_loss.backward()
        student_optimizer.step()
        # The fakes are those of the student before its update.
        new_student, naive.student = naive.student, old_student
        heads_loss = naive_discriminator_loss(naive, batch, s, noise)
        naive.student = new_student
        naive.zero_grad()
        heads_loss.backward()
        heads_optimizer.step()
        torch.testing.assert_close(student.loss, student_loss)
        torch.testing.assert_close(heads.loss, heads_loss)
    pairs = zip(cheap.state_dict().items(), naive.state_dict().values(), strict=True)
    for (name, got), expected in pairs:
        close = torch.isclose(got, expected, rtol=1e-8, atol=1e-10)
        assert close.all(), name


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


@pytest.mark.parametrize("value", [0.0, 0.7, 2.5])
def test_lambda_and_gamma_weigh_their_terms(value):
    """L(λ) = adversarial + λ distillation; L_D(γ) = hinge + γ R1."""
    model = make_add(lambda_=value, gamma=value)
    half = model.student_half(make_batch(), generator())
    adversarial, distillation = half.adversarial.mean(), half.distillation.mean()
    assert adversarial.abs() > 1e-3 and distillation > 1e-3
    torch.testing.assert_close(half.loss, adversarial + value * distillation)
    heads = model.discriminator_half(half)
    torch.testing.assert_close(heads.loss, heads.hinge.mean() + value * heads.r1.mean())
    assert (heads.r1.mean() > 0) == (value > 0)  # not even computed when it has no weight


def test_the_halves_terms_are_those_of_each_sample():
    """Each against its definition, from the networks before the step."""
    model, batch = make_add(gamma=0.3), make_batch()
    model.discriminator.heads.eval()
    before = copy.deepcopy(model)
    student, heads = model.step(batch, *optimizers(model), generator(1))
    s, noise, t, _ = draws(before, batch, generator(1))
    c = batch.c_text, naive_c_img(before, batch, s)
    discriminator = before.discriminator
    real, fake = (
        discriminator.heads(discriminator.features(x), *c)
        for x in (batch.x_0, naive_student(before, batch, s, noise))
    )
    for got, expected in ((heads.real_logits, real), (heads.fake_logits, fake)):
        torch.testing.assert_close(got, [x.detach() for x in expected])
    alpha, _ = column(before.teacher.schedule, t)
    distances = ((student.pixels - student.target) ** 2).mean((1, 2, 3))
    hinge = sum(functional.relu(1 - x).mean(1) for x in real)
    hinge = hinge + sum(functional.relu(1 + x).mean(1) for x in fake)
    adversarial = -sum(x.mean(1) for x in fake)
    for got, expected in (
        (student.adversarial, adversarial),
        (student.distillation, alpha.flatten() * distances),
        (student.loss, adversarial.mean() + 2.5 * student.distillation.mean()),
        (heads.hinge, hinge),
        (heads.loss, hinge.mean() + 0.3 * heads.r1.mean()),
    ):
        torch.testing.assert_close(got.detach(), expected.detach())
    assert heads.r1.shape == (8,) and heads.r1.min() > 0


def test_a_step_is_deterministic_under_its_generator():
    batch = make_batch()
    losses = []
    for seed in (0, 0, 1):
        model = make_add(augment=AUGMENTATIONS, guidance=(1.0, 3.0))
        torch.manual_seed(len(losses))  # torch's own generator must not matter
        halves = model.step(batch, *optimizers(model), generator(seed))
        losses.append(torch.stack([half.loss.detach() for half in halves]))
    assert torch.equal(losses[0], losses[1]) and (losses[0] != losses[2]).all()


def test_reals_and_fakes_are_augmented_and_the_fakes_once():
    """F sees augmented images only: two different passes, and the heads' half reads the first one's
    features again."""
    model, batch, g = make_add(augment=["color"]), make_batch(), generator(7)
    features = model.discriminator.features.features
    half = model.student_half(batch, generator(1))
    model.discriminator_half(half)
    (fakes, _), (reals, _) = features.calls
    torch.testing.assert_close(fakes, AUGMENTATIONS["color"](half.pixels, g))
    torch.testing.assert_close(reals, AUGMENTATIONS["color"](batch.x_0, g))
    assert (fakes - half.pixels).abs().amax((1, 2, 3)).min() > 1e-3
    for got, expected in zip(half.fake_tokens, features(fakes), strict=True):
        torch.testing.assert_close(got, expected)


def test_external_loop_with_gradient_accumulation():
    """Two micro-batches of 8, loss / 2 each, are one batch of 16: local batch norm's groups are the
    same."""
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
        (model.discriminator_half(half).loss / 2).backward()
    accumulated_heads = gradients(model.discriminator.heads)
    assert_gradients_close(accumulated, gradients(model.student), 0, 0)

    model.zero_grad()
    s, noise, t, noise_2 = (torch.cat(x) for x in zip(*drawn, strict=True))
    naive_student_loss(model, batch, s, noise, t, noise_2).backward()
    assert_gradients_close(accumulated, gradients(model.student))
    model.zero_grad()
    naive_discriminator_loss(model, batch, s, noise).backward()
    assert_gradients_close(accumulated_heads, gradients(model.discriminator.heads))


# --- conditions of the discriminator --------------------------------------------------------------


def test_c_img_is_zero_at_tau_n_for_fakes_and_for_their_real_partners():
    """The heads are called three times in a step and are told the same each time."""
    model, batch = make_add(), make_batch(32)
    told, heads = [], model.discriminator.heads.forward
    model.discriminator.heads.forward = lambda *inputs: told.append(inputs[1:]) or heads(*inputs)
    before = batch.c_img.clone()
    half, _ = model.step(batch, *optimizers(model), generator())
    terminal = half.s == 999
    assert 0 < terminal.sum() < 32
    assert (half.c_img[terminal] == 0).all()
    assert torch.equal(half.c_img[~terminal], before[~terminal])
    assert torch.equal(batch.c_img, before)
    assert len(told) == 3
    for c_text, c_img in told:
        assert torch.equal(c_text, batch.c_text) and torch.equal(c_img, half.c_img)


def test_a_step_without_conditions():
    model, batch = make_add(), make_batch()
    model.discriminator.heads = DiscriminatorHeads([4, 6], hidden=5, kernel=3).double()
    batch.c_text = batch.c_img = None
    student, heads = model.step(batch, *optimizers(model), generator())
    assert student.c_img is None and (heads.r1 > 0).all()


# --- what a step costs ----------------------------------------------------------------------------

TEACHER_CALLS = [
    ({}, 1),
    ({"guidance": 3.0}, 2),
    ({"guidance": (2.0, 4.0)}, 2),
    ({"weight": "nfsd", "guidance": 7.5}, 3),
    ({"teacher_steps": 2}, 2),
    ({"teacher_steps": 4}, 4),
    ({"teacher_steps": 4, "guidance": 3.0}, 8),
]


@pytest.mark.parametrize(("config", "teacher_calls"), TEACHER_CALLS)
def test_calls_per_step(config, teacher_calls):
    """One student forward; F once over the fakes with gradient, once over the reals without; the
    teacher without."""
    model, batch = make_add(**config), make_batch()
    half, _ = model.step(batch, *optimizers(model), generator())
    student, teacher = model.student.denoiser.network.calls, model.teacher.network.calls
    assert [with_gradient for _, with_gradient, _ in student] == [True]
    assert [with_gradient for _, with_gradient, _ in teacher] == [False] * teacher_calls
    (fakes, with_gradient), (reals, without) = model.discriminator.features.calls
    assert with_gradient and not without
    assert torch.equal(fakes, half.pixels) and torch.equal(reals, batch.x_0)
