"""toy/teacher.py and toy/distil.py: what the networks are trained on, and what they start from."""

import math

import pytest
import torch
from toy_runs import make_teacher, stage_at

from add import ADD, Denoiser, LocalBatchNorm
from toy.data import Batches, Dataset
from toy.distil import build_add, distil, make_student
from toy.features import TeacherEncoder
from toy.settings import Settings
from toy.teacher import Standardize, cosine_schedule, training_target


def test_training_targets_are_what_the_denoiser_reads_back():
    schedule, x_0, noise = cosine_schedule(), torch.randn(4, 1, 2, 2), torch.randn(4, 1, 2, 2)
    t = torch.tensor([1, 200, 500, 900])
    for prediction in ("epsilon", "v", "x_0"):
        target = training_target(x_0, noise, *schedule.coefficients(t), prediction)
        denoiser = Denoiser(lambda *_, target=target: target, schedule, prediction)
        x_hat, eps_hat = denoiser.predict(schedule.diffuse(x_0, noise, t), t, None)
        torch.testing.assert_close(x_hat, x_0, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(eps_hat, noise, atol=1e-4, rtol=1e-4)


def test_standardize_gives_mean_0_and_deviation_1_and_inverts():
    images = torch.randn(50, 1, 4, 4) * 0.3 - 0.8
    standardize = Standardize.of(images)
    z = standardize(images)
    assert z.mean().item() == pytest.approx(0, abs=1e-5)
    assert z.std().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(standardize.inverse(z), images)
    outside = torch.tensor([-1.3, -1.0, 0.5, 1.2, math.inf, -math.inf])
    inside = torch.tensor([-1.0, -1.0, 0.5, 1.0, math.inf, -math.inf])
    torch.testing.assert_close(standardize.inverse(standardize.clip(standardize(outside))), inside)


def test_the_student_starts_as_the_teacher_without_its_dropout():
    teacher = make_teacher(dropout=0.5).requires_grad_(False)
    student = make_student(teacher, Settings()).train()
    inputs = torch.randn(2, 1, 16, 16), torch.tensor([249, 999]), torch.tensor([0, 3])
    assert torch.equal(student(*inputs), teacher.eval()(*inputs))
    assert all(p.requires_grad for p in student.parameters())
    # The teacher has kept its own.
    assert (teacher.train()(*inputs) - student(*inputs)).abs().max() > 1e-3


def test_a_student_of_another_size_starts_as_the_second_teacher_a_random_one_as_nobody():
    teacher, second = make_teacher(), make_teacher(dropout=0.5)
    second.network.stem.weight.data.add_(1)
    student = make_student(teacher, Settings(distil_widths=(8, 16)), second)
    assert torch.equal(student.denoiser.network.stem.weight, second.network.stem.weight)
    settings = Settings(distil_widths=(16, 24), distil_init="random")
    random, again = (make_student(teacher, settings).denoiser for _ in range(2))
    assert random.network.map_channels == [16, 24, 24] and random.network.classes == 3
    assert torch.equal(random.network.stem.weight, again.network.stem.weight)
    # What it diffuses is the teacher's space, and it gives ε, v or x_0 as the teacher does.
    assert random.encode is teacher.encode and random.prediction == teacher.prediction
    assert all(p.requires_grad for p in random.parameters())


@pytest.mark.parametrize("local_norm", [True, False])
def test_local_batch_norm_can_be_left_out_of_the_heads(local_norm):
    teacher = make_teacher()
    settings = Settings(distil_local_norm=local_norm, distil_head_width=8)
    student, features = make_student(teacher, settings), TeacherEncoder(teacher, 0)
    heads = build_add(student, teacher, features, 3, settings, torch.device("cpu"))
    norms = sum(isinstance(m, LocalBatchNorm) for m in heads.modules())
    assert norms == 2 * len(features.channels) * local_norm


def test_add_is_given_the_batches_as_they_come_mirrored_if_asked(tmp_path, monkeypatch):
    images, labels, seen, half = torch.rand(16, 1, 8, 8), torch.arange(16) % 3, [], ADD.student_half

    def watched(self, batch, *rest):
        seen.append(batch)
        return half(self, batch, *rest)

    monkeypatch.setattr(ADD, "student_half", watched)
    own = dict(flip="true", distil_steps=3, distil_batch=6, distil_head_width=8, precision="fp32")
    data = Dataset("noise", images, labels, images, labels, ("a", "b", "c"))
    teacher, stage = make_teacher(), stage_at(tmp_path, data=data, **own)
    distil(stage, teacher, TeacherEncoder(teacher, 0))
    expected = Batches(images, labels, 6, stage.settings.seed_of("distil"), flip=True)
    for batch, (x_0, label) in zip(seen, expected, strict=False):
        assert torch.equal(batch.x_0, x_0) and torch.equal(batch.cond, label)
    assert len(seen) == 3
