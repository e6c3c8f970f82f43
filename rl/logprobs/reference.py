"""Keep the reference policy, which the KL term holds the trained policy close to."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback
from transformers.utils import logging
from trl.models.utils import prepare_deepspeed, prepare_fsdp

logger = logging.get_logger(__name__)

FILE = "reference.safetensors"
"""A reference that has moved, in the folder of a checkpoint."""


class Reference:
    """The policy as it was before training: its adapters off, or a frozen copy of it.

    With LoRA nothing is copied, unless weights of the model train beside it. Else the copy takes as much
    memory as the model, sharded as it is; a model that ZeRO-3 has cut up cannot be copied and is loaded
    again from where it came from. A copy may move (`sync`), and is then saved with every checkpoint.

    Args:
        policy: before training, and before any checkpoint is loaded into it.
        accelerator: shards or places the copy as it does the policy.
        moves: whether `sync` will be called.

    Raises:
        ValueError: under ZeRO-3, if the model was not loaded from anywhere; if adapters are given
            that already change the model, as it is not what it is without them; or for one that
            moves but has no weights of its own (adapters) or not whole ones (ZeRO-3, FSDP).
    """

    def __init__(
        self, policy: PreTrainedModel, accelerator: Accelerator, *, moves: bool = False
    ) -> None:
        self._accelerator = accelerator
        self._copy: torch.nn.Module | None = None
        if moves:
            _require_movable(policy, accelerator)
        if hasattr(policy, "disable_adapter"):
            why = not_its_own_reference(policy)
            if why is None:
                require_fresh(policy)
                return
            logger.warning(f"the reference policy is a frozen copy of the whole model: {why}")
        # A model that was loaded under ZeRO-3 is in pieces already; one made in memory is whole.
        if not any(hasattr(weight, "ds_id") for weight in policy.parameters()):
            frozen = copy.deepcopy(policy)
        elif policy.config._name_or_path:
            frozen = AutoModelForCausalLM.from_pretrained(
                policy.config._name_or_path,
                dtype=policy.dtype,
                trust_remote_code=type(policy).__module__.startswith("transformers_modules"),
            )
        else:
            raise ValueError(
                "beta needs a reference policy, and under ZeRO-3 a model in pieces cannot be copied: "
                "give the model as a folder or hub id, train with LoRA, or write beta: 0"
            )
        frozen.requires_grad_(False).eval()
        if accelerator.state.deepspeed_plugin is not None:
            self._copy = prepare_deepspeed(frozen, accelerator)
        elif getattr(accelerator.state, "fsdp_plugin", None) is not None:
            self._copy = prepare_fsdp(frozen, accelerator)  # type: ignore[assignment]
        else:
            self._copy = accelerator.prepare_model(frozen, evaluation_mode=True)

    @contextmanager
    def of(self, model: torch.nn.Module) -> Iterator[torch.nn.Module]:
        """The reference as a model to call, wrappers and all; `model` is the one being trained."""
        if self._copy is not None:
            yield self._copy
            return
        with self._accelerator.unwrap_model(model).disable_adapter():
            yield model

    @torch.no_grad()
    def sync(self, model: torch.nn.Module, alpha: float) -> None:
        """Move the copy towards `model`: weight = alpha * model's + (1 - alpha) * its own.

        (TR-DPO: arXiv:2404.09656; TRL's `sync_ref_model`.)
        """
        assert self._copy is not None
        own, theirs = self._whole(), self._accelerator.unwrap_model(model)
        for weight, other in zip(own.parameters(), theirs.parameters(), strict=True):
            weight.mul_(1 - alpha).add_(other.detach().to(weight), alpha=alpha)

    def save(self, folder: Path) -> None:
        """Write a copy's weights into the folder of a checkpoint."""
        weights = {n: w.detach().cpu().contiguous() for n, w in self._whole().named_parameters()}
        save_file(weights, folder / FILE)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Read back what `save` wrote.

        Raises:
            ValueError: if the checkpoint holds no moved reference.
        """
        if not (folder / FILE).is_file():
            raise ValueError(
                f"{folder} holds no {FILE}: it was written without sync_ref_model, so leave that out, "
                "or begin another run"
            )
        weights = load_file(folder / FILE)
        for name, weight in self._whole().named_parameters():
            weight.copy_(weights[name])

    def _whole(self) -> torch.nn.Module:
        assert self._copy is not None
        return self._accelerator.unwrap_model(self._copy)


class Follow(TrainerCallback):
    """Moves `reference` every `ref_model_sync_steps` steps, before the step is saved."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % args.ref_model_sync_steps == 0:
            self._reference.sync(kwargs["model"], args.ref_model_mixup_alpha)


def _require_movable(policy: torch.nn.Module, accelerator: Accelerator) -> None:
    if hasattr(policy, "disable_adapter"):
        raise ValueError(
            "sync_ref_model needs a reference with weights of its own, but that of an adapter is the "
            "model without it: train all weights, or leave it out"
        )
    plugin = accelerator.state.deepspeed_plugin
    sharded = getattr(accelerator.state, "fsdp_plugin", None) is not None
    if sharded or (plugin is not None and plugin.zero_stage == 3):
        raise ValueError(
            "sync_ref_model needs whole weights: leave it out, or train with DDP or ZeRO 1 and 2 in the "
            "place of FSDP and ZeRO-3"
        )


def not_its_own_reference(policy: torch.nn.Module) -> str | None:
    """Why a model with its adapters off is not the policy before training; None if it is."""
    for name, config in getattr(policy, "peft_config", {}).items():
        kind = getattr(config.peft_type, "value", config.peft_type)
        if kind != "LORA":
            return (
                f"whether adapter {name!r}, of kind {kind}, changes the model already is not known"
            )
    of_adapters = {
        f"{name}.{weight}" if name else weight
        for name, module in policy.named_modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        for weight in _own_weights(cast(torch.nn.Module, module))
    }
    for name, weight in policy.named_parameters():
        if weight.requires_grad and name not in of_adapters:
            return (
                f"{name} trains, which is no adapter's and would train in the reference too (a bias of "
                "LoRA, or weights that were unfrozen)"
            )
    return None


def _own_weights(module: torch.nn.Module) -> list[str]:
    """Weights that an adapter adds to a layer, not those of the layer that it adapts."""
    base = ("base_layer.", "original_module.", "token_adapter.base_layer.")
    return [name for name, _ in module.named_parameters() if not name.startswith(base)]


def require_fresh(policy: torch.nn.Module) -> None:
    """Refuse adapters that were trained, or made to differ from the model: LoRA's B is not 0."""
    for name, weight in policy.named_parameters():
        starts_at_0 = "lora_B" in name or "lora_embedding_A" in name
        if starts_at_0 and bool(weight.detach().count_nonzero()):
            raise ValueError(
                f"beta holds the policy close to the model with its adapters off, but {name} is not 0: "
                "the adapters change it already. Merge them (merge_and_unload()) and give a new "
                "peft_config, or write beta: 0"
            )
