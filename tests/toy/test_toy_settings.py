"""toy/settings.py: flags, JSON, and which stages a changed setting does again."""

import argparse
import dataclasses
import json

import pytest
from hypothesis import given, settings, strategies
from trust import assert_takes_a_value_or_names_itself

from common.flags import add_flags, flag, from_dict, show
from toy import run
from toy.settings import DRAWS, PRESETS, STAGES, Settings, stage_key


def key(stage, **changes):
    return stage_key(Settings(**changes), stage, "data")


@pytest.mark.parametrize(
    "change, stages_done_again",
    [
        (dict(teacher_lr=1.0), {"teacher", "distil", "eval"}),
        (dict(precision="bf16"), {"teacher", "distil", "eval"}),
        (dict(flip="true"), {"metric", "features", "teacher", "distil", "eval"}),
        (dict(distil_timesteps=(9, 99)), {"distil", "eval"}),
        (dict(features_depth=2), {"features", "distil", "eval"}),
        (dict(metric_steps=2), {"metric", "eval"}),
        (dict(distil_gamma=1.0), {"distil", "eval"}),
        (dict(eval_images=99), {"eval"}),
        (dict(seed=9), {"data", "metric", "features", "teacher", "distil", "eval"}),
        (dict(distil_widths=(8, 16)), {"second", "distil", "eval"}),
        (dict(distil_widths=(8, 16), distil_init="random"), {"distil", "eval"}),
        (dict(data_dir="elsewhere"), set()),
    ],
)
def test_a_changed_setting_does_its_stage_and_the_later_ones_again(change, stages_done_again):
    assert {stage for stage in STAGES if key(stage) != key(stage, **change)} == stages_done_again


def test_other_data_does_everything_again():
    settings = Settings(distil_widths=(8, 16))
    for stage in STAGES:
        assert stage_key(settings, stage, "a") != stage_key(settings, stage, "b")


def test_a_second_teacher_is_the_teacher_of_a_run_with_its_widths():
    second = key("second", distil_widths=(8, 16))
    assert second == key("teacher", teacher_widths=(8, 16), distil_widths=(8, 16))
    assert second == key("teacher", teacher_widths=(8, 16))


def test_every_kind_of_draws_has_a_seed_of_its_own():
    seeds = {draws: Settings(seed=100).seed_of(draws) for draws in DRAWS}
    assert sorted(seeds.values()) == list(range(100, 110))
    # Kept results were drawn with these.
    assert (seeds["metric"], seeds["teacher"], seeds["distil"], seeds["noise"]) == (
        101,
        103,
        104,
        105,
    )


def test_settings_survive_json_and_unknown_ones_are_refused():
    settings = Settings(**PRESETS["tiny"])
    as_json = json.loads(json.dumps(dataclasses.asdict(settings)))
    assert as_json["teacher_widths"] == [8, 16]
    assert from_dict(Settings, as_json) == settings
    with pytest.raises(ValueError, match="unknown setting teacher_stepz"):
        from_dict(Settings, {"teacher_stepz": 1})


FIELDS = {f.name: f for f in dataclasses.fields(Settings)}


@pytest.mark.parametrize("name", FIELDS)
def test_every_flag_takes_a_value_or_names_itself(name, capsys):
    def configure(argv):
        return run.configure(*run.parse_arguments(argv))[0]

    assert_takes_a_value_or_names_itself(FIELDS[name], configure, capsys)


def rising(numbers):
    return strategies.sets(numbers, min_size=1).map(lambda values: tuple(sorted(values)))


CHARACTERS = strategies.characters(exclude_categories=["Cs", "Cc"])
SOME = strategies.fixed_dictionaries(
    {},
    optional={
        "teacher_lr": strategies.floats(1e-12, 1e3),
        "distil_timesteps": rising(strategies.integers(0, 999)),
        "distil_c_text": strategies.booleans(),
        "eval_guidances": rising(strategies.floats(-100, 100)),
        "teacher_steps": strategies.integers(1, 10**7),
        "data_dir": strategies.text(CHARACTERS, min_size=1),
    },
)


@settings(max_examples=60, deadline=None)
@given(SOME)
def test_settings_go_through_the_command_line_and_json_unchanged(values):
    made, parser = Settings(**values), argparse.ArgumentParser()
    add_flags(parser, Settings)
    arguments = [f"--{flag(name)}={show(value)}" for name, value in values.items()]
    assert Settings(**vars(parser.parse_args(arguments))) == made
    assert from_dict(Settings, json.loads(json.dumps(dataclasses.asdict(made)))) == made
