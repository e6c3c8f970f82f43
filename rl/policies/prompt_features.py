"""What a language model makes of a prompt: its hidden states, as features for a prior of pass rates.

Axes: P prompts, S tokens of the longest, C width of the model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rl.logprobs.from_logits import innermost
from rollouts.prompts import Prompt

ROWS = 32
"""Prompts that go through the model together."""


@torch.no_grad()
def hidden_features(model: Any, prompts: list[Prompt], *, pad_id: int) -> np.ndarray:
    """The mean over a prompt's tokens of what the head would see, and the last token's, side by side.

    Logits are made of one position only.

    Args:
        model: a causal language model with whole weights; evaluated as in generation, without dropout.
        prompts: P prompts.
        pad_id: any valid token id.

    Returns:
        (P, 2 C) float64.
    """
    was_training, found = model.training, []
    model.eval()
    try:
        for start in range(0, len(prompts), ROWS):
            found.append(_of_batch(model, prompts[start : start + ROWS], pad_id))
    finally:
        model.train(was_training)
    return np.concatenate(found) if found else np.zeros((0, 0))


def _of_batch(model: Any, prompts: list[Prompt], pad_id: int) -> np.ndarray:
    head = innermost(model).get_output_embeddings()
    device = head.weight.device
    ids = [torch.tensor(prompt.token_ids) for prompt in prompts]
    # On the right, where a causal model sees no padding from a token.
    token_PS = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad_id).to(device)
    length_P = torch.tensor([len(each) for each in ids], device=device)
    mask_PS = torch.arange(token_PS.shape[1], device=device) < length_P[:, None]
    seen: dict[str, Tensor] = {}

    def keep_input(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen["hidden"] = args[0]
        return (args[0][:, -1:],)

    hook = head.register_forward_pre_hook(keep_input)
    try:
        model(input_ids=token_PS, attention_mask=mask_PS.long(), use_cache=False)
    finally:
        hook.remove()
    hidden_PSC = seen["hidden"].float()
    mean_PC = (hidden_PSC * mask_PS[:, :, None]).sum(dim=1) / length_P[:, None]
    last_PC = hidden_PSC[torch.arange(len(ids), device=device), length_P - 1]
    return torch.cat([mean_PC, last_PC], dim=1).double().cpu().numpy()
