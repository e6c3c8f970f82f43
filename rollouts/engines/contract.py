"""The engine contract: what an engine receives and what it returns.

An engine turns prompts, a budget per prompt and a seed per rollout into rollouts. It never decides a
budget. `rollouts/engines/check.py` tests an engine of your own against this contract.
Axes: P prompts, N rollouts, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from rollouts.batch import Rollouts
from rollouts.engines.adaptive_temperature import AdaptiveTemperature
from rollouts.engines.model_limits import position_limit
from rollouts.prompts import Prompt

__all__ = [
    "Engine",
    "GeneratesTogether",
    "Prompt",
    "Rests",
    "SamplingParams",
    "TakesStarts",
    "TakesVerdicts",
    "asked_at",
    "end_of_sequence_ids",
    "num_positions",
    "requested_rows",
    "room_of",
]


IsOver = Callable[[Sequence[Prompt], Sequence[Sequence[int]]], Sequence[bool]]
"""`over(prompts, ids_N)`: whether each of N rollouts may end, by its prompt and its completion so far,
the start included (`rollouts.rewards.verdicts.Verdicts.over`)."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn. The filters apply in the order top_k, top_p, min_p, as in transformers.

    Raises:
        ValueError: if a setting is out of its range.
    """

    max_completion_length: int
    """Most tokens of one completion, the end-of-sequence token and `Prompt.start_ids` included."""
    temperature: float = 1.0
    """Logits are divided by this. 0 takes the most likely token."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches this; 1 keeps all."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this many times as likely as the most likely one; 0 keeps all."""
    stop: tuple[str, ...] = ()
    """A rollout ends when its text contains one of these; the tokens of it are kept."""
    adaptive_temperature: AdaptiveTemperature | None = None
    """The temperature of each token follows its entropy, around `temperature`. Greedy decoding is not
    changed by it. None: every token is drawn at `temperature`."""
    repetition_penalty: float = 1.0
    """Divide positive logits of tokens that the prompt or the completion has already by this, and
    multiply negative ones by it, before the temperature (Keskar et al., 2019, arXiv:1909.05858; as
    transformers' RepetitionPenaltyLogitsProcessor). 1 changes nothing. Like a filter it decides what is
    drawn; `logprob_NT` and entropies are those of the policy itself, without it."""
    record_entropy: bool = False
    """Fill in `entropy_NT`: entropies at `temperature` over the whole vocabulary, before any filter
    and before `adaptive_temperature`; at temperature 1 under greedy decoding."""

    over: IsOver | None = None
    """Ends a rollout before its end: asked of those that are still being drawn, after the numbers of
    tokens that `asked_at` says. A rollout that it ends is marked in `decided_N`, is not truncated, and
    gets no end-of-sequence token. None: every rollout is finished."""
    verdict_every: int = 8
    """Tokens between two questions to `over`; see `asked_at`."""

    def __post_init__(self) -> None:
        if self.verdict_every < 1:
            raise ValueError(f"verdict_every must be at least 1, got {self.verdict_every}")
        if self.max_completion_length < 1:
            raise ValueError(
                f"max_completion_length must be at least 1, got {self.max_completion_length}"
            )
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be finite and not below 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or positive, got {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be between 0 and 1, got {self.min_p}")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ValueError(
                f"repetition_penalty must be finite and positive, got {self.repetition_penalty}"
            )
        adaptive = self.adaptive_temperature
        if adaptive is not None and not isinstance(adaptive, AdaptiveTemperature):
            raise ValueError(
                f"adaptive_temperature must be an AdaptiveTemperature or None, got {adaptive!r}"
            )
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            raise ValueError(f"stop must be a tuple of non-empty strings, got {self.stop!r}")


Params = TypeVar("Params", contravariant=True)
Made = TypeVar("Made", bound=Rollouts, covariant=True)


class Engine(Protocol[Params, Made]):
    """Generates rollouts of one kind; `check_engine` tests an implementation against this contract.

    Engines of language models are `Engine[SamplingParams, TokenRollouts]`, those of diffusion models
    `Engine[StepPlan, DenoisingRollouts]`.
    """

    def generate(
        self,
        prompts: Sequence[Prompt],
        budget_P: Any,
        *,
        seeds_N: Any,
        params: Params,
        version: int = 0,
    ) -> Made:
        """`budget_P[p]` rollouts of prompt p, for every p.

        Args:
            prompts: at least one.
            budget_P: (P,) integers, not negative, NumPy, torch or a list. A plan whose chains branch
                asks for multiples of its leaves.
            seeds_N: (N,) int64, one per rollout, N = sum of `budget_P`, ordered by prompt then
                slot. Prompt, seed, policy and `params` determine the rollout, whatever else is
                in the call; with branches the seeds of a root determine its rollouts.
            params: how tokens, or the noise of denoising steps, are drawn. An engine refuses what it
                cannot do.
            version: optimizer steps the policy has taken; copied into the batch.

        Returns:
            N rows on the CPU, ordered as `seeds_N`, with `seed_N` and the log-probability of every
            decision.

            Of tokens, `logprob_NT` is taken at the sampling temperature *before* top_k, top_p and
            min_p, which is what a trainer recomputes; under greedy decoding it is the one at
            temperature 1. With `adaptive_temperature` it is at the temperature of the token. A trainer
            recomputes it at `temperature`, and the ratio of the two corrects for the difference.

            Of denoising steps, it is the density of the next latent, summed over its elements.
        """
        ...

    def load_weights(self, model: Any) -> None:
        """Generate with the weights of `model` from now on."""
        ...


@runtime_checkable
class Rests(Protocol):
    """What an engine has besides, if it can give memory back while the trainer updates."""

    def rest(self) -> None:
        """Generation is over until `load_weights` is called again."""
        ...


@runtime_checkable
class GeneratesTogether(Protocol):
    """What an engine has besides, if several processes share it."""

    @property
    def generates_together(self) -> bool:
        """Whether every process must call `generate`, also for no rows."""
        ...


def end_of_sequence_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end a completion: those of the model's generation config and the tokenizer's own."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if configured is None:
        configured = []
    elif isinstance(configured, int):
        configured = [configured]
    own = tokenizer.eos_token_id
    return tuple(sorted({int(i) for i in configured} | ({own} if own is not None else set())))


def num_positions(model: Any) -> int | None:
    """Most tokens that a sequence may have for `model`, prompt and completion together; None: any."""
    return position_limit(model)[0]


@runtime_checkable
class TakesStarts(Protocol):
    """What an engine has besides, if it can be given the beginning of a completion.

    The tokens of `Prompt.start_ids` stand at the end of `token_ids`, so they are prefilled with the
    prompt. What is drawn after them is all that the batch holds as completion, at most `room_of` tokens;
    `prompt_ids` holds prompt and start. A stop string ends a rollout also where it begins in the start.
    """

    @property
    def takes_starts(self) -> bool:
        """Whether it does; an engine without this draws whole completions only."""
        ...


@runtime_checkable
class TakesVerdicts(Protocol):
    """What an engine has besides, if it can end rollouts before their end.

    It asks `SamplingParams.over` after the numbers of drawn tokens that `asked_at` says, of the rollouts
    that have not ended by then, and ends those that it is answered True for. The other rollouts are as
    if `over` had always answered False.
    """

    @property
    def takes_verdicts(self) -> bool:
        """Whether it does; an engine without this finishes every rollout."""
        ...


def asked_at(most: int, every: int) -> list[int]:
    """Numbers of drawn tokens below `most` after which `SamplingParams.over` is asked.

    `every` tokens apart, and from 8 `every` tokens on an eighth of the length apart: reading texts again
    and again then costs time linear in their length, and at most an eighth of a rollout's tokens come
    after the one that decided it. (Project default, not from a paper.)
    """
    found, at = [], every
    while at < most:
        found.append(at)
        at += max(every, at // 8)
    return found


def room_of(prompts: Sequence[Prompt], params: SamplingParams) -> list[int]:
    """Most tokens that may be drawn for each prompt: what its start leaves of a completion.

    Raises:
        ValueError: if a start leaves nothing, or does not stand at the end of `token_ids`.
    """
    rooms = []
    for prompt in prompts:
        start, most = prompt.start_ids, params.max_completion_length
        if start and tuple(prompt.token_ids[-len(start) :]) != start:
            raise ValueError(f"the start of prompt {prompt.key!r} is not the end of its token_ids")
        if len(start) >= most:
            raise ValueError(
                f"the start of prompt {prompt.key!r} has {len(start)} tokens and leaves nothing of "
                f"max_completion_length={most}"
            )
        rooms.append(most - len(start))
    return rooms


_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


def requested_rows(prompts: Sequence[Prompt], budget_P: Any, seeds_N: Any) -> tuple[Tensor, Tensor]:
    """The rows a call asks for, checked: which prompt each belongs to, and its seed.

    Every engine begins with this, so that all refuse the same requests in the same words.

    Returns:
        prompt_N and seed_N, (N,) int64 on the CPU, ordered by prompt then slot.

    Raises:
        ValueError: if there is no prompt, a prompt has no tokens, or `budget_P` or `seeds_N` has
            another length, a non-integer type, or a negative budget.
    """
    if len(prompts) == 0:
        raise ValueError("generate needs at least one prompt, got none")
    for prompt in prompts:
        if len(prompt.token_ids) == 0:
            raise ValueError(f"prompt {prompt.key!r} has no tokens")
    columns = []
    for name, values in (("budget_P", budget_P), ("seeds_N", seeds_N)):
        column = torch.as_tensor(values).cpu()
        # An empty list has no integers to show its type by.
        integers = column.numel() == 0 or column.dtype in _INTEGERS
        if column.ndim != 1 or not integers:
            raise ValueError(
                f"{name} must be 1-d integers, got {column.dtype} of shape {tuple(column.shape)}"
            )
        columns.append(column.to(torch.int64))
    budget, seed_N = columns
    if len(budget) != len(prompts):
        raise ValueError(f"budget_P has {len(budget)} entries for {len(prompts)} prompts")
    if (budget < 0).any():
        raise ValueError(f"budget_P must not be negative, got {budget.tolist()}")
    if len(seed_N) != budget.sum():
        raise ValueError(
            f"seeds_N has {len(seed_N)} entries, but budget_P asks for {int(budget.sum())} rollouts"
        )
    return torch.arange(len(prompts)).repeat_interleave(budget), seed_N
