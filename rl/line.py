"""What passes along the line: `Line`, the stages of a run, and `Batch`, what one step trains on."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rl.arguments import RolloutConfig
from rl.distributed import Ranks
from rl.hapo import EntropyPivot
from rl.reference import Reference
from rl.scorer import Scorer
from rl.waves import GroupBuffer, Wave
from rollouts.batch import TokenRollouts
from rollouts.engine import Engine, SamplingParams
from rollouts.prompts import Prompt
from rollouts.rewards import RewardResult
from samplers.ledger import Ledger
from samplers.planner import Planner


@dataclass(kw_only=True)
class Memory:
    """What one step leaves for the next, besides what planner and buffer know."""

    pivot: EntropyPivot | None = None  # of the last step's entropies, for the temperature
    loaded_version: int | None = None  # of the weights the engine has


@dataclass(frozen=True, kw_only=True)
class Line:
    """The stages of one run, in the order a rollout passes them."""

    prompts: list[Prompt]  # one per data-set row
    planner: Planner
    engine: Engine
    policy: Callable[[], AbstractContextManager[PreTrainedModel]]  # whole, as it trains
    generating: Callable[[], AbstractContextManager[PreTrainedModel]]  # as the engine wants it
    sampling: SamplingParams
    tokenizer: PreTrainedTokenizerBase
    reward: Callable[..., RewardResult]  # (prompts, texts, token ids, *, max_failed_share)
    advantage: Callable[[TokenRollouts], torch.Tensor]  # of full groups
    advantage_after: Callable[[TokenRollouts], torch.Tensor] | None  # of the rows kept (PODS)
    down_sample: Callable[[TokenRollouts, float], torch.Tensor]  # (rollouts, progress) -> rows_K
    buffer: GroupBuffer | None  # draws until enough groups are mixed; None: one wave a step
    objective: str
    length_weight: str
    select_tokens: Callable[[TokenRollouts, float], torch.Tensor]  # -> kept_NT
    reference: Reference | None
    score: Scorer
    micro_batches: Callable[[TokenRollouts], list[torch.Tensor]]
    loss: Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]
    loss_columns: dict[str, str]  # keywords of the loss besides the common ones, and their columns
    kl: Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]] | None
    ledger: Ledger
    memory: Memory
    ranks: Ranks
    config: RolloutConfig

    def progress(self, version: int) -> float:
        """Share of the run that is done, in [0, 1]: of its steps or its tokens, whichever is more.

        Tokens of the step at hand do not count, so that nothing of it decides its own schedule.
        """
        most = self.config.max_generated_tokens
        step, totals = self.ledger.metrics(), self.ledger.totals
        spent = totals["tokens_drawn"] - step["ledger/tokens_drawn"]
        return min(max(version / self.config.max_steps, spent / most if most else 0.0), 1.0)

    def state_dict(self) -> dict[str, Any]:
        """What later steps depend on: nested dicts of arrays and plain values."""
        return {
            "planner": self.planner.state_dict(),
            "ledger": self.ledger.state_dict(),
            "buffer": None if self.buffer is None else self.buffer.state_dict(),
            "lengths": self.ranks.lengths.state_dict(),
            "pivot": None if self.memory.pivot is None else self.memory.pivot.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()` exactly."""
        self.planner.load_state_dict(state["planner"])
        self.ledger.load_state_dict(state["ledger"])
        if self.buffer is not None:
            self.buffer.load_state_dict(state["buffer"])
        self.ranks.lengths.load_state_dict(state["lengths"])
        self.memory.loaded_version = None
        pivot = state["pivot"]
        self.memory.pivot = None if pivot is None else EntropyPivot.from_state(pivot)

    def load_weights(self, policy: PreTrainedModel, *, version: int) -> None:
        """Give the engine the weights of `version`, unless it has them. Every rank calls this."""
        if self.memory.loaded_version != version:
            self.engine.load_weights(policy)
            self.memory.loaded_version = version

    def rest(self) -> None:
        """Generation is over until weights have changed: an engine that can give memory back does."""
        if hasattr(self.engine, "rest"):
            self.engine.rest()
        self.memory.loaded_version = None

    def params(self) -> SamplingParams:
        """How this step's tokens are drawn: around the pivot of the last step, if at all."""
        tau, pivot = self.config.adaptive_temperature_tau, self.memory.pivot
        if not tau or pivot is None:
            return self.sampling
        return replace(self.sampling, adaptive_temperature=pivot.adaptive_temperature(tau))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one step trains on, the same on every rank."""

    rollouts: TokenRollouts  # K rows, with rewards and advantages
    weight_K: torch.Tensor  # per-prompt weights of the objective
    denominator: float
    original_denominator: float  # of all rows, before any was dropped
    prompts: list[Prompt]  # P, as `rollouts.prompt_N` counts them
    waves: list[Wave]  # everything that was generated
    metrics: dict[str, float] = field(default_factory=dict)
