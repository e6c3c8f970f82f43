"""Difficulty bands: prompts whose pass rate lies between two bounds, each as likely as the next.

A band that holds fewer prompts than a step needs is filled by a rule the caller must name; how
often that happens is in the selector's metrics. Axes: D prompts of the data set, K candidates.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from samplers.posterior import BetaPosterior
from samplers.selection._pool import Pool, top

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Short = Literal["raise", "nearest", "uniform"]


class StaticBandSelector:
    """Uniform among the prompts whose pass rate under a fixed policy was in [low, high].

    The baseline of sorting a data set once: measured with the starting policy and never again.

    Args:
        pass_rate_D: (D,) measured pass rates in [0, 1].
        short: what to do if the band holds fewer prompts than asked for. "raise" stops the run,
            "nearest" adds the prompts nearest to the band, "uniform" adds any others.
        low, high: the band, bounds included; [0.3, 0.7] is that of MoPPS (arXiv:2507.04632).
        keys: (D,) prompt keys; with them the rows' order does not matter.

    Raises:
        ValueError: if a rate is not in [0, 1], the bounds are not ordered within it, or `short` is
            none of the three.
    """

    def __init__(
        self,
        pass_rate_D: ArrayLike,
        *,
        short: Short,
        low: float = 0.3,
        high: float = 0.7,
        keys: Sequence[str] | None = None,
    ) -> None:
        pass_rate_D = np.array(pass_rate_D, dtype=np.float64)
        valid_D = (pass_rate_D >= 0) & (pass_rate_D <= 1)
        if pass_rate_D.ndim != 1 or not valid_D.all():
            raise ValueError(
                f"pass_rate_D must be 1-d and in [0, 1], got shape {pass_rate_D.shape}"
                + ("" if valid_D.all() else f" with {pass_rate_D[~valid_D][0]}")
            )
        self._band = _Band(low, high, short)
        self._pool = Pool(len(pass_rate_D), keys)
        self._pass_rate_D = pass_rate_D

    def select(
        self, num_prompts: int, *, generator: np.random.Generator, exclude: ArrayLike = ()
    ) -> IntArray:
        """(num_prompts,) int64 distinct rows: those in the band first, in random order.

        Raises:
            ValueError: if more prompts are asked for than are left, or than the band holds and
                `short` is "raise".
        """
        excluded = self._pool.excluded(num_prompts, exclude)
        row_K = self._pool.candidates(None, excluded, generator)
        return row_K[self._band.choose(self._pass_rate_D[row_K], num_prompts, generator)]

    def metrics(self) -> dict[str, float]:
        """Of the last call: the share of candidates in the band, and prompts added from outside."""
        return self._band.metrics()

    def state_dict(self) -> dict[str, Any]:
        """`in_band` and `filled` of the last call, for the metrics; the rates are a setting."""
        return self._band.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()` exactly."""
        self._band.load_state_dict(state)


class OnlineBandSelector:
    """Uniform among the prompts that the posterior places in [low, high], as it learns.

    By the posterior's mean an unvisited prompt is at 1/2 and so in most bands.

    Args:
        posterior: of all D prompts; read, never written.
        short: what to do if the band holds fewer candidates than asked for: "raise", "nearest" or
            "uniform", as in `StaticBandSelector`.
        low, high: the band, bounds included.
        rate: what has to be in the band, the posterior's "mean" or a "draw" from it.
        candidates: candidates per chosen prompt, drawn uniformly each step; None for the whole
            pool, which is also what more than D candidates come to.
        keys: (D,) prompt keys; with them the rows' order does not matter.

    Raises:
        ValueError: if the bounds are not ordered in [0, 1], or another setting is none of the above.
    """

    def __init__(
        self,
        posterior: BetaPosterior,
        *,
        short: Short,
        low: float = 0.3,
        high: float = 0.7,
        rate: Literal["mean", "draw"] = "mean",
        candidates: int | None = None,
        keys: Sequence[str] | None = None,
    ) -> None:
        if rate not in ("mean", "draw"):
            raise ValueError(f"rate must be 'mean' or 'draw', got {rate!r}")
        if candidates is not None and candidates < 1:
            raise ValueError(f"candidates must be at least 1 per chosen prompt, got {candidates}")
        self._band = _Band(low, high, short)
        self._pool = Pool(posterior.num_prompts, keys)
        self._posterior = posterior
        self._rate = rate
        self._candidates = candidates

    def select(
        self, num_prompts: int, *, generator: np.random.Generator, exclude: ArrayLike = ()
    ) -> IntArray:
        """(num_prompts,) int64 distinct rows: those in the band first, in random order.

        Raises:
            ValueError: if more prompts are asked for than are left, or than the band holds and
                `short` is "raise".
        """
        excluded = self._pool.excluded(num_prompts, exclude)
        size = None if self._candidates is None else self._candidates * num_prompts
        row_K = self._pool.candidates(size, excluded, generator)
        rate_K = (
            self._posterior.draw(row_K, generator=generator)
            if self._rate == "draw"
            else self._posterior.mean(row_K)
        )
        return row_K[self._band.choose(rate_K, num_prompts, generator)]

    def metrics(self) -> dict[str, float]:
        """Of the last call: the share of candidates in the band, and prompts added from outside."""
        return self._band.metrics()

    def state_dict(self) -> dict[str, Any]:
        """`in_band` and `filled` of the last call, for the metrics; what is known is the
        posterior's."""
        return self._band.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()` exactly."""
        self._band.load_state_dict(state)


class _Band:
    """The rule of both selectors, and how the last call went."""

    def __init__(self, low: float, high: float, short: Short) -> None:
        if not 0 <= low <= high <= 1:
            raise ValueError(f"low and high must satisfy 0 <= low <= high <= 1, got {low}, {high}")
        if short not in ("raise", "nearest", "uniform"):
            raise ValueError(f"short must be 'raise', 'nearest' or 'uniform', got {short!r}")
        self.low, self.high, self.short = low, high, short
        self._in_band = 0.0
        self._filled = 0

    def choose(
        self, rate_K: FloatArray, num_chosen: int, generator: np.random.Generator
    ) -> IntArray:
        """(num_chosen,) places in `rate_K`, those in the band first."""
        outside_K = np.maximum(np.maximum(self.low - rate_K, rate_K - self.high), 0)
        inside = np.flatnonzero(outside_K == 0)
        missing = max(num_chosen - len(inside), 0)
        if missing and self.short == "raise":
            raise ValueError(
                f"{len(inside)} of {len(rate_K)} candidates have a pass rate in "
                f"[{self.low}, {self.high}], {num_chosen} are needed; widen the band or say what "
                f"else to take with short='nearest' or 'uniform'"
            )
        chosen = generator.choice(inside, num_chosen - missing, replace=False)
        self._in_band, self._filled = len(inside) / len(rate_K), missing
        if not missing:
            return chosen
        outside = np.flatnonzero(outside_K > 0)
        more = (
            outside[top(-outside_K[outside], missing, generator)]
            if self.short == "nearest"
            else generator.choice(outside, missing, replace=False)
        )
        return np.concatenate([chosen, more])

    def metrics(self) -> dict[str, float]:
        return {"share_in_band": self._in_band, "prompts_filled": float(self._filled)}

    def state_dict(self) -> dict[str, Any]:
        return {"in_band": self._in_band, "filled": self._filled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._in_band, self._filled = float(state["in_band"]), int(state["filled"])
