"""toy/glyphs.py: the digits are repeatable, balanced, whole, and of their class."""

import pytest
import torch

from toy.data import load
from toy.glyphs import glyphs


def test_glyphs_are_deterministic():
    images, labels = glyphs(600, seed=3)
    torch.manual_seed(99)
    again, labels_again = glyphs(600, seed=3)
    assert torch.equal(images, again) and torch.equal(labels, labels_again)
    assert torch.equal(glyphs(42, seed=3)[0], images[:42])
    assert not torch.equal(glyphs(600, seed=4)[0], images)


def test_glyphs_are_balanced_and_white_on_black():
    images, labels = glyphs(1000)
    assert images.shape == (1000, 1, 32, 32)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert (labels.view(100, 10).sort(dim=1).values == torch.arange(10)).all()
    assert (images.amin(dim=(1, 2, 3)) == 0).all() and (images.amax(dim=(1, 2, 3)) > 128).all()
    ink = images.float().mean(dim=(1, 2, 3)) / 255
    assert 0.02 < ink.min() and ink.max() < 0.45


@pytest.mark.parametrize("size", [16, 32, 48])
def test_glyphs_lie_wholly_inside(size):
    images = glyphs(2000, seed=1, size=size)[0]
    assert images.shape[-2:] == (size, size)
    for edge in (images[..., 0, :], images[..., -1, :], images[..., 0], images[..., -1]):
        assert edge.max() == 0


def test_glyphs_look_like_their_class_and_not_like_one_another():
    """The nearest of 3,000 others, by plain pixel distance, mostly has the same label, yet is never
    the same image."""
    images, labels = glyphs(3500, seed=2)
    flat = images.flatten(1).float()
    gap, nearest = torch.cdist(flat[3000:], flat[:3000]).min(dim=1)
    assert (labels[nearest] == labels[3000:]).float().mean() > 0.8
    assert gap.min() > 100


def test_load_glyphs_holds_out_other_images():
    data = load("glyphs", None, seed=5, limit=300)
    assert data.name == "glyphs (built in)" and data.classes == tuple("0123456789")
    assert len(data.train_images) == len(data.test_images) == 300
    assert torch.equal(data.train_images, glyphs(300, seed=5)[0])
    train, test = (x.flatten(1).float() for x in (data.train_images, data.test_images))
    assert torch.cdist(train, test).min() > 0
