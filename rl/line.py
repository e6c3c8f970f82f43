"""What passes along the line: `Line`, the stages of a run, and `Batch`, what one step trains on."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rl.arguments import RolloutConfig
from rl.distributed import Ranks
from rl.roll_out import Scored
from rollouts.batch import TokenRollouts
from rollouts.engine import Engine, SamplingParams
from rollouts.prompts import Prompt
from rollouts.rewards import RewardResult
from samplers.ledger import Ledger
from samplers.planner import Planner, Proposal


@dataclass(frozen=True, kw_only=True)
class Line:
    """The stages of one run, in the order a rollout passes them."""

    prompts: list[Prompt]  # one per data-set row
    planner: Planner
    engine: Engine
    policy: Callable[[], AbstractContextManager[PreTrainedModel]]  # the weights to generate with
    sampling: SamplingParams
    tokenizer: PreTrainedTokenizerBase
    reward: Callable[..., RewardResult]  # (prompts, texts, token ids, *, max_failed_share)
    advantage: Callable[..., torch.Tensor]
    objective: str
    length_weight: str
    loss: Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]
    ledger: Ledger
    ranks: Ranks
    config: RolloutConfig


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one step trains on, the same on every rank."""

    rollouts: TokenRollouts  # K rows, with rewards and advantages
    weight_K: torch.Tensor  # per-prompt weights of the objective
    denominator: float
    prompts: list[Prompt]  # P, as `rollouts.prompt_N` counts them
    proposals: list[Proposal]
    scored: list[Scored]  # one per round, everything that was generated
    metrics: dict[str, float] = field(default_factory=dict)
