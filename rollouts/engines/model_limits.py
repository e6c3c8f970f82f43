"""Refuse, before anything is generated, what a language model of transformers cannot do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rollouts.prompts import Prompt


def check_prompts(model: Any, prompts: Sequence[Prompt], *, max_completion_length: int) -> None:
    """Refuse prompts that the model has no positions or no embeddings for.

    Raises:
        ValueError: if a prompt and `max_completion_length` more tokens do not fit `position_limit`, or
            a prompt holds an id that the model has no embedding for. The key is named.
    """
    limit, what = position_limit(model)
    num_ids = num_embeddings(model)
    for prompt in prompts:
        length = len(prompt.token_ids) - len(prompt.start_ids)  # a start is of the completion
        if limit is not None and length + max_completion_length > limit:
            raise ValueError(
                f"prompt {prompt.key!r} has {length} tokens; with "
                f"max_completion_length={max_completion_length} it does not fit {what}"
            )
        if num_ids is not None and max(prompt.token_ids) >= num_ids:
            raise ValueError(
                f"prompt {prompt.key!r} holds token id {max(prompt.token_ids)}, but the model has "
                f"{num_ids} embeddings: the tokenizer is another model's, or was given tokens after it; "
                "call model.resize_token_embeddings(len(tokenizer))"
            )


def position_limit(model: Any) -> tuple[int | None, str]:
    """Most tokens of prompt and completion together, and what says so; None where nothing does.

    A model says it in its config: `max_position_embeddings`, or `max_seq_len` (MPT). Models with rotary
    positions could run on beyond, into what they were never trained on. Those of the kind "longrope"
    have two sets of frequencies and change, for all tokens at once, where the longest row of a batch
    passes `original_max_position_embeddings`: tokens drawn before that would be trained on under
    another policy than drew them, so that is a limit too.
    """
    config: Any = getattr(model, "config", None)
    limit = None
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "max_seq_len"):
        value = getattr(config, name, None)
        if limit is None and isinstance(value, int) and value > 0:
            limit = value
    what = f"the model's {limit} positions"
    for rope in _ropes(config):
        original = rope.get("original_max_position_embeddings")
        original = original or getattr(config, "original_max_position_embeddings", None)
        is_long = rope.get("rope_type", rope.get("type")) == "longrope"
        if is_long and original and (limit is None or original < limit):
            limit = original
            what = (
                f"the {original} positions up to which the model's longrope has one set of "
                "frequencies; beyond, probabilities change for the tokens before too"
            )
    return limit, what


def _ropes(config: Any) -> Iterable[dict[str, Any]]:
    """Settings of rotary embeddings, of which a model may have one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if not isinstance(rope, dict):
        return []
    return [rope, *(inner for inner in rope.values() if isinstance(inner, dict))]


def num_embeddings(model: Any) -> int | None:
    """Ids that the model takes; None where it does not say."""
    try:
        rows = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return getattr(rows, "num_embeddings", None)


def refuse_virtual_tokens(model: Any) -> None:
    """Refuse adapters of PEFT that put trained tokens before the prompt.

    Raises:
        ValueError: naming the kind.
    """
    for config in (getattr(model, "peft_config", None) or {}).values():
        if getattr(config, "is_prompt_learning", False):
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise ValueError(
                f"{kind} puts learnt tokens before every call of the model, also before each decoded "
                "token, and cannot generate rollouts: train another adapter, such as LoRA"
            )


def ids_of(tokenizer: Any) -> frozenset[int] | None:
    """Ids that the tokenizer has a token for; None if it cannot say."""
    try:
        return frozenset(tokenizer.get_vocab().values())
    except (AttributeError, NotImplementedError):
        return None
