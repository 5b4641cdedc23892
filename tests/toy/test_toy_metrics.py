"""toy/metrics.py: the figures against known values."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies
from torch import nn
from toy_runs import stage_at

from toy.data import Dataset
from toy.metrics import (
    STUDENT_T,
    coverage_of,
    frechet_distance,
    margin,
    train_metric_net,
    within_class_variance,
)
from toy.networks import MetricNet, ViT


def test_frechet_distance_of_two_gaussians_by_hand():
    """μ apart by (3, 4): 25. Deviations 1 and 2 on one axis: (2 - 1)² = 1."""
    x = torch.randn(200_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T  # exactly white
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(x, x + torch.tensor([3.0, 4.0])) == pytest.approx(25)
    assert frechet_distance(x, x * torch.tensor([1.0, 2.0])) == pytest.approx(1)


def test_frechet_distance_is_symmetric_for_covariances_that_do_not_commute():
    g = torch.Generator().manual_seed(1)
    x, y = (torch.randn(500, 4, generator=g) @ torch.randn(4, 4, generator=g) for _ in range(2))
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-9)
    assert frechet_distance(x, y) > 0.1


@settings(max_examples=30, deadline=None)
@given(strategies.integers(0, 10**6), strategies.floats(0.1, 10), strategies.floats(-5, 5))
def test_frechet_distance_is_0_of_a_set_to_itself_symmetric_and_the_shift_squared(
    seed, scale, shift
):
    g = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(60, 3, generator=g, dtype=torch.float64)
    y = x @ torch.diag(torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)) + 1
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6 * scale**2)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-6)
    assert frechet_distance(x, y) > 0
    expected = pytest.approx(3 * shift**2, rel=1e-6, abs=1e-6 * scale**2)
    assert frechet_distance(x, x + shift) == expected


def test_coverage_is_the_share_inside_the_nearest_neighbour_balls():
    # With k = 5 the ball of 0 reaches 5, that of 5 reaches 3.
    manifold = torch.arange(10.0)[:, None]
    assert coverage_of(torch.tensor([[-4.0], [-6.0], [4.5], [14.5]]), manifold, k=5) == 0.5
    collapsed = torch.zeros(10, 1)
    # Recall of a collapsed sampler.
    assert coverage_of(manifold, collapsed, k=5) == pytest.approx(0.1)
    assert coverage_of(collapsed, manifold, k=5) == 1  # while its precision is perfect


@pytest.mark.parametrize(
    "scale, k, precision, recall",
    [
        (1.6, 5, 0.56, 1),
        (1.6, 3, 0.28, 1),
        (2.2, 5, 0.1, 1),
        (0.6, 5, 1, 0.65),
        (0.6, 3, 1, 11 / 30),
    ],
)
def test_precision_and_recall_are_those_of_prdc(scale, k, precision, recall):
    """Against prdc 0.2 (Naeem et al. 2020) on the same points: compute_prdc(real, fake, k)."""

    def points(n, phase, scale):
        i, j = torch.arange(n).double()[:, None], torch.arange(4).double()[None]
        return scale * torch.sin(1.7 * i * (j + 1) ** 0.5 + phase + 0.3 * j)

    real, fake = points(60, 0.0, 1.0), points(50, 0.5, scale)
    assert coverage_of(fake, real, k) == pytest.approx(precision)
    assert coverage_of(real, fake, k) == pytest.approx(recall)


def test_the_margin_of_a_mean_is_that_of_its_standard_error():
    """Leaving out groups of one, the jackknife is exact: t · s / √n."""
    x = torch.tensor([1.0, 4, 2, 8, 5, 7, 1, 3, 9, 6])
    expected = pytest.approx(STUDENT_T[9] * x.std().item() / 10**0.5, rel=1e-5)
    assert margin(lambda x: x.mean().item(), x) == expected


@pytest.mark.parametrize("figure", [frechet_distance, lambda x, real: coverage_of(real[:300], x)])
def test_the_margin_covers_what_other_samples_give(figure):
    """Against the spread over 60 independent samples: a t of 2.26 on both sides of the mean."""
    g = torch.Generator().manual_seed(0)
    real = torch.randn(2000, 8, generator=g)
    samples = [0.8 * torch.randn(300, 8, generator=g) for _ in range(60)]
    spread = STUDENT_T[9] * torch.tensor([figure(x, real) for x in samples]).std().item()
    margins = torch.tensor([margin(lambda x: figure(x, real), x) for x in samples[:20]])
    assert 0.75 * spread < margins.mean().item() < 1.4 * spread


def test_within_class_variance_does_not_see_what_is_between_classes():
    x = torch.tensor([[0.0, 0], [2, 0], [100, 7], [100, 11]])
    assert within_class_variance(x, torch.tensor([0, 0, 1, 1])) == pytest.approx((2 + 8) / 2)
    assert within_class_variance(x[:2].repeat(2, 1) * 0, torch.tensor([0, 0, 1, 1])) == 0
    assert within_class_variance(x, torch.tensor([0, 0, 1, 2])) == 2  # one sample has none
    assert math.isnan(within_class_variance(x, torch.arange(4)))


def test_the_metric_network_is_another_architecture_than_f():
    def kinds(network):
        return {type(m) for m in network.modules() if not list(m.children())}

    assert nn.LayerNorm in kinds(ViT()) and nn.LayerNorm not in kinds(MetricNet())
    assert nn.BatchNorm2d in kinds(MetricNet()) and nn.BatchNorm2d not in kinds(ViT())


def test_the_metric_networks_images_are_augmented_as_asked(tmp_path, monkeypatch):
    seen, forward = [], MetricNet.forward
    monkeypatch.setattr(MetricNet, "forward", lambda self, x: seen.append(x) or forward(self, x))
    images = torch.full((128, 1, 16, 16), 255, dtype=torch.uint8)
    data = Dataset("white", images, torch.arange(128) % 2, images, None, ("a", "b"))
    own = dict(metric_steps=2, metric_width=4, metric_depth=3)
    for augment in ((), ("translation",)):
        seen.clear()
        stage = stage_at(tmp_path / str(augment), data=data, metric_augment=augment, **own)
        network, _ = train_metric_net(stage)
        # A shift leaves zeros at the border, grey; the first batch gives the lazy layer its size.
        grey = [bool((batch == 0).any()) for batch in seen[1:]]
        assert grey == [bool(augment)] * 2
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [4] * 3 + [8] * 6
