"""TRL's `generation_kwargs`: each key becomes the setting of its meaning or is refused."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from transformers import GenerationConfig

from rl.config.settings import LanguageSettings

SETTINGS = {
    "max_new_tokens": "max_completion_length",
    "max_tokens": "max_completion_length",
    "stop_strings": "stop",
    **{
        name: name
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop")
    },
}
"""Key of `GenerationConfig` or of vLLM's `SamplingParams` -> the setting that it becomes."""

NEUTRAL: dict[str, Any] = {
    "do_sample": True,
    "use_cache": True,
    "num_beams": 1,
    "num_return_sequences": 1,
    "n": 1,
    "num_beam_groups": 1,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_new_tokens": 0,
    "min_length": 0,
    "min_tokens": 0,
    "diversity_penalty": 0.0,
    "encoder_repetition_penalty": 1.0,
    "renormalize_logits": False,
    "remove_invalid_values": False,
    "guidance_scale": 1.0,
    "early_stopping": False,
}
"""Values that change nothing about sampling one token after the other: accepted."""

REASONS = {
    "do_sample": "rollouts of a prompt must differ, so they are sampled",
    "num_beams": "a beam is no sample of the policy, so its log-probabilities train nothing",
    "num_return_sequences": "write rollouts_per_prompt",
    "n": "write rollouts_per_prompt",
    "max_length": "write max_completion_length, which counts the completion alone",
    "eos_token_id": "set it in model.generation_config, where every engine reads it",
    "stop_token_ids": "set eos_token_id in model.generation_config, where every engine reads it",
    "pad_token_id": "it is the tokenizer's pad token",
    "bos_token_id": "it is the tokenizer's",
    "seed": "write seed; every rollout has one of its own, derived from it",
    "skip_special_tokens": "it changes texts, not what is generated",
    "cache_implementation": "the engine has a cache of its own",
    "use_cache": "the engine uses the model's cache wherever that can be shared",
    "logprobs": "the engine records those of every token drawn",
    "guidance_scale": "it needs a second forward pass that the trainer does not make",
}
"""Why a key is not taken."""


def apply_generation_kwargs(config: LanguageSettings) -> None:
    """Set the settings that `config.generation_kwargs` names, in place.

    Raises:
        ValueError: for a key that is unknown or not offered, with the reason, or for a setting that is
            given here and by its own name with another value.
    """
    for key, value in (config.generation_kwargs or {}).items():  # type: ignore[union-attr]
        if value is None or (key in NEUTRAL and value == NEUTRAL[key]):
            continue
        name = SETTINGS.get(key)
        if name is None:
            raise ValueError(f"generation_kwargs: {key}={value!r} is not taken: {_reason(key)}")
        if name == "stop" and isinstance(value, str):
            value = [value]
        default = type(config).__dataclass_fields__[name].default
        own = getattr(config, name)
        if own not in (default, value):
            raise ValueError(
                f"generation_kwargs: {key}={value!r} contradicts {name}={own!r}: write one of them"
            )
        setattr(config, name, value)


def _reason(key: str) -> str:
    if key in REASONS:
        return REASONS[key]
    known = {*GenerationConfig().to_dict(), *NEUTRAL, *SETTINGS, *REASONS}
    if key not in known:
        close = get_close_matches(key, sorted(SETTINGS), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        return f"neither transformers' GenerationConfig nor an engine here knows it.{hint}"
    return (
        "the engines here do not offer it; they offer temperature, top_k, top_p, min_p, "
        "repetition_penalty and stop strings"
    )
