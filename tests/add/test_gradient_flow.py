"""add.py, section 7: which half moves what, and by which sign."""

import copy

import pytest
import torch
from helpers import (
    NoBackward,
    column,
    draws,
    generator,
    gradients,
    make_add,
    make_batch,
    moved,
    naive_c_img,
    naive_student,
    optimizers,
    snapshot,
)
from torch import nn

from add import hinge_student
from common.augment import AUGMENTATIONS
from common.health import watch

# BIASES: a convolution's bias is undone by the batch norm behind it; the last one's gradient
# cancels between reals and fakes within the hinge's margins. So parameters of one axis may stay
# where they are, those of more must not.
EVERY_LOSS = [
    {},
    {"weight": "sds", "space": "latent"},
    {"weight": "nfsd", "guidance": 7.5},
    {"guidance": (2.0, 4.0)},
]


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
    model.discriminator_half(half).loss.backward()
    for name, p in model.discriminator.heads.named_parameters():
        assert p.grad is not None and (p.grad.abs().max() > 1e-9 or p.ndim == 1), name  # BIASES
    for part in (model.student, model.discriminator.features, model.teacher):
        assert all(g is None for g in gradients(part))


def tensors(x):
    """All tensors in a half's field."""
    if isinstance(x, list | tuple):
        return [y for each in x for y in tensors(each)]
    return [] if x is None else [x]


def test_what_the_halves_hand_on_has_no_graph():
    """Only the loss does, and the student's views: kept for a log, the rest must not keep the
    activations."""
    model = make_add()
    student = model.student_half(make_batch(), generator())
    heads = model.discriminator_half(student)
    for half in (student, heads):
        fields = vars(half)
        assert fields["loss"].requires_grad and fields["loss"].shape == ()
        rest = [x for name, x in fields.items() if name not in ("loss", "views")]
        assert len(tensors(rest)) >= len(rest) and not any(x.requires_grad for x in tensors(rest))
    assert all(x.requires_grad for x in student.views.values())


@pytest.mark.parametrize("config", EVERY_LOSS)
def test_a_step_moves_student_and_heads_and_nothing_else(config):
    """Three steps after .train() on a parent: F and the teacher keep parameters and statistics bit
    for bit."""
    model, batch = make_add(augment=AUGMENTATIONS, **config), make_batch()
    nn.ModuleDict({"add": model}).train()
    before, both = snapshot(model), optimizers(model)
    for _ in range(3):
        model.step(batch, *both, generator())
    changed = set(moved(model, before))
    trained = {name for name, p in model.named_parameters() if p.requires_grad and p.ndim > 1}
    assert trained and trained <= changed  # BIASES
    parts = "student.denoiser.network.", "discriminator.heads."
    assert all(name.startswith(parts) for name in changed)


@pytest.mark.parametrize(
    "wrap", [lambda m: m, nn.Sequential, lambda m: nn.Sequential(nn.Sequential(m))]
)
def test_frozen_networks_never_leave_eval_mode(wrap):
    model = make_add()
    parent = wrap(model)
    for mode in (True, False, True):
        assert parent.train(mode) is parent
        for frozen in (model.teacher, model.discriminator.features):
            assert not any(module.training for module in frozen.modules())
        for trained in (model.student.denoiser.network, model.discriminator.heads):
            assert all(module.training == mode for module in trained.modules())


def test_a_fresh_add_has_its_frozen_networks_in_eval_mode():
    model = make_add()
    for part in (model.teacher, model.discriminator.features):
        assert not any(module.training for module in part.modules())
        assert not any(p.requires_grad for p in part.parameters())
    for part in (model.student, model.discriminator.heads):
        assert all(p.requires_grad for p in part.parameters())


@pytest.mark.parametrize("config", EVERY_LOSS + [{"teacher_steps": 4}])
def test_the_teacher_is_never_differentiated(config):
    """Neither it nor its input: its backward raises, and it runs without gradient."""
    model = make_add(**config)
    network = model.teacher.network
    model.teacher.network = NoBackward(network).eval()
    model.student_half(make_batch(), generator()).loss.backward()
    assert network.calls and not any(with_gradient for _, with_gradient, _ in network.calls)


@pytest.mark.parametrize("space", ["pixel", "latent"])
def test_the_target_is_a_constant_of_the_loss(space):
    """The gradient with respect to x̂ is that of c(t) ‖x̂ - target‖² with the target copied as
    numbers."""
    model, batch = make_add(space=space), make_batch()
    x_hat = make_batch(seed=5).x_0.requires_grad_()
    losses, target, t = model.distillation_loss(x_hat, x_hat, batch, generator())
    (got,) = torch.autograd.grad(losses.sum(), x_hat)
    numbers = torch.tensor(target.tolist(), dtype=torch.float64)
    alpha, _ = column(model.teacher.schedule, t)
    torch.testing.assert_close(got, 2 * alpha * (x_hat - numbers).detach() / x_hat[0].numel())


def test_heads_are_frozen_while_they_judge_for_the_student_and_trained_afterwards():
    """Also after a half that failed while they were frozen."""
    model, batch = make_add(), make_batch()
    heads, forward, frozen = model.discriminator.heads, model.discriminator.heads.forward, []

    def fail(tokens, *c):
        frozen.append(not any(p.requires_grad for p in heads.parameters()))
        if len(frozen) == 1:
            raise RuntimeError("out of memory")
        return forward(tokens, *c)

    heads.forward = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        model.student_half(batch, generator())
    half = model.student_half(batch, generator())
    assert all(p.requires_grad for p in heads.parameters())
    model.discriminator_half(half).loss.backward()
    assert frozen == [True, True, False, False]  # twice fakes; reals and fakes in the other half
    assert all(p.grad is not None for p in heads.parameters())


def test_r1_stops_at_the_heads_input():
    """F's backward raises, gradient mode or not; the heads' half never calls it."""
    model, batch = make_add(gamma=1.0), make_batch()
    model.discriminator.features = NoBackward(model.discriminator.features).eval()
    half = model.student_half(batch, generator())
    heads = model.discriminator_half(half)
    heads.loss.backward()
    assert (heads.r1 > 0).all()
    assert all(g is not None for g in gradients(model.discriminator.heads))
    with pytest.raises(AssertionError, match="differentiated"):
        half.loss.backward()  # the student's half needs it: the trap works


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_real_features_carry_a_graph_only_where_r1_needs_it(gamma):
    model, batch = make_add(gamma=gamma), make_batch()
    half, seen = model.student_half(batch, generator()), []
    forward = model.discriminator.heads.forward

    def heads(tokens, *c):
        seen.append([x.requires_grad for x in tokens])
        return forward(tokens, *c)

    model.discriminator.heads.forward = heads
    model.discriminator_half(half)
    assert seen == [[gamma > 0] * 2, [False] * 2]  # reals, fakes


def test_student_half_raises_the_logits_of_fakes_and_the_heads_half_parts_them():
    """The signs of Eq. 2 and Eq. 3, from logits alone: one small step of each."""
    model, batch = make_add(lambda_=0.0, gamma=0.0), make_batch()
    model.discriminator.heads.eval()
    s, noise, _, _ = draws(model, batch, generator())
    c = batch.c_text, naive_c_img(model, batch, s)

    def logits(model, heads):
        """Means over reals and over fakes."""
        images = batch.x_0, naive_student(model, batch, s, noise)
        tokens = [model.discriminator.features(x) for x in images]
        return [sum(y.mean() for y in heads(x, *c)).item() for x in tokens]

    old = copy.deepcopy(model)
    model.step(batch, *optimizers(model, lr=0.01), generator())
    old_heads, new_heads = old.discriminator.heads, model.discriminator.heads
    real, fake = logits(old, old_heads)
    assert logits(model, old_heads)[1] > fake + 1e-4
    new_real, new_fake = logits(old, new_heads)
    assert new_real - new_fake > real - fake + 1e-4


# --- each term's gradient at the student's output -------------------------------------------------


@pytest.mark.parametrize("space", ["pixel", "latent"])
def test_each_terms_view_has_that_terms_gradient_alone(space):
    """A latent student: F and the pixel distance see it decoded. The two gradients, as the log
    takes them, against both terms computed again, λ included, by torch.autograd.grad."""
    model, batch = make_add(space=space), make_batch()
    for denoiser in (model.student.denoiser, model.teacher):
        denoiser.encode, denoiser.decode = (lambda x: 2 * x), (lambda z: z / 2)
    model.discriminator.heads.eval()  # no power iteration: the same heads twice
    half = model.student_half(batch, generator(1))
    log = watch(half)
    half.loss.backward()

    pixels = half.pixels.clone().requires_grad_()
    logits = model.discriminator.heads(
        model.discriminator.features(pixels), half.c_text, half.c_img
    )
    compared = (half.pixels if space == "pixel" else half.x_hat).clone().requires_grad_()
    alpha, _ = column(model.teacher.schedule, half.t)
    distances = (compared - half.target).square().mean((1, 2, 3))
    terms = {
        "gradient_adversarial": (hinge_student(logits).sum(), pixels),
        "gradient_distillation": (2.5 * (alpha.flatten() * distances).sum(), compared),
    }
    assert log.keys() == terms.keys()
    for name, (term, x) in terms.items():
        (gradient,) = torch.autograd.grad(term, x)
        norms = gradient.flatten(1).norm(dim=1)
        expected = norms.square().mean().sqrt().item()
        assert log[name].item() == pytest.approx(expected, rel=1e-5) and norms.min() > 0
