"""toy/rivals/: each rival's target, who moves, and its sampler."""

from types import SimpleNamespace

import pytest
import torch
from rival_runs import Answer, count_calls, has_gradient, make, moved, weights

from add import Denoiser, ddim
from toy.data import to_float
from toy.rivals import consistency, progressive
from toy.rivals.consistency import Consistency
from toy.rivals.dmd2 import DMD2
from toy.rivals.pairs import draw_pairs
from toy.rivals.progressive import Progressive
from toy.rivals.reflow import Reflow
from toy.rivals.regression import Regression
from toy.rivals.ufogen import UFOGen
from toy.samplers import denoise
from toy.settings import Settings

CPU = torch.device("cpu")
RIVALS = [Consistency, DMD2, Progressive, Reflow, Regression, UFOGen]


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


def test_every_phase_of_progressive_warms_up_anew(tmp_path):
    training = make(Progressive, tmp_path, steps=8, lr=1e-2)
    rates = []
    for i in range(8):
        training.step(i)
        rates.append(training.lr[0].get_last_lr()[0])
    after_one, after_two = 1e-2 * 2 / 50, 1e-2 * 3 / 50 * 0.02
    assert rates == pytest.approx([after_one, after_two] * 4) and len(training.lr) == 1


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


def test_consistency_is_trained_at_every_timestep_of_its_grid(tmp_path, monkeypatch):
    training, drawn = make(Consistency, tmp_path), []
    monkeypatch.setattr(training, "target", lambda x_s, n, labels: drawn.append((x_s, n)) or x_s)
    for _ in range(60):
        training.loss(*next(training.batches))
    x_s, n = (torch.cat(x) for x in zip(*drawn, strict=True))
    assert sorted(set(n.tolist())) == list(range(20)) and training.student.tau[19] == 999
    # Pure noise there; images diffused a little at the other end, in the space that is diffused.
    assert x_s[n == 19].std().item() == pytest.approx(1, abs=0.1)
    clean = training.denoiser.encode(to_float(training.batches.images))
    assert x_s[n == 0].mean().item() == pytest.approx(clean.mean().item(), abs=0.15)


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
