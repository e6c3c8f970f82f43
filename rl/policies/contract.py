"""What the stages ask of a policy: generate, reward, score, cut into micro-batches.

`LanguagePolicy` (language.py) and `DiffusionPolicy` (diffusion.py) are the two implementations.
Axes: P prompts, N rollouts, T decisions (tokens, or denoising steps).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rl.logprobs.reference import Reference
from rl.objective.hapo import EntropyPivot
from rollouts.batch import Rollouts
from rollouts.engines.contract import Engine
from rollouts.prompts import Prompt
from rollouts.rewards.contract import RewardResult

Whole = Callable[[], AbstractContextManager[Any]]
"""Opens a context in which the trained model is unwrapped and its sharded weights are gathered."""


@dataclass(frozen=True, kw_only=True)
class ScoredDecisions:
    """What one forward pass of the policy says of recorded decisions."""

    logprob_NT: Tensor
    """(N, T) nats, differentiable; 0 where the policy decided nothing."""
    entropy_NT: Tensor | None = None
    """(N, T) nats; None unless asked for."""
    kl_NT: Tensor | None = None
    """(N, T) nats, KL(policy || reference) of each decision, differentiable, where it comes with the
    score (denoising steps); None where the KL is estimated from log-probabilities (tokens)."""


class Policy(Protocol):
    """The model that trains, together with how it generates and how its rollouts are rewarded."""

    whole: Whole
    """The unwrapped model with whole weights; every rank enters and leaves together."""

    @property
    def engine(self) -> Engine[Any, Any]:
        """What generates the rollouts."""
        ...

    @property
    def reference(self) -> Reference | None:
        """The model behind `reference_logprobs`; None if there is none, or none is needed."""
        ...

    @property
    def validations(self) -> Mapping[str, tuple[int, Any]]:
        """By the name of each validation: rollouts of each held-out prompt, and how they are drawn."""
        ...

    @property
    def in_eval(self) -> bool:
        """Whether the update runs the model in evaluation mode."""
        ...

    @property
    def generates_with_trained_model(self) -> bool:
        """Whether the engine runs the very model that trains, so that log-probabilities agree."""
        ...

    # -- rollouts

    def params(self, version: int) -> Any:
        """How training rollouts are drawn after `version` optimizer steps, for the engine."""
        ...

    def rows_together(self, params: Any) -> int:
        """Rows of a prompt that one rank must generate together (the leaves of one root), else 1."""
        ...

    def start_seeds(
        self, prompts: list[Prompt], draw_P: np.ndarray, params: Any
    ) -> np.ndarray | None:
        """(P,) seeds of the noise that all samples of a prompt start from; None if each has its own."""
        ...

    def generate(
        self,
        prompts: list[Prompt],
        budget_P: np.ndarray,
        *,
        seeds_N: np.ndarray,
        params: Any,
        version: int,
        start_seeds_P: np.ndarray | None = None,
    ) -> Rollouts | None:
        """Rollouts under the weights of `version`; None for a budget of 0.

        Every rank calls this, also without rows: gathering sharded weights takes all of them.
        """
        ...

    def rest(self) -> None:
        """Called when generation is over until the weights change; the engine may free its memory."""
        ...

    def reward(
        self, prompts: list[Prompt], rollouts: Rollouts, *, max_failed_share: float
    ) -> tuple[list[Any], RewardResult]:
        """Decode the rollouts and score them: what the rewards saw of each row, and the rewards.

        Args:
            prompts: N prompts, one per row.
            rollouts: N rows.
            max_failed_share: the share of these rows that may fail before a RewardError.
        """
        ...

    # -- learning

    def score(
        self, model: torch.nn.Module, rollouts: Rollouts, *, entropy: bool = False
    ) -> ScoredDecisions:
        """Score recorded decisions under the current weights.

        Args:
            model: as it is trained, wrappers included.
            rollouts: a micro-batch on the model's device.
            entropy: whether entropies are wanted, with their gradient where gradients are on.
        """
        ...

    def reference_logprobs(self, model: torch.nn.Module, rollouts: Rollouts) -> Tensor:
        """(N, T) log-probabilities under the reference policy."""
        ...

    def trainable(self, rollouts: Rollouts) -> Tensor:
        """(N, T) which decisions may train: bool, or float weights."""
        ...

    def micro_batches(self, rollouts: Rollouts) -> list[Tensor]:
        """Rows that go through the model together when they are only scored."""
        ...

    def cut(self, rollouts: Rollouts) -> list[Rollouts]:
        """The micro-batches of an update."""
        ...

    def observe_entropies(self, pivot: EntropyPivot) -> None:
        """Remember the step's entropies, where the next step's sampling depends on them."""
        ...

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What later steps depend on besides the weights."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()` exactly; the engine loads the weights again before it generates."""
        ...
