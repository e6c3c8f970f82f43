"""Features of the data set's prompts, made by all ranks together.

Axes: D prompts of the data set, H features.
"""

from __future__ import annotations

import numpy as np

from rl.policies.language import LanguagePolicy
from rl.ranks import Ranks
from rollouts.prompts import Prompt


def prompt_features(policy: LanguagePolicy, ranks: Ranks, prompts: list[Prompt]) -> np.ndarray:
    """(D, H) what the policy makes of each prompt, the same on every rank. Every rank calls this."""
    mine = np.zeros((0, 0))
    with ranks.until_gather():
        mine = policy.prompt_features(prompts[ranks.rank :: ranks.num])
    parts = ranks.gather(mine)
    width = max(part.shape[1] for part in parts)
    feature_DH = np.zeros((len(prompts), width))
    for rank, part in enumerate(parts):
        if len(part):
            feature_DH[rank :: ranks.num] = part
    return feature_DH
