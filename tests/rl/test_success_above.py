"""`success_above` says what passes, in validation and in the shares of groups too."""

import numpy as np
import pytest
import torch

from rl import metrics
from rl.evaluation import evaluate
from rl.waves import roll_out_wave
from tests import tiny


def one_to_five(completions, **_):
    """5 where the completion begins with a digit below 4, else 1."""
    return [1 + 4 * reward for reward in tiny.small_digit(completions)]


def validated(folder, **settings):
    made = tiny.trainer(folder, reward=one_to_five, data=tiny.rows("ab"), **settings)
    return made, made._make_prompts(tiny.rows("c"))[0]


def test_a_reward_below_the_line_is_no_success(tmp_path):
    made, prompts = validated(tmp_path, success_above=3.0)
    found = evaluate(made.line, prompts, version=0)
    # Rewards are 1 and 5, so their mean is 1 + 4 times the share of successes.
    assert found["pass_rate"] == pytest.approx((found["reward"] - 1) / 4)
    assert 0 < found["pass_rate"] < 1


def test_without_one_the_line_is_at_one_half_and_an_argument_wins(tmp_path):
    made, prompts = validated(tmp_path)
    assert evaluate(made.line, prompts, version=0)["pass_rate"] == 1
    set_at_3, prompts = validated(tmp_path / "set", success_above=3.0)
    found = evaluate(set_at_3.line, prompts, version=0, success_above=6.0)
    assert found["pass_rate"] == 0


@pytest.mark.parametrize(("success_above", "all_pass"), [(None, 1.0), (3.0, 0.0), (1.5, 1.0)])
def test_groups_pass_where_the_ledger_says_they_do(tmp_path, success_above, all_pass):
    def always_two(completions, **_):
        return [2.0] * len(completions)

    # Without success_above the planner takes rewards in [0, 1] alone, so it is told of another.
    made = tiny.trainer(tmp_path, reward=always_two, success_above=success_above or 0.0)
    made.ledger.begin(0)
    wave = roll_out_wave(made.line, version=0)
    kept = wave.rounds[0].rollouts.take(torch.arange(0))
    found = metrics.of_rollouts([wave], kept, success_above=success_above)
    assert found["groups/all_pass_share"] == all_pass
    assert found["groups/all_fail_share"] == 1 - all_pass
    reason = made.planner.admit(np.full(4, 2.0)).reason
    assert reason == ("all_pass" if all_pass else "all_fail")
