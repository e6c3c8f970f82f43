"""Defaults that depend on other settings, for runs of every policy."""

from __future__ import annotations

from typing import Any

import torch

from rl.config.methods import STOPPINGS, Settings, method_of
from rl.config.settings import POSTERIOR
from samplers.selection.uniform_share import SHARE


def fill_in_shared(config: Settings) -> None:
    """Fill in what was left out, before anything is checked."""
    if config.bf16 is None:
        gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        config.bf16 = gpu and not config.use_cpu and not config.fp16
    for name in ("activation_checkpointing", "activation_checkpointing_kwargs"):
        if getattr(config, name) is None:  # the base class would do the same, and warn
            setattr(config, name, getattr(config, name.replace("activation", "gradient")))
    if config.stopping_needed is None:
        known = STOPPINGS.get(config.stopping, STOPPINGS["none"])
        config.stopping_needed = known.defaults.get("stopping_needed", 1)
    if config.load_best_model_at_end and config.metric_for_best_model is None:
        config.metric_for_best_model = "pass_rate"


def fill_in_prior(config: Settings) -> None:
    """Fill in the posterior's prior and the share of uniform picks, once all methods are known."""
    named: list[str] | str | None = config.posterior_prior_column
    if isinstance(named, str):
        config.posterior_prior_column = [named]
    if config.posterior_prior is None:
        reads = POSTERIOR.when(config, method_of)
        own = method_of(config, "allocator").defaults.get("posterior_prior", "pooled")
        config.posterior_prior = own if reads else "flat"
    if config.uniform_share is None:
        learns = config.posterior_prior != "flat"
        believes = method_of(config, "selector").reads_success
        config.uniform_share = SHARE if learns and believes else 0.0


def look_at_unused_weights(config: Settings) -> None:
    """Let DDP look for weights without gradient under checkpointing that is not reentrant.

    The base class says no, for the sake of checkpointing that is reentrant. DDP would then end at the
    second step of a model with weights that get no gradient, as a vision tower beside text.
    """
    checkpointing: Any = config.activation_checkpointing_kwargs or {}
    reentrant = dict(checkpointing).get("use_reentrant", False)
    if (
        config.activation_checkpointing
        and not reentrant
        and config.ddp_find_unused_parameters is None
    ):
        config.ddp_find_unused_parameters = True
