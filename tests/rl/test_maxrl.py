"""MaxRL in a run's settings: what it goes with, and rewards that neither pass nor fail."""

import pytest

from tests import tiny


def graded(completions, **_):
    """0, 1/2 or 1."""
    firsts = [text.replace(" ", "")[:1] for text in completions]
    return [1.0 if c in ("0", "1") else 0.5 if c in ("2", "3") else 0.0 for c in firsts]


RUN = {"trainer": "grpo", "advantage": "maxrl", "allocator": "uniform"}


def test_what_it_cannot_go_with_is_refused_before_anything_is_loaded(tmp_path):
    for settings, message in (
        ({"objective": "log"}, "write objective: mean or flat"),
        ({"trainer": "raft++", "objective": "mean"}, "raft_pp' has no negative signal"),
        ({"reward_kl": 0.1}, "reward_kl has no place: write another advantage, or beta"),
        ({"down_sampling": "pods", "rows_per_prompt": 4}, "'maxrl' would be ignored"),
        ({"rollouts_per_prompt": 1}, "rollouts_per_prompt of at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny.config(tmp_path, **(RUN | settings))


@pytest.mark.slow
def test_a_reward_between_pass_and_fail_stops_the_run_with_its_prompt(tmp_path):
    made = tiny.trainer(tmp_path, reward=graded, **RUN)
    message = r"of a rollout of prompt \w+ is 0.5 of full marks; write success_above"
    with pytest.raises(ValueError, match=message):
        made.train()
    # With a line every reward passes or fails.
    made = tiny.run(tmp_path / "line", reward=graded, success_above=0.4, **RUN)
    assert made.state.global_step == 3 and made.ledger.totals["tokens_trained"] > 0
