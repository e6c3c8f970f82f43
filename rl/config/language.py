"""Settings of a run that trains a language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rl.config.budgets import least_budget, preset_advantage
from rl.config.checks import as_mapping
from rl.config.declare import ROLLOUTS
from rl.config.declared import decides, says_where, warn_of_idle
from rl.config.fill_in import fill_in_prior, fill_in_shared, look_at_unused_weights
from rl.config.generation_kwargs import apply_generation_kwargs
from rl.config.language_checks import check_language
from rl.config.methods import PRESETS, default_correction, method_of
from rl.config.own import choice
from rl.config.settings import LanguageSettings


@says_where
@dataclass
class RolloutConfig(LanguageSettings):
    """Settings of a run that trains a language model; `--help` explains each.

    `trainer: grpo | raft | raft++` is a preset: it fills the fields left unset, nothing more.

    Raises:
        ValueError: for an unknown method name (with the nearest one), an impossible budget or a
            setting out of range, before anything is loaded.
    """

    def __post_init__(self) -> None:
        fill_in_shared(self)
        for name in ("chat_template_kwargs", "generation_kwargs"):
            setattr(self, name, as_mapping(name, getattr(self, name)))
        apply_generation_kwargs(self)
        choice("trainer", self.trainer, PRESETS)
        preset = dict(PRESETS[self.trainer].defaults)
        if self.loss is None:
            self.loss = preset["loss"]
        preset |= {"epsilon": 0.2} | method_of(self, "loss").defaults
        if self.advantage is None:
            self.advantage = preset_advantage(self, preset["advantage"])
        for name, value in preset.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.budget_min is None:
            self.budget_min = least_budget(self)
        if self.importance_correction is None:
            self.importance_correction = default_correction(self)
        if self.verdict_every is None:
            keeps = self.length_weight == "token_sum" and not self.beta and not self.entropy_coef
            self.verdict_every = 8 if keeps else 0
        fill_in_prior(self)
        check_language(self)
        warn_of_idle(self)
        super().__post_init__()
        look_at_unused_weights(self)

    def decisive_settings(self) -> dict[str, Any]:
        """Settings that decide which rollouts are made; a resumed run must share them."""
        return {name: getattr(self, name) for name in decides(self, ROLLOUTS)}
