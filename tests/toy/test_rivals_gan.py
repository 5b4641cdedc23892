"""toy/rivals/ufogen.py and dmd2.py: their losses, who moves, what the discriminator sees."""

import pytest
import torch
from rival_runs import Answer, has_gradient, make, moved, weights
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional

from add import Denoiser
from toy.rivals import dmd2, ufogen
from toy.rivals.consistency import Consistency
from toy.rivals.dmd2 import DMD2
from toy.rivals.training import gan_discriminator_loss, gan_generator_loss
from toy.rivals.ufogen import UFOGen

# UFOGen ===========================================================================================


def test_the_gan_losses_by_hand():
    real, fake = torch.tensor([1.0]), torch.tensor([-2.0])
    assert gan_discriminator_loss(real, fake).item() == pytest.approx(0.313262 + 0.126928, abs=1e-5)
    assert gan_generator_loss(fake).item() == pytest.approx(2.126928, abs=1e-5)


def test_the_kl_weight_is_that_of_diffusions_last_step():
    """KL(q(x_s | x_r) ‖ p(x_s | x̂_r)) with one noise in x_r and x̂_r."""
    x, x_hat, noise, alpha_s, alpha_r = (torch.tensor(v) for v in (0.7, -0.4, 0.9, 0.6, 0.8))
    ratio, sigma_r = alpha_s / alpha_r, (1 - alpha_r**2).sqrt()
    scale = (1 - ratio**2).sqrt()
    true, ours = (Normal(ratio * (alpha_r * v + sigma_r * noise), scale) for v in (x, x_hat))
    expected = kl_divergence(true, ours) / (x - x_hat) ** 2
    torch.testing.assert_close(ufogen.kl_weight(alpha_s, alpha_r), expected)


def test_ufogen_looks_one_timestep_below_and_moves_one_network_at_a_time(tmp_path, monkeypatch):
    training = make(UFOGen, tmp_path)
    images, labels = next(training.batches)
    assert moved(training.network, lambda: training.move_generator(images, labels))
    assert not has_gradient(training.discriminator)
    _, (x_0, x_hat, r) = training.move_generator(images, labels)
    torch.testing.assert_close(x_0, training.denoiser.encode(images))
    network = weights(training.network)

    def discriminate():
        training.move_discriminator(x_0, x_hat, r, labels)

    assert moved(training.discriminator.network.stem, discriminate)
    assert moved(training.discriminator.last, discriminate)
    assert torch.equal(weights(training.network), network)
    # Value: its two terms, with a discriminator that remembers where it looked.
    looked = []

    class Judge(nn.Module):
        def forward(self, x, t, label):
            looked.append((x, t))
            return torch.full((len(x),), -2.0)

    training.discriminator = Judge()
    s = torch.tensor([249, 499, 749, 999])
    monkeypatch.setattr(training.student, "draw_timesteps", lambda *_: s)
    loss, x_0, x_hat, r = training.generator_loss(images, labels)
    assert r.tolist() == looked[0][1].tolist() == [0, 249, 499, 749]
    a, b = training.schedule.alpha[s] ** 2, training.schedule.alpha[r] ** 2
    squares = (x_hat - x_0).square().mean((1, 2, 3))
    reconstruction = (a / (2 * (1 - a / b)) * squares).mean()
    torch.testing.assert_close(loss, functional.softplus(torch.tensor(2.0)) + reconstruction)
    # Real and generated images have noise of their own.
    training.discriminator_loss(x_0, x_0, r, labels)
    assert not torch.equal(looked[-2][0], looked[-1][0])


def test_ufogens_discriminator_tells_real_from_generated_and_moves_the_generator(
    tmp_path, monkeypatch
):
    training = make(UFOGen, tmp_path)
    monkeypatch.setattr(ufogen, "KL_WEIGHT", 0.0)  # then the discriminator alone is left
    images, labels = next(training.batches)
    assert moved(training.network, lambda: training.move_generator(images, labels))
    training.discriminator = lambda x, t, label: x.mean((1, 2, 3))
    real, r = torch.full((4, 1, 8, 8), 5.0), torch.zeros(4, dtype=torch.long)
    right, wrong = (training.discriminator_loss(x, -x, r, labels)[0] for x in (real, -real))
    assert right < 0.1 and wrong > 5


# DMD2 =============================================================================================


def test_the_matching_gradient_by_hand():
    x_hat, real, fake = (torch.tensor(v).view(1, 1, 1, 2) for v in ([2.0, 0], [1.0, 3], [4.0, 3]))
    # |x̂ - real| has mean (1 + 3) / 2; fake - real is (3, 0).
    assert dmd2.matching_gradient(x_hat, real, fake).flatten().tolist() == [1.5, 0]
    # Each image has a scale of its own: the second is twice as far off.
    pairs_of = ((x_hat, 2 * x_hat - real), (real, real), (fake, fake))
    gradient = dmd2.matching_gradient(*(torch.cat(pair) for pair in pairs_of))
    assert gradient.flatten().tolist() == [1.5, 0, 0.75, 0]


def test_dmd2_moves_generated_images_from_the_fake_to_the_real_estimate(tmp_path, monkeypatch):
    training = make(DMD2, tmp_path)
    x_hat = torch.randn(4, 1, 8, 8, requires_grad=True)
    real, fake = torch.randn(2, 4, 1, 8, 8)
    monkeypatch.setattr(training, "generate", lambda *_: x_hat)
    monkeypatch.setattr(training, "teacher", lambda *_: real)  # without guidance
    monkeypatch.setattr(training, "fake", lambda *_: fake)
    monkeypatch.setattr(dmd2, "GENERATOR_GAN", 0.0)
    (loss,) = training.generator_loss(*next(training.batches))
    loss.backward()
    expected = dmd2.matching_gradient(x_hat.detach(), real, fake) / x_hat.numel()
    torch.testing.assert_close(x_hat.grad, expected)
    assert ((x_hat.grad * (fake - real)).flatten(1).sum(1) > 0).all()  # descent goes to real


def test_dmd2_gan_term_reaches_the_generator_and_the_critic_is_still(tmp_path, monkeypatch):
    training = make(DMD2, tmp_path)
    images, labels = next(training.batches)
    # Without the matching term only the critic is left to move the generator.
    monkeypatch.setattr(dmd2, "matching_gradient", lambda x_hat, *_: torch.zeros_like(x_hat))
    critic = weights(training.critic)
    assert moved(training.network, lambda: training.move_generator(images, labels))
    assert torch.equal(weights(training.critic), critic) and not has_gradient(training.critic)


def test_dmd2_fake_score_learns_generated_images_and_its_head_to_tell(tmp_path, monkeypatch):
    training = make(DMD2, tmp_path)
    images, labels = next(training.batches)
    network = weights(training.network)
    for part in (training.critic.network.stem, training.critic.network.out, training.critic.last):
        assert moved(part, lambda: training.move_fake(images, labels))
    assert torch.equal(weights(training.network), network)
    # Value: the v-loss of x̂ = 0 is that of v = α ε; the critic's logits are made up.
    seen = []

    class Critic(nn.Module):
        def forward(self, x, t, label):
            seen.append(x)
            return torch.full((len(x),), 1.0)

        def judge(self, middle):
            seen.append(middle)
            return torch.full((len(middle),), -2.0)

    training.critic, training.fake = Critic(), Denoiser(Answer(0.0), training.schedule, "v")
    monkeypatch.setattr(training, "generate", lambda x_0, labels: torch.zeros_like(x_0))
    monkeypatch.setattr(training, "draw_timesteps", lambda n: torch.full((n,), 499))
    training.fake.network.x = torch.zeros(4, 1, 8, 8)
    (loss,) = training.fake_loss(images, labels)
    alpha, sigma = training.schedule.alpha[499], training.schedule.sigma[499]
    noise = seen[1] / sigma  # the second that it judged is the generated one
    expected = (alpha * noise).square().mean() + 1e-2 * (0.313262 + 0.126928)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    x_0 = training.denoiser.encode(images)
    assert (seen[0] - alpha * x_0).std() == pytest.approx(sigma.item(), rel=0.2)
    assert (seen[0] - alpha * x_0).mean().abs() < 0.2


def test_estimates_of_further_networks_are_clipped_as_the_teachers_are(tmp_path):
    def clip(x):
        return x.clamp(-1, 1)

    assert make(DMD2, tmp_path, clip=clip).fake.clip is clip
    assert make(Consistency, tmp_path, clip=clip).target_denoiser.clip is clip


@pytest.mark.parametrize("bf16", [False, True])
def test_a_critic_judges_the_middle_of_a_pass_as_it_judges_the_image(bf16, tmp_path):
    training = make(DMD2, tmp_path)
    training.fake.network.bf16 = bf16
    x, t, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 9, 499, 999]), torch.arange(4) % 3
    output, middle = training.fake.network.with_middle(x, t, labels)
    assert output.dtype == middle.dtype == torch.float32
    torch.testing.assert_close(training.critic.judge(middle), training.critic(x, t, labels))
    assert torch.equal(output, training.fake.network(x, t, labels))


@pytest.mark.parametrize("rival", [DMD2, UFOGen])
def test_both_sides_follow_the_schedule_of_the_learning_rate(rival, tmp_path):
    training = make(rival, tmp_path, steps=4, lr=1e-2)
    rates = [schedule.get_last_lr()[0] for schedule in training.lr]
    assert rates == [1e-2 / 50] * 2  # the first of 50 steps of warm-up
    for i in range(4):
        training.step(i)
    assert [s.get_last_lr()[0] for s in training.lr] == pytest.approx([1e-2 * 5 / 50 * 0.02] * 2)


def test_dmd2_moves_the_fake_score_more_often(tmp_path, monkeypatch):
    training, moves = make(DMD2, tmp_path), []
    monkeypatch.setattr(training, "after_step", lambda: None)
    for name in ("move_fake", "move_generator"):
        monkeypatch.setattr(training, name, lambda *_, n=name: moves.append(n) or ({}, []))
    training.step(0)
    assert moves == ["move_fake"] * dmd2.FAKE_UPDATES + ["move_generator"]
    t = training.draw_timesteps(5000)
    assert t.min() == 20 and t.max() == 979
