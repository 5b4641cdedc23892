"""add.py, sections 4 and 5: local batch norm, heads and their projection, hinge losses, R1."""

import math

import pytest
import torch
from helpers import IMAGE, TEXT, NoBackward, TinyFeatures, assert_refused, generator, naive_head
from torch import nn
from torch.nn import functional

from add import (
    CircularConv,
    Discriminator,
    DiscriminatorHead,
    DiscriminatorHeads,
    LocalBatchNorm,
    hinge_discriminator,
    hinge_student,
    r1,
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


# --- local batch norm -----------------------------------------------------------------------------

# Groups are of at most 8 samples, as few as that allows, and differ by at most one sample.
GROUPS = {
    1: [1], 3: [3], 8: [8], 9: [5, 4], 12: [6, 6], 16: [8, 8], 17: [6, 6, 5], 24: [8, 8, 8],
    30: [8, 8, 7, 7],
}  # fmt: skip


@pytest.mark.parametrize("batch", GROUPS)
def test_local_batch_norm_is_batch_norm_of_each_group(batch):
    """Against torch's own, group by group; the scale and shift are one for all."""
    norm, x = LocalBatchNorm(3).double(), 3 * randn(3, batch, 5) + 2
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.uniform_(norm.bias, -1, 1)
    scale, shift = norm.weight, norm.bias
    expected = [
        functional.batch_norm(group, None, None, scale, shift, training=True)
        for group in x.transpose(0, 1).split(GROUPS[batch])
    ]
    expected = torch.cat(expected).transpose(0, 1)
    torch.testing.assert_close(norm(x), expected)
    norm.eval()  # there are no running statistics
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("batch", [16, 17])
def test_statistics_never_leak_across_groups(batch):
    """With other images in the last group the first groups' output stays bit for bit, and has no
    gradient for them."""
    norm, x = LocalBatchNorm(3).double(), randn(3, batch, 5).requires_grad_()
    first = batch - GROUPS[batch][-1]
    other = torch.cat([x[:, :first], 10 * x[:, first:] + 3], dim=1)
    assert torch.equal(norm(x)[:, :first], norm(other)[:, :first])
    (gradient,) = torch.autograd.grad((norm(x)[:, :first] ** 3).sum(), x)
    assert gradient[:, :first].abs().min() > 0 and (gradient[:, first:] == 0).all()


def test_group_size_is_an_argument():
    x = randn(3, 8, 5)
    fours, eights = LocalBatchNorm(3, group_size=4).double(), LocalBatchNorm(3).double()
    torch.testing.assert_close(fours(x)[:, 4:], eights(x[:, 4:]))


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 9])
def test_circular_convolution_is_torchs(kernel):
    ours, x = CircularConv(4, 3, kernel).double(), randn(4, 5, 11)
    theirs = nn.Conv1d(4, 3, kernel, padding="same", padding_mode="circular").double()
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x.transpose(0, 1)).transpose(0, 1))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_a_map_shorter_than_the_convolutions_reach_goes_round_more_than_once(n):
    conv, x = CircularConv(3, 2, 9).double(), randn(3, 5, n)
    shifts = [x.roll(4 - j, dims=2) for j in range(9)]  # tap j sees the token 4 - j places before
    expected = sum(torch.einsum("oc,cbn->obn", conv.weight[:, :, j], shifts[j]) for j in range(9))
    torch.testing.assert_close(conv(x), expected + conv.bias[:, None, None])


# --- heads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("conditions", CONDITIONS)
@pytest.mark.parametrize("batch", [8, 16])
def test_head_equals_its_formula(conditions, batch):
    """1x1 conv, residual circular conv over √2, 1x1 conv, projection over √c_map; from the weights
    alone."""
    head, tokens, c = make_head(conditions), randn(batch, 7, 6), condition_for(conditions, batch)
    logits = head(tokens, *c)
    assert logits.shape == (batch, 7)
    torch.testing.assert_close(logits, naive_head(head, tokens, *c))


def test_projection_by_hand():
    """c_map = 2, h = (3, 5), unconditional (1, 2), text 4 · (1, 0), image 2 · (0, 1):
    (3 · 5 + 5 · 4) / √2."""
    head = DiscriminatorHead(1, text_dim=1, image_dim=1, hidden=1, kernel=1, c_map=2).double()
    head.last = CircularConv(1, 2, 1).double()
    with torch.no_grad():
        head.last.weight.zero_()
        head.last.bias.copy_(torch.tensor([3.0, 5.0]))
        head.unconditional.copy_(torch.tensor([1.0, 2.0]))
        head.maps["c_text"].copy_(torch.tensor([[1.0], [0.0]]))
        head.maps["c_img"].copy_(torch.tensor([[0.0], [1.0]]))
    c_text, c_img = torch.tensor([[4.0]]).double(), torch.tensor([[2.0]]).double()
    logits = head(randn(1, 1, 1), c_text, c_img)
    assert logits.item() == pytest.approx((3 * 5 + 5 * 4) / math.sqrt(2))


@pytest.mark.parametrize("width", [4, 1024])
def test_a_condition_of_mean_square_one_has_a_projection_of_mean_square_one(width):
    """So narrow and wide conditions weigh the same. Tokens that are unit vectors after the last
    convolution show the projection itself, over √c_map."""

    class UnitVectors(nn.Module):
        def forward(self, h):
            return torch.eye(4000)[:, None]

    torch.manual_seed(0)
    head = DiscriminatorHead(1, text_dim=width, hidden=1, kernel=1, c_map=4000)
    head.last = UnitVectors()
    nn.init.zeros_(head.unconditional)
    c = functional.normalize(torch.randn(1, width)) * width**0.5
    projection = math.sqrt(4000) * head(torch.randn(1, 5, 1), c)
    assert projection.square().mean().item() == pytest.approx(1, abs=5 * math.sqrt(2 / 4000))
    torch.testing.assert_close(projection, c @ head.maps["c_text"].T / width**0.5)


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
    """Of 21 tokens only those within four of the middle one feel it, but for the batch norm, here
    made constant."""
    torch.manual_seed(0)
    head = DiscriminatorHead(4).double().eval()
    for block in (head.first, head.residual):
        block[1] = nn.Identity()
    tokens = randn(1, 21, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(head(tokens)[0, 10], tokens)
    assert (gradient[0].abs().sum(1) > 0).nonzero().flatten().tolist() == list(range(6, 15))


def test_default_head_keeps_the_channels_and_maps_the_condition_to_64():
    head = DiscriminatorHead(12, text_dim=3)
    assert head.first[0].weight.shape == (12, 12, 1)
    assert head.residual[0].weight.shape == (12, 12, 9)
    assert head.last.weight.shape == (64, 12, 1)
    assert {name: x.shape for name, x in head.maps.items()} == {"c_text": (64, 3)}
    assert DiscriminatorHead(12).last.weight.shape == (1, 12, 1)


def test_convolutions_have_spectral_norm_one():
    """Far from one before: weights times 30. Power iteration in train mode has found them after 100
    passes, to 1e-3."""
    head, c = make_head().train(), condition_for("both")
    convolutions = head.first[0], head.residual[0], head.last
    with torch.no_grad():
        for conv in convolutions:
            conv.parametrizations.weight.original.copy_(30 * randn(*conv.weight.shape, seed=5))
    for _ in range(100):
        head(randn(8, 7, 6), *c)
    for conv in convolutions:
        norm = torch.linalg.matrix_norm(conv.weight.flatten(1), 2).item()
        assert norm == pytest.approx(1, abs=1e-3)


def test_heads_map_each_token_map_to_its_own_logits():
    torch.manual_seed(0)
    heads = DiscriminatorHeads([6, 3], hidden=5, kernel=3).double().eval()
    tokens = [randn(8, 7, 6), randn(8, 2, 3)]
    logits = heads(tokens)
    assert [x.shape for x in logits] == [(8, 7), (8, 2)]
    for head, x, expected in zip(heads, logits, tokens, strict=True):
        torch.testing.assert_close(x, naive_head(head, expected))


# --- discriminator --------------------------------------------------------------------------------


def test_features_are_frozen_and_stay_in_eval_mode():
    discriminator = Discriminator(TinyFeatures(), DiscriminatorHeads([4, 6]))
    nn.Sequential(discriminator).train()
    assert not any(module.training for module in discriminator.features.modules())
    assert all(module.training for module in discriminator.heads.modules())
    assert not any(p.requires_grad for p in discriminator.features.parameters())
    assert all(p.requires_grad for p in discriminator.heads.parameters())


def test_gradient_passes_through_frozen_features():
    images = randn(2, 3, 4, 4).requires_grad_()
    discriminator = Discriminator(TinyFeatures().double(), DiscriminatorHeads([4, 6]))
    sum(x.sum() for x in discriminator.features(images)).backward()
    assert (images.grad.flatten(1).abs().sum(1) > 0).all()


def test_the_features_say_what_space_they_read():
    latent = TinyFeatures()
    latent.space = "latent"
    heads = DiscriminatorHeads([4, 6])
    assert Discriminator(TinyFeatures(), heads).space == "pixel"
    assert Discriminator(latent, heads).space == "latent"


# --- hinge losses, by hand ------------------------------------------------------------------------

# Two heads, two samples.
LOGITS = [torch.tensor([[3.0, -1.0], [0.5, 0.5]]), torch.tensor([[-2.0], [1.5]])]


def test_hinge_student_by_hand():
    """-(mean of the tokens, summed over heads): -(1 - 2) and -(0.5 + 1.5)."""
    assert hinge_student(LOGITS).tolist() == [1.0, -2.0]


def test_hinge_discriminator_by_hand():
    """Reals LOGITS: (0 + 2)/2 + 3 and (0.5 + 0.5)/2 + 0; as fakes: (4 + 0)/2 + 0 and 1.5 + 2.5."""
    silent = [torch.full((2, 2), 9.0), torch.full((2, 1), 9.0)]  # far on the right side: no loss
    assert hinge_discriminator(LOGITS, [-x for x in silent]).tolist() == [4.0, 0.5]
    assert hinge_discriminator(silent, LOGITS).tolist() == [2.0, 4.0]
    assert hinge_discriminator(LOGITS, LOGITS).tolist() == [6.0, 4.5]


# --- R1 -------------------------------------------------------------------------------------------


def test_r1_by_hand():
    """D(x)_n = w·x_n: the gradient at every token is w, so R1 = N ‖w‖²; two heads add. Not averaged
    over tokens."""
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
    """Central differences of Σ logits in every token element; h = 1e-6 leaves about 1e-9 of
    rounding in float64."""
    head, tokens, c = make_head(conditions), randn(3, 4, 6), condition_for(conditions, 3)
    leaf = tokens.clone().requires_grad_()
    penalty = r1([head(leaf, *c)], [leaf])
    differences, h = torch.zeros_like(tokens), 1e-6
    with torch.no_grad():
        for i in range(tokens.numel()):
            step = torch.zeros_like(tokens)
            step.view(-1)[i] = h
            up, down = head(tokens + step, *c), head(tokens - step, *c)
            differences.view(-1)[i] = (up - down).sum() / (2 * h)
    torch.testing.assert_close(penalty, differences.square().sum((1, 2)), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("conditions", ["none", "both"])
def test_r1s_gradient_to_the_heads_against_finite_differences(conditions):
    """The double backward: gradcheck of R1 as a function of every parameter of a head with spectral
    norm."""
    head, tokens, c = make_head(conditions), randn(3, 4, 6), condition_for(conditions, 3)
    names = [name for name, _ in head.named_parameters()]

    def penalty(*parameters):
        leaf = tokens.clone().requires_grad_()
        weights = dict(zip(names, parameters, strict=True))
        return r1([torch.func.functional_call(head, weights, (leaf, *c))], [leaf])

    tolerance = {"eps": 1e-6, "atol": 1e-5, "rtol": 1e-5}
    assert torch.autograd.gradcheck(penalty, tuple(head.parameters()), **tolerance)


def test_r1_does_not_differentiate_the_features():
    """Leaves cut from an F whose backward raises."""
    features = NoBackward(TinyFeatures().double())
    tokens = [x.detach().requires_grad_() for x in features(randn(2, 3, 4, 4).requires_grad_())]
    torch.manual_seed(0)
    heads = DiscriminatorHeads([4, 6], hidden=5, kernel=3).double()
    assert (r1(heads(tokens), tokens) > 0).all()


# --- errors ---------------------------------------------------------------------------------------


def judge(conditions, *told):
    """A head with these conditions is told something else."""
    return lambda: make_head(conditions)(randn(8, 7, 6), *told)


ERRORS = {  # what is done wrong → what the message must say
    "c_text missing": (judge("both", None, randn(8, IMAGE)), ["c_text is None", "(8, 4)"]),
    "c_img missing": (judge("both", randn(8, TEXT)), ["c_img is None", "(8, 5)"]),
    "c_text of other width": (judge("text", randn(8, 3)), ["c_text is (8, 3)", "(8, 4)"]),
    "c_img of one sample": (judge("image", None, randn(1, 5)), ["c_img is (1, 5)", "(8, 5)"]),
    "too few maps": (lambda: DiscriminatorHeads([6, 6])([torch.zeros(8, 7, 6)]), ["shorter"]),
    "too many maps": (lambda: DiscriminatorHeads([6])([torch.zeros(8, 7, 6)] * 2), ["longer"]),
}


@pytest.mark.parametrize("case", ERRORS)
def test_head_errors_name_argument_value_and_what_is_allowed(case):
    assert_refused(*ERRORS[case])
