import math

import pytest
import torch

from rl.objective.advantages import grpo, stratified
from tests.table_policy import universes

REWARD_N = torch.tensor([1, 1, 0, 1, 0, 0, 0, 1], dtype=torch.float64)
STRATUM_N = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3])
ONE_N = torch.zeros(8, dtype=torch.int64)


def close(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def ragged(seed=0, *, binary=False):
    """Prompts of 1 to 8 rows, interleaved, in up to four strata whose ids have gaps."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [1, 2, 5, 7, 3, 4, 8]
    prompt_N = torch.cat([torch.full((n,), 3 * p + 2) for p, n in enumerate(sizes)])
    prompt_N = prompt_N[torch.randperm(len(prompt_N), generator=generator)]
    stratum_N = torch.randint(0, 4, prompt_N.shape, generator=generator) * 5 - 3
    reward_N = torch.randn(prompt_N.shape, dtype=torch.float64, generator=generator)
    reward_N[prompt_N == 11] = 0.7  # one group of equal rewards
    return ((reward_N > 0).double() if binary else reward_N), prompt_N, stratum_N


def by_loop(reward_N, prompt_N, stratum_N, alpha, *, fallback="blend", least=2, eps=1e-4):
    """The definition, one rollout at a time, in plain Python."""

    def score(i, peers):
        values = [rewards[j] for j in peers]
        if max(values) == min(values):
            return 0.0
        mean = sum(values) / len(values)
        std = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
        return (rewards[i] - mean) / (std + eps)

    rewards, rows = reward_N.tolist(), range(len(reward_N))
    advantage = []
    for i in rows:
        group = [j for j in rows if prompt_N[j] == prompt_N[i]]
        stratum = [j for j in group if stratum_N[j] == stratum_N[i]]
        gn, san = score(i, group), score(i, stratum)
        if len(stratum) < least:
            san = gn if fallback == "group" else 0.0
        advantage.append(alpha * san + (1 - alpha) * gn)
    return torch.tensor(advantage, dtype=torch.float64)


def test_golden_values():
    r = 0.5**0.5
    san = [r, r, -2 * r, 1, -1, 0, 0, 0]
    gn = [1, 1, -1, 1, -1, -1, -1, 1]
    blend = [0.824264, 0.824264, -1.248528, 1, -1, -0.4, -0.4, 0.4]
    for alpha, expected in ((1.0, san), (0.0, gn), (0.6, blend)):
        advantage_N = stratified(REWARD_N, ONE_N, STRATUM_N, alpha=alpha, correction=0, eps=0)
        assert advantage_N.tolist() == pytest.approx(expected, abs=5e-7)
    variance = stratified(REWARD_N, ONE_N, STRATUM_N, alpha=1, correction=0, eps=0).var(
        correction=0
    )
    assert variance.item() == pytest.approx(0.625, abs=1e-12)
    variance = stratified(REWARD_N, ONE_N, STRATUM_N, correction=0, eps=0).var(correction=0)
    assert variance.item() == pytest.approx(0.674706, abs=5e-7)


def test_where_the_stratum_is_the_reward_only_the_group_term_is_left():
    stratum_N = torch.tensor([4, 4, 4, 4, 7, 7, 7, 7])
    reward_N = (stratum_N == 7).double()
    assert stratified(reward_N, ONE_N, stratum_N, alpha=1).tolist() == [0] * 8
    gn_N = stratified(reward_N, ONE_N, stratum_N, alpha=0, correction=0, eps=0)
    assert gn_N.tolist() == [-1] * 4 + [1] * 4
    blend_N = stratified(reward_N, ONE_N, stratum_N, correction=0, eps=0)
    assert blend_N.tolist() == pytest.approx([-0.4] * 4 + [0.4] * 4, abs=1e-15)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize(("fallback", "least"), [("blend", 2), ("group", 2), ("group", 3)])
def test_matches_the_definition_on_ragged_interleaved_groups(seed, alpha, fallback, least):
    rows = ragged(seed, binary=seed % 2 == 1)
    actual = stratified(*rows, alpha=alpha, fallback=fallback, min_stratum_size=least)
    close(actual, by_loop(*rows, alpha, fallback=fallback, least=least))


def test_both_fallbacks_by_hand():
    # Rewards 1, 0, 1 in strata 0, 0, 1: mean 2/3, std sqrt(2)/3, so A_GN = (1, -2, 1) / sqrt 2.
    reward_N, prompt_N = torch.tensor([1.0, 0, 1]).double(), torch.zeros(3).long()
    stratum_N, r = torch.tensor([0, 0, 1]), 0.5**0.5
    blend_N = stratified(reward_N, prompt_N, stratum_N, alpha=0.5, correction=0, eps=0)
    expected = [0.5 + r / 2, -0.5 - r, r / 2]
    assert blend_N.tolist() == pytest.approx(expected, abs=1e-14)
    group_N = stratified(
        reward_N, prompt_N, stratum_N, alpha=0.5, correction=0, eps=0, fallback="group"
    )
    assert group_N.tolist() == pytest.approx([*expected[:2], r], abs=1e-14)
    assert blend_N.sum().item() == pytest.approx(0, abs=1e-14)
    assert group_N.sum().item() > 0.3  # the price of "group"
    # A stratum that is large enough but of equal rewards is no case for the fallback.
    equal = stratified(
        reward_N, prompt_N, torch.tensor([0, 1, 0]), correction=0, eps=0, fallback="group"
    )
    assert equal.tolist() == pytest.approx([0.4 * r, -2 * r, 0.4 * r], abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("alpha", [0.0, 0.37, 0.6, 1.0])
def test_one_stratum_is_grpo_bit_for_bit(dtype, correction, alpha):
    reward_N, prompt_N, stratum_N = ragged()
    reward_N, settings = reward_N.to(dtype), {"correction": correction, "eps": 1e-4}
    actual = stratified(reward_N, prompt_N, torch.full_like(prompt_N, 3), alpha=alpha, **settings)
    assert actual.dtype == dtype
    assert torch.equal(actual, grpo(reward_N, prompt_N, **settings))
    # One stratum within each prompt, another one in every prompt.
    assert torch.equal(stratified(reward_N, prompt_N, prompt_N, alpha=alpha, **settings), actual)
    assert torch.equal(stratified(reward_N, prompt_N, stratum_N, alpha=0, **settings), actual)


@pytest.mark.parametrize("binary", [False, True])
def test_alpha_1_is_grpo_on_strata_and_alpha_is_linear(binary):
    reward_N, prompt_N, stratum_N = ragged(binary=binary)
    san_N = stratified(reward_N, prompt_N, stratum_N, alpha=1)
    assert torch.equal(san_N, grpo(reward_N, prompt_N * 100 + stratum_N))
    gn_N = stratified(reward_N, prompt_N, stratum_N, alpha=0)
    for alpha in (0.1, 0.6, 0.9):
        blend_N = stratified(reward_N, prompt_N, stratum_N, alpha=alpha)
        close(blend_N, alpha * san_N + (1 - alpha) * gn_N, atol=1e-14)


def parts(reward_N, stratum_N):
    """For one prompt: group and stratum means and stds per row (population), and degenerate rows."""
    m, s = reward_N.mean(), reward_N.std(correction=0)
    strata = [reward_N[stratum_N == k] for k in stratum_N]
    m_N = torch.stack([x.mean() for x in strata])
    s_N = torch.stack([x.std(correction=0) for x in strata])
    degenerate_N = torch.tensor([bool(x.max() == x.min()) for x in strata])
    return m, s, m_N, torch.where(degenerate_N, 0.0, s_N), degenerate_N


@pytest.mark.parametrize("seed", range(60))
def test_identities(seed):
    """What strata and the blend do to mean and variance, at eps = 0."""
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(2, 13, (), generator=generator))
    reward_N = torch.randn(n, dtype=torch.float64, generator=generator)
    if seed % 3 == 0:
        reward_N = (reward_N > 0).double()
    if reward_N.max() == reward_N.min():
        reward_N[0] += 1
    stratum_N = torch.randint(0, 3, (n,), generator=generator)
    prompt_N, alpha = torch.zeros(n, dtype=torch.int64), 0.1 + 0.8 * (seed / 60)
    m, s, m_N, s_N, degenerate_N = parts(reward_N, stratum_N)
    san_N = stratified(reward_N, prompt_N, stratum_N, alpha=1, correction=0, eps=0)
    gn_N = stratified(reward_N, prompt_N, stratum_N, alpha=0, correction=0, eps=0)
    d = degenerate_N.double().mean()
    # The offset between stratum and group explains a share of the variance.
    explained = ((reward_N - m).square() - (reward_N - m_N).square()).mean()
    close(explained, (m_N - m).square().mean())
    assert explained >= -1e-15
    close(gn_N, s_N / s * san_N + (m_N - m) / s)
    close(gn_N.mean(), torch.zeros(()).double())
    close(san_N.mean(), torch.zeros(()).double())
    close(san_N.var(correction=0), 1 - d)
    assert (san_N[degenerate_N] == 0).all()
    blend_N = stratified(reward_N, prompt_N, stratum_N, alpha=alpha, correction=0, eps=0)
    cross = (s_N / s).mean()
    variance = alpha**2 * (1 - d) + (1 - alpha) ** 2 + 2 * alpha * (1 - alpha) * cross
    close(blend_N.var(correction=0), variance)
    assert variance <= 1 + 1e-12
    for k in stratum_N.unique():
        inside = stratum_N == k
        close(gn_N[inside].mean(), ((m_N - m) / s)[inside][0])
        close(gn_N[inside].var(correction=0), (s_N / s)[inside][0].square())
        if not degenerate_N[inside][0]:
            close(san_N[inside].mean(), torch.zeros(()).double())
            close(san_N[inside].var(correction=0), torch.ones(()).double())


def test_golden_decomposition_of_the_variance():
    m, _, m_N, _, degenerate_N = parts(REWARD_N, STRATUM_N)
    assert degenerate_N.double().mean() == 0.375
    assert (REWARD_N - m).square().mean() == 0.25
    assert (REWARD_N - m_N).square().mean().item() == pytest.approx(0.145833, abs=5e-7)
    assert (m_N - m).square().mean().item() == pytest.approx(0.104167, abs=5e-7)


@pytest.mark.parametrize(("factor", "sign"), [(2.5, 1), (-0.5, -1)])
def test_shift_and_scale(factor, sign):
    reward_N, prompt_N, stratum_N = ragged()
    actual = stratified(factor * reward_N + 4, prompt_N, stratum_N, correction=0, eps=0)
    close(actual, sign * stratified(reward_N, prompt_N, stratum_N, correction=0, eps=0))


def test_labels_are_names_only_and_unused_ones_do_not_matter():
    reward_N, prompt_N, stratum_N = ragged()
    expected = stratified(reward_N, prompt_N, stratum_N)
    relabelled_N = torch.tensor([10**12, -4, 9, 0])[(stratum_N + 3) // 5]
    assert torch.equal(stratified(reward_N, prompt_N, relabelled_N), expected)
    # Labels of different prompts have nothing to do with each other.
    own_N = stratum_N + 1000 * prompt_N
    assert torch.equal(stratified(reward_N, prompt_N, own_N), expected)


@pytest.mark.parametrize("fallback", ["blend", "group"])
def test_prompts_never_mix_and_rows_come_in_any_order(fallback):
    rows = ragged()
    whole = stratified(*rows, fallback=fallback)
    for prompt in rows[1].unique():
        own = rows[1] == prompt
        close(stratified(*(x[own] for x in rows), fallback=fallback), whole[own], atol=1e-14)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(1))
    close(stratified(*(x[order] for x in rows), fallback=fallback), whole[order], atol=1e-14)
    # Another prompt's rewards change nothing here.
    changed_N = torch.where(rows[1] == 8, rows[0] * 7 + 1, rows[0])
    kept = rows[1] != 8
    assert torch.equal(stratified(changed_N, *rows[1:], fallback=fallback)[kept], whole[kept])


@pytest.mark.parametrize("fallback", ["blend", "group"])
@pytest.mark.parametrize("rewards", [[0.7] * 8, [1.0], [-3.1] * 3])
def test_equal_rewards_and_lone_rows_get_exactly_0(fallback, rewards):
    reward_N = torch.tensor(rewards)
    prompt_N, stratum_N = torch.zeros(len(rewards)).long(), torch.arange(len(rewards)) // 2
    assert stratified(reward_N, prompt_N, stratum_N, fallback=fallback).tolist() == [0] * len(
        rewards
    )


def test_singletons_are_finite_and_no_rows_give_none():
    for correction in (0, 1):
        advantage_N = stratified(
            REWARD_N, ONE_N, torch.arange(8), alpha=1, correction=correction, eps=0
        )
        assert advantage_N.tolist() == [0] * 8
    none_N = torch.zeros(0, dtype=torch.int64)
    assert stratified(torch.zeros(0), none_N, none_N).tolist() == []
    assert not stratified(REWARD_N.clone().requires_grad_(), ONE_N, STRATUM_N).requires_grad


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("num_rollouts", [2, 3, 5])
def test_the_choice_of_a_stratum_that_fixes_the_reward_is_learnt_by_1_minus_alpha(
    alpha, num_rollouts
):
    # Two arms, taken with probability .3 and .7; the arm is the stratum and the reward.
    probability_A = torch.tensor([0.3, 0.7], dtype=torch.float64)
    u = universes(probability_A, num_rollouts)
    arm_N, weight_N = u.answer_N, u.probability_U[u.universe_N]
    score_N = arm_N.double() - 0.7  # d log pi / d logit of arm 1

    def gradient(a):
        advantage_N = stratified(arm_N.double(), u.universe_N, arm_N, alpha=a)
        return (weight_N * advantage_N * score_N).sum().item() / num_rollouts

    assert gradient(0.0) > 0.1
    assert gradient(alpha) == pytest.approx((1 - alpha) * gradient(0.0), abs=1e-14)
    if alpha == 1:
        assert gradient(alpha) == 0


def test_it_says_what_is_wrong():
    rows = (REWARD_N, ONE_N, STRATUM_N)
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], got 1\.2"):
        stratified(*rows, alpha=1.2)
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], got nan"):
        stratified(*rows, alpha=math.nan)
    with pytest.raises(ValueError, match="fallback must be one of blend, group, got 'grpo'"):
        stratified(*rows, fallback="grpo")
    with pytest.raises(ValueError, match="min_stratum_size must be at least 1, got 0"):
        stratified(*rows, min_stratum_size=0)
    with pytest.raises(ValueError, match=r"one label per reward, shape \(8,\), got \(7,\)"):
        stratified(REWARD_N, ONE_N, STRATUM_N[1:])
    with pytest.raises(ValueError, match=r"stratum_N must be integers, got torch\.float32"):
        stratified(REWARD_N, ONE_N, STRATUM_N.float())
    with pytest.raises(ValueError, match="correction must be 0 or 1, got 3"):
        stratified(*rows, correction=3)
    with pytest.raises(ValueError, match="eps must be at least 0, got -1"):
        stratified(*rows, eps=-1)
    bad_N = torch.where(torch.arange(8) == 2, math.nan, REWARD_N)
    with pytest.raises(ValueError, match="finite, got nan in row 2 of prompt 0"):
        stratified(bad_N, ONE_N, STRATUM_N)
