"""Make a few random tokens, to compare two ways of running one model.

Axes: R rows, L positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from rollouts.engines.model_limits import num_embeddings, position_limit

PROMPTS, COMPLETION = (3, 9), 6
"""Tokens of the two prompts, and of what follows them, where the model has so many positions."""

EXACT, ROUNDED = 1e-3, 0.2
"""Largest `distance` of two ways that are the same but for rounding, in float32 and in half precision
or TF32. Rounding gives 1e-6 and 1e-2; a mask that is ignored, a state that is not copied or dropout of
a tenth 0.1 and more. Project defaults."""


def rows_of(model: Any, known_ids: Collection[int] | None = None) -> list[tuple[Tensor, Tensor]]:
    """Two rows each of two prompts, as (prompt, completion) ids on the CPU; none if there is no room.

    No special token is among them, as some of these stand for images.
    """
    limit, _ = position_limit(model)
    room = min(max(PROMPTS) + COMPLETION, limit or 10**9)
    if room < 4:
        return []
    completion = min(COMPLETION, room // 2)
    sizes = [min(size, room - completion) for size in PROMPTS]
    sizes[0] = min(sizes[0], max(1, sizes[1] - 1))
    id_V = torch.tensor(_plain_ids(model, known_ids))
    generator = torch.Generator().manual_seed(0)

    def some(count: int) -> Tensor:
        return id_V[torch.randint(len(id_V), (count,), generator=generator)]

    prompts = [some(size) for size in sizes]
    return [(prompt, some(completion)) for prompt in prompts for _ in range(2)]


def _plain_ids(model: Any, known_ids: Collection[int] | None) -> list[int]:
    """Ids of ordinary tokens: not named in the model's configuration, 4096 at most."""
    most = num_embeddings(model) or 2
    special: set[int] = set()
    for config in (model.config, model.config.get_text_config(decoder=True)):
        for name, value in vars(config).items():
            if name.endswith(("token_id", "token_index")):
                special |= set(value if isinstance(value, (list, tuple)) else [value])
    known = range(most) if known_ids is None else sorted(i for i in known_ids if i < most)
    plain = [i for i in known if i not in special]
    return (plain or list(range(most)))[:4096]


@torch.no_grad()
def plain_logits(model: Any, rows: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """(L, V) float32 logits that predict each completion: one call a row, nothing padded or cached."""
    found = []
    for prompt, completion in rows:
        ids = torch.cat([prompt, completion])[None].to(model.device)
        logits_LV = model(input_ids=ids, use_cache=False).logits[0]
        found.append(logits_LV[len(prompt) - 1 : -1].float())
    return found


def distance(one: Tensor, other: Tensor, spread: Tensor) -> float:
    """Mean |one - other| of log-probabilities in units of what log-probabilities differ by at all.

    A tiny model with small random weights gives nearly the same probability to all tokens, so that nats
    would say little.

    Args:
        one, other: log-probabilities of the same tokens.
        spread: scalar, the standard deviation over the vocabulary (see `spread_of`).
    """
    differs = one != other  # and -inf, of a token left out, is equal to itself
    return float(torch.where(differs, (one - other).abs(), 0.0).mean() / spread.clamp(min=1e-6))


def spread_of(logits: list[Tensor]) -> Tensor:
    """Standard deviation of a position's finite logits over the vocabulary, as a mean over positions."""
    logits_LV = torch.cat(logits)
    logits_LV = logits_LV.masked_fill(logits_LV.isinf(), torch.nan)
    centred_LV = logits_LV - logits_LV.nanmean(dim=-1, keepdim=True)
    return centred_LV.square().nanmean(dim=-1).sqrt().mean()


def tolerance(model: Any, *, autocast: bool = False) -> float:
    """The largest `distance` that is rounding, by the precision the model computes in."""
    return ROUNDED if autocast or computes_rounded(model) else EXACT


def computes_rounded(model: Any) -> bool:
    """Whether products are of less than float32: by the weights, by autocast, or by TF32 on a GPU."""
    weights = [weight for weight in model.parameters() if weight.is_floating_point()]
    if any(weight.dtype not in (torch.float32, torch.float64) for weight in weights):
        return True
    device = weights[0].device.type if weights else "cpu"
    if torch.is_autocast_enabled(device):
        return True
    return device == "cuda" and torch.backends.cuda.matmul.allow_tf32
