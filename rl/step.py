"""One training step, the map of the project: `collect` decides and gathers, `update` learns.

    propose -> roll out -> reward -> observe everything (-> more rounds, more waves)   rl/stages/draw.py
    -> advantages -> down-sample -> row weights -> rows without signal leave           rl/stages/weigh.py
    -> entropies, reference, token weights                                         rl/stages/prepare.py
    -> deal to ranks -> micro-batches -> loss -> backward

Axes: P prompts, N rollouts (flat rows), K rows kept, T tokens.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from rl.stages import fidelity, metrics
from rl.stages.draw import groups_of, roll_out_wave
from rl.stages.line import Batch, Line
from rl.stages.weigh import weigh
from rollouts.batch import Rollouts


def collect(line: Line, *, version: int) -> Batch:
    """Decide where this step's rollouts go, make them, observe them all, and weigh them.

    Waves are rolled out until enough groups are mixed, where the line has a buffer; else one is.
    """
    line.ledger.begin(version)
    if line.buffer is not None:
        groups, waves = line.buffer.collect(line, version=version)
    else:
        waves = [roll_out_wave(line, version=version)]
        groups = groups_of(line, waves[0])
    line.rest()
    return weigh(line, groups, waves, progress=line.progress(version))


def update(
    line: Line, model: torch.nn.Module, batch: Batch, *, step_optimizer: Callable[[], None]
) -> tuple[torch.Tensor, dict[str, float]]:
    """Learn from `batch`; the last optimizer step, clipping included, is left to the caller.

    Micro-batches, ranks and their number change nothing but speed: the denominator is global. A rank
    without rows takes part with a row of weight 0.
    """
    config, ranks, rollouts = line.config, line.ranks, batch.rollouts
    total = torch.zeros((), device=next(model.parameters()).device)
    sums: dict[str, float] = {}
    differs: dict[str, float] = {}
    parts = mini_batches(line, batch)
    share = len(parts) // config.num_iterations
    for number, part_K in enumerate(parts):
        mine = part_K[ranks.rows_to_train(rollouts.length_N[part_K])]
        micro = line.cut(rollouts.take(mine))
        num_micro = ranks.most(len(micro))
        for i in range(num_micro):
            rows = (micro[i] if i < len(micro) else rollouts.take(part_K[:1])).to(total.device)
            if i >= len(micro):
                rows = _of_no_weight(rows)
            with ranks.micro_batch(model, is_last=i == num_micro - 1):
                entropy_NT = None
                if config.entropy_coef:
                    scored = line.score.statistics(model, rows, differentiable=True)
                    logprob_NT, entropy_NT = scored.logprob_NT, scored.entropy_NT
                else:
                    logprob_NT = line.score.logprobs(model, rows)
                loss, statistics = loss_of(
                    line, batch, rows, logprob_NT, share=share, entropy_NT=entropy_NT
                )
                with ranks.until_gather():
                    metrics.require_finite(loss, logprob_NT, rows, batch.prompts)
                if number == 0:  # before any update, which DeepSpeed makes at the end of backward
                    fresh_N = fidelity.fresh(line, batch, rows)
                    metrics.add(differs, metrics.mismatch(logprob_NT, rows, fresh_N))
                    if i == num_micro - 1:
                        fidelity.require(line, model, batch, differs)
                ranks.backward(model, loss, is_last=i == num_micro - 1)
            total += loss.detach() * ranks.num / len(parts)
            metrics.add(sums, statistics)
        if number < len(parts) - 1:
            step_optimizer()
    return total, metrics.of_update(ranks.sums(sums | differs))


def mini_batches(line: Line, batch: Batch) -> list[torch.Tensor]:
    """Rows of each optimizer update: every row once per iteration, spread over its updates."""
    # Siblings of a branch train together: one evaluation serves them. Branches are counted as they
    # come, because their numbers depend on the processes that made them.
    unit_K = getattr(batch.rollouts, "branch_N", torch.arange(len(batch.rollouts))).tolist()
    place = {unit: number for number, unit in enumerate(dict.fromkeys(unit_K))}
    updates = min(line.config.updates_per_step, len(place))
    turn_K = torch.tensor([place[unit] % updates for unit in unit_K], dtype=torch.int64)
    parts = [(turn_K == number).nonzero().flatten() for number in range(updates)]
    return parts * line.config.num_iterations


def _of_no_weight(rows: Rollouts) -> Rollouts:
    """`rows` that take part in a micro-batch and count nowhere in its loss."""
    names = ("weight_NT", "kl_weight_NT", "bonus_NT")
    columns: dict[str, Any] = {
        name: torch.zeros_like(column)
        for name in names
        if (column := getattr(rows, name)) is not None
    }
    return replace(rows, **columns)


def loss_of(
    line: Line,
    batch: Batch,
    rows: Rollouts,
    logprob_NT: torch.Tensor,
    *,
    share: int,
    entropy_NT: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The policy's loss of some rows, and beta times their KL to the reference policy.

    The KL covers the decisions that train, with the weights of the loss and over their own sum. Each
    of `share` updates takes that part of the denominators, as it has that part of the rows. With
    entropies, `entropy_coef` times their mean over the decisions that earn a bonus is subtracted
    (TRL's `entropy_coef`, whose mean is over a micro-batch; here it is over the step).
    """
    assert rows.advantage_N is not None and rows.weight_NT is not None
    old_NT = rows.logprob_NT if rows.old_logprob_NT is None else rows.old_logprob_NT
    denominator = batch.denominator / share
    more = {name: getattr(rows, column) for name, column in line.loss_columns.items()}
    advantage = rows.advantage_N if rows.advantage_NT is None else rows.advantage_NT
    loss, statistics = line.loss(
        logprob_NT, old_NT, advantage, rows.weight_NT, denominator=denominator, **more
    )
    if line.kl is not None:
        kl, of_kl = line.kl(logprob_NT, rows, denominator=batch.kl_denominator / share)
        loss, statistics = loss + line.config.beta * kl, statistics | of_kl
    if entropy_NT is not None:
        assert rows.bonus_NT is not None
        total = torch.where(rows.bonus_NT, entropy_NT, 0.0).sum()
        loss = loss - line.config.entropy_coef * total / (batch.bonus_denominator / share)
        sums = {"entropy": total.detach(), "entropy_tokens": rows.bonus_NT.sum()}
        statistics = statistics | sums
    return loss, statistics
