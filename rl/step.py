"""One training step, the map of the project: `collect` decides and gathers, `update` learns.

    propose -> roll out -> reward -> observe everything (-> more rounds, more waves)     rl/waves.py
    -> advantages -> down-sample -> row weights -> rows without signal leave             rl/weigh.py
    -> deal to ranks -> micro-batches -> loss -> backward

Axes: P prompts, N rollouts (flat rows), K rows kept, T tokens.
"""

from collections.abc import Callable

import torch

from rl import metrics, step_weights
from rl.line import Batch, Line
from rl.logprobs import completion_logprobs
from rl.waves import groups_of, roll_out_wave
from rl.weigh import weigh


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
    return weigh(line, groups, waves, progress=min(version / line.config.max_steps, 1.0))


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
    num_updates = min(config.updates_per_step, len(rollouts))
    for number in range(num_updates):
        part_K = torch.arange(number, len(rollouts), num_updates)
        mine = part_K[ranks.rows_to_train(rollouts.length_N[part_K])]
        micro = mine.split(config.per_device_train_batch_size) if len(mine) else ()
        num_micro = ranks.most(len(micro))
        for i in range(num_micro):
            rows = micro[i] if i < len(micro) else part_K[:1]
            weight_N = batch.weight_K[rows] if i < len(micro) else batch.weight_K[rows] * 0
            rows_of = rollouts.take(rows).to(total.device)
            with ranks.micro_batch(model, is_last=i == num_micro - 1):
                logprob_NT = completion_logprobs(
                    model,
                    rows_of,
                    temperature=config.temperature,
                    pad_id=line.tokenizer.pad_token_id,
                )
                loss, statistics = line.loss(
                    logprob_NT,
                    rows_of.logprob_NT,
                    rows_of.advantage_N,
                    step_weights.token_weight(
                        line.length_weight,
                        weight_N.to(total.device),
                        rows_of.mask_NT,
                        max_completion_length=config.max_completion_length,
                    ),
                    denominator=batch.denominator / num_updates,
                )
                metrics.require_finite(loss, logprob_NT, rows_of, batch.prompts)
                ranks.backward(model, loss, is_last=i == num_micro - 1)
            total += loss.detach() * ranks.num / num_updates
            metrics.add(sums, statistics)
        if number < num_updates - 1:
            step_optimizer()
    return total, metrics.of_update(ranks.sums(sums))
