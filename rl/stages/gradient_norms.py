"""Gradient norms of accepted rollouts, for the allocator: of pilots at once, of others from the next
step on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rl.config.methods import successes
from rl.logprobs import head_gradient as gradient_norm
from rl.logprobs.from_logits import head_inputs
from rl.logprobs.scorer import Scorer
from rl.objective.advantages import raft
from rl.stages.metrics import drawn
from rollouts.batch import TokenRollouts

if TYPE_CHECKING:
    from rl.stages.line import Batch, Line


@torch.no_grad()
def gradient_norms(line: Line, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """`norms_of` everything a step generated, which later steps use.

    Measured on rollouts that also train, G would bias the gradient it allocates in the same step.

    Returns:
        (K,) int64 data-set rows and (K,) float64 norms.
    """
    if not batch.waves:
        return np.zeros(0, dtype=np.int64), np.zeros(0)
    index_P = np.concatenate([wave.index_P for wave in batch.waves])
    return norms_of(line, drawn(batch.waves), index_P)


@torch.no_grad()
def norms_of(line: Line, rollouts: Any, index_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """G of each prompt with an accepted rollout, at the lm_head, under the policy that generated.

    The rows are dealt to ranks by length and the norms gathered. (`methods`: GVM-RAFT,
    arXiv:2505.02391, Algorithm 2 or the definition, by `gvm_gradient_norm`.)

    Args:
        line: the stages of the run.
        rollouts: with successes, the same on every rank.
        index_P: (P,) data-set row of each of their prompts.

    Returns:
        (K,) int64 data-set rows and (K,) float64 norms.
    """
    prompt_N = rollouts.prompt_N
    assert isinstance(rollouts, TokenRollouts)
    accepted = (
        ((raft(successes(rollouts), prompt_N) > 0) & (rollouts.length_N > 0)).nonzero().flatten()
    )
    mine = accepted[line.ranks.rows_to_train(rollouts.length_N[accepted])]
    found, error = None, None
    try:
        found = _norms(line, rollouts, mine)
    except Exception as caught:
        error = caught
    shares = line.ranks.gather(found, error=error)
    row_norm = dict(pair for share in shares for pair in share)
    norm_N = torch.tensor([row_norm[row] for row in accepted.tolist()], dtype=torch.float64)
    reduce = {"mean": gradient_norm.mean_norm, "rms": gradient_norm.rms_norm}
    prompt_K, norm_K = reduce[line.config.gvm_gradient_norm](
        norm_N, prompt_N[accepted], torch.ones(len(accepted), dtype=torch.bool)
    )
    return index_P[prompt_K.numpy()], norm_K.numpy()


def _norms(line: Line, rollouts: TokenRollouts, rows_K: torch.Tensor) -> list[tuple[int, float]]:
    """Row and norm of each of `rows_K`; every rank takes part, as it gathers the head's weight."""
    found: list[tuple[int, float]] = []
    assert isinstance(line.score, Scorer)
    settings = line.score.settings
    of_rows = {name: settings[name] for name in ("pad_id", "right_padded")}
    with line.policy() as policy:
        head = policy.get_output_embeddings()
        for rows in rows_K.split(line.config.per_device_train_batch_size) if len(rows_K) else ():
            part = rollouts.take(rows).to(head.weight.device)
            norm_N = gradient_norm.head_gradient_norm(
                head_inputs(policy, part, **of_rows),
                part.token_NT,
                part.mask_NT,
                head.weight,
                bias_V=head.bias,
                temperature=line.config.temperature,
            )
            found += zip(rows.tolist(), norm_N.tolist(), strict=True)
    return found
