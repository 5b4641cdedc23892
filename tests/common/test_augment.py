"""common/augment.py: each augmentation by hand, its draws, and what stands behind it."""

import math

import pytest
import torch
from torch import nn

from add import Discriminator
from common import augment
from common.augment import AUGMENTATIONS, Augmented


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=generator())


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Pixels(nn.Module):
    """Features that are the images themselves, in one token map."""

    def forward(self, images):
        return [images.flatten(2).transpose(1, 2)]


# --- behind the augmentations ---------------------------------------------------------------------


def test_the_features_see_the_images_augmented_in_the_order_given():
    """cutout, then color, both drawn from the module's generator; a second pass draws anew."""
    images, g = randn(8, 3, 8, 8), generator(7)
    features = Augmented(Pixels(), ["cutout", "color"], generator(7))
    for _ in range(2):
        expected = AUGMENTATIONS["color"](AUGMENTATIONS["cutout"](images, g), g)
        (tokens,) = features(images)
        torch.testing.assert_close(tokens, Pixels()(expected)[0])
    (plain,) = Augmented(Pixels(), [])(images)
    assert torch.equal(plain, Pixels()(images)[0])


def test_gradient_passes_through_all_augmentations():
    images = randn(2, 3, 4, 4).requires_grad_()
    sum(x.sum() for x in Augmented(Pixels(), AUGMENTATIONS, generator())(images)).backward()
    assert (images.grad.flatten(1).abs().sum(1) > 0).all()


def test_a_discriminator_freezes_the_features_behind():
    inner = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    discriminator = Discriminator(Augmented(inner, ["color"]), nn.ModuleList()).train()
    assert discriminator.space == "pixel"
    assert not any(p.requires_grad for p in inner.parameters())
    assert not any(module.training for module in inner.modules())


class LatentFeatures(Pixels):
    space = "latent"


ERRORS = {  # what is done wrong → what the message must say
    "an unknown name": (
        lambda: Augmented(Pixels(), ["color", "flip"]),
        ["augment='flip'", "color", "translation", "cutout"],
    ),
    "latents": (lambda: Augmented(LatentFeatures(), ["color"]), ["augment=['color']", "latents"]),
}


@pytest.mark.parametrize("case", ERRORS)
def test_augment_errors_name_argument_value_and_what_is_allowed(case):
    wrong, parts = ERRORS[case]
    with pytest.raises(ValueError) as error:
        wrong()
    assert [part for part in parts if part not in str(error.value)] == []


# --- each by hand ---------------------------------------------------------------------------------


def fixed_draws(monkeypatch, *values, of="_uniform"):
    """The module's _uniform, or _integers, gives these instead. Returns the list of the (low, high)
    it is asked for, as they come."""
    values, asked = iter(values), []

    def draw(images, low, high, generator):
        asked.append((low, high))
        return torch.tensor(next(values)).view(-1, *[1] * (3 if of == "_uniform" else 1))

    monkeypatch.setattr(augment, of, draw)
    return asked


def test_uniform_draws_one_number_an_image_in_its_range():
    draws = augment._uniform(torch.zeros(10_000, 3, 2, 2), -0.5, 1.5, generator())
    assert draws.shape == (10_000, 1, 1, 1)
    assert -0.5 <= draws.min() < -0.49 and 1.49 < draws.max() <= 1.5
    assert abs(draws.mean().item() - 0.5) < 5 * 2 / math.sqrt(12 * 10_000)


def test_color_by_hand(monkeypatch):
    """Two pixels (1, 2, 3) and (5, 5, 5); in this order brightness + 0.5, saturation x 2, contrast
    x 0.5.

    (1.5, 2.5, 3.5), (5.5, 5.5, 5.5); about the greys 2.5 and 5.5 (0.5, 2.5, 4.5), (5.5, 5.5, 5.5);
    then about the mean 4.
    """
    asked = fixed_draws(monkeypatch, [0.5], [2.0], [0.5])
    image = torch.tensor([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]]).view(1, 3, 1, 2)
    expected = torch.tensor([[2.25, 4.75], [3.25, 4.75], [4.25, 4.75]]).view(1, 3, 1, 2)
    torch.testing.assert_close(AUGMENTATIONS["color"](image), expected)
    assert asked == [(-0.5, 0.5), (0, 2), (0.5, 1.5)]


def test_integers_draws_both_ends_as_often_as_what_lies_between():
    draws = augment._integers(torch.zeros(12_000, 1, 1, 1), -2, 3, generator())
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
    """A fifth of each side, rounded, becomes zero: 4 x 3 of 20 x 15 inside the picture, what is
    left of it at the corners."""
    asked = fixed_draws(monkeypatch, [10, 0, 20], [7, 0, 14], of="_integers")
    zeros = AUGMENTATIONS["cutout"](torch.ones(3, 2, 20, 15)) == 0
    places = ((8, 12), (6, 9)), ((0, 2), (0, 2)), ((18, 20), (13, 15))
    for image, ((top, bottom), (left, right)) in zip(zeros, places, strict=True):
        expected = torch.zeros(20, 15, dtype=torch.bool)
        expected[top:bottom, left:right] = True
        assert torch.equal(image, expected.expand(2, -1, -1))
    assert asked == [(0, 20), (0, 14)]  # an even side may lie half outside at either end


def test_cutout_multiplies_by_zero_and_one_alone():
    images = randn(64, 3, 16, 16)
    out = AUGMENTATIONS["cutout"](images, generator())
    assert torch.equal(out[out != 0], images[out != 0])
    places = {tuple((x == 0).all(0).nonzero()[0].tolist()) for x in out}
    assert len(places) > 10


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_is_drawn_per_image_under_a_seed_and_lets_gradients_through(name):
    images = randn(1, 3, 16, 16).expand(8, -1, -1, -1).clone().requires_grad_()
    out = AUGMENTATIONS[name](images, generator(0))
    assert torch.equal(out, AUGMENTATIONS[name](images, generator(0)))
    assert not torch.equal(out, AUGMENTATIONS[name](images, generator(1)))
    different = {tuple(x.flatten().tolist()) for x in out.detach()}
    assert len(different) > 4  # few shifts are possible, some coincide
    out.sum().backward()
    assert (images.grad.flatten(1).abs().sum(1) > 0).all()
