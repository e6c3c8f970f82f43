"""GVM-RAFT against RAFT and its ablations at equal total generated rollouts, pilots counted.

    python benchmarks/allocation_arms.py                 # every arm, 5 seeds, two processes at a time
    python benchmarks/allocation_arms.py --arms uniform gvm_posterior --seeds 1 --max_steps 20

All arms train the same policy with the same loss, objective, optimizer and prompts per step, and
generate the same number of rollouts per step; only where those go differs, and a manifest asserts
it. Each (arm, seed) is a process of its own with one thread. Results: one JSON, one table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np

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


def check_manifests(manifests: dict[str, dict[str, Any]]) -> None:
    """Refuse to compare arms that differ in anything but where their rollouts go.

    Raises:
        ValueError: naming the setting, and the two arms with their values.
    """
    (first, reference), *others = manifests.items()
    for name, manifest in others:
        for key in sorted(reference.keys() | manifest.keys()):
            if manifest.get(key) != reference.get(key):
                raise ValueError(
                    f"arms cannot be compared: {key} is {reference.get(key)!r} in {first} and "
                    f"{manifest.get(key)!r} in {name}"
                )


def run_one(arm: str, seed: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train one arm with one seed in this process; returns its figures and its manifest."""
    import torch
    from trl import ModelConfig

    torch.set_num_threads(1)
    from recipes import train as recipe_of
    from recipes.config import parse
    from rl.arguments import RolloutConfig
    from rl.assemble import make_planner
    from rl.trainer import RolloutTrainer

    _, settings, solve, scale = ARMS[arm]
    arguments = ["--config", str(ROOT / options.config), "--output_dir", str(folder)]
    arguments += ["--seed", str(seed), "--save_strategy", "no", "--report_to", "none"]
    arguments += ["--completions_every", "0", "--disable_tqdm", "true", "--if_run_exists", "error"]
    if options.max_steps:
        arguments += ["--max_steps", str(options.max_steps)]
    for name, value in settings.items():
        arguments += [f"--{name}", str(value)]
    if "allocator" not in settings:
        arguments += ["--allocator", "neyman"]
    if "pilot_rollouts" not in settings:
        arguments += ["--pilot_rollouts", "0", "--pilot_estimate", "posterior"]
    recipe, config, model_config = parse(
        (recipe_of.RecipeArguments, RolloutConfig, ModelConfig), arguments
    )
    rows, validation, rewards = recipe_of.task_or_data(recipe, config, model_config)

    def planner(keys: list[str]) -> Any:
        return make_planner(config, keys, allocate=solve, scale=scale)

    trainer = RolloutTrainer(
        recipe_of.load_model(model_config),
        rewards,
        config,
        rows,
        eval_dataset=validation,
        processing_class=recipe_of.load_tokenizer(recipe, model_config),
        planner=planner,
    )
    trainer.train()
    history = trainer.state.log_history
    manifest = {k: repr(v) for k, v in config.to_dict().items() if k not in VARIES}
    manifest |= {
        "rollouts_per_step": config.rollouts_per_step,
        "train_prompts": len(rows),
        "validation_prompts": len(validation),
        "model_dtype": str(next(trainer.model.parameters()).dtype),
    }
    return {
        "arm": arm,
        "seed": seed,
        "manifest": manifest,
        "totals": trainer.ledger.totals,
        "validation": [
            {"step": h["step"]} | {k: v for k, v in h.items() if k.startswith("eval_")}
            for h in history
            if "eval_pass_rate" in h
        ],
        "reward": [h["reward"] for h in history if "reward" in h],
        "mixed": [h["groups/mixed_share"] for h in history if "reward" in h],
    }


def summarise(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per arm: final validation, its gain, the area under the curve, and the difference to uniform.

    Differences are paired by seed; `se` is the standard error of their mean.
    """
    by_arm: dict[str, dict[int, dict[str, Any]]] = {}
    for result in results:
        by_arm.setdefault(result["arm"], {})[result["seed"]] = result

    def curve(result: dict[str, Any], name: str) -> list[float]:
        return [point[f"eval_{name}"] for point in result["validation"]]

    table = []
    for arm, runs in by_arm.items():
        row: dict[str, Any] = {"arm": arm, "what": ARMS[arm][0], "seeds": sorted(runs)}
        for name in ("pass_rate", "greedy_accuracy"):
            final = [curve(r, name)[-1] for r in runs.values()]
            gain = [curve(r, name)[-1] - curve(r, name)[0] for r in runs.values()]
            row[name] = {"mean": float(np.mean(final)), "min": min(final), "max": max(final)}
            row[f"{name}_gain"] = {"mean": float(np.mean(gain)), "min": min(gain), "max": max(gain)}
            row[f"{name}_curve_mean"] = float(
                np.mean([np.mean(curve(r, name)) for r in runs.values()])
            )
            shared = [s for s in runs if s in by_arm.get("uniform", {})]
            if arm != "uniform" and len(shared) > 1:
                for kind, of in (("final", lambda c: c[-1]), ("curve_mean", np.mean)):
                    delta = [
                        float(of(curve(runs[s], name)) - of(curve(by_arm["uniform"][s], name)))
                        for s in shared
                    ]
                    row[f"{name}_{kind}_minus_uniform"] = {
                        "mean": float(np.mean(delta)),
                        "se": float(np.std(delta, ddof=1) / len(delta) ** 0.5),
                    }
        for name in (
            "rollouts_drawn",
            "rollouts_trained",
            "tokens_drawn",
            "tokens_trained",
            "updates",
        ):
            row[name] = float(np.mean([r["totals"][name] for r in runs.values()]))
        row["seconds"] = {
            k.removeprefix("seconds_"): float(
                np.mean([r["totals"].get(k, 0) for r in runs.values()])
            )
            for k in next(iter(runs.values()))["totals"]
            if k.startswith("seconds_")
        }
        table.append(row)
    return table


def show(table: list[dict[str, Any]]) -> None:
    """Print the summary as a table."""
    from rich.console import Console
    from rich.table import Table

    view = Table(title="validation after training: mean and range over seeds")
    for column in (
        "arm",
        "pass rate",
        "greedy",
        "pass - uniform",
        "curve - uniform",
        "rollouts",
        "tokens",
    ):
        view.add_column(column)
    for row in table:
        cells = [row["arm"]]
        for name in ("pass_rate", "greedy_accuracy"):
            cells.append("{mean:.3f} [{min:.3f}, {max:.3f}]".format(**row[name]))
        for kind in ("final", "curve_mean"):
            delta = row.get(f"pass_rate_{kind}_minus_uniform")
            cells.append("{mean:+.3f} (se {se:.3f})".format(**delta) if delta else "")
        cells += [f"{row['rollouts_drawn']:.0f}", f"{row['tokens_drawn']:.3g}"]
        view.add_row(*cells)
    Console().print(view)


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
    parser.add_argument("--one", nargs=2, metavar=("ARM", "SEED"), help="run this one, here")
    options = parser.parse_args()
    if options.one:
        arm, seed = options.one[0], int(options.one[1])
        target = options.folder / f"{arm}-seed{seed}"
        result = run_one(arm, seed, target, options)
        (target / "result.json").write_text(json.dumps(result))
        return
    jobs = [(arm, seed) for seed in range(1, options.seeds + 1) for arm in options.arms]
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda job: _in_process(*job, options), jobs))
    check_manifests({f"{r['arm']}-seed{r['seed']}": r["manifest"] for r in results})
    table = summarise(results)
    document = {
        "command": f"python benchmarks/allocation_arms.py --arms {' '.join(options.arms)} "
        f"--seeds {options.seeds} --max_steps {options.max_steps} --config {options.config}",
        "manifest": results[0]["manifest"],
        "summary": table,
        "runs": [{k: v for k, v in r.items() if k != "manifest"} for r in results],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(document, indent=1))
    show(table)


def _in_process(arm: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    target = options.folder / f"{arm}-seed{seed}"
    if not (target / "result.json").exists():
        target.mkdir(parents=True, exist_ok=True)
        for left in target.glob("*.jsonl"):  # of a run that was stopped
            left.unlink()
        arguments = [sys.executable, __file__, "--one", arm, str(seed)]
        arguments += ["--config", options.config, "--folder", str(options.folder)]
        if options.max_steps:
            arguments += ["--max_steps", str(options.max_steps)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with open(target / "log.txt", "w") as log:
            done = subprocess.run(arguments, env=environment, stdout=log, stderr=subprocess.STDOUT)
        if done.returncode:
            raise RuntimeError(f"{arm}, seed {seed} failed; see {target / 'log.txt'}")
        print(f"{arm}, seed {seed}: done", flush=True)
    return json.loads((target / "result.json").read_text())


if __name__ == "__main__":
    main()
