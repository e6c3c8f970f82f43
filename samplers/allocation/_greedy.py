"""The exact greedy: give each unit to the prompt that gains most, without a loop over units.

If every prompt's next unit gains no more than its last, handing out one unit at a time to the
largest gain is optimal (Fox, 1966), and what comes out is simply the best units there are. So a
level is searched such that nearly as many units as there is room for gain more than it, all of
those are taken at once, and only the few at the border are sorted. The result is that of the loop,
unit for unit and tie for tie, in memory linear in the prompts. Axes: P prompts, K of them.
"""

import math
import struct
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

SORTED_AT_ONCE = 4096
"""So many units are sorted rather than searched; speed is all that depends on it."""

Gain = Callable[..., FloatArray]
"""`gain(n_K, *column_K) -> gain_K`: what a unit adds where there are n, at least 0, finite, and
not increasing in n. Counts are float64 so that nothing is converted back and forth. It is also
asked about one unit outside of the boxes, where any answer will do, but no warning."""

Guess = Callable[..., FloatArray]
"""`guess(level, *column_K) -> n_K`: about how many units gain more than `level`, from 0 on; a good
guess saves time and changes nothing."""


def best_first(
    gain: Gain,
    column_sP: tuple[FloatArray, ...],
    lower_P: IntArray,
    upper_P: IntArray,
    room: float,
    *,
    guess: Guess | None = None,
    levels: Iterable[float] = (),
    weight_P: FloatArray | None = None,
) -> IntArray:
    """Counts after handing out units while there is room, the largest gain first.

    Args:
        gain: as above; it is given the columns of the prompts asked about.
        column_sP: arrays of (P,), what `gain` and `guess` depend on besides n.
        lower_P: (P,) counts to start from.
        upper_P: (P,) counts no prompt exceeds, at least `lower_P`.
        room: what may be spent beyond `lower_P`.
        guess: as above; None bisects.
        levels: gains near which the last unit is expected; they are tried first.
        weight_P: (P,) positive, what one unit of each prompt takes of the room; None for 1 each.

    Returns:
        (P,) int64 counts. Ties go to the prompt with fewer units so far, then to the earlier one.
        It ends before the first unit that does not fit, or when all prompts are full.
    """
    num_prompts = len(lower_P)
    low_P, high_P = lower_P.astype(np.float64), upper_P.astype(np.float64)
    # Settled: the units below low_K are taken and those from high_K on are not.
    row_K: IntArray | slice = slice(None)
    column_sK, low_K, high_K, weight_K = column_sP, low_P, high_P, weight_P
    above = _bits(math.inf)  # no unit gains more
    below = -1  # every unit gains more than a negative number
    tries = [level for level in levels if level > 0]
    limit = 2 * num_prompts + SORTED_AT_ONCE
    while _spent(high_K - low_K, None) > limit and above - below > 1:
        middle = _bits(tries.pop(0)) if tries else (0 if below < 0 else (above + below) // 2)
        if not below < middle < above:
            continue
        n_K = _count(gain, guess, _float(middle), column_sK, low_K, high_K)
        spent = _spent(n_K - low_K, weight_K)
        if spent <= room:
            low_K, above, room = n_K, middle, room - spent
            low_P[row_K] = low_K
        else:
            high_K, below = n_K, middle
        open_K = low_K < high_K
        if 2 * np.count_nonzero(open_K) <= len(open_K):
            row_K = np.flatnonzero(open_K) if isinstance(row_K, slice) else row_K[open_K]
            column_sK = tuple(column_K[open_K] for column_K in column_sK)
            low_K, high_K = low_K[open_K], high_K[open_K]
            weight_K = None if weight_K is None else weight_K[open_K]

    if above - below <= 1:
        low_P[row_K] = _fill(low_K, high_K, room, weight_K)
    else:
        low_P[row_K] = _sorted(gain, column_sK, low_K, high_K, room, weight_K)
    return low_P.astype(np.int64)


def fill(lower_P: IntArray, upper_P: IntArray, room: int) -> IntArray:
    """Hand out `room` units, each to the prompt with the fewest, then to the earliest.

    Like water in a vessel with steps: (P,) int64 counts within the bounds, as even as they allow.
    """
    low_P, high_P = lower_P.astype(np.float64), upper_P.astype(np.float64)
    return _fill(low_P, high_P, room, None).astype(np.int64)


def _count(
    gain: Gain,
    guess: Guess | None,
    level: float,
    column_sK: tuple[FloatArray, ...],
    low_K: FloatArray,
    high_K: FloatArray,
) -> FloatArray:
    """First n in [low, high] whose unit gains `level` or less; exact, whatever is guessed."""
    if guess is None:
        return _bisect(gain, level, column_sK, low_K, high_K)
    n_K = np.minimum(np.maximum(guess(level, *column_sK), low_K), high_K)
    row_J: IntArray | slice = slice(None)
    n_J, low_J, high_J, column_sJ = n_K, low_K, high_K, column_sK
    for _ in range(3):  # a guess is off by one more often than by more
        more_J = (gain(n_J, *column_sJ) > level) & (n_J < high_J)
        # Where n is low, the unit before it is not asked about, and what its gain is said to be is
        # not looked at.
        wrong_J = more_J | ((gain(n_J - 1, *column_sJ) <= level) & (n_J > low_J))
        if not wrong_J.any():
            return n_K
        row_J = np.flatnonzero(wrong_J) if isinstance(row_J, slice) else row_J[wrong_J]
        n_J = np.where(more_J, n_J + 1, n_J - 1)[wrong_J]
        low_J, high_J = low_J[wrong_J], high_J[wrong_J]
        column_sJ = tuple(column_J[wrong_J] for column_J in column_sJ)
        n_K[row_J] = n_J
    n_K[row_J] = _bisect(gain, level, column_sJ, low_J, high_J)
    return n_K


def _bisect(
    gain: Gain,
    level: float,
    column_sK: tuple[FloatArray, ...],
    low_K: FloatArray,
    high_K: FloatArray,
) -> FloatArray:
    low_K, high_K = low_K.copy(), high_K.copy()
    while (low_K < high_K).any():
        # Where the search has ended, the middle may be one past the last unit; it changes nothing.
        middle_K = np.floor((low_K + high_K) / 2)
        more_K = (gain(middle_K, *column_sK) > level) & (low_K < high_K)
        low_K = np.where(more_K, middle_K + 1, low_K)
        high_K = np.where(more_K, high_K, middle_K)
    return low_K


def _fill(
    low_K: FloatArray, high_K: FloatArray, room: float, weight_K: FloatArray | None
) -> FloatArray:
    """Units of equal gain: fewest first, then the earliest, until the next one does not fit."""
    if len(low_K) == 0:
        return low_K
    bottom, top = float(low_K.min()), float(high_K.max())
    while bottom < top:  # the highest water that fits
        middle = np.ceil((bottom + top) / 2)
        if _spent(_filled(low_K, high_K, middle) - low_K, weight_K) <= room:
            bottom = middle
        else:
            top = middle - 1
    n_K = _filled(low_K, high_K, bottom)
    room -= _spent(n_K - low_K, weight_K)
    next_J = np.flatnonzero((n_K == bottom) & (n_K < high_K))
    n_K[next_J[: _fitting(room, next_J, weight_K)]] += 1
    return n_K


def _filled(low_K: FloatArray, high_K: FloatArray, level: float) -> FloatArray:
    return np.minimum(np.maximum(low_K, level), high_K)


def _sorted(
    gain: Gain,
    column_sK: tuple[FloatArray, ...],
    low_K: FloatArray,
    high_K: FloatArray,
    room: float,
    weight_K: FloatArray | None,
) -> FloatArray:
    """The units between low and high one by one; J of them."""
    size_K = (high_K - low_K).astype(np.int64)
    if not size_K.any():
        return low_K
    prompt_J = np.repeat(np.arange(len(size_K)), size_K)
    first_K = np.cumsum(size_K) - size_K
    n_J = low_K[prompt_J] + (np.arange(len(prompt_J)) - first_K[prompt_J])
    gain_J = gain(n_J, *(column_K[prompt_J] for column_K in column_sK))
    order_J = np.argsort(-gain_J)
    fitting = _fitting(room, prompt_J[order_J], weight_K)
    if fitting < len(order_J):
        # The sort is not stable. Equal gains at the border are put in their own order.
        last = gain_J[order_J[fitting]]
        start = int(np.searchsorted(-gain_J[order_J], -last, side="left"))
        stop = int(np.searchsorted(-gain_J[order_J], -last, side="right"))
        tie_J = order_J[start:stop]
        order_J[start:stop] = tie_J[np.lexsort((prompt_J[tie_J], n_J[tie_J]))]
        fitting = _fitting(room, prompt_J[order_J], weight_K)
    return low_K + np.bincount(prompt_J[order_J[:fitting]], minlength=len(low_K))


def _fitting(room: float, prompt_J: IntArray, weight_K: FloatArray | None) -> int:
    """How many of the units of `prompt_J`, taken in turn, fit before the first that does not."""
    if weight_K is None:
        return min(int(room), len(prompt_J))
    return int(np.searchsorted(np.cumsum(weight_K[prompt_J]), room, side="right"))


def _spent(units_K: FloatArray, weight_K: FloatArray | None) -> float:
    return float(units_K.sum() if weight_K is None else units_K @ weight_K)


def _bits(level: float) -> int:
    """Bits of a non-negative float64 read as an integer: in the same order, and evenly in logs."""
    return int(struct.unpack("<q", struct.pack("<d", level))[0])


def _float(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])
