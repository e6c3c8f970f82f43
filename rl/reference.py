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
        ValueError: under ZeRO-3, if the model was not loaded from anywhere.
    """

    def __init__(self, policy: PreTrainedModel, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._copy: torch.nn.Module | None = None
        if hasattr(policy, "disable_adapter"):
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
