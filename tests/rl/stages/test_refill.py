"""Refill within a training step."""

import pytest

from tests import tiny


def nothing_passes(completions, **_):
    return [0.0] * len(completions)


@pytest.mark.slow
def test_the_selections_of_a_refilled_training_step_decay_the_posterior_once(tmp_path):
    # With a decay of 0 a prompt that a training step does not choose is forgotten. Three selections of
    # two prompts fill the step; those of the first two must still be remembered after the third.
    made = tiny.run(
        tmp_path, reward=nothing_passes, data=tiny.rows("abcdefgh"), trainer="grpo", selector="vade",
        allocator="uniform", refill=True, refill_max_draws=3, refill_at_cap="partial",
        prompts_per_step=2, rollouts_per_prompt=4, posterior_decay_rest=0.0, max_steps=1,
    )  # fmt: skip
    posterior = made.planner.posterior
    trials_D = posterior.alpha_D + posterior.beta_D
    assert trials_D[trials_D > 0].tolist() == [4] * 6


@pytest.mark.slow
def test_the_log_says_how_many_groups_a_step_drew_and_why(tmp_path):
    tiny.run(
        tmp_path, reward=tiny.small_digit, data=tiny.rows("abcd"), trainer="grpo",
        allocator="uniform", refill=True, refill_max_draws=4, prompts_per_step=3,
        rollouts_per_prompt=4, max_steps=4,
    )  # fmt: skip
    for row in tiny.step_logs(tmp_path):
        drawn, filtered = row["refill/groups_drawn"], row["refill/groups_filtered"]
        assert 4 * drawn == row["ledger/rollouts_drawn"] and drawn >= row["refill/groups_accepted"]
        assert 4 * filtered == row["ledger/rollouts_filtered_all_fail"] + row.get(
            "ledger/rollouts_filtered_all_pass", 0
        )
        assert row["refill/reward_mean_unfiltered"] == pytest.approx(row["reward"])
