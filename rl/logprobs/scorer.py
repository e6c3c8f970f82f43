"""Choose how to compute log-probs: from logits, or fused with the LM head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers.utils import logging

from rl.logprobs import from_hidden as fused_head
from rl.logprobs import from_logits as logprobs
from rl.logprobs import shared_prompts
from rl.logprobs.from_logits import Layout, Statistics
from rollouts.batch import TokenRollouts

logger = logging.get_logger(__name__)

LARGE_VOCABULARY = 2**14
"""From here on the logits outweigh what is spared by having them, and are not made; project default."""


class Scorer:
    """Scores recorded rollouts under a model, wrappers and all.

    Args:
        temperature: of sampling.
        pad_id: any valid token id.
        fused: True, False, or None for what the vocabulary suggests. Models whose head does not allow
            it (`fused_head.refusal`) are scored from their logits, with a warning if it was asked for.
        autocast: whether the model computes in half precision under autocast.
        share_prompts: whether rollouts of one prompt stand behind one copy of it: "never", "always",
            or "auto", where that costs less. No effect before `fidelity.settle` has asked the model.
        max_tokens: of a micro-batch, beyond which separate rows are not an option under "auto".
    """

    def __init__(
        self,
        *,
        temperature: float,
        pad_id: int,
        fused: bool | None,
        autocast: bool = False,
        share_prompts: str = "never",
        max_tokens: int | None = None,
    ) -> None:
        self.temperature, self.pad_id, self.autocast = temperature, pad_id, autocast
        self.right_padded = False
        """Pad on the right, for models that see what an attention mask hides."""
        self.in_eval = False
        """The update runs in evaluation mode, for models with noise in training mode."""
        self.is_settled = False
        """Whether all of them were found out: `fidelity.settle`."""
        self.share_prompts, self.max_tokens = share_prompts, max_tokens
        self.width: int | None = None
        """Of the model, if prompts are shared; None: every rollout has its own copy."""
        self._fused = fused
        self._is_fused: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()

    @property
    def settings(self) -> dict[str, Any]:
        """How rows are laid out and scored, in the words of `rl.logprobs.from_logits`."""
        names = ("temperature", "pad_id", "right_padded")
        return {name: getattr(self, name) for name in names}

    def logprobs(self, model: torch.nn.Module, rollouts: TokenRollouts) -> torch.Tensor:
        """(N, T) log-probabilities, differentiable; see `logprobs.completion_logprobs`."""
        score: Callable[..., torch.Tensor] = (
            fused_head.fused_logprobs if self._uses_fused(model) else logprobs.completion_logprobs
        )
        return score(model, rollouts, layout=self._layout(model, rollouts), **self.settings)

    def statistics(
        self, model: torch.nn.Module, rollouts: TokenRollouts, *, differentiable: bool = False
    ) -> Statistics:
        """Log-probabilities and entropies; see `logprobs.completion_statistics`."""
        score: Callable[..., Statistics] = (
            fused_head.fused_statistics
            if self._uses_fused(model)
            else logprobs.completion_statistics
        )
        layout = self._layout(model, rollouts)
        return score(model, rollouts, differentiable=differentiable, layout=layout, **self.settings)

    def refuses_to_share(self, model: torch.nn.Module) -> str | None:
        """Why prompts cannot be shared with this model in the settled mode; None if they can.

        Runs the model. Every rank asks together.
        """
        if self.right_padded:
            return "the model sees what an attention mask hides"
        rounds = self.autocast or next(model.parameters()).dtype.itemsize < 4
        return shared_prompts.refusal(model, in_eval=self.in_eval, rounds=rounds)

    def cost(self, rollouts: TokenRollouts) -> float:
        """Of a micro-batch as it would be scored, in units of `shared_prompts.cost`."""
        assert self.width is not None
        found = shared_prompts.cost(rollouts, self.width)
        return found.packed if self._packs(rollouts) else found.separate

    def _packs(self, rollouts: TokenRollouts) -> bool:
        if self.width is None or not len(rollouts):
            return False
        if self.share_prompts == "always":
            return True
        found = shared_prompts.cost(rollouts, self.width)
        too_many = self.max_tokens is not None and found.separate_tokens > self.max_tokens
        return found.packed < found.separate or (
            too_many and found.packed_tokens < found.separate_tokens
        )

    def _layout(self, model: torch.nn.Module, rollouts: TokenRollouts) -> Layout | None:
        """Packed rows, or None for the usual ones."""
        if not self._packs(rollouts):
            return None
        return shared_prompts.packed_layout(model, rollouts, self.pad_id)

    def _uses_fused(self, model: torch.nn.Module) -> bool:
        # Asking runs the model once. Every rank scores its first rows at the same moment.
        if model not in self._is_fused:
            self._is_fused[model] = self._wants_fused(model) and self._allows_fused(model)
        return self._is_fused[model]

    def _wants_fused(self, model: torch.nn.Module) -> bool:
        if self._fused is not None:
            return self._fused
        head = logprobs.innermost(model).get_output_embeddings()
        return getattr(head, "out_features", 0) >= LARGE_VOCABULARY

    def _allows_fused(self, model: torch.nn.Module) -> bool:
        reason = fused_head.refusal(model)
        if reason is not None and self._fused:
            logger.warning(f"fused_logprobs is not possible here and stays off: {reason}")
        return reason is None
