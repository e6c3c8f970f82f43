"""Compare a prompt's new rewards with its earlier ones, which `PromptHistory` remembers.

Prompts of image models come back often, with few samples each time; a baseline over several steps
is then known better than one over the step alone. Both published forms are here as pure functions
of the new rewards and a `PromptHistory`, which observes the new rewards afterwards:

    history = PromptHistory(steps=8)
    z_N = history_standardised(reward_N, row_N, history)     # for selection, by its sign
    advantage_N = z_N.clamp(-5, 5)                           # for the loss
    history.observe(reward_N, row_N)

The key is the row of the data set, not of the batch: a prompt drawn twice in a step is one prompt
here. Every process observes all rows of the step, so that histories stay equal.

Axes: N rollouts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class PromptHistory:
    """The rewards of each data-set row: those of the last `steps` steps, or the last `rewards`.

    Exactly one of the two is set. `steps` counts all steps of the run, whether or not the row took
    part (B2-DiffuRL, arXiv:2503.11240, as released: 8); `rewards` counts the row's own, however old
    (DDPO, arXiv:2305.13301, as released: 16 or 32).

    Raises:
        ValueError: if not exactly one is given, `steps` is negative or `rewards` below 1.
    """

    def __init__(self, *, steps: int | None = None, rewards: int | None = None) -> None:
        if (steps is None) == (rewards is None):
            raise ValueError(
                f"set steps or rewards, one of the two, got steps={steps}, rewards={rewards}"
            )
        if steps is not None and steps < 0:
            raise ValueError(f"steps must be at least 0, got {steps}")
        if rewards is not None and rewards < 1:
            raise ValueError(f"rewards must be at least 1, got {rewards}")
        self.steps = steps
        self.rewards = rewards
        self._step = 0
        self._past: dict[int, list[tuple[int, float]]] = {}

    def past(self, row: int) -> list[float]:
        """The row's remembered rewards, oldest first."""
        return [reward for _, reward in self._past.get(row, [])]

    def observe(self, reward_N: Tensor, row_N: Tensor) -> None:
        """Remember one step's rewards and forget what is now too old.

        Args:
            reward_N: (N,) finite floating-point rewards of all rollouts of the step.
            row_N: (N,) integers, the data-set row of each.

        Raises:
            ValueError: if shapes differ, or a reward is not finite or not floating point.
        """
        _check(reward_N, row_N)
        for row, reward in zip(row_N.tolist(), reward_N.tolist(), strict=True):
            self._past.setdefault(row, []).append((self._step, reward))
        self._step += 1
        if self.rewards is not None:
            for row in set(row_N.tolist()):
                self._past[row] = self._past[row][-self.rewards :]
        if self.steps is not None:
            first = self._step - self.steps
            kept = {
                row: [(step, reward) for step, reward in past if step >= first]
                for row, past in self._past.items()
            }
            self._past = {row: past for row, past in kept.items() if past}

    def state_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for a checkpoint; rewards as they were, to the last bit."""
        return {
            "steps": self.steps,
            "rewards": self.rewards,
            "step": self._step,
            "past": [[row, [list(entry) for entry in past]] for row, past in self._past.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`.

        Raises:
            ValueError: if it is from a history of another length.
        """
        for name in ("steps", "rewards"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"the state is of a history with {name}={state[name]}, "
                    f"this one has {name}={getattr(self, name)}"
                )
        self._step = state["step"]
        self._past = {row: [(step, reward) for step, reward in past] for row, past in state["past"]}


def history_standardised(
    reward_N: Tensor, row_N: Tensor, history: PromptHistory, *, eps: float = 1e-8
) -> Tensor:
    """Rewards in units of the prompt's own, over this step and those remembered.

        z_i = (r_i - mean_p) / (std_p + eps)

    with the mean and unbiased std of the row's remembered and new rewards. (B2-DiffuRL,
    arXiv:2503.11240, as released; there the key is the text of the prompt.) It is taken before rows
    are selected by it, and does not change under r -> a r + b, a > 0, as far as eps allows.

    Args:
        reward_N: (N,) finite floating-point rewards of all rollouts of the step.
        row_N: (N,) integers, the data-set row of each.
        history: of earlier steps; not changed.
        eps: added to the std, outside the root; >= 0.

    Returns:
        (N,) in the dtype of `reward_N`. A row with one reward in all, where the release gets NaN,
        or with equal ones, gets exactly 0.

    Raises:
        ValueError: as `PromptHistory.observe`, or for a negative `eps`.
    """
    _check(reward_N, row_N)
    _check_eps(eps)
    z_N = torch.zeros(len(reward_N), dtype=torch.float64)
    value_N = reward_N.detach().double().cpu()
    for row, index_K in _rows(row_N):
        known = torch.tensor(history.past(row), dtype=torch.float64)
        all_rewards = torch.cat([known, value_N[index_K]])
        z_N[index_K] = _standardised(value_N[index_K], all_rewards, 1, eps)
    return z_N.to(reward_N)


def buffer_standardised(
    reward_N: Tensor,
    row_N: Tensor,
    history: PromptHistory,
    *,
    min_count: int = 16,
    eps: float = 1e-6,
) -> Tensor:
    """Rewards in units of the prompt's last ones; of the step's, while those are few.

        A_i = (r_i - mean_b) / (std_b + eps)

    with the mean and population std of the row's last `history.rewards` rewards, new ones included
    and counted last, or of all rewards of the step while the row has fewer than `min_count`. (DDPO,
    arXiv:2305.13301, as released: buffers of 16 or 32, `min_count` 16.) If a step has more rewards
    of a row than the buffer holds, the last of them in batch order are its statistics.

    Args:
        reward_N, row_N: as `history_standardised`.
        history: one with `rewards`; not changed.
        min_count: at least 1; more than `history.rewards` means never the prompt's own.
        eps: added to the std, outside the root; >= 0.

    Returns:
        (N,) in the dtype of `reward_N`; exactly 0 where the buffer, or the step, has equal rewards.

    Raises:
        ValueError: as `history_standardised`, for a history of steps or a `min_count` below 1.
    """
    _check(reward_N, row_N)
    _check_eps(eps)
    if history.rewards is None:
        raise ValueError(
            f"a buffer counts rewards, got a history of steps={history.steps}; "
            f"use PromptHistory(rewards=...)"
        )
    if min_count < 1:
        raise ValueError(f"min_count must be at least 1, got {min_count}")
    advantage_N = torch.zeros(len(reward_N), dtype=torch.float64)
    value_N = reward_N.detach().double().cpu()
    for row, index_K in _rows(row_N):
        known = torch.tensor(history.past(row), dtype=torch.float64)
        buffer = torch.cat([known, value_N[index_K]])[-history.rewards :]
        peers = value_N if len(buffer) < min_count else buffer
        advantage_N[index_K] = _standardised(value_N[index_K], peers, 0, eps)
    return advantage_N.to(reward_N)


def _rows(row_N: Tensor) -> list[tuple[int, Tensor]]:
    """Each data-set row and the places of its rollouts, in batch order."""
    row_N = row_N.cpu()
    return [(row, (row_N == row).nonzero().flatten()) for row in row_N.unique().tolist()]


def _standardised(value_K: Tensor, peers: Tensor, correction: int, eps: float) -> Tensor:
    if len(peers) < 2 or not peers.max() > peers.min():
        return torch.zeros_like(value_K)
    return (value_K - peers.mean()) / (peers.std(correction=correction) + eps)


def _check_eps(eps: float) -> None:
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")


def _check(reward_N: Tensor, row_N: Tensor) -> None:
    if reward_N.shape != row_N.shape or reward_N.ndim != 1:
        raise ValueError(
            f"reward_N and row_N must be 1-d and equally long, "
            f"got {tuple(reward_N.shape)} and {tuple(row_N.shape)}"
        )
    if not reward_N.is_floating_point():
        raise ValueError(f"reward_N must be floating point, got {reward_N.dtype}")
    if row_N.is_floating_point() or row_N.dtype == torch.bool:
        raise ValueError(f"row_N must be integers, got {row_N.dtype}")
    if not reward_N.isfinite().all():
        at = int((~reward_N.isfinite()).nonzero()[0])
        raise ValueError(
            f"reward_N must be finite, got {reward_N[at].item()} in row {at} "
            f"of data-set row {int(row_N[at])}"
        )
