"""toy/rivals/: each rival's target, who moves, and its sampler."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional
from toy_runs import make_teacher, stage_at

from add import Denoiser, ddim
from toy.data import Dataset
from toy.rivals import consistency, dmd2, progressive, ufogen
from toy.rivals.consistency import Consistency
from toy.rivals.dmd2 import DMD2
from toy.rivals.pairs import Pairs, draw_pairs
from toy.rivals.progressive import Progressive
from toy.rivals.reflow import Reflow
from toy.rivals.regression import Regression
from toy.rivals.training import gan_discriminator_loss, gan_generator_loss
from toy.rivals.ufogen import UFOGen
from toy.samplers import denoise
from toy.settings import Settings

CPU = torch.device("cpu")
RIVALS = [Consistency, DMD2, Progressive, Reflow, Regression, UFOGen]


def make(rival, folder, steps=4, guidance=2.0, lr=1e-2, **more):
    """A rival's training on random images of three classes, 8 × 8."""
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(256, (12, 1, 8, 8), generator=draws).byte()
    labels = torch.arange(12) % 3
    data = Dataset("random", images, labels, images, labels, ("a", "b", "c"))
    stage = stage_at(folder, data=data, distil_batch=4, precision="fp32", flip="false")
    teacher = make_teacher().eval().requires_grad_(False)
    teacher.clip = None  # else most of what random weights give would have no gradient
    if rival.PAIRS:
        z = torch.randn(8, 1, 8, 8, generator=draws)
        more.setdefault("pairs", Pairs(z, z.flip(3), torch.arange(8) % 3))
    return rival(stage, teacher, lr, steps, guidance, **more)


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()]).clone()


def moved(module, action):
    """Whether the action changes a module's weights."""
    before = weights(module)
    action()
    return not torch.equal(before, weights(module))


def has_gradient(module):
    return any(p.grad is not None and p.grad.any() for p in module.parameters())


def count_calls(network, action):
    calls = []
    handle = network.register_forward_hook(lambda *_: calls.append(1))
    result = action()
    handle.remove()
    return len(calls), result


@pytest.mark.parametrize("rival", RIVALS)
def test_the_student_moves_the_teacher_does_not_and_k_steps_are_k_calls(rival, tmp_path):
    training = make(rival, tmp_path)
    teacher, average = training.teacher, training.ema
    before = weights(teacher)

    def train():
        for i in range(4):
            log = training.step(i)
            assert all(v.isfinite() for v in log.values())

    assert moved(training.network, train)
    assert torch.equal(weights(teacher), before)
    training.finish()
    if rival is not Progressive:  # which has an average a phase
        assert torch.equal(weights(training.network), weights(average.module))
    noise, labels = torch.randn(3, 1, 8, 8), torch.arange(3)
    for k in rival.STEPS:
        student = training.kept[k] if rival is Progressive else training.denoiser
        generator = torch.Generator().manual_seed(0)
        calls, images = count_calls(
            student.network, lambda k=k, g=generator: training.sample(noise, labels, k, generator=g)
        )
        assert calls == k and images.shape == noise.shape
    # In one step the image is the estimate from pure noise at T - 1, in pixels.
    student = training.kept[1] if rival is Progressive else training.denoiser
    one = student.decode(student(noise, torch.full((3,), 999), labels))
    torch.testing.assert_close(training.sample(noise, labels, 1), one)


def test_the_average_forgets_as_adds_does(tmp_path):
    """Of half as many iterations it has half the memory."""
    settings = Settings()
    training = make(Regression, tmp_path, steps=settings.distil_steps // 2)
    old, new = weights(training.ema.module), None
    training.ema.update_parameters(training.network)  # the first is a copy
    with torch.no_grad():
        for p in training.network.parameters():
            p.add_(1)
    training.ema.update_parameters(training.network)
    new = weights(training.ema.module)
    decay = 0.5 ** (4 / (settings.distil_ema / 2))
    torch.testing.assert_close(new - old, torch.full_like(old, 1 - decay), atol=1e-6, rtol=0)


# Progressive distillation =========================================================================


def test_one_step_does_what_the_teachers_two_do():
    # x = 2, ε = 1: z_t = 0.6 · 2 + 0.8 and z'' = 0.8 · 2 + 0.6 come from x̃ = 2.
    assert progressive.rewound(2.0, 2.2, 0.6, 0.8, 0.8, 0.6) == pytest.approx(2)
    assert progressive.rewound(2.0, 1.0, 0.6, 0.8, 0.8, 0.6) == pytest.approx(-0.5 / 0.35)
    alpha, sigma = torch.tensor([0.8, 0.6]), torch.tensor([0.6, 0.8])
    torch.testing.assert_close(progressive.weight(alpha, sigma), torch.tensor([16 / 9, 1]))


def test_progressive_targets_are_two_guided_steps_of_the_teacher(tmp_path):
    training = make(Progressive, tmp_path)
    training.begin_phase()
    training.end_phase()
    training.phase, training.guidance = 0, 2.0
    training.teacher = make(Regression, tmp_path).teacher
    training.begin_phase()  # the second: 4 steps
    training.teacher, training.guidance = make(Regression, tmp_path).teacher, 2.0
    assert training.grid.tolist() == [999, 874, 749, 624, 499, 374, 249, 124]
    z, labels, null = torch.randn(2, 1, 8, 8), torch.tensor([1, 2]), torch.tensor([3, 3])
    target, alpha, sigma = training.target(z, torch.tensor([1, 3]), labels)
    teacher, schedule = training.teacher, training.schedule
    # Step 1: from 749 over 624 to 499. A DDIM step with x̃ must get there, too.
    two = [torch.full((2,), t) for t in (749, 624)]
    x_0, epsilon = teacher.predict(z, two[0], labels, 2.0, null)
    z_624 = schedule.diffuse(x_0, epsilon, two[1])
    x_0, epsilon = teacher.predict(z_624, two[1], labels, 2.0, null)
    z_499 = schedule.alpha[499] * x_0 + schedule.sigma[499] * epsilon
    noise = (z - schedule.alpha[749] * target) / schedule.sigma[749]
    landed = schedule.alpha[499] * target + schedule.sigma[499] * noise
    torch.testing.assert_close(landed[0], z_499[0])
    assert alpha[0] == schedule.alpha[749] and sigma[1] == schedule.sigma[249]
    # The last step ends at the clean image.
    last = [torch.full((2,), t) for t in (249, 124)]
    torch.testing.assert_close(target[1], ddim(teacher, z, last, labels, 2.0, null)[1])


def test_progressive_loss_is_weighted_and_begins_at_pure_noise(tmp_path, monkeypatch):
    training = make(Progressive, tmp_path)
    training.begin_phase()
    monkeypatch.setattr(training, "uniform", lambda high, n: torch.tensor([0, 7]))
    seen = {}

    def target(z_t, i, labels):
        seen["z_t"] = z_t
        return torch.zeros_like(z_t), *training.schedule.coefficients(training.grid[2 * i])

    monkeypatch.setattr(training, "target", target)
    images, labels = torch.zeros(2, 1, 8, 8), torch.tensor([0, 1])
    state = training.generator.get_state()
    (loss,) = training.loss(images, labels)
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0).set_state(state))
    torch.testing.assert_close(seen["z_t"][0], noise[0])
    t = torch.tensor([999, 124])
    x_hat = training.denoiser(seen["z_t"], t, labels)
    snr = (training.schedule.alpha[124] / training.schedule.sigma[124]) ** 2
    squares = x_hat.square().mean((1, 2, 3))
    torch.testing.assert_close(loss, (squares[0] + snr * squares[1]) / 2)


def test_each_phase_begins_where_the_last_ended_and_has_it_as_its_teacher(tmp_path):
    training = make(Progressive, tmp_path, steps=8)
    first = weights(training.teacher)
    training.step(0)
    assert training.phase == 0 and torch.equal(weights(training.teacher), first)
    assert training.guidance == 2
    training.step(1)
    average = weights(training.ema.module)
    optimizer = training.optimizer
    training.begin_phase()
    assert training.guidance == 1 and training.optimizer is not optimizer
    assert torch.equal(weights(training.network), average)
    assert torch.equal(weights(training.teacher), average)
    for i in range(2, 8):
        training.step(i)
    assert training.phase == 3 and training.phase_steps == 1
    training.finish()
    assert list(training.kept) == [8, 4, 2, 1]
    assert torch.equal(weights(training.kept[8]), average)
    assert len({weights(kept).sum().item() for kept in training.kept.values()}) == 4
    with pytest.raises(ValueError, match="steps=3: 4 phases need one each"):
        make(Progressive, tmp_path, steps=3)


# Consistency distillation =========================================================================


def test_consistency_target_is_the_averages_one_step_on_or_the_teachers_at_the_end(tmp_path):
    training = make(Consistency, tmp_path)
    with torch.no_grad():
        for p in training.average.module.parameters():
            p.mul_(0.5)  # so that it is neither the student nor the teacher
    grid = training.student.timesteps
    assert len(grid) == 20 and grid[0] == 49 and grid[1] == 99 and grid[-1] == 999
    x, labels, null = torch.randn(2, 1, 8, 8), torch.tensor([0, 1]), torch.tensor([3, 3])
    target = training.target(x, torch.tensor([0, 19]), labels)
    teacher, schedule = training.teacher, training.schedule
    x_0, _ = teacher.predict(x, torch.tensor([49, 49]), labels, 2.0, null)
    torch.testing.assert_close(target[0], x_0[0])
    x_0, epsilon = teacher.predict(x, torch.tensor([999, 999]), labels, 2.0, null)
    x_949 = schedule.alpha[949] * x_0 + schedule.sigma[949] * epsilon
    average = Denoiser(training.average.module, schedule, "v")
    torch.testing.assert_close(target[1], average(x_949, torch.tensor([949, 949]), labels)[1])


def test_consistency_moves_the_average_a_twentieth_and_gives_it_no_gradient(tmp_path):
    training = make(Consistency, tmp_path)
    training.step(0)  # the first is a copy
    before = weights(training.average.module)
    training.step(1)
    expected = 0.95 * before + 0.05 * weights(training.network)
    torch.testing.assert_close(weights(training.average.module), expected)
    assert has_gradient(training.network) and not has_gradient(training.average)
    assert consistency.TARGET_DECAY == 0.95
    assert training.sample(torch.randn(1, 1, 8, 8), torch.tensor([0]), 4).shape == (1, 1, 8, 8)
    assert training.student.inference_timesteps(4) == (999, 749, 499, 249)


# Pairs: 2-rectified flow, regression ==============================================================


def test_pairs_are_drawn_for_so_long_and_are_the_teachers_guided_samples(tmp_path):
    training = make(Regression, tmp_path)
    stage = SimpleNamespace(
        device=CPU,
        settings=training.settings,
        data=SimpleNamespace(classes="abc", train_images=torch.zeros(1, 1, 8, 8)),
    )
    times = iter([0.0, 4.0, 9.0, 10.0])
    drawn = draw_pairs(stage, training.teacher, 2.0, 10.0, lambda: next(times))
    assert drawn.noise.shape == drawn.images.shape == (300, 1, 8, 8)
    assert set(drawn.labels.tolist()) == {0, 1, 2}
    part = slice(200, 220)
    expected = denoise(training.teacher, drawn.noise[part], drawn.labels[part], 25, 2.0)
    torch.testing.assert_close(drawn.images[part], expected, atol=1e-4, rtol=1e-4)
    assert abs(drawn.noise.mean()) < 0.05 and abs(drawn.noise.std() - 1) < 0.05
    one = draw_pairs(stage, training.teacher, 1.0, 0.0)
    assert len(one.noise) == 100


class Answer(nn.Module):
    """A network that gives x̂_0 = x + e whatever it sees, and remembers that."""

    def __init__(self, x, e=0.0):
        super().__init__()
        self.x, self.e, self.seen = x, e, []

    def forward(self, x_t, t, label):
        self.seen.append((x_t, t))
        return self.x + self.e

    def with_middle(self, x_t, t, label):
        return self(x_t, t, label), x_t


def test_the_straight_path_begins_at_the_noise_and_euler_is_ddim(tmp_path, monkeypatch):
    training = make(Reflow, tmp_path)
    z, x, labels = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    x_t, velocity = training.straight(z, x, torch.tensor([999, 499]))
    torch.testing.assert_close(x_t[0], z[0])
    alpha, sigma = training.schedule.alpha, training.schedule.sigma
    # Straight in x_t / (α + σ), with the velocity as its slope in u.
    u = sigma / (alpha + sigma)
    straight = x[1] + u[499] * velocity[1]
    torch.testing.assert_close(x_t[1] / (alpha[499] + sigma[499]), straight)
    # An Euler step in u along a velocity is a DDIM step: here from 999 to 499.
    training.denoiser = Denoiser(Answer(x, 0.3), training.schedule, "x_0")
    x_0, epsilon = training.denoiser.predict(z, torch.tensor([999, 999]), labels)
    at = z / (alpha[999] + sigma[999]) + (u[499] - u[999]) * (epsilon - x_0)
    step = training.schedule.diffuse(x_0, epsilon, torch.tensor([499, 499]))
    torch.testing.assert_close(step / (alpha[499] + sigma[499]), at)
    # The loss: an error e of x̂_0 is one of e (1 + α/σ) of the velocity.
    monkeypatch.setattr(training, "draw_timesteps", lambda n: torch.full((n,), 499))
    expected = (0.3 * (1 + alpha[499] / sigma[499])) ** 2
    torch.testing.assert_close(training.loss(z, x, labels), expected)


def test_reflow_draws_u_uniformly(tmp_path):
    training = make(Reflow, tmp_path)
    t = training.draw_timesteps(20_000)
    assert 0 <= t.min() and t.max() == 999
    u = training.u[t]
    low, high = training.u[0], training.u[-1]
    for share in (0.25, 0.5, 0.75):
        below = (u < low + share * (high - low)).float().mean()
        assert abs(below - share) < 0.015


def test_two_steps_of_reflow_are_eulers_of_equal_length(tmp_path):
    training = make(Reflow, tmp_path)
    z, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    answer = Answer(torch.zeros(2, 1, 8, 8), 0.3)
    training.denoiser = Denoiser(answer, training.schedule, "x_0")
    training.sample(z, labels, 2)
    (_, first), (x_t, second) = answer.seen
    u = training.u
    assert first.tolist() == [999, 999] and second.unique().numel() == 1
    half = second[0]
    assert u[half - 1] < u[999] / 2 <= u[half]
    alpha, sigma = training.schedule.alpha, training.schedule.sigma
    # By hand, in y = x_t / (α + σ) = (1 - u) x + u z.
    y, velocity = z / (alpha[999] + sigma[999]), (z - alpha[999] * 0.3) / sigma[999] - 0.3
    y = y + (u[half] - u[999]) * velocity
    torch.testing.assert_close(x_t / (alpha[half] + sigma[half]), y)


def test_regression_is_in_one_step_from_the_noise(tmp_path):
    training = make(Regression, tmp_path)
    z, x, labels = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    answer = Answer(x, 0.3)
    training.denoiser = Denoiser(answer, training.schedule, "x_0")
    assert training.loss(z, x, labels).item() == pytest.approx(0.09)
    assert torch.equal(answer.seen[0][0], z) and answer.seen[0][1].tolist() == [999, 999]


def test_a_batch_of_pairs_keeps_noise_image_and_label_together(tmp_path, monkeypatch):
    training = make(Regression, tmp_path)
    seen = []
    monkeypatch.setattr(training, "loss", lambda *parts: seen.append(parts) or torch.zeros(()))
    training.drawn_loss()
    noise, images, labels = seen[0]
    assert len(noise) == 4 and torch.equal(noise.flip(3), images)
    where = [(training.pairs.noise == z).flatten(1).all(1).nonzero().item() for z in noise]
    assert [i % 3 for i in where] == labels.tolist()


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


def test_every_phase_of_progressive_warms_up_anew(tmp_path):
    training = make(Progressive, tmp_path, steps=8, lr=1e-2)
    rates = []
    for i in range(8):
        training.step(i)
        rates.append(training.lr[0].get_last_lr()[0])
    after_one, after_two = 1e-2 * 2 / 50, 1e-2 * 3 / 50 * 0.02
    assert rates == pytest.approx([after_one, after_two] * 4) and len(training.lr) == 1


def test_dmd2_moves_the_fake_score_more_often(tmp_path, monkeypatch):
    training, moves = make(DMD2, tmp_path), []
    monkeypatch.setattr(training, "after_step", lambda: None)
    for name in ("move_fake", "move_generator"):
        monkeypatch.setattr(training, name, lambda *_, n=name: moves.append(n) or ({}, []))
    training.step(0)
    assert moves == ["move_fake"] * dmd2.FAKE_UPDATES + ["move_generator"]
    t = training.draw_timesteps(5000)
    assert t.min() == 20 and t.max() == 979
