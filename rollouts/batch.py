"""Batches of rollouts.

Axes: N rollouts, K rows kept, T decision steps (tokens, or denoising steps), S = T + 1 states of a
denoising chain, M distinct states of a tree, P prompts, F reward functions.

A batch is immutable: later stages add a column with `dataclasses.replace`. Engines put every
tensor on the CPU; only micro-batches travel to the accelerator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from rollouts.step_plan import StepPlan

Condition = Tensor | list[Tensor]
"""Conditions of P prompts: (P, ...), or a list of P tensors whose lengths may differ."""


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
            is not 0 off the mask or not finite on it (for a token, NaN says that it is not known).
    """

    prompt_N: Tensor
    """(N,) int64: row of the prompt in this batch. Rows of one prompt need not be adjacent."""
    mask_NT: Tensor
    """(N, T) bool: True where the policy made the decision; False on padding and tool output."""
    logprob_NT: Tensor
    """(N, T) float, nats, under the policy that sampled; exactly 0 where the mask is False, and NaN
    at tokens of which an engine could not say it."""
    version: int
    """Optimizer steps the sampling policy had taken."""
    reward_N: Tensor | None = None
    """(N,) float64; None until scored."""
    success_N: Tensor | None = None
    """(N,) float64 in [0, 1], 1 for a pass: how the reward is read where success counts; None until
    observed."""
    reward_NF: Tensor | None = None
    """(N, F) float64: what each of F reward functions gave by itself, NaN where it gave none; None
    until scored."""
    advantage_N: Tensor | None = None
    """(N,) float; None until compared with its peers."""
    advantage_NT: Tensor | None = None
    """(N, T) float: credit of each decision, where it differs along a rollout (trees of denoising
    steps); None: `advantage_N` counts at every decision."""
    stratum_N: Tensor | None = None
    """(N,) int64: peers within the prompt, such as the number of tool calls; None: all are."""
    weight_NT: Tensor | None = None
    """(N, T) float: how much each decision counts in the loss; None until weighed."""
    kl_weight_NT: Tensor | None = None
    """(N, T) float: the same for the KL to a reference; None: as in the loss."""
    bonus_NT: Tensor | None = None
    """(N, T) bool: decisions whose entropy the loss rewards; None: none."""
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
            functions = (value.shape[-1],)
            further = {"NT": (num_steps,), "NS": (num_steps + 1,), "NF": functions}.get(axes, ())
            expected = (num_rollouts, *further)
            if tuple(value.shape) != expected:
                raise ValueError(
                    f"{field.name} has shape {tuple(value.shape)}, expected {expected} "
                    f"to match mask_NT"
                )
        if self.logprob_NT[~self.mask_NT].any():
            raise ValueError("logprob_NT must be 0 wherever mask_NT is False")
        known_NT = self.logprob_NT
        if isinstance(self, TokenRollouts):  # of an engine that could not say
            known_NT = known_NT.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
        finite_N = known_NT.isfinite().all(dim=1)
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

    @property
    def size(self) -> tuple[int, int]:
        """Number of rollouts, and of tokens (or denoising steps) that were computed for them."""
        return len(self), int(self.length_N.sum())

    @property
    def sibling_N(self) -> Tensor:
        """(N,) int64: rows with one number train in one update; here every row by itself."""
        return torch.arange(len(self))

    @property
    def elements(self) -> int:
        """Number of values that the log-probability of one decision is a sum over; 1 for a token."""
        return 1

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
    decided_N: Tensor | None = None
    """(N,) bool: True where a verdict ended the rollout, whose reward does not depend on what would
    have followed (`rollouts.rewards.verdicts`); such a row is not truncated. None: without verdicts."""

    def __post_init__(self) -> None:
        # slots=True rebuilds the class, which breaks super() without arguments.
        Rollouts.__post_init__(self)
        for name, dtype in (
            ("token_NT", torch.int64),
            ("truncated_N", torch.bool),
            ("seed_N", torch.int64),
            ("decided_N", torch.bool),
        ):
            column = getattr(self, name)
            if column is not None and column.dtype != dtype:
                raise ValueError(f"{name} must be {dtype}, got {column.dtype}")
        if len(self) and not 0 <= self.prompt_N.min() <= self.prompt_N.max() < len(self.prompt_ids):
            raise ValueError(
                f"prompt_N must index the {len(self.prompt_ids)} prompts of prompt_ids, got values "
                f"from {self.prompt_N.min()} to {self.prompt_N.max()}"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class StateTree:
    """The latents of a batch of denoising chains, each distinct one once.

    A state is a latent before edge 0 .. T-1, or at T a finished sample. Rollouts that branched late
    share their earlier states. Batches made by `take` share the tree.

    Raises:
        ValueError: if a column has another length or type than stated, or a parent does not stand one
            step before its child.
    """

    latent_M: Tensor
    """(M, ...) in the type the pipeline passed on, on the CPU."""
    parent_M: Tensor
    """(M,) int64: the state before; -1 at roots. Parents stand before their children."""
    step_M: Tensor
    """(M,) int64, 0 .. T: edges taken so far; pure noise has 0."""
    leaves_M: Tensor
    """(M,) int64: finished samples below, when generated; a finished sample has 1."""
    prompt_M: Tensor
    """(M,) int64: row of the prompt in `conditions`."""
    levels: Tensor
    """(T, 4) float64: alpha, sigma, alpha', sigma' of every edge, as sampled. Recorded, because sigma
    rebuilt from a timestep drifts."""
    timesteps: Tensor
    """(T,) as the scheduler made them."""
    plan: StepPlan
    """Where noise was drawn, and where the tree branches."""
    conditions: Mapping[str, Condition]
    """(P, ...) each, or a list of P tensors of different lengths: the pipeline's conditions of every
    prompt, by the name of its argument."""

    def __post_init__(self) -> None:
        num_states = len(self.latent_M)
        for name in ("parent_M", "step_M", "leaves_M", "prompt_M"):
            value = getattr(self, name)
            if value.dtype != torch.int64 or tuple(value.shape) != (num_states,):
                raise ValueError(
                    f"{name} must be int64 of shape ({num_states},) to match latent_M, got "
                    f"{value.dtype} of shape {tuple(value.shape)}"
                )
        num_steps = self.plan.num_steps
        if tuple(self.levels.shape) != (num_steps, 4) or len(self.timesteps) != num_steps:
            raise ValueError(
                f"levels and timesteps must have {num_steps} rows, one for each step of the plan, got "
                f"shapes {tuple(self.levels.shape)} and {tuple(self.timesteps.shape)}"
            )
        child_M = self.parent_M >= 0
        before_M = self.step_M[self.parent_M.clamp(min=0)] if num_states else self.step_M
        if not torch.equal(self.step_M, torch.where(child_M, before_M + 1, 0)):
            raise ValueError("a state must stand one step after its parent, and a root at step 0")
        if num_states and self.step_M.max() > num_steps:
            raise ValueError(
                f"states lie at steps 0 to {self.step_M.max()}, but the plan has {num_steps} steps"
            )

    def __len__(self) -> int:
        return len(self.parent_M)


def rows_of(conditions: Mapping[str, Condition], index_N: Tensor) -> dict[str, Condition]:
    """The conditions of the prompts `index_N`, in that order."""
    return {
        name: [value[i] for i in index_N.tolist()] if isinstance(value, list) else value[index_N]
        for name, value in conditions.items()
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class DenoisingRollouts(Rollouts):
    """Rollouts of a diffusion model: a decision is one denoising step, a row one finished sample.

    The mask is True on edges that drew noise. `logprob_NT` is float64: summed over the elements of a
    latent, at magnitude 4e4, float32 is spaced by .004 nats.

    Example, one root with two children at its second and last edge. States 0 and 1 are shared::

        DenoisingRollouts(
            prompt_N=torch.tensor([0, 0]),
            mask_NT=torch.tensor([[False, True], [False, True]]),
            logprob_NT=torch.tensor([[0.0, -3.1], [0.0, -2.8]], dtype=torch.float64),
            version=12,
            branch_N=torch.tensor([0, 0]),
            node_NS=torch.tensor([[0, 1, 2], [0, 1, 3]]),
            seed_N=torch.tensor([11, 12]),
            tree=tree,  # step_M 0, 1, 2, 2 and parent_M -1, 0, 1, 1
        )
    """

    branch_N: Tensor
    """(N,) int64: rows of one branch come from one root, and share its states up to the first split."""
    node_NS: Tensor
    """(N, S) int64: the states of each row, from noise to sample, in `tree`."""
    seed_N: Tensor
    """(N,) int64: the seeds of a root's rows, with the prompt and the policy, determine them."""
    tree: StateTree
    """The latents; not a column, `take` shares it."""

    @property
    def size(self) -> tuple[int, int]:
        """Number of samples, and of all their denoising steps: a step without noise costs the same."""
        return len(self), self.mask_NT.numel()

    @property
    def sibling_N(self) -> Tensor:
        """(N,) int64: the rows of a branch, which share evaluations, train in one update."""
        return self.branch_N

    @property
    def elements(self) -> int:
        """Number of values in a latent."""
        return self.tree.latent_M[0].numel()

    def __post_init__(self) -> None:
        Rollouts.__post_init__(self)
        for name in ("branch_N", "node_NS", "seed_N"):
            if getattr(self, name).dtype != torch.int64:
                raise ValueError(f"{name} must be int64, got {getattr(self, name).dtype}")
        if self.logprob_NT.dtype != torch.float64:
            raise ValueError(f"logprob_NT must be float64, got {self.logprob_NT.dtype}")
        num_steps = self.tree.plan.num_steps
        if self.mask_NT.shape[1] != num_steps:
            raise ValueError(
                f"mask_NT has {self.mask_NT.shape[1]} steps, the plan of the tree {num_steps}"
            )
        if len(self) and not 0 <= self.node_NS.min() <= self.node_NS.max() < len(self.tree):
            raise ValueError(
                f"node_NS must index the {len(self.tree)} states of the tree, got values from "
                f"{self.node_NS.min()} to {self.node_NS.max()}"
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
            shared list of prompts (two rounds of one step). Token and denoising rollouts carry
            their prompts, and these are chained, so there the offsets are the running totals: 0,
            the number of prompts of the first batch, and so on. Branches of different batches
            stay different branches, and trees must be of one plan and table.
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
    if isinstance(first, DenoisingRollouts):
        columns |= _joined_trees(batches, offsets)
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


def _joined_trees(batches: Sequence[Any], offsets: Sequence[int] | None) -> dict[str, Any]:
    """The columns that refer to trees, and the trees one after the other."""
    trees = [batch.tree for batch in batches]
    first = trees[0]
    if offsets is None and all(tree is first for tree in trees):
        return {}  # parts of one batch
    for tree in trees:
        for name, same in (
            ("plan", tree.plan == first.plan),
            ("levels", torch.equal(tree.levels, first.levels)),
            ("timesteps", torch.equal(tree.timesteps, first.timesteps)),
            ("names of conditions", set(tree.conditions) == set(first.conditions)),
        ):
            if not same:
                raise ValueError(f"trees of one batch must have one {name}")
    if offsets is None:
        for name, value in first.conditions.items():
            if not all(_same(tree.conditions[name], value) for tree in trees):
                raise ValueError("batches of different prompts need offsets for their prompt_N")
        shifts, conditions = [0] * len(trees), first.conditions
    else:
        counts = [len(next(iter(tree.conditions.values()), ())) for tree in trees]
        totals = [sum(counts[:i]) for i in range(len(counts))]
        if list(offsets) != totals:
            raise ValueError(
                f"offsets must be the running totals of the prompt lists, got {list(offsets)} for "
                f"conditions of {counts} prompts"
            )
        shifts = totals
        conditions = {
            name: _joined([t.conditions[name] for t in trees]) for name in first.conditions
        }

    states = [sum(len(tree) for tree in trees[:i]) for i in range(len(trees))]
    branches, next_branch = [], 0
    for batch in batches:
        branches.append(batch.branch_N + next_branch)
        if len(batch):
            next_branch = int(branches[-1].max()) + 1
    joined = StateTree(
        latent_M=torch.cat([tree.latent_M for tree in trees]),
        parent_M=torch.cat(
            [
                tree.parent_M.where(tree.parent_M < 0, tree.parent_M + start)
                for tree, start in zip(trees, states, strict=True)
            ]
        ),
        step_M=torch.cat([tree.step_M for tree in trees]),
        leaves_M=torch.cat([tree.leaves_M for tree in trees]),
        prompt_M=torch.cat([t.prompt_M + shift for t, shift in zip(trees, shifts, strict=True)]),
        levels=first.levels,
        timesteps=first.timesteps,
        plan=first.plan,
        conditions=conditions,
    )
    nodes = [batch.node_NS + start for batch, start in zip(batches, states, strict=True)]
    return {"tree": joined, "node_NS": torch.cat(nodes), "branch_N": torch.cat(branches)}


def _same(one: Condition, other: Condition) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(torch.equal, one, other))
    return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)


def _joined(values: Sequence[Condition]) -> Condition:
    if all(isinstance(value, list) for value in values):
        return [row for value in values for row in value]
    return torch.cat([value for value in values if isinstance(value, Tensor)])
