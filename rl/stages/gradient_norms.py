"""Measure the gradient norm of each prompt's accepted rollouts, for allocators that weigh by it.

(Yao et al., 2025, GVM-RAFT, arXiv:2505.02391, Algorithm 2 or the definition, by `gvm_gradient_norm`.)
"""

from __future__ import annotations

import numpy as np
import torch

from rl.config.build import successes
from rl.logprobs.head_gradient import mean_norm, rms_norm
from rl.objective.advantages import raft
from rl.policies.contract import Policy
from rl.policies.language import LanguagePolicy
from rl.ranks import Ranks
from rollouts.batch import Rollouts, TokenRollouts

REDUCTIONS = {"mean": mean_norm, "rms": rms_norm}


@torch.no_grad()
def norms_of(
    policy: Policy, ranks: Ranks, rollouts: Rollouts, index_P: np.ndarray, *, kind: str
) -> tuple[np.ndarray, np.ndarray]:
    """Gradient norm (at the LM head) of each prompt that has an accepted rollout.

    The rows are dealt to ranks by length and the norms gathered.

    Args:
        policy: the language policy that generated the rollouts.
        ranks: the processes.
        rollouts: with successes, the same on every rank.
        index_P: (P,) data-set row of each of their prompts.
        kind: "mean" or "rms" over the prompt's accepted rollouts.

    Returns:
        (K,) int64 data-set rows and (K,) float64 norms.
    """
    prompt_N = rollouts.prompt_N
    assert isinstance(rollouts, TokenRollouts) and isinstance(policy, LanguagePolicy)
    accepted = (
        ((raft(successes(rollouts), prompt_N) > 0) & (rollouts.length_N > 0)).nonzero().flatten()
    )
    mine = accepted[ranks.rows_to_train(rollouts.length_N[accepted])]
    found, error = None, None
    try:
        own = policy.head_gradient_norms(rollouts.take(mine))
        found = list(zip(mine.tolist(), own, strict=True))
    except Exception as caught:
        error = caught
    shares = ranks.gather(found, error=error)
    row_norm = dict(pair for share in shares for pair in share)
    norm_N = torch.tensor([row_norm[row] for row in accepted.tolist()], dtype=torch.float64)
    prompt_K, norm_K = REDUCTIONS[kind](
        norm_N, prompt_N[accepted], torch.ones(len(accepted), dtype=torch.bool)
    )
    return index_P[prompt_K.numpy()], norm_K.numpy()
