"""Generate with any causal language model of transformers, sharing its weights with the trainer.

Three things make it faster than `model.generate`: a prompt is prefilled once and its key-value
cache shared by its rollouts, finished rollouts leave the batch, and the cache grows in
blocks instead of being copied for every token.

Axes: P prompts, N rollouts, T tokens, V vocabulary; R rollouts of one generation batch (what is
generated together), K rollouts of it that still go on, L positions, prompt included.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import (
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from rollouts.batch import TokenRollouts
from rollouts.engines.adaptive_temperature import entropy
from rollouts.engines.contract import (
    SamplingParams,
    asked_at,
    end_of_sequence_ids,
    requested_rows,
    room_of,
)
from rollouts.engines.drawing import at_temperature, draw, mix64, uniform
from rollouts.engines.model_limits import check_prompts, ids_of, refuse_virtual_tokens
from rollouts.engines.probes import distance, plain_logits, rows_of, spread_of, tolerance
from rollouts.prompts import Prompt

COMPACT_BELOW = 0.875
"""Finished rollouts leave the batch once the running ones are at most this share of it. Leaving
copies the cache of the rest; shares of a geometric series keep all copies together below eight
times one copy."""


class TransformersEngine:
    """Generates with a model of transformers, at most `max_batch_rows` rollouts at a time.

    Rollouts are drawn by inverse CDF in float64 from uniforms that are a function of (seed,
    position in the completion), so a rollout is the same whatever is generated beside it, up to
    the float error of the forward pass: a draw that falls within ~1e-6 of a boundary between two
    tokens (float32; ~1e-2 in bfloat16) may go either way.

    A completion ends with an end-of-sequence id of the model's generation config or of the
    tokenizer, with a stop string, or with the length limit. Other settings of the generation config
    (penalties, suppressed tokens, temperature) are ignored: `SamplingParams` says it all.

    Models whose cache cannot be shared between rollouts run a full forward pass per token instead,
    right-padded. That needs nothing from the model but causality, keeps the seeds' promise, which
    `model.generate` would not, and costs time quadratic in length; a warning says so once. Which models
    those are is found out by trying: see `check_model`.

    Ids that the tokenizer has no token for, which models with a padded vocabulary have, are never
    drawn. That is a filter like top_k: log-probabilities are recorded before it.

    Args:
        model: a decoder-only model on its device, not wrapped for distribution. LoRA is fine.
        tokenizer: for its pad and end-of-sequence ids, and to find stop strings.
        max_batch_rows: rollouts generated together. Changes time and memory, never the rollouts.

    Raises:
        ValueError: if the model is an encoder-decoder or has virtual tokens (prompt tuning), the
            tokenizer has no pad token, or `max_batch_rows` is below 1.
    """

    takes_starts = True
    takes_verdicts = True

    def __init__(self, model: Any, tokenizer: Any, *, max_batch_rows: int = 256) -> None:
        if max_batch_rows < 1:
            raise ValueError(f"max_batch_rows must be at least 1, got {max_batch_rows}")
        if tokenizer.pad_token_id is None:
            raise ValueError(
                "the tokenizer has no pad token; set tokenizer.pad_token, for example to "
                "tokenizer.eos_token"
            )
        self.tokenizer = tokenizer
        self.max_batch_rows = max_batch_rows
        self.model: Any = None
        self.known_ids = ids_of(tokenizer)
        self.load_weights(model)

    def load_weights(self, model: Any) -> None:
        """Generate with `model` from now on. A no-op for the model the engine already runs."""
        if model is self.model:
            return
        if model.config.is_encoder_decoder:
            raise ValueError(
                f"{type(model).__name__} is an encoder-decoder; TransformersEngine runs "
                f"decoder-only language models"
            )
        refuse_virtual_tokens(model)
        self.model = model
        self.shares_prefill = _can_share_prefill(model)
        self._is_checked = False

    def check_model(self) -> None:
        """Choose how the model is run: the fast way if that gives what a plain forward pass gives.

        Some models ignore the attention mask, keep state where this file cannot copy it, or take no
        cache of transformers. So a few random tokens are run both ways, with prompts of two lengths that
        fork and a rollout that leaves: some 15 forward passes of at most 15 tokens. What differs, or
        fails, falls back to a full forward pass per token, with a warning, if that is right; a
        difference is one of `distance` above `tolerance`. `generate` does this once for each model.

        Raises:
            ValueError: if neither way agrees with a plain forward pass over each sequence by itself,
                because what a token's probability is then depends on what comes after it or beside it.
        """
        if self._is_checked:
            return
        with torch.no_grad(), _eval_mode(self.model):
            why = _disagreement(self.model, self.known_ids, shared=self.shares_prefill)
            if why is not None and self.shares_prefill:
                self.shares_prefill = False
                reason = f"gives other probabilities with a cache than without ({why})"
                why = _disagreement(self.model, self.known_ids, shared=False)
            else:
                reason = "keeps no cache that rollouts can share"
        name = type(_language_model(self.model)).__name__
        if why is not None:
            raise ValueError(
                f"{name} cannot generate rollouts here: the probabilities of a sequence change with "
                f"what is padded to its right or runs beside it ({why}). A policy has to be causal and "
                "each row by itself; bidirectional attention and experts of limited capacity are not"
            )
        if not self.shares_prefill:
            warnings.warn(
                f"{name} {reason}: every token costs a full forward pass, which is slow for long "
                "completions",
                stacklevel=3,
            )
        self._is_checked = True

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a completion: those of the generation config and the tokenizer's own."""
        return end_of_sequence_ids(self.model, self.tokenizer)

    def generate(
        self,
        prompts: Sequence[Prompt],
        budget_P: Any,
        *,
        seeds_N: Any,
        params: SamplingParams,
        version: int = 0,
    ) -> TokenRollouts:
        """`budget_P[p]` rollouts of prompt p; see `Engine.generate`.

        The model is in eval mode meanwhile and every module is put back as it was. T is the longest
        completion of the batch, 0 when nothing was asked for.

        Raises:
            ValueError: if the request is malformed, or `check_prompts` refuses a prompt or
                `check_model` the model. Nothing has been generated then.
            FloatingPointError: if the model gives a rollout a log-probability that is not finite;
                the prompt's key is named.
        """
        prompt_N, seed_N = requested_rows(prompts, budget_P, seeds_N)
        asked_for = [prompts[p] for p in prompt_N.unique()]
        check_prompts(self.model, asked_for, max_completion_length=params.max_completion_length)
        room_of(asked_for, params)
        self.check_model()

        # Neighbours in length share a batch, so that little of its cache is padding.
        size_P = torch.tensor([len(prompt.token_ids) for prompt in prompts])
        order_N = size_P[prompt_N].argsort(descending=True, stable=True)
        token_NT = torch.full(
            (len(seed_N), params.max_completion_length), self.tokenizer.pad_token_id
        )
        logprob_NT = torch.zeros(token_NT.shape)
        entropy_NT = torch.zeros(token_NT.shape) if params.record_entropy else None
        length_N = torch.zeros(len(seed_N), dtype=torch.int64)
        truncated_N = torch.zeros(len(seed_N), dtype=torch.bool)
        decided_N = torch.zeros(len(seed_N), dtype=torch.bool)
        with torch.no_grad(), _eval_mode(self.model):
            for row_R in order_N.split(self.max_batch_rows):
                if len(row_R) == 0:
                    continue
                made = self._generate_batch(
                    [prompts[p] for p in prompt_N[row_R]], seed_N[row_R], params
                )
                token_NT[row_R], logprob_NT[row_R], length_N[row_R], truncated_N[row_R] = made[:4]
                decided_N[row_R] = made[4]
                if entropy_NT is not None:
                    entropy_NT[row_R] = made[5]

        num_steps = int(length_N.max()) if len(length_N) else 0
        return TokenRollouts(
            prompt_N=prompt_N,
            mask_NT=torch.arange(num_steps) < length_N[:, None],
            logprob_NT=logprob_NT[:, :num_steps].clone(),
            version=version,
            token_NT=token_NT[:, :num_steps].clone(),
            truncated_N=truncated_N,
            seed_N=seed_N,
            prompt_ids=tuple(tuple(prompt.token_ids) for prompt in prompts),
            decided_N=None if params.over is None else decided_N,
            entropy_NT=None if entropy_NT is None else entropy_NT[:, :num_steps].clone(),
        )

    def _generate_batch(
        self, prompt_R: Sequence[Prompt], seed_R: Tensor, params: SamplingParams
    ) -> tuple[Tensor, ...]:
        """Generate these together: (R, T) tokens and log-probs, (R,) lengths, truncated and decided,
        and with `record_entropy` (R, T) entropies."""
        model, device = self.model, self.model.device
        forward: _Forward
        forward = (_SharedForward if self.shares_prefill else _PlainForward)(model, prompt_R)
        eos = torch.tensor(self.eos_token_ids, dtype=torch.int64, device=device)
        known_V = _known(self.known_ids, eos.tolist(), forward.logits_KV)
        starts = [prompt.start_ids for prompt in prompt_R]
        stops = _StopStrings(self.tokenizer, params.stop, starts) if params.stop else None
        key_K = mix64(seed_R.to(device))

        shape = (len(prompt_R), params.max_completion_length)
        padding = self.tokenizer.pad_token_id
        fed = padding if padding < forward.logits_KV.shape[1] else 0  # which may have no embedding
        token_RT = torch.full(shape, padding, device=device)
        logprob_RT = torch.zeros(shape, device=device)
        entropy_RT = torch.zeros(shape, device=device) if params.record_entropy else None
        length_R = torch.zeros(shape[0], dtype=torch.int64, device=device)

        seen_KV = _seen(prompt_R, forward.logits_KV) if params.repetition_penalty != 1 else None
        row_K = torch.arange(shape[0], device=device)
        running_K = torch.ones(shape[0], dtype=torch.bool, device=device)
        truncated_R = torch.zeros(shape[0], dtype=torch.bool, device=device)
        rooms = room_of(prompt_R, params)
        room_K, least, most = torch.tensor(rooms, device=device), min(rooms), max(rooms)
        decided_R = torch.zeros_like(truncated_R)
        questions = set() if params.over is None else set(asked_at(most, params.verdict_every))
        for t in range(most):
            uniform_K = uniform(key_K, t)
            token_K, logprob_K = draw(forward.logits_KV, uniform_K, params, seen_KV, known_V)
            # Finished rollouts that have not left yet keep their padding.
            token_K = token_K.where(running_K, padding)
            token_RT[row_K, t] = token_K
            logprob_RT[row_K, t] = logprob_K.where(running_K, 0.0)
            if entropy_RT is not None:
                entropy_K = entropy(at_temperature(forward.logits_KV, params))
                entropy_RT[row_K, t] = entropy_K.where(running_K, 0.0)
            length_R[row_K] += running_K

            running_K = running_K & ~torch.isin(token_K, eos)
            if stops is not None:
                running_K = running_K & ~stops.found(token_RT, row_K, running_K, t)
            if t + 1 >= least:
                full_K = running_K & (room_K <= t + 1)
                truncated_R[row_K] |= full_K
                running_K = running_K & ~full_K
            if t + 1 in questions:
                over_K = _over(params, prompt_R, token_RT, row_K, running_K, t)
                decided_R[row_K] |= over_K
                running_K = running_K & ~over_K
            num_running = 0 if t + 1 == most else int(running_K.sum())
            if num_running == 0:
                break
            if num_running <= COMPACT_BELOW * len(row_K):
                kept_K = running_K.nonzero().flatten()
                forward.keep(kept_K)
                row_K, key_K, token_K = row_K[kept_K], key_K[kept_K], token_K[kept_K]
                room_K = room_K[kept_K]
                running_K = running_K[kept_K]
                seen_KV = None if seen_KV is None else seen_KV[kept_K]
            token_K = token_K.where(running_K, fed)
            if seen_KV is not None:
                seen_KV.scatter_(1, token_K[:, None], True)
            forward.append(token_K)

        bad_R = (~logprob_RT.isfinite()).any(dim=1).nonzero().flatten().tolist()
        if bad_R:
            raise FloatingPointError(
                f"the model's log-probabilities are not finite for {len(bad_R)} of {shape[0]} "
                f"rollouts, first for prompt {prompt_R[bad_R[0]].key!r}"
            )
        columns = [token_RT, logprob_RT, length_R, truncated_R, decided_R]
        columns += [] if entropy_RT is None else [entropy_RT]
        return tuple(column.cpu() for column in columns)


def _over(
    params: SamplingParams,
    prompt_R: Sequence[Prompt],
    token_RT: Tensor,
    row_K: Tensor,
    running_K: Tensor,
    step: int,
) -> Tensor:
    """(K,) bool: running rollouts, whose newest token is at `step`, that a verdict ends."""
    over_K = torch.zeros_like(running_K)
    position = running_K.nonzero().flatten()
    if params.over is None or len(position) == 0:
        return over_K
    row = row_K[position]
    asked = [prompt_R[r] for r in row.tolist()]
    drawn = token_RT[row, : step + 1].tolist()
    ids = [[*prompt.start_ids, *tokens] for prompt, tokens in zip(asked, drawn, strict=True)]
    over_K[position] = torch.tensor(list(params.over(asked, ids)), device=over_K.device)
    return over_K


def _seen(prompt_R: Sequence[Prompt], logits_RV: Tensor) -> Tensor:
    """(R, V) bool: the tokens of each rollout's prompt, for the repetition penalty."""
    seen_RV = torch.zeros_like(logits_RV, dtype=torch.bool)
    for row, prompt in enumerate(prompt_R):
        seen_RV[row, torch.tensor(prompt.token_ids, device=seen_RV.device)] = True
    return seen_RV


class _StopStrings:
    """Finds stop strings in the text of completions, decoding only their tails."""

    def __init__(
        self, tokenizer: Any, stop: Sequence[str], start_R: Sequence[Sequence[int]] = ()
    ) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        # A token stands for at least one byte, so a string that ends with the newest token starts
        # at most this many back. A few more, because decoders drop a leading space and because a
        # character may start in the token before.
        self.num_tokens = max(len(s.encode()) for s in stop) + 4
        self.start_R = [list(start[-self.num_tokens :]) for start in start_R]

    def found(self, token_RT: Tensor, row_K: Tensor, running_K: Tensor, step: int) -> Tensor:
        """(K,) bool: running rollouts whose newest token, at `step`, completes a stop string."""
        found_K = torch.zeros_like(running_K)
        position = running_K.nonzero().flatten()
        if len(position) == 0:
            return found_K
        start = max(0, step + 1 - self.num_tokens)
        row = row_K[position]
        tails = token_RT[row, start : step + 1].tolist()
        if step + 1 < self.num_tokens and any(self.start_R):  # a stop string may begin in a start
            pairs = zip(row.tolist(), tails, strict=True)
            tails = [(self.start_R[r] + tail)[-self.num_tokens :] for r, tail in pairs]
        texts = self.tokenizer.batch_decode(
            tails, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        hits = [any(s in text for s in self.stop) for text in texts]
        found_K[position] = torch.tensor(hits, device=found_K.device)
        return found_K


# Running the model


class _Forward(Protocol):
    """A batch of growing sequences: the next-token logits of each, kept up to date."""

    logits_KV: Tensor

    def append(self, token_K: Tensor) -> None:
        """Add one token to every sequence."""

    def keep(self, index_K: Tensor) -> None:
        """Drop all sequences but these. `logits_KV` is out of date until the next `append`."""


class _SharedForward:
    """Prefills each distinct prompt once, left-padded, and gives every rollout a copy of its cache.

    Within a batch, that is: a prompt whose rollouts span two batches is prefilled in both.
    """

    def __init__(self, model: Any, prompt_R: Sequence[Prompt], *, padding: int = 0) -> None:
        self.model = model
        accepted = _forward_parameters(model)
        self.takes_positions = "position_ids" in accepted
        index_by_ids: dict[tuple[int, ...], int] = {}
        prompt_index_R = torch.tensor(
            [index_by_ids.setdefault(tuple(p.token_ids), len(index_by_ids)) for p in prompt_R],
            device=model.device,
        )
        ids_PL, mask_PL = _padded(
            list(index_by_ids), device=model.device, left=True, padding=padding
        )
        size_P = mask_PL.sum(dim=1)
        self.cache = _growing_cache(model)
        kwargs = self._positions((mask_PL.cumsum(dim=1) - 1).clamp(min=0))
        if "logits_to_keep" in accepted:
            kwargs["logits_to_keep"] = 1
        self.logits_KV = self._run(ids_PL, mask_PL, kwargs)[prompt_index_R]
        # Selects and repeats alike: any list of rows, of any length.
        self.cache.reorder_cache(prompt_index_R)
        self.mask_KL = mask_PL[prompt_index_R]
        self.size_K = size_P[prompt_index_R]

    def append(self, token_K: Tensor) -> None:
        self.mask_KL = torch.cat([self.mask_KL, self.mask_KL.new_ones(len(token_K), 1)], dim=1)
        kwargs = self._positions(self.size_K[:, None])
        self.logits_KV = self._run(token_K[:, None], self.mask_KL, kwargs)
        self.size_K = self.size_K + 1

    def keep(self, index_K: Tensor) -> None:
        self.cache.reorder_cache(index_K)
        self.mask_KL, self.size_K = self.mask_KL[index_K], self.size_K[index_K]

    def _positions(self, position_KL: Tensor) -> dict[str, Any]:
        return {"position_ids": position_KL} if self.takes_positions else {}

    def _run(self, ids_KL: Tensor, mask_KL: Tensor, kwargs: dict[str, Any]) -> Tensor:
        output = self.model(
            input_ids=ids_KL,
            attention_mask=mask_KL,
            past_key_values=self.cache,
            use_cache=True,
            **kwargs,
        )
        return output.logits[:, -1]


class _PlainForward:
    """A full forward pass per token, for models whose cache cannot be shared.

    Padding is on the right, where a causal model cannot see it, so no mask is needed.
    """

    def __init__(self, model: Any, prompt_R: Sequence[Prompt], *, padding: int = 0) -> None:
        self.model = model
        self.padding = padding
        ids = [tuple(prompt.token_ids) for prompt in prompt_R]
        self.ids_KL, mask_KL = _padded(ids, device=model.device, left=False, padding=padding)
        self.size_K = mask_KL.sum(dim=1)
        self.logits_KV = self._run()

    def append(self, token_K: Tensor) -> None:
        if int(self.size_K.max()) == self.ids_KL.shape[1]:
            self.ids_KL = torch.nn.functional.pad(self.ids_KL, (0, 1), value=self.padding)
        self.ids_KL = self.ids_KL.scatter(1, self.size_K[:, None], token_K[:, None])
        self.size_K = self.size_K + 1
        self.logits_KV = self._run()

    def keep(self, index_K: Tensor) -> None:
        self.size_K = self.size_K[index_K]
        self.ids_KL = self.ids_KL[index_K, : int(self.size_K.max())]

    def _run(self) -> Tensor:
        logits_KLV = self.model(input_ids=self.ids_KL, use_cache=False).logits
        return logits_KLV[torch.arange(len(logits_KLV), device=logits_KLV.device), self.size_K - 1]


class _GrowingLayer(DynamicLayer):
    """A cache layer that keeps room for tokens to come.

    `DynamicLayer` copies the whole cache for each token. Here keys and values are views into
    buffers half as long again as they were when last filled, so a token costs one column.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffers = [key_states[:, :, :0], value_states[:, :, :0]]
            self.length = 0
        end = self.length + key_states.shape[2]
        if end > self.buffers[0].shape[2]:
            self.buffers = [self._grown(buffer, end) for buffer in self.buffers]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.length : end] = states
        self.length = end
        return self._view()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized:
            index = beam_idx.to(self.device)
            self.buffers = [buffer.index_select(0, index) for buffer in self.buffers]
            self._view()

    def _grown(self, buffer: Tensor, end: int) -> Tensor:
        rows, heads, _, width = buffer.shape
        grown = buffer.new_empty(rows, heads, end + max(32, end // 2), width)
        grown[:, :, : self.length] = buffer[:, :, : self.length]
        return grown

    def _view(self) -> tuple[Tensor, Tensor]:
        keys, values = (buffer[:, :, : self.length] for buffer in self.buffers)
        self.keys, self.values = keys, values
        return keys, values


_SHAREABLE_LAYERS = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    DummyLayer,
)


def _can_share_prefill(model: Any) -> bool:
    """Whether the model takes a cache whose every layer is of a kind this file can copy by row."""
    if not {"past_key_values", "attention_mask"} <= set(_forward_parameters(model)):
        return False
    try:
        layers = DynamicCache(config=model.config).layers
    except Exception:  # configurations of layers that transformers has no cache for
        return False
    return all(type(layer) in _SHAREABLE_LAYERS for layer in layers)


def _growing_cache(model: Any) -> Any:
    cache = DynamicCache(config=model.config)
    cache.layers = [
        _GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


def _forward_parameters(model: Any) -> Sequence[str]:
    """Names of the arguments of `forward`; those of the model inside, for a PEFT wrapper."""
    return list(inspect.signature(_language_model(model).forward).parameters)


def _language_model(model: Any) -> Any:
    """The model inside a PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _known(
    known_ids: Collection[int] | None, eos: Sequence[int], logits_KV: Tensor
) -> Tensor | None:
    """(V,) bool: ids with a token, and ends; None if all are or the tokenizer cannot say."""
    num_ids = logits_KV.shape[-1]
    if known_ids is None or all(i in known_ids for i in range(num_ids)):
        return None
    known_V = torch.zeros(num_ids, dtype=torch.bool)
    known_V[[i for i in {*known_ids, *eos} if i < num_ids]] = True
    return known_V.to(logits_KV.device)


def _disagreement(model: Any, known_ids: Collection[int] | None, *, shared: bool) -> str | None:
    """How a way of generating differs from a plain forward pass on the rows of `probes`; None: not."""
    rows = rows_of(model, known_ids)
    if not rows:
        return None
    plain = plain_logits(model, rows)
    if any(logits.isnan().any() for logits in plain):
        return None  # for `generate` to tell, of the prompts it is asked for
    try:
        found = _stepwise_logits(model, rows, shared=shared)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model says to a cache that is not its own
        if not shared:
            raise
        return f"{type(error).__name__}: {str(error)[:200]}"
    pairs = [(plain[row][: len(logits)], logits) for row, logits in enumerate(found)]
    one = torch.cat([logits for logits, _ in pairs]).log_softmax(dim=-1)
    other = torch.cat([logits for _, logits in pairs]).log_softmax(dim=-1)
    off = distance(one, other, spread_of(plain))
    if off <= tolerance(model):
        return None
    return f"off by {off:.2g} of the spread of its log-probabilities"


def _stepwise_logits(
    model: Any, rows: Sequence[tuple[Tensor, Tensor]], *, shared: bool
) -> list[Tensor]:
    """(L, V) logits that predict each row's completion, token by token; the second leaves midway."""
    prompts = [Prompt(key="", prompt="", token_ids=tuple(p.tolist()), columns={}) for p, _ in rows]
    # An ordinary token as padding: the embedding of id 0 is often 0, and hides what the model sees.
    padding = int(rows[0][0][0])
    kind: type[_SharedForward] | type[_PlainForward] = _SharedForward if shared else _PlainForward
    forward: _Forward = kind(model, prompts, padding=padding)
    token_RL = torch.stack([completion for _, completion in rows]).to(model.device)
    row_K = torch.arange(len(rows), device=model.device)
    found: list[list[Tensor]] = [[] for _ in rows]
    for step in range(token_RL.shape[1]):
        for place, row in enumerate(row_K.tolist()):
            found[row].append(forward.logits_KV[place].float())
        if step + 1 == token_RL.shape[1]:
            break
        if step == token_RL.shape[1] // 2:
            forward.keep(torch.tensor([0, *range(2, len(rows))], device=model.device))
            row_K = row_K[row_K != 1]
        forward.append(token_RL[row_K, step])
    return [torch.stack(of_row) for of_row in found]


def _padded(
    sequences: Sequence[Sequence[int]], *, device: torch.device, left: bool, padding: int
) -> tuple[Tensor, Tensor]:
    """(P, L) ids padded on one side, and the int64 mask of what is real."""
    longest = max(len(ids) for ids in sequences)
    ids_PL = torch.full((len(sequences), longest), padding, dtype=torch.int64)
    mask_PL = torch.zeros_like(ids_PL)
    for row, ids in enumerate(sequences):
        place = slice(longest - len(ids), None) if left else slice(0, len(ids))
        ids_PL[row, place] = torch.tensor(ids)
        mask_PL[row, place] = 1
    return ids_PL.to(device), mask_PL.to(device)


@contextmanager
def _eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode, after which each module gets back its own mode (some may be frozen in eval)."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in was_training:
            module.training = True
