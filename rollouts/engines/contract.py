"""The engine contract: what generates rollouts, and a test of it for engines of your own.

An engine turns prompts, a budget per prompt and a seed per rollout into `TokenRollouts`. It never
decides a budget. Axes: P prompts, N rollouts, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from rollouts.batch import TokenRollouts
from rollouts.engines.adaptive_temperature import AdaptiveTemperature
from rollouts.engines.model_limits import position_limit
from rollouts.prompts import Prompt

__all__ = [
    "Engine",
    "Prompt",
    "SamplingParams",
    "check_engine",
    "end_of_sequence_ids",
    "requested_rows",
]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn. The filters apply in the order top_k, top_p, min_p, as in transformers.

    Raises:
        ValueError: if a setting is out of its range.
    """

    max_completion_length: int
    """Most tokens of one completion, the end-of-sequence token included."""
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

    def __post_init__(self) -> None:
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


class Engine(Protocol):
    """Generates rollouts. `check_engine` tests whether an implementation keeps this contract."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        budget_P: Any,
        *,
        seeds_N: Any,
        params: SamplingParams,
        version: int = 0,
    ) -> TokenRollouts:
        """`budget_P[p]` rollouts of prompt p, for every p.

        Args:
            prompts: at least one.
            budget_P: (P,) integers, not negative, NumPy, torch or a list.
            seeds_N: (N,) int64, one per rollout, N = sum of `budget_P`, ordered by prompt then
                slot. Prompt, seed, policy and `params` determine the rollout, whatever else is
                in the call.
            params: how tokens are drawn. An engine refuses what it cannot do.
            version: optimizer steps the policy has taken; copied into the batch.

        Returns:
            N rows on the CPU, ordered as `seeds_N`. `logprob_NT` is the log-probability at the
            sampling temperature *before* top_k, top_p and min_p, which is what a trainer
            recomputes; under greedy decoding it is the one at temperature 1. With
            `adaptive_temperature` it is at the temperature of the token, which a trainer, who
            recomputes at `temperature`, does not arrive at: the ratio of the two is then the
            correction for it.
        """
        ...

    def load_weights(self, model: Any) -> None:
        """Generate with the weights of `model` from now on."""
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


def check_engine(
    engine: Engine,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    *,
    logprob_tolerance: float = 1e-4,
    same_rollouts: float = 1.0,
) -> None:
    """Test that an engine keeps the contract of `Engine`. Run it once on an engine of your own.

    It draws a few uneven batches (a budget of zero among them), the same rollouts again in other
    company, and a few hundred one-token completions whose frequencies it holds against their
    log-probabilities: an engine that reports those of another temperature does not pass.

    Example::

        check_engine(MyEngine(model), prompts[:3], SamplingParams(max_completion_length=16))

    Args:
        engine: the engine.
        prompts: at least two, of different tokens and better of different lengths.
        params: how to draw. Test with the settings you train with, and once without filters (top_k,
            top_p, min_p), since only then can frequencies be checked.
        logprob_tolerance: largest difference between the log-probabilities of one rollout drawn
            in two batches. The default suits float32; low precision needs 1e-2 to 1e-1.
        same_rollouts: share of repeated rollouts that must come out token for token the same. In
            low precision the company of a rollout moves its logits enough to flip a token now
            and then, so 1 is for float32.

    Raises:
        AssertionError: if the engine breaks the contract; the message says which part.
        ValueError: if the prompts cannot put it to the test.
    """
    if len({tuple(prompt.token_ids) for prompt in prompts}) < 2:
        raise ValueError(
            f"check_engine needs at least 2 prompts of different tokens, got {len(prompts)} prompts"
        )

    def drawn(
        some: Sequence[Prompt],
        budget: list[int],
        seeds: list[int],
        version: int = 0,
        **changes: Any,
    ) -> TokenRollouts:
        settings = replace(params, **changes)
        rollouts = engine.generate(
            some,
            torch.tensor(budget),
            seeds_N=torch.tensor(seeds, dtype=torch.int64),
            params=settings,
            version=version,
        )
        _check_batch(rollouts, some, budget, seeds, settings, version)
        return rollouts

    # Uneven budgets, and large, unordered seeds.
    budget = [1 + 2 * (p % 2) for p in range(len(prompts))]
    seeds = [(2**61 - 1) * (i + 3) % (2**63 - 25) for i in range(sum(budget))]
    batch = drawn(prompts, budget, seeds, version=7)

    # The same rollouts in other company: backwards, without the first prompt, beside one more.
    slots = list(torch.tensor(seeds).split(budget))
    again_budget = [n + 1 for n in budget[:0:-1]] + [0]
    again_seeds = [s for slot in slots[:0:-1] for s in (*slot.tolist(), 5)]
    again = drawn(prompts[::-1], again_budget, again_seeds)
    _check_same_rollouts(batch, again, logprob_tolerance, same_rollouts)
    # And each prompt's first rollout alone.
    for prompt, slot in zip(prompts, slots, strict=True):
        alone = drawn([prompt], [1], [int(slot[0])])
        _check_same_rollouts(batch, alone, logprob_tolerance, same_rollouts)

    num_draws = 512
    many = drawn(prompts[:1], [num_draws], list(range(num_draws)), max_completion_length=1)
    _check_first_tokens(many, params, logprob_tolerance)

    nothing = drawn(prompts, [0] * len(prompts), [])
    _require(len(nothing) == 0, "a request for no rollouts must return a batch without rows")


def _require(condition: bool | Tensor, message: str) -> None:
    # Not `assert`, which `python -O` removes.
    if not condition:
        raise AssertionError(message)


def _check_batch(
    rollouts: TokenRollouts,
    prompts: Sequence[Prompt],
    budget: list[int],
    seeds: list[int],
    params: SamplingParams,
    version: int,
) -> None:
    """What holds for one batch, whatever was drawn."""
    _require(
        isinstance(rollouts, TokenRollouts),
        f"generate must return TokenRollouts, got {type(rollouts).__name__}",
    )
    _require(
        len(rollouts) == sum(budget),
        f"budgets {budget} ask for {sum(budget)} rollouts, generate returned {len(rollouts)}",
    )
    expected = torch.arange(len(prompts)).repeat_interleave(torch.tensor(budget)).tolist()
    _require(
        rollouts.prompt_N.tolist() == expected,
        f"rows must be ordered by prompt with budget_P[p] rows of prompt p: for budgets {budget} "
        f"prompt_N must be {expected}, got {rollouts.prompt_N.tolist()}",
    )
    _require(
        rollouts.seed_N.tolist() == seeds,
        f"seed_N must be the seeds asked for, in order, {seeds[:4]}..., "
        f"got {rollouts.seed_N.tolist()[:4]}...",
    )
    _require(
        rollouts.version == version,
        f"version must be passed through: asked with {version}, got {rollouts.version}",
    )
    _require(
        rollouts.prompt_ids == tuple(tuple(prompt.token_ids) for prompt in prompts),
        "prompt_ids must hold the token ids of the prompts asked for, in order",
    )
    # Tokens that others wrote (tool output) may lie inside a row: the mask is False there.
    mask_NT, length_N = rollouts.mask_NT, rollouts.length_N
    limit = params.max_completion_length
    _require(
        mask_NT[:, :1].all(),
        "mask_NT must be True from the first token of a completion to its last, but where others "
        f"wrote (tool output): rows {(~mask_NT[:, :1]).any(1).nonzero().flatten().tolist()} begin "
        "with a token that is not the policy's",
    )
    _require(
        (length_N >= 1).all() and (length_N <= limit).all(),
        f"completions must have 1 to max_completion_length={limit} tokens, "
        f"got lengths {length_N.tolist()}",
    )
    # Engines may count what others wrote towards the limit.
    end_N = (mask_NT * torch.arange(1, mask_NT.shape[1] + 1)).amax(1) if len(rollouts) else length_N
    _require(
        (end_N[rollouts.truncated_N] >= limit).all(),
        f"truncated_N marks rollouts that the length limit of {limit} ended, but it is True for "
        f"rollouts of lengths {end_N[rollouts.truncated_N].tolist()}",
    )
    logprob_NT = rollouts.logprob_NT
    _require(
        logprob_NT.isfinite().all(),
        "logprob_NT must be finite",
    )
    _require(
        not logprob_NT[~mask_NT].any(),
        "logprob_NT must be exactly 0 wherever mask_NT is False",
    )
    entropy_NT = rollouts.entropy_NT
    _require(
        (entropy_NT is not None) == params.record_entropy,
        f"entropy_NT must be set if and only if record_entropy is, which is "
        f"{params.record_entropy}",
    )
    if entropy_NT is not None:
        _require(
            entropy_NT.isfinite().all() and (entropy_NT >= -1e-5).all(),
            "entropy_NT must be finite and not negative",
        )
        _require(
            not entropy_NT[~mask_NT].any(),
            "entropy_NT must be exactly 0 wherever mask_NT is False",
        )
    # A certain token has log-probability 0, up to rounding.
    _require(
        (logprob_NT <= 1e-5).all(),
        f"log-probabilities must not be above 0, got {logprob_NT.max() if len(rollouts) else 0}",
    )


def _check_same_rollouts(
    batch: TokenRollouts, again: TokenRollouts, tolerance: float, share: float
) -> None:
    """Rollouts of `again` with the prompt and seed of one of `batch` are that one."""
    row_by_origin = {_origin(batch, row): row for row in range(len(batch))}
    pairs = [(row_by_origin.get(_origin(again, row)), row) for row in range(len(again))]
    num_pairs, num_same, worst = 0, 0, 0.0
    for first, second in pairs:
        if first is None:
            continue
        num_pairs += 1
        one, two = batch.mask_NT[first], again.mask_NT[second]
        if not torch.equal(batch.token_NT[first][one], again.token_NT[second][two]):
            continue
        num_same += 1
        difference = batch.logprob_NT[first][one] - again.logprob_NT[second][two]
        worst = max(worst, float(difference.abs().max()))
        _require(
            batch.truncated_N[first] == again.truncated_N[second],
            "the same rollout is truncated in one batch and not in another",
        )
    assert num_pairs, "the second batch repeats no rollout of the first"
    _require(
        num_same >= share * num_pairs,
        f"prompt and seed must determine a rollout, whatever is generated beside it: of "
        f"{num_pairs} rollouts drawn again in other company, {num_same} came out the same",
    )
    _require(
        worst <= tolerance,
        f"a rollout's log-probabilities must not depend on what is generated beside it: they "
        f"differ by up to {worst:.2g}, above logprob_tolerance={tolerance}",
    )


def _origin(rollouts: TokenRollouts, row: int) -> tuple[tuple[int, ...], int]:
    return rollouts.prompt_ids[int(rollouts.prompt_N[row])], int(rollouts.seed_N[row])


def _check_first_tokens(many: TokenRollouts, params: SamplingParams, tolerance: float) -> None:
    """One-token completions of one prompt share a context, so p and frequency must agree."""
    num_draws = len(many)
    tokens, index_N, count = many.token_NT[:, 0].unique(return_inverse=True, return_counts=True)
    logprob_N = many.logprob_NT[:, 0].double()
    if params.temperature == 0:
        _require(
            len(tokens) == 1,
            f"temperature 0 must always draw the same token, got {tokens.tolist()} for one prompt",
        )
        return

    mean = torch.zeros(len(tokens), dtype=torch.float64).index_add(0, index_N, logprob_N) / count
    spread = float((logprob_N - mean[index_N]).abs().max())
    _require(
        spread <= tolerance,
        f"the same token after the same prompt must have the same log-probability; "
        f"it differs by up to {spread:.2g}, above logprob_tolerance={tolerance}",
    )
    probability = mean.exp()
    if many.entropy_NT is not None:
        _check_first_entropies(many.entropy_NT[:, 0], probability, params, tolerance)
    _require(
        probability.sum() <= 1 + len(tokens) * tolerance,
        f"the probabilities of the different first tokens of one prompt add up to "
        f"{float(probability.sum()):.4g}, above 1",
    )
    filtered = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
    filtered = filtered or params.repetition_penalty != 1
    if len(tokens) == 1 and not filtered:
        # How surprising that all draws agree, if each were a draw of its own.
        chance = math.exp((num_draws - 1) * float(mean[0]))
        _require(
            chance > 1e-9,
            f"different seeds must give different rollouts: {num_draws} seeds all drew token "
            f"{int(tokens[0])}, whose probability is {float(probability[0]):.4g}",
        )
        raise ValueError(
            f"the first prompt is followed by one token almost surely (probability "
            f"{float(probability[0]):.6g}), which tests no seed; put another prompt first"
        )
    if filtered:
        return
    # Six standard errors of a binomial count: a correct engine fails about 2e-9 per token.
    error = (num_draws * probability * (1 - probability)).clamp(min=1).sqrt()
    excess = (count - num_draws * probability).abs() / error
    likely = num_draws * probability >= 5
    _require(
        not (excess[likely] > 6).any(),
        f"tokens are not drawn as often as their log-probabilities say: of {num_draws} draws, "
        f"tokens {tokens[likely][excess[likely] > 6].tolist()} came "
        f"{count[likely][excess[likely] > 6].tolist()} times instead of "
        f"{[round(float(x), 1) for x in (num_draws * probability)[likely][excess[likely] > 6]]}",
    )


def _check_first_entropies(
    entropy_N: Tensor, probability: Tensor, params: SamplingParams, tolerance: float
) -> None:
    """Entropies of one context agree, and are not below what the tokens that were seen give."""
    spread = float(entropy_N.max() - entropy_N.min())
    _require(
        spread <= tolerance,
        f"the same prompt must have the same entropy; it differs by up to {spread:.2g}, above "
        f"logprob_tolerance={tolerance}",
    )
    if params.adaptive_temperature is not None:
        return  # probabilities and entropies are of different temperatures
    # No token adds less than 0, so those that were never drawn only add to this.
    least = float(torch.special.entr(probability.clamp(max=1)).sum())
    slack = tolerance * (1 + len(probability))
    _require(
        float(entropy_N.max()) >= least - slack,
        f"entropy_NT must be over the whole vocabulary at `temperature`, before any filter: it is "
        f"{float(entropy_N.max()):.4g} where the tokens seen add up to {least:.4g}",
    )
