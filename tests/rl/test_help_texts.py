"""Help texts name every choice there is."""

import re
from dataclasses import fields

import pytest

from rl.config.checks import IMPORTANCE_CORRECTIONS
from rl.config.methods import (
    ADVANTAGES,
    AGGREGATIONS,
    ALLOCATORS,
    DOWN_SAMPLERS,
    LOSSES,
    PRESETS,
    SCALES,
    SELECTORS,
    STOPPINGS,
    TOKEN_SELECTIONS,
)
from rl.config.settings import RolloutConfig
from rl.objective.advantages import FALLBACKS
from rl.objective.advantages import SCALES as REWARD_SCALES
from rl.objective.token_selection import SCOPES
from rl.objective.weights import DENOMINATORS, LENGTH_RULES, OBJECTIVES
from samplers.selection.scores import SCORES

CHOICES = {
    "trainer": PRESETS,
    "selector": SELECTORS,
    "selection_score": SCORES,
    "allocator": ALLOCATORS,
    "allocation_scale": SCALES,
    "stopping": STOPPINGS,
    "down_sampling": DOWN_SAMPLERS,
    "token_selection": TOKEN_SELECTIONS,
    "token_scope": SCOPES,
    "token_denominator": DENOMINATORS,
    "advantage": ADVANTAGES,
    "scale_rewards": REWARD_SCALES,
    "multi_objective_aggregation": AGGREGATIONS,
    "stratum_fallback": FALLBACKS,
    "loss": LOSSES,
    "objective": OBJECTIVES,
    "length_weight": LENGTH_RULES,
    "importance_correction": IMPORTANCE_CORRECTIONS,
}


@pytest.mark.parametrize("setting", CHOICES)
def test_the_help_text_names_every_choice(setting):
    help_text = next(f.metadata["help"] for f in fields(RolloutConfig) if f.name == setting)
    words = re.findall(r"[a-z0-9_]+(?:\+\+)?", help_text)
    assert [name for name in CHOICES[setting] if name not in words] == []
