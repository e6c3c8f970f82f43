"""Adapters of a denoiser: which one trains, and how it is saved for its pipeline to read."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

DENOISERS = ("unet", "transformer")
"""Components of pipelines that predict the noise."""


def denoiser_of(pipeline: Any) -> tuple[str, torch.nn.Module]:
    """The name and the module of a pipeline's denoiser; a PeftModel around it is taken off.

    A model of diffusers carries adapters by itself, and is then saved, switched off and read as any.

    Raises:
        ValueError: if there is none.
    """
    for name in DENOISERS:
        denoiser: Any = getattr(pipeline, name, None)
        if denoiser is None:
            continue
        if isinstance(denoiser, PeftModel):
            adapters: Any = denoiser.peft_config
            denoiser = denoiser.get_base_model()
            denoiser.peft_config = adapters
            denoiser._hf_peft_config_loaded = True  # as after its own add_adapter
            setattr(pipeline, name, denoiser)
        return name, denoiser
    raise ValueError(f"{type(pipeline).__name__} has neither a unet nor a transformer to train")


def choose_trained(pipeline: Any, denoiser: Any, peft_config: Any) -> None:
    """Let one thing alone have gradients: a new adapter, the one that is loaded, or the denoiser.

    What the pipeline does at first is what it did: beside a new adapter, one that is loaded is added
    to the weights, and so is that of a text encoder in any case, which a saved pipeline could not
    hold otherwise. Both are told by a warning.

    Args:
        pipeline: whose other components never train.
        denoiser: of it.
        peft_config: of a new adapter, or None.

    Raises:
        ValueError: if the adapter that is loaded could not train as it is.
    """
    from diffusers.training_utils import cast_training_params

    for name, component in pipeline.components.items():
        if not isinstance(component, torch.nn.Module):
            continue
        component.requires_grad_(False)
        if component is not denoiser and _layers(component):
            _add_to_weights(component, name)
    loaded = getattr(denoiser, "peft_config", None)
    if peft_config is None and not loaded:
        denoiser.requires_grad_(True)
        return
    if peft_config is not None:
        if loaded:
            _add_to_weights(denoiser, type(denoiser).__name__)
        denoiser.add_adapter(peft_config)
    else:
        denoiser.set_adapter(_to_train(denoiser))
    cast_training_params(denoiser)  # to float32, whatever the frozen weights are in


def save_lora(pipeline: Any, denoiser: Any, folder: Path) -> None:
    """The denoiser's adapter alone, in the form its pipeline's `load_lora_weights` reads.

    Pipelines that read none, and adapters that are no LoRA, have the form of the denoiser's own
    `load_lora_adapter(folder, prefix=None)`.
    """
    (name,) = active(denoiser)
    config = denoiser.peft_config[name]
    component = next(each for each in DENOISERS if getattr(pipeline, each, None) is denoiser)
    write = getattr(pipeline, "save_lora_weights", None)
    accepted = inspect.signature(write).parameters if write is not None else ()
    if not isinstance(config, LoraConfig) or f"{component}_lora_layers" not in accepted:
        denoiser.save_lora_adapter(folder, adapter_name=name)
        return
    given = {f"{component}_lora_layers": get_peft_model_state_dict(denoiser, adapter_name=name)}
    if (key := f"{component}_lora_adapter_metadata") in accepted:  # alpha, which need not be r
        given[key] = config.to_dict()
    assert write is not None
    write(folder, **given)


def active(denoiser: torch.nn.Module) -> list[str]:
    """Names of the adapters that act, none twice."""
    return _names(_layers(denoiser))


def _layers(module: torch.nn.Module) -> list[BaseTunerLayer]:
    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]


def _to_train(denoiser: Any) -> str:
    """The one loaded adapter that acts, fully and by itself."""
    layers, names = _layers(denoiser), active(denoiser)
    told = f"the {type(denoiser).__name__} has the adapter {' and '.join(map(repr, names))} loaded"
    if any(layer.merged for layer in layers):
        raise ValueError(
            f"{told}, and fused into its weights, so that it has no gradient: call unfuse_lora() of "
            "the pipeline to train it, or unload_lora_weights() to keep it in the weights"
        )
    if any(layer.disable_adapters for layer in layers):
        raise ValueError(
            f"{told}, and switched off: call enable_lora() of the pipeline to train it, or "
            "unload_lora_weights() to train without it"
        )
    if len(names) != 1:
        raise ValueError(
            f"{told}, and one alone can train: call fuse_lora(adapter_names=[...]) and "
            "delete_adapters([...]) of the pipeline for those that are to stay as they are, or give a "
            "peft_config, beside which all are added to the weights"
        )
    (name,) = names
    for layer in layers:
        if isinstance(layer, LoraLayer) and name in layer.scaling:
            alpha, rank, scale = layer.lora_alpha[name], layer.r[name], layer.scaling[name]
            if not any(math.isclose(scale, alpha / root) for root in (rank, math.sqrt(rank))):
                raise ValueError(
                    f"{told} with a weight other than 1, which no saved LoRA keeps: call "
                    f"set_adapters({name!r}) of the pipeline, or give a peft_config, beside which it "
                    "is added to the weights as it is"
                )
    return name


def _add_to_weights(module: Any, name: str) -> None:
    """Merge the adapters that act into the module's weights, and take all of them out."""
    from diffusers.utils import recurse_remove_peft_layers

    layers = _layers(module)
    acting = [layer for layer in layers if not (layer.disable_adapters or layer.merged)]
    for layer in acting:
        layer.merge()
    names = ", ".join(map(repr, _names(layers)))
    merged = any(layer.merged for layer in layers)
    what = "is added to its weights" if merged else "is switched off and left out"
    warnings.warn(
        f"the adapter {names} that is loaded into {name} {what}: it does not train, and a saved "
        "pipeline has it in the weights",
        stacklevel=4,
    )
    recurse_remove_peft_layers(module)
    if hasattr(module, "peft_config"):
        del module.peft_config
    module._hf_peft_config_loaded = False


def _names(layers: Iterable[BaseTunerLayer]) -> list[str]:
    return list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))
