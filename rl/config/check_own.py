"""Functions of the user's own, tested before anything is loaded.

Advantages and losses have contract tests in `rl/objective/check.py`, selectors and allocators in
`samplers/check.py`, for a test of one's own. What a run needs of the other stages is tested here, on
made-up numbers. Axes: P prompts, N rollouts, K rows kept, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from rl.config.build import allocator_of, stopping_of
from rl.config.methods import OWN_STAGES, Settings, method_of
from rl.config.own import is_own
from samplers.stopping import Counts


def check_own(config: Settings) -> None:
    """Test every function of the user's own that settings name and that can be tested by itself.

    Raises:
        ValueError: naming the function, and what it did.
    """
    for stage in OWN_STAGES:
        name = getattr(config, stage)
        if not is_own(name):
            continue
        method_of(config, stage)  # a parameter that nothing has is refused
        check = _CHECKS.get(stage)
        if check is not None:
            try:
                check(config)
            except AssertionError as error:
                raise ValueError(f"{stage} {name} {error}") from error


def _allocator(config: Settings) -> None:
    solve, _ = allocator_of(config)
    for num_prompts, each in ((4, 8), (1, 2), (3, 5)):
        std_P, total = np.linspace(0, 0.5, num_prompts), num_prompts * each
        for lowest, highest in ((0, None), (1, each + 1), (each, each)):
            budget_P = np.asarray(solve(std_P.copy(), total, minimum=lowest, maximum=highest))
            asked = f"of {total} rollouts for {num_prompts} prompts"
            whole = budget_P.dtype.kind in "iu" and budget_P.shape == (num_prompts,)
            _require(
                whole, f"must give one whole number for each prompt, gave {budget_P!r} {asked}"
            )
            _require(
                int(budget_P.sum()) == total, f"gave {budget_P.tolist()} {asked}, which is not all"
            )
            _require(
                bool((budget_P >= lowest).all() and (budget_P <= (highest or total)).all()),
                f"gave {budget_P.tolist()} {asked}, outside minimum={lowest} and maximum={highest}",
            )


def _stopping(config: Settings) -> None:
    rule: Any = stopping_of(config)
    counts = Counts.of(
        a_P=[1, 2, 1], b_P=[1, 1, 3], successes_P=[0, 2, 1], trials_P=[2, 2, 4], left_P=[4, 4, 0]
    )
    found = rule(counts)
    continue_P, *_ = found if isinstance(found, tuple) else (found,)
    continue_P = np.asarray(continue_P)
    good = continue_P.dtype == bool and continue_P.shape == (3,)
    _require(good, f"must give (P,) bool, True where a prompt goes on, gave {continue_P!r}")


def _selector(config: Settings) -> None:
    function: Callable[..., Any] = method_of(config, "selector").function
    made = callable(getattr(function, "select", None)) or not isinstance(function, type)
    _require(made, "must make a selector: a class with select(num_prompts, *, generator, exclude)")


_CHECKS: dict[str, Callable[[Settings], None]] = {
    "allocator": _allocator,
    "stopping": _stopping,
    "selector": _selector,
}


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)
