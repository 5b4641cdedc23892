"""Where the toy's student starts: the teacher's pairs of noise and image, and what a student learns from them."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch

from add import Denoiser, Student, ddim
from checkpoints import read
from toy.samplers import dpm_solver
from toy.settings import PRESETS, Settings
from toy.start import Pairs, draw_pairs, make_student, pair_loss
from toy.teacher import Standardize, make_denoiser

SETTINGS = Settings(**PRESETS["tiny"] | dict(size=8, teacher_widths=(8, 16), pairs_number=130, pairs_steps=4, start_steps=60, distil_ema=0.9))
CPU = torch.device("cpu")
GREY = torch.tensor([0, 128, 255], dtype=torch.uint8)  # of the real images, one of each class: -1, 0 and 1
DATA = SimpleNamespace(train_images=GREY[:, None, None, None].expand(-1, 1, 8, 8), train_labels=torch.arange(3))


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    denoiser = make_denoiser(1, 3, SETTINGS, Standardize(0.0, 1.0))
    for p in denoiser.network.parameters():  # a fresh U-Net gives zeros
        torch.nn.init.normal_(p, std=0.2)
    return denoiser.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def pairs(teacher, tmp_path_factory):
    return draw_pairs(tmp_path_factory.mktemp("pairs"), teacher, DATA, SETTINGS, CPU, "k")[0]


def test_a_pair_is_a_noise_and_what_the_teachers_sampler_makes_of_it(teacher, pairs):
    assert pairs.labels.tolist() == [i % 3 for i in range(130)]
    i = torch.tensor([0, 57, 129])  # the last lies in the second, smaller chunk
    timesteps = [torch.full((3,), t) for t in (999, 749, 499, 249)]
    by_hand, ddims = (
        sampler(teacher, pairs.noise[i], timesteps, i % 3, guidance=2.0, null_cond=torch.full((3,), 3)) for sampler in (dpm_solver, ddim)
    )
    torch.testing.assert_close(pairs.images[i], by_hand)
    assert (by_hand - ddims).abs().max() > 0.01
    assert pairs.noise.std() == pytest.approx(1, abs=0.05) and pairs.images.std() > 0.1
    assert pairs.images.abs().max() == 1  # clipped


def test_pairs_survive_a_checkpoint_and_refuse_anothers(teacher, pairs):
    fresh = Pairs(teacher, DATA, SETTINGS, CPU)
    assert torch.equal(fresh.noise, pairs.noise) and not fresh.images.any()
    fresh.load_state_dict(pairs.state_dict())
    assert torch.equal(fresh.images, pairs.images)
    with pytest.raises(ValueError, match="instead of"):
        Pairs(teacher, DATA, dataclasses.replace(SETTINGS, pairs_number=9), CPU).load_state_dict(pairs.state_dict())


def test_at_tau_n_a_pairs_noise_is_the_input_and_below_it_a_real_image_with_fresh_noise(teacher, pairs):
    """A network that gives back what it is fed shows it: x_s - x, squared, is the loss; nothing is clipped before."""
    seen = []

    def echo(x_s, s, cond):
        seen.append((x_s, s, cond))
        return x_s

    denoiser = Denoiser(echo, teacher.schedule, "x_0", teacher.encode, clip=torch.zeros_like)
    student = Student(denoiser, (199, 799), 0.5)
    loss = pair_loss(student, pairs, 200, torch.Generator().manual_seed(0))
    x_s, s, cond = seen[0]
    last = s == 799
    assert 70 < last.sum() < 130
    index = torch.stack([(pairs.noise == x).all((1, 2, 3)).nonzero()[0, 0] for x in x_s[last]])  # IndexError: no pair's noise
    assert len(index.unique()) > 40 and torch.equal(cond[last], pairs.labels[index])
    torch.testing.assert_close(loss[last], (x_s[last] - pairs.images[index]).square().mean((1, 2, 3)))

    alpha, sigma = teacher.schedule.alpha[199], teacher.schedule.sigma[199]
    label = (x_s[~last].mean((1, 2, 3)) / alpha).round().long() + 1  # by its grey; the noise's mean is about σ / 8
    assert torch.equal(cond[~last], label) and len(label.unique()) == 3
    x = GREY[label][:, None, None, None] / 127.5 - 1
    fresh = (x_s[~last] - alpha * x) / sigma
    assert fresh.std() == pytest.approx(1, abs=0.05) and fresh.mean().abs() < 0.05
    torch.testing.assert_close(loss[~last], (x_s[~last] - x).square().mean((1, 2, 3)))


def test_a_student_learns_the_pairs_and_the_teacher_stays(teacher, pairs, tmp_path, monkeypatch):
    drawn, draw = set(), Student.draw_timesteps

    def remember(student, *args):
        drawn.add(student.probabilities[-1])
        return draw(student, *args)

    monkeypatch.setattr(Student, "draw_timesteps", remember)
    before = copy.deepcopy(teacher.state_dict())
    settings = dataclasses.replace(SETTINGS, start_lr=3e-3)
    pairs = copy.copy(pairs)
    pairs.images = pairs.images.neg()  # far from what a copy of the teacher gives
    student, seconds = make_student(tmp_path, teacher, pairs, settings, CPU, "k")
    assert drawn == {settings.start_terminal_share} and student.probabilities == [0.25] * 4
    copied = Student(copy.deepcopy(teacher), settings.distil_timesteps)

    def loss(network):
        with torch.no_grad():
            return pair_loss(network, pairs, 200, torch.Generator().manual_seed(1)).mean()

    assert seconds > 0 and loss(student) < 0.9 * loss(copied)
    assert all(torch.equal(x, before[k]) for k, x in teacher.state_dict().items())
    assert all(p.requires_grad for p in student.parameters())
    state, weights = read(tmp_path / "checkpoint.pt"), student.denoiser.network.state_dict()
    assert all(torch.equal(weights[k], state["ema"][f"module.{k}"]) for k in weights)  # the average, not the last
    assert not all(torch.equal(weights[k], state["network"][k]) for k in weights)
    again, _ = make_student(tmp_path, teacher, pairs, settings, CPU, "k")  # from its checkpoint
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True))


def test_without_pairs_the_student_is_the_teachers_copy(teacher, tmp_path):
    settings = dataclasses.replace(SETTINGS, start="teacher")
    assert draw_pairs(tmp_path, teacher, DATA, settings, CPU, "k") == (None, 0.0)
    student, seconds = make_student(tmp_path, teacher, None, settings, CPU, "k")
    assert seconds == 0 and not any(tmp_path.iterdir())
    favoured, _ = make_student(tmp_path, teacher, None, dataclasses.replace(settings, distil_terminal_share=0.7), CPU, "k")
    assert student.probabilities == [0.25] * 4 and favoured.probabilities[-1] == 0.7
    for a, b in zip(student.parameters(), teacher.parameters(), strict=True):
        assert torch.equal(a, b) and a is not b and a.requires_grad
