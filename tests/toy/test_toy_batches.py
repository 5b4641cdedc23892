"""toy/data.py: pixels, batches, and a data set's fingerprint."""

import dataclasses

import pytest
import torch

from toy.data import Batches, load, to_float, to_uint8


def test_to_float_and_to_uint8_are_inverse():
    levels = torch.arange(256, dtype=torch.uint8)
    images = to_float(levels)
    assert images.dtype == torch.float32 and images[0] == -1 and images[-1] == 1
    assert torch.equal(to_uint8(images), levels)
    assert to_uint8(torch.tensor([-3.0, 2.0])).tolist() == [0, 255]
    for nudge in (-0.9, 0.9):  # just short of half a level: rounded, not truncated
        assert torch.equal(to_uint8(images + nudge / 255), levels)


def numbered(n):
    return torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1), torch.arange(n)


def take(batches, n):
    return [next(batches)[1].tolist() for _ in range(n)]


def test_batches_see_every_image_once_an_epoch_across_batch_borders():
    seen = sum(take(Batches(*numbered(10), batch_size=4, seed=0), 5), [])  # 20 images, two epochs
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


def test_batches_pair_float_images_with_their_labels():
    # More than two epochs in one batch.
    images, labels = next(Batches(*numbered(10), batch_size=25, seed=0))
    assert images.shape == (25, 1, 1, 1) and images.dtype == torch.float32
    assert torch.equal(to_uint8(images).flatten().long(), labels)
    floats = torch.linspace(-1, 1, 10).view(10, 1, 1, 1)
    images, labels = next(Batches(floats, numbered(10)[1], batch_size=3, seed=0))
    assert torch.equal(images, floats[labels])


def test_batches_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = take(Batches(*numbered(10), batch_size=4, seed=7), 6)
    torch.manual_seed(2)
    assert take(Batches(*numbered(10), batch_size=4, seed=7), 6) == first
    assert take(Batches(*numbered(10), batch_size=4, seed=8), 6) != first


# Batches before the stop: at an epoch's start, inside, at its end.
@pytest.mark.parametrize("done", [0, 1, 3, 5])
def test_batches_resume_exactly(done, tmp_path):
    batches = Batches(*numbered(10), batch_size=4, seed=0)
    take(batches, done)
    torch.save(batches.state_dict(), tmp_path / "state.pt")
    expected = take(batches, 8)
    resumed = Batches(*numbered(10), batch_size=4, seed=123)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert take(resumed, 8) == expected


def test_batches_mirror_half_of_the_images_if_asked_also_when_resumed():
    images, labels = torch.rand(4000, 1, 2, 3), torch.arange(4000)
    batches, resumed = (Batches(images, labels, 1000, seed, flip=True) for seed in (0, 9))
    seen, of = (torch.cat(x) for x in zip(*(next(batches) for _ in range(4)), strict=True))
    mirrored = (seen != images[of]).flatten(1).any(1)
    assert torch.equal(seen[mirrored], images[of][mirrored].flip(3))
    assert abs(mirrored.sum() - 2000) < 5 * 1000**0.5
    next(batches)  # into the second epoch
    resumed.load_state_dict(batches.state_dict())
    for _ in range(4):
        assert all(map(torch.equal, next(batches), next(resumed)))


def test_fingerprint_follows_content():
    data = load("glyphs", None, limit=20)
    assert load("glyphs", None, limit=20).fingerprint == data.fingerprint
    for field in ("train_images", "train_labels", "test_images", "test_labels"):
        changed = getattr(data, field).clone()
        changed[-1] += 1
        assert dataclasses.replace(data, **{field: changed}).fingerprint != data.fingerprint, field
    assert dataclasses.replace(data, classes=tuple("abcdefghij")).fingerprint != data.fingerprint
