"""Options of a recovery: defaults, limits, and how much of a short training its evaluations may take."""

import dataclasses
import math

import pytest

from llm_surgeon.config.recover import RecoverConfig
from llm_surgeon.errors import InputError

COUNTS = {field.name for field in dataclasses.fields(RecoverConfig) if str(field.type) in ("int", "int | None")} - {
    "seed"
}


def test_the_counts_are_those_that_the_limits_are_tested_for():
    assert len(COUNTS) == 10 and {"steps", "warmup_steps", "rank", "eval_windows"} <= COUNTS


@pytest.mark.parametrize("option", sorted(COUNTS))
def test_counts_are_integers_in_reach(option):
    for value in (True, 1.0, "7", math.nan, -1):
        with pytest.raises(InputError, match=rf"^{option} must be a whole number of at least \d, not "):
            RecoverConfig(**{option: value})
    for value in (2**31, 2**70, 10**5000):
        with pytest.raises(InputError, match=rf"^{option} must be at most 2147483647, not "):
            RecoverConfig(**{option: value})


@pytest.mark.parametrize("option", ["learning_rate", "alpha", "temperature", "weight_decay", "dropout"])
def test_numbers_are_finite(option):
    for value in (math.nan, math.inf, -1.0, True, "1", 10**400):
        with pytest.raises(InputError, match=f"^{option} must be "):
            RecoverConfig(**{option: value})


def test_seeds_are_what_numpy_takes():
    assert RecoverConfig(seed=2**32 - 1).seed == 2**32 - 1
    for value, words in (
        (2**32, "at most 4294967295, not 4294967296"),
        (0.5, "a whole number"),
        (-1, "a whole number"),
    ):
        with pytest.raises(InputError, match=f"^seed must be {words}"):
            RecoverConfig(seed=value)


def test_a_choice_or_an_option_that_is_nearly_right_is_asked_about():
    with pytest.raises(InputError, match=r"unknown method 'lorra' \(do you mean 'lora'\?\): choose one of lora, full"):
        RecoverConfig(method="lorra")
    with pytest.raises(InputError, match=r"unknown option 'step': do you mean 'steps'\?"):
        RecoverConfig.from_mapping({"step": 3})


@pytest.mark.parametrize(
    "options, windows",
    [
        ({}, 64),  # 10 evaluations and two of 64 windows, beside 6400 that are trained on
        ({"steps": 5, "batch_size": 4}, 2),  # 7 times 2, beside 20
        ({"steps": 5, "batch_size": 4, "eval_every": 5}, 6),
        ({"steps": 1, "batch_size": 1}, 1),
        ({"steps": 5, "batch_size": 4, "eval_windows": 64}, 64),
        ({"preset": "llm-pruner"}, 64),
    ],
)
def test_evaluations_see_no_more_than_the_training(options, windows):
    config = RecoverConfig.from_mapping(options)
    assert config.held_out_windows == windows
    evaluations = math.ceil(config.steps / config.eval_every) + 2
    assert windows in (1, config.eval_windows) or evaluations * windows <= config.steps * config.batch_size
