"""Load a denoiser with its prompts and rewards; choose the adapter that trains, and save it."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from rl.config.diffusion import DenoisingConfig
from rl.logprobs.reference import require_fresh
from rl.policies.loading import without_dropout
from rl.policies.pipeline import lora_of
from rollouts.prompts import Prompt, PromptReport, plain_prompts
from rollouts.rewards.image import load_image_reward

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

    The pipeline's output does not change: if a new adapter is added, one that is loaded already is
    merged into the weights. So is the adapter of a text encoder, always, because a saved pipeline
    could not hold it otherwise. Both give a warning.

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
    loaded = (
        f"the {type(denoiser).__name__} has the adapter {' and '.join(map(repr, names))} loaded"
    )
    if any(layer.merged for layer in layers):
        raise ValueError(
            f"{loaded}, and fused into its weights, so that it has no gradient: call unfuse_lora() of "
            "the pipeline to train it, or unload_lora_weights() to keep it in the weights"
        )
    if any(layer.disable_adapters for layer in layers):
        raise ValueError(
            f"{loaded}, and switched off: call enable_lora() of the pipeline to train it, or "
            "unload_lora_weights() to train without it"
        )
    if len(names) != 1:
        raise ValueError(
            f"{loaded}, and one alone can train: call fuse_lora(adapter_names=[...]) and "
            "delete_adapters([...]) of the pipeline for those that are to stay as they are, or give a "
            "peft_config, beside which all are added to the weights"
        )
    (name,) = names
    for layer in layers:
        if isinstance(layer, LoraLayer) and name in layer.scaling:
            alpha, rank, scale = layer.lora_alpha[name], layer.r[name], layer.scaling[name]
            if not any(math.isclose(scale, alpha / root) for root in (rank, math.sqrt(rank))):
                raise ValueError(
                    f"{loaded} with a weight other than 1, which no saved LoRA keeps: call "
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


def load_denoiser(model: Any, processor: Any, peft_config: Any = None) -> tuple[Any, Any]:
    """The denoiser of a pipeline, and the pipeline, loaded in float32 if it is a folder or hub id.

    With `peft_config` (a LoraConfig or its arguments) an adapter is added, which alone trains; without
    it one that is loaded (`load_lora_weights`, `add_adapter`, a PeftModel) does, and else all weights
    of the denoiser; other components never do. Dropout is off.

    Raises:
        ValueError: if there is no denoiser, an adapter that is loaded cannot train as it is, or
            weights in half precision would train.
    """
    from diffusers import DiffusionPipeline

    pipeline = (
        DiffusionPipeline.from_pretrained(model, use_safetensors=True)
        if isinstance(model, str)
        else model
    )
    peft_config = lora_of(peft_config)
    _, denoiser = denoiser_of(pipeline)
    choose_trained(pipeline, denoiser, peft_config)
    _require_precision(denoiser)
    without_dropout(denoiser)
    return denoiser, pipeline


def _require_precision(denoiser: torch.nn.Module) -> None:
    """Refuse to train half-precision weights, in which updates are rounded away or blown up."""
    for name, weight in denoiser.named_parameters():
        if weight.requires_grad and weight.dtype.itemsize < 4:
            kind = str(weight.dtype).removeprefix("torch.")
            raise ValueError(
                f"{name} would train in {kind}, which is too coarse for an optimizer: train an adapter "
                "beside frozen weights (use_peft: true, or a peft_config), or write dtype: float32, "
                "with bf16: true to compute in half precision all the same"
            )


def require_adapter(denoiser: torch.nn.Module) -> None:
    """Refuse a denoiser that is not the reference policy as soon as its adapters are off.

    Raises:
        ValueError: if other weights than those of adapters train, or an adapter is not 0 at first.
    """
    adapters = [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]
    if not adapters:
        raise ValueError(
            f"beta: a reference policy needs LoRA adapters that can be turned off, but the "
            f"{type(denoiser).__name__} has none: write use_peft: true (a peft_config), or beta: 0"
        )
    off = {
        id(weight)
        for adapter in adapters
        for name, weight in adapter.named_parameters()
        if not name.startswith("base_layer.")
    }
    for name, weight in denoiser.named_parameters():
        if weight.requires_grad and id(weight) not in off:
            raise ValueError(
                f"beta holds the policy close to the model with its adapters off, but {name} trains "
                "and is in no adapter: give a pipeline without adapters and a peft_config, or write "
                "beta: 0"
            )
    require_fresh(denoiser)


def load_image_rewards(
    rewards: Any, weights: list[float] | None, *, device: str | torch.device = "cpu"
) -> list[Any]:
    """The image rewards behind names, paths and callables.

    Args:
        rewards: one or several.
        weights: one per reward, or None.
        device: where the models of rewards that are named are loaded, such as clip_score.

    Raises:
        ValueError: if there is none, a name is unknown, or `weights` has another length.
    """
    from rollouts.rewards.image_models import MODEL_REWARDS

    rewards = [rewards] if isinstance(rewards, str) or callable(rewards) else list(rewards)
    if not rewards:
        raise ValueError("reward_funcs is empty; name at least one image reward")
    if weights is not None and len(weights) != len(rewards):
        raise ValueError(
            f"reward_weights has {len(weights)} entries for {len(rewards)} image rewards"
        )
    on_device = {name: partial(load, device=str(device)) for name, load in MODEL_REWARDS.items()}
    load = partial(load_image_reward, more=on_device)
    return [load(reward) if isinstance(reward, str) else reward for reward in rewards]


def image_prompts(rows: Any, config: DenoisingConfig) -> tuple[list[Prompt], PromptReport]:
    """The prompts of rows with a text in column `prompt`."""
    if rows is None or isinstance(rows, str | Path):
        raise ValueError(
            f"train_dataset must be rows with a column 'prompt', got {rows!r}; read a file with "
            "datasets.load_dataset('json', data_files=...)['train'], or recipes/train.py with "
            "dataset_name"
        )
    how: Any = config.duplicates
    return plain_prompts(rows, id_column=config.id_column, duplicates=how)
