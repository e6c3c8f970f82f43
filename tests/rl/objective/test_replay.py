"""What replayed rows count: chances of being drawn, weights, and expectations."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from rl.objective.replay import (
    chance_per_step,
    counts_of_ages,
    part_of_a_row,
    replay_factor,
    replayed_weight,
    rows_of_ages,
)


def test_by_hand():
    # f = 1/4: rho A = 1/3, over 2 ages 1/6. Of 6 rows one at each age, and 4 never.
    assert chance_per_step(0.25, 2) == pytest.approx(1 / 6)
    assert counts_of_ages(6, 1 / 6, 2, 0.5) == [1, 1]
    # Of 3 rows, half a row: floor(.5 + u) - floor(u), then floor(1 + u) - floor(.5 + u).
    assert counts_of_ages(3, 1 / 6, 2, 0.25) == [0, 1]
    assert counts_of_ages(3, 1 / 6, 2, 0.75) == [1, 0]
    # Nothing held: a row counts in full; all collections held: 1 - f.
    assert part_of_a_row(0.25, 2, 0) == 1
    assert part_of_a_row(0.25, 2, 2) == pytest.approx(0.75)
    assert part_of_a_row(0.5, 3, 1) == pytest.approx(1 / (1 + 1 / 3))


@pytest.mark.parametrize("share", [0.1, 0.25, 1 / 3, 0.5])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_every_row_is_drawn_once_or_never_with_one_chance_at_every_age(share, steps):
    chance = chance_per_step(share, steps)
    for num_rows in range(8):
        # u from 0 to 1 in steps between which no floor changes sides: halves of the finest ones.
        starts = (np.arange(2520) + 0.5) / 2520
        counts = np.array([counts_of_ages(num_rows, chance, steps, float(u)) for u in starts])
        assert (counts >= 0).all() and (counts.sum(1) <= num_rows).all()
        assert counts.mean(0) == pytest.approx(chance * num_rows, abs=1 / 2520)
        for seed in range(5):
            rows_A = rows_of_ages(
                num_rows, share=share, steps=steps, generator=np.random.default_rng(seed)
            )
            assert len(rows_A) == steps
            drawn = np.concatenate(rows_A)
            assert len(np.unique(drawn)) == len(drawn)
            assert all((np.diff(rows) > 0).all() for rows in rows_A)


def test_at_half_every_row_comes_again():
    for num_rows, steps, seed in itertools.product((1, 5, 12), (1, 2, 4), range(4)):
        rows_A = rows_of_ages(
            num_rows, share=0.5, steps=steps, generator=np.random.default_rng(seed)
        )
        assert sorted(np.concatenate(rows_A).tolist()) == list(range(num_rows))


@pytest.mark.slow
def test_no_row_is_favoured():
    drawn = np.zeros((5, 2))
    for seed in range(4000):
        rows_A = rows_of_ages(5, share=0.25, steps=2, generator=np.random.default_rng(seed))
        for age, rows in enumerate(rows_A):
            drawn[rows, age] += 1
    # Each is a Bernoulli of 1/6: 4.5 standard errors of 4000 tries, ten of them.
    assert np.abs(drawn / 4000 - 1 / 6).max() < 4.5 * (5 / 36 / 4000) ** 0.5


@pytest.mark.parametrize(("share", "steps"), [(0.25, 2), (0.4, 3), (0.5, 2)])
def test_a_policy_that_stands_still_keeps_its_expected_gradient_at_every_step(share, steps):
    # Collections of 0 to 3 rows of random c_i; the expectation over which rows are drawn is exact:
    # all orders, and u at every place that matters. One number per row stands for its gradient.
    chance = Fraction(share).limit_denominator(100)
    chance = chance / ((1 - chance) * steps)
    outcomes = []  # (probability, [c_i]) of one collection: its mean gradient is g
    generator = np.random.default_rng(0)
    for num_rows in range(4):
        outcomes += [(1 / 12, generator.normal(size=num_rows)) for _ in range(3)]
    g = sum(p * c.sum() for p, c in outcomes)
    starts = (np.arange(720) + 0.5) / 720
    replayed_A = np.zeros(steps)
    for p, c in outcomes:
        for order in itertools.permutations(range(len(c))):
            for u in starts:
                ends = np.cumsum([0, *counts_of_ages(len(c), float(chance), steps, float(u))])
                for age in range(steps):
                    rows = list(order)[ends[age] : ends[age + 1]]
                    weight = p / math.factorial(len(c)) / 720
                    replayed_A[age] += weight * c[rows].sum()
    assert replayed_A == pytest.approx(float(chance) * g, abs=2e-3 * abs(g) + 1e-12)
    for held in range(steps + 1):
        total = (g + replayed_A[:held].sum()) * part_of_a_row(share, steps, held)
        assert total == pytest.approx(g, abs=5e-3 * abs(g))


def rows(seed=0):
    generator = torch.Generator().manual_seed(seed)
    then_NT = -torch.rand(4, 5, generator=generator, dtype=torch.float64)
    now_NT = then_NT + torch.randn(4, 5, generator=generator, dtype=torch.float64)
    mask_NT = torch.arange(5) < torch.tensor([5, 3, 1, 4])[:, None]
    return now_NT, then_NT, mask_NT


@pytest.mark.parametrize("per_row", [False, True])
def test_the_factor_is_the_ratio_up_to_the_cap(per_row):
    now_NT, then_NT, mask_NT = rows()
    factor_NT, sums = replay_factor(now_NT, then_NT, mask_NT, cap=2.0, per_row=per_row)
    for i, t in itertools.product(range(4), range(5)):
        ratio = math.exp(now_NT[i, t] - then_NT[i, t])
        if per_row:
            ratio = math.exp((now_NT[i] - then_NT[i])[mask_NT[i]].sum())
        expected = min(ratio, 2.0) if mask_NT[i, t] else 0.0
        assert factor_NT[i, t].item() == pytest.approx(expected, rel=1e-12)
    assert int(sums["is_above"]) == int(
        (factor_NT == 2).any(1).sum() if per_row else (factor_NT == 2).sum()
    )
    same_NT, _ = replay_factor(then_NT, then_NT, mask_NT, cap=2.0, per_row=per_row)
    assert torch.equal(same_NT, mask_NT.double())


def test_the_gradient_before_any_update_is_the_truncated_ratio_times_the_score():
    from rl.objective.losses import clipped_surrogate

    now_NT, then_NT, mask_NT = rows(1)
    now_NT.requires_grad_()
    factor_NT, _ = replay_factor(now_NT.detach(), then_NT, mask_NT, cap=1.5, per_row=False)
    born_NT = torch.where(mask_NT, 0.25, 0.0).double()  # w / D at birth
    weight_NT = replayed_weight(born_NT, factor_NT, denominator=8.0, part=0.75)
    advantage_N = torch.tensor([1.0, -2.0, 0.5, -0.5], dtype=torch.float64)
    loss, _ = clipped_surrogate(
        now_NT, now_NT.detach(), advantage_N, weight_NT, denominator=8.0, epsilon_low=0.2,
        epsilon_high=0.2,
    )  # fmt: skip
    loss.backward()
    ratio_NT = (now_NT.detach() - then_NT).exp().clamp(max=1.5)
    expected_NT = -0.75 * 0.25 * ratio_NT * advantage_N[:, None] * mask_NT
    torch.testing.assert_close(now_NT.grad, expected_NT, atol=1e-12, rtol=0)


def test_a_decision_without_weight_gets_none():
    weight_NT = torch.tensor([[0.5, 0.0]])
    factor_NT = torch.tensor([[2.0, float("inf")]], dtype=torch.float64)
    found_NT = replayed_weight(weight_NT, factor_NT, denominator=4.0, part=0.5)
    assert found_NT.tolist() == [[2.0, 0.0]] and found_NT.dtype == torch.float32


def test_it_says_what_is_wrong():
    for share in (0.0, 0.6, -0.1):
        with pytest.raises(ValueError, match="share must be above 0 and at most 0.5"):
            chance_per_step(share, 2)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        chance_per_step(0.25, 0)
    with pytest.raises(ValueError, match="cap must be at least 1, got 0.5"):
        replay_factor(*rows(), cap=0.5, per_row=False)
