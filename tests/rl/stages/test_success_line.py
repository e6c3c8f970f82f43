"""A `success_above` that no reward is beside: when it is told, and when it is not."""

import warnings

import numpy as np
import pytest

from rl.stages.success_line import SuccessLine
from tests import tiny_denoising as tiny


def told(line, *steps, validation=()):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for reward_N in steps:
            line.trained(np.array(reward_N))
        if len(validation):
            line.validated(np.array(validation))
    return [str(each.message) for each in caught]


def test_a_line_below_or_above_all_rewards_is_told_once():
    low, high = [0.2, 0.4] * 4, [0.3, 0.6] * 4
    (message,) = told(SuccessLine(-300.0), low, high, low, high, validation=low)
    assert message.startswith(
        "success_above=-300: the first 16 rollouts of training have rewards from 0.2 to 0.6, so that "
        "all pass"
    )
    (message,) = told(SuccessLine(0.6), low, high)
    assert "none passes" in message  # a reward on the line is no success
    (message,) = told(SuccessLine(0.7), low, validation=[0.1, 0.2])
    assert "the first 2 rollouts of the first validation" in message


def test_a_line_that_splits_or_cannot_is_left_alone():
    assert not told(SuccessLine(None), [0.2, 0.4] * 8, validation=[0.2, 0.4])
    assert not told(SuccessLine(0.2), [0.2, 0.4] * 8, validation=[0.2, 0.4])
    assert not told(
        SuccessLine(0.5), [0.0] * 16, validation=[1.0] * 4
    )  # sparse, and not yet solved
    assert not told(SuccessLine(0.5), [0.2, 0.4], [])  # too few
    line = SuccessLine(0.5)
    assert not told(line, [0.2, 0.8] * 8, validation=[0.2, 0.8])
    assert not told(line, [0.6, 0.8] * 8, validation=[0.6, 0.8])  # it was learnt


@pytest.mark.slow
def test_a_run_whose_recipe_has_the_line_of_another_reward_is_told(tmp_path):
    made = tiny.trainer(tmp_path, success_above=-300.0, eval_dataset=tiny.rows(), max_steps=1)
    with pytest.warns(UserWarning, match="rollouts of the first validation have rewards from"):
        assert made.evaluate()["eval_pass_rate"] == 1
    made.sampling.success_line = SuccessLine(-300.0, least=12)  # has not warned yet
    with pytest.warns(UserWarning, match="success_above=-300: the first 12 rollouts .* all pass"):
        made.train()
