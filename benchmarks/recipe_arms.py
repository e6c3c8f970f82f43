"""Compare the recipes of the arithmetic task, and their parts, at equal generated tokens.

    python benchmarks/recipe_arms.py                     # every arm, 5 seeds, two processes at a time
    python benchmarks/recipe_arms.py --arms grpo vade_grpo --seeds 1 --tokens 40000

An arm is a YAML of recipes/arithmetic, or one with a few settings changed. Every run ends after the
step in which it has generated `--tokens`, whatever became of them: filtered groups, surplus and dropped
rows count. All other settings are equal and a manifest asserts it: model, warm start, learning rate,
rows of prompts, lengths, temperature. Steps and optimizer updates differ, and are reported.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import arms, summaries

BY_STD = {"advantage": "grpo", "budget_min": 1}  # as grpo.yaml, although budgets differ
EARLY = {"stopping": "early", "stopping_round_size": 4, "posterior_decay_chosen": 0.8} | BY_STD

ARMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    # name: what it is, recipe, settings that differ from it
    "grpo": ("GRPO, uniform prompts and budgets", "grpo", {}),
    "leave_one_out": (
        "the same with leave-one-out advantages",
        "grpo",
        {"advantage": "leave_one_out"},
    ),
    "refill": ("GRPO, groups without spread replaced", "grpo", {"refill": True}),
    "dapo": ("DAPO: refill, clip-higher, token mean", "dapo", {}),
    "vade_grpo": ("VADE: Thompson draws, p(1-p)^2, memory .2", "vade_grpo", {}),
    "vade_0.8": ("the same, memory .8", "vade_grpo", {"posterior_decay_chosen": 0.8}),
    "posterior_mean_0.8": (
        "largest expected p(1-p)^2, memory .8",
        "vade_grpo",
        {"selector": "posterior_mean", "posterior_decay_chosen": 0.8},
    ),
    "band_0.8": (
        "uniform where the posterior mean is in [.3, .7], memory .8",
        "vade_grpo",
        {"selector": "band", "posterior_decay_chosen": 0.8},
    ),
    "early": (
        "groups alike after 4 of 8 stop if likelier alike than mixed",
        "grpo",
        EARLY,
    ),
    "pods_grpo": ("PODS: 4 of 8 rows by largest variance", "pods_grpo", {}),
    "d3s_rows": ("D3S rows .25 -> 1, every token", "grpo", {"down_sampling": "d3s"}),
    "d3s_tokens": ("D3S tokens .2 -> 1, every row", "grpo", {"token_selection": "d3s"}),
    "d3s_grpo": ("D3S rows and tokens", "d3s_grpo", {}),
    "hapo": ("HAPO: temperature, advantages and clips by entropy", "hapo", {}),
    "vade_early": (
        "VADE with memory .8, groups stop early",
        "vade_grpo",
        EARLY,
    ),
    "everything": ("the same with leave-one-out budgets and advantages", "everything", {}),
    "gvm_grpo": ("GVM budgets by the posterior", "gvm_grpo", {}),
    "neyman": ("Neyman budgets by the posterior", "grpo", {"allocator": "neyman"} | BY_STD),
    "cost_aware": (
        "the same, fewer where rollouts are long",
        "grpo",
        {"allocator": "cost_aware"} | BY_STD,
    ),
    "reinforce_ada": ("Reinforce-Ada, balanced", "reinforce_ada", {}),
}
FREE = (
    *("trainer", "selector", "selection_score", "posterior_decay_chosen", "posterior_decay_rest"),
    *("allocator", "budget_min", "rollouts_per_prompt", "rollouts_per_step"),
    *("stopping", "stopping_round_size", "stopping_needed", "stopping_threshold"),
    *("refill", "refill_max_draws", "refill_at_cap"),
    *("down_sampling", "rows_per_prompt", "weight_rows"),
    *("token_selection", "token_fraction_initial", "token_fraction_final", "token_denominator"),
    *("advantage", "loss", "epsilon_high", "delta", "length_weight"),
    *("adaptive_temperature_tau", "old_logprobs", "importance_correction", "importance_cap"),
)
"""Settings in which arms may differ; the manifest holds all others and must be equal."""
VARIES = (*FREE, "output_dir", "seed", "data_seed", "logging_dir", "run_name")


def arguments_of(arm: str, seed: int, folder: Path, tokens: int) -> list[str]:
    """The command line of one run."""
    _, recipe, changed = ARMS[arm]
    given = {
        "config": ROOT / "recipes" / "arithmetic" / f"{recipe}.yaml",
        "output_dir": folder,
        "seed": seed,
        "max_generated_tokens": tokens,
        "max_steps": 10_000,
        "eval_steps": 20,
        "posterior_prior": "flat",
    } | changed
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, default=5, help="seeds 1 to this")
    parser.add_argument("--tokens", type=int, default=150_000, help="generated tokens of a run")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "recipe_arms")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results" / "recipe_arms.json"
    )
    parser.add_argument(
        "--quick", action="store_true", help="two arms of a tiny model, in a folder of their own"
    )
    parser.add_argument("--one", nargs=2, metavar=("ARM", "SEED"), help="run this one, here")
    options = parser.parse_args()
    if options.quick:
        options.arms, options.seeds, options.tokens = options.arms[:2], 1, 400
    if options.quick and not options.one:
        options.folder = Path(tempfile.mkdtemp())
        options.output = options.folder / "summary.json"
    if options.one:
        arm, seed = options.one[0], int(options.one[1])
        target = options.folder / f"{arm}-seed{seed}"
        words = arguments_of(arm, seed, target, options.tokens)
        if options.quick:
            words += arms.quick_arithmetic(options.folder)
        found = arms.train(words)
        settings = found.pop("settings")
        manifest = {name: value for name, value in settings.items() if name not in VARIES}
        result = {"arm": arm, "seed": seed, "manifest": manifest} | found
        (target / "result.json").write_text(json.dumps(result))
        return
    jobs = [(arm, seed) for seed in range(1, options.seeds + 1) for arm in options.arms]
    passed = ["--tokens", str(options.tokens)] + ["--quick"] * options.quick
    results = arms.in_processes(jobs, __file__, options, passed)
    arms.check_manifests({f"{r['arm']}-seed{r['seed']}": r["manifest"] for r in results})
    what = {name: arm[0] for name, arm in ARMS.items()}
    table = arms.summarise(results, what=what, baseline="grpo")
    document = {
        "command": f"python benchmarks/recipe_arms.py --arms {' '.join(options.arms)} "
        f"--seeds {options.seeds} --tokens {options.tokens}",
        "manifest": results[0]["manifest"],
        "summary": table,
    }
    summaries.write(options.output, document)
    arms.show(table, baseline="grpo")


if __name__ == "__main__":
    main()
