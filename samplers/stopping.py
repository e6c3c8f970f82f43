"""Stopping: after some rollouts of a step, which prompts get more.

Pure functions of counts: each returns `continue_P`, True where a prompt is to be rolled out again.
What decides is what was counted, in slot order and never by who finished first: a group stopped
because its quick rollouts agree is a biased group. Axes: P prompts, R outcomes.

    function               stops                                 objective
    positive, balanced     once enough passed (and failed)       changes: R / n overestimates p
    early_stop             groups that will likely stay alike    changes: extreme prompts weigh less
    early_stop_unbiased    the same, some of them by lot only    unchanged, with the weights returned

A step stopped on counts keeps the direction of each prompt's leave-one-out gradient and changes its
weight. The posterior is to be given every rollout either way; rules that look at outcomes only do
not bias it.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


def positive(
    successes_P: ArrayLike, rounds_P: ArrayLike, *, needed: int = 1, max_rounds: int = 4
) -> BoolArray:
    """Roll out until `needed` rollouts passed, for at most `max_rounds` rounds.

    Hard prompts get more rollouts without anybody estimating how hard they are. With rounds of M,
    `needed` = 1 and no cap, the expected number is M / (1 - (1 - p)^M). **Changes the objective**:
    the number of rollouts depends on their outcome, so the pool's pass rate overestimates p, by .03
    at p = .1 with 4 rounds of 8.

    (Reinforce-Ada Seq, arXiv:2510.04996; 4 rounds of 8 as in its code. The paper weights a prompt
    by 1 / p as well, which is another objective and is not done here.)

    Args:
        successes_P: (P,) rollouts that passed so far, all rounds of the step together.
        rounds_P: rounds done, one int or (P,); a round counts even if rollouts of it failed to be
            scored.
        needed: passes that are enough, at least 1.
        max_rounds: at least 1.

    Returns:
        (P,) bool, True where another round is to follow.

    Raises:
        ValueError: if a number is negative or not finite, or a setting is out of range.
    """
    return _sequential([("successes_P", successes_P, needed)], rounds_P, max_rounds)


def balanced(
    successes_P: ArrayLike,
    failures_P: ArrayLike,
    rounds_P: ArrayLike,
    *,
    keep: int = 4,
    max_rounds: int = 4,
) -> BoolArray:
    """Roll out until `keep` rollouts can be chosen half passed and half failed.

    That is floor(keep / 2) passes and keep - floor(keep / 2) failures, within `max_rounds` rounds.
    Easy prompts go on as well as hard ones. **Changes the objective** as `positive` does, and more
    so after the group is down-sampled to `keep`.

    (Reinforce-Ada Seq, arXiv:2510.04996, "balance"; 4 kept, 4 rounds of 8 as in its code.)

    Args:
        successes_P, failures_P: (P,) rollouts that passed, and that did not.
        rounds_P, max_rounds: as in `positive`.
        keep: rollouts that will be kept, at least 2.

    Returns:
        (P,) bool, True where another round is to follow.

    Raises:
        ValueError: as `positive`.
    """
    if keep < 2:
        raise ValueError(f"keep must be at least 2, got {keep}")
    counts = [
        ("successes_P", successes_P, keep // 2),
        ("failures_P", failures_P, keep - keep // 2),
    ]
    return _sequential(counts, rounds_P, max_rounds)


def early_stop(
    a_P: ArrayLike,
    b_P: ArrayLike,
    successes_P: ArrayLike,
    trials_P: ArrayLike,
    left_P: ArrayLike,
    *,
    threshold: float,
) -> BoolArray:
    """Stop groups that are all alike so far and will likely stay so.

    Continue iff  P(mixed) >= threshold  and rollouts are left. A group that is mixed already has
    P(mixed) = 1 and gets all its rollouts. threshold = 1 stops every group that is all alike, as in
    "stop at 4 of 8 if all equal".

    **Changes the objective**: a stopped group has leave-one-out gradient 0, so directions stay and
    prompts near p = 0 and 1 weigh less. 4 of 8 keeps .58, .65, .84, .90, .65 of the weight at
    p = .05, .1, .3, .5, .9. `early_stop_unbiased` does not.

    Args:
        a_P, b_P: (P,) parameters of the Beta posteriors before this group, positive.
        successes_P, trials_P: (P,) passes among the first `trials` rollouts, by slot. A success is
            1 and a failure 0; fractional rewards are to be turned into one or the other first.
        left_P: rollouts still planned, one int or (P,); 0 stops.
        threshold: in [0, 1]; 0 stops none.

    Returns:
        (P,) bool, True where the rest of the group is to be rolled out.

    Raises:
        ValueError: if counts or parameters are out of range or not finite.
    """
    _check_unit("threshold", threshold)
    # Not 1 - alike >= threshold: a chance of 1e-20 to stay alike would be lost there.
    alike_P = _alike(a_P, b_P, successes_P, trials_P, left_P)
    return (alike_P <= 1 - threshold) & (np.asarray(left_P) > 0)


def early_stop_unbiased(
    a_P: ArrayLike,
    b_P: ArrayLike,
    successes_P: ArrayLike,
    trials_P: ArrayLike,
    left_P: ArrayLike,
    *,
    threshold: float,
    rho: float,
    generator: np.random.Generator,
) -> tuple[BoolArray, FloatArray]:
    """`early_stop` that lets some condemned groups go on, and weights those by 1 / rho.

    Where `early_stop` would stop, the group goes on with probability rho and its gradient is to be
    multiplied by 1 / rho; a group that is stopped has weight 0. In expectation over the lots each
    group has its full gradient: **the objective is that of no stopping**, whatever the advantages
    are. The price is variance, from the few heavy groups.

    Args:
        a_P, b_P, successes_P, trials_P, left_P, threshold: as in `early_stop`.
        rho: in (0, 1]; 1 stops none.
        generator: draws one number per prompt in the order given, needed or not, so that the
            counts of one prompt do not move the lot of another.

    Returns:
        continue_P: (P,) bool.
        weight_P: (P,) float64: 1, 1 / rho or 0. A prompt with no rollouts left is complete: it
            does not continue and has weight 1. If a group is tested more than once, the weights of
            its tests are multiplied.

    Raises:
        ValueError: as `early_stop`, and if rho is not in (0, 1].
    """
    if not 0 < rho <= 1:
        raise ValueError(f"rho must be in (0, 1], got {rho}")
    goes_on_P = early_stop(a_P, b_P, successes_P, trials_P, left_P, threshold=threshold)
    complete_P = np.broadcast_to(np.asarray(left_P) == 0, goes_on_P.shape)
    lucky_P = (generator.random(len(goes_on_P)) < rho) & ~goes_on_P & ~complete_P
    weight_P = np.where(goes_on_P | complete_P, 1.0, np.where(lucky_P, 1 / rho, 0.0))
    return goes_on_P | lucky_P, weight_P


def mixed_probability(
    a_P: ArrayLike,
    b_P: ArrayLike,
    successes_P: ArrayLike,
    trials_P: ArrayLike,
    left_P: ArrayLike,
) -> FloatArray:
    """Chance that a group ends with both outcomes in it, given its first rollouts.

    1 if it has both; else 1 - P(the rest fail) after failures only, 1 - P(the rest pass) after
    passes only, and before any rollout 1 minus either. Arguments, errors: as `early_stop`.
    """
    return 1 - _alike(a_P, b_P, successes_P, trials_P, left_P)


def rest_all_fail(a_P: ArrayLike, b_P: ArrayLike, left_P: ArrayLike) -> FloatArray:
    """P(the next `left` rollouts all fail) under Beta(a, b); with a, b swapped, that all pass.

        prod_{j < left} (b + j) / (a + b + j)

    a and b already hold the group's rollouts so far. Beta(1, 1) and 4 failures, 4 left: 5/9.
    """
    a_P, b_P = _parameters(a_P, b_P)
    (left_P,) = _arrays({"left_P": left_P}, like=a_P)
    chance_P = np.ones_like(a_P)
    for j in range(int(left_P.max(initial=0))):
        chance_P *= np.where(j < left_P, (b_P + j) / (a_P + b_P + j), 1.0)
    return chance_P


def success_distribution(a_P: ArrayLike, b_P: ArrayLike, trials: int) -> FloatArray:
    """P(r of `trials` pass) under Beta(a, b), for every r: the beta-binomial distribution.

        C(n, r) B(a + r, b + n - r) / B(a, b)

    Args:
        a_P, b_P: (P,) positive parameters.
        trials: n, at least 0.

    Returns:
        (P, n + 1) float64, column r; each row sums to 1.
    """
    a_P, b_P = _parameters(a_P, b_P)
    if trials < 0:
        raise ValueError(f"trials must be at least 0, got {trials}")
    # Rollout by rollout: after m of them, r passed. Only sums and products of positive numbers, so
    # nothing cancels.
    chance_PR = np.zeros((len(a_P), trials + 1))
    chance_PR[:, 0] = 1
    r_R = np.arange(trials + 1)
    for m in range(trials):
        passing_PR = chance_PR * (a_P[:, None] + r_R)
        failing_PR = chance_PR * np.maximum(b_P[:, None] + m - r_R, 0)
        chance_PR = failing_PR
        chance_PR[:, 1:] += passing_PR[:, :-1]
        chance_PR /= (a_P + b_P + m)[:, None]
    return chance_PR


def _alike(
    a_P: ArrayLike,
    b_P: ArrayLike,
    successes_P: ArrayLike,
    trials_P: ArrayLike,
    left_P: ArrayLike,
) -> FloatArray:
    """Chance that all rollouts of a group have one outcome."""
    a_P, b_P = _parameters(a_P, b_P)
    counts = {"successes_P": successes_P, "trials_P": trials_P, "left_P": left_P}
    successes_P, trials_P, left_P = _arrays(counts, like=a_P)
    failures_P = trials_P - successes_P
    if (failures_P < 0).any():
        p = int(np.flatnonzero(failures_P < 0)[0])
        raise ValueError(
            f"successes must be at most trials, got {successes_P[p]} of {trials_P[p]} for prompt {p}"
        )
    a_P, b_P = a_P + successes_P, b_P + failures_P
    all_fail_P = np.where(successes_P == 0, rest_all_fail(a_P, b_P, left_P), 0.0)
    all_pass_P = np.where(failures_P == 0, rest_all_fail(b_P, a_P, left_P), 0.0)
    # Before any rollout both are possible, and where none is left both are certain.
    return np.minimum(all_fail_P + all_pass_P, 1.0)


def _sequential(
    counts: list[tuple[str, ArrayLike, int]], rounds_P: ArrayLike, max_rounds: int
) -> BoolArray:
    """Whether any count is below what is needed and rounds are left."""
    if max_rounds < 1 or any(needed < 1 for _, _, needed in counts):
        raise ValueError(
            f"needed and max_rounds must be at least 1, got {[n for *_, n in counts]} "
            f"and {max_rounds}"
        )
    count_sP = _arrays({name: count_P for name, count_P, _ in counts})
    (rounds_P,) = _arrays({"rounds_P": rounds_P}, like=count_sP[0])
    lacking = [count_P < needed for count_P, (*_, needed) in zip(count_sP, counts, strict=True)]
    return np.logical_or.reduce(lacking) & (rounds_P < max_rounds)


def _parameters(a_P: ArrayLike, b_P: ArrayLike) -> list[FloatArray]:
    arrays = _arrays({"a_P": a_P, "b_P": b_P})
    smallest = min(x.min(initial=np.inf) for x in arrays)
    if smallest <= 0:
        raise ValueError(f"a and b must be positive, got {smallest}")
    return arrays


def _arrays(named: dict[str, ArrayLike], like: FloatArray | None = None) -> list[FloatArray]:
    """As (P,) float64, finite and non-negative; a single number is repeated where `like` is."""
    arrays = [np.asarray(value, dtype=np.float64) for value in named.values()]
    if like is not None:
        arrays = [np.full_like(like, x) if x.ndim == 0 else x for x in arrays]
    shapes = {name: x.shape for name, x in zip(named, arrays, strict=True)}
    expected = arrays[0].shape if like is None else like.shape
    if len(expected) != 1 or any(shape != expected for shape in shapes.values()):
        raise ValueError(f"counts must be 1-d and equally long, got shapes {shapes}")
    for name, x in zip(named, arrays, strict=True):
        wrong_P = ~((x >= 0) & (x < np.inf))
        if wrong_P.any():
            p = int(np.flatnonzero(wrong_P)[0])
            raise ValueError(f"{name} must be finite and non-negative, got {x[p]} for prompt {p}")
    return arrays


def _check_unit(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
