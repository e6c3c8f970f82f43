"""Prompts that leave the pool: those that are solved, and by lot those that keep showing no spread.

`RetiringSelector` stands in front of any selector, which chooses among the prompts that are left.
Axes: D prompts of the data set, K candidates, P chosen.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from samplers.posterior import BetaPosterior
from samplers.selection._pool import Pool, top
from samplers.selection.selectors import Selector

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

MOST_CALLS = 64
"""How often the selector is asked for prompts in the place of skipped ones. A project default."""

_COUNTS = ("retired", "retired_picks", "skipped", "filled")


class RetiringSelector:
    """Another selector, with solved prompts retired and prompts without spread skipped.

    Retired is a prompt whose posterior mean is `retire_above` or more. All picks go to the others, but
    for a share `retire_share` in expectation: it is drawn uniformly from the retired, so that one that
    was forgotten again is seen and comes back, as it also does once its counts have decayed. (ScaleRL,
    arXiv:2510.13786, calls it No-Positive-Resampling, from pass rates of .9 on and for good; the mean
    of a posterior in the place of a count, and the share, are project defaults.)

    Skipped is a prompt, when its turn comes, with probability

        1 - explore^c

    c being its visits in a row without spread: all its rewards were equal, of two at least. The next
    prompt takes the place, until the step is full. (GRESO: Zheng et al., 2025, arXiv:2506.02177. There
    `explore` moves with the share of groups without spread, apart for those that pass and fail; here
    it is constant.)

    If too few prompts are left, the best of those that left fill the step: skipped ones first, those
    of the largest explore^c in front, then retired ones, those of the lowest mean. This never raises
    where the selector without retirement would not, and is counted in `filled`.

    Args:
        selector: chooses among the prompts that are left; it must heed `exclude`.
        posterior: of all D prompts; read, never written.
        retire_above: posterior mean in (0, 1) from which a prompt is retired; None: none is.
        retire_share: share in [0, 1] of the picks that retired prompts get all the same.
        explore: in (0, 1]; None skips none, and so does 1.
        keys: (D,) prompt keys; with them the rows' order does not matter.

    Raises:
        ValueError: if a setting is out of range, or nothing is asked for.
    """

    def __init__(
        self,
        selector: Selector,
        posterior: BetaPosterior,
        *,
        retire_above: float | None = None,
        retire_share: float = 0.02,
        explore: float | None = None,
        keys: Sequence[str] | None = None,
    ) -> None:
        if retire_above is None and explore is None:
            raise ValueError("neither retire_above nor explore is given: nothing would ever leave")
        if retire_above is not None and not 0 < retire_above < 1:
            raise ValueError(f"retire_above must lie in (0, 1), got {retire_above}")
        if not 0 <= retire_share <= 1:
            raise ValueError(f"retire_share must lie in [0, 1], got {retire_share}")
        if explore is not None and not 0 < explore <= 1:
            raise ValueError(f"explore must be above 0 and at most 1, got {explore}")
        self._selector = selector
        self._posterior = posterior
        self._retire_above = retire_above
        self._retire_share = retire_share
        self._explore = explore
        self._pool = Pool(posterior.num_prompts, keys)
        self._alike_D = np.zeros(posterior.num_prompts, dtype=np.int64)
        self._counts = dict.fromkeys(_COUNTS, 0)

    def select(
        self, num_prompts: int, *, generator: np.random.Generator, exclude: ArrayLike = ()
    ) -> IntArray:
        """(num_prompts,) int64 distinct rows: the selector's choice, then retired ones, then filled in.

        Raises:
            ValueError: if more prompts are asked for than are left, or the selector raises.
        """
        excluded = self._pool.excluded(num_prompts, exclude)
        row_K = self._pool.candidates(None, excluded, generator)
        mean_K = self._posterior.mean(row_K)
        chance_K: FloatArray = np.ones(len(row_K))
        retired_K = np.zeros(len(row_K), dtype=bool)
        skipped_K = np.zeros(len(row_K), dtype=bool)
        back = row_K[:0]
        if self._retire_above is not None:
            retired_K = mean_K >= self._retire_above
            # So many that their number is the share of the picks in expectation.
            wanted = int(self._retire_share * num_prompts + generator.random())
            wanted = min(wanted, num_prompts, int(retired_K.sum()))
            back = generator.choice(row_K[retired_K], wanted, replace=False)
            if hasattr(self._selector, "waive"):
                self._selector.waive(row_K[retired_K])
        if self._explore is not None:
            chance_K = np.power(self._explore, self._alike_D[row_K], dtype=np.float64)
            skipped_K = (generator.random(len(row_K)) >= chance_K) & ~retired_K
        # The selector does not see the retired, who have no turn; the skipped lose theirs.
        num_free = min(num_prompts - len(back), int((~retired_K).sum()))
        gone = np.concatenate([excluded, row_K[retired_K]])
        chosen, seen = self._in_turn(num_free, row_K[skipped_K], gone, generator)
        missing = num_prompts - len(back) - len(chosen)
        filled = row_K[:0]
        if missing:
            left_J = np.flatnonzero(~np.isin(row_K, np.concatenate([chosen, back])))
            # Below 0 the retired, the lowest mean first; above 0 the others, by their chance.
            score_J = np.where(retired_K, -mean_K, chance_K)[left_J]
            filled = row_K[left_J[top(score_J, missing, generator)]]
        self._counts = {
            "retired": int(retired_K.sum()),
            "retired_picks": len(back) + int(np.isin(filled, row_K[retired_K]).sum()),
            "skipped": seen,
            "filled": missing,
        }
        return np.concatenate([chosen, back, filled]).astype(np.int64)

    def _in_turn(
        self, wanted: int, skipped: IntArray, gone: IntArray, generator: np.random.Generator
    ) -> tuple[IntArray, int]:
        """Up to `wanted` rows that are not skipped, as the selector gives them, and how many were."""
        chosen = skipped[:0]
        seen, left = 0, self._pool.num_prompts - len(gone)
        for _ in range(MOST_CALLS if len(skipped) else 1):
            ask = min(wanted - len(chosen), left)
            if ask < 1:
                break
            also = {"exclude": gone} if len(gone) else {}
            turn = np.asarray(self._selector.select(ask, generator=generator, **also))
            stays = ~np.isin(turn, skipped)
            chosen = np.concatenate([chosen, turn[stays]])
            seen += int((~stays).sum())
            gone, left = np.concatenate([gone, turn]), left - len(turn)
        return chosen, seen

    def observe_spread(
        self, index_P: ArrayLike, trials_P: ArrayLike, low_P: ArrayLike, high_P: ArrayLike
    ) -> None:
        """Learn which groups of a step had rewards that differ. The planner calls it once a step.

        Args:
            index_P: (P,) distinct rows that were rolled out.
            trials_P: (P,) scored rollouts; fewer than two say nothing, and the count stays.
            low_P, high_P: (P,) smallest and largest reward.
        """
        index_P, trials_P = np.asarray(index_P, np.int64), np.asarray(trials_P)
        alike_P = np.asarray(low_P) == np.asarray(high_P)
        told_P = trials_P >= 2
        before_P = self._alike_D[index_P]
        self._alike_D[index_P] = np.where(told_P, np.where(alike_P, before_P + 1, 0), before_P)
        if hasattr(self._selector, "observe_spread"):
            self._selector.observe_spread(index_P, trials_P, low_P, high_P)

    def metrics(self) -> dict[str, float]:
        """Of the last call, the selector's own included: prompts that are retired, retired ones that
        were picked, turns that were skipped, and picks that filled the step."""
        inner = self._selector.metrics() if hasattr(self._selector, "metrics") else {}
        return inner | {name: float(count) for name, count in self._counts.items()}

    def state_dict(self) -> dict[str, Any]:
        """`alike_D`, int64 visits in a row without spread; `counts` of the last call, for the metrics;
        `selector`, the state of the selector."""
        return {
            "alike_D": self._alike_D.copy(),
            "counts": dict(self._counts),
            "selector": self._selector.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()` exactly.

        Raises:
            ValueError: if the state belongs to another data set, or to a run without retirement.
        """
        if "alike_D" not in state or len(state["alike_D"]) != self._pool.num_prompts:
            raise ValueError(
                f"alike_D must have one entry for each of the {self._pool.num_prompts} prompts: the "
                "state belongs to another data set, or to a run without retire_above and greso_explore"
            )
        self._selector.load_state_dict(state["selector"])
        self._alike_D = np.array(state["alike_D"], dtype=np.int64)
        self._counts = {name: int(count) for name, count in state["counts"].items()}
