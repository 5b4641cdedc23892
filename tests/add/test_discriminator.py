"""add.py, sections 4 and 5: local batch norm, heads and their projection, DiffAugment, hinge losses, R1."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import IMAGE, TEXT, NoBackward, TinyFeatures, assert_refused, generator, naive_head
from torch import nn

import add
from add import (
    AUGMENTATIONS,
    Discriminator,
    DiscriminatorHead,
    DiscriminatorHeads,
    LocalBatchNorm,
    Projection,
    hinge_discriminator,
    hinge_student,
    r1,
    readout,
)

CONDITIONS = {"none": (0, 0), "text": (TEXT, 0), "image": (0, IMAGE), "both": (TEXT, IMAGE)}


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=generator(seed))


def make_head(conditions="both", channels=6, seed=0):
    """A head in eval mode, where spectral norm is a constant; its batch norms scale and shift."""
    text, image = CONDITIONS[conditions]
    torch.manual_seed(seed)
    head = DiscriminatorHead(channels, text, image, hidden=5, kernel=3, c_map=4).double().eval()
    for module in head.modules():
        if isinstance(module, LocalBatchNorm):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -1, 1)
    return head


def condition_for(conditions, n=8):
    text, image = CONDITIONS[conditions]
    return randn(n, text, seed=1) if text else None, randn(n, image, seed=2) if image else None


# --- readout, local batch norm ---------------------------------------------------------------------------------------


def test_readout_adds_the_class_token_and_drops_it():
    tokens = torch.tensor([[[100.0, 200.0], [1.0, 2.0], [3.0, 4.0]]])
    assert readout(tokens).tolist() == [[[101.0, 202.0], [103.0, 204.0]]]


# Groups are of at most 8 samples, as few as that allows, and differ by at most one sample.
GROUPS = {1: [1], 3: [3], 8: [8], 9: [5, 4], 12: [6, 6], 16: [8, 8], 17: [6, 6, 5], 24: [8, 8, 8], 30: [8, 8, 7, 7]}


@pytest.mark.parametrize("batch", GROUPS)
def test_local_batch_norm_is_batch_norm_of_each_group(batch):
    """Against torch's own, group by group; the scale and shift are one for all."""
    norm, x = LocalBatchNorm(3).double(), 3 * randn(batch, 3, 5) + 2
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.uniform_(norm.bias, -1, 1)
    expected = [
        F.batch_norm(group, None, None, norm.weight, norm.bias, training=True) for group in x.split(GROUPS[batch])
    ]
    torch.testing.assert_close(norm(x), torch.cat(expected))
    torch.testing.assert_close(norm.eval()(x), torch.cat(expected))  # there are no running statistics


@pytest.mark.parametrize("batch", [16, 17])
def test_statistics_never_leak_across_groups(batch):
    """With other images in the last group the first groups' output stays bit for bit, and has no gradient for them."""
    norm, x = LocalBatchNorm(3).double(), randn(batch, 3, 5).requires_grad_()
    first = batch - GROUPS[batch][-1]
    other = torch.cat([x[:first], 10 * x[first:] + 3])
    assert torch.equal(norm(x)[:first], norm(other)[:first])
    (gradient,) = torch.autograd.grad((norm(x)[:first] ** 3).sum(), x)
    assert gradient[:first].abs().min() > 0 and (gradient[first:] == 0).all()


def test_group_size_is_an_argument():
    x = randn(8, 3, 5)
    torch.testing.assert_close(LocalBatchNorm(3, group_size=4).double()(x)[4:], LocalBatchNorm(3).double()(x[4:]))


# --- heads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conditions", CONDITIONS)
@pytest.mark.parametrize("batch", [8, 16])
def test_head_equals_its_formula(conditions, batch):
    """1x1 conv, residual circular conv over √2, 1x1 conv, projection over √c_map; from the weights alone."""
    head, tokens, c = make_head(conditions), randn(batch, 7, 6), condition_for(conditions, batch)
    logits = head(tokens, *c)
    assert logits.shape == (batch, 7)
    torch.testing.assert_close(logits, naive_head(head, tokens, *c))


def test_projection_by_hand():
    """c_map = 2, h = (3, 5), unconditional (1, 2), text 4 · (1, 0), image 2 · (0, 1): (3 · 5 + 5 · 4) / √2."""
    head = DiscriminatorHead(1, text_dim=1, image_dim=1, hidden=1, kernel=1, c_map=2).double()
    head.last = nn.Conv1d(1, 2, 1).double()
    with torch.no_grad():
        head.last.weight.zero_()
        head.last.bias.copy_(torch.tensor([3.0, 5.0]))
        head.unconditional.copy_(torch.tensor([1.0, 2.0]))
        head.from_text.weight.copy_(torch.tensor([[1.0], [0.0]]))
        head.from_image.weight.copy_(torch.tensor([[0.0], [1.0]]))
    logits = head(randn(1, 1, 1), torch.tensor([[4.0]]).double(), torch.tensor([[2.0]]).double())
    assert logits.item() == pytest.approx((3 * 5 + 5 * 4) / math.sqrt(2))


@pytest.mark.parametrize("width", [4, 1024])
def test_a_condition_of_mean_square_one_has_a_projection_of_mean_square_one(width):
    torch.manual_seed(0)
    projection = Projection(width, 4000)
    c = F.normalize(torch.randn(1, width)) * width**0.5
    assert projection(c).square().mean().item() == pytest.approx(1, abs=5 * math.sqrt(2 / 4000))
    torch.testing.assert_close(projection(c), c @ projection.weight.T / width**0.5)


def test_each_condition_moves_the_logits_and_zeros_leave_the_unconditional_map():
    head, tokens, (c_text, c_img) = make_head(), randn(8, 7, 6), condition_for("both")
    both = head(tokens, c_text, c_img)
    assert ((both - head(tokens, c_text, 0 * c_img)).abs().amax(1) > 1e-3).all()
    assert ((both - head(tokens, 0 * c_text, c_img)).abs().amax(1) > 1e-3).all()
    zeros = head(tokens, 0 * c_text, 0 * c_img)
    torch.testing.assert_close(zeros, naive_head(head, tokens))
    assert zeros.abs().max() > 1e-3


@pytest.mark.parametrize("conditions", CONDITIONS)
def test_rolling_the_tokens_rolls_the_logits(conditions):
    """Circular padding: no token is at an edge."""
    head, tokens, c = make_head(conditions), randn(8, 7, 6), condition_for(conditions)
    torch.testing.assert_close(head(tokens.roll(3, 1), *c), head(tokens, *c).roll(3, 1))


def test_residual_convolution_reaches_nine_tokens():
    """Of 21 tokens only those within four of the middle one feel it, but for the batch norm, here made constant."""
    torch.manual_seed(0)
    head = DiscriminatorHead(4).double().eval()
    for block in (head.first, head.residual):
        block[1] = nn.Identity()
    tokens = randn(1, 21, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(head(tokens)[0, 10], tokens)
    assert (gradient[0].abs().sum(1) > 0).nonzero().flatten().tolist() == list(range(6, 15))


def test_default_head_keeps_the_channels_and_maps_the_condition_to_64():
    head = DiscriminatorHead(12, text_dim=3)
    assert head.first[0].weight.shape == (12, 12, 1) and head.residual[0].weight.shape == (12, 12, 9)
    assert head.last.weight.shape == (64, 12, 1) and head.from_text.weight.shape == (64, 3)
    assert DiscriminatorHead(12).last.weight.shape == (1, 12, 1)


def test_convolutions_have_spectral_norm_one():
    """Far from one before: weights times 30. Power iteration in train mode has found them after 100 passes, to 1e-3."""
    head, c = make_head().train(), condition_for("both")
    convolutions = head.first[0], head.residual[0], head.last
    with torch.no_grad():
        for conv in convolutions:
            conv.parametrizations.weight.original.copy_(30 * randn(*conv.weight.shape, seed=5))
    for _ in range(100):
        head(randn(8, 7, 6), *c)
    for conv in convolutions:
        assert torch.linalg.matrix_norm(conv.weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-3)


def test_heads_map_each_token_map_to_its_own_logits():
    torch.manual_seed(0)
    heads = DiscriminatorHeads([6, 3], hidden=5, kernel=3).double().eval()
    tokens = [randn(8, 7, 6), randn(8, 2, 3)]
    logits = heads(tokens)
    assert [x.shape for x in logits] == [(8, 7), (8, 2)]
    for head, x, expected in zip(heads, logits, tokens, strict=True):
        torch.testing.assert_close(x, naive_head(head, expected))


# --- discriminator and DiffAugment -----------------------------------------------------------------------------------


def test_features_are_frozen_and_stay_in_eval_mode():
    discriminator = Discriminator(TinyFeatures(), DiscriminatorHeads([4, 6]))
    nn.Sequential(discriminator).train()
    assert not any(module.training for module in discriminator.features.modules())
    assert all(module.training for module in discriminator.heads.modules())
    assert not any(p.requires_grad for p in discriminator.features.parameters())
    assert all(p.requires_grad for p in discriminator.heads.parameters())


def test_tokens_are_features_of_the_augmented_images_in_the_order_given():
    """cutout after translation differs from before; both seeds are the generator's."""
    images = randn(8, 3, 8, 8)
    discriminator = Discriminator(TinyFeatures().double(), DiscriminatorHeads([4, 6]), ["cutout", "color"])
    g = generator(7)
    expected = AUGMENTATIONS["color"](AUGMENTATIONS["cutout"](images, g), g)
    for got, value in zip(discriminator.tokens(images, generator(7)), discriminator.features(expected), strict=True):
        torch.testing.assert_close(got, value)
    plain = Discriminator(discriminator.features, DiscriminatorHeads([4, 6])).tokens(images)
    torch.testing.assert_close(plain, discriminator.features(images))


def test_gradient_passes_through_frozen_features():
    images = randn(2, 3, 4, 4).requires_grad_()
    discriminator = Discriminator(TinyFeatures().double(), DiscriminatorHeads([4, 6]), AUGMENTATIONS)
    sum(x.sum() for x in discriminator.tokens(images, generator())).backward()
    assert (images.grad.flatten(1).abs().sum(1) > 0).all()


def fixed_draws(monkeypatch, *values, of="_uniform"):
    """add's _uniform, or _integers, gives these instead; the (low, high) it was asked for are returned, as they come."""
    values, asked = iter(values), []

    def draw(images, low, high, generator):
        asked.append((low, high))
        return torch.tensor(next(values)).view(-1, *[1] * (3 if of == "_uniform" else 1))

    monkeypatch.setattr(add, of, draw)
    return asked


def test_uniform_draws_one_number_an_image_in_its_range():
    draws = add._uniform(torch.zeros(10_000, 3, 2, 2), -0.5, 1.5, generator())
    assert draws.shape == (10_000, 1, 1, 1)
    assert -0.5 <= draws.min() < -0.49 and 1.49 < draws.max() <= 1.5
    assert abs(draws.mean().item() - 0.5) < 5 * 2 / math.sqrt(12 * 10_000)


def test_color_by_hand(monkeypatch):
    """Two pixels (1, 2, 3) and (5, 5, 5); brightness + 0.5, saturation x 2, contrast x 0.5, in that order.

    (1.5, 2.5, 3.5), (5.5, 5.5, 5.5); about the greys 2.5 and 5.5: (0.5, 2.5, 4.5), (5.5, 5.5, 5.5); about the mean 4.
    """
    asked = fixed_draws(monkeypatch, [0.5], [2.0], [0.5])
    image = torch.tensor([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]]).view(1, 3, 1, 2)
    expected = torch.tensor([[2.25, 4.75], [3.25, 4.75], [4.25, 4.75]]).view(1, 3, 1, 2)
    torch.testing.assert_close(AUGMENTATIONS["color"](image), expected)
    assert asked == [(-0.5, 0.5), (0, 2), (0.5, 1.5)]


def test_integers_draws_both_ends_as_often_as_what_lies_between():
    draws = add._integers(torch.zeros(12_000, 1, 1, 1), -2, 3, generator())
    assert draws.shape == (12_000, 1)
    counts = torch.bincount(draws[:, 0] + 2)
    assert len(counts) == 6 and (counts - 2000).abs().max() < 5 * math.sqrt(2000)


def test_translation_by_hand(monkeypatch):
    """Rows by 2 and columns by -1, the second image not at all; zeros come in."""
    asked = fixed_draws(monkeypatch, [2, 0], [-1, 0], of="_integers")
    images = randn(2, 3, 16, 8)
    moved = AUGMENTATIONS["translation"](images)
    expected = torch.zeros_like(images[0])
    expected[:, :14, 1:] = images[0][:, 2:, :7]
    assert torch.equal(moved[0], expected) and torch.equal(moved[1], images[1])
    assert asked == [(-2, 2), (-1, 1)]  # an eighth of the height, of the width


def test_cutout_by_hand(monkeypatch):
    """A fifth of each side, rounded, becomes zero: 4 x 3 of 20 x 15 inside the picture, what is left of it at the corners."""
    asked = fixed_draws(monkeypatch, [10, 0, 20], [7, 0, 14], of="_integers")
    zeros = AUGMENTATIONS["cutout"](torch.ones(3, 2, 20, 15)) == 0
    for image, rows, cols in ((0, [8, 9, 10, 11], [6, 7, 8]), (1, [0, 1], [0, 1]), (2, [18, 19], [13, 14])):
        expected = torch.zeros(20, 15, dtype=torch.bool)
        expected[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1] = True
        assert torch.equal(zeros[image], expected.expand(2, -1, -1))
    assert asked == [(0, 20), (0, 14)]  # an even side may lie half outside at either end


def test_cutout_multiplies_by_zero_and_one_alone():
    images = randn(64, 3, 16, 16)
    out = AUGMENTATIONS["cutout"](images, generator())
    assert torch.equal(out[out != 0], images[out != 0])
    assert len({tuple((x == 0).all(0).nonzero()[0].tolist()) for x in out}) > 10  # the places differ


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_is_drawn_per_image_under_a_seed_and_lets_gradients_through(name):
    images = randn(1, 3, 16, 16).expand(8, -1, -1, -1).clone().requires_grad_()
    out = AUGMENTATIONS[name](images, generator(0))
    assert torch.equal(out, AUGMENTATIONS[name](images, generator(0)))
    assert not torch.equal(out, AUGMENTATIONS[name](images, generator(1)))
    assert len({tuple(x.flatten().tolist()) for x in out.detach()}) > 4  # few shifts are possible, some coincide
    out.sum().backward()
    assert (images.grad.flatten(1).abs().sum(1) > 0).all()


# --- hinge losses, by hand -------------------------------------------------------------------------------------------

LOGITS = [torch.tensor([[3.0, -1.0], [0.5, 0.5]]), torch.tensor([[-2.0], [1.5]])]  # two heads, two samples


def test_hinge_student_by_hand():
    """-(mean of the tokens, summed over heads): -(1 - 2) and -(0.5 + 1.5)."""
    assert hinge_student(LOGITS).tolist() == [1.0, -2.0]


def test_hinge_discriminator_by_hand():
    """Reals LOGITS: (0 + 2)/2 + 3 and (0.5 + 0.5)/2 + 0; as fakes: (4 + 0)/2 + 0 and 1.5 + 2.5."""
    silent = [torch.full((2, 2), 9.0), torch.full((2, 1), 9.0)]  # far on the right side: no loss
    assert hinge_discriminator(LOGITS, [-x for x in silent]).tolist() == [4.0, 0.5]
    assert hinge_discriminator(silent, LOGITS).tolist() == [2.0, 4.0]
    assert hinge_discriminator(LOGITS, LOGITS).tolist() == [6.0, 4.5]


# --- R1 --------------------------------------------------------------------------------------------------------------


def test_r1_by_hand():
    """D(x)_n = w·x_n: the gradient at every token is w, so R1 = N ‖w‖²; two heads add. Not averaged over tokens."""
    tokens = [randn(2, 5, 3).requires_grad_(), randn(2, 7, 2).requires_grad_()]
    w = [torch.tensor([1.0, 2.0, -2.0]).double(), torch.tensor([3.0, 4.0]).double()]
    penalty = r1([x @ v for x, v in zip(tokens, w, strict=True)], tokens)
    torch.testing.assert_close(penalty, torch.full((2,), 5 * 9.0 + 7 * 25.0).double())


def test_r1_belongs_to_each_sample():
    """D(x) = x²/2: the gradient is x itself."""
    x = randn(4, 5, 3).requires_grad_()
    torch.testing.assert_close(r1([(x**2).sum(2) / 2], [x]), (x**2).sum((1, 2)))


@pytest.mark.parametrize("conditions", CONDITIONS)
def test_r1_against_finite_differences(conditions):
    """Central differences of Σ logits in every token element; h = 1e-6 leaves about 1e-9 of rounding in float64."""
    head, tokens, c = make_head(conditions), randn(3, 4, 6), condition_for(conditions, 3)
    leaf = tokens.clone().requires_grad_()
    penalty = r1([head(leaf, *c)], [leaf])
    differences, h = torch.zeros_like(tokens), 1e-6
    with torch.no_grad():
        for i in range(tokens.numel()):
            step = torch.zeros(tokens.numel(), dtype=torch.float64)
            step[i] = h
            up, down = head(tokens + step.view_as(tokens), *c), head(tokens - step.view_as(tokens), *c)
            differences.view(-1)[i] = (up - down).sum() / (2 * h)
    torch.testing.assert_close(penalty, differences.square().sum((1, 2)), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("conditions", ["none", "both"])
def test_r1s_gradient_to_the_heads_against_finite_differences(conditions):
    """The double backward: gradcheck of R1 as a function of every parameter of a head with spectral norm."""
    head, tokens, c = make_head(conditions), randn(3, 4, 6), condition_for(conditions, 3)
    names = [name for name, _ in head.named_parameters()]

    def penalty(*parameters):
        leaf = tokens.clone().requires_grad_()
        logits = torch.func.functional_call(head, dict(zip(names, parameters, strict=True)), (leaf, *c))
        return r1([logits], [leaf])

    assert torch.autograd.gradcheck(penalty, tuple(head.parameters()), eps=1e-6, atol=1e-5, rtol=1e-5)


def test_r1_does_not_differentiate_the_features():
    """Leaves cut from an F whose backward raises."""
    features = NoBackward(TinyFeatures().double())
    tokens = [x.detach().requires_grad_() for x in features(randn(2, 3, 4, 4).requires_grad_())]
    torch.manual_seed(0)
    heads = DiscriminatorHeads([4, 6], hidden=5, kernel=3).double()
    assert (r1(heads(tokens), tokens) > 0).all()


class LatentFeatures(TinyFeatures):
    space = "diffused"


# --- errors ----------------------------------------------------------------------------------------------------------

ERRORS = {
    "c_text missing": (lambda: make_head()(randn(8, 7, 6), None, randn(8, IMAGE)), ["c_text", "None", "(8, 4)"]),
    "c_img missing": (lambda: make_head()(randn(8, 7, 6), randn(8, TEXT)), ["c_img", "None", "(8, 5)"]),
    "c_text of other width": (lambda: make_head("text")(randn(8, 7, 6), randn(8, 3)), ["c_text", "(8, 3)", "(8, 4)"]),
    "c_img of one sample": (
        lambda: make_head("image")(randn(8, 7, 6), None, randn(1, IMAGE)),
        ["c_img", "(1, 5)", "(8, 5)"],
    ),
    "too few maps": (lambda: DiscriminatorHeads([6, 6])([torch.zeros(8, 7, 6)]), ["tokens", "1 map", "2 heads"]),
    "augment": (
        lambda: Discriminator(TinyFeatures(), DiscriminatorHeads([4, 6]), ["color", "flip"]),
        ["augment='flip'", "'color'", "'translation'", "'cutout'"],
    ),
    "DiffAugment in the student's space": (
        lambda: Discriminator(LatentFeatures(), DiscriminatorHeads([4, 6]), ("color",)),
        ["augment=('color',)", "student's space", "()"],
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_argument_value_and_what_is_allowed(case):
    assert_refused(*ERRORS[case])
