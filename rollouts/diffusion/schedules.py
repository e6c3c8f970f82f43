"""Step schedules: at which denoising steps a training step draws noise, and which it trains.

A schedule maps the number of the training step to increasing indices of denoising steps, edges
0 .. num_steps - 1 from noise to image. It is a function of integers alone: a resumed run asks
again and gets the same, so there is nothing to checkpoint. Draws come from a generator seeded with
(seed, step), the same in every process.
"""

from collections.abc import Callable

import numpy as np

StepSchedule = Callable[..., tuple[int, ...]]
"""`schedule(step, *, num_steps, ...) -> edges`. Any function of this shape is a schedule."""


def all_steps(step: int, *, num_steps: int) -> tuple[int, ...]:
    """Every edge, at every training step.

    Raises:
        ValueError: if `step` is negative or `num_steps` below 1.
    """
    _check_chain(step, num_steps)
    return tuple(range(num_steps))


def last_steps(step: int, *, num_steps: int, last: int) -> tuple[int, ...]:
    """The last `last` edges, at every training step.

    Args:
        step: training step, from 0; changes nothing.
        num_steps: edges of the chain.
        last: in 1 .. num_steps.

    Raises:
        ValueError: if a number is out of range.
    """
    _check_chain(step, num_steps)
    _check("last", last, 1, num_steps)
    return tuple(range(num_steps - last, num_steps))


def backward_progressive(
    step: int, *, num_steps: int, first: int, last: int, stages: int
) -> tuple[int, ...]:
    """The last L_s edges, with L growing from `first` to `last` as training goes on.

        L_s = first + floor(s (last - first + 1) / stages),    s = min(step, stages - 1)

    (B2-DiffuRL, arXiv:2503.11240: backward progressive training, the formula of the released code,
    whose defaults are 14 to 20 of 20 edges in 100 stages.) Every length holds for about as many
    stages. A training step is one stage, from rollouts to update; after the last of them `last`
    stays, which is a project default, as the release stops there.

    Args:
        step: training step, from 0.
        num_steps: edges of the chain.
        first, last: 1 <= first <= last <= num_steps.
        stages: at least last - first + 1, so that every length has its turn.

    Raises:
        ValueError: if a number is out of range.
    """
    _check_chain(step, num_steps)
    _check("last", last, 1, num_steps)
    _check("first", first, 1, last)
    num_lengths = last - first + 1
    _check("stages", stages, 1)
    if stages < num_lengths:
        raise ValueError(
            f"stages must be at least {num_lengths}, one for each length from first={first} to "
            f"last={last}, got {stages}"
        )
    length = first + min(step, stages - 1) * num_lengths // stages
    return tuple(range(num_steps - length, num_steps))


def sliding_window(
    step: int,
    *,
    num_steps: int,
    size: int = 4,
    stride: int = 1,
    every: int = 25,
    stop: int | None = None,
    wrap: bool = False,
) -> tuple[int, ...]:
    """A window of edges that moves by `stride` after every `every` training steps.

        start = min(stride * floor(step / every), stop - 1)
        edges   start .. min(start + size, stop) - 1

    (MixGRPO, arXiv:2507.21802; size, stride and every of its released script, which has stop =
    num_steps - 2 and rolls back: with `wrap` the window begins again at edge 0 after it started at
    the last edge, stop - 1.) Near the end the window shrinks, as in the release; there one more turn
    of `every` steps has an empty window before it rolls back, and without rolling back all that
    follow do, which is left out here: without `wrap` the window stays on the last edge. A window of
    size 1 with stride 1, every 1 and `wrap` visits one edge after the other (TempFlow-GRPO,
    arXiv:2508.04324).

    Args:
        step: training step, from 0.
        num_steps: edges of the chain.
        size, stride, every: at least 1; `size` at most `stop`.
        stop: edges from here on are never in the window; None: num_steps.
        wrap: whether to begin again at edge 0, MixGRPO's roll-back.

    Raises:
        ValueError: if a number is out of range.
    """
    _check_chain(step, num_steps)
    stop = num_steps if stop is None else stop
    _check("stop", stop, 1, num_steps)
    _check("size", size, 1, stop)
    _check("stride", stride, 1)
    _check("every", every, 1)
    moves = step // every
    if wrap:
        moves %= -(-stop // stride)
    start = min(stride * moves, stop - 1)
    return tuple(range(start, min(start + size, stop)))


def random_window(
    step: int,
    *,
    num_steps: int,
    size: int,
    seed: int,
    start: int = 0,
    stop: int | None = None,
) -> tuple[int, ...]:
    """`size` edges in a row, at a uniformly random place in start .. stop - 1.

    (Flow-GRPO-Fast: the released code of arXiv:2505.05470 draws 2 or 3 edges in the first half of
    the chain, anew for every process and batch; here all rows of a training step share a window.)

    Args:
        step: training step, from 0.
        num_steps: edges of the chain.
        size: at least 1 and at most stop - start.
        seed: non-negative; another one gives other windows.
        start, stop: 0 <= start < stop <= num_steps; stop=None: num_steps.

    Raises:
        ValueError: if a number is out of range.
    """
    _check_chain(step, num_steps)
    stop = num_steps if stop is None else stop
    _check("stop", stop, 1, num_steps)
    _check("start", start, 0, stop - 1)
    _check("size", size, 1, stop - start)
    begin = start + int(_generator(seed, step).integers(stop - start - size + 1))
    return tuple(range(begin, begin + size))


def random_steps(
    step: int, *, num_steps: int, count: int, seed: int, stop: int | None = None
) -> tuple[int, ...]:
    """`count` different edges, every subset of edges 0 .. stop - 1 being as likely.

    (DanceGRPO, arXiv:2505.07818, trains a random 60 % of the edges but the last; its released code
    draws them anew for every row, here all rows of a training step share them.)

    Args:
        step: training step, from 0.
        num_steps: edges of the chain.
        count: in 1 .. stop.
        seed: non-negative; another one gives other edges.
        stop: edges from here on are never drawn; None: num_steps.

    Raises:
        ValueError: if a number is out of range.
    """
    _check_chain(step, num_steps)
    stop = num_steps if stop is None else stop
    _check("stop", stop, 1, num_steps)
    _check("count", count, 1, stop)
    drawn = _generator(seed, step).choice(stop, size=count, replace=False)
    return tuple(sorted(drawn.tolist()))


def _generator(seed: int, step: int) -> np.random.Generator:
    _check("seed", seed, 0)
    return np.random.default_rng((seed, step))


def _check_chain(step: int, num_steps: int) -> None:
    _check("step", step, 0)
    _check("num_steps", num_steps, 1)


def _check(name: str, value: int, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if value < least or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"in {least}..{most}"
        raise ValueError(f"{name} must be {bounds}, got {value}")
