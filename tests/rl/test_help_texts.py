"""Help texts: `--help` shows every choice there is, and what each record says of itself."""

from dataclasses import fields

import pytest

from rl.config.declared import choices_of, takes_own
from rl.config.diffusion import DenoisingConfig
from rl.config.language import RolloutConfig
from rl.config.methods import METHODS


@pytest.mark.parametrize("kind", [RolloutConfig, DenoisingConfig])
def test_a_setting_of_names_shows_them_as_choices(kind):
    shown = {f.name for f in fields(kind) if choices_of(kind, f)}
    assert {"selector", "allocator", "stopping", "down_sampling", "objective"} <= shown
    named = {f.name for f in fields(kind) if f.name in METHODS}
    assert named <= shown


def test_functions_of_ones_own_are_taken_wherever_a_stage_is_named():
    taken = {f.name for f in fields(RolloutConfig) if takes_own(RolloutConfig, f)}
    assert taken == {
        *("selector", "allocator", "stopping", "advantage", "down_sampling", "token_selection"),
        "loss",
    }
