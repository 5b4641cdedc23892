"""common/health.py: what the log says of a run's health, each value against its definition."""

from types import SimpleNamespace

import pytest
import torch

from common.health import heads_log, student_log, watch


def test_both_terms_gradients_at_the_students_output_by_hand():
    """Two images of one pixel; the loss is a mean over them. Root mean squares of (3, 4) and of 2.5
    times (1, 2), the loss having λ = 2.5 in it."""
    x_hat = torch.tensor([[1.0], [2.0]], requires_grad=True)
    judged, compared = x_hat.view_as(x_hat), x_hat.view_as(x_hat)
    log = watch(SimpleNamespace(views={"adversarial": judged, "distillation": compared}))
    assert log == {}
    adversarial = (torch.tensor([[3.0], [4.0]]) * judged).mean()
    (adversarial + 2.5 * (compared**2 / 2).mean()).backward()
    assert log.keys() == {"gradient_adversarial", "gradient_distillation"}
    assert log["gradient_adversarial"].item() == pytest.approx((25 / 2) ** 0.5)
    assert log["gradient_distillation"].item() == pytest.approx(2.5 * (5 / 2) ** 0.5)
    assert x_hat.grad.flatten().tolist() == [1.5 + 1.25, 2.0 + 2.5]  # watched, not changed


def test_a_view_without_a_gradient_is_not_watched():
    x_hat = torch.ones(2, 1)
    assert watch(SimpleNamespace(views={"adversarial": x_hat})) == {}


def test_the_students_log_by_hand():
    """T = 8, so quarters of two timesteps; an empty one counts 0, and the four average to the
    whole."""
    half = SimpleNamespace(
        adversarial=torch.tensor([1.0, -2.0, 3.0, 4.0]),
        distillation=torch.tensor([1.0, 2.0, 3.0, 10.0]),
        t=torch.tensor([0, 7, 1, 3]),
    )
    assert {name: x.item() for name, x in student_log(half, 8).items()} == {
        "adversarial": 1.5,
        "distillation": 4.0,
        "distillation_t0": 1.0 + 3.0,
        "distillation_t2": 10.0,
        "distillation_t4": 0.0,
        "distillation_t6": 2.0,
    }


def test_the_distillation_by_t_averages_to_each_quarters_own():
    """Over many iterations every quarter's average is the mean of the losses whose t fall into
    it."""
    g = torch.Generator().manual_seed(0)
    sums, expected, counts = torch.zeros(4), torch.zeros(4), torch.zeros(4)
    for _ in range(200):
        t = torch.randint(1000, (8,), generator=g)
        distillation = torch.rand(8, generator=g) + t / 250
        half = SimpleNamespace(adversarial=distillation, distillation=distillation, t=t)
        log = student_log(half, 1000)
        sums += torch.stack([log[f"distillation_t{low}"] for low in (0, 250, 500, 750)])
        expected.index_add_(0, t // 250, distillation)
        counts.index_add_(0, t // 250, torch.ones(8))
    # Exactly this estimate, whose expectation is the quarters' mean.
    torch.testing.assert_close(sums / 200, 4 * expected / counts.sum(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sums / 200, expected / counts, rtol=0.15, atol=0)


def heads_half(real, fake):
    return SimpleNamespace(
        hinge=torch.tensor([1.0, 2.0]), r1=torch.tensor([3.0, 5.0]), real_logits=real,
        fake_logits=fake,
    )  # fmt: skip


def test_the_heads_log_by_hand():
    """Means over tokens and samples, then over the two heads."""
    real = [torch.tensor([[3.0, -1.0], [0.5, 0.5]]), torch.tensor([[-2.0], [1.5]])]
    fake = [torch.tensor([[-4.0, -4.0], [-4.0, 4.0]]), torch.tensor([[-1.0], [-3.0]])]
    assert {name: x.item() for name, x in heads_log(heads_half(real, fake)).items()} == {
        "hinge": 1.5,
        "r1": 4.0,
        "logit_real": (0.75 - 0.25) / 2,
        "sign_real": (0.5 + 0.0) / 2,
        "logit_fake": (-2.0 - 2.0) / 2,
        "sign_fake": (-0.5 - 1.0) / 2,
        "discriminator_won": 0.0,
    }


# Of 40 tokens, how many logits are positive: of reals, of fakes.
WON = [(40, 0, 1), (39, 1, 1), (37, 0, 0), (40, 3, 0), (40, 40, 0), (0, 0, 0), (0, 40, 0)]


@pytest.mark.parametrize(("real", "fake", "won"), WON)
def test_a_discriminator_that_tells_19_of_20_tokens_on_both_sides_has_won(real, fake, won):
    """37 of 40 are fewer than that, 39 are more."""
    real, fake = ([(torch.arange(40) < n).float().view(8, 5) - 0.5] for n in (real, fake))
    assert heads_log(heads_half(real, fake))["discriminator_won"].item() == won
