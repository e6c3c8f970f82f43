"""Rewards of any range train, and every figure reads success in one way."""

import pytest
import torch

from rl.stages import metrics
from rl.stages.validate import evaluate
from tests import tiny

pytestmark = pytest.mark.slow  # whole runs


def one_to_five(completions, **_):
    """5 where the completion begins with a digit below 4, else 1."""
    return [1 + 4 * reward for reward in tiny.small_digit(completions)]


def validated(folder, reward=one_to_five, **settings):
    made = tiny.trainer(folder, reward=reward, data=tiny.rows("ab"), **settings)
    return made, made._make_prompts(tiny.rows("c"))[0]


def always(value):
    def same(completions, **_):
        return [value] * len(completions)

    return same


def partly(completions, **_):
    return [0.25] * len(completions)


def test_a_reward_below_the_line_is_no_success(tmp_path):
    made, prompts = validated(tmp_path, success_above=3.0)
    found = evaluate(made.sampling, made.policy, prompts, version=0)
    # Rewards are 1 and 5, so their mean is 1 + 4 times the share of successes.
    assert found["pass_rate"] == pytest.approx((found["reward"] - 1) / 4)
    assert 0 < found["pass_rate"] < 1
    assert (
        evaluate(made.sampling, made.policy, prompts, version=0, success_above=6.0)["pass_rate"]
        == 0
    )


@pytest.mark.filterwarnings("ignore:a reward of")
def test_before_training_rewards_of_another_range_are_compared_with_each_other(tmp_path):
    made, prompts = validated(tmp_path)
    found = evaluate(made.sampling, made.policy, prompts, version=0)
    assert found["pass_rate"] == pytest.approx((found["reward"] - 1) / 4)
    assert made.planner.state_dict()["success"]["is_relative"] is False


def test_partial_credit_counts_in_the_pass_rate_and_passes_nothing(tmp_path):
    made, prompts = validated(tmp_path, reward=partly)
    found = evaluate(made.sampling, made.policy, prompts, version=0)
    assert (found["pass_rate"], found["greedy_accuracy"]) == (0.25, 0)


def test_one_of_two_rewards_is_half_of_full_marks(tmp_path):
    made, prompts = validated(
        tmp_path, reward=[always(0.0), partly, always_one], reward_weights=[0.5, 0.4, 0.6]
    )
    found = evaluate(made.sampling, made.policy, prompts, version=0)
    assert found["pass_rate"] == pytest.approx((0.25 * 0.4 + 0.6) / 1.5)
    assert found["greedy_accuracy"] == 0


def always_one(completions, **_):
    return [1.0] * len(completions)


def test_a_row_has_the_full_marks_of_the_rewards_that_apply_to_it(tmp_path):
    def only_fives(completions, answer, **_):
        return [1.0 if digit == "5" else None for digit in answer]

    def others(completions, answer, **_):
        return [None if digit == "5" else 1.0 for digit in answer]

    made, prompts = validated(tmp_path, reward=[only_fives, others])
    found = evaluate(made.sampling, made.policy, prompts, version=0)
    assert (found["pass_rate"], found["greedy_accuracy"]) == (1, 1)


@pytest.mark.parametrize(
    ("value", "settings", "all_pass"),
    [(1.0, {}, 1.0), (0.1, {}, 0.0), (2.0, {"success_above": 1.5}, 1.0), (2.0, {}, 0.0)],
)
@pytest.mark.filterwarnings("ignore:a reward of")
def test_groups_pass_where_the_ledger_says_they_do(tmp_path, value, settings, all_pass):
    plain = {"trainer": "grpo", "allocator": "uniform", "max_steps": 1}
    made = tiny.run(tmp_path, reward=always(value), **plain, **settings)
    (logs,) = tiny.step_logs(tmp_path)
    assert logs["groups/all_pass_share"] == all_pass
    assert logs["groups/all_fail_share"] == 1 - all_pass
    reason = "all_pass" if all_pass else "all_fail"
    assert logs[f"ledger/rollouts_filtered_{reason}"] == 36
    assert logs[f"planner/share_{reason}"] == 1
    assert made.planner.admit([value, value]).reason == reason


def test_every_round_carries_the_successes_the_planner_was_taught(tmp_path):
    made = tiny.trainer(tmp_path, reward=one_to_five, success_above=3.0)
    made.ledger.begin(0)
    visit = made.sampling.visit(made.policy, version=0)
    rollouts = visit.rounds[0].rollouts
    assert torch.equal(rollouts.success_N, (rollouts.reward_N > 3).double())
    assert made.planner.posterior.alpha_D.sum() == rollouts.success_N.sum()
    kept = rollouts.take(torch.arange(0))
    shares = metrics.of_rollouts([visit], kept)
    assert shares["groups/all_pass_share"] + shares["groups/all_fail_share"] < 1


RANGES = {
    "around 0": lambda text, i: (len(text) + i) % 5 / 2 - 1,
    "three": lambda text, i: (len(text) + i) % 3 - 1,
    "percent": lambda text, i: 100.0 * ((len(text) + i) % 4) / 3,
    "lengths": lambda text, i: len(text) + i,
    "negative": lambda text, i: -1.0 - i,
    "equal": lambda text, i: -3.0,
    "huge": lambda text, i: 1e12 * (-1) ** i,
}


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize(
    "settings",
    [
        {"trainer": "grpo", "selector": "uniform", "allocator": "uniform"},
        {"trainer": "grpo", "selector": "vade", "allocator": "gvm", "refill": True},
    ],
    ids=["plain", "posterior"],
)
@pytest.mark.filterwarnings("ignore:a reward of")
def test_rewards_of_any_range_train(tmp_path, name, settings):
    def reward(completions, **_):
        return [float(RANGES[name](text, i)) for i, text in enumerate(completions)]

    made = tiny.run(
        tmp_path, reward=reward, max_steps=2, eval_dataset=tiny.rows("d")[:2], eval_strategy="steps",
        eval_steps=1, data=tiny.rows("abc"), **settings,
    )  # fmt: skip
    assert made.state.global_step == 2
    assert all(torch.isfinite(weight).all() for weight in tiny.parameters(made).values())


def test_a_step_with_fractions_under_a_stopping_rule_says_what_to_write(tmp_path):
    settings = {"stopping": "positive", "stopping_round_size": 2, "allocator": "uniform"}
    with pytest.raises(ValueError, match="is 0.25 of full marks; write success_above"):
        tiny.run(tmp_path, reward=partly, **settings)


def test_several_rewards_are_warned_of_where_success_decides(tmp_path, caplog):
    def warned(**settings):
        caplog.clear()
        tiny.trainer(tmp_path, reward=[partly, always_one], log_level="warning", **settings)
        return [r.getMessage() for r in caplog.records if "largest sum" in r.getMessage()]

    assert warned(trainer="grpo", selector="uniform", allocator="uniform") == []
    assert warned(success_above=1.0) == []
    (message,) = warned(selector="uniform", allocator="gvm")
    assert "allocator: gvm" in message and "the 2 rewards" in message
