"""A share of each step's picks that is drawn uniformly, whatever a selector believes.

A selector that believes a prompt hopeless, or a kind of prompts, does not visit it and so never learns
better. Axes: D prompts of the data set, P chosen.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from samplers.rows import check_names
from samplers.selection._pool import Pool
from samplers.selection.selectors import Selector

IntArray = NDArray[np.int64]

SHARE = 0.03
"""Drawn uniformly beside a prior that learns (project default)."""


class UniformShare:
    """Another selector's choice, of which a share is given up for prompts drawn from the whole pool.

    A step of P prompts has share P of them drawn uniformly, rounded up or down by lot so that it is so
    on average; they take the places that the other selector filled last. A prompt that both choose is
    there once.

    Args:
        selector: chooses the rest.
        num_prompts: D, prompts of the data set.
        share: in [0, 1].
        keys: (D,) prompt keys; with them the rows' order does not matter.

    Raises:
        ValueError: if the share is out of range.
    """

    def __init__(
        self,
        selector: Selector,
        num_prompts: int,
        *,
        share: float = SHARE,
        keys: Sequence[str] | None = None,
    ) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"the share of uniform picks must be in [0, 1], got {share}")
        self.selector = selector
        self._share = share
        self._pool = Pool(num_prompts, keys)
        self._drawn = 0
        self._chosen = 0

    def select(
        self, num_prompts: int, *, generator: np.random.Generator, exclude: ArrayLike = ()
    ) -> IntArray:
        """(num_prompts,) int64 distinct rows: the other selector's first, then those drawn uniformly.

        Raises:
            ValueError: as the other selector.
        """
        excluded = self._pool.excluded(num_prompts, exclude)
        also: dict[str, Any] = {"exclude": excluded} if len(excluded) else {}
        chosen = self.selector.select(num_prompts, generator=generator, **also)
        num_drawn = int(self._share * num_prompts + generator.random())
        self._drawn, self._chosen = num_drawn, num_prompts
        if not num_drawn:
            return chosen
        drawn = self._pool.candidates(num_drawn, excluded, generator)
        rest = chosen[~np.isin(chosen, drawn)][: num_prompts - len(drawn)]
        return np.concatenate([rest, drawn])

    def metrics(self) -> dict[str, float]:
        """Of the last call: the share that was drawn uniformly; and what the other selector tells."""
        found = {"uniform_share": self._drawn / self._chosen} if self._chosen else {}
        told = getattr(self.selector, "metrics", dict)
        return found | told()

    def state_dict(self) -> dict[str, Any]:
        """The other selector's, and the numbers of the last call."""
        return {
            "selector": self.selector.state_dict(),
            "drawn": self._drawn,
            "chosen": self._chosen,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()` exactly."""
        check_names(state, ("selector", "drawn", "chosen"), "the state of a uniform share")
        self.selector.load_state_dict(state["selector"])
        self._drawn, self._chosen = int(state["drawn"]), int(state["chosen"])
