"""From YAML settings to the `StepPlan` of a training step.

    num_steps: 20                   edges of the chain
    rule: ddim                      transition, a name of `rollouts.diffusion.sde.RULES`
    level: 1.0                      its noise level
    stochastic: all_steps           a schedule: edges that draw noise                 default all_steps
    branch:                                                                           default none
      at: trained_start             or stochastic_start, or a list of edges
      children: 5                   one number, or one for each edge of the list
    trained:                        a schedule, or stochastic: what draws noise       default stochastic
      schedule: backward_progressive
      first: 14
      last: 20
    last_edge: untrained            or trained                                        default untrained

A schedule is the name of a function of `rollouts.diffusion.schedules`, or a mapping of `schedule` and
that function's settings. Published methods are a few lines each, and so is what lies between them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from rl.config.own import choice, nearest
from rollouts.diffusion.schedules import (
    StepSchedule,
    all_steps,
    backward_progressive,
    last_steps,
    random_steps,
    random_window,
    sliding_window,
)
from rollouts.diffusion.sde import RULES, step_noise
from rollouts.step_plan import StepPlan

SCHEDULES: dict[str, StepSchedule] = {
    "all_steps": all_steps,
    "last_steps": last_steps,
    "backward_progressive": backward_progressive,
    "sliding_window": sliding_window,
    "random_window": random_window,
    "random_steps": random_steps,
}

CONSTANT = ("all_steps", "last_steps")
"""Schedules that are the same at every training step."""

SETTINGS = ("num_steps", "rule", "level", "stochastic", "branch", "trained", "last_edge")

STARTS = ("stochastic_start", "trained_start")
"""Where to branch without naming edges: at the first edge that draws noise, or that is trained."""

LAST_EDGE = ("untrained", "trained")
"""The last edge has so little noise that its ratios are rounding; what trains it says so."""


def that_vary(settings: Mapping[str, Any]) -> list[str]:
    """Names of the settings whose schedule is not the same at every training step."""
    names = []
    for name in ("stochastic", "trained"):
        entry = settings.get(name)
        schedule = entry.get("schedule") if isinstance(entry, Mapping) else entry
        if isinstance(schedule, str) and schedule in SCHEDULES and schedule not in CONSTANT:
            names.append(name)
    return names


def plan_at(settings: Mapping[str, Any], step: int, *, num_train_steps: int) -> StepPlan:
    """The plan of training step `step`.

    Sharing x_0 between the samples of a prompt is a split at edge 0. `backward_progressive` takes
    `num_train_steps` for its stages unless told otherwise. Leaving the last edge untrained is a
    project default, not from a paper; it applies after the schedule, so the last 14 edges of 20 are
    then edges 6 .. 18.

    Args:
        settings: see the first lines.
        step: training step, in 0 .. num_train_steps - 1.
        num_train_steps: how many there are.

    Raises:
        ValueError: for a setting that is unknown, missing or out of range, and for a plan that
            trains no edge.
    """
    _check_keys("plan", settings, SETTINGS, required=("num_steps", "rule", "level"))
    if not 0 <= step < num_train_steps:
        raise ValueError(f"step must be in 0..{num_train_steps - 1}, got {step}")
    _choice("rule", settings["rule"], RULES)
    last_edge = settings.get("last_edge", "untrained")
    _choice("last_edge", last_edge, LAST_EDGE)
    num_steps = settings["num_steps"]

    def edges(name: str, entry: object) -> tuple[int, ...]:
        return _edges(name, entry, step, num_steps=num_steps, num_train_steps=num_train_steps)

    stochastic = edges("stochastic", settings.get("stochastic", "all_steps"))
    entry = settings.get("trained", "stochastic")
    trained = stochastic if entry == "stochastic" else edges("trained", entry)
    starts = {"stochastic_start": stochastic[0], "trained_start": trained[0]}
    if last_edge == "untrained":
        trained = tuple(edge for edge in trained if edge < num_steps - 1)
    if not trained:
        raise ValueError(
            f"training step {step} trains no edge: the last, {num_steps - 1}, is left out unless "
            f"last_edge is trained, and there is no other in trained={entry!r}"
        )
    plan = StepPlan(
        num_steps=num_steps,
        rule=settings["rule"],
        level=settings["level"],
        stochastic=stochastic,
        splits=_splits(settings.get("branch"), starts),
        trained=trained,
    )
    _check_level(plan.rule, plan.level)
    return plan


def _edges(
    name: str, entry: object, step: int, *, num_steps: int, num_train_steps: int
) -> tuple[int, ...]:
    """What a schedule of the settings gives at this training step."""
    if isinstance(entry, str):
        entry = {"schedule": entry}
    if not isinstance(entry, Mapping) or "schedule" not in entry:
        raise ValueError(
            f"{name} must be the name of a schedule or a mapping with the key schedule, "
            f"got {entry!r}"
        )
    _choice(f"{name}.schedule", entry["schedule"], SCHEDULES)
    schedule = SCHEDULES[entry["schedule"]]
    parameters = inspect.signature(schedule).parameters
    known = [key for key in parameters if key not in ("step", "num_steps")]
    values = {key: value for key, value in entry.items() if key != "schedule"}
    if "stages" in known:
        values.setdefault("stages", num_train_steps)
    required = [key for key in known if parameters[key].default is inspect.Parameter.empty]
    _check_keys(name, values, known, required)
    return schedule(step, num_steps=num_steps, **values)


def _splits(branch: object, starts: Mapping[str, int]) -> tuple[tuple[int, int], ...]:
    if branch is None:
        return ()
    if not isinstance(branch, Mapping):
        raise ValueError(f"branch must be a mapping of at and children, got {branch!r}")
    _check_keys("branch", branch, ("at", "children"), required=("at", "children"))
    at, children = branch["at"], branch["children"]
    if isinstance(at, str):
        choice("branch.at", at, STARTS)
        at = [starts[at]]
    if not isinstance(at, list | tuple):
        raise ValueError(f"branch.at must be {', '.join(STARTS)} or a list of edges, got {at!r}")
    counts = children if isinstance(children, list | tuple) else [children] * len(at)
    if len(counts) != len(at):
        raise ValueError(
            f"branch.children must be one number or one for each of {len(at)} edges, "
            f"got {children!r}"
        )
    return tuple(zip(at, counts, strict=True))


@cache
def _check_level(rule: str, level: float) -> None:
    any_step = torch.tensor([0.6, 0.8, 0.8, 0.6], dtype=torch.float64)
    step_noise(any_step, rule=rule, level=level)  # knows which levels a rule has


def _choice(name: str, value: object, known: Any) -> None:
    """`choice` of a value that may be anything a YAML can hold."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    choice(name, value, known)


def _check_keys(name: str, given: Mapping[str, Any], known: Any, required: Any) -> None:
    for key in given:
        if key not in known:
            raise ValueError(
                f"{name} has no setting {key!r}, there are {', '.join(known) or 'none'}."
                f"{nearest(str(key), list(known))}"
            )
    missing = [key for key in required if key not in given]
    if missing:
        raise ValueError(f"{name} needs {', '.join(missing)}, got {dict(given)}")
