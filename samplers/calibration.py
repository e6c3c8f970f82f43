"""Calibration: how well the posterior predicts outcomes that it has not seen yet.

Axes: P prompts, B bins, R outcomes.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from samplers.rows import check_names
from samplers.stopping import success_distribution

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


class Reliability:
    """Predicted pass rates against what came, by decile of the prediction, over the last steps.

    Sums decay once a training step, by .95 (project default): half is of the last 14 steps. Rollouts
    that a stopping rule did not make are no matter, as a rule that looks at outcomes only moves neither
    expectation.
    """

    def __init__(self, *, bins: int = 10, decay: float = 0.95) -> None:
        self._decay = decay
        self._predicted_B, self._passed_B, self._trials_B = np.zeros((3, bins))

    def observe(self, rate_P: ArrayLike, successes_P: ArrayLike, trials_P: ArrayLike) -> None:
        """Count rollouts of prompts whose pass rates had been predicted, in [0, 1]."""
        rate_P, trials_P = np.asarray(rate_P, np.float64), np.asarray(trials_P, np.float64)
        num = len(self._trials_B)
        place_P = np.minimum((rate_P * num).astype(np.int64), num - 1)
        for sum_B, term_P in (
            (self._predicted_B, rate_P * trials_P),
            (self._passed_B, np.asarray(successes_P, np.float64)),
            (self._trials_B, trials_P),
        ):
            np.add.at(sum_B, place_P, term_P)

    def decay(self) -> None:
        """End a training step."""
        for sum_B in (self._predicted_B, self._passed_B, self._trials_B):
            sum_B *= self._decay

    @property
    def error(self) -> float | None:
        """Mean distance of predicted and observed pass rate of a decile, weighted by its rollouts.

        Also known as the expected calibration error. Chance alone makes it about .8 sqrt(p (1 - p) / n)
        with n the rollouts of a decile. None before any rollout.
        """
        total = self._trials_B.sum()
        return float(np.abs(self._passed_B - self._predicted_B).sum() / total) if total else None

    def table(self) -> list[tuple[float, float, float]]:
        """Predicted rate, observed rate and rollouts of each decile that has any."""
        some = np.flatnonzero(self._trials_B)
        n, predicted, passed = (
            each[some] for each in (self._trials_B, self._predicted_B, self._passed_B)
        )
        return list(zip((predicted / n).tolist(), (passed / n).tolist(), n.tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """The three sums of each decile."""
        return {
            "predicted_B": self._predicted_B.copy(),
            "passed_B": self._passed_B.copy(),
            "trials_B": self._trials_B.copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()` exactly."""
        check_names(state, ("predicted_B", "passed_B", "trials_B"), "the state of a reliability")
        self._predicted_B[:] = state["predicted_B"]
        self._passed_B[:] = state["passed_B"]
        self._trials_B[:] = state["trials_B"]


def log_predictive(
    a_P: ArrayLike, b_P: ArrayLike, successes_P: ArrayLike, trials_P: ArrayLike
) -> FloatArray:
    """log P(r of n) of each group under the beta-binomial that its posterior predicts, in nats.

    Its negative mean over many groups is the log-loss, by which posteriors of different decays may
    be compared. Parameters are those from before the group.

    Args:
        a_P, b_P: (P,) positive.
        successes_P: (P,) integers in [0, trials]; a fractional reward has no such probability.
        trials_P: (P,) integers, at least 0; a group of none has log-probability 0.

    Raises:
        ValueError: if shapes or counts are not as above.
    """
    return np.log([chance_R[r] for chance_R, r in _predicted(a_P, b_P, successes_P, trials_P)])


def randomised_pit(
    a_P: ArrayLike,
    b_P: ArrayLike,
    successes_P: ArrayLike,
    trials_P: ArrayLike,
    *,
    generator: np.random.Generator,
) -> FloatArray:
    """F(r - 1) + u P(r) with u uniform: uniform on [0, 1] where the prediction is right.

    Without u the histogram of a discrete outcome would not be flat. A hump in the middle means
    underconfidence, a U shape means overconfidence. (Czado, Gneiting and Held, 2009.)

    Args:
        a_P, b_P, successes_P, trials_P: as in `log_predictive`.
        generator: draws one number per prompt.

    Returns:
        (P,) float64 in [0, 1].

    Raises:
        ValueError: as `log_predictive`.
    """
    groups = _predicted(a_P, b_P, successes_P, trials_P)
    share_P = generator.random(len(groups))
    return np.array(
        [
            chance_R[:r].sum() + share * chance_R[r]
            for (chance_R, r), share in zip(groups, share_P, strict=True)
        ]
    )


def calibration(
    a_P: ArrayLike,
    b_P: ArrayLike,
    successes_P: ArrayLike,
    trials_P: ArrayLike,
    *,
    generator: np.random.Generator,
) -> dict[str, float]:
    """Two numbers to log of a step's groups, predicted by the posterior of earlier steps.

    calibration_log_score: mean of `log_predictive` over the groups, in nats; higher is better.
    calibration_pit_ends: share of groups whose `randomised_pit` is below .1 or above .9. It is .2 on
    average if the predictions are right, more if the posterior is overconfident (pass rates moved since
    it saw them: lower the decays), less if it is underconfident.

    Args:
        a_P, b_P, successes_P, trials_P: as in `log_predictive`; groups without trials do not count.
        generator: as in `randomised_pit`.

    Returns:
        Both numbers; nothing if no group has trials, or successes are not whole numbers, as fractional
        rewards are.
    """
    a_P, b_P, successes_P, trials_P = map(np.asarray, (a_P, b_P, successes_P, trials_P))
    if not trials_P.any() or (successes_P != np.floor(successes_P)).any():
        return {}
    columns = [column_P[trials_P > 0] for column_P in (a_P, b_P, successes_P, trials_P)]
    pit_P = randomised_pit(*columns, generator=generator)
    return {
        "calibration_log_score": float(log_predictive(*columns).mean()),
        "calibration_pit_ends": float(((pit_P < 0.1) | (pit_P > 0.9)).mean()),
    }


def _predicted(
    a_P: ArrayLike, b_P: ArrayLike, successes_P: ArrayLike, trials_P: ArrayLike
) -> list[tuple[FloatArray, int]]:
    """Each group's predicted distribution, and what came."""
    a_P, b_P = np.asarray(a_P, dtype=np.float64), np.asarray(b_P, dtype=np.float64)
    successes_P, trials_P = np.asarray(successes_P), np.asarray(trials_P)
    shapes = {a_P.shape, b_P.shape, successes_P.shape, trials_P.shape}
    if len(shapes) != 1 or a_P.ndim != 1:
        raise ValueError(f"a, b, successes and trials must be 1-d and equally long, got {shapes}")
    whole_P = (successes_P == np.floor(successes_P)) & (trials_P == np.floor(trials_P))
    valid_P = whole_P & (successes_P >= 0) & (successes_P <= trials_P) & (trials_P < np.inf)
    if not valid_P.all():
        at = int(np.flatnonzero(~valid_P)[0])
        raise ValueError(
            f"successes must be integers in [0, trials], got {successes_P[at]} of {trials_P[at]} "
            f"for prompt {at}"
        )
    successes_P, trials_P = successes_P.astype(np.int64), trials_P.astype(np.int64)
    groups: list[tuple[FloatArray, int]] = [(np.empty(0), 0)] * len(a_P)
    for trials in np.unique(trials_P):
        places = np.flatnonzero(trials_P == trials)
        chance_PR = success_distribution(a_P[places], b_P[places], int(trials))
        for place, chance_R in zip(places.tolist(), chance_PR, strict=True):
            groups[place] = (chance_R, int(successes_P[place]))
    return groups
