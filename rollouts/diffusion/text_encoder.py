"""Encode prompts with a diffusers pipeline's own text encoders. Axes: P prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rollouts.batch import Condition
from rollouts.diffusion.pipeline_arguments import parameters
from rollouts.prompts import Prompt

_PAIR = ("prompt_embeds", "negative_prompt_embeds")
_MASKED_PAIR = (
    *("prompt_embeds", "prompt_attention_mask"),
    *("negative_prompt_embeds", "negative_prompt_attention_mask"),
)
_POOLED_PAIR = (
    *("prompt_embeds", "negative_prompt_embeds"),
    *("pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
)

OUTPUTS: dict[str, tuple[str | None, ...]] = {
    "AllegroPipeline": _MASKED_PAIR,
    "AuraFlowPipeline": _MASKED_PAIR,
    "ChromaPipeline": (*_MASKED_PAIR[:1], None, *_MASKED_PAIR[1:3], None, *_MASKED_PAIR[3:]),
    "CogVideoXPipeline": _PAIR,
    "CogView3PlusPipeline": _PAIR,
    "CogView4Pipeline": _PAIR,
    "Flux2KleinPipeline": ("prompt_embeds", None),
    "FluxPipeline": ("prompt_embeds", "pooled_prompt_embeds", None),
    "LTXPipeline": _MASKED_PAIR,
    "LattePipeline": _PAIR,
    "Lumina2Pipeline": _MASKED_PAIR,
    "LuminaPipeline": _MASKED_PAIR,
    "MochiPipeline": _MASKED_PAIR,
    "OvisImagePipeline": (*_PAIR, None, None),
    "PRXPipeline": _MASKED_PAIR,
    "PixArtAlphaPipeline": _MASKED_PAIR,
    "PixArtSigmaPipeline": _MASKED_PAIR,
    "QwenImagePipeline": ("prompt_embeds", "prompt_embeds_mask"),
    "SanaPipeline": _MASKED_PAIR,
    "SanaVideoPipeline": _MASKED_PAIR,
    "SkyReelsV2Pipeline": _PAIR,
    "StableDiffusion3Pipeline": _POOLED_PAIR,
    "StableDiffusionPipeline": _PAIR,
    "StableDiffusionXLPipeline": _POOLED_PAIR,
    "WanPipeline": _PAIR,
    "ZImagePipeline": _PAIR,
}
"""What `encode_prompt` returns, by the names of the call's arguments; None: the call makes it anew."""


def encodes_negative_apart(pipeline: Any) -> bool:
    """Whether a negative prompt takes a second `encode_prompt`, as of Qwen-Image and FLUX."""
    return "negative_prompt" not in parameters(pipeline.encode_prompt) and (
        "negative_prompt_embeds" in parameters(type(pipeline).__call__)
    )


def require_known_encoder(pipeline: Any) -> None:
    """Raise ValueError unless it is known what `encode_prompt` of this pipeline returns."""
    if type(pipeline).__name__ not in OUTPUTS:
        raise ValueError(
            f"what encode_prompt of {type(pipeline).__name__} returns is not known here; pass encode=, "
            f"which returns the embeddings by the names of the call's arguments"
        )


def encode_with_pipeline(
    pipeline: Any,
    prompts: Sequence[Prompt],
    *,
    negative: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Condition]:
    """The pipeline's embeddings of the prompts, and of the negative prompts where it takes some.

    Args:
        pipeline: of a class in `OUTPUTS`.
        prompts: P prompts.
        negative: P texts. None: the empty text where `encode_prompt` encodes both, else none.
        settings: further arguments of `encode_prompt`, such as `clip_skip`.

    Returns:
        P values each, by the names of the arguments of the pipeline's call.

    Raises:
        ValueError: if what `encode_prompt` returns is not known for this pipeline, or it fails with
            these settings.
    """
    require_known_encoder(pipeline)
    texts = [str(prompt.prompt) for prompt in prompts]
    if negative is None or not encodes_negative_apart(pipeline):
        return _encoded(pipeline, texts, negative, settings)
    other = _encoded(pipeline, list(negative), None, settings)
    return _encoded(pipeline, texts, None, settings) | {
        f"negative_{n}": v for n, v in other.items()
    }


def _encoded(
    pipeline: Any,
    texts: list[str],
    negative: Sequence[str] | None,
    settings: Mapping[str, Any] | None,
) -> dict[str, Condition]:
    arguments: dict[str, Any] = {
        "device": pipeline._execution_device,
        "num_images_per_prompt": 1,
        "num_videos_per_prompt": 1,
        "do_classifier_free_guidance": True,
        "prompt_2": None,
        "prompt_3": None,
        "prompt_4": None,
    }
    if negative is not None:
        arguments["negative_prompt"] = list(negative)
    accepted = parameters(pipeline.encode_prompt)
    arguments = {name: value for name, value in arguments.items() if name in accepted}
    try:
        values = pipeline.encode_prompt(prompt=texts, **arguments | dict(settings or {}))
    except (AttributeError, IndexError, TypeError) as error:
        if not settings:
            raise
        raise ValueError(
            f"encode_prompt of {type(pipeline).__name__} fails with {dict(settings)}: {error}"
        ) from error
    pairs = zip(OUTPUTS[type(pipeline).__name__], values, strict=True)
    return {name: value for name, value in pairs if name and value is not None}
