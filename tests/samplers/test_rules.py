"""Stopping rules driven by the planner."""

import itertools

import numpy as np
import pytest

from samplers import rules
from samplers.allocation import uniform
from samplers.planner import Planner
from samplers.posterior import BetaPosterior
from samplers.selection import UniformSelector


def make(rule, *, prompts=3, plan=8, wave=4, seed=0):
    keys = [f"key {i}" for i in range(prompts)]
    return Planner(
        BetaPosterior(prompts, decay_chosen=1, decay_rest=1),
        UniformSelector(prompts, seed=0, keys=keys),
        uniform,
        keys=keys,
        prompts_per_step=prompts,
        rollouts_per_step=plan * prompts,
        stopping=rule,
        wave=wave,
        run_seed=seed,
    )


def play(planner, reward_DT):
    """One step, the reward of a row's t-th rollout given; budgets by row."""
    used = np.zeros(len(reward_DT), dtype=int)
    while True:
        proposal = planner.propose()
        slots = np.concatenate(
            [
                np.arange(first, first + budget)
                for first, budget in zip(proposal.first_slot_P, proposal.budget_P, strict=True)
            ]
        )
        rows_N = proposal.index_P[proposal.prompt_N]
        planner.observe(proposal, np.asarray(reward_DT)[rows_N, slots], proposal.prompt_N)
        used[proposal.index_P] += proposal.budget_P
        if not planner.is_open:
            weight = np.empty(len(used))
            weight[proposal.index_P] = planner.group_weight_P
            return used.tolist(), weight.tolist()


ROWS = [[0] * 8, [1] * 8, [1, 0, 0, 0, 0, 0, 0, 1]]


def test_until_positive_by_hand():
    assert play(make(rules.until_positive()), ROWS) == ([8, 4, 4], [1, 1, 1])
    assert play(make(rules.until_positive(needed=2), wave=2), ROWS)[0] == [8, 2, 8]


def test_until_balanced_by_hand():
    late = [0, 0, 0, 0, 1, 1, 0, 0]
    early = [1, 1, 0, 0, 0, 0, 0, 0]
    assert play(make(rules.until_balanced()), [late, early, ROWS[2]])[0] == [8, 4, 8]


def test_while_mixed_is_likely_by_hand():
    # Beta(1, 1), 4 of 4 alike, 4 left: 1 - 5/9 = .444 that it ends mixed.
    assert play(make(rules.while_mixed_is_likely(threshold=0.45)), ROWS)[0] == [4, 4, 8]
    assert play(make(rules.while_mixed_is_likely(threshold=0.44)), ROWS)[0] == [8, 8, 8]


def test_by_lot_a_group_goes_on_with_probability_rho():
    rule = rules.while_mixed_is_likely_unbiased(threshold=1.0, rho=0.25)
    counts = {}
    for seed in range(300):
        used, weight = play(make(rule, wave=2, seed=seed), ROWS)
        assert (used[2], weight[2]) == (8, 1)
        for outcome in zip(used[:2], weight[:2], strict=True):
            counts[outcome] = counts.get(outcome, 0) + 1
    assert counts.keys() == {(2, 0.0), (8, 4.0)}
    # 600 lots at .25: 150 go on, standard deviation 10.6.
    assert abs(counts[8, 4.0] - 150) < 4 * 10.6


def gradient(rewards, p):
    rewards = np.array(rewards, dtype=float)
    n = len(rewards)
    advantage = (rewards - rewards.mean()) * n / (n - 1)
    return (advantage * (rewards - p)).mean()


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("wave", [2, 3])
def test_by_lot_the_gradient_is_that_of_no_stopping(p, wave):
    # Every outcome of 6 rollouts and both lots; the full group gives p (1 - p).
    rule = rules.while_mixed_is_likely_unbiased(threshold=0.9, rho=0.4)
    plain = rules.while_mixed_is_likely(threshold=0.9)
    total = biased = spared = 0.0
    a, b = np.array([1.0]), np.array([9.0])
    for rewards in itertools.product([0, 1], repeat=6):
        chance = np.prod([p if r else 1 - p for r in rewards])
        for lot, share in [(0.1, 0.4), (0.7, 0.6), (None, 1.0)]:
            weight, used = 1.0, 6
            for trials in range(wave, 7, wave):
                answer = (rule if lot is not None else plain)(
                    np.array([float(sum(rewards[:trials]))]),
                    np.array([trials]),
                    a,
                    b,
                    left_P=np.array([6 - trials]),
                    chance_P=np.array([lot or 0.0]),
                )
                goes_on, now = answer if lot is not None else (answer, np.array([1.0]))
                weight = max(weight, now[0]) if goes_on[0] else now[0]
                if not goes_on[0]:
                    used = trials
                    break
            found = chance * share * weight * gradient(rewards[:used], p)
            if lot is None:
                biased += found
            else:
                total += found
                spared += chance * share * (6 - used)
    assert total == pytest.approx(p * (1 - p), rel=1e-12)
    assert spared > 0
    # Negative control: without the lot extreme prompts lose weight.
    assert biased < 0.999 * p * (1 - p)


def test_a_run_killed_between_waves_keeps_its_weights():
    rule = rules.while_mixed_is_likely_unbiased(threshold=1.0, rho=0.5)
    whole = play(make(rule, wave=2, seed=3), ROWS)
    planner = make(rule, wave=2, seed=3)
    proposal = planner.propose()
    rewards = np.array(ROWS)[proposal.index_P[proposal.prompt_N], [0, 1] * 3]
    planner.observe(proposal, rewards, proposal.prompt_N)
    resumed = make(rule, wave=2, seed=3)
    resumed.load_state_dict(planner.state_dict())
    used, weight = play(resumed, ROWS)
    assert ([count + 2 for count in used], weight) == whole


def test_without_a_rule_that_weighs_every_group_weighs_one():
    planner = make(rules.until_positive())
    planner.propose()
    assert planner.group_weight_P.tolist() == [1, 1, 1]


def test_a_share_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"rho must be in \(0, 1\], got 0"):
        rules.while_mixed_is_likely_unbiased(threshold=0.5, rho=0)


def test_a_group_that_went_on_by_lot_keeps_its_weight_when_it_turns_out_mixed():
    rule = rules.while_mixed_is_likely_unbiased(threshold=1.0, rho=0.5)
    late = [[0, 0, 1, 0, 0, 0, 0, 0]] * 3  # alike in the first wave, mixed from the second on
    found = set()
    for seed in range(20):
        found |= set(zip(*play(make(rule, wave=2, seed=seed), late), strict=True))
    assert found == {(2, 0.0), (8, 2.0)}
