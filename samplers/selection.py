"""Selection: which prompts are rolled out next. Axes: D prompts of the data set, P chosen."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from samplers.keys import step_generator

IntArray = NDArray[np.int64]


class Selector(Protocol):
    """Chooses prompts, and remembers what it needs to choose the next ones."""

    def select(self, num_prompts: int, *, generator: np.random.Generator) -> IntArray:
        """(num_prompts,) int64, distinct rows of the data set, in the order of the step."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What is remembered: arrays and plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()` exactly."""
        ...


class UniformSelector:
    """Every prompt once an epoch, in an order that is a function of (seed, epoch).

    A call that reaches the end of an epoch goes on with the next one, so every step has as many
    prompts as it asked for and no tail is lost. A prompt that this call took from the old epoch
    already keeps its place in the new one and comes with the next call: no call repeats a prompt,
    and every epoch still visits every prompt exactly once.

    Args:
        num_prompts: D, prompts of the data set.
        seed: seed of the run.
        keys: (D,) prompt keys. With them the order is one of keys, whatever row each is in, so
            shuffling the data set's rows changes nothing; without them it is an order of rows.

    Raises:
        ValueError: if there is no prompt, or the keys are not D distinct ones.
    """

    def __init__(self, num_prompts: int, *, seed: int, keys: Sequence[str] | None = None) -> None:
        if num_prompts < 1:
            raise ValueError(f"num_prompts must be at least 1, got {num_prompts}")
        if keys is not None and not len(keys) == len(set(keys)) == num_prompts:
            raise ValueError(
                f"keys must be {num_prompts} distinct ones, got {len(keys)} of which "
                f"{len(set(keys))} are distinct"
            )
        self.num_prompts = num_prompts
        self.seed = seed
        rows = range(num_prompts)
        self._row_D = np.array(rows if keys is None else sorted(rows, key=keys.__getitem__))
        self._epoch = 0
        self._waiting = self._order(0)

    def select(self, num_prompts: int, *, generator: np.random.Generator) -> IntArray:
        """(num_prompts,) int64 distinct rows, the next ones of the epoch's order.

        Args:
            num_prompts: how many, at most D.
            generator: not used. The order belongs to the epoch and not to the step: a generator
                of the step would make it depend on how many prompts each step takes.

        Raises:
            ValueError: if more prompts are asked for than there are, or less than one.
        """
        if not 1 <= num_prompts <= self.num_prompts:
            raise ValueError(
                f"num_prompts must be in [1, {self.num_prompts}], the size of the data set, "
                f"got {num_prompts}"
            )
        chosen, self._waiting = self._waiting[:num_prompts], self._waiting[num_prompts:]
        if len(chosen) < num_prompts:
            self._epoch += 1
            order = self._order(self._epoch)
            fresh = order[~np.isin(order, chosen)][: num_prompts - len(chosen)]
            self._waiting = order[~np.isin(order, fresh)]
            chosen = np.concatenate([chosen, fresh])
        return chosen.copy()

    def state_dict(self) -> dict[str, Any]:
        """What is remembered: `epoch`, an int, and `waiting`, the int64 rows it has left."""
        return {"epoch": self._epoch, "waiting": self._waiting.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()` exactly.

        Raises:
            ValueError: if the rows left are not distinct rows of this data set.
        """
        waiting = np.array(state["waiting"], dtype=np.int64)
        if len(np.setdiff1d(waiting, self._row_D)) or len(np.unique(waiting)) != len(waiting):
            raise ValueError(
                f"waiting must be distinct rows in [0, {self.num_prompts}): "
                f"the state belongs to another data set"
            )
        self._epoch = int(state["epoch"])
        self._waiting = waiting

    def _order(self, epoch: int) -> IntArray:
        return step_generator(self.seed, "epoch", epoch).permutation(self._row_D)
