"""Contract tests for a selector or an allocator of your own. Run them once, in a test.

Axes: D prompts of a made-up data set, P prompts of a step.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samplers.allocation import Allocator
from samplers.posterior import BetaPosterior
from samplers.selection.selectors import Selector

MakeSelector = Callable[[BetaPosterior, Sequence[str]], Selector]
"""`make(posterior, keys) -> selector` over the posterior's prompts, whose keys are `keys`."""

Columns = tuple[NDArray[np.float64], ...]
"""What an allocator is given of its prompts: a scale, or the two parameters of a posterior."""


def check_sampler(
    *,
    selector: MakeSelector | None = None,
    allocator: Allocator | None = None,
    num_prompts: int = 24,
    by_key: bool = True,
    passes_over: bool = True,
    reads_scales: bool = True,
    takes_posterior: bool = False,
    minimum: int = 1,
) -> None:
    """Test that a selector, an allocator or both keep the contract the planner relies on.

    A selector chooses distinct rows in range, as int64; chooses the same from equal states and
    generators, whatever else the process draws; leaves the posterior as it is; refuses more prompts
    than there are; and, restored from its state in the middle of a run, goes on as if it had not
    been interrupted. An allocator spends the total exactly, within its boxes, as int64; decides the
    same when asked again; follows its prompts when they are reordered; leaves its arguments as they
    are; and refuses boxes that cannot be met and scales that are not finite and non-negative.

    Example::

        check_sampler(selector=lambda posterior, keys: MySelector(posterior), by_key=False)
        check_sampler(allocator=my_allocator)
        check_sampler(allocator=of_the_posterior, takes_posterior=True)

    Args:
        selector: makes a fresh selector over the given posterior and keys; called many times.
        allocator: the allocator.
        num_prompts: D, at least 8.
        by_key: whether the selector promises that shuffling the rows of the data set changes
            nothing.
        passes_over: whether the selector promises to heed `exclude`. A planner that is never asked
            to exclude rows does not need it.
        reads_scales: whether the allocator looks at the scales at all, and so has to refuse those
            that are none. `allocation.uniform` does not.
        takes_posterior: whether the allocator is called with parameters of the posterior,
            `allocate(a_P, b_P, total, ...)`, as a planner with scale=None does. What is said of
            scales then holds of parameters, which have to be finite and positive.
        minimum: least rollouts per prompt the allocator accepts.

    Raises:
        AssertionError: if the contract is broken; the message says which part.
        ValueError: if there is nothing to test.
    """
    if (selector is None and allocator is None) or num_prompts < 8:
        raise ValueError(
            f"check_sampler needs a selector or an allocator and at least 8 prompts, "
            f"got num_prompts={num_prompts}"
        )
    if selector is not None:
        _check_choices(selector, num_prompts)
        _check_restart(selector, num_prompts)
        if passes_over:
            _check_exclusion(selector, num_prompts)
        if by_key:
            _check_shuffle(selector, num_prompts)
    if allocator is not None:
        cases = _cases(num_prompts, minimum, takes_posterior)
        _check_budgets(allocator, cases)
        _check_order_of_prompts(allocator, num_prompts, minimum, takes_posterior)
        _check_refusals(allocator, num_prompts, minimum, reads_scales, takes_posterior)


def _keys(num_prompts: int) -> list[str]:
    """Keys whose order is not that of the rows."""
    return [f"prompt {row * 7 % num_prompts} of {row}" for row in range(num_prompts)]


def _posterior(keys: Sequence[str]) -> BetaPosterior:
    """Counts that belong to keys: some unvisited, some alike."""
    posterior = BetaPosterior(len(keys))
    trials_D = np.array([int(key.split()[-1]) % 3 * 4 for key in keys])
    successes_D = np.array([int(key.split()[-1]) % 5 for key in keys])
    posterior.add(range(len(keys)), np.minimum(successes_D, trials_D), trials_D)
    return posterior


def _steps(
    selector: Selector,
    posterior: BetaPosterior,
    keys: Sequence[str],
    steps: range,
    *,
    size: int = 5,
) -> list[list[str]]:
    """What is chosen, by key; rewards belong to step and key, and the posterior learns them."""
    chosen = []
    for step in steps:
        index_P = np.array(selector.select(size, generator=np.random.default_rng(step)))
        chosen.append([keys[row] for row in index_P])
        successes_P = [(int(keys[row].split()[-1]) + step) % 5 for row in index_P]
        posterior.observe(index_P, successes_P, [4] * size)
    return chosen


def _check_choices(make: MakeSelector, num_prompts: int) -> None:
    keys = _keys(num_prompts)
    for size in (1, 5, num_prompts - 1, num_prompts):
        posterior = _posterior(keys)
        before = posterior.state_dict()
        selector, same = make(posterior, keys), make(_posterior(keys), keys)
        for call in range(4):
            index_P = selector.select(size, generator=np.random.default_rng(call))
            _require(
                isinstance(index_P, np.ndarray)
                and index_P.dtype == np.int64
                and index_P.shape == (size,),
                f"select({size}) must give ({size},) int64 rows, got {index_P!r}",
            )
            rows = index_P.tolist()
            _require(
                len(set(rows)) == size and min(rows) >= 0 and max(rows) < num_prompts,
                f"select({size}) must give distinct rows in [0, {num_prompts}), got {rows}",
            )
            np.random.seed(call)  # noqa: NPY002 - a selector must not read the global generator
            index_P[:] = 0  # what was handed out is the caller's to change
            again = same.select(size, generator=np.random.default_rng(call))
            _require(
                rows == again.tolist(),
                f"call {call} of select({size}) differs between two selectors of equal state and "
                f"equal generators: {rows} and {again.tolist()}",
            )
        for name, counts_D in posterior.state_dict().items():
            _require(
                np.array_equal(counts_D, before[name]),
                f"select must leave the posterior as it is, {name} has changed",
            )
    for size in (0, num_prompts + 1):
        selector = make(_posterior(keys), keys)
        _require_refused(
            partial(selector.select, size, generator=np.random.default_rng(0)),
            f"select({size}) of {num_prompts} prompts",
        )


def _check_restart(make: MakeSelector, num_prompts: int) -> None:
    keys = _keys(num_prompts)
    posterior = _posterior(keys)
    whole = _steps(make(posterior, keys), posterior, keys, range(12))
    for kill in (0, 1, 5, 8):
        posterior = _posterior(keys)
        killed = make(posterior, keys)
        _steps(killed, posterior, keys, range(kill))
        state, known = killed.state_dict(), posterior.state_dict()
        _require_plain(state, "state_dict()")
        kept = copy.deepcopy(state)
        _steps(killed, posterior, keys, range(kill, kill + 2))
        _require(_same(state, kept), "state_dict() must be a copy; it changed with later calls")
        posterior = BetaPosterior(num_prompts)
        posterior.load_state_dict(known)
        restored = make(posterior, keys)
        restored.load_state_dict(kept)
        _require(
            _steps(restored, posterior, keys, range(kill, 12)) == whole[kill:],
            f"restored from its state before step {kill}, the selector chooses differently from "
            f"one that was not interrupted",
        )


def _check_exclusion(make: MakeSelector, num_prompts: int) -> None:
    keys = _keys(num_prompts)
    selector = make(_posterior(keys), keys)
    for call in range(6):
        exclude = [(call * 3 + at) % num_prompts for at in range(num_prompts // 2)]
        size = num_prompts - len(exclude) if call % 2 else 3
        index_P = selector.select(size, generator=np.random.default_rng(call), exclude=exclude)
        rows = index_P.tolist()
        _require(
            len(set(rows)) == size and not set(rows) & set(exclude),
            f"select({size}, exclude={exclude}) must give {size} other rows, got {rows}",
        )
    _require_refused(
        lambda: selector.select(
            2, generator=np.random.default_rng(0), exclude=range(1, num_prompts)
        ),
        "select(2) where all prompts but 1 are excluded",
    )


def _check_shuffle(make: MakeSelector, num_prompts: int) -> None:
    keys = _keys(num_prompts)
    shuffled = [keys[row] for row in np.random.default_rng(0).permutation(num_prompts)]
    chosen = []
    for order in (keys, shuffled):
        posterior = _posterior(order)
        chosen.append(_steps(make(posterior, order), posterior, order, range(8)))
    _require(
        chosen[0] == chosen[1],
        f"a shuffle of the data set's rows changes the keys that are chosen: {chosen[0]} "
        f"and {chosen[1]}",
    )


def _cases(
    num_prompts: int, minimum: int, takes_posterior: bool
) -> list[tuple[Columns, int, Any, Any]]:
    """Columns (a scale, or two parameters), totals and boxes that can be met."""
    generator = np.random.default_rng(0)
    std_P = generator.random(num_prompts)
    some_P = np.where(generator.random(num_prompts) < 0.5, std_P, 0.0)
    lower_P = minimum + generator.integers(0, 3, num_prompts)
    upper_P = lower_P + generator.integers(0, 9, num_prompts)
    least = minimum * num_prompts
    even_P = np.ones(num_prompts)
    columns: tuple[Columns, ...] = (
        (std_P,),
        (some_P,),
        (0 * even_P,),
        (even_P,),
        (1e-200 * std_P,),
    )
    if takes_posterior:
        columns = (
            (1 + 9 * std_P, 1 + 9 * std_P[::-1]),
            (1 + 9 * some_P, even_P),
            (even_P, even_P),
            (1 + 1e6 * std_P, 1 + 1e3 * some_P),
            (std_P, some_P + 0.1),
        )
    return [
        (column_P, total, lower, upper)
        for column_P in columns
        for total, lower, upper in [
            (least, minimum, None),
            (least + 1, minimum, None),
            (least + 5 * num_prompts + 3, minimum, None),
            (least + 2 * num_prompts + 1, minimum, minimum + 4),
            ((minimum + 4) * num_prompts, minimum, minimum + 4),
            (int(lower_P.sum() + upper_P.sum()) // 2, lower_P, upper_P),
            (int(upper_P.sum()), lower_P, upper_P),
        ]
    ] + [(tuple(column_P[:1] for column_P in columns[0]), minimum + 3, minimum, None)]


def _check_budgets(allocate: Allocator, cases: list[tuple[Columns, int, Any, Any]]) -> None:
    for columns, total, lower, upper in cases:
        given = tuple(column_P.copy() for column_P in columns)
        budget_P = allocate(*given, total, minimum=lower, maximum=upper)
        named = ", ".join(str(column_P.tolist()) for column_P in columns)
        what = f"allocate({named}, {total}, minimum={lower}, maximum={upper})"
        _require(
            isinstance(budget_P, np.ndarray)
            and budget_P.dtype == np.int64
            and budget_P.shape == columns[0].shape,
            f"{what} must give {columns[0].shape} int64 budgets, got {budget_P!r}",
        )
        _require(
            int(budget_P.sum()) == total,
            f"{what} must spend exactly {total}, spent {int(budget_P.sum())}",
        )
        _require(
            bool((budget_P >= lower).all() and (upper is None or (budget_P <= upper).all())),
            f"{what} leaves its boxes: {budget_P.tolist()}",
        )
        _require(
            all(map(np.array_equal, given, columns)), f"{what} must leave the scales as they are"
        )
        again_P = allocate(*(c.copy() for c in columns), total, minimum=lower, maximum=upper)
        _require(
            np.array_equal(budget_P, again_P),
            f"{what} must decide the same when asked again, got {budget_P.tolist()} "
            f"and {again_P.tolist()}",
        )


def _check_order_of_prompts(
    allocate: Allocator, num_prompts: int, minimum: int, takes_posterior: bool
) -> None:
    """With distinct scales; equal ones may be told apart by their places."""
    generator = np.random.default_rng(1)
    std_P = generator.permutation(np.linspace(0.1, 0.5, num_prompts))
    columns = (1 + 9 * std_P, 2 - std_P) if takes_posterior else (std_P,)
    lower_P = minimum + generator.integers(0, 3, num_prompts)
    total = minimum * num_prompts + 6 * num_prompts
    for lower in (minimum, lower_P):
        order_P = generator.permutation(num_prompts)
        moved = lower if isinstance(lower, int) else lower[order_P]
        budget_P = allocate(*columns, total, minimum=lower, maximum=None)
        of_order = (column_P[order_P] for column_P in columns)
        found_P = allocate(*of_order, total, minimum=moved, maximum=None)
        # One rollout may stand between prompts: what does not divide may go by place.
        _require(
            bool((np.abs(found_P - budget_P[order_P]) <= 1).all()),
            f"budgets must follow their prompts when these are reordered, got "
            f"{budget_P[order_P].tolist()} and {found_P.tolist()}",
        )


def _check_refusals(
    allocate: Allocator, num_prompts: int, minimum: int, reads_scales: bool, takes_posterior: bool
) -> None:
    even_P, least = np.ones(num_prompts), minimum * num_prompts
    columns = (even_P, even_P) if takes_posterior else (even_P,)
    boxes: list[tuple[str, Columns, int, int | None]] = [
        ("a total below the minima", columns, least - 1, None),
        ("a total above the maxima", columns, least + num_prompts + 1, minimum + 1),
    ]
    name = "parameter" if takes_posterior else "scale"
    bad_values = {"that is NaN": np.nan, "that is infinite": np.inf, "below 0": -1.0}
    if takes_posterior:
        bad_values["that is 0"] = 0.0
    scales: list[tuple[str, Columns, int, int | None]] = [
        (f"a {name} {what}", (*columns[:at], bad_P, *columns[at + 1 :]), 2 * least + 9, None)
        for what, value in bad_values.items()
        for bad_P in [np.where(even_P.cumsum() == 3, value, 1.0)]
        for at in range(len(columns))
    ]
    for what, given, total, upper in boxes + (scales if reads_scales else []):
        _require_refused(partial(allocate, *given, total, minimum=minimum, maximum=upper), what)


def _require(holds: bool, message: str) -> None:
    if not holds:
        # Not an assert statement: the test holds under `python -O` too.
        raise AssertionError(message)


def _require_refused(call: Callable[[], Any], what: str) -> None:
    try:
        found = call()
    except ValueError:
        return
    raise AssertionError(f"{what} must be refused with a ValueError, got {found!r}")


def _require_plain(value: Any, path: str) -> None:
    """Arrays, numbers, strings, None, and dicts and lists of them: what a checkpoint can hold."""
    if isinstance(value, dict):
        for name, item in value.items():
            _require(isinstance(name, str), f"{path} has the key {name!r}, which is not a string")
            _require_plain(item, f"{path}[{name!r}]")
    elif isinstance(value, list):
        for at, item in enumerate(value):
            _require_plain(item, f"{path}[{at}]")
    else:
        plain = value is None or isinstance(value, (bool, int, float, str))
        numeric = isinstance(value, np.ndarray) and value.dtype.kind in "biuf"
        _require(
            plain or numeric,
            f"{path} is a {type(value).__name__}; a checkpoint holds arrays and plain values",
        )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
    return bool(one == other)
