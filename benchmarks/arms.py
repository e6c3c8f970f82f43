"""Train arms of a comparison with equal settings and several seeds; summarise paired differences."""

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

import numpy as np

Planner = Callable[..., Any] | None


QUICK_TASK = {
    "train": 2,
    "validation": 1,
    "warm_start": {"steps": 3, "rows": 200, "hidden_size": 16, "num_layers": 1, "num_heads": 2},
}
"""Settings of the arithmetic task with which a run takes seconds and learns nothing."""


def quick_arithmetic(folder: Path) -> list[str]:
    """Arguments that make a run of the arithmetic task tiny; its model goes to `folder`."""
    task = QUICK_TASK | {"folder": str(folder / "warm-start")}
    sizes = {"prompts_per_step": 2, "rollouts_per_prompt": 8, "max_completion_length": 16}
    given = {"task_settings": json.dumps(task), "eval_rollouts_per_prompt": 1} | sizes
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


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


def train(arguments: list[str], planner: Planner = None) -> dict[str, Any]:
    """Train one recipe in this process; return its figures and its settings.

    Args:
        arguments: as for `recipes/train.py`.
        planner: `planner(config, keys)` in place of the one the settings describe.
    """
    import torch
    from trl import ModelConfig

    torch.set_num_threads(1)
    from recipes import language
    from recipes.arguments import RecipeArguments
    from recipes.config import parse
    from rl.config.language import RolloutConfig
    from rl.trainer import RolloutTrainer

    arguments = [*arguments, "--save_strategy", "no", "--report_to", "none"]
    arguments += ["--completions_every", "0", "--disable_tqdm", "true", "--if_run_exists", "error"]
    recipe, config, model_config = parse((RecipeArguments, RolloutConfig, ModelConfig), arguments)
    rows, validation, rewards = language.prepare(recipe, config, model_config)
    trainer = RolloutTrainer(
        language.load_model(model_config),
        rewards,
        config,
        rows,
        eval_dataset=validation,
        processing_class=language.load_tokenizer(recipe, model_config),
        planner=None if planner is None else partial(planner, config),
    )
    trainer.train()
    history = trainer.state.log_history
    tokens = {h["step"]: h["ledger_total/tokens_drawn"] for h in history if "reward" in h}
    return {
        # Without what the run is made of besides, such as its command, which names its folder.
        "settings": {k: repr(v) for k, v in config.to_dict().items() if not k.startswith("run/")}
        | {
            "rollouts_per_step": config.rollouts_per_step,
            "train_prompts": len(rows),
            "validation_prompts": len(validation),
            "model_dtype": str(next(trainer.model.parameters()).dtype),
        },
        "totals": trainer.ledger.totals,
        "validation": [
            {"step": h["step"], "tokens_drawn": tokens.get(h["step"], 0)}
            | {k: v for k, v in h.items() if k.startswith("eval_")}
            for h in history
            if "eval_pass_rate" in h
        ],
        "reward": [h["reward"] for h in history if "reward" in h],
        "mixed": [h["groups/mixed_share"] for h in history if "groups/mixed_share" in h],
    }


def in_processes(
    jobs: list[tuple[str, int]], script: str, options: argparse.Namespace, passed: list[str]
) -> list[dict[str, Any]]:
    """Run each (arm, seed) in its own process with one thread; keep results that exist already.

    The script is called with `--one ARM SEED` and writes `result.json` into `folder/ARM-seedSEED`.
    """

    def one(job: tuple[str, int]) -> dict[str, Any]:
        arm, seed = job
        target = options.folder / f"{arm}-seed{seed}"
        if not (target / "result.json").exists():
            target.mkdir(parents=True, exist_ok=True)
            for left in target.glob("*.jsonl"):  # of a run that was stopped
                left.unlink()
            command = [sys.executable, script, "--one", arm, str(seed)]
            command += ["--folder", str(options.folder), *passed]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            with open(target / "log.txt", "w") as log:
                done = subprocess.run(
                    command, env=environment, stdout=log, stderr=subprocess.STDOUT
                )
            if done.returncode:
                raise RuntimeError(f"{arm}, seed {seed} failed; see {target / 'log.txt'}")
            print(f"{arm}, seed {seed}: done", flush=True)
        return json.loads((target / "result.json").read_text())

    with ThreadPoolExecutor(options.jobs) as pool:
        return list(pool.map(one, jobs))


def summarise(
    results: list[dict[str, Any]], *, what: dict[str, str], baseline: str
) -> list[dict[str, Any]]:
    """Per arm: final validation, its gain, the mean of its curve, and differences to the baseline.

    Differences are paired by seed; `se` is the standard error of their mean. The mean of a curve is
    that over generated tokens (trapezoids between validations), so arms of unequal steps compare.
    """
    by_arm: dict[str, dict[int, dict[str, Any]]] = {}
    for result in results:
        by_arm.setdefault(result["arm"], {})[result["seed"]] = result

    def curve(result: dict[str, Any], name: str) -> list[float]:
        return [point[f"eval_{name}"] for point in result["validation"]]

    def mean_of_curve(result: dict[str, Any], name: str) -> float:
        tokens = [point["tokens_drawn"] for point in result["validation"]]
        return float(np.trapezoid(curve(result, name), tokens) / (tokens[-1] - tokens[0]))

    def end_of_curve(result: dict[str, Any], name: str) -> float:
        return curve(result, name)[-1]

    table = []
    for arm, runs in by_arm.items():
        row: dict[str, Any] = {"arm": arm, "what": what[arm], "seeds": sorted(runs)}
        for name in ("pass_rate", "greedy_accuracy"):
            final = [curve(r, name)[-1] for r in runs.values()]
            gain = [curve(r, name)[-1] - curve(r, name)[0] for r in runs.values()]
            row[name] = {"mean": float(np.mean(final)), "min": min(final), "max": max(final)}
            row[f"{name}_gain"] = {"mean": float(np.mean(gain)), "min": min(gain), "max": max(gain)}
            row[f"{name}_curve_mean"] = float(
                np.mean([mean_of_curve(r, name) for r in runs.values()])
            )
            shared = [s for s in runs if s in by_arm.get(baseline, {})]
            if arm != baseline and len(shared) > 1:
                for kind, of in (("final", end_of_curve), ("curve_mean", mean_of_curve)):
                    delta = [of(runs[k], name) - of(by_arm[baseline][k], name) for k in shared]
                    row[f"{name}_{kind}_minus_{baseline}"] = {
                        "mean": float(np.mean(delta)),
                        "se": float(np.std(delta, ddof=1) / len(delta) ** 0.5),
                    }
        row["mixed_share"] = float(np.mean([np.mean(r["mixed"]) for r in runs.values()]))
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


def show(table: list[dict[str, Any]], *, baseline: str) -> None:
    """Print the summary as a table."""
    from rich.console import Console
    from rich.table import Table

    view = Table(title="validation after training: mean and range over seeds")
    for column in (
        "arm",
        "pass rate",
        "greedy",
        f"pass - {baseline}",
        f"curve - {baseline}",
        "updates",
        "rollouts",
        "tokens",
    ):
        view.add_column(column)
    for row in table:
        cells = [row["arm"]]
        for name in ("pass_rate", "greedy_accuracy"):
            cells.append("{mean:.3f} [{min:.3f}, {max:.3f}]".format(**row[name]))
        for kind in ("final", "curve_mean"):
            delta = row.get(f"pass_rate_{kind}_minus_{baseline}")
            cells.append("{mean:+.3f} (se {se:.3f})".format(**delta) if delta else "")
        cells += [
            f"{row['updates']:.0f}",
            f"{row['rollouts_drawn']:.0f}",
            f"{row['tokens_drawn']:.3g}",
        ]
        view.add_row(*cells)
    Console().print(view)
