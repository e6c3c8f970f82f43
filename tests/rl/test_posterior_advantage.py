"""`advantage: posterior` in runs: what it reads, what trains, and what it is refused with."""

import pytest
import torch

from rl.config.language import RolloutConfig
from tests import tiny

UNEVEN = {"trainer": "grpo", "advantage": "posterior", "allocator": "neyman", "budget_min": 1}


def config(**settings):
    return RolloutConfig(output_dir="unused", report_to="none", use_cpu=True, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refill": True}, "refill replaces groups that are all alike"),
        ({"reward_kl": 0.1}, "in which reward_kl has no place"),
        ({"down_sampling": "pods", "rows_per_prompt": 2}, "would be ignored"),
    ],
)
def test_it_is_refused_with_what_would_take_its_place_or_its_groups(settings, message):
    with pytest.raises(ValueError, match=message):
        config(trainer="grpo", advantage="posterior", **settings)


def test_the_prior_learns_also_where_only_the_advantage_reads_the_posterior():
    assert config(trainer="grpo", advantage="posterior").posterior_prior == "pooled"


@pytest.mark.slow
def test_a_run_credits_each_rollout_by_the_posterior_before_its_group(tmp_path):
    made = tiny.trainer(tmp_path, **UNEVEN, selector="vade")
    batches = []
    for version in range(3):
        batches.append(tiny.collect(made, version=version))
        tiny.prepare(made, batches[-1])
        made.ledger.end()
    for batch in batches:
        proposal = batch.visits[0].proposals[0]
        rollouts = batch.rounds[0].rollouts
        reward_N, prompt_N = rollouts.reward_N, rollouts.prompt_N
        expected = []
        for i, p in enumerate(prompt_N.tolist()):
            others = [
                float(reward_N[j]) for j in range(len(reward_N)) if j != i and prompt_N[j] == p
            ]
            a, b = float(proposal.a_P[p]), float(proposal.b_P[p])
            expected.append(float(reward_N[i]) - (a + sum(others)) / (a + b + len(others)))
        # Every row trains, those of groups that are all alike too.
        assert len(batch.rollouts) == len(reward_N)
        assert sorted(batch.rollouts.advantage_N.tolist()) == pytest.approx(sorted(expected))
    assert made.planner.posterior.prior.mean()[0] != 0.5


@pytest.mark.slow
def test_one_rollout_of_each_prompt_is_enough_to_learn(tmp_path):
    made = tiny.run(
        tmp_path,
        trainer="grpo",
        advantage="posterior",
        allocator="uniform",
        rollouts_per_prompt=1,
        prompts_per_step=24,
        reward=tiny.small_digit,
        max_steps=10,
        learning_rate=1e-2,
    )
    rewards = [line["reward"] for line in made.state.log_history if "reward" in line]
    # 24 rollouts a step: the standard error of each mean is at most .1.
    assert rewards[-1] > rewards[0] + 0.3


@pytest.mark.slow
def test_a_run_goes_on_from_a_checkpoint_as_if_never_stopped(tmp_path):
    settings = UNEVEN | {
        "selector": "vade",
        "stopping": "early",
        "stopping_round_size": 2,
        "save_strategy": "steps",
    }
    settings |= {"save_steps": 2, "budget_min": 2, "max_steps": 4}
    whole = tiny.run(tmp_path / "whole", **settings)
    tiny.run(tmp_path / "parts", **settings | {"max_steps": 2})
    parts = tiny.run(tmp_path / "parts", **settings, resume=True)
    for name, value in tiny.parameters(whole).items():
        assert torch.equal(value, tiny.parameters(parts)[name]), name
