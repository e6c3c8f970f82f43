import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from samplers import stopping
from samplers.allocation import uniform
from samplers.planner import Planner
from samplers.posterior import BetaPosterior
from samplers.selection import UniformSelector
from samplers.stopping import Counts, rest_all_fail, success_distribution

POSTERIORS = [(1, 1), (5, 5), (1, 9), (2, 8), (1.02, 8.68), (0.5, 0.5), (30, 90)]
A, B = np.array(POSTERIORS, dtype=float).T


def mixed_probability(*columns):
    return Counts.of(*columns).mixed_P


def early_stop(*columns, threshold):
    return stopping.early(threshold=threshold)(Counts.of(*columns))


def positive(successes, left=8, *, needed=1):
    trials = np.asarray(successes) + 8
    return stopping.positive(needed=needed)(
        Counts.of(np.ones(len(trials)), 1, successes, trials, left)
    )


def balanced(successes, failures, left=8, *, keep=4):
    trials = np.add(successes, failures)
    return stopping.balanced(keep=keep)(Counts.of(np.ones(len(trials)), 1, successes, trials, left))


# -- probabilities


def test_golden_values():
    assert rest_all_fail([1], [1 + 4], [4])[0] == pytest.approx(5 / 9, abs=1e-15)
    expected = [0.77778, 0.95928, 0.47055, 0.73492]
    np.testing.assert_allclose(mixed_probability(A[:4], B[:4], 0, 0, 8), expected, atol=5e-6)
    expected = [0.2647, 0.2824, 0.2118]
    np.testing.assert_allclose(success_distribution([2], [8], 8)[0, :3], expected, atol=5e-5)


def test_by_hand():
    # Beta(1, 1): after 1 failure of 1, the next fails with 2/3, the one after that with 3/4.
    np.testing.assert_allclose(rest_all_fail([1, 1], [2, 2], [1, 2]), [2 / 3, 1 / 2])
    np.testing.assert_allclose(mixed_probability([1, 1], [1, 1], [0, 1], [1, 1], 2), [0.5, 0.5])
    assert mixed_probability([1], [1], [1], [2], 0) == [1.0]
    # Two rollouts of Beta(1, 1) agree with 2/3; one rollout cannot disagree; nor can none.
    np.testing.assert_allclose(
        mixed_probability(np.ones(3), np.ones(3), 0, 0, [2, 1, 0]), [1 / 3, 0, 0], atol=1e-15
    )


@pytest.mark.parametrize("trials", [0, 1, 2, 8, 64])
def test_the_distribution_is_the_beta_binomial(trials):
    expected = [stats.betabinom.pmf(np.arange(trials + 1), trials, a, b) for a, b in POSTERIORS]
    result = success_distribution(A, B, trials)
    np.testing.assert_allclose(result, expected, rtol=1e-9)
    np.testing.assert_allclose(result.sum(axis=1), 1, rtol=1e-14)


@pytest.mark.parametrize("first", [0, 1, 3, 4])
def test_probabilities_are_those_of_enumerated_groups(first):
    size = 6
    for a, b in POSTERIORS:
        chance = {}
        for group in itertools.product([0, 1], repeat=size):
            factors = (
                ((a if outcome else b) + sum(x == outcome for x in group[:j])) / (a + b + j)
                for j, outcome in enumerate(group)
            )
            chance[group] = math.prod(factors)
        for start in itertools.product([0, 1], repeat=first):
            same = {g: c for g, c in chance.items() if g[:first] == start}
            mixed = sum(c for g, c in same.items() if 0 < sum(g) < size) / sum(same.values())
            result = mixed_probability([a], [b], [sum(start)], [first], [size - first])
            assert result[0] == pytest.approx(mixed, abs=1e-12)


# -- early stopping


def four_of_eight(successes):
    """The rule "stop at 4 of 8 if all equal": True where the other four follow."""
    successes = np.asarray(successes)
    ones = np.ones(len(successes))
    return early_stop(ones, ones, successes, 4, 4, threshold=1.0)


def test_stopping_at_four_of_eight_if_all_are_equal_is_an_instance():
    assert four_of_eight([0, 1, 2, 3, 4]).tolist() == [False, True, True, True, False]
    # Whatever the posterior says, also where it is nearly certain that the rest will differ.
    a, b = np.array([1e6, 1.0]), np.array([1.0, 1e6])
    assert not early_stop(a, b, [0, 4], 4, 40, threshold=1.0).any()


def groups_of_eight(p):
    """Every group of 8 with its probability, and whether the first four agree."""
    group_GN = np.array(list(itertools.product([0, 1], repeat=8)))
    passed_G = group_GN.sum(axis=1)
    return group_GN, p**passed_G * (1 - p) ** (8 - passed_G)


@pytest.mark.parametrize(
    ("p", "kept", "saved"),
    [
        (0.05, 0.580, 3.26),
        (0.1, 0.651, 2.62),
        (0.3, 0.841, 0.99),
        (0.5, 0.902, 0.50),
        (0.9, 0.651, 2.62),
    ],
)
def test_the_plain_rule_keeps_this_much_weight_and_the_unbiased_one_all_of_it(p, kept, saved):
    group_GN, chance_G = groups_of_eight(p)
    passed_G = group_GN.sum(axis=1)
    gradient_G = passed_G * (8 - passed_G) / 56 / (p * (1 - p))  # leave-one-out; mean 1
    assert (chance_G * gradient_G).sum() == pytest.approx(1, abs=1e-12)
    goes_on_G = four_of_eight(group_GN[:, :4].sum(axis=1))
    assert (chance_G * gradient_G * goes_on_G).sum() == pytest.approx(kept, abs=5e-4)
    assert 4 * (chance_G * ~goes_on_G).sum() == pytest.approx(saved, abs=5e-3)

    # A lot below rho goes on, one above it does not; their probabilities are rho and 1 - rho.
    rho = 0.25
    rule = stopping.early_unbiased(threshold=1.0, rho=rho)
    expected_G = 0.0
    for lot, share in ((0.2, rho), (0.3, 1 - rho)):
        ones = np.ones(len(group_GN))
        continue_G, weight_G = rule(Counts.of(ones, ones, group_GN[:, :4].sum(axis=1), 4, 4, lot))
        assert (continue_G == (weight_G > 0)).all()
        assert (weight_G[goes_on_G] == 1).all()
        expected_G += share * weight_G * gradient_G
    assert (chance_G * expected_G).sum() == pytest.approx(1, abs=1e-12)


def test_a_complete_group_is_neither_continued_nor_weighted():
    rule = stopping.early_unbiased(threshold=1.0, rho=1e-9)
    _, weight_P = rule(Counts.of([1, 1], [1, 1], [0, 0], [8, 4], [0, 4], 0.5))
    assert weight_P.tolist() == [1.0, 0.0]


def test_the_threshold_is_on_the_chance_of_a_mixed_group():
    a, b, successes = np.array([1.0, 5.0, 1.0]), np.array([1.0, 5.0, 9.0]), np.zeros(3)
    chance_P = mixed_probability(a, b, successes, 4, 4)
    assert chance_P[0] == pytest.approx(4 / 9)
    for threshold in (0.0, 0.2, 0.4, 0.5, 0.9, 1.0):
        result = early_stop(a, b, successes, 4, 4, threshold=threshold)
        assert result.tolist() == (chance_P >= threshold).tolist()
    assert early_stop(a, b, successes, 4, [4, 0, 4], threshold=0.0).tolist() == [True, False, True]


@pytest.mark.slow
@given(
    st.lists(
        st.tuples(st.floats(0.1, 50), st.floats(0.1, 50), st.integers(0, 6), st.integers(0, 6)),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 10),
    st.floats(0, 1),
)
def test_passes_and_failures_are_treated_alike_and_prompts_one_by_one(rows, left, threshold):
    a, b, successes, failures = np.array(rows).T
    trials = successes + failures
    result = early_stop(a, b, successes, trials, left, threshold=threshold)
    mirrored = early_stop(b, a, failures, trials, left, threshold=threshold)
    assert result.tolist() == mirrored.tolist()
    alone = [
        bool(early_stop([x], [y], [s], [s + f], left, threshold=threshold)[0])
        for x, y, s, f in rows
    ]
    assert result.tolist() == alone
    assert result[(successes > 0) & (failures > 0)].all()


# -- counting rules


def means_by_what_was_seen(seen):
    """(passes, rollouts) seen of a group of 8 -> mean of p given that, for p uniform."""
    groups = {}
    for group in itertools.product([0, 1], repeat=8):
        counted = seen(group)
        groups.setdefault((sum(counted), len(counted)), []).append(sum(group))
    means, total = {}, 0.0
    for state, passes in groups.items():

        def chance(p, passes=tuple(passes)):
            return sum(p**r * (1 - p) ** (8 - r) for r in passes)

        mass = integrate.quad(chance, 0, 1)[0]
        means[state] = integrate.quad(lambda p, f=chance: p * f(p), 0, 1)[0] / mass
        total += mass
    assert total == pytest.approx(1, abs=1e-10)
    return means


def test_stopping_on_outcomes_leaves_the_posterior_calibrated():
    means = means_by_what_was_seen(
        lambda group: group if four_of_eight([sum(group[:4])])[0] else group[:4]
    )
    assert {(0, 4), (4, 4), (1, 8), (7, 8)} <= set(means)
    for (successes, trials), mean in means.items():
        assert mean == pytest.approx((1 + successes) / (2 + trials), abs=1e-10)


def test_truncation_by_finishing_time_does_not():
    # The 4 of 8 that finish first are counted, and passes are quicker. At p = .5 their mean is
    # (8/4 + 28*2/4 + 56*3/4 + 163) / 256 = 221/256.
    chance_R = np.array([math.comb(8, r) for r in range(9)]) / 256
    assert chance_R @ np.minimum(np.arange(9), 4) / 4 == pytest.approx(0.863, abs=5e-4)
    means = means_by_what_was_seen(lambda group: sorted(group, reverse=True)[:4])
    # 3 of 4 means 3 of 8: mean 4/10, where the posterior says 4/6.
    assert means[3, 4] == pytest.approx(4 / 10, abs=1e-10)


# -- Reinforce-Ada


def test_counting_rules_by_hand():
    # Needed 1 pass; nothing left.
    assert positive([0, 1, 0, 5], [8, 8, 0, 8]).tolist() == [True, False, False, False]
    assert positive([1, 2], needed=2).tolist() == [True, False]
    # keep 4: 2 passes and 2 failures. keep 5: 2 passes and 3 failures.
    assert balanced([2, 1, 2, 0], [2, 7, 1, 40], [8, 8, 8, 0]).tolist() == [
        *(False, True, True, False)
    ]
    assert balanced([2, 2], [2, 3], keep=5).tolist() == [True, False]


def pools(p, per_round, max_rounds, goes_on):
    """Distribution of (passes, failures) when the rounds end."""
    waiting, ended = {(0, 0): 1.0}, {}
    for rounds in range(1, max_rounds + 1):
        after = {}
        for (s, f), chance in waiting.items():
            for r in range(per_round + 1):
                state = (s + r, f + per_round - r)
                more = stats.binom.pmf(r, per_round, p)
                after[state] = after.get(state, 0.0) + chance * more
        waiting = {}
        for (s, f), chance in after.items():
            target = waiting if goes_on(s, f, rounds) else ended
            target[s, f] = target.get((s, f), 0.0) + chance
    assert not waiting
    return ended


@pytest.mark.parametrize(
    ("p", "after_positive", "after_balanced"), [(0.1, 0.1297, 0.1321), (0.5, 0.5010, 0.5000)]
)
def test_the_pool_overestimates_small_pass_rates(p, after_positive, after_balanced):
    rules = [
        (lambda s, f, rounds: bool(positive([s], 4 - rounds)[0]), after_positive),
        (lambda s, f, rounds: bool(balanced([s], [f], 4 - rounds)[0]), after_balanced),
    ]
    for rule, expected in rules:
        ended = pools(p, 8, 4, rule)
        assert sum(ended.values()) == pytest.approx(1)
        mean = sum(chance * s / (s + f) for (s, f), chance in ended.items())
        assert mean == pytest.approx(expected, abs=5e-5)


def test_the_expected_number_of_rollouts_without_a_cap():
    # M / (1 - (1 - p)^M) = 5.8514 for M = 4, p = .25.
    ended = pools(0.25, 4, 60, lambda s, f, rounds: bool(positive([s], 60 - rounds)[0]))
    assert sum(c * (s + f) for (s, f), c in ended.items()) == pytest.approx(5.8514, abs=5e-5)


# -- messages


def test_it_says_what_is_wrong():
    ok = {
        "a_P": [1.0, 1.0],
        "b_P": [1.0, 1.0],
        "successes_P": [0, 0],
        "trials_P": [4, 4],
        "left_P": 4,
    }
    for changes, message in [
        ({"successes_P": [0, 5]}, "at most trials, got 5.0 of 4.0 for prompt 1"),
        ({"a_P": [1.0, float("nan")]}, "a_P must be finite and non-negative, got nan for prompt 1"),
        ({"b_P": [1.0, 0.0]}, "a and b must be positive, got 0.0"),
        ({"left_P": -1}, "left_P must be finite and non-negative, got -1.0 for prompt 0"),
        ({"successes_P": [0, 0, 0]}, "counts must be 1-d and equally long, got shapes"),
        ({"successes_P": [float("nan"), 0]}, "successes_P must be finite .*, got nan for prompt 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            Counts.of(**ok | changes)
    for threshold in (1.5, float("nan")):
        with pytest.raises(ValueError, match=rf"threshold must be in \[0, 1\], got {threshold}"):
            stopping.early(threshold=threshold)
        with pytest.raises(ValueError, match=rf"threshold must be in \[0, 1\], got {threshold}"):
            stopping.early_unbiased(threshold=threshold, rho=0.5)
    for rho in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=rf"rho must be in \(0, 1\], got {rho}"):
            stopping.early_unbiased(threshold=1, rho=rho)
    with pytest.raises(ValueError, match="keep must be at least 2, got 1"):
        stopping.balanced(keep=1)
    with pytest.raises(ValueError, match="needed must be at least 1, got 0"):
        stopping.positive(needed=0)
    with pytest.raises(ValueError, match="trials must be at least 0, got -1"):
        success_distribution([1.0], [1.0], -1)


# -- rules driven by the planner


def make(rule, *, prompts=3, plan=8, round_size=4, seed=0):
    keys = [f"key {i}" for i in range(prompts)]
    return Planner(
        BetaPosterior(prompts, decay_chosen=1, decay_rest=1),
        UniformSelector(prompts, seed=0, keys=keys),
        uniform,
        keys=keys,
        prompts_per_step=prompts,
        rollouts_per_step=plan * prompts,
        stopping=rule,
        round_size=round_size,
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


def test_positive_ends_groups_by_hand():
    assert play(make(stopping.positive()), ROWS) == ([8, 4, 4], [1, 1, 1])
    assert play(make(stopping.positive(needed=2), round_size=2), ROWS)[0] == [8, 2, 8]


def test_balanced_ends_groups_by_hand():
    late = [0, 0, 0, 0, 1, 1, 0, 0]
    early = [1, 1, 0, 0, 0, 0, 0, 0]
    assert play(make(stopping.balanced()), [late, early, ROWS[2]])[0] == [8, 4, 8]


def test_early_ends_groups_by_hand():
    # Beta(1, 1), 4 of 4 alike, 4 left: 1 - 5/9 = .444 that it ends mixed.
    assert play(make(stopping.early(threshold=0.45)), ROWS)[0] == [4, 4, 8]
    assert play(make(stopping.early(threshold=0.44)), ROWS)[0] == [8, 8, 8]


@pytest.mark.slow
def test_by_lot_a_group_goes_on_with_probability_rho():
    rule = stopping.early_unbiased(threshold=1.0, rho=0.25)
    counts = {}
    for seed in range(300):
        used, weight = play(make(rule, round_size=2, seed=seed), ROWS)
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
@pytest.mark.parametrize("round_size", [2, 3])
def test_by_lot_the_gradient_is_that_of_no_stopping(p, round_size):
    # Every outcome of 6 rollouts and both lots; the full group gives p (1 - p).
    rule = stopping.early_unbiased(threshold=0.9, rho=0.4)
    plain = stopping.early(threshold=0.9)
    total = biased = spared = 0.0
    a, b = np.array([1.0]), np.array([9.0])
    for rewards in itertools.product([0, 1], repeat=6):
        chance = np.prod([p if r else 1 - p for r in rewards])
        for lot, share in [(0.1, 0.4), (0.7, 0.6), (None, 1.0)]:
            weight, used = 1.0, 6
            for trials in range(round_size, 7, round_size):
                answer = (rule if lot is not None else plain)(
                    Counts.of(a, b, [sum(rewards[:trials])], [trials], 6 - trials, lot or 0.0)
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


def test_a_run_killed_between_rounds_keeps_its_weights():
    rule = stopping.early_unbiased(threshold=1.0, rho=0.5)
    whole = play(make(rule, round_size=2, seed=3), ROWS)
    planner = make(rule, round_size=2, seed=3)
    proposal = planner.propose()
    rewards = np.array(ROWS)[proposal.index_P[proposal.prompt_N], [0, 1] * 3]
    planner.observe(proposal, rewards, proposal.prompt_N)
    resumed = make(rule, round_size=2, seed=3)
    resumed.load_state_dict(planner.state_dict())
    used, weight = play(resumed, ROWS)
    assert ([count + 2 for count in used], weight) == whole


def test_without_a_rule_that_weighs_every_group_weighs_one():
    planner = make(stopping.positive())
    planner.propose()
    assert planner.group_weight_P.tolist() == [1, 1, 1]


def test_a_group_that_went_on_by_lot_keeps_its_weight_when_it_turns_out_mixed():
    rule = stopping.early_unbiased(threshold=1.0, rho=0.5)
    late = [[0, 0, 1, 0, 0, 0, 0, 0]] * 3  # alike in the first round, mixed from the second on
    found = set()
    for seed in range(20):
        found |= set(zip(*play(make(rule, round_size=2, seed=seed), late), strict=True))
    assert found == {(2, 0.0), (8, 2.0)}
