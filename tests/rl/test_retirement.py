"""Retirement and skipping in whole runs, and what settings of them are refused."""

import warnings

import pytest

from tests import tiny

RUN = {"reward": tiny.small_digit, "prompts_per_step": 4, "allocator": "uniform", "max_steps": 6}
LEAVES = {"retire_above": 0.7, "retire_share": 0.1, "greso_explore": 0.5}


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [{"selector": "vade", "posterior_prior": "flat"}, {"refill": True, "prompts_per_step": 2}],
)
def test_a_run_of_which_prompts_leave_resumes_exactly(tmp_path, more):
    settings = RUN | LEAVES | more | {"posterior_decay_chosen": 0.8, "learning_rate": 1e-2}
    whole = tiny.run(tmp_path / "whole", save_strategy="steps", save_steps=3, **settings)
    assert "refill" in more or whole.planner.metrics()["selector/retired"] > 0
    folder = tmp_path / "whole" / "checkpoint-3"
    resumed = tiny.run(tmp_path / "again", resume=str(folder), **settings)
    assert tiny.lines(tmp_path / "again") == tiny.lines(tmp_path / "whole")[-3:]
    assert resumed.planner.metrics() == whole.planner.metrics()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"retire_above": 1.0}, r"retire_above must lie in \(0, 1\), got 1.0"),
        ({"retire_above": 0.9, "retire_share": -0.1}, r"retire_share must lie in \[0, 1\]"),
        ({"greso_explore": 0.0}, "greso_explore must be above 0 and at most 1, got 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny.config(tmp_path, **settings)


def test_a_mean_that_no_prompt_can_reach_is_warned_of(tmp_path):
    settings = {"retire_above": 0.9, "allocator": "uniform", "rollouts_per_prompt": 4}
    settings |= {"posterior_prior": "flat"}
    # Of a prompt that always passes 4 / (1 - .2) = 5 passes are remembered: 6 / 7 = .857.
    with pytest.warns(UserWarning, match="never reached.*posterior mean of at most 0.86"):
        tiny.config(tmp_path, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.config(tmp_path, **settings, posterior_decay_chosen=0.8)  # 20 passes: 21 / 22
