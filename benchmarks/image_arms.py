"""Compare diffusion recipes on the digits at equal evaluations of the denoiser.

    python benchmarks/image_arms.py                      # every arm, 4 seeds, two processes at a time
    python benchmarks/image_arms.py --arms ddpo branch --seeds 1 --evaluations 6000

An arm is a YAML of recipes/images, or one with a few settings changed. A run ends after the step in
which the denoiser has been evaluated `--evaluations` times for rollouts to train on (rows; the replay
of steps in the update is not among them and is reported beside). Model, pretraining, learning rate,
clip and updates per step are equal. The result is the share of validation samples, with noise as in
training, whose digit the classifier reads as prompted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np

from benchmarks import arms, summaries

ARMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    # name: what it is, recipe, settings that differ from it
    "ddpo": ("no branching, compared within the prompt (DDPO)", "ddpo", {}),
    "prompt": ("branches of 4 after step 4, compared within the prompt", "branch", {}),
    "branch": ("the same, compared within the branch", "branch", {"baseline": "branch"}),
    "leave_one_out": (
        "the same, each step compared with the branches that left at it",
        "branch",
        {"baseline": "leave_one_out"},
    ),
    "b2_released": ("B2-DiffuRL as released", "b2_released", {}),
    "b2_within_branch": ("B2-DiffuRL as its text reads", "b2_within_branch", {}),
    "uniform_5": (
        "as prompt, 5 prompts of 24 samples a step",
        "vade_branch",
        {"selector": "uniform"},
    ),
    "vade": ("the same, prompts by VADE", "vade_branch", {}),
}


def train(arm: str, seed: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One run in this process: validation before and after, the curve of rewards, what it cost."""
    import torch
    from trl import ModelConfig

    torch.set_num_threads(1)
    from recipes.arguments import RecipeArguments
    from recipes.config import parse
    from recipes.diffusion import make_trainer
    from rl.config.diffusion import DenoisingConfig

    _, recipe, changed = ARMS[arm]
    given = {
        "config": ROOT / "recipes" / "images" / f"{recipe}.yaml",
        "output_dir": folder,
        "seed": seed,
        "max_steps": 100,
        "max_evaluations": options.evaluations,
        "eval_steps": 1000,
        "eval_rollouts_per_prompt": 50,
        "save_strategy": "no",
        "report_to": "none",
        "images_every": 0,
        "disable_tqdm": "true",
        "if_run_exists": "error",
        "task_settings": json.dumps({"folder": str(options.model)}),
    } | changed
    if options.quick:
        pretraining = dataclasses.asdict(_quick_digits())
        tiny = {"folder": str(options.model), "pretraining": pretraining}
        given |= {"task_settings": json.dumps(tiny), "eval_rollouts_per_prompt": 2}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    settings, config, model_config = parse((RecipeArguments, DenoisingConfig, ModelConfig), words)
    trainer = make_trainer(settings, config, model_config)
    trainer.train()
    history = trainer.state.log_history
    steps = [h for h in history if "reward" in h and "loss" in h]
    return {
        "validation": [
            {k: v for k, v in h.items() if k.startswith("eval_")}
            for h in history
            if "eval_pass_rate" in h
        ],
        "reward": [h["reward"] for h in steps],
        "informative": [h["branches/informative_share"] for h in steps],
        "mismatch": max(h.get("mismatch", 0.0) for h in steps),
        "steps": len(steps),
        "evaluations": trainer.evaluations,
        "replay_evaluations": trainer.policy.engine.replay_evaluations,
        "totals": trainer.ledger.totals,
    }


def _quick_digits() -> Any:
    from recipes.images.digits import Digits

    return Digits(steps=2, batch_size=8)


def summarise(results: list[dict[str, Any]], baseline: str = "ddpo") -> list[dict[str, Any]]:
    """Per arm: final shares and their spread; differences to the baseline are paired by seed."""
    by_arm: dict[str, dict[int, dict[str, Any]]] = {}
    for result in results:
        by_arm.setdefault(result["arm"], {})[result["seed"]] = result

    def final(result: dict[str, Any], name: str) -> float:
        return result["validation"][-1][f"eval_{name}"]

    table = []
    for arm, runs in by_arm.items():
        shares = [final(r, "pass_rate") for r in runs.values()]
        row: dict[str, Any] = {
            "arm": arm,
            "what": ARMS[arm][0],
            "pass_rate": {
                "mean": float(np.mean(shares)),
                "min": min(shares),
                "max": max(shares),
                "start": float(
                    np.mean([r["validation"][0]["eval_pass_rate"] for r in runs.values()])
                ),
            },
            "deterministic": float(
                np.mean([final(r, "deterministic_accuracy") for r in runs.values()])
            ),
            "diversity": float(np.mean([final(r, "sampled_diversity") for r in runs.values()])),
        }
        shared = [seed for seed in runs if seed in by_arm.get(baseline, {})]
        if arm != baseline and len(shared) > 1:
            delta = [
                final(runs[s], "pass_rate") - final(by_arm[baseline][s], "pass_rate")
                for s in shared
            ]
            row[f"minus_{baseline}"] = {
                "mean": float(np.mean(delta)),
                "se": float(np.std(delta, ddof=1) / len(delta) ** 0.5),
            }
        for name in ("steps", "evaluations", "replay_evaluations"):
            row[name] = float(np.mean([r[name] for r in runs.values()]))
        for name in ("rollouts_drawn", "rollouts_trained", "tokens_trained"):
            row[name] = float(np.mean([r["totals"][name] for r in runs.values()]))
        row["informative"] = float(np.mean([np.mean(r["informative"]) for r in runs.values()]))
        row["mismatch"] = max(r["mismatch"] for r in runs.values())
        table.append(row)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, default=4, help="seeds 1 to this")
    parser.add_argument("--evaluations", type=int, default=30_000, help="of the denoiser, per run")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "image_arms")
    parser.add_argument("--model", type=Path, default=ROOT / "runs" / "digits-pretrained")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results" / "image_arms.json"
    )
    parser.add_argument(
        "--quick", action="store_true", help="two arms of a tiny model, in a folder of their own"
    )
    parser.add_argument("--one", nargs=2, metavar=("ARM", "SEED"), help="run this one, here")
    options = parser.parse_args()
    if options.quick:
        options.arms, options.seeds, options.evaluations = options.arms[:2], 1, 100
    if options.quick and not options.one:
        options.folder = Path(tempfile.mkdtemp())
        options.model, options.output = options.folder / "model", options.folder / "summary.json"
    if options.one:
        arm, seed = options.one[0], int(options.one[1])
        target = options.folder / f"{arm}-seed{seed}"
        result = {"arm": arm, "seed": seed} | train(arm, seed, target, options)
        (target / "result.json").write_text(json.dumps(result))
        return
    from recipes.images import digits

    # Once, before processes would.
    digits.pretrain(options.model, _quick_digits() if options.quick else None)
    jobs = [(arm, seed) for seed in range(1, options.seeds + 1) for arm in options.arms]
    passed = ["--evaluations", str(options.evaluations), "--model", str(options.model)]
    passed += ["--quick"] * options.quick
    results = arms.in_processes(jobs, __file__, options, passed)
    table = summarise(results)
    document = {
        "command": f"python benchmarks/image_arms.py --arms {' '.join(options.arms)} "
        f"--seeds {options.seeds} --evaluations {options.evaluations}",
        "summary": table,
    }
    summaries.write(options.output, document)
    for row in table:
        p = row["pass_rate"]
        delta = row.get("minus_ddpo")
        print(
            f"{row['arm']:18s} {p['start']:.3f} -> {p['mean']:.3f} [{p['min']:.3f}, {p['max']:.3f}]"
            + (f"  minus ddpo {delta['mean']:+.3f} (se {delta['se']:.3f})" if delta else "")
            + f"  deterministic {row['deterministic']:.3f}  diversity {row['diversity']:.3f}"
            + f"  steps {row['steps']:.0f}  evaluations {row['evaluations']:.0f}"
        )


if __name__ == "__main__":
    main()
