"""Simulate every sampler with a simulated policy, to see what helps which pool of prompts.

    python benchmarks/trace.py                    # the mandatory arms, four pools, five seeds
    python benchmarks/trace.py --quick            # a minute: fewer arms, pools, seeds and steps
    python benchmarks/trace.py --recipes          # one arm per recipe; results/trace_recipes.json
    python benchmarks/trace.py --cross            # every selector x allocator x stopping x rows
    python benchmarks/trace.py --pools half_dead --arms vade uniform/loo

The planner, its selectors, allocators and stopping rules, the down-samplers, the advantages and the
ledger are the real ones. Only the policy is simulated. What that assumes:

* A prompt's pass rate is logistic, p = sigmoid(start + own + shared). The shared part is a product
  of skill vectors, non-negative and sparse, so training on one prompt helps those that share
  a skill. `transfer` says how much of a gradient is shared; it is made up, not measured.
* Given the pass rates rollouts are independent, rewards are 0 or 1 and never wrong. Lengths do not
  depend on the prompt or the outcome, so nothing here shows a length bias or a cost per token.
* A rollout's score is (r - p) along its prompt's gradient plus noise whose size does not depend on
  the reward, the assumption under which the variance of a leave-one-out gradient is c / (n - 1).
  Prompts differ in it (G, log-normal).
* The optimizer's step has a fixed length on average (the gradient over a running root mean square,
  as Adam does), one update per step and one learning rate for all. So a method gains nothing by
  merely enlarging the gradient, noise costs progress, and so do few updates: an arm that makes
  fewer and better ones (a refill, more rollouts per step) might do better with a larger rate.
* A prompt that is hopeless (pass rate 0) stays so.

What it cannot show: exploration, forgetting, entropy collapse, reward hacking, wrong verifiers,
prompts that are correlated given their pass rates, off-policy effects of several updates, wall-clock
time, and whether any of it holds for a language model. Differences between arms are hypotheses to
measure with `benchmarks/allocation_arms.py`, not results about training.

Traces: `static` (pass rates fixed), `drifting` (all logits rise by a constant), `walk` (each pass
rate a reflecting random walk) and `learning` (moved by the gradient). Arms are compared at equal
generated rollouts; everything generated counts. Axes: D prompts, P prompts of a step, N rollouts,
K rows kept, M skills.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
from numpy.typing import NDArray

from benchmarks import summaries
from benchmarks.trace_arms import (
    ALLOCATIONS,
    DOWNSAMPLERS,
    RECIPES,
    SELECTIONS,
    STOPPINGS,
    Arm,
    Batch,
    Context,
    cross_arms,
    em,
    group_statistics,
    mandatory_arms,
    quick_arms,
    reference,
)
from benchmarks.trace_policy import (
    POOLS,
    TRACES,
    FloatArray,
    IntArray,
    Policy,
    Settings,
    costs,
    excess_log_loss,
    oracle_budget,
    variance,
)
from samplers import allocation
from samplers.keys import step_generator
from samplers.ledger import Ledger
from samplers.planner import Planner
from samplers.posterior import BetaPosterior
from samplers.proposal import Proposal
from samplers.refill import Refill


@dataclass
class _Step:
    """What one training step rolled out: several selections under refill, several rounds of each."""

    index: list[IntArray] = field(default_factory=list)
    reward: list[FloatArray] = field(default_factory=list)
    prompt: list[IntArray] = field(default_factory=list)
    """Places in the concatenated index."""
    length: list[IntArray] = field(default_factory=list)
    pilot: list[NDArray[np.bool_]] = field(default_factory=list)
    weight: list[FloatArray] = field(default_factory=list)
    """(P,) of each selection: what the stopping rule multiplies a group's gradient by."""
    losses: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)

    def columns(self) -> tuple[IntArray, FloatArray, IntArray, IntArray, NDArray[np.bool_]]:
        """index_P, and reward, prompt, length and pilot of N rows ordered by prompt, then slot."""
        prompt_N = np.concatenate(self.prompt)
        order_N = np.argsort(prompt_N, kind="stable")
        return (
            np.concatenate(self.index),
            np.concatenate(self.reward)[order_N],
            prompt_N[order_N],
            np.concatenate(self.length)[order_N],
            np.concatenate(self.pilot)[order_N],
        )


MAX_DRAWN = 4
"""Groups a refill draws for each it wants, at most; then it trains on what it has (`partial`)."""

VARIANCE_EVERY = 5
"""Steps between two comparisons of the budgets' variance with the oracle's."""


class Simulation:
    """One arm on one pool and trace with one seed."""

    def __init__(self, arm: Arm, pool: str, trace: str, seed: int, settings: Settings) -> None:
        self.arm, self.settings, self.seed = arm, settings, seed
        self.selection = SELECTIONS[arm.selection]
        self.allocation = ALLOCATIONS[arm.allocation]
        self.policy = Policy(pool, trace, seed, settings)
        self.keys = [f"prompt-{row:05d}" for row in range(settings.num_prompts)]
        posterior = BetaPosterior(
            settings.num_prompts,
            decay_chosen=self.selection.decay_chosen,
            decay_rest=self.selection.decay_rest,
        )
        stop = STOPPINGS[arm.stopping]
        context = Context(posterior, self.policy, self.keys, seed)
        self.planner = Planner(
            posterior,
            self.selection.make(context),
            self.allocation.allocate,
            keys=self.keys,
            prompts_per_step=settings.prompts_per_step,
            rollouts_per_step=settings.rollouts_per_step * stop.plan,
            scale=self.allocation.scale,
            minimum=2 if self.allocation.objective == "mean" else 1,
            run_seed=seed,
            **self.allocation.planner,
            stopping=stop.rule,
            round_size=stop.round_size,
        )
        self.refill = (
            Refill(
                settings.prompts_per_step,
                max_drawn=MAX_DRAWN * settings.prompts_per_step,
                at_cap="partial",
            )
            if self.selection.refill
            else None
        )
        self.ledger = Ledger()
        self.budget = settings.steps * settings.rollouts_per_step
        self.drawn = 0
        self.steps: list[dict[str, float]] = []

    def run(self) -> dict[str, Any]:
        """Simulate until the rollouts are spent; the figures of the run."""
        curve = [(0, self._mean_rate(self.policy.rate_D), self._mean_rate(self.policy.held_out_D))]
        while self.drawn < self.budget:
            self.ledger.begin(len(self.steps))
            self.steps.append(self._step())
            self.ledger.end()
            rates = self._mean_rate(self.policy.rate_D), self._mean_rate(self.policy.held_out_D)
            curve.append((self.drawn, *rates))
        return self._figures(np.array(curve))

    def _step(self) -> dict[str, float]:
        """Select, roll out, observe, drop, update: one optimizer step, accounted for."""
        settings, policy = self.settings, self.policy
        rate_D = policy.rate_D  # moves only at the end
        if self.allocation.norms == "oracle":
            cost_D = costs(self.allocation.objective, rate_D, policy.norm_D)
            self.planner.observe_gradient_norms(np.arange(len(cost_D)), np.sqrt(cost_D))
        step = _Step()
        accepted_P = self._refilled(step) if self.refill else None
        if accepted_P is None:
            self._select(step)
        index_P, reward_N, prompt_N, length_N, pilot_N = step.columns()
        self.drawn += len(reward_N)
        self.ledger.drawn(len(reward_N), tokens=int(length_N.sum()))
        _, mean_N, mixed_N = group_statistics(reward_N, prompt_N)
        mixed_share = float(mixed_N[np.unique(prompt_N, return_index=True)[1]].mean())

        candidate_N = np.ones(len(reward_N), dtype=bool)
        num_prompts = settings.prompts_per_step
        if accepted_P is not None:
            candidate_N, num_prompts = accepted_P[prompt_N], max(int(accepted_P.sum()), 1)
        if self.allocation.planner.get("pilots") == "discard":
            candidate_N = candidate_N & ~pilot_N
        rows_N = np.flatnonzero(candidate_N)
        batch = Batch(
            reward_N[rows_N],
            prompt_N[rows_N],
            num_prompts,
            min(self.drawn / self.budget, 1.0),
            step_generator(self.seed, "rows", len(self.steps)),
        )
        keep = em if self.allocation.objective == "em" else DOWNSAMPLERS[self.arm.rows][1]
        kept = keep(batch)
        used_K = kept.weight_K != 0
        rows_K, weight_K = rows_N[kept.rows_K[used_K]], kept.weight_K[used_K]
        weight_K = weight_K * np.concatenate(step.weight)[prompt_N[rows_K]]
        gradient = (
            policy.gradient(index_P, prompt_N[rows_K], reward_N[rows_K], weight_K)
            if len(rows_K)
            else None
        )
        self._account(rows_K, reward_N, length_N, mixed_N, mean_N, pilot_N)
        if self.allocation.norms == "measured":
            seen_K = np.unique(prompt_N[reward_N > 0])
            self.planner.observe_gradient_norms(index_P[seen_K], policy.norm_D[index_P[seen_K]])
        figures = {
            "mixed": mixed_share,
            "chosen_rate": float(rate_D[index_P].mean()),
            "excess_nats": float(np.mean(step.losses)),
            "squared_error": float(np.mean(step.errors)),
        }
        if len(self.steps) % VARIANCE_EVERY == 0:
            figures |= self._variances(index_P, prompt_N[candidate_N], len(reward_N), rate_D)
        self.ledger.updates(int(policy.advance(gradient)))
        return figures

    def _refilled(self, step: _Step) -> NDArray[np.bool_]:
        """Select and roll out until enough groups have a spread; return which groups those are."""
        refill = self.refill
        assert refill is not None
        row_of = {key: row for row, key in enumerate(self.keys)}
        refill.begin(len(self.steps))
        self.planner.begin(len(self.steps))
        number_P: list[int] = []
        while refill.missing:
            exclude = [row_of[group.key] for group in refill.held]
            first_round, first_place = len(step.reward), len(number_P)
            proposal = self._select(step, num_prompts=refill.missing, exclude=exclude)
            dispatched = zip(proposal.index_P.tolist(), proposal.draw_P.tolist(), strict=True)
            numbers = [refill.dispatch(self.keys[row], draw) for row, draw in dispatched]
            reward_N, place_N, length_N = (
                np.concatenate(rounds[first_round:])
                for rounds in (step.reward, step.prompt, step.length)
            )
            for place, number in enumerate(numbers, first_place):
                of_N = place_N == place
                refill.finish(number, reward_N[of_N], tokens=int(length_N[of_N].sum()))
            number_P += numbers
        accepted = {group.number for group in refill.end().accepted}
        return np.array([number in accepted for number in number_P])

    def _select(self, step: _Step, **more: Any) -> Proposal:
        """Roll out all rounds of one selection; return the last proposal."""
        planner, rate_D = self.planner, self.policy.rate_D
        first_place = sum(len(index) for index in step.index)
        a_P = b_P = np.empty(0)
        right_P = trials_P = np.empty(0, dtype=np.int64)
        while True:
            proposal = planner.propose(**more)
            index_P, place_N = proposal.index_P, proposal.prompt_N
            if proposal.round == 0:
                a_P, b_P = planner.posterior.parameters(index_P)
                right_P = np.zeros(len(index_P), dtype=np.int64)
                trials_P = np.zeros(len(index_P), dtype=np.int64)
                step.index.append(index_P)
            # A rollout's seed decides its outcome and its length, whatever else is in the batch.
            reward_N = (proposal.seed_N / 2.0**63 < rate_D[index_P][place_N]).astype(np.float64)
            planner.observe(proposal, reward_N, place_N)
            right_P = right_P + np.bincount(
                place_N, weights=reward_N, minlength=len(index_P)
            ).astype(np.int64)
            trials_P = trials_P + proposal.budget_P
            step.reward.append(reward_N)
            step.prompt.append(place_N + first_place)
            step.length.append(50 + proposal.seed_N % 101)
            step.pilot.append(np.full(len(reward_N), not proposal.is_last))
            if not planner.is_open:
                break
        step.weight.append(planner.group_weight_P)
        step.errors.append(float(np.square(a_P / (a_P + b_P) - rate_D[index_P]).mean()))
        step.losses.append(excess_log_loss(a_P, b_P, rate_D[index_P], right_P, trials_P))
        return proposal

    def _account(
        self,
        rows_K: IntArray,
        reward_N: FloatArray,
        length_N: IntArray,
        mixed_N: NDArray[np.bool_],
        mean_N: FloatArray,
        pilot_N: NDArray[np.bool_],
    ) -> None:
        """Enter in the ledger what became of every row."""
        trained_N = np.zeros(len(reward_N), dtype=bool)
        trained_N[rows_K] = True
        fates = {
            "all_pass": ~mixed_N & (mean_N > 0),
            "all_fail": ~mixed_N & (mean_N == 0),
            "not_accepted": mixed_N & (reward_N == 0) & (self.allocation.objective == "em"),
            "down_sampled": np.ones(len(reward_N), dtype=bool),
        }
        if self.allocation.planner.get("pilots") == "discard":
            fates = {"pilot": pilot_N} | fates
        self.ledger.account("trained", int(trained_N.sum()), int(length_N[trained_N].sum()))
        left_N = ~trained_N
        for reason, is_N in fates.items():
            this_N = left_N & is_N
            self.ledger.account(
                "filtered", int(this_N.sum()), int(length_N[this_N].sum()), reason=reason
            )
            left_N &= ~is_N

    def _variances(
        self, index_P: IntArray, prompt_N: IntArray, total: int, rate_D: FloatArray
    ) -> dict[str, float]:
        """Gradient variance of the step's budgets, of even ones and of the best ones."""
        if self.refill or self.arm.stopping != "none":
            return {}  # group sizes depend on outcomes: c / n is not their variance
        objective = self.allocation.objective
        cost_P = costs(objective, rate_D[index_P], self.policy.norm_D[index_P])
        even_P = allocation.uniform(cost_P, total)
        best_P = oracle_budget(objective, cost_P, total)
        return {
            "variance": variance(objective, cost_P, np.bincount(prompt_N, minlength=len(cost_P))),
            "variance_uniform": variance(objective, cost_P, even_P),
            "variance_oracle": variance(objective, cost_P, best_P),
        }

    def _mean_rate(self, rate_D: FloatArray) -> float:
        return float(rate_D.mean())

    def _figures(self, curve: FloatArray) -> dict[str, Any]:
        totals, steps = self.ledger.totals, self.steps
        drawn, rate, held_out = curve.T
        reachable = float((self.policy.start_rate_D > 0).mean())
        goal = rate[0] + self.settings.threshold * (reachable - rate[0])
        reached = np.flatnonzero(rate >= goal)
        figures: dict[str, Any] = {
            "rollouts_to_threshold": float(drawn[reached[0]]) if len(reached) else None,
            "threshold": float(goal),
            "pass_rate_start": float(rate[0]),
            "pass_rate": float(rate[-1]),
            "pass_rate_curve": float(np.trapezoid(rate, drawn) / drawn[-1]),
            "held_out": float(held_out[-1]),
            "held_out_curve": float(np.trapezoid(held_out, drawn) / drawn[-1]),
            "coverage": self.planner.metrics()["planner/coverage"],
            "visits_max": self.planner.metrics()["planner/visits_max"],
            "updates": totals["updates"],
            "rollouts": totals["rollouts_drawn"],
            "trained_share": totals["rollouts_trained"] / totals["rollouts_drawn"],
            "tokens": totals["tokens_drawn"],
            "tokens_trained": totals["tokens_trained"],
        }
        for reason in ("all_pass", "all_fail", "not_accepted", "down_sampled", "pilot"):
            count = totals.get(f"rollouts_filtered_{reason}", 0)
            figures[f"waste_{reason}"] = count / totals["rollouts_drawn"]
        for name in ("mixed", "chosen_rate", "excess_nats", "squared_error"):
            figures[name] = float(np.mean([step[name] for step in steps]))
        if "variance" in steps[0]:
            measured = [step for step in steps if "variance" in step]
            names = [name for name in measured[0] if name.startswith("variance")]
            sums = {name: sum(step[name] for step in measured) for name in names}
            uniform = sums["variance_uniform"]
            figures["variance_over_uniform"] = sums["variance"] / uniform if uniform else 1.0
            figures["oracle_over_uniform"] = sums["variance_oracle"] / uniform if uniform else 1.0
            figures["variance_over_oracle"] = (
                sums["variance"] / sums["variance_oracle"] if sums["variance_oracle"] else 1.0
            )
        return figures


def simulate(
    arm: Arm, *, pool: str, trace: str, seed: int, settings: Settings | None = None
) -> dict[str, Any]:
    """The figures of one run, a function of the arguments alone."""
    return Simulation(arm, pool, trace, seed, settings or Settings()).run()


def summarise(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard error over seeds per pool, trace and arm; differences paired by seed."""
    cells: dict[tuple[str, str, str], dict[int, dict[str, Any]]] = {}
    for result in results:
        key = (result["pool"], result["trace"], result["arm"])
        cells.setdefault(key, {})[result["seed"]] = result["figures"]
    table = []
    for (pool, trace, name), runs in cells.items():
        row: dict[str, Any] = {"pool": pool, "trace": trace, "arm": name, "seeds": sorted(runs)}
        row["what"] = Arm.parse(name).what
        row["recipe"] = next((r for r, arm in RECIPES.items() if str(arm) == name), None)
        for figure in next(iter(runs.values())):
            values = [run[figure] for run in runs.values() if run[figure] is not None]
            row[figure] = _spread(values) | {"seeds": len(values)}
        base = cells.get((pool, trace, str(reference(Arm.parse(name)))), {})
        shared = [seed for seed in runs if seed in base]
        for figure in ("pass_rate", "pass_rate_curve", "held_out", "held_out_curve", "mixed"):
            delta = [runs[seed][figure] - base[seed][figure] for seed in shared]
            row[f"{figure}_minus_uniform"] = _spread(delta)
        ratios = [
            runs[seed]["rollouts_to_threshold"] / base[seed]["rollouts_to_threshold"]
            for seed in shared
            if runs[seed]["rollouts_to_threshold"] and base[seed]["rollouts_to_threshold"]
        ]
        row["rollouts_over_uniform"] = _spread(ratios) | {"seeds": len(ratios)}
        table.append(row)
    return table


NAMES = ("pool", "trace", "arm", "recipe", "what")
BRIEF = (
    *("pass_rate", "pass_rate_curve", "held_out", "held_out_curve", "coverage", "updates"),
    *("rollouts", "trained_share", "mixed", "excess_nats", "variance_over_uniform"),
    *("variance_over_oracle", "oracle_over_uniform", "pass_rate_minus_uniform"),
    *("pass_rate_curve_minus_uniform", "held_out_minus_uniform", "held_out_curve_minus_uniform"),
    *("mixed_minus_uniform", "rollouts_over_uniform"),
)
"""Figures of a row that stand in benchmarks/results; --runs has every figure of every run."""


def brief(row: dict[str, Any]) -> dict[str, Any]:
    """A row of `summarise` as it is recorded: each figure of `BRIEF` as [mean, standard error]."""
    figures = {
        name: [row[name]["mean"], row[name]["se"]]
        for name in BRIEF
        if name in row and row[name]["mean"] is not None
    }
    return {name: row[name] for name in NAMES} | {"seeds": len(row["seeds"])} | figures


def _spread(values: list[float]) -> dict[str, float | None]:
    if not values:
        return {"mean": None, "se": None, "min": None, "max": None}
    error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return {
        "mean": float(np.mean(values)),
        "se": error,
        "min": float(min(values)),
        "max": float(max(values)),
    }


def show(table: list[dict[str, Any]]) -> None:
    """Print one table per pool and trace."""
    from rich.console import Console
    from rich.table import Table

    columns = {
        "rollouts to threshold / uniform": ("rollouts_over_uniform", "{:.2f}"),
        "curve - uniform": ("pass_rate_curve_minus_uniform", "{:+.3f}"),
        "held-out curve - uniform": ("held_out_curve_minus_uniform", "{:+.3f}"),
        "mixed": ("mixed", "{:.2f}"),
        "variance / oracle": ("variance_over_oracle", "{:.2f}"),
        "excess nats": ("excess_nats", "{:.2f}"),
        "coverage": ("coverage", "{:.2f}"),
        "trained": ("trained_share", "{:.2f}"),
        "updates": ("updates", "{:.0f}"),
    }
    console = Console(width=170)
    for pool, trace in dict.fromkeys((row["pool"], row["trace"]) for row in table):
        rows = [row for row in table if (row["pool"], row["trace"]) == (pool, trace)]
        view = Table(title=f"{trace} trace, {pool} pool: mean (standard error over seeds)")
        view.add_column("arm", no_wrap=True)
        for name in columns:
            view.add_column(name)
        for row in rows:
            view.add_row(
                row["recipe"] or row["arm"],
                *(_cell(row.get(f), form) for f, form in columns.values()),
            )
        console.print(view)


def _cell(spread: dict[str, Any] | None, form: str) -> str:
    if not spread or spread["mean"] is None:
        return ""
    cell = form.format(spread["mean"])
    return cell if not spread["se"] else f"{cell} ({form.format(spread['se']).lstrip('+')})"


def draw(table: list[dict[str, Any]], path: Path) -> None:
    """Difference of the mean pass rate to uniform, arm by arm, one panel per pool."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in table if row["trace"] == "learning"]
    pools = list(dict.fromkeys(row["pool"] for row in rows))
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    if not pools:
        return
    figure, axes = plt.subplots(
        1,
        len(pools),
        figsize=(3.2 + 2.6 * len(pools), 1.6 + 0.19 * len(arms)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, pool in zip(axes[0], pools, strict=True):
        of_arm = {row["arm"]: row for row in rows if row["pool"] == pool}
        for figure_name, marker, label in (
            ("pass_rate_curve_minus_uniform", "o", "training pool"),
            ("held_out_curve_minus_uniform", "x", "held out"),
        ):
            cells = [of_arm[arm][figure_name] for arm in arms]
            axis.errorbar(
                [cell["mean"] for cell in cells],
                np.arange(len(arms)),
                xerr=[2 * (cell["se"] or 0) for cell in cells],
                fmt=marker,
                markersize=4,
                linewidth=0.8,
                label=label,
            )
        axis.axvline(0, color="grey", linewidth=0.6)
        axis.set_title(pool, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(axis="y", linewidth=0.3)
    axes[0][0].set_yticks(np.arange(len(arms)), arms)
    axes[0][0].invert_yaxis()
    axes[0][-1].legend(fontsize=7)
    figure.suptitle(
        "Simulated: mean pass rate over the run minus uniform's (same objective), 2 standard errors",
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="a small part, written to --output alone"
    )
    parser.add_argument("--recipes", action="store_true", help="one arm per recipe, learning trace")
    parser.add_argument("--cross", action="store_true", help="every combination; takes hours")
    parser.add_argument("--arms", nargs="+", type=Arm.parse, help="selection/allocation/stop/rows")
    parser.add_argument("--pools", nargs="+", choices=list(POOLS))
    parser.add_argument("--traces", nargs="+", choices=TRACES)
    parser.add_argument("--seeds", type=int, help="seeds 1 to this")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--minutes", type=float, help="start no further seed after so long")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    results_path = ROOT / "benchmarks" / "results"
    parser.add_argument("--output", type=Path, help="default: trace.json or trace_recipes.json")
    parser.add_argument("--runs", type=Path, help="every run; default: runs/trace/, not if --quick")
    options = parser.parse_args()
    name = "trace_recipes.json" if options.recipes else "trace.json"
    if not options.quick:
        options.output = options.output or results_path / name
        options.runs = options.runs or ROOT / "runs" / "trace" / f"{Path(name).stem}.jsonl"
    if options.recipes:
        options.arms, options.traces = list(RECIPES.values()), options.traces or ["learning"]

    settings = Settings()
    if options.steps or options.quick:
        settings = replace(settings, steps=options.steps or 60)
    seeds = range(1, (options.seeds or (2 if options.quick else 5)) + 1)
    pools = options.pools or (["uniform", "half_dead"] if options.quick else list(POOLS)[:4])
    arms = options.arms or (
        cross_arms() if options.cross else quick_arms() if options.quick else mandatory_arms()
    )
    arms = list(dict.fromkeys([*(reference(arm) for arm in arms), *arms]))
    traces = options.traces or (["learning"] if options.quick else list(TRACES))

    start = time.perf_counter()
    # The other traces are there for calibration and for what is selected: two pools will do.
    blocks = [
        [
            (arm, pool, trace, seed, settings)
            for pool in (pools if is_learning or options.traces else pools[:2])
            for arm in arms
            if is_learning or options.arms or arm == Arm(arm.selection)
            for trace in traces
            if (trace == "learning") == is_learning
        ]
        for is_learning in (True, False)
        for seed in seeds
    ]
    results: list[dict[str, Any]] = []
    with ProcessPoolExecutor(options.jobs) as processes:
        for number, block in enumerate(filter(None, blocks), 1):
            seconds = time.perf_counter() - start
            if options.minutes and seconds > 60 * options.minutes:
                print(f"time is up: {number - 1} blocks are done", file=sys.stderr, flush=True)
                break
            results += processes.map(_run, block, chunksize=2)
            print(f"block {number}: {len(results)} runs", file=sys.stderr, flush=True)
    if options.runs is not None:
        options.runs.parent.mkdir(parents=True, exist_ok=True)
        options.runs.write_text("".join(json.dumps(run) + "\n" for run in results))
    table = summarise(results)
    document = {
        "command": "python benchmarks/trace.py " + " ".join(sys.argv[1:]),
        "settings": asdict(settings),
        "assumes": __doc__,
        "seconds": round(time.perf_counter() - start, 1),
        "summary": [brief(row) for row in table],
    }
    if options.output is not None:
        summaries.write(options.output, document)
        draw(table, options.output.with_suffix(".png"))
    show(table)


def _run(run: tuple[Arm, str, str, int, Settings]) -> dict[str, Any]:
    arm, pool, trace, seed, settings = run
    figures = simulate(arm, pool=pool, trace=trace, seed=seed, settings=settings)
    return {"pool": pool, "trace": trace, "arm": str(arm), "seed": seed, "figures": figures}


if __name__ == "__main__":
    main()
