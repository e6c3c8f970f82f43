"""Selection of prompts that score well and differ from each other.

Axes: D prompts of the data set, K candidates, P chosen, C components of an embedding.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from samplers.posterior import BetaPosterior
from samplers.selection._pool import Pool
from samplers.selection.scores import SCORES, Score
from samplers.selection.selectors import checked_scores, named_score, refuse_state

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


class DiverseSelector:
    """Thompson scores with PDTS's diversity term over embeddings that the user gives.

    PDTS maximises  sum_i score_i + gamma * (diversity of the chosen)  greedily: after the best
    score, one prompt after another,

        argmax_i  score_i / 2 + gamma * min_{j chosen} |embedding_i - embedding_j|

    because the plain best of a large pool are all alike. The greedy rule is not guaranteed to beat
    the plain one on the combined objective. gamma has the unit of a score over a distance, and
    the paper's 0.05, 8 and 1 belong to its three tasks: there is no default.

    Differs from the paper in what it scores: PDTS draws a predicted loss from a neural process,
    here a pass rate is drawn from the posterior and scored.  (Qu et al., arXiv:2504.19139.)

    Args:
        posterior: of all D prompts; read, never written.
        embedding_DC: (D, C) finite, in row order; distances are Euclidean. Cost: P K C.
        gamma: at least 0; at 0 the choice is `ThompsonSelector`'s.
        score: "vade", "variance", or any function of drawn pass rates.
        candidates: candidates per chosen prompt, drawn uniformly each step; None for the whole
            pool, which is also what more than D candidates come to. The paper goes up to 64; that
            as the default is the project's.
        keys: (D,) prompt keys; with them the rows' order does not matter.

    Raises:
        ValueError: if a setting is not as above.
    """

    def __init__(
        self,
        posterior: BetaPosterior,
        embedding_DC: ArrayLike,
        *,
        gamma: float,
        score: str | Score = "vade",
        candidates: int | None = 64,
        keys: Sequence[str] | None = None,
    ) -> None:
        embedding_DC = np.array(embedding_DC, dtype=np.float64)
        if embedding_DC.ndim != 2 or len(embedding_DC) != posterior.num_prompts:
            raise ValueError(
                f"embedding_DC must be ({posterior.num_prompts}, C), one row per prompt, "
                f"got shape {embedding_DC.shape}"
            )
        if not np.isfinite(embedding_DC).all():
            row = int(np.flatnonzero(~np.isfinite(embedding_DC).all(axis=1))[0])
            raise ValueError(f"embedding_DC must be finite, row {row} is not")
        if not 0 <= gamma < np.inf:
            raise ValueError(f"gamma must be finite and non-negative, got {gamma}")
        if candidates is not None and candidates < 1:
            raise ValueError(f"candidates must be at least 1 per chosen prompt, got {candidates}")
        self._posterior = posterior
        self._embedding_DC = embedding_DC
        self._gamma = gamma
        self._score = named_score(SCORES, score)
        self._candidates = candidates
        self._pool = Pool(posterior.num_prompts, keys)

    def select(
        self, num_prompts: int, *, generator: np.random.Generator, exclude: ArrayLike = ()
    ) -> IntArray:
        """(num_prompts,) int64 distinct rows, in the order in which they are taken.

        Equal gains go to the earlier key.

        Raises:
            ValueError: if more prompts are asked for than are left, or a score is not finite.
        """
        excluded = self._pool.excluded(num_prompts, exclude)
        size = None if self._candidates is None else self._candidates * num_prompts
        row_K = self._pool.candidates(size, excluded, generator)
        pass_rate_K = self._posterior.draw(row_K, generator=generator)
        score_K = checked_scores(self._score(pass_rate_K), row_K)
        if not np.isfinite(score_K).all():
            raise ValueError("scores must be finite where distances are added to them")
        return row_K[
            greedy_diverse(score_K, self._embedding_DC[row_K], num_prompts, gamma=self._gamma)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Empty: what is known is the posterior's, and the generator belongs to the step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore.

        Raises:
            ValueError: if there is something, another selector's.
        """
        refuse_state(state)


def greedy_diverse(
    score_K: FloatArray, embedding_KC: FloatArray, num_chosen: int, *, gamma: float
) -> IntArray:
    """Places taken one by one: score / 2 + gamma * (distance to the nearest one taken).

    The first is the best score. (PDTS, arXiv:2504.19139, its greedy solver.)

    Args:
        score_K: (K,) finite.
        embedding_KC: (K, C) finite.
        num_chosen: at most K.
        gamma: at least 0.

    Returns:
        (num_chosen,) int64 distinct places in the order taken; equal gains go to the earlier one.

    Raises:
        ValueError: if a distance is not finite, as those of embeddings around 1e200.
    """
    nearest_K = np.full(len(score_K), np.inf)
    free_K = np.ones(len(score_K), dtype=bool)
    gain_K = score_K / 2
    chosen = np.empty(num_chosen, dtype=np.int64)
    for at in range(num_chosen):
        place = int(np.argmax(np.where(free_K, gain_K, -np.inf)))
        chosen[at] = place
        free_K[place] = False
        with np.errstate(over="ignore", invalid="ignore"):
            distance_K = np.linalg.norm(embedding_KC - embedding_KC[place], axis=1)
        if not np.isfinite(distance_K).all():
            other = int(np.flatnonzero(~np.isfinite(distance_K))[0])
            raise ValueError(
                f"distances between embeddings must be finite, got {distance_K[other]} between "
                f"places {place} and {other}; scale the embeddings down"
            )
        np.minimum(nearest_K, distance_K, out=nearest_K)
        gain_K = score_K / 2 + gamma * nearest_K
    return chosen
