"""Plan a training step along a denoising chain: where it draws noise, branches and trains.

An edge is one denoising step, numbered 0 .. T-1 from noise to image; it leads from state i to
state i + 1. A stochastic edge draws its noise and has a log-probability, any other follows the
deterministic sampler. At a split the children are k draws from the one distribution of their
parent, so the denoiser is asked once for all of them.

Axes: T denoising steps.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """Which edges draw noise, where one trajectory becomes several, and which edges are trained.

    Example, twenty steps of which all are stochastic, five children at edge 6 and the last
    fourteen trained::

        StepPlan(
            num_steps=20,
            rule="ddim",
            level=1.0,
            stochastic=tuple(range(20)),
            splits=((6, 5),),
            trained=tuple(range(6, 20)),
        )

    Plain numbers, equal and hashable by value. Sequences are stored as tuples.

    Raises:
        ValueError: if a number is out of range, edges are not increasing, an edge that is split or
            trained draws no noise, or level is 0 where noise is needed.
    """

    num_steps: int
    """T, at least 1."""
    rule: str
    """Name of the transition in `rollouts/diffusion/sde.py`, which knows the names."""
    level: float
    """The rule's noise level (eta or a); finite, >= 0. At 0 no edge has a log-probability."""
    stochastic: tuple[int, ...]
    """Increasing edges that draw noise; the others are deterministic."""
    splits: tuple[tuple[int, int], ...] = ()
    """(edge, children) with increasing edges; 1 child is no split."""
    trained: tuple[int, ...] = ()
    """Increasing edges the loss is over, some of the stochastic ones."""
    shared_start: bool = False
    """Whether all samples of a prompt start from one noise. Where their number is fixed, a split at
    the first edge that draws noise has the same law and evaluates the shared edges once."""

    def __post_init__(self) -> None:
        store = object.__setattr__  # a frozen dataclass has no other way to store what is converted
        store(self, "num_steps", _integer("num_steps", self.num_steps))
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps}")
        if not isinstance(self.rule, str) or not self.rule:
            raise ValueError(f"rule must be the name of a transition, got {self.rule!r}")
        if isinstance(self.level, bool) or not isinstance(self.level, int | float):
            raise ValueError(f"level must be a number, got {self.level!r}")
        store(self, "level", float(self.level))
        if not (math.isfinite(self.level) and self.level >= 0):
            raise ValueError(f"level must be finite and at least 0, got {self.level}")
        store(self, "stochastic", self._edges("stochastic", self.stochastic))
        store(self, "splits", self._pairs(self.splits))
        store(self, "trained", self._edges("trained", self.trained))
        self._check_noise("splits", [edge for edge, children in self.splits])
        self._check_noise("trained", self.trained)
        if not isinstance(self.shared_start, bool):
            raise ValueError(f"shared_start must be True or False, got {self.shared_start!r}")
        if self.shared_start and (not self.stochastic or self.level == 0):
            raise ValueError(
                "with shared_start all samples of a prompt would be one image: it needs stochastic "
                f"edges and level above 0, got stochastic={self.stochastic} and level={self.level}"
            )

    @property
    def leaves_per_root(self) -> int:
        """Finished samples of one root: the product of the children of all splits."""
        return math.prod(children for _, children in self.splits)

    @property
    def first_split(self) -> int | None:
        """The first edge with more than one child; None for a plan that does not branch."""
        return next((edge for edge, children in self.splits if children > 1), None)

    def children_of(self, step: int) -> int:
        """States that follow one state at edge `step`; 1 where the plan does not split."""
        if not 0 <= step < self.num_steps:
            raise ValueError(f"step must be in 0..{self.num_steps - 1}, got {step}")
        return dict(self.splits).get(step, 1)

    def states_at(self, step: int) -> int:
        """Distinct states of one root before edge `step`, of 0..T; at T its leaves."""
        if not 0 <= step <= self.num_steps:
            raise ValueError(f"step must be in 0..{self.num_steps}, got {step}")
        return math.prod(children for edge, children in self.splits if edge < step)

    def evaluations(self, num_roots: int) -> int:
        """Denoiser evaluations of `num_roots` roots, in rows, a guidance pair counted once.

            num_roots * sum_i prod_{splits s < i} children_s

        A split costs nothing itself: its children come from one evaluation. One split into k at
        edge t0 costs (t0 + 1) + k (T - t0 - 1), against t0 + k (T - t0) where the state is copied
        and each copy evaluated.
        """
        if num_roots < 0:
            raise ValueError(f"num_roots must be at least 0, got {num_roots}")
        return num_roots * sum(self.states_at(step) for step in range(self.num_steps))

    def _edges(self, name: str, edges: Iterable[int]) -> tuple[int, ...]:
        numbers = tuple(_integer(name, edge) for edge in edges)
        if any(not 0 <= edge < self.num_steps for edge in numbers):
            raise ValueError(f"{name} must lie in 0..{self.num_steps - 1}, got {numbers}")
        if any(first >= second for first, second in itertools.pairwise(numbers)):
            raise ValueError(f"{name} must be increasing edges, got {numbers}")
        return numbers

    def _pairs(self, splits: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
        pairs = [tuple(split) for split in splits]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"splits must be pairs (edge, children), got {pairs}")
        edges = self._edges("the edges of splits", [pair[0] for pair in pairs])
        children = [_integer("the children of splits", pair[1]) for pair in pairs]
        if any(count < 1 for count in children):
            raise ValueError(f"a split must have at least 1 child, got {pairs}")
        return tuple(zip(edges, children, strict=True))

    def _check_noise(self, name: str, edges: Iterable[int]) -> None:
        edges = tuple(edges)
        silent = sorted(set(edges) - set(self.stochastic))
        if silent:
            raise ValueError(
                f"{name} need edges that draw noise, but {silent} are not in "
                f"stochastic={self.stochastic}"
            )
        if edges and self.level == 0:
            raise ValueError(f"{name} need noise, got level=0 with {name} at {edges}")


def _integer(name: str, value: int) -> int:
    if isinstance(value, bool):
        raise ValueError(f"{name} must be integers, got {value}")
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be integers, got {value!r}") from None
