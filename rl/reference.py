"""The reference policy: what the KL term holds the trained one close to."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl.models.utils import prepare_deepspeed, prepare_fsdp


class Reference:
    """The policy as it was before training: its adapters off, or a frozen copy of it.

    With LoRA nothing is copied. Else the copy takes as much memory as the model, sharded as it is; a
    model that ZeRO-3 has cut up cannot be copied and is loaded again from where it came from.

    Args:
        policy: before training, and before any checkpoint is loaded into it.
        accelerator: shards or places the copy as it does the policy.

    Raises:
        ValueError: under ZeRO-3, if the model was not loaded from anywhere; or if adapters are given
            that already change the model, as it is not what it is without them.
    """

    def __init__(self, policy: PreTrainedModel, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._copy: torch.nn.Module | None = None
        if hasattr(policy, "disable_adapter"):
            require_fresh(policy)
            return
        # A model that was loaded under ZeRO-3 is in pieces already; one made in memory is whole.
        if not any(hasattr(weight, "ds_id") for weight in policy.parameters()):
            frozen = copy.deepcopy(policy)
        elif policy.config._name_or_path:
            frozen = AutoModelForCausalLM.from_pretrained(
                policy.config._name_or_path, dtype=policy.dtype
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


def require_fresh(policy: torch.nn.Module) -> None:
    """Refuse adapters that were trained, or made to differ from the model: LoRA's B is not 0."""
    for name, weight in policy.named_parameters():
        if "lora_B" in name and bool(weight.detach().count_nonzero()):
            raise ValueError(
                f"beta holds the policy close to the model with its adapters off, but {name} is not 0: "
                "the adapters change it already. Merge them (merge_and_unload()) and give a new "
                "peft_config, or write beta: 0"
            )
