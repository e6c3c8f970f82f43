"""Simulate where rollouts would go on prompts of given pass rates, without a model.

    apportion simulate                                       # half of the prompts hopeless
    apportion simulate --pass_rates beta:0.5,0.5 --selector vade --allocator leave_one_out
    apportion simulate --pass_rates rates.jsonl --stopping early --stopping_round_size 4
    apportion simulate --pass_rates levels --num_prompts 900 --posterior_prior column

The planner is the real one. A rollout passes with its prompt's pass rate, which stays as it is: this
shows which rollouts would carry a gradient, not what a policy would learn from them.
(`benchmarks/trace.py` has policies that learn.) Axes: D prompts, P prompts of a step, N rollouts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from samplers import BetaPosterior, Planner, allocation, selection, stopping
from samplers.keys import step_generator
from samplers.prior import Prior, StrataPrior, pooled_prior
from samplers.selection.uniform_share import SHARE, UniformShare

if TYPE_CHECKING:
    from rich.table import Table

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Generator = np.random.Generator


def half_dead(size: int, generator: Generator) -> FloatArray:
    """Every other prompt hopeless, the rest spread evenly."""
    return np.where(np.arange(size) % 2, generator.random(size), 0.0)


def mostly_solved(size: int, generator: Generator) -> FloatArray:
    """Four of five prompts near 0.97, the rest spread evenly."""
    solved = generator.beta(30, 1, size)
    return np.where(np.arange(size) % 5, solved, generator.random(size))


NUM_LEVELS = 9


def levels(size: int, generator: Generator) -> FloatArray:
    """Nine levels of prompts in turn, from easy to hopeless, whose pass rates differ within a level."""
    mean_D = np.linspace(0.95, 0.02, NUM_LEVELS)[np.arange(size) % NUM_LEVELS]
    return generator.beta(8 * mean_D, 8 * (1 - mean_D))


POOLS: dict[str, Callable[[int, Generator], FloatArray]] = {
    "uniform": lambda size, generator: generator.random(size),
    "half_dead": half_dead,
    "mostly_solved": mostly_solved,
    "skewed": lambda size, generator: generator.beta(0.5, 0.5, size),
    "very_skewed": lambda size, generator: generator.beta(0.2, 0.2, size),
    "levels": levels,
}
"""Pools of pass rates: `pool(size, generator) -> pass_rate_D`."""

SELECTORS: dict[str, Callable[..., selection.Selector]] = {
    "uniform": lambda posterior, keys, seed: selection.UniformSelector(
        len(keys), seed=seed, keys=keys
    ),
    "vade": lambda posterior, keys, _: selection.ThompsonSelector(posterior, keys=keys),
    "mopps": lambda posterior, keys, _: selection.mopps(posterior, keys=keys),
    "posterior_mean": lambda posterior, keys, _: selection.PosteriorMeanSelector(
        posterior, keys=keys
    ),
    "band": lambda posterior, keys, _: selection.OnlineBandSelector(
        posterior, short="nearest", keys=keys
    ),
}
"""`make(posterior, keys, seed)` by the selector's name in a YAML."""


@dataclass(frozen=True)
class Allocator:
    """How an allocator of a YAML is built: as `rl.config.methods` has it, without torch."""

    solve: allocation.Allocator
    scale: Callable[..., Any] | None = allocation.posterior_std
    minimum: int = 1


ALLOCATORS = {
    "uniform": Allocator(allocation.uniform),
    "neyman": Allocator(allocation.neyman),
    "leave_one_out": Allocator(allocation.leave_one_out, minimum=2),
    "dr_grpo": Allocator(allocation.dr_grpo, minimum=3),
    "gvm": Allocator(allocation.neyman, allocation.gvm),
    "log": Allocator(allocation.neyman, allocation.log_std),
    "accepted": Allocator(allocation.neyman, allocation.accepted_std),
    "reinforce_ada": Allocator(allocation.neyman, allocation.reinforce_ada_std),
    "inverse_pass_rate": Allocator(allocation.inverse_pass_rate, allocation.mean_pass_rate, 2),
    "knapsack": Allocator(allocation.knapsack, allocation.mean_pass_rate, minimum=2),
    "knapsack_posterior": Allocator(allocation.knapsack_posterior, None, minimum=2),
    "knapsack_released": Allocator(allocation.knapsack_released, allocation.passed_share, 2),
}

STOPPINGS: dict[str, Callable[[Settings], stopping.Stopping | None]] = {
    "none": lambda _: None,
    "positive": lambda s: stopping.positive(needed=s.stopping_needed or 1),
    "balanced": lambda s: stopping.balanced(keep=s.stopping_needed or 4),
    "early": lambda s: stopping.early(threshold=s.stopping_threshold),
    "early_unbiased": lambda s: stopping.early_unbiased(
        threshold=s.stopping_threshold, rho=s.stopping_rho
    ),
}

PRIORS: dict[str, Callable[[Settings, Sequence[str]], Prior | None]] = {
    "flat": lambda _, __: None,
    "pooled": lambda s, strata: pooled_prior(len(strata), **s.of_prior),
    "column": lambda s, strata: StrataPrior(strata, **s.of_prior),
}
"""`make(settings, stratum of each prompt)`; features there are none here."""

BANDS = (0.0, 0.05, 0.2, 0.4, 0.6, 0.8, 0.95, 1.0)
"""Edges of the bands of pass rates that the table has rows for."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Where rollouts go, by the names that a YAML has for it."""

    prompts_per_step: int = 32
    rollouts_per_prompt: int = 8
    selector: str = "vade"
    allocator: str = "leave_one_out"
    budget_min: int | None = None
    budget_max: int | None = None
    stopping: str = "none"
    stopping_round_size: int | None = None
    stopping_needed: int | None = None
    stopping_threshold: float = 0.5
    stopping_rho: float = 0.5
    posterior_decay_chosen: float = 0.2
    posterior_decay_rest: float = 0.999
    posterior_prior: str = "pooled"
    posterior_prior_decay: float = 0.95
    posterior_kappa: float | None = None
    uniform_share: float | None = None
    seed: int = 0

    @property
    def of_prior(self) -> dict[str, Any]:
        """Arguments of a prior that learns."""
        return {"decay": self.posterior_prior_decay, "kappa": self.posterior_kappa}

    @property
    def share(self) -> float:
        """The share of uniform picks, where it is left out that of training."""
        if self.uniform_share is not None:
            return self.uniform_share
        believes = self.selector != "uniform" and self.posterior_prior != "flat"
        return SHARE if believes else 0.0


UNIFORM = {
    "selector": "uniform",
    "allocator": "uniform",
    "stopping": "none",
    "posterior_prior": "flat",
    "uniform_share": None,
}
"""What everything is compared with: every prompt in turn, the same budget, no stopping."""


@dataclass(frozen=True)
class Outcome:
    """What became of the rollouts of a simulation, prompt by prompt."""

    pass_rate_D: FloatArray
    visits_D: IntArray
    """How often each prompt was chosen."""
    rollouts_D: IntArray
    mixed_D: IntArray
    """Visits with rewards of both kinds, which alone carry a gradient."""

    @property
    def rollouts(self) -> int:
        return int(self.rollouts_D.sum())

    @property
    def mixed_share(self) -> float:
        """Share of groups that are mixed."""
        return float(self.mixed_D.sum() / max(self.visits_D.sum(), 1))

    @property
    def rollouts_per_mixed_group(self) -> float:
        """Infinite if there is no mixed group."""
        return self.rollouts / int(self.mixed_D.sum()) if self.mixed_D.any() else float("inf")

    def of(self, is_D: NDArray[np.bool_]) -> tuple[float | None, float]:
        """Of the prompts that `is_D` says: rollouts per visit, None without visits; share of all."""
        visits, rollouts = self.visits_D[is_D].sum(), self.rollouts_D[is_D].sum()
        return float(rollouts / visits) if visits else None, float(rollouts / max(self.rollouts, 1))


def simulate(
    pass_rate_D: FloatArray, settings: Settings, *, steps: int, strata: Sequence[str] | None = None
) -> Outcome:
    """What the planner of these settings does in so many steps, on prompts of fixed pass rates.

    A rollout's seed decides whether it passes, so that two simulations are comparable.

    Args:
        pass_rate_D: in [0, 1].
        steps: training steps, at least 1.
        strata: (D,) each prompt's kind, where there are kinds.

    Raises:
        ValueError: if a setting or a pass rate is out of range, or settings do not fit each other.
    """
    pass_rate_D = np.asarray(pass_rate_D, dtype=np.float64)
    if pass_rate_D.ndim != 1 or not len(pass_rate_D):
        raise ValueError(f"pass rates must be a list of numbers, got shape {pass_rate_D.shape}")
    if not ((pass_rate_D >= 0) & (pass_rate_D <= 1)).all():
        raise ValueError("pass rates must be in [0, 1]")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    planner = planner_of(settings, num_prompts=len(pass_rate_D), strata=strata)
    visits_D, rollouts_D, mixed_D = np.zeros((3, len(pass_rate_D)), dtype=np.int64)
    for _ in range(steps):
        passed_P, trials_P = np.zeros((2, settings.prompts_per_step), dtype=np.int64)
        while True:  # the rounds of a step
            proposal = planner.propose()
            index_P, prompt_N = proposal.index_P, proposal.prompt_N
            chance_N = proposal.seed_N / 2.0**63
            reward_N = (chance_N < pass_rate_D[index_P][prompt_N]).astype(np.float64)
            planner.observe(proposal, reward_N, prompt_N)
            trials_P += proposal.budget_P
            np.add.at(passed_P, prompt_N, reward_N.astype(np.int64))
            if not planner.is_open:
                break
        visits_D[index_P] += 1
        rollouts_D[index_P] += trials_P
        mixed_D[index_P] += (passed_P > 0) & (passed_P < trials_P)
    return Outcome(pass_rate_D, visits_D, rollouts_D, mixed_D)


def planner_of(
    settings: Settings, *, num_prompts: int, strata: Sequence[str] | None = None
) -> Planner:
    """The planner of these settings.

    Raises:
        ValueError: if a name is unknown, settings do not fit each other, or there are no kinds for
            `posterior_prior` column.
    """
    tables: dict[str, dict[str, Any]] = {
        "selector": SELECTORS,
        "allocator": ALLOCATORS,
        "stopping": STOPPINGS,
        "posterior_prior": PRIORS,
    }
    for name, table in tables.items():
        if (value := getattr(settings, name)) not in table:
            raise ValueError(f"{name} must be one of {', '.join(table)}, got {value!r}")
    if settings.posterior_prior == "column" and strata is None:
        raise ValueError(
            "posterior_prior column needs prompts of several kinds: write pass_rates: levels, or "
            "numbers such as 0,0.1,0.9, each of which is a kind"
        )
    posterior = BetaPosterior(
        num_prompts,
        decay_chosen=settings.posterior_decay_chosen,
        decay_rest=settings.posterior_decay_rest,
        prior=PRIORS[settings.posterior_prior](settings, strata or [""] * num_prompts),
    )
    keys = [f"prompt-{row:06d}" for row in range(num_prompts)]
    allocator, rule = ALLOCATORS[settings.allocator], STOPPINGS[settings.stopping](settings)
    round_size = settings.stopping_round_size or max(1, settings.rollouts_per_prompt // 2)
    least = 1 if settings.allocator == "uniform" else max(2, allocator.minimum)
    chooses = SELECTORS[settings.selector](posterior, keys, settings.seed)
    if settings.share:
        chooses = UniformShare(chooses, num_prompts, share=settings.share, keys=keys)
    return Planner(
        posterior,
        chooses,
        allocator.solve,
        keys=keys,
        prompts_per_step=settings.prompts_per_step,
        rollouts_per_step=settings.prompts_per_step * settings.rollouts_per_prompt,
        scale=allocator.scale,
        minimum=least if settings.budget_min is None else settings.budget_min,
        maximum=settings.budget_max,
        stopping=rule,
        round_size=None if rule is None else round_size,
        run_seed=settings.seed,
    )


def pass_rates(spec: str, *, num_prompts: int, seed: int, column: str = "pass_rate") -> FloatArray:
    """(D,) pass rates that a text describes.

    Args:
        spec: the name of a pool; `beta:A,B`; numbers such as `0,0.1,0.9`, each for an equal share of the
            prompts; or a file: .jsonl with a column, or text with a number per line.
        num_prompts: D; a file has its own.
        column: of a .jsonl file.

    Raises:
        ValueError: saying what is wrong with it.
    """
    generator = step_generator(seed, f"pool {spec}", 0)
    if spec in POOLS:
        return POOLS[spec](num_prompts, generator)
    if Path(spec).is_file():
        return _read(Path(spec), column)
    try:
        if spec.startswith("beta:"):
            a, b = map(float, spec.removeprefix("beta:").split(","))
            return generator.beta(a, b, num_prompts)
        values = np.array([float(value) for value in spec.split(",")])
    except ValueError:
        raise ValueError(
            f"pass_rates must be one of {', '.join(POOLS)}, or beta:A,B, or numbers such as "
            f"0,0.1,0.9, or a file, got {spec!r}"
        ) from None
    return values[np.arange(num_prompts) * len(values) // num_prompts]


def strata_of(spec: str, *, num_prompts: int) -> list[str] | None:
    """(D,) the kinds of prompts that `pass_rates` makes of a text; None where it makes none."""
    if spec == "levels":
        return [f"level {row % NUM_LEVELS}" for row in range(num_prompts)]
    if spec in POOLS or spec.startswith("beta:") or Path(spec).is_file():
        return None
    values = spec.split(",")
    return [values[row * len(values) // num_prompts].strip() for row in range(num_prompts)]


def _read(path: Path, column: str) -> FloatArray:
    values = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            values.append(float(json.loads(line)[column] if path.suffix == ".jsonl" else line))
        except (ValueError, TypeError, KeyError) as error:
            what = f"an object with a number {column!r}" if path.suffix == ".jsonl" else "a number"
            raise ValueError(f"{path}, line {number}: must be {what} ({error!r})") from None
    return np.array(values)


def tables(outcome: dict[str, Outcome]) -> list[Table]:
    """Two tables of simulations on one pool, by name: what came of it, and budgets by pass rate."""
    from rich.table import Table

    total = Table(title="Where rollouts went", title_justify="left")
    total.add_column("")
    rows: dict[str, Callable[[Outcome], str]] = {
        "mixed groups": lambda o: f"{o.mixed_share:.0%}",
        "rollouts per mixed group": lambda o: f"{o.rollouts_per_mixed_group:.1f}",
        "rollouts": lambda o: f"{o.rollouts:,}",
        "prompts visited": lambda o: f"{(o.visits_D > 0).mean():.0%}",
    }
    for name in outcome:
        total.add_column(name, justify="right")
    for row, cell in rows.items():
        total.add_row(row, *map(cell, outcome.values()))

    by_rate = Table(title="Budgets by pass rate", title_justify="left")
    by_rate.add_column("pass rate")
    by_rate.add_column("prompts", justify="right")
    for name in outcome:
        by_rate.add_column(f"per visit,\n{name}", justify="right")
    for name in outcome:
        by_rate.add_column(f"of all rollouts,\n{name}", justify="right")
    rate_D = next(iter(outcome.values())).pass_rate_D
    for label, is_D in _bands(rate_D):
        of_band = [each.of(is_D) for each in outcome.values()]
        per_visit = ["–" if each is None else f"{each:.1f}" for each, _ in of_band]
        shares = [f"{share:.0%}" for _, share in of_band]
        by_rate.add_row(label, f"{is_D.mean():.0%}", *per_visit, *shares)
    return [total, by_rate]


def _bands(rate_D: FloatArray) -> list[tuple[str, NDArray[np.bool_]]]:
    """Name and members of every band of pass rates that has members; 0 and 1 are bands by themselves."""
    inner_D = (rate_D > 0) & (rate_D < 1)
    bands = [("0", rate_D == 0)]
    for low, high in pairwise(BANDS):
        bands.append((f"{low:g} to {high:g}", inner_D & (rate_D >= low) & (rate_D < high)))
    bands.append(("1", rate_D == 1))
    return [(name, is_D) for name, is_D in bands if is_D.any()]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="apportion simulate",
        description=(__doc__ or "").splitlines()[0],
        epilog="Settings without a text mean what they mean in a recipe: apportion train --help",
    )
    add: Callable[..., Any] = parser.add_argument
    pools = f"{', '.join(POOLS)}, beta:A,B, numbers such as 0,0.1,0.9, or a file (half_dead)"
    add("--pass_rates", default="half_dead", metavar="POOL", help=pools)
    add("--column", default="pass_rate", metavar="NAME", help="column of a .jsonl file (pass_rate)")
    add("--num_prompts", type=int, default=512, metavar="N", help="without a file (512)")
    add("--steps", type=int, default=100, metavar="N", help="training steps (100)")
    choices: dict[str, dict[str, Any]] = {
        "selector": SELECTORS,
        "allocator": ALLOCATORS,
        "stopping": STOPPINGS,
        "posterior_prior": PRIORS,
    }
    more = {"budget_min": "what the allocator needs", "stopping_round_size": "half of the rollouts"}
    more["stopping_needed"] = "positive: 1, balanced: 4"
    more |= {"posterior_kappa": "estimated", "uniform_share": f"{SHARE} where a prior learns"}
    for name, default in vars(Settings()).items():
        told = f"({default if default is not None else more.get(name, 'no limit')})"
        if name in choices:
            known = [*choices[name]]
            told = f"{', '.join(known)} {told}"
            add(f"--{name}", choices=known, default=default, metavar="NAME", help=told)
        else:
            real = isinstance(default, float) or name in ("posterior_kappa", "uniform_share")
            kind = float if real else int
            add(f"--{name}", type=kind, default=default, metavar="X", help=told)
    given = vars(parser.parse_args(arguments))
    about = {name: given.pop(name) for name in ("pass_rates", "column", "num_prompts", "steps")}
    settings = Settings(**given)
    try:
        if about["num_prompts"] < 1:
            raise ValueError(f"num_prompts must be at least 1, got {about['num_prompts']}")
        rate_D = pass_rates(
            about["pass_rates"],
            num_prompts=about["num_prompts"],
            seed=settings.seed,
            column=about["column"],
        )
        strata = strata_of(about["pass_rates"], num_prompts=about["num_prompts"])
        even = Settings(**given | UNIFORM | {"budget_min": None, "budget_max": None})
        arms = {"uniform": even, "yours": settings}
        outcome = {
            name: simulate(rate_D, arm, steps=about["steps"], strata=strata)
            for name, arm in arms.items()
        }
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    from rich.console import Console

    console = Console()
    for table in tables(outcome):
        console.print(table)
    console.print(
        f"yours: selector {settings.selector}, prior {settings.posterior_prior}, allocator "
        f"{settings.allocator}, stopping {settings.stopping}; {about['steps']} steps of "
        f"{settings.prompts_per_step} prompts. Pass rates stay as they are: this shows which groups "
        "would carry a gradient, not what is learned."
    )


if __name__ == "__main__":
    main()
