"""Compare GVM-RAFT with RAFT and its ablations at equal generated rollouts, pilots counted.

    python benchmarks/allocation_arms.py                 # every arm, 5 seeds, two processes at a time
    python benchmarks/allocation_arms.py --arms uniform gvm_posterior --seeds 1 --max_steps 20

All arms train the same policy with the same loss, objective, optimizer and prompts per step, and
generate the same number of rollouts per step; only where those go differs, and a manifest asserts
it. Each (arm, seed) is a process of its own with one thread. Results: one JSON, one table.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np

from benchmarks import arms, summaries
from samplers import allocation
from samplers.keys import stable_hash

PILOTS = {"pilot_rollouts": 4, "pilot_estimate": "pilot", "pilot_use": "pool"}


def permuted(std_P: np.ndarray, total: int, **box: Any) -> np.ndarray:
    """The Neyman budgets, dealt at random among the prompts whose scale is not 0.

    Isolates what uneven budgets do by themselves. The deal depends on the scales alone, so a run
    is reproducible.
    """
    budget_P = allocation.neyman(std_P, total, **box)
    live = np.flatnonzero(np.asarray(std_P) > 0)
    generator = np.random.default_rng(
        stable_hash("permuted", *map(repr, np.asarray(std_P).tolist()))
    )
    budget_P[live] = budget_P[generator.permutation(live)]
    return budget_P


Arm = tuple[str, dict[str, Any], Callable | None, Callable | None]
ARMS: dict[str, Arm] = {
    # name: what it is, settings, integer solver, scale (None: what the settings name)
    "uniform": ("RAFT++: every prompt the same", {"allocator": "uniform"}, None, None),
    "drop": (
        "4 pilots; rest to prompts with a success, evenly",
        PILOTS,
        allocation.neyman,
        allocation.live,
    ),
    "inverse_sqrt": (
        "4 pilots; rest by 1/sqrt(p) of the pilots",
        PILOTS,
        allocation.neyman,
        allocation.inverse_sqrt,
    ),
    "inverse_sqrt_norm": (
        "the same times gradient norms",
        PILOTS | {"allocator": "gvm", "gvm_gradient_norm": "mean"},
        allocation.neyman,
        allocation.inverse_sqrt,
    ),
    "gvm": (
        "4 pilots; GVM with alpha, beta and gradient norms, pooled",
        PILOTS | {"allocator": "gvm", "gvm_gradient_norm": "mean"},
        None,
        None,
    ),
    "gvm_no_norm": ("GVM without gradient norms", PILOTS | {"allocator": "gvm"}, None, None),
    "gvm_discard": (
        "GVM, pilots thrown away as published",
        PILOTS | {"allocator": "gvm", "pilot_use": "discard"},
        None,
        None,
    ),
    "gvm_posterior": (
        "GVM by the posterior of earlier steps, no pilots",
        {"allocator": "gvm"},
        None,
        None,
    ),
    "gvm_both": (
        "4 pilots, pooled; rest by the posterior that has seen them",
        PILOTS | {"allocator": "gvm", "pilot_estimate": "posterior"},
        None,
        None,
    ),
    "permuted": (
        "GVM's budgets dealt at random among live prompts",
        PILOTS,
        permuted,
        partial(allocation.gvm_plug_in, alpha=1e-3, beta=2.0),
    ),
}
FREE = (
    "allocator",
    "gvm_gradient_norm",
    "pilot_rollouts",
    "pilot_estimate",
    "pilot_use",
    "output_dir",
)
"""Settings in which arms may differ; the manifest holds all others and must be equal."""
VARIES = (*FREE, "seed", "data_seed", "logging_dir", "run_name")


def run_one(arm: str, seed: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train one arm with one seed in this process; returns its figures and its manifest."""
    from rl.stages.planning import make_planner

    _, settings, solve, scale = ARMS[arm]
    arguments = ["--config", str(ROOT / options.config), "--output_dir", str(folder)]
    arguments += ["--seed", str(seed), "--posterior_prior", "flat"]
    if options.max_steps:
        arguments += ["--max_steps", str(options.max_steps)]
    for name, value in settings.items():
        arguments += [f"--{name}", str(value)]
    if "allocator" not in settings:
        arguments += ["--allocator", "neyman"]
    if "pilot_rollouts" not in settings:
        arguments += ["--pilot_rollouts", "0", "--pilot_estimate", "posterior"]

    if options.quick:
        arguments += arms.quick_arithmetic(options.folder)

    def planner(config: Any, keys: list[str]) -> Any:
        return make_planner(config, keys, allocate=solve, scale=scale)

    found = arms.train(arguments, planner)
    settings = found.pop("settings")
    manifest = {name: value for name, value in settings.items() if name not in VARIES}
    return {"arm": arm, "seed": seed, "manifest": manifest} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, default=5, help="seeds 1 to this")
    parser.add_argument("--max_steps", type=int, default=None, help="default: the recipe's")
    parser.add_argument("--config", default="recipes/arithmetic/gvm_raft.yaml")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "allocation_arms")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results" / "allocation_arms.json"
    )
    parser.add_argument(
        "--quick", action="store_true", help="two arms of a tiny model, in a folder of their own"
    )
    parser.add_argument("--one", nargs=2, metavar=("ARM", "SEED"), help="run this one, here")
    options = parser.parse_args()
    if options.quick:
        options.arms, options.seeds, options.max_steps = options.arms[:2], 1, 2
    if options.quick and not options.one:
        options.folder = Path(tempfile.mkdtemp())
        options.output = options.folder / "summary.json"
    if options.one:
        arm, seed = options.one[0], int(options.one[1])
        target = options.folder / f"{arm}-seed{seed}"
        result = run_one(arm, seed, target, options)
        (target / "result.json").write_text(json.dumps(result))
        return
    jobs = [(arm, seed) for seed in range(1, options.seeds + 1) for arm in options.arms]
    passed = ["--config", options.config]
    if options.max_steps:
        passed += ["--max_steps", str(options.max_steps)]
    passed += ["--quick"] * options.quick
    results = arms.in_processes(jobs, __file__, options, passed)
    arms.check_manifests({f"{r['arm']}-seed{r['seed']}": r["manifest"] for r in results})
    what = {name: arm[0] for name, arm in ARMS.items()}
    table = arms.summarise(results, what=what, baseline="uniform")
    document = {
        "command": f"python benchmarks/allocation_arms.py --arms {' '.join(options.arms)} "
        f"--seeds {options.seeds} --max_steps {options.max_steps} --config {options.config}",
        "manifest": results[0]["manifest"],
        "summary": table,
    }
    summaries.write(options.output, document)
    arms.show(table, baseline="uniform")


if __name__ == "__main__":
    main()
