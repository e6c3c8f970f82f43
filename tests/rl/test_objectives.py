"""What the estimators ascend, by exact enumeration over a table policy.

Every expectation is a finite sum in float64. A statement about a direction or an unbiased estimate
therefore holds to 1e-10, and negative controls fail by far more.
"""

import itertools
import math
from functools import partial

import pytest
import torch

from rl.objective.advantages import centred, grpo, leave_one_out, maxrl, raft
from rl.objective.weights import objective_weight
from tests.table_policy import (
    TablePolicy,
    expected_loss_gradient,
    group_gradient,
    universes,
)

EXACT = {"atol": 1e-10, "rtol": 0}
plain_grpo = partial(grpo, correction=0, eps=0)

POLICY = TablePolicy(num_prompts=3)
# Of the seven answers, prompt 0 accepts one, prompt 1 three and prompt 2 all but two.
REWARD_PA = torch.tensor(
    [[0, 0, 1, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0, 1], [1, 1, 0, 1, 0, 1, 1]], dtype=torch.float64
)
PASS_P = POLICY.pass_rate_P(REWARD_PA).detach()
GRAD_PASS_PD = POLICY.gradient(POLICY.pass_rate_P(REWARD_PA).sum())
MU_PD = GRAD_PASS_PD / PASS_P[:, None]
BUDGETS = [(3, 3, 3), (4, 3, 2), (2, 4, 3)]

expected = partial(expected_loss_gradient, POLICY, REWARD_PA)


def cosine_P(one_PD, other_PD):
    return torch.cosine_similarity(one_PD, other_PD, dim=1)


def bernoulli(p, num_rollouts, advantage):
    """E[(1/n) sum_j A_j r_j] over the successes of n rollouts, the library's advantage inside."""
    total = 0.0
    for successes in range(num_rollouts + 1):
        reward_N = torch.zeros(num_rollouts, dtype=torch.float64)
        reward_N[:successes] = 1.0
        advantage_N = advantage(reward_N, torch.zeros(num_rollouts, dtype=torch.int64))
        chance = math.comb(num_rollouts, successes) * p**successes
        chance *= (1 - p) ** (num_rollouts - successes)
        total += chance * (advantage_N * reward_N).mean().item()
    return total


def test_the_table_is_a_policy():
    probability_PA = POLICY.probability_PA()
    torch.testing.assert_close(probability_PA.sum(1), torch.ones(3).double(), **EXACT)
    assert ((PASS_P > 0.05) & (PASS_P < 0.95)).all() and PASS_P.std() > 0.1
    assert sorted(map(len, POLICY.answers)) == [1, 2, 2, 2, 2, 2, 2]
    # grad p = p mu, with mu the mean score of the accepted answers, and scores average to 0.
    score_PAD = POLICY.score_PAD()
    weighted_PAD = probability_PA.detach()[..., None] * score_PAD
    torch.testing.assert_close(weighted_PAD.sum(1), torch.zeros_like(GRAD_PASS_PD), **EXACT)
    torch.testing.assert_close((REWARD_PA[..., None] * weighted_PAD).sum(1), GRAD_PASS_PD, **EXACT)


def test_universes_are_a_distribution_over_groups():
    u = universes(POLICY.probability_PA()[0], 3)
    assert len(u.probability_U) == 7**3 and len(u.answer_N) == 3 * 7**3
    assert u.probability_U.sum().item() == pytest.approx(1, abs=1e-12)
    first_N = u.answer_N[u.slot_N == 0]
    share = torch.zeros(7).double().index_add(0, first_N, u.probability_U)
    torch.testing.assert_close(share, POLICY.probability_PA()[0].detach(), **EXACT)


# -- objectives: what unequal budgets must not change


@pytest.mark.parametrize("budget", [(3, 3, 3), (4, 2, 1), (1, 4, 2)])
def test_accepted_rows_over_n_p_are_unbiased_for_the_log_pass_rate(budget):
    # Lemma 1 of GVM-RAFT: (1/P) sum_i 1/(n_i p_i) sum_accepted s_j, p_i known.
    actual = expected(budget, advantage=raft, objective="log", pass_rate_P=PASS_P)
    torch.testing.assert_close(actual, MU_PD / 3, **EXACT)


def test_the_flat_mean_of_accepted_rows_is_not():
    for budget in [(3, 3, 3), (1, 4, 2)]:
        actual = expected(budget, advantage=raft, objective="flat")
        # Weight on mu_i: n_i p_i / sum n.
        share_P = torch.tensor(budget).double() * PASS_P / sum(budget)
        torch.testing.assert_close(actual, share_P[:, None] * MU_PD, **EXACT)
        ratio_P = (actual * MU_PD).sum(1) / MU_PD.square().sum(1)
        assert ratio_P.max() / ratio_P.min() > 1.5


def test_flat_accepted_sums_of_two_prompts_by_hand():
    # p = (.2, .8): weights n p / sum n p on mu are (.2, .8) at (8, 8), (1/3, 2/3) at n ~ 1/sqrt p.
    for budget, share in [((8, 8), (0.2, 0.8)), ((10, 5), (1 / 3, 2 / 3))]:
        accepted = [n * bernoulli(p, n, raft) for n, p in zip(budget, (0.2, 0.8), strict=True)]
        assert [a / sum(accepted) for a in accepted] == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize("budget", BUDGETS)
def test_leave_one_out_under_mean_is_the_gradient_of_the_pass_rate(budget):
    actual = expected(budget, advantage=leave_one_out)
    torch.testing.assert_close(actual, GRAD_PASS_PD / 3, **EXACT)


@pytest.mark.parametrize("budget", BUDGETS)
def test_leave_one_out_under_log_is_exact_for_the_weights_given(budget):
    known_P = torch.tensor(
        [0.2, 0.4, 0.9], dtype=torch.float64
    )  # known before, and not quite right
    actual = expected(budget, advantage=leave_one_out, objective="log", pass_rate_P=known_P)
    torch.testing.assert_close(actual, GRAD_PASS_PD / known_P[:, None] / 3, **EXACT)


@pytest.mark.parametrize("budget", [*BUDGETS, (1, 2, 4)])
def test_em_is_the_log_pass_rate_where_anything_is_accepted(budget):
    actual = expected(budget, advantage=raft, objective="em")
    chance_P = 1 - (1 - PASS_P) ** torch.tensor(budget)
    torch.testing.assert_close(actual, chance_P[:, None] * MU_PD / 3, **EXACT)


@pytest.mark.parametrize(
    ("advantage", "objective"), [(leave_one_out, "flat"), (centred, "mean"), (plain_grpo, "mean")]
)
def test_flat_weights_the_group_mean_and_the_group_std_do_depend_on_budgets(advantage, objective):
    gradients = [expected(b, advantage=advantage, objective=objective) for b in BUDGETS]
    for one, other in itertools.combinations(gradients, 2):
        assert (one - other).abs().max() > 1e-3
        # Only the weights of prompts change, never the direction of one prompt.
        torch.testing.assert_close(cosine_P(one, other), torch.ones(3).double(), **EXACT)


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_group_mean_shrinks_a_prompts_gradient_by_its_budget(budget):
    factor_P = 1 - 1 / torch.tensor(budget).double()
    actual = expected(budget, advantage=centred)
    torch.testing.assert_close(actual, factor_P[:, None] * GRAD_PASS_PD / 3, **EXACT)


def cut_log(p, terms):
    """- sum_{k=1}^{terms} (1 - p)^k / k, the series of log p cut short."""
    return -sum((1 - p) ** k / k for k in range(1, terms + 1))


@pytest.mark.parametrize("budget", [*BUDGETS, (1, 2, 4)])
def test_maxrl_ascends_the_first_n_minus_1_terms_of_the_log_pass_rate(budget):
    pass_P = POLICY.pass_rate_P(REWARD_PA)
    cut = sum(cut_log(p, n - 1) for p, n in zip(pass_P, budget, strict=True)) + 0 * pass_P.sum()
    found_PD = expected(budget, advantage=maxrl)
    num_prompts = POLICY.num_prompts  # of the mean over prompts
    torch.testing.assert_close(found_PD * num_prompts, POLICY.gradient(cut), **EXACT)
    weight_P = (1 - (1 - PASS_P) ** (torch.tensor(budget) - 1)) / PASS_P
    torch.testing.assert_close(found_PD * num_prompts, weight_P[:, None] * GRAD_PASS_PD, **EXACT)


def test_without_its_baseline_maxrl_has_n_terms():
    def over_the_mean(reward_N, prompt_N):
        count_P = torch.zeros(int(prompt_N.max()) + 1).double()
        passed_P = count_P.index_add(0, prompt_N, reward_N)
        size_P = count_P.index_add(0, prompt_N, torch.ones_like(reward_N))
        return reward_N * (size_P / passed_P.clamp(min=1))[prompt_N]

    cut = sum(cut_log(p, 3) for p in POLICY.pass_rate_P(REWARD_PA))
    found_PD = expected((3, 3, 3), advantage=over_the_mean) * POLICY.num_prompts
    torch.testing.assert_close(found_PD, POLICY.gradient(cut), **EXACT)


def kappa(n, p):
    """E[sqrt(R (n - R))] / (n p (1 - p)), R binomial."""
    mean = sum(
        math.comb(n, r) * p**r * (1 - p) ** (n - r) * math.sqrt(r * (n - r)) for r in range(n + 1)
    )
    return mean / (n * p * (1 - p))


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_group_std_weighs_a_prompt_by_kappa(budget):
    factors = [kappa(n, p) for n, p in zip(budget, PASS_P.tolist(), strict=True)]
    factor_P = torch.tensor(factors, dtype=torch.float64)
    actual = expected(budget, advantage=plain_grpo)
    torch.testing.assert_close(actual, factor_P[:, None] * GRAD_PASS_PD / 3, **EXACT)


def test_kappa_golden_values():
    golden = {2: 1.0000, 4: 1.6903, 8: 2.3277, 16: 2.8478, 32: 3.1440}
    for n, value in golden.items():
        # E[A s] = kappa * grad p, and with the reward itself for a score grad p = p (1 - p).
        assert bernoulli(0.1, n, plain_grpo) / 0.09 == pytest.approx(value, abs=5e-5)


@pytest.mark.parametrize("kind", ["row_mean", "token_mean"])
def test_length_weights_other_than_the_sum_turn_the_gradient(kind):
    actual = expected((3, 3, 3), advantage=leave_one_out, kind=kind)
    assert (cosine_P(actual, GRAD_PASS_PD) < 1 - 1e-4).any() == (kind == "row_mean")


@pytest.mark.parametrize("advantage", [leave_one_out, centred, plain_grpo])
def test_a_lone_rollout_teaches_nothing_and_takes_nothing_from_the_others(advantage):
    actual = expected((3, 1, 3), advantage=advantage)
    assert (actual[1] == 0).all()
    torch.testing.assert_close(
        actual[[0, 2]], expected((3, 3, 3), advantage=advantage)[[0, 2]], **EXACT
    )


# -- variance: what allocation minimises


def estimates_UD(prompt, num_rollouts, advantage, objective):
    """Every value that sum_j w_j A_j s_j of one prompt can take, and their probabilities."""
    u = universes(POLICY.probability_PA()[prompt], num_rollouts)
    reward_N, num = REWARD_PA[prompt][u.answer_N], len(u.probability_U)
    pass_rate_P = PASS_P[prompt].expand(num)
    weight_N = objective_weight(
        objective, reward_N, u.universe_N, num_prompts=num, pass_rate_P=pass_rate_P, floor=1e-9
    )
    weight_N = weight_N * advantage(reward_N, u.universe_N)
    row_ND = weight_N[:, None] * POLICY.score_PAD()[prompt][u.answer_N]
    return torch.zeros(num, row_ND.shape[1]).double().index_add(
        0, u.universe_N, row_ND
    ), u.probability_U


def accepted_moments(prompt):
    """p, E|s|^2 and |E s|^2 given acceptance."""
    probability_A = POLICY.probability_PA()[prompt].detach() * REWARD_PA[prompt]
    probability_A = probability_A / probability_A.sum()
    score_AD = POLICY.score_PAD()[prompt]
    mu_D = probability_A @ score_AD
    return PASS_P[prompt], probability_A @ score_AD.square().sum(1), mu_D.square().sum()


@pytest.mark.parametrize("prompt", range(3))
@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_variance_of_the_accepted_only_estimator_and_its_bound(prompt, n):
    estimate_UD, probability_U = estimates_UD(prompt, n, raft, "log")
    error_U = (estimate_UD - MU_PD[prompt]).square().sum(1)
    p, square, mu_square = accepted_moments(prompt)
    actual = probability_U @ error_U
    torch.testing.assert_close(actual, (square / p - mu_square) / n, **EXACT)
    assert actual < square / (p * n)


@pytest.mark.parametrize("prompt", range(3))
@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_error_of_the_self_normalised_mean(prompt, n):
    estimate_UD, probability_U = estimates_UD(prompt, n, raft, "em")
    p, square, mu_square = accepted_moments(prompt)
    binomial = [math.comb(n, r) * p**r * (1 - p) ** (n - r) for r in range(n + 1)]
    inverse = sum(chance / r for r, chance in enumerate(binomial) if r)
    actual = probability_U @ (estimate_UD - MU_PD[prompt]).square().sum(1)
    expected_error = binomial[0] * mu_square + (square - mu_square) * inverse
    torch.testing.assert_close(actual, expected_error, **EXACT)


def test_the_self_normalised_error_first_rises_with_the_budget():
    def inverse_accepted(p, n):
        """E[1/R; R > 0], from the weights of em."""
        reward_N = torch.cat([torch.arange(n) < r for r in range(n + 1)]).double()
        group_N = torch.arange(n + 1).repeat_interleave(n)
        weight_N = objective_weight("em", reward_N, group_N, num_prompts=n + 1)
        weight_R = torch.zeros(n + 1).double().scatter_reduce(0, group_N, weight_N, "amax")
        return sum(
            math.comb(n, r) * p**r * (1 - p) ** (n - r) * weight_R[r].item() for r in range(n + 1)
        )

    golden = {1: 0.0500, 8: 0.3070, 32: 0.5233, 64: 0.3914}
    for n, value in golden.items():
        assert inverse_accepted(0.05, n) == pytest.approx(value, abs=5e-5)


# Eight answers of one token, all equally likely: |s|^2 is the same for each, so for accepted and
# rejected rollouts, which is what the rules for estimators with a baseline assume.
EVEN = TablePolicy(num_prompts=1, num_steps=1, vocabulary=8)
with torch.no_grad():
    EVEN.logit_PTV.zero_()
EVEN_SQUARE = 1 - 1 / 8


def second_moment(num_accepted, num_rollouts, row_weight):
    """E|sum_j w_j s_j|^2 over the universes of one prompt of the even policy."""
    reward_A = (torch.arange(8) < num_accepted).double()
    u = universes(EVEN.probability_PA()[0], num_rollouts)
    weight_N = row_weight(reward_A[u.answer_N], u.universe_N)
    row_ND = weight_N[:, None] * EVEN.score_PAD()[0][u.answer_N]
    estimate_UD = torch.zeros(len(u.probability_U), 8).double().index_add(0, u.universe_N, row_ND)
    return (u.probability_U @ estimate_UD.square().sum(1)).item()


@pytest.mark.parametrize(
    ("cost", "row_weight"),
    [
        (lambda p: p, lambda p: lambda r, _: r),
        (lambda p: 1 / p, lambda p: lambda r, _: r / p),
        (lambda p: p * (1 - p), lambda p: lambda r, _: r - p),
        (lambda p: (1 - p) / p, lambda p: lambda r, _: (r - p) / p),
    ],
    ids=["accepted, E[p]", "accepted, log p", "baselined, E[p]", "baselined, log p"],
)
def test_each_rules_cost_is_its_estimators_second_moment_and_its_budget_the_best(cost, row_weight):
    accepted = [1, 4, 7]
    moment = [second_moment(a, 1, row_weight(a / 8)) for a in accepted]
    rule = [cost(a / 8) * EVEN_SQUARE for a in accepted]
    assert moment == pytest.approx(rule, abs=1e-12)
    # n ~ sqrt(cost) beats every other split of the total, here on a grid of 1/50ths.
    std = [math.sqrt(c) for c in rule]
    best = sum(std) ** 2 / 50
    for one, two in itertools.product(range(1, 49), repeat=2):
        if one + two < 50:
            split = (one, two, 50 - one - two)
            value = sum(m / n for m, n in zip(moment, split, strict=True))
            assert value >= best * (1 - 1e-12)
    at_rule = sum(m / (50 * s / sum(std)) for m, s in zip(moment, std, strict=True))
    assert at_rule == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("num_accepted", [1, 4, 7])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_second_moment_of_leave_one_out_is_over_n_minus_1(num_accepted, n):
    p = num_accepted / 8
    actual = second_moment(num_accepted, n, lambda r, group: leave_one_out(r, group) / n)
    # Distinct rollouts share a direction: E|g|^2 = G^2 p (1 - p)/(n - 1) + a multiple of |grad p|^2.
    cross = second_moment_of_the_mean(num_accepted, n)
    assert actual == pytest.approx(EVEN_SQUARE * p * (1 - p) / (n - 1) + cross, abs=1e-12)


def second_moment_of_the_mean(num_accepted, n):
    """The cross terms E[A_i A_j s_i . s_j], i != j, of leave-one-out, from pairs of rollouts.

    With r = p + e: A_i = e_i - mean of the others' e. Of E[A_i A_j s_i . s_j] the independent and
    centred e, s leave  |E[e s]|^2 (1 + 1/(n - 1)^2); and E[e s] = grad p.
    """
    reward_A = (torch.arange(8) < num_accepted).double()
    grad_D = EVEN.gradient(EVEN.pass_rate_P(reward_A[None]).sum())[0]
    return (n - 1) / n * (1 + 1 / (n - 1) ** 2) * grad_D.square().sum().item()


# -- pilots: who may be pooled with rollouts whose number the pilots decided


def more_if_both_fail(reward_M, answer_M):
    return 2 if reward_M.sum() == 0 else 0


def more_if_a_certain_answer(reward_M, answer_M):
    """Depends on which answer the first pilot is, not only on whether it is accepted."""
    return 2 if answer_M[0] in (1, 3) else 0


def at_least_2_by_count(reward_M, answer_M):
    return 3 if reward_M.sum() == 0 else 2


def at_least_2_by_content(reward_M, answer_M):
    return 3 if answer_M[0] in (1, 3) else 2


def adaptive(rule, probability_A, reward_A, most):
    """Universes of 2 pilots and rule(pilots) more: rows to keep of `most` answers drawn."""
    u = universes(probability_A, most)
    answer_UN = u.answer_N.reshape(-1, most)
    extra_U = torch.tensor([rule(reward_A[row[:2]], row[:2].tolist()) for row in answer_UN])
    return u, u.slot_N < 2 + extra_U[u.universe_N]


def pooled_gradient(rule, prompt, *, advantage, objective="mean"):
    """Expected gradient over pilots and the rest as one group, for one prompt."""
    reward_A = REWARD_PA[prompt]
    u, keep_N = adaptive(rule, POLICY.probability_PA()[prompt].detach(), reward_A, 4)
    return group_gradient(
        POLICY,
        prompt,
        reward_A,
        u.universe_N[keep_N],
        u.answer_N[keep_N],
        u.probability_U[u.universe_N[keep_N]],
        advantage=advantage,
        objective=objective,
        denominator=1.0,
    )[prompt]


def multiple(actual_D, direction_D):
    """The factor between two parallel vectors; None where they are not parallel."""
    factor = (actual_D @ direction_D) / (direction_D @ direction_D)
    close = torch.allclose(actual_D, factor * direction_D, **EXACT)
    return factor.item() if close else None


PROMPT = 1  # three accepted answers, so that content says more than acceptance


def test_em_pools_pilots_freely_if_the_rest_depends_on_counts_only():
    actual = pooled_gradient(more_if_both_fail, PROMPT, advantage=raft, objective="em")
    p = PASS_P[PROMPT].item()
    # Nothing is accepted only if all four fail.
    factor = multiple(actual, MU_PD[PROMPT])
    assert factor == pytest.approx(1 - (1 - p) ** 4, abs=1e-10)


def test_pooled_means_keep_the_direction_and_change_the_weight():
    p = PASS_P[PROMPT].item()
    q = 1 - p
    # R and n by pilots: 2 of 2, 1 of 2 (two ways), then 4 rollouts with R = 0, 1 or 2.
    outcomes = [(2, 2, p * p), (1, 2, 2 * p * q)]
    outcomes += [(r, 4, q * q * math.comb(2, r) * p**r * q ** (2 - r)) for r in range(3)]
    share = sum(chance * r / n for r, n, chance in outcomes)
    spread = sum(chance * r * (n - r) / (n * (n - 1)) for r, n, chance in outcomes)
    actual = pooled_gradient(more_if_both_fail, PROMPT, advantage=raft)
    assert multiple(actual, GRAD_PASS_PD[PROMPT]) == pytest.approx(share / p, abs=1e-10)
    actual = pooled_gradient(more_if_both_fail, PROMPT, advantage=leave_one_out)
    assert multiple(actual, GRAD_PASS_PD[PROMPT]) == pytest.approx(spread / (p * q), abs=1e-10)
    assert abs(spread / (p * q) - 1) > 0.05


def test_pooled_golden_values():
    def pooled(p, advantage):
        """E[(1/n) sum_j A_j r_j] with two more rollouts iff both pilots fail."""
        total = 0.0
        for rewards in itertools.product((0.0, 1.0), repeat=4):
            chance = math.prod(p if r else 1 - p for r in rewards)
            reward_N = torch.tensor(rewards if sum(rewards[:2]) == 0 else rewards[:2]).double()
            value = advantage(reward_N, torch.zeros(len(reward_N)).long()) * reward_N
            total += chance * value.mean().item()
        return total

    assert pooled(0.5, raft) == pytest.approx(0.5625, abs=1e-12)
    assert pooled(0.5, leave_one_out) / 0.25 == pytest.approx(1.208333, abs=5e-7)
    assert pooled(0.1, leave_one_out) / 0.09 == pytest.approx(1.435, abs=5e-7)


@pytest.mark.parametrize(
    ("advantage", "objective"), [(raft, "em"), (raft, "mean"), (leave_one_out, "mean")]
)
def test_pooling_turns_the_gradient_if_the_rest_depends_on_content(advantage, objective):
    actual = pooled_gradient(
        more_if_a_certain_answer, PROMPT, advantage=advantage, objective=objective
    )
    assert multiple(actual, GRAD_PASS_PD[PROMPT]) is None


@pytest.mark.slow
@pytest.mark.parametrize("rule", [at_least_2_by_count, at_least_2_by_content])
@pytest.mark.parametrize("share", [0.3, 0.5])
def test_a_fixed_blend_of_pilots_and_rest_is_unbiased_whatever_the_rule(rule, share):
    reward_A = REWARD_PA[PROMPT]
    u, keep_N = adaptive(rule, POLICY.probability_PA()[PROMPT].detach(), reward_A, 5)
    late_N = (u.slot_N >= 2).long()
    actual = group_gradient(
        POLICY,
        PROMPT,
        reward_A,
        (2 * u.universe_N + late_N)[keep_N],
        u.answer_N[keep_N],
        (u.probability_U[u.universe_N] * torch.where(late_N == 1, 1 - share, share))[keep_N],
        advantage=leave_one_out,
        denominator=1.0,
    )[PROMPT]
    torch.testing.assert_close(actual, GRAD_PASS_PD[PROMPT], **EXACT)


def test_the_blend_by_the_realised_share_is_not():
    # lambda = m/n is not fixed beforehand: the control to the test above.
    reward_A = REWARD_PA[PROMPT]
    u, keep_N = adaptive(
        at_least_2_by_content, POLICY.probability_PA()[PROMPT].detach(), reward_A, 5
    )
    late_N = (u.slot_N >= 2).long()
    size_U = torch.zeros(len(u.probability_U)).double()
    size_U = size_U.index_add(0, u.universe_N, keep_N.double())
    share_N = (2 / size_U)[u.universe_N]
    actual = group_gradient(
        POLICY,
        PROMPT,
        reward_A,
        (2 * u.universe_N + late_N)[keep_N],
        u.answer_N[keep_N],
        (u.probability_U[u.universe_N] * torch.where(late_N == 1, 1 - share_N, share_N))[keep_N],
        advantage=leave_one_out,
        denominator=1.0,
    )[PROMPT]
    assert (actual - GRAD_PASS_PD[PROMPT]).abs().max() > 1e-4
