"""One training step, the map of the project: `collect` decides and gathers, `update` learns.

    propose -> roll out -> reward -> observe everything (-> second round) -> advantages -> row weights
    -> rows without signal leave -> deal to ranks -> micro-batches -> loss -> backward

Axes: P prompts, N rollouts (flat rows), K rows kept, T tokens.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from rl import metrics, step_weights
from rl.line import Batch, Line
from rl.logprobs import completion_logprobs
from rl.roll_out import Request, Scored, roll_out
from rollouts.batch import TokenRollouts, concatenate
from rollouts.prompts import Prompt
from samplers.planner import Proposal


def size(rollouts: TokenRollouts) -> tuple[int, int]:
    """Rollouts and tokens, as the ledger counts them."""
    return len(rollouts), int(rollouts.length_N.sum())


def collect(line: Line, *, version: int) -> Batch:
    """Decide where this step's rollouts go, make them, observe them all, and weigh them."""
    line.ledger.begin(version)
    proposals: list[Proposal] = []
    rounds: list[Scored] = []
    while not proposals or not proposals[-1].is_last:
        proposal = line.planner.propose()
        prompts = [line.prompts[i] for i in proposal.index_P]
        request = Request(prompts=prompts, budget_P=proposal.budget_P, seed_N=proposal.seed_N)
        scored = roll_out(line, request, line.sampling, version=version)
        rollouts = scored.rollouts
        line.ledger.drawn(*size(rollouts))
        if scored.failed is not None:
            line.ledger.drawn(*size(scored.failed))
            line.ledger.account("failed", *size(scored.failed))
        line.planner.observe(proposal, scored.reward_N.numpy(), rollouts.prompt_N.numpy())
        proposals.append(proposal)
        rounds.append(scored)
    return weigh(line, prompts, proposals, rounds)


def weigh(
    line: Line, prompts: list[Prompt], proposals: list[Proposal], rounds: list[Scored]
) -> Batch:
    """Advantages and objective weights on full groups; rows without signal leave, accounted for."""
    config = line.config
    training = rounds
    if config.pilot_use == "discard" and len(rounds) > 1:
        line.ledger.account("filtered", *size(rounds[0].rollouts), reason="pilot")
        training = rounds[1:]
    rollouts = concatenate([scored.rollouts for scored in training])
    rollouts = rollouts.take(rollouts.prompt_N.argsort(stable=True))
    reward_N, prompt_N, length_N = rollouts.reward_N, rollouts.prompt_N, rollouts.length_N
    assert reward_N is not None
    advantage_N = line.advantage(reward_N, prompt_N)
    weight_N = step_weights.objective_weight(
        line.objective,
        reward_N,
        prompt_N,
        num_prompts=len(prompts),
        pass_rate_P=torch.tensor(proposals[0].pass_rate_P),
        floor=config.log_floor,
    )
    denominator = 1.0  # of an empty sum, where every reward failed
    if len(rollouts):
        denominator = step_weights.denominator(
            line.objective,
            line.length_weight,
            num_prompts=len(prompts),
            num_rollouts=len(rollouts),
            row_weight_N=weight_N,
            length_N=length_N,
        )
    signal_N = (advantage_N * weight_N != 0) & (length_N > 0)
    for p in prompt_N[~signal_N].unique().tolist():
        reason: str = line.planner.admit(reward_N[prompt_N == p].numpy()).reason
        dropped = rollouts.take((~signal_N & (prompt_N == p)).nonzero().flatten())
        reason = "no_advantage" if reason == "mixed" else reason
        line.ledger.account("filtered", *size(dropped), reason=reason)
    kept = replace(rollouts, advantage_N=advantage_N).take(signal_N.nonzero().flatten())
    line.ledger.account("trained", *size(kept))
    return Batch(
        rollouts=kept,
        weight_K=weight_N[signal_N],
        denominator=denominator,
        prompts=prompts,
        proposals=proposals,
        scored=rounds,
        metrics=metrics.of_rollouts(rounds, kept, num_prompts=len(prompts)),
    )


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
