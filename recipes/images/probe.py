"""Where to branch: what siblings that part at each step still differ by, before anything is trained.

    python -m recipes.images.probe --config recipes/images/branch.yaml [--points 0,2,4] [--children 8]

Takes the YAML of a run, branches its chain at several steps in turn, and prints for each the share w
of the reward's variance that lies within branches, the share of branches whose samples differ in
reward, and how many children measure a prompt's mean best for the evaluations they cost. Shares stand
with their standard errors over prompts: take more --probe_prompts where these are too wide to choose
by. Late branches are cheap and alike: branch where w is still near 1. `sibling_within_share` of the
YAML is this w.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace

from rich.console import Console
from rich.table import Table
from trl import ModelConfig

from rl.config.diffusion import DenoisingConfig
from rl.policies.denoiser import load_image_rewards
from rollouts.diffusion.branch_points import BranchPoint, probe_branch_points
from rollouts.prompts import plain_prompts

from ..arguments import RecipeArguments
from ..config import ConfigError, parse
from ..diffusion import engine_of, prepare
from ..train import EXPECTED


@dataclass
class ProbeArguments:
    """How long and where to probe; everything else is the run's."""

    points: str | None = field(
        default=None, metadata={"help": "Steps, as 0,2,4. Default: every second that draws noise."}
    )
    children: int = field(default=8, metadata={"help": "Samples of a branch."})
    branches: int = field(default=4, metadata={"help": "Branches of a prompt at each step."})
    probe_prompts: int = field(default=32, metadata={"help": "Prompts, the first of the data."})


def probe(arguments: list[str] | None = None) -> list[BranchPoint]:
    """Parse, probe, and print a table; returns what it shows."""
    given, recipe, config, model_config = parse(
        (ProbeArguments, RecipeArguments, DenoisingConfig, ModelConfig), arguments
    )
    task = prepare(recipe, config, model_config)
    reward, *others = load_image_rewards(
        task.rewards, None, device=config.reward_device or config.device
    )
    if others:
        raise ConfigError(f"probe one reward at a time, got {1 + len(others)}: write rewards")
    prompts, _ = plain_prompts(task.rows, id_column=config.id_column)
    plan = replace(config.step_plan(0), splits=())
    points = list(plan.stochastic[:-1:2])
    if given.points is not None:
        try:
            points = [int(point) for point in given.points.split(",")]
        except ValueError:
            raise ConfigError(f"points must be steps such as 0,2,4, got {given.points!r}") from None
    found = probe_branch_points(
        engine_of(task, config),
        prompts[: given.probe_prompts],
        reward,
        points=points,
        children=given.children,
        branches=given.branches,
        params=plan,
        seed=config.seed,
    )
    table = Table("step", "within share w", "informative", "best children", "evaluations")
    for point in found:
        table.add_row(
            str(point.step),
            _with_error(point.within_share, point.within_share_se),
            _with_error(point.informative_share, point.informative_share_se),
            "–" if point.best_children is None else f"{point.best_children:.1f}",
            str(point.evaluations),
        )
    Console().print(table)
    return found


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}" if error is None else f"{value:.2f} ± {error:.2f}"


if __name__ == "__main__":
    try:
        probe()
    except EXPECTED as error:
        sys.exit(f"error: {error}")
