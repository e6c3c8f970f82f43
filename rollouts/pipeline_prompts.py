"""What a diffusers pipeline's own text encoders make of prompts. Axes: P prompts."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rollouts.prompts import Prompt

_OUTPUTS: dict[str, tuple[str | None, ...]] = {
    "StableDiffusionPipeline": ("prompt_embeds", "negative_prompt_embeds"),
    "StableDiffusionXLPipeline": (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    ),
    "StableDiffusion3Pipeline": (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    ),
    "FluxPipeline": ("prompt_embeds", "pooled_prompt_embeds", None),
    "QwenImagePipeline": ("prompt_embeds", "prompt_embeds_mask"),
}
"""What `encode_prompt` returns, by the names of the call's arguments."""


def encode_with_pipeline(pipeline: Any, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """The pipeline's embeddings of the prompts, and of the empty negative prompt where it makes one.

    Returns:
        (P, ...) tensors by the names of the arguments of the pipeline's call.

    Raises:
        ValueError: if the order of what `encode_prompt` returns is not known for this pipeline.
    """
    names = _OUTPUTS.get(type(pipeline).__name__)
    if names is None:
        raise ValueError(
            f"what encode_prompt of {type(pipeline).__name__} returns is not known here; pass encode=, "
            f"which returns the embeddings by the names of the call's arguments"
        )
    settings: dict[str, Any] = {
        "device": pipeline._execution_device,
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": True,
        "prompt_2": None,
        "prompt_3": None,
    }
    accepted = inspect.signature(pipeline.encode_prompt).parameters
    settings = {name: value for name, value in settings.items() if name in accepted}
    values = pipeline.encode_prompt(prompt=[prompt.prompt for prompt in prompts], **settings)
    pairs = zip(names, values, strict=True)
    return {name: value for name, value in pairs if name and value is not None}
