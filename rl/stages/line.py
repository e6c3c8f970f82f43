"""What passes along the line: `Line`, the stages of a run, and `Batch`, what one step trains on."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rl.config.language import RolloutConfig
from rl.logprobs.reference import Reference
from rl.objective.hapo import EntropyPivot
from rl.ranks import Ranks
from rl.stages.draw import GroupBuffer, Wave
from rl.stages.success_line import SuccessLine
from rollouts.batch import Rollouts
from rollouts.engines.contract import Engine, SamplingParams
from rollouts.prompts import Prompt
from rollouts.rewards.contract import RewardResult
from samplers.ledger import Ledger
from samplers.planner import Planner


@dataclass(kw_only=True)
class Memory:
    """What one step leaves for the next, besides what planner and buffer know."""

    pivot: EntropyPivot | None = None  # of the last step's entropies, for the temperature
    loaded_version: int | None = None  # of the weights the engine has
    trainer_state: Any = None  # of transformers, for reward functions that ask for it
    has_warned_of_unrewarded: bool = False
    is_mismatch_told: bool = False  # of an engine that differs and is corrected for
    evaluations: int = 0  # of a denoiser in rows, for rollouts to train on; a guidance pair is one


class Scores(Protocol):
    """Log-probabilities, and entropies, of rollouts under a model: `rl.logprobs.scorer.Scorer`."""

    def logprobs(self, model: torch.nn.Module, rollouts: Any) -> torch.Tensor: ...

    def statistics(
        self, model: torch.nn.Module, rollouts: Any, *, differentiable: bool = False
    ) -> Any: ...


class History(Protocol):
    """Rewards of earlier steps, as far as an advantage needs them."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Line:
    """The stages of one run, in the order a rollout passes them."""

    prompts: list[Prompt]  # one per data-set row
    planner: Planner
    engine: Engine
    policy: Callable[[], AbstractContextManager[PreTrainedModel]]  # whole, as it trains
    generating: Callable[[], AbstractContextManager[PreTrainedModel]]  # as the engine wants it
    sampling: SamplingParams | Callable[[int], Any]  # how rollouts are made, or how at a version
    validations: dict[
        str, tuple[int, Any]
    ]  # rollouts of each held-out prompt, and how they are made
    tokenizer: PreTrainedTokenizerBase | None
    reward: Callable[
        ..., tuple[list[Any], RewardResult]
    ]  # (prompts, rollouts, *, max_failed_share)
    advantage: Callable[[Rollouts, list[Prompt]], torch.Tensor]  # of full groups, (N,) or (N, T)
    advantage_after: Callable[[Rollouts], torch.Tensor] | None  # of the rows kept (PODS)
    down_sample: Callable[[Rollouts, float], torch.Tensor]  # (rollouts, progress) -> rows_K
    buffer: GroupBuffer | None  # draws until enough groups are mixed; None: one wave a step
    history: History | None  # what advantages remember of earlier steps
    objective: str
    length_weight: str
    decisions: Callable[[Rollouts], torch.Tensor]  # (N, T): those that may train, or their weights
    select_tokens: Callable[[Rollouts, float], torch.Tensor]  # -> kept_NT
    reference: Reference | None
    score: Scores
    micro_batches: Callable[[Any], list[torch.Tensor]]
    cut: Callable[[Any], list[Any]]  # the micro-batches of an update
    loss: Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]
    loss_columns: dict[str, str]  # keywords of the loss besides the common ones, and their columns
    kl: Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]] | None
    ledger: Ledger
    memory: Memory
    ranks: Ranks
    config: RolloutConfig

    @cached_property
    def success_line(self) -> SuccessLine:
        """Tells of a `success_above` beside all rewards."""
        return SuccessLine(self.config.success_above)

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
            "evaluations": self.memory.evaluations,
            "history": None if self.history is None else self.history.state_dict(),
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
        self.memory.evaluations = state["evaluations"]
        if self.history is not None:
            self.history.load_state_dict(state["history"])
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

    def params(self, version: int) -> Any:
        """How this step's rollouts are made; tokens around the pivot of the last step, if at all."""
        if not isinstance(self.sampling, SamplingParams):
            return self.sampling(version)
        tau, pivot = self.config.adaptive_temperature_tau, self.memory.pivot
        if not tau or pivot is None:
            return self.sampling
        adaptive = pivot.adaptive_temperature(tau, signed=self.config.hapo_sign == "signed")
        return replace(self.sampling, adaptive_temperature=adaptive)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one step trains on, the same on every rank."""

    rollouts: Rollouts  # K rows, with rewards and advantages
    weight_K: torch.Tensor  # per-prompt weights of the objective
    denominator: float
    original_denominator: float  # of all rows, before any was dropped
    kl_denominator: float = 1.0  # the KL's own: the weight it covers
    bonus_denominator: float = 1.0  # of the entropy's: the decisions it covers
    prompts: list[Prompt]  # P, as `rollouts.prompt_N` counts them
    waves: list[Wave]  # everything that was generated
    metrics: dict[str, float] = field(default_factory=dict)
