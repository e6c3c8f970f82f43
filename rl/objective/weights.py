"""Step weights: which objective the batch ascends, and how much each decision counts in it.

A decision's weight is a row's weight, which names the objective and undoes unequal budgets, times
a length rule. Loss and gradient are  sum(weight_NT * surrogate_NT) / denominator,  and the first
three functions here give the row weight, the decision weight and the denominator that belong
together; the fourth adapts the last two where decisions were left out (`token_selection.py`):

    row_weight_N = objective_weight("mean", reward_N, prompt_N, num_prompts=P)
    weight_NT = token_weight("token_sum", row_weight_N, mask_NT, max_completion_length=1024)
    total = denominator("mean", "token_sum", num_prompts=P, num_rollouts=N,
                        row_weight_N=row_weight_N, length_N=mask_NT.sum(1))
    weight_NT, total = after_selection("kept_tokens", weight_NT, mask_NT, kept_NT, denominator=total)

All are computed once per optimizer step, over the rows of all processes and before micro-batches
are cut.

Where rows were dropped, n_p is a choice. `objective_weight` over the rows that reach the loss lets
every surviving prompt weigh the same. Over all rows drawn, and `take`n after, it multiplies a
prompt by the share of its rows that was kept: a prompt of which one row of eight is left then
counts an eighth of one that is whole.

Axes: N rollouts, P prompts of the step (those whose rollouts all fail included), T decision steps.
"""

import torch
from torch import Tensor

from rl.objective.advantages import raft

OBJECTIVES = ("mean", "log", "em", "flat")
"""What is ascended, whatever the budgets; see `objective_weight`."""

LENGTH_RULES = ("row_mean", "token_sum", "token_mean", "row_sum")
"""How a row's weight is spread over its decisions; see `token_weight`."""

DENOMINATORS = ("kept_tokens", "kept_row_tokens", "original_tokens", "kept_rows")
"""What the step is divided by once decisions were left out; see `after_selection`."""


def _check(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def objective_weight(
    objective: str,
    reward_N: Tensor,
    prompt_N: Tensor,
    *,
    num_prompts: int,
    pass_rate_P: Tensor | None = None,
    floor: float = 0.05,
) -> Tensor:
    """Weight of each row, such that budgets do not change what is ascended.

        mean   w = 1 / n_p                     ascends sum_p p       with `leave_one_out`
        log    w = u_p / n_p, u_p = 1 / max(pass_rate_p, floor)
                                               ascends sum_p u_p p   with `leave_one_out`
        em     w = 1 / R_p if accepted else 0  ascends sum_p log p   with `raft`
        flat   w = 1                           what the budgets make of it

    with n_p the prompt's rows and R_p its accepted rows (`raft` > 0). Except under `flat`, a prompt
    with more rollouts is known better but counts no more.

    `log` needs a pass rate known before these rollouts, such as a posterior mean of earlier steps:
    then its gradient is exact for the weights u_p. With p estimated from the same rows it would be
    a biased ratio estimator, which is why none is made here. `em` is the mean over accepted rows
    (Yao et al., 2025, arXiv:2505.02391, Algorithm 1); in expectation it carries a factor
    1 - (1 - p)^n, the chance that the prompt has an accepted row at all. `flat` is what the
    released code of that paper does; the prompt's weight is then proportional to n_p.

    Args:
        objective: one of the four names.
        reward_N: (N,) finite floating-point rewards of every scored row of the step; `em` accepts by
            them as `raft` does, so graded ones are given as successes in [0, 1].
        prompt_N: (N,) int64 positions of the rows' prompts, in 0 .. num_prompts - 1.
        num_prompts: prompts of the step, those without a scored row included.
        pass_rate_P: (num_prompts,) pass rates in [0, 1], known before the rollouts; `log` requires
            it, the others ignore it.
        floor: smallest pass rate that u_p is computed from, in (0, 1]; a project default, not
            from a paper.

    Returns:
        (N,) weights >= 0 in the dtype of `reward_N`. A prompt without rows has no weight, but
        stays in `denominator`; so does, under `em`, a prompt with no accepted row.

    Raises:
        ValueError: for an unknown objective, a position out of range, a missing or impossible pass
            rate, or rewards that `advantages.raft` refuses.
    """
    _check("objective", objective, OBJECTIVES)
    accepted_N = raft(reward_N, prompt_N) > 0
    if ((prompt_N < 0) | (prompt_N >= num_prompts)).any():
        raise ValueError(
            f"prompt_N must lie in 0 .. {num_prompts - 1}, "
            f"got {int(prompt_N.min())} .. {int(prompt_N.max())}"
        )
    if objective == "flat":
        return torch.ones_like(reward_N)
    counted_N = accepted_N if objective == "em" else torch.ones_like(accepted_N)
    count_P = torch.zeros(num_prompts, dtype=torch.float64, device=reward_N.device)
    count_P = count_P.index_add(0, prompt_N, counted_N.double())
    weight_N = torch.where(counted_N, 1.0 / count_P[prompt_N], 0.0)
    if objective == "log":
        weight_N = weight_N / _floored(pass_rate_P, num_prompts, floor).to(weight_N)[prompt_N]
    return weight_N.to(reward_N.dtype)


def _floored(pass_rate_P: Tensor | None, num_prompts: int, floor: float) -> Tensor:
    if pass_rate_P is None:
        raise ValueError(
            "the log objective needs pass_rate_P, a pass rate per prompt known before the rollouts"
        )
    if tuple(pass_rate_P.shape) != (num_prompts,):
        raise ValueError(
            f"pass_rate_P must have shape ({num_prompts},), got {tuple(pass_rate_P.shape)}"
        )
    if not ((pass_rate_P >= 0) & (pass_rate_P <= 1)).all():
        raise ValueError(f"pass_rate_P must lie in [0, 1], got {pass_rate_P.tolist()}")
    if not 0 < floor <= 1:
        raise ValueError(f"floor must be in (0, 1], got {floor}")
    return pass_rate_P.double().clamp(min=floor)


def token_weight(
    kind: str, row_weight_N: Tensor, mask_NT: Tensor, *, max_completion_length: int
) -> Tensor:
    """Spread each row's weight over its decisions.

        row_mean    w_i / L_i                    every row counts alike, its decisions by 1/length
        token_sum   w_i / max_completion_length  the row's log-probability, over a constant
        token_mean  w_i                          every decision counts alike (over their number)
        row_sum     w_i                          the row's sum (over prompts or rows, as row_mean)

    with L_i the decisions of row i. Only `token_sum` and `row_sum` leave the policy gradient of the
    row's whole log-probability; the other two favour short or long rows. They differ by the
    constant: `row_sum` has none, so that steps grow with the length of the rows. It is what losses
    with one ratio per row use to weigh rows by their length. (row_mean: GRPO, arXiv:2402.03300;
    token_mean: DAPO, arXiv:2503.14476; token_sum: Dr.GRPO, arXiv:2503.20783; row_sum: LUSPO,
    arXiv:2602.05261.)

    Args:
        kind: one of the four names.
        row_weight_N: (N,) weights of `objective_weight`.
        mask_NT: (N, T) bool, True where the policy made the decision.
        max_completion_length: the generation limit; only `token_sum` uses it.

    Returns:
        (N, T) in the dtype of `row_weight_N`; exactly 0 where the mask is False, so a row without
        decisions has no weight anywhere.

    Raises:
        ValueError: for an unknown rule, misaligned arguments or a limit below 1.
    """
    _check("kind", kind, LENGTH_RULES)
    if mask_NT.dtype != torch.bool or mask_NT.ndim != 2 or len(mask_NT) != len(row_weight_N):
        raise ValueError(
            f"mask_NT must be bool of shape ({len(row_weight_N)}, T), "
            f"got {mask_NT.dtype} of shape {tuple(mask_NT.shape)}"
        )
    if max_completion_length < 1:
        raise ValueError(f"max_completion_length must be at least 1, got {max_completion_length}")
    if kind == "row_mean":
        row_weight_N = row_weight_N / mask_NT.sum(1).clamp(min=1)
    elif kind == "token_sum":
        row_weight_N = row_weight_N / max_completion_length
    return torch.where(mask_NT, row_weight_N[:, None], 0.0)


def denominator(
    objective: str,
    kind: str,
    *,
    num_prompts: int,
    num_rollouts: int,
    row_weight_N: Tensor,
    length_N: Tensor,
) -> float:
    """The number that the weighted sum over the whole step is divided by.

        row_mean, token_sum, row_sum   num_prompts under mean, log and em; num_rollouts under flat
        token_mean                     sum_i w_i L_i over all rows of the step

    The prompts include those that yield no gradient (all pass, all fail, nothing scored), so that
    the size of a step does not depend on how many prompts happened to be informative; that is a
    project default, not from a paper.

    Args:
        objective: as given to `objective_weight`.
        kind: as given to `token_weight`.
        num_prompts: prompts of the step.
        num_rollouts: scored rows of the step, over all processes and before any are dropped.
        row_weight_N: (num_rollouts,) weights of all those rows.
        length_N: (num_rollouts,) decisions of all those rows; 0 for a row that is masked, which still
            counts where rows or prompts are counted.

    Returns:
        A positive float. Where no decision has any weight under `token_mean` the sum to be divided
        is an empty one, and the denominator is 1 rather than 0.

    Raises:
        ValueError: for an unknown name, misaligned arguments or a count below 1.
    """
    _check("objective", objective, OBJECTIVES)
    _check("kind", kind, LENGTH_RULES)
    if num_prompts < 1 or num_rollouts < 1:
        raise ValueError(
            f"num_prompts and num_rollouts must be at least 1, got {num_prompts} and {num_rollouts}"
        )
    if not tuple(row_weight_N.shape) == tuple(length_N.shape) == (num_rollouts,):
        raise ValueError(
            f"row_weight_N and length_N must cover all {num_rollouts} rollouts of the step, "
            f"got shapes {tuple(row_weight_N.shape)} and {tuple(length_N.shape)}"
        )
    if kind == "token_mean":
        total = float((row_weight_N.double() * length_N.double()).sum())
        return total if total > 0 else 1.0
    return float(num_rollouts if objective == "flat" else num_prompts)


def after_selection(
    name: str,
    weight_NT: Tensor,
    mask_NT: Tensor,
    kept_NT: Tensor,
    *,
    denominator: float,
    original_denominator: float | None = None,
) -> tuple[Tensor, float]:
    """Weights and denominator once some decisions of the rows at hand were left out.

        kept_tokens      W on the kept decisions   denominator * share
        kept_row_tokens  the same                  denominator
        original_tokens  the same                  original_denominator
        kept_rows        S_i / L_i on them         denominator

    with W the weights given, share = sum of W over the kept decisions / sum of W over all, S_i the
    row's sum of W, and L_i its kept decisions. Under `token_mean` the denominators are sum W over
    the kept decisions, over all decisions of the kept rows, and over all decisions of all rows;
    `kept_rows` after `row_mean` is w_i / L_i over the number of rows or prompts. Under every length
    rule, keeping all decisions changes nothing, bit for bit.

    `kept_tokens` is a mean over what trains, so a step keeps its size along a schedule, up to the
    larger |A| of what is selected. `kept_row_tokens` makes it shrink with the share of tokens, and
    `original_tokens` with that of rows as well: at 0.25 of the rows and 0.2 of their tokens a step
    is 1/20, which undoes the larger gradient that selection is for. D3S (arXiv:2509.22115) does not
    say which it uses; `kept_tokens` is the project's default, not from the paper.

    Rows without signal that already left count in `denominator` as it was computed, in proportion:
    as if decisions had been left out of them at the same rate.

    Args:
        name: one of the four names.
        weight_NT: (N, T) weights >= 0 of `token_weight`, of all rows at hand over all processes.
        mask_NT: (N, T) bool, the decisions of those rows; weights are 0 elsewhere.
        kept_NT: (N, T) bool, the decisions that train; never True off the mask.
        denominator: of `denominator`, over the kept rows with all their decisions.
        original_denominator: of `denominator`, over the rows before any was dropped; only
            `original_tokens` uses it.

    Returns:
        The (N, T) weights in the dtype of `weight_NT`, exactly 0 where nothing is kept, and the
        positive denominator. A row that lost all its decisions has weight 0 and still counts where
        rows or prompts are counted. Where no kept decision has any weight the sum to be divided is
        an empty one, and the denominator stays as given.

    Raises:
        ValueError: for an unknown name, shapes that differ, a kept decision off the mask, or
            `original_tokens` without its denominator.
    """
    _check("name", name, DENOMINATORS)
    if not weight_NT.shape == mask_NT.shape == kept_NT.shape:
        raise ValueError(
            f"weight_NT, mask_NT and kept_NT must share one shape, got {tuple(weight_NT.shape)}, "
            f"{tuple(mask_NT.shape)} and {tuple(kept_NT.shape)}"
        )
    if mask_NT.dtype != torch.bool or kept_NT.dtype != torch.bool:
        raise ValueError(
            f"mask_NT and kept_NT must be bool, got {mask_NT.dtype} and {kept_NT.dtype}"
        )
    if (kept_NT & ~mask_NT).any():
        row, step = (kept_NT & ~mask_NT).nonzero()[0].tolist()
        raise ValueError(f"kept_NT is True off the mask, first at row {row}, step {step}")
    kept_weight_NT = torch.where(kept_NT, weight_NT, 0.0)
    if name == "original_tokens":
        if original_denominator is None:
            raise ValueError(
                "original_tokens needs original_denominator, that of the step before rows were "
                "dropped"
            )
        return kept_weight_NT, original_denominator
    if name == "kept_tokens":
        kept = float(kept_weight_NT.double().sum())
        total = float(torch.where(mask_NT, weight_NT, 0.0).double().sum())
        return kept_weight_NT, denominator * (kept / total) if kept > 0 else denominator
    if name == "kept_rows":
        changed_N = (kept_NT != mask_NT).any(1)
        sum_N = torch.where(mask_NT, weight_NT, 0.0).double().sum(1)
        even_N = (sum_N / kept_NT.sum(1).clamp(min=1)).to(weight_NT.dtype)
        even_NT = torch.where(kept_NT, even_N[:, None], 0.0)
        kept_weight_NT = torch.where(changed_N[:, None], even_NT, kept_weight_NT)
    return kept_weight_NT, denominator
