"""One training step, the map of the project: `collect` decides and gathers, `update` learns.

    propose -> roll out -> reward -> observe everything (-> more rounds, prompts)   rl/stages/draw.py
    -> advantages -> down-sample -> row weights -> rows without signal leave       rl/stages/weigh.py
    -> entropies, reference, token weights                                       rl/stages/prepare.py
    -> deal to ranks -> micro-batches -> loss -> backward

Axes: P prompts, N rollouts (flat rows), K rows kept, T tokens.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from rl.policies.contract import Policy
from rl.ranks import Ranks
from rl.stages import metrics
from rl.stages.draw import Sampling
from rl.stages.fidelity import Fidelity
from rl.stages.objective import Objective
from rl.stages.records import Batch
from rl.stages.weigh import weigh
from rollouts.batch import Rollouts


def collect(
    sampling: Sampling, policy: Policy, objective: Objective, ranks: Ranks, *, version: int
) -> Batch:
    """Decide where this step's rollouts go, make them, observe them all, and weigh them.

    Args:
        sampling: decides which prompts, and how many rollouts of each.
        policy: generates and rewards.
        objective: compares the rollouts and chooses those that train.
        ranks: the processes.
        version: optimizer steps taken.
    """
    sampling.ledger.begin(version)
    groups, visits = sampling.draw(policy, version=version)
    policy.rest()
    return weigh(
        groups,
        visits,
        objective,
        policy,
        ranks,
        progress=sampling.progress(version),
        ledger=sampling.ledger,
    )


def update(
    batch: Batch,
    objective: Objective,
    policy: Policy,
    ranks: Ranks,
    model: torch.nn.Module,
    *,
    fidelity: Fidelity,
    step_optimizer: Callable[[], None],
) -> tuple[torch.Tensor, dict[str, float]]:
    """Learn from `batch`; the last optimizer step, clipping included, is left to the caller.

    Micro-batches, ranks and their number change nothing but speed: the denominator is global. A rank
    without rows takes part with a row of weight 0.
    """
    rollouts = batch.rollouts
    total = torch.zeros((), device=next(model.parameters()).device)
    sums: dict[str, float] = {}
    differs: dict[str, float] = {}
    parts = mini_batches(batch, objective)
    share = len(parts) // objective.config.num_iterations
    for number, part_K in enumerate(parts):
        mine = part_K[ranks.rows_to_train(rollouts.length_N[part_K])]
        micro = policy.cut(rollouts.take(mine))
        num_micro = ranks.most(len(micro))
        for i in range(num_micro):
            is_last = i == num_micro - 1
            rows = (micro[i] if i < len(micro) else rollouts.take(part_K[:1])).to(total.device)
            if i >= len(micro):
                rows = _without_weight(rows)
            with ranks.micro_batch(model, is_last=is_last):
                scored = policy.score(model, rows, entropy=bool(objective.config.entropy_coef))
                loss, statistics = objective.loss(batch, rows, scored, share=share)
                with ranks.until_gather():
                    metrics.require_finite(loss, scored.logprob_NT, rows, batch.prompts)
                if number == 0:  # before any update, which DeepSpeed makes at the end of backward
                    fresh_N = fidelity.fresh(batch, rows)
                    metrics.add(differs, metrics.mismatch(scored.logprob_NT, rows, fresh_N))
                    if is_last:
                        fidelity.require(model, batch, differs)
                ranks.backward(model, loss, is_last=is_last)
            total += loss.detach() * ranks.num / len(parts)
            metrics.add(sums, statistics)
        if number < len(parts) - 1:
            step_optimizer()
    return total, metrics.of_update(ranks.sums(sums | differs))


def mini_batches(batch: Batch, objective: Objective) -> list[torch.Tensor]:
    """Rows of each optimizer update: every row once per iteration, spread over its updates."""
    # Siblings of a branch train together: one evaluation serves them. Branches are counted as they
    # come, because their numbers depend on the processes that made them.
    unit_K = batch.rollouts.sibling_N.tolist()
    place = {unit: number for number, unit in enumerate(dict.fromkeys(unit_K))}
    updates = min(objective.config.updates_per_step, len(place))
    turn_K = torch.tensor([place[unit] % updates for unit in unit_K], dtype=torch.int64)
    parts = [(turn_K == number).nonzero().flatten() for number in range(updates)]
    return parts * objective.config.num_iterations


def _without_weight(rows: Rollouts) -> Rollouts:
    """`rows` that take part in a micro-batch and count nowhere in its loss."""

    def zero(column: torch.Tensor | None) -> torch.Tensor | None:
        return None if column is None else torch.zeros_like(column)

    return replace(
        rows,
        weight_NT=zero(rows.weight_NT),
        kl_weight_NT=zero(rows.kl_weight_NT),
        bonus_NT=zero(rows.bonus_NT),
    )
