"""Batches of rollouts.

Axes: N rollouts, K rows kept, T decision steps (tokens, or denoising steps).

A batch is immutable: later stages add a column with `dataclasses.replace`. Engines put every
tensor on the CPU; only micro-batches travel to the accelerator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollouts:
    """What the policy did, one row per rollout.

    A row is a finished attempt at one prompt: T decisions, each with the log-probability it had
    under the policy that made it. For a language model a decision is a token; for a diffusion
    model it is one denoising step. Everything after the engine sees only these fields.

    Example, three rollouts of two prompts, at most two decisions each::

        Rollouts(
            prompt_N=torch.tensor([0, 0, 1]),
            mask_NT=torch.tensor([[True, True], [True, False], [True, True]]),
            logprob_NT=torch.tensor([[-0.1, -0.7], [-2.3, 0.0], [-0.4, -0.2]]),
            version=12,
        )

    Raises:
        ValueError: if a column has another shape or type than stated below, or a log-probability
            is not 0 off the mask or not finite on it.
    """

    prompt_N: Tensor
    """(N,) int64: row of the prompt in this batch. Rows of one prompt need not be adjacent."""
    mask_NT: Tensor
    """(N, T) bool: True where the policy made the decision; False on padding and tool output."""
    logprob_NT: Tensor
    """(N, T) float, nats, under the policy that sampled; exactly 0 where the mask is False."""
    version: int
    """Optimizer steps the sampling policy had taken."""
    reward_N: Tensor | None = None
    """(N,) float64; None until scored."""
    advantage_N: Tensor | None = None
    """(N,) float; None until compared with its peers."""
    stratum_N: Tensor | None = None
    """(N,) int64: peers within the prompt, such as the number of tool calls; None: all are."""
    weight_NT: Tensor | None = None
    """(N, T) float: how much each decision counts in the loss; None until weighed."""
    old_logprob_NT: Tensor | None = None
    """(N, T) float, nats: recomputed by the trainer before the first update; None: not needed."""
    reference_logprob_NT: Tensor | None = None
    """(N, T) float, nats, under the reference policy; None without one."""
    entropy_NT: Tensor | None = None
    """(N, T) float, nats: entropy of the policy at each decision, at the sampling temperature; None
    until computed."""
    heterogeneity_NT: Tensor | None = None
    """(N, T) float in [-1, 1]: place of that entropy among those of the step (HAPO); None: not used."""

    def __post_init__(self) -> None:
        if self.mask_NT.ndim != 2 or self.mask_NT.dtype != torch.bool:
            raise ValueError(
                f"mask_NT must be bool of shape (N, T), got {self.mask_NT.dtype} "
                f"of shape {tuple(self.mask_NT.shape)}"
            )
        if self.prompt_N.dtype != torch.int64:
            raise ValueError(f"prompt_N must be int64, got {self.prompt_N.dtype}")
        num_rollouts, num_steps = self.mask_NT.shape
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, Tensor):
                continue
            # The name of a column ends in its axes.
            axes = field.name.rsplit("_", 1)[1]
            expected = (num_rollouts, num_steps) if axes == "NT" else (num_rollouts,)
            if tuple(value.shape) != expected:
                raise ValueError(
                    f"{field.name} has shape {tuple(value.shape)}, expected {expected} "
                    f"to match mask_NT"
                )
        if self.logprob_NT[~self.mask_NT].any():
            raise ValueError("logprob_NT must be 0 wherever mask_NT is False")
        finite_N = self.logprob_NT.isfinite().all(dim=1)
        if not finite_N.all():
            raise ValueError(
                f"logprob_NT must be finite, but rows {(~finite_N).nonzero().flatten().tolist()} "
                f"are not"
            )

    def __len__(self) -> int:
        return len(self.prompt_N)

    @property
    def length_N(self) -> Tensor:
        """(N,) int64: decisions the policy made in each rollout."""
        return self.mask_NT.sum(dim=1)

    def take(self, index_K: Tensor) -> Self:
        """The rows `index_K`, in that order; a row may be taken twice."""
        return replace(self, **{k: v[index_K] for k, v in _columns(self).items()})

    def to(self, device: torch.device | str) -> Self:
        """The same rows with every column on `device`."""
        return replace(self, **{k: v.to(device) for k, v in _columns(self).items()})


def _columns(batch: Rollouts) -> dict[str, Any]:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRollouts(Rollouts):
    """Rollouts of a language model: a decision is a token.

    Example, two rollouts of one prompt; the first ends with the end-of-sequence token 2, the second
    is cut off at three tokens::

        TokenRollouts(
            prompt_N=torch.tensor([0, 0]),
            mask_NT=torch.tensor([[True, True, False], [True, True, True]]),
            logprob_NT=torch.tensor([[-0.1, -0.7, 0.0], [-2.3, -0.2, -0.9]]),
            version=12,
            token_NT=torch.tensor([[7, 2, 0], [5, 5, 9]]),
            truncated_N=torch.tensor([False, True]),
            seed_N=torch.tensor([11, 12]),
            prompt_ids=((4, 8, 6),),
        )
    """

    token_NT: Tensor
    """(N, T) int64: ids of the completion. An end-of-sequence token that was drawn is part of it,
    and of the mask. Off the mask, what stands before a row's last decision is context that others
    wrote (tool output); what stands after it means nothing."""
    truncated_N: Tensor
    """(N,) bool: True where the length limit ended the rollout, not the policy."""
    seed_N: Tensor
    """(N,) int64: the seed that, with the prompt and the policy, determines the rollout."""
    prompt_ids: tuple[tuple[int, ...], ...]
    """Token ids of every prompt of the batch, indexed by `prompt_N`; `take` shares it."""

    def __post_init__(self) -> None:
        # slots=True rebuilds the class, which breaks super() without arguments.
        Rollouts.__post_init__(self)
        for name, dtype in (
            ("token_NT", torch.int64),
            ("truncated_N", torch.bool),
            ("seed_N", torch.int64),
        ):
            if getattr(self, name).dtype != dtype:
                raise ValueError(f"{name} must be {dtype}, got {getattr(self, name).dtype}")
        if len(self) and not 0 <= self.prompt_N.min() <= self.prompt_N.max() < len(self.prompt_ids):
            raise ValueError(
                f"prompt_N must index the {len(self.prompt_ids)} prompts of prompt_ids, got values "
                f"from {self.prompt_N.min()} to {self.prompt_N.max()}"
            )


Batch = TypeVar("Batch", bound=Rollouts)


def concatenate(
    batches: Sequence[Batch], *, offsets: Sequence[int] | None = None, pad_id: int = 0
) -> Batch:
    """The rows of several batches, one after the other, as one batch.

    Args:
        batches: at least one, all of one class and one `version`. A column is None in all or in
            none. Shorter batches are padded to the longest T with False, 0 and `pad_id`.
        offsets: added to each batch's `prompt_N`. None where the batches hold rollouts of one
            shared list of prompts (two rounds of one step). Token rollouts carry their prompts,
            and these are chained, so there the offsets are the running totals: 0, the number
            of prompts of the first batch, and so on.
        pad_id: token id written where a batch is lengthened; the mask is False there.

    Raises:
        ValueError: if the batches do not fit together.
    """
    if not batches:
        raise ValueError("concatenate needs at least one batch, got none")
    first = batches[0]
    if len({type(batch) for batch in batches}) > 1:
        raise ValueError(f"batches must be of one class, got {[type(b).__name__ for b in batches]}")
    if len({batch.version for batch in batches}) > 1:
        raise ValueError(f"batches must be of one version, got {[b.version for b in batches]}")
    if offsets is not None and len(offsets) != len(batches):
        raise ValueError(f"offsets has {len(offsets)} entries for {len(batches)} batches")

    columns: dict[str, Any] = {}
    num_steps = max(batch.mask_NT.shape[1] for batch in batches)
    for field in fields(first):
        values: list[Any] = [getattr(batch, field.name) for batch in batches]
        if not any(isinstance(value, Tensor) for value in values):
            continue
        if any(value is None for value in values):
            raise ValueError(f"{field.name} is set in some batches and None in others")
        if field.name.endswith("_NT"):
            fill = pad_id if field.name == "token_NT" else 0
            values = [pad(value, (0, num_steps - value.shape[1]), value=fill) for value in values]
        if field.name == "prompt_N" and offsets is not None:
            values = [value + offset for value, offset in zip(values, offsets, strict=True)]
        columns[field.name] = torch.cat(values)

    if isinstance(first, TokenRollouts):
        columns["prompt_ids"] = _joined_prompts(batches, offsets)
    return replace(first, **columns)


def _joined_prompts(
    batches: Sequence[Any], offsets: Sequence[int] | None
) -> tuple[tuple[int, ...], ...]:
    first = batches[0].prompt_ids
    if offsets is None:
        if any(batch.prompt_ids != first for batch in batches):
            raise ValueError("batches of different prompts need offsets for their prompt_N")
        return first
    joined: tuple[tuple[int, ...], ...] = ()
    for batch, offset in zip(batches, offsets, strict=True):
        if offset != len(joined):
            raise ValueError(
                f"offsets must be the running totals of the prompt lists, got {list(offsets)} "
                f"for lists of {[len(b.prompt_ids) for b in batches]} prompts"
            )
        joined += batch.prompt_ids
    return joined
