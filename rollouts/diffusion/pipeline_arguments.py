"""Check which arguments of a pipeline's call a caller may give, and where each acts.

The engine encodes prompts once and hands the pipeline embeddings, so an argument that only says how a
prompt is encoded would do nothing in the call. Here every argument reaches what it is for, or is
refused with the reason.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

_OWN = "it has an argument of its own"
_PLAN = "num_steps of the plan says how many steps there are, and the scheduler where they lie"
_SEEDS = "the seeds of the rollouts say it"
_BUDGET = "the budgets say how many samples a prompt gets"
_RETURNS = "the engine reads what the pipeline returns"
_CALLBACK = "a callback could change the latents between steps, which are then no Gaussian actions"
_PROMPTS = "the prompts of the data say it, one for each"
_COUNTS = "it counts the steps of one call, and a replay runs a single step"
_IMAGES = "a rollout starts from a text and noise; images as conditions are not supported"

REFUSED = {
    "guidance_scale": _OWN,
    "height": _OWN,
    "width": _OWN,
    "negative_prompt": _OWN,
    "num_inference_steps": _PLAN,
    "timesteps": _PLAN,
    "sigmas": f"{_PLAN}; shift moves those of flow models",
    "denoising_end": "a chain runs to the finished image, whose reward trains it",
    "denoising_start": "a chain starts from pure noise",
    "eta": "level of the plan says how much noise is drawn",
    "generator": _SEEDS,
    "latents": _SEEDS,
    "num_images_per_prompt": _BUDGET,
    "num_videos_per_prompt": _BUDGET,
    "output_type": _RETURNS,
    "return_dict": _RETURNS,
    "callback": _CALLBACK,
    "callback_steps": _CALLBACK,
    "callback_on_step_end": _CALLBACK,
    "callback_on_step_end_tensor_inputs": _CALLBACK,
    "cfg_trunc_ratio": _COUNTS,
    "skip_guidance_layers": _COUNTS,
    "skip_layer_guidance_scale": _COUNTS,
    "skip_layer_guidance_start": _COUNTS,
    "skip_layer_guidance_stop": _COUNTS,
    "prompt": _PROMPTS,
    "prompt_2": _PROMPTS,
    "prompt_3": _PROMPTS,
    "prompt_4": _PROMPTS,
    "image": _IMAGES,
    "video": _IMAGES,
    "mask_image": _IMAGES,
    "control_image": _IMAGES,
    "ip_adapter_image": _IMAGES,
    "ip_adapter_image_embeds": _IMAGES,
    "strength": _IMAGES,
}
"""Arguments that contradict what the engine, the plan or the data say."""

CANNOT_RUN = {
    "SanaSprintPipeline": "it is distilled to one or two jumps of a consistency model",
    "LatentConsistencyModelPipeline": "it is distilled to a few jumps of a consistency model",
    "LongCatImagePipeline": "it reads the texts of the prompts beside their embeddings",
    "HiDreamImagePipeline": "its embeddings lie layer by layer, and not prompt by prompt",
    "SkyReelsV2DiffusionForcingPipeline": "its frames are denoised at different levels at one time",
    "StableDiffusionPanoramaPipeline": "it takes each step once for every view of the image",
    "Flux2KleinKVPipeline": "it keeps keys and values from step to step",
}
"""Pipelines whose steps cannot be recorded and replayed, and why."""

_EMBEDDING = re.compile(r"embeds|prompt_attention_mask|embeds_mask|pooled_prompt")
_TEXT = re.compile(r"(negative_)?prompt(_\d)?")


def _is_embedding(name: str) -> bool:
    return _EMBEDDING.search(name) is not None


def parameters(function: Any) -> dict[str, inspect.Parameter]:
    """The named parameters of a pipeline's call or `encode_prompt`; without those that swallow any."""
    swallowing = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    found = inspect.signature(function).parameters
    return {name: p for name, p in found.items() if name != "self" and p.kind not in swallowing}


def split_arguments(
    pipeline: Any, given: Mapping[str, Any], *, encodes: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of every call, and those of `encode_prompt`.

    An argument that `encode_prompt` has goes there, and to the call as well where that has it. What is
    not given is there as the call has it by default, which may differ from `encode_prompt`'s own: 512
    tokens and not 226 for Wan, captions cleaned for PixArt, an instruction before them for Sana.

    Args:
        pipeline: whose call and `encode_prompt` they are for.
        given: by name.
        encodes: whether the pipeline's own text encoders read the prompts.

    Raises:
        ValueError: for a name that neither has, that the engine, the plan or the data decide, or
            that says how prompts are encoded while `encode` gives their embeddings.
    """
    name_of = type(pipeline).__name__
    of_call = parameters(type(pipeline).__call__)
    of_encoder = parameters(getattr(pipeline, "encode_prompt", lambda: None))
    call: dict[str, Any] = {}
    encoder: dict[str, Any] = {}
    if encodes:
        both = (name for name in of_call if name in of_encoder and name not in REFUSED)
        own = {
            n: of_call[n].default for n in both if not _TEXT.fullmatch(n) and not _is_embedding(n)
        }
        encoder = {n: value for n, value in own.items() if value is not inspect.Parameter.empty}
    for name, value in given.items():
        if name in REFUSED:
            raise ValueError(f"pipeline_kwargs must not contain {name!r}: {REFUSED[name]}")
        if name not in of_call and not (encodes and name in of_encoder):
            raise ValueError(
                f"the call of {name_of} takes no {name} (pipeline_kwargs)."
                f"{_nearest(name, (set(of_call) | set(of_encoder)) - set(REFUSED))}"
            )
        if _is_embedding(name):
            raise ValueError(
                f"pipeline_kwargs must not contain {name!r}: embeddings are of the prompts, and "
                f"encode gives them"
            )
        if name in of_encoder and not encodes:
            raise ValueError(
                f"pipeline_kwargs[{name!r}] has no effect: it says how {name_of} encodes prompts, and "
                f"encode= gives their embeddings; let encode heed it, or leave encode out"
            )
        if name in of_encoder:
            encoder[name] = value
        if name in of_call:
            call[name] = value
    return call, encoder


def texts_to_leave_out(pipeline: Any) -> list[str]:
    """Arguments for texts whose default is not None, which a call refuses beside embeddings.

    PixArt's `negative_prompt=""` is one.
    """
    found = parameters(type(pipeline).__call__).items()
    return [name for name, p in found if _TEXT.fullmatch(name) and p.default is not None]


def missing_arguments(pipeline: Any) -> list[str]:
    """Arguments without a default that neither the engine gives nor a text prompt can be."""
    found = parameters(type(pipeline).__call__).items()
    empty = [name for name, p in found if p.default is inspect.Parameter.empty]
    return [n for n in empty if not _TEXT.fullmatch(n) and REFUSED.get(n, _IMAGES) is _IMAGES]


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else ""
