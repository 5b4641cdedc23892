"""add.py, section 7: the paper's defaults, and what ADD refuses."""

import dataclasses
import math

import pytest
import torch
from helpers import assert_refused, generator, make_add, make_batch
from torch import nn

from add import ADD, ADDConfig, Denoiser, NoiseSchedule, Student, distance


def test_paper_defaults():
    config = ADDConfig()
    assert (config.lambda_, config.gamma) == (2.5, 1e-5)
    assert (config.weight, config.teacher_steps, config.guidance) == ("exponential", 1, 1.0)
    assert (config.space, config.shared_latents) == ("pixel", True)
    assert config.sds_w(torch.tensor(3.0)) == 9  # DreamFusion's w(t) = σ_t²
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.gamma = -1.0  # it would not be checked
    assert ADDConfig(guidance=(1, 8)).guidance == (1, 8)  # integers will do


def test_what_is_left_out_is_the_papers():
    student = Student(Denoiser(nn.Identity(), NoiseSchedule.scaled_linear(), "v"))
    assert student.timesteps == (249, 499, 749, 999)
    assert ADD(student, nn.Identity(), nn.Identity()).config == ADDConfig()


def config(**setting):
    return lambda: ADDConfig(**setting)


def without(name, **setting):
    """A student's half of a batch that lacks one of its fields."""
    model, batch = make_add(**setting), make_batch()
    setattr(batch, name, None)
    return lambda: model.student_half(batch, generator())


WEIGHTS = ["'exponential'", "'sds'", "'nfsd'"]
NOT_NEGATIVE = "finite and at least 0"
ERRORS = {  # what is done wrong → what the message must say
    "weight": (config(weight="snr"), ["weight='snr'", *WEIGHTS]),
    "space": (config(space="diffused"), ["space='diffused'", "'pixel'", "'latent'"]),
    "reduction": (config(reduction="max"), ["reduction='max'", "'mean'", "'sum'"]),
    "lambda_ < 0": (config(lambda_=-1.0), ["lambda_=-1.0", NOT_NEGATIVE]),
    "lambda_ nan": (config(lambda_=math.nan), ["lambda_=nan", NOT_NEGATIVE]),
    "lambda_ inf": (config(lambda_=math.inf), ["lambda_=inf", NOT_NEGATIVE]),
    "gamma < 0": (config(gamma=-1e-5), ["gamma=-1e-05", NOT_NEGATIVE]),
    "gamma inf": (config(gamma=math.inf), ["gamma=inf", NOT_NEGATIVE]),
    "guidance that falls": (config(guidance=(4.0, 2.0)), ["guidance=(4.0, 2.0)", "a rising pair"]),
    "guidance nan": (config(guidance=math.nan), ["guidance=nan", "a number"]),
    "guidance inf": (config(guidance=(1.0, math.inf)), ["guidance=(1.0, inf)", "a number"]),
    "guidance -inf": (config(guidance=(-math.inf, 1.0)), ["guidance=(-inf, 1.0)", "a number"]),
    "guidance list": (config(guidance=[1.0, 2.0]), ["guidance=[1.0, 2.0]", "a rising pair"]),
    "guidance of three": (config(guidance=(1.0, 2.0, 3.0)), ["guidance=(1.0, 2", "a rising pair"]),
    "no teacher_steps": (config(teacher_steps=0), ["teacher_steps=0", "from 1 to 1000"]),
    "teacher_steps 1.5": (config(teacher_steps=1.5), ["teacher_steps=1.5", "from 1 to 1000"]),
    "teacher_steps 1.0": (config(teacher_steps=1.0), ["teacher_steps=1.0", "from 1 to 1000"]),
    "teacher_steps of nfsd": (
        config(weight="nfsd", teacher_steps=2),
        ["teacher_steps=2", "1 with nfsd"],
    ),
    "shapes": (
        lambda: distance(torch.ones(2, 3), torch.ones(2, 1)),
        ["x (2, 3)", "y (2, 1)", "one shape"],
    ),
    "guidance alone": (without("null_cond", guidance=2.0), ["guidance=2.0", "null_cond"]),
    "range alone": (without("null_cond", guidance=(2.0, 3.0)), ["guidance=", "null_cond"]),
    "nfsd without null": (without("null_cond", weight="nfsd"), ["'nfsd'", "null_cond"]),
    "nfsd without y_neg": (without("negative_cond", weight="nfsd"), ["'nfsd'", "negative_cond"]),
    "c_text missing": (without("c_text"), ["c_text", "None", "(8, 4)"]),
    "c_img missing": (without("c_img"), ["c_img", "None", "(8, 5)"]),
}


@pytest.mark.parametrize("case", ERRORS)
def test_add_errors_name_argument_value_and_what_is_allowed(case):
    assert_refused(*ERRORS[case])


def test_teacher_steps_of_one_are_allowed_with_nfsd():
    model = make_add(weight="nfsd", teacher_steps=1)
    assert model.student_half(make_batch(), generator()).loss.isfinite()


def test_a_student_that_is_its_own_teacher_is_refused():
    """Freezing the teacher would freeze the student, silently."""
    network = nn.Linear(1, 1)
    denoiser = Denoiser(network, NoiseSchedule.scaled_linear(), "v")
    with pytest.raises(ValueError, match="share parameters.*deepcopy"):
        ADD(Student(denoiser), denoiser, nn.Identity())
    assert all(p.requires_grad for p in network.parameters())


def test_a_student_that_shares_a_part_with_its_teacher_is_refused():
    shared, schedule = nn.Linear(1, 1), NoiseSchedule.scaled_linear()
    student, teacher = (
        Denoiser(nn.Sequential(shared, nn.Linear(1, 1)), schedule, "v") for _ in range(2)
    )
    with pytest.raises(ValueError, match="share parameters"):
        ADD(Student(student), teacher, nn.Identity())
    assert shared.weight.requires_grad
