"""Replay: train on rows of earlier collections once more, without changing what is ascended.

A step trains on its own rows, and on rows of the last A collections. A row i of a collection with
denominator D counts c_i = w_i / D in its own step, w_i being its decisions' weights. With replay a row
counts, at its birth and at its replay alike,

    c_i / (1 + rho S)        rho = f / ((1 - f) A)

f is the share of replayed rows, and S the collections that are held, A of them from the A-th step on:
then it is (1 - f) c_i. Every row is replayed once or never, at age 1 .. A with chance rho each. So if
the policy stands still a step has in expectation the gradient g of its own rows:

    (g + rho S g) / (1 + rho S) = g

collections that came out empty counted in S. As every row is drawn at most once, A rho = f / (1 - f) is
at most 1 and f at most 1/2. For a policy that moved see `replay_factor`. Drawing at fixed chances in the
place of a fixed number, and counting by c_i, are project defaults: of the methods that keep a buffer
(Arnal et al., 2025; ExGRPO, arXiv:2510.02245) abstracts alone were read.

Axes: N rollouts, T decision steps.
"""

import math
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rl.objective.importance import correction
from rl.objective.losses import Statistics

IntArray = NDArray[np.int64]


def chance_per_step(share: float, steps: int) -> float:
    """rho: the chance that a row is replayed at any one of the ages 1 .. `steps`.

    Raises:
        ValueError: if `share` is not in (0, 1/2], or `steps` below 1.
    """
    if not 0 < share <= 0.5:
        raise ValueError(f"share must be above 0 and at most 0.5, got {share}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return share / ((1 - share) * steps)


def counts_of_ages(num_rows: int, chance: float, steps: int, start: float) -> list[int]:
    """How many of a collection's rows are replayed at each age.

        m_j = floor(rho K j + u) - floor(rho K (j - 1) + u)

    With u uniform in [0, 1) each m_j is rho K on average, and together they are at most K.

    Args:
        num_rows: K.
        chance: rho, at most 1 / `steps`.
        steps: ages.
        start: u.
    """
    # A sum of K may come out a hair below it.
    up_to = [math.floor(chance * num_rows * age + start + 1e-9) for age in range(steps + 1)]
    return [after - before for before, after in pairwise(up_to)]


def rows_of_ages(
    num_rows: int, *, share: float, steps: int, generator: np.random.Generator
) -> list[IntArray]:
    """Decide at a collection's birth which of its rows are replayed at which age.

    Args:
        num_rows: K, 0 included.
        share, steps: f and A.
        generator: the same on every process.

    Returns:
        A arrays of distinct rows, increasing each, no row in two of them; a row is in any one with
        chance rho.
    """
    counts = counts_of_ages(
        num_rows, chance_per_step(share, steps), steps, float(generator.random())
    )
    order = generator.permutation(num_rows)
    ends = np.cumsum(counts)
    return [
        np.sort(order[end - count : end]).astype(np.int64)
        for count, end in zip(counts, ends, strict=True)
    ]


def part_of_a_row(share: float, steps: int, held: int) -> float:
    """1 / (1 + rho S): what every row of the step counts, fresh or replayed; 1 with nothing held."""
    return 1 / (1 + chance_per_step(share, steps) * held)


def replay_factor(
    now_NT: Tensor, then_NT: Tensor, mask_NT: Tensor, *, cap: float, per_row: bool
) -> tuple[Tensor, Statistics]:
    """Weights of replayed decisions for a policy that has moved since: min(pi / mu, cap).

    pi is the policy before the step's first update, and what the loss's own ratio compares with:
    pi_now / pi is clipped as for any row, and this stands outside of the clip. At the step's first
    update the gradient is then min(pi / mu, cap) A grad log pi: that of the policy as it is, but for the
    cap, and per token for how the prefix was drawn. Comparing the loss's ratio with mu instead would
    count pi / mu twice.

    Args:
        now_NT: (N, T) log-probabilities under pi.
        then_NT: (N, T) those under mu, which made the rows.
        mask_NT: (N, T) bool, every decision.
        cap: largest ratio, at least 1.
        per_row: one ratio per row, its product, for losses whose weights must be constant in a row.

    Returns:
        (N, T) factors and statistics, as `importance.correction`.

    Raises:
        ValueError: as `importance.correction`.
    """
    level = "sequence" if per_row else "token"
    return correction(now_NT, then_NT, mask_NT, level=level, mode="truncate", cap=cap)


def replayed_weight(
    weight_NT: Tensor, factor_NT: Tensor, *, denominator: float, part: float
) -> Tensor:
    """Weights of replayed rows in a step that divides by `denominator`.

    Args:
        weight_NT: (N, T) weights over the denominator of their own step, c_i.
        factor_NT: (N, T) of `replay_factor`.
        denominator: of the step they are replayed in.
        part: of `part_of_a_row`.
    """
    factor_NT = torch.where(weight_NT != 0, factor_NT, 0.0).to(weight_NT.dtype)
    return weight_NT * factor_NT * (denominator * part)
