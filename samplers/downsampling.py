"""Down-sampling: choose which of the generated rollouts reach the loss.

Every function maps a value per row (a reward or an advantage) to the rows that stay: int64,
increasing, without repeats. Nothing is modified; the caller takes those rows of every column, the
advantages computed on full groups included. Axes: P prompts, N rollouts (flat rows), K rows kept,
T decision steps.

Most comparisons are ties when rewards are 0 and 1, so the tie rules decide which rows train. Rows
of equal value are ordered by row, which is why rows must come ordered by prompt and draw and never
by the time they finished: that would favour short rollouts.
"""

import math
import operator
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from samplers.rows import row_list

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

DownSampler = Callable[..., IntArray]
"""`keep(value_N, prompt_N, ...) -> rows_K`. Any function of this shape is one."""

TIE = 1e-12
"""A later split must beat an earlier one by more than this share of the mean centred square."""


def max_variance(value_N: ArrayLike, prompt_N: ArrayLike, *, keep: ArrayLike) -> IntArray:
    """Rows of the `keep` rollouts of each prompt whose values vary most.

        argmax over subsets S of the prompt's rows, |S| = k, of
        Var(S) = (1/k) sum x^2 - ((1/k) sum x)^2

    k Var is convex in each kept value, so a kept value between two dropped ones can be moved to one
    of them at no loss: some best subset is the `low` smallest and the `k - low` largest values.
    The k + 1 splits are all tried, on values centred in their group. Half high and half low is not
    the best split (see `half`), and is infeasible when one rollout of eight is right.

    On rewards, with the advantages computed again on the rows kept, this is PODS (Xu et al., 2025,
    arXiv:2504.13818); computing them is the caller's step. On advantages computed on full groups
    and left alone it is D3S within groups (arXiv:2509.22115). Within one group both choose the
    same rows, as nothing changes under x -> a x + b with a > 0.

    Args:
        value_N: (N,) finite rewards or advantages.
        prompt_N: (N,) integers, the prompt of each row; a prompt's rows need not be adjacent.
        keep: rows to keep of a prompt, at least 1: one int for all; (P,) ints, the prompts in
            increasing order; or (N,) ints, equal within a prompt. A smaller prompt keeps all.

    Returns:
        (K,) int64 rows, increasing. Of equal values the later rows count as larger; of splits whose
        variances differ by no more than 1e-12 times the group's mean centred square the smallest
        `low` wins. So a group of equal values keeps its last rows, and keep=1 the largest value.

    Raises:
        ValueError: if shapes differ, a value is not finite, or `keep` is not as above.
    """
    value_N, prompt_N = _checked(value_N, prompt_N, "prompt_N")
    groups = _Groups(value_N, prompt_N)
    keep_P = np.minimum(_keeps(keep, groups), groups.size_P)
    return groups.ends(_best_low(groups, keep_P), keep_P)


def max_variance_batch(value_N: ArrayLike, *, keep: int) -> IntArray:
    """Rows of the `keep` rollouts whose values vary most, whatever prompt they belong to.

    `max_variance` with the whole batch as one group: D3S across groups (arXiv:2509.22115, read
    through notes). Values are compared across prompts, so they need a common scale, as GRPO's
    advantages have: centred ones let prompts of wider rewards win. It prefers extreme pass rates,
    |A| = sqrt(n - 1) for a lone success against 1 at pass rate 1/2; the mean advantage of the rows
    kept is not 0; and their mean |A| is about twice that of all rows, a larger step.

    Args:
        value_N: (N,) finite advantages of all rows of all prompts.
        keep: rows to keep, at least 1; a smaller batch is kept whole.

    Returns:
        (K,) int64 rows, increasing, ties as in `max_variance`. A prompt may end with no row. A row
        of value 0 is kept only if every negative row or every positive row is.

    Raises:
        ValueError: if a value is not finite or `keep` is below 1.
    """
    value_N = np.asarray(value_N)
    return max_variance(value_N, np.zeros(value_N.shape, dtype=np.int64), keep=_count(keep))


def half(value_N: ArrayLike, prompt_N: ArrayLike, *, keep: ArrayLike) -> IntArray:
    """Rows of the keep // 2 smallest and the other largest values of each prompt, for comparison.

    Not the largest variance: six 0, one 1 and one 5 with keep=4 give 4.25 here and 4.6875 with
    `max_variance`. With 0/1 rewards and an even keep the two have equal variance.

    Arguments, order, ties between rows and errors are those of `max_variance`.
    """
    value_N, prompt_N = _checked(value_N, prompt_N, "prompt_N")
    groups = _Groups(value_N, prompt_N)
    keep_P = np.minimum(_keeps(keep, groups), groups.size_P)
    return groups.ends(keep_P // 2, keep_P)


def fraction(progress: float, *, initial: float, final: float) -> float:
    """Share that is kept at this point of training: linear from `initial` to `final`.

        (1 - p) initial + p final,    p = progress clamped to [0, 1]

    (D3S, arXiv:2509.22115, as reported: aggressive first, conventional last.) A pure function of
    progress, so nothing is checkpointed and a resumed step has the share it would have had.

    Args:
        progress: step / total_steps; outside [0, 1] it is clamped, as the schedule says.
        initial: share at the start, in (0, 1].
        final: share at the end, in (0, 1].

    Raises:
        ValueError: if a share is outside (0, 1] or progress is NaN.
    """
    _check_share("initial", initial)
    _check_share("final", final)
    if math.isnan(progress):
        raise ValueError("progress must be a number, got nan")
    p = min(max(progress, 0.0), 1.0)
    return (1 - p) * initial + p * final


def row_fraction(progress: float, *, initial: float = 0.25, final: float = 1.0) -> float:
    """`fraction` of the rows. 0.25 -> 1: project default, not from the paper, which is silent."""
    return fraction(progress, initial=initial, final=final)


def token_fraction(progress: float, *, initial: float = 0.2, final: float = 1.0) -> float:
    """`fraction` of the tokens. 0.2 -> 1: project default, not from the paper, which is silent."""
    return fraction(progress, initial=initial, final=final)


def d3s(advantage_N: ArrayLike, *, row_fraction: float) -> IntArray:
    """Rows of D3S: one selection across the batch, `max_variance_batch`.

        keep = floor(row_fraction N + 1/2), at least 1

    One selection across groups is the project default: whether the paper selects within groups
    first is not certain, and one stage has at least the variance of two. Advantages are those of
    full groups and are not computed again.

    Args:
        advantage_N: (N,) finite advantages.
        row_fraction: share of the rows, in (0, 1]; see `row_fraction`.

    Raises:
        ValueError: if an advantage is not finite or the share is outside (0, 1].
    """
    advantage_N = np.asarray(advantage_N)
    _check_share("row_fraction", row_fraction)
    keep = math.floor(row_fraction * advantage_N.size + 0.5)
    return max_variance_batch(advantage_N, keep=max(keep, 1))


def d3s_two_stage(advantage_N: ArrayLike, prompt_N: ArrayLike, *, row_fraction: float) -> IntArray:
    """Rows of D3S within groups first, then across what is left.

        within prompt p:   max(2, floor(min(1, 2 row_fraction) n_p + 1/2)) rows
        across:            as many in all as `d3s` keeps

    Every prompt has a say in the second stage, for less variance: 7 % less on average for 32
    prompts of 8 and pass rates spread evenly. The numbers are project defaults, not from the paper.

    Args:
        advantage_N: (N,) finite advantages of full groups.
        prompt_N: (N,) integers, the prompt of each row.
        row_fraction: share of the rows, in (0, 1]; from 1/2 on the first stage keeps all.

    Raises:
        ValueError: if shapes differ, an advantage is not finite or the share is outside (0, 1].
    """
    advantage_N, prompt_N = _checked(advantage_N, prompt_N, "prompt_N")
    _check_share("row_fraction", row_fraction)
    keep = math.floor(row_fraction * len(advantage_N) + 0.5)
    _, size_P = np.unique(prompt_N, return_counts=True)
    within_P = np.maximum(2, np.floor(min(1.0, 2 * row_fraction) * size_P + 0.5).astype(np.int64))
    rows_K = max_variance(advantage_N, prompt_N, keep=within_P)
    return rows_K[max_variance_batch(advantage_N[rows_K], keep=max(keep, 1))]


def zero_variance_filter(
    reward_N: ArrayLike, prompt_N: ArrayLike, *, tolerance: float = 0.0
) -> IntArray:
    """Rows of the prompts whose rewards differ: max - min > tolerance, a group whole or not at all.

    The filter of DAPO (arXiv:2503.14476). Not a test of the std, whose rounding residual turns
    eight float32 rewards of 0.7 into advantages of 0.056, nor of the mean lying inside (0, 1),
    which passes constant groups of continuous rewards.

    Args:
        reward_N: (N,) finite rewards.
        prompt_N: (N,) integers, the prompt of each row.
        tolerance: spread that still counts as none, at least 0.

    Returns:
        (K,) int64 rows, increasing. A lone rollout has no spread.

    Raises:
        ValueError: if shapes differ, a reward is not finite or the tolerance is negative or NaN.
    """
    reward_N, prompt_N = _checked(reward_N, prompt_N, "prompt_N")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be non-negative, got {tolerance}")
    if len(reward_N) == 0:
        return np.zeros(0, dtype=np.int64)
    groups = _Groups(reward_N, prompt_N)
    low_P = groups.sorted_N[groups.start_P]
    high_P = groups.sorted_N[groups.start_P + groups.size_P - 1]
    return groups.rows((high_P - low_P > tolerance)[groups.group_N])


def balanced(
    reward_N: ArrayLike, prompt_N: ArrayLike, *, keep: ArrayLike, success_above: float = 0.7
) -> IntArray:
    """Rows of half correct, half wrong rollouts of each prompt, the first drawn of each side.

        correct kept = min(c, max(floor(k/2), k - w)),   wrong kept = k - correct kept

    of c correct and w wrong: a shortfall on one side is filled from the other, so a prompt may end
    one-sided. The rows of Reinforce-Ada (arXiv:2510.04996) after its rounds; its baseline is the
    mean of the whole pool, so advantages are computed before rows are dropped. The release takes
    the first collected of each side, here the first by row. For 0/1 rewards and an even keep the
    counts are those of `max_variance`.

    Args:
        reward_N: (N,) finite rewards.
        prompt_N: (N,) integers, the prompt of each row; rows of a prompt in draw order.
        keep: rows to keep of a prompt, as in `max_variance`.
        success_above: a reward above it is correct; the release's threshold.

    Returns:
        (K,) int64 rows, increasing.

    Raises:
        ValueError: if shapes differ, a reward is not finite, or `keep` is not as above.
    """
    reward_N, prompt_N = _checked(reward_N, prompt_N, "prompt_N")
    if math.isnan(success_above):
        raise ValueError("success_above must be a number, got nan")
    # Sorted by this 0/1 value a group is its wrong rows in draw order, then its correct ones.
    groups = _Groups((reward_N > success_above).astype(np.float64), prompt_N)
    keep_P = np.minimum(_keeps(keep, groups), groups.size_P)
    correct_P = np.bincount(groups.group_N, weights=groups.sorted_N, minlength=len(keep_P))
    correct_P = correct_P.astype(np.int64)
    wrong_P = groups.size_P - correct_P
    correct_kept_P = np.minimum(correct_P, np.maximum(keep_P // 2, keep_P - wrong_P))

    is_correct_N = groups.sorted_N > 0
    draw_N = groups.place_N - np.where(is_correct_N, wrong_P[groups.group_N], 0)
    quota_N = np.where(
        is_correct_N, correct_kept_P[groups.group_N], (keep_P - correct_kept_P)[groups.group_N]
    )
    return groups.rows(draw_N < quota_N)


def best_and_worst(value_N: ArrayLike, branch_N: ArrayLike, *, threshold: float | None) -> IntArray:
    """Rows of the best and of the worst rollout of each branch, where they are good or bad enough.

        the largest value of a branch if it is >= threshold
        the smallest value of a branch if it is < -threshold

    The two tests are independent: a branch keeps 0, 1 or 2 rows, and a positive row need not have
    a negative partner. With values normalised per prompt and threshold=0.5 it is the selection of
    B2-DiffuRL as released (arXiv:2503.11240). With None both rows of every branch stay, and none
    where all values are equal, which is our reading of the paper's contrastive pair.

    Args:
        value_N: (N,) finite values, for example rewards normalised over the prompt.
        branch_N: (N,) integers, the branch of each row.
        threshold: at least 0, or None.

    Returns:
        (K,) int64 rows, increasing. Of equal values the later row is the best, the earlier the
        worst. Under a threshold a branch of equal values can keep one row.

    Raises:
        ValueError: if shapes differ, a value is not finite or the threshold is negative or NaN.
    """
    value_N, branch_N = _checked(value_N, branch_N, "branch_N")
    if threshold is not None and not threshold >= 0:
        raise ValueError(f"threshold must be non-negative or None, got {threshold}")
    if len(value_N) == 0:
        return np.zeros(0, dtype=np.int64)
    groups = _Groups(value_N, branch_N)
    worst_P, best_P = groups.start_P, groups.start_P + groups.size_P - 1
    low_P, high_P = groups.sorted_N[worst_P], groups.sorted_N[best_P]
    if threshold is None:
        is_best_P = is_worst_P = high_P > low_P
    else:
        is_best_P, is_worst_P = high_P >= threshold, low_P < -threshold
    kept_N = np.zeros(len(value_N), dtype=bool)
    kept_N[best_P[is_best_P]] = True
    kept_N[worst_P[is_worst_P]] = True
    return groups.rows(kept_N)


def selection_metrics(
    rows_K: ArrayLike,
    *,
    reward_N: ArrayLike,
    advantage_N: ArrayLike,
    prompt_N: ArrayLike,
    length_N: ArrayLike,
) -> dict[str, float]:
    """What a selection did to the batch, as flat numbers.

    Rewards are given before and after, because a curve of kept rows alone looks like learning; the
    ratio of mean |advantage| is the factor by which a mean over kept rows enlarges the step.

    Args:
        rows_K: (K,) rows kept.
        reward_N, advantage_N: (N,) finite, of all rows before any was dropped.
        prompt_N: (N,) integers, the prompt of each row.
        length_N: (N,) decisions (tokens) of each row.

    Returns:
        Names under `select/`. What is not defined, as the mean length of no rows, is left out.

    Raises:
        ValueError: if columns are not N long or not finite, or rows are no integers in [0, N).
    """
    reward_N, prompt_N = _checked(reward_N, prompt_N, "prompt_N")
    rows_K = row_list("rows_K", rows_K)
    if ((rows_K < 0) | (rows_K >= len(reward_N))).any():
        raise ValueError(f"rows_K must be in [0, {len(reward_N)}), got {rows_K.tolist()}")
    advantage_N, length_N = _finite("advantage_N", advantage_N), _finite("length_N", length_N)
    if not len(reward_N) == len(advantage_N) == len(length_N):
        raise ValueError(
            f"reward_N, advantage_N and length_N must be equally long, "
            f"got {len(reward_N)}, {len(advantage_N)} and {len(length_N)}"
        )
    kept_N = np.zeros(len(reward_N), dtype=bool)
    kept_N[rows_K] = True
    num_prompts = len(np.unique(prompt_N))
    metrics = {
        "select/rows_in": float(len(reward_N)),
        "select/rows_kept": float(kept_N.sum()),
        "select/tokens_in": float(length_N.sum()),
        "select/tokens_kept": float(length_N[kept_N].sum()),
    }
    if num_prompts:
        mixed = len(np.unique(prompt_N[zero_variance_filter(reward_N, prompt_N)]))
        metrics["select/mixed_share"] = mixed / num_prompts
        metrics["select/reward_unfiltered"] = float(reward_N.mean())
    if kept_N.any():
        kept_K = advantage_N[kept_N]
        metrics["select/reward_kept"] = float(reward_N[kept_N].mean())
        metrics["select/variance"] = float(kept_K.var())
        metrics["select/advantage_mean"] = float(kept_K.mean())
        metrics["select/positive_fraction"] = float((kept_K > 0).mean())
        metrics["select/length_kept"] = float(length_N[kept_N].mean())
        if advantage_N.any():
            metrics["select/mean_abs_advantage_ratio"] = float(
                np.abs(kept_K).mean() / np.abs(advantage_N).mean()
            )
    if not kept_N.all():
        metrics["select/length_dropped"] = float(length_N[~kept_N].mean())
    return metrics


class _Groups:
    """Rows sorted by (prompt, value, row), and where each prompt's begin."""

    def __init__(self, value_N: FloatArray, prompt_N: IntArray) -> None:
        self.order_N = np.lexsort((value_N, prompt_N))  # stable: equal values stay in row order
        self.sorted_N = value_N[self.order_N]
        prompt_N = prompt_N[self.order_N]
        first_N = np.ones(len(prompt_N), dtype=bool)
        np.not_equal(prompt_N[1:], prompt_N[:-1], out=first_N[1:])
        self.start_P = np.flatnonzero(first_N)
        self.size_P = np.diff(self.start_P, append=len(prompt_N))
        self.group_N = np.repeat(np.arange(len(self.start_P)), self.size_P)
        self.place_N = np.arange(len(prompt_N)) - self.start_P[self.group_N]

    def rows(self, kept_N: NDArray[np.bool_]) -> IntArray:
        """Original rows, increasing, of a mask over sorted rows."""
        mask_N = np.zeros(len(kept_N), dtype=bool)
        mask_N[self.order_N[kept_N]] = True
        return np.flatnonzero(mask_N)

    def ends(self, low_P: IntArray, keep_P: IntArray) -> IntArray:
        """Rows of the `low` smallest and `keep - low` largest values of each group."""
        high_from_P = self.size_P - keep_P + low_P
        return self.rows(
            (self.place_N < low_P[self.group_N]) | (self.place_N >= high_from_P[self.group_N])
        )


def _best_low(groups: _Groups, keep_P: IntArray) -> IntArray:
    """How many of the smallest values are in each group's subset of largest variance.

    Groups of similar size are stacked into one padded array, so there are as many passes as
    powers of two among the sizes, memory stays linear however uneven they are, and no group's sums
    touch another's.
    """
    low_P = np.zeros(len(keep_P), dtype=np.int64)
    _, class_P = np.frexp(groups.size_P)
    for size_class in np.unique(class_P):
        members = np.flatnonzero(class_P == size_class)
        low_P[members] = _best_low_stacked(groups, members, keep_P[members])
    return low_P


def _best_low_stacked(groups: _Groups, members: IntArray, keep_G: IntArray) -> IntArray:
    """`_best_low` of the groups `members` (G of them), padded to the largest."""
    size_G, start_G = groups.size_P[members], groups.start_P[members]
    place_W = np.arange(size_G.max())
    inside_GW = place_W < size_G[:, None]
    row_GW = start_G[:, None] + np.minimum(place_W, size_G[:, None] - 1)
    value_GW = groups.sorted_N[row_GW]

    # A power of two near the largest value keeps squares in range. The smallest value goes first
    # because equal values then centre to exactly 0.
    largest_G = np.maximum(np.abs(value_GW[:, 0]), np.abs(value_GW[:, -1]))
    value_GW = np.ldexp(value_GW, -np.frexp(largest_G)[1][:, None])
    value_GW -= value_GW[:, :1].copy()
    value_GW -= (np.where(inside_GW, value_GW, 0).sum(axis=1) / size_G)[:, None]
    value_GW[~inside_GW] = 0
    tie_G = TIE * np.square(value_GW).sum(axis=1) / size_G

    # Sums of the smallest j and of the largest j. Not total minus prefix: where few of many rows
    # are kept, that difference is of the total's rounding error.
    low_L = np.arange(keep_G.max() + 1)
    high_GL = keep_G[:, None] - low_L
    feasible_GL = high_GL >= 0
    np.maximum(high_GL, 0, out=high_GL)
    top_GW = np.take_along_axis(value_GW, np.maximum(size_G[:, None] - 1 - low_L[:-1], 0), axis=1)
    bottom_GW = value_GW[:, : len(low_L) - 1]
    sum_GL = _prefix(bottom_GW) + np.take_along_axis(_prefix(top_GW), high_GL, axis=1)
    square_GL = _prefix(np.square(bottom_GW))
    square_GL += np.take_along_axis(_prefix(np.square(top_GW)), high_GL, axis=1)
    variance_GL = square_GL / keep_G[:, None] - np.square(sum_GL / keep_G[:, None])
    variance_GL[~feasible_GL] = -np.inf
    return _first_best(variance_GL, tie_G)


def _first_best(score_GL: FloatArray, tie_G: FloatArray) -> IntArray:
    """Last incumbent of a scan from the left in which a score must win by more than `tie`."""
    best_G = score_GL.max(axis=1)
    low_G = (score_GL + tie_G[:, None] >= best_G[:, None]).argmax(axis=1)
    # The first score nobody beats is the last incumbent if it beat all before it. Otherwise there
    # is a staircase of near-ties, and the scan is run as it is defined.
    columns = np.arange(score_GL.shape[1])
    before_G = np.where(columns < low_G[:, None], score_GL, -np.inf).max(axis=1)
    reached_G = score_GL[np.arange(len(low_G)), low_G]
    for g in np.flatnonzero(~(reached_G > before_G + tie_G)):
        low_G[g] = _scan(score_GL[g].tolist(), float(tie_G[g]))
    return low_G


def _scan(scores: list[float], tie: float) -> int:
    incumbent = 0
    for low, score in enumerate(scores):
        if score > scores[incumbent] + tie:
            incumbent = low
    return incumbent


def _prefix(value_GW: FloatArray) -> FloatArray:
    """(G, W + 1) sums of the first 0, 1, ..., W entries of each row."""
    sums = np.zeros((value_GW.shape[0], value_GW.shape[1] + 1))
    np.cumsum(value_GW, axis=1, out=sums[:, 1:])
    return sums


def _finite(name: str, value_N: ArrayLike) -> FloatArray:
    value_N = np.asarray(value_N, dtype=np.float64)
    if value_N.ndim != 1:
        raise ValueError(f"{name} must be 1-d, got shape {value_N.shape}")
    finite_N = np.isfinite(value_N)
    if not finite_N.all():
        row = int(np.flatnonzero(~finite_N)[0])
        raise ValueError(f"{name} must be finite, got {value_N[row]} in row {row}")
    return value_N


def _checked(value_N: ArrayLike, group_N: ArrayLike, name: str) -> tuple[FloatArray, IntArray]:
    """Values and groups as float64 and int64."""
    value_N, group_N = np.asarray(value_N, dtype=np.float64), np.asarray(group_N)
    if value_N.ndim != 1 or value_N.shape != group_N.shape:
        raise ValueError(
            f"values and {name} must be 1-d and equally long, "
            f"got {value_N.shape} and {group_N.shape}"
        )
    if len(group_N) and group_N.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers, got {group_N.dtype}")
    finite_N = np.isfinite(value_N)
    if not finite_N.all():
        row = int(np.flatnonzero(~finite_N)[0])
        raise ValueError(
            f"values must be finite, got {value_N[row]} in row {row} ({name} {int(group_N[row])})"
        )
    return value_N, group_N.astype(np.int64)


def _keeps(keep: ArrayLike, groups: _Groups) -> IntArray:
    """(P,) rows to keep of each group, from one int, one per group or one per row."""
    keep, num_groups, num_rows = np.asarray(keep), len(groups.size_P), len(groups.order_N)
    if keep.shape not in [(), (num_groups,), (num_rows,)]:
        raise ValueError(
            f"keep must be one integer, one for each of {num_groups} prompts or one for each of "
            f"{num_rows} rows, got shape {keep.shape}"
        )
    if keep.size and keep.dtype.kind not in "iu":
        raise ValueError(f"keep must be integers, got {keep.dtype}")
    if keep.size and keep.min() < 1:
        raise ValueError(f"keep must be at least 1, got {keep.min()}")
    # One row per prompt makes the two lengths equal; every prompt is then kept either way.
    if keep.shape == (num_groups,) or keep.shape == ():
        return np.broadcast_to(keep, (num_groups,)).astype(np.int64)
    keep_N = keep[groups.order_N].astype(np.int64)
    keep_P = keep_N[groups.start_P]
    unequal_N = keep_N != keep_P[groups.group_N]
    if unequal_N.any():
        at = int(np.flatnonzero(unequal_N)[0])
        raise ValueError(
            f"keep must be equal within a prompt, got {keep_P[groups.group_N[at]]} and "
            f"{keep_N[at]} in rows {groups.order_N[groups.start_P[groups.group_N[at]]]} and "
            f"{groups.order_N[at]}"
        )
    return keep_P


def _count(keep: int) -> int:
    keep = operator.index(keep)
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    return keep


def _check_share(name: str, share: float) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {share}")
