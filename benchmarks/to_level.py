"""How many tokens and CPU seconds an arm needs to reach a validation pass rate, beside TRL's trainer.

    python -m benchmarks.to_level tune --task arithmetic --families trl grpo raft --jobs 2
    python -m benchmarks.to_level final --task arithmetic --seeds 11 12 13 --jobs 2
    python -m benchmarks.to_level show --task arithmetic

*tune* runs all shapes, numbers of updates and step sizes of the grid with the first seed, the best six
with the second, the best three with the third, or the cells that are named with all three. The best is
the cell of the largest mean of its curve over generated tokens. *final* runs arms on seeds that were not
tuned on. Every run generates the same number of tokens, has one thread, a constant learning rate, the
same warm start, prompts, verifier and validation. Generated tokens count whatever became of them;
processed tokens are those and every prompt as often as it was rolled out; CPU seconds are those of
training steps alone.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import arms, summaries

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

SHAPES = {"raft++": ((64, 1), (32, 2), (16, 4)), "grpo": ((32, 2), (16, 4), (32, 8))}
"""Trainer -> (prompts, rollouts of each) of a step. GRPO's advantages of groups of one are 0."""
UPDATES = (1, 2, 4)
RATES = (0.75e-4, 1.5e-4, 3e-4, 5e-4)
TUNING_SEEDS = (1, 2, 3)
SURVIVORS = (6, 3)
"""Cells that are run again with the second seed, and with the third."""


@dataclass(frozen=True)
class Task:
    """One embedded task, and how long its runs are."""

    name: str
    max_completion_length: int
    tokens: int
    """Generated tokens of a run."""
    validate_every: int
    """Generated tokens between validations, about."""
    mean_length: float
    """Tokens of a rollout, about; only the distance between validations depends on it."""
    levels: tuple[float, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    """`task_settings` of the recipe."""


TASKS = {
    "arithmetic": Task("arithmetic", 40, 70_000, 3_500, 12.0, (0.50, 0.55, 0.60, 0.65)),
    "maze": Task("maze", 48, 70_000, 3_500, 12.0, (0.50, 0.55, 0.60)),
}

GRPO = {"trainer": "grpo", "advantage": "leave_one_out"}
RAFT = {"trainer": "raft++"}
FLAT = {"posterior_prior": "flat"}
VADE = RAFT | {
    "selector": "vade",
    "selection_score": "variance",
    "posterior_decay_chosen": 0.8,
    "posterior_decay_rest": 0.98,
}
BY_LEVEL = {"posterior_prior": "column", "posterior_prior_column": "level"}

FAMILIES: dict[str, dict[str, Any]] = {
    # name: settings on top of the task's _base.yaml; "trl" is TRL's GRPOTrainer
    "trl": {},
    "grpo": GRPO,
    "raft": RAFT,
    "posterior": {"trainer": "grpo", "advantage": "posterior"} | {"posterior_prior": "pooled"},
    "posterior_column": {"trainer": "grpo", "advantage": "posterior"} | BY_LEVEL,
    "posterior_vade": VADE | {"trainer": "grpo", "advantage": "posterior"} | BY_LEVEL,
    "vade_flat": VADE | FLAT,
    "vade_pooled": VADE | {"posterior_prior": "pooled"},
    "vade_column": VADE | BY_LEVEL,
    "vade_column_8": VADE | BY_LEVEL | {"posterior_kappa": 8},
    "vade_features": VADE | {"posterior_prior": "features"},
    "vade_column_slow": VADE | BY_LEVEL | {"posterior_decay_rest": 0.999},
    "vade_column_8_fast": VADE | BY_LEVEL | {"posterior_kappa": 8, "posterior_decay_rest": 0.9},
}
"""Arms that are tuned over the grid."""


@dataclass(frozen=True)
class Cell:
    """A point of the grid."""

    prompts: int
    rollouts: int
    updates: int
    rate: float

    @property
    def name(self) -> str:
        return f"{self.prompts}x{self.rollouts}-u{self.updates}-lr{self.rate:g}"

    @classmethod
    def named(cls, name: str) -> Cell:
        """The cell of `name`."""
        shape, updates, rate = name.split("-", 2)
        prompts, rollouts = shape.split("x")
        return cls(int(prompts), int(rollouts), int(updates[1:]), float(rate[2:]))


def grid(family: str) -> list[Cell]:
    """Every cell of a family: as many for each."""
    shapes = SHAPES[FAMILIES[family].get("trainer", "grpo")]
    return [Cell(p, n, u, rate) for (p, n), u, rate in itertools.product(shapes, UPDATES, RATES)]


class Clock:
    """CPU seconds of this process within training steps; validation does not count."""

    def __init__(self) -> None:
        self.seconds, self._since = 0.0, 0.0

    def start(self) -> None:
        self._since = time.process_time()

    def stop(self) -> None:
        self.seconds += time.process_time() - self._since


def steps_between_validations(task: Task, cell: Cell) -> int:
    """Steps that generate about `validate_every` tokens."""
    return max(1, round(task.validate_every / (cell.prompts * cell.rollouts * task.mean_length)))


def run(task: Task, family: str, cell: Cell, seed: int, folder: Path) -> dict[str, Any]:
    """One run in this process."""
    if family == "trl":
        return run_trl(task, cell, seed, folder)
    return run_ours(task, FAMILIES[family], cell, seed, folder)


def run_ours(
    task: Task, settings: Mapping[str, Any], cell: Cell, seed: int, folder: Path
) -> dict[str, Any]:
    """Train with this project's trainer; the curve of its validation."""
    from transformers import TrainerCallback
    from trl import ModelConfig

    from recipes import language
    from recipes.arguments import RecipeArguments
    from recipes.config import parse
    from rl.config.language import RolloutConfig
    from rl.trainer import RolloutTrainer

    given = {
        "config": ROOT / "recipes" / task.name / "_base.yaml",
        "prompts_per_step": cell.prompts,
        "rollouts_per_prompt": cell.rollouts,
        "updates_per_step": cell.updates,
        "learning_rate": cell.rate,
        "lr_scheduler_type": "constant",
        "output_dir": folder / "run",
        "seed": seed,
        "max_generated_tokens": task.tokens,
        "max_steps": 100_000,
        "eval_steps": steps_between_validations(task, cell),
        "save_strategy": "no",
        "report_to": "none",
        "completions_every": 0,
        "disable_tqdm": True,
        "if_run_exists": "error",
        "task_settings": json.dumps(task.settings),
    } | dict(settings)
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    recipe, config, model_config = parse((RecipeArguments, RolloutConfig, ModelConfig), words)
    rows, validation, rewards = language.prepare(recipe, config, model_config)
    trainer = RolloutTrainer(
        language.load_model(model_config),
        rewards,
        config,
        rows,
        eval_dataset=validation,
        processing_class=language.load_tokenizer(recipe, model_config),
    )
    clock, curve = Clock(), []

    class Watch(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.stop()

        def on_evaluate(self, *_: Any, metrics: Mapping[str, float], **__: Any) -> None:
            totals = trainer.ledger.totals
            tokens, processed = totals["tokens_drawn"], totals.get("tokens_processed", 0)
            curve.append(point(metrics, tokens, processed, clock, totals["rollouts_drawn"]))

    trainer.add_callback(Watch())
    trainer.train()
    return {"curve": curve}


def run_trl(task: Task, cell: Cell, seed: int, folder: Path) -> dict[str, Any]:
    """Train with TRL's GRPOTrainer; validated by the same code as ours."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from rl.config.language import RolloutConfig
    from rl.trainer import RolloutTrainer

    prepare = importlib.import_module(f"recipes.{task.name}.task").prepare
    source, rows, validation, rewards = prepare(task.settings, seed=seed)
    model = AutoModelForCausalLM.from_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    rollouts = cell.prompts * cell.rollouts
    micro = min(64, rollouts // cell.updates)
    accumulated = rollouts // cell.updates // micro
    config = GRPOConfig(
        output_dir=str(folder / "run"),
        seed=seed,
        data_seed=seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        learning_rate=cell.rate,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        max_grad_norm=1.0,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulated,
        steps_per_generation=rollouts // micro,
        num_generations=cell.rollouts,
        max_completion_length=task.max_completion_length,
        temperature=1.0,
        max_steps=100_000,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )
    judge = RolloutTrainer(
        model,
        rewards,
        RolloutConfig(
            output_dir=str(folder / "judge"),
            max_completion_length=task.max_completion_length,
            max_steps=1,
            prompts_per_step=cell.prompts,
            eval_rollouts_per_prompt=4,
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
        ),
        rows,
        eval_dataset=validation,
        processing_class=tokenizer,
    )
    clock, curve = Clock(), []
    drawn = {"tokens": 0, "processed": 0, "rollouts": 0}

    def reward(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
        generated = sum(map(len, completion_ids))
        drawn["tokens"] += generated
        drawn["processed"] += generated + sum(len(ids) for ids in tokenizer(prompts)["input_ids"])
        drawn["rollouts"] += len(completions)
        return rewards[0](prompts=prompts, completions=completions, **columns)

    def validate() -> None:
        metrics = judge.evaluate()
        model.train()
        curve.append(point(metrics, drawn["tokens"], drawn["processed"], clock, drawn["rollouts"]))

    every = steps_between_validations(task, cell) * cell.updates

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            validate()

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.stop()
            ends = state.global_step % cell.updates == 0 and drawn["tokens"] >= task.tokens
            if ends or state.global_step % every == 0:
                validate()
            control.should_training_stop = ends

    trainer = GRPOTrainer(
        model, reward, config, Dataset.from_list(list(rows)), processing_class=tokenizer
    )
    trainer.add_callback(Watch())
    trainer.train()
    return {"curve": curve}


def point(
    metrics: Mapping[str, float], tokens: int, processed: int | None, clock: Clock, rollouts: int
) -> dict[str, float | None]:
    """One validation: what had been spent, and how good the policy was."""
    return {
        "tokens": tokens,
        "processed": processed,
        "rollouts": rollouts,
        "cpu_seconds": clock.seconds,
        "pass_rate": metrics["eval_pass_rate"],
        "greedy": metrics["eval_greedy_accuracy"],
    }


# -- reading curves


def mean_of_curve(curve: Sequence[Mapping[str, float]], tokens: int) -> float:
    """Mean pass rate over generated tokens from 0 to `tokens`: trapezoids between validations.

    A curve that ends earlier, by less than one distance between validations, keeps its last value.
    """
    at = np.array([p["tokens"] for p in curve], dtype=float)
    value = np.array([p["pass_rate"] for p in curve])
    inside = at < tokens
    at = np.append(at[inside], tokens)
    value = np.append(value[inside], np.interp(tokens, [p["tokens"] for p in curve], value))
    return float(np.trapezoid(value, at) / tokens)


def spent_to(
    curve: Sequence[Mapping[str, float]], level: float, spent: str = "tokens"
) -> float | None:
    """How much of `spent` it took to reach `level` first, between validations on a straight line.

    None if no validation is at the level.
    """
    for before, after in itertools.pairwise(curve):
        if before["pass_rate"] >= level:
            return float(before[spent])
        if after["pass_rate"] >= level:
            share = (level - before["pass_rate"]) / (after["pass_rate"] - before["pass_rate"])
            return float(before[spent] + share * (after[spent] - before[spent]))
    return None


def end_of(curve: Sequence[Mapping[str, float]], last: int = 3) -> float:
    """Mean pass rate of the last validations: one alone has the noise of 252 prompts."""
    return float(np.mean([p["pass_rate"] for p in curve[-last:]]))


# -- running


def target_of(options: argparse.Namespace, family: str, cell: Cell, seed: int) -> Path:
    return options.folder / options.task / family / f"{cell.name}-seed{seed}"


def run_one(options: argparse.Namespace, job: tuple[str, Cell, int]) -> dict[str, Any]:
    """One run in a process of its own with one thread; its result is kept and read again."""
    family, cell, seed = job
    target = target_of(options, family, cell, seed)
    if not (target / "result.json").exists():
        target.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "benchmarks.to_level", "one", "--task", options.task]
        command += ["--one", family, cell.name, str(seed), "--folder", str(options.folder)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with open(target / "log.txt", "w") as log:
            done = subprocess.run(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT
            )
        if done.returncode:
            raise RuntimeError(
                f"{family} {cell.name}, seed {seed} failed; see {target / 'log.txt'}"
            )
        print(f"{family} {cell.name}, seed {seed}: done", flush=True)
    return json.loads((target / "result.json").read_text())


def tune(options: argparse.Namespace, pool: ThreadPoolExecutor) -> dict[str, Any]:
    """The best cell of each family, and the mean of the curve of every cell that was run.

    With `--cells` those cells are run with every tuning seed in place of the grid; what was run before
    counts all the same.
    """
    task = TASKS[options.task]
    for family in options.families:
        if options.cells:
            jobs = [(family, Cell.named(c), seed) for seed in TUNING_SEEDS for c in options.cells]
            list(pool.map(lambda job: run_one(options, job), jobs))
            continue
        cells, scores = grid(family), {}
        for seed, kept in zip(TUNING_SEEDS, (*SURVIVORS, 1), strict=True):
            jobs = [(family, cell, seed) for cell in cells]
            for cell, result in zip(
                cells, pool.map(lambda job: run_one(options, job), jobs), strict=True
            ):
                scores.setdefault(cell, []).append(mean_of_curve(result["curve"], task.tokens))
            cells = sorted(cells, key=lambda cell: -float(np.mean(scores[cell])))[:kept]
    return collect(options.folder, task)


def collect(folder: Path, task: Task) -> dict[str, Any]:
    """Every run with a tuning seed below `folder`: its cell, and the mean of its curve.

    The best cell of a family is the one of the largest mean among those with the most seeds.
    """
    found: dict[str, Any] = {}
    for family in FAMILIES:
        scores: dict[str, dict[int, float]] = {}
        for path in sorted((folder / task.name / family).glob("*/result.json")):
            cell, seed = path.parent.name.rsplit("-seed", 1)
            if int(seed) in TUNING_SEEDS:
                curve = json.loads(path.read_text())["curve"]
                scores.setdefault(cell, {})[int(seed)] = mean_of_curve(curve, task.tokens)
        if not scores:
            continue
        most = max(map(len, scores.values()))
        ranked = sorted(scores, key=lambda cell: -float(np.mean(list(scores[cell].values()))))
        found[family] = {
            "best": next(cell for cell in ranked if len(scores[cell]) == most),
            "runs": sum(map(len, scores.values())),
            "mean_of_curve": {c: [scores[c][s] for s in sorted(scores[c])] for c in ranked},
        }
    return found


SPENT = {
    "tokens": "tokens",
    "processed_tokens": "processed",
    "rollouts": "rollouts",
    "cpu_seconds": "cpu_seconds",
}
"""What a level costs -> its name in a curve."""


def row_of(
    task: Task, cell: Cell, seeds: Sequence[int], curves: Sequence[Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """One arm's summary: per seed what each level took (None if never reached), and the end."""
    row: dict[str, Any] = {"cell": cell.name, "seeds": list(seeds)}
    for name, spent in SPENT.items():
        if all(c[-1][spent] is not None for c in curves):
            row[name] = {f"{lv:g}": [spent_to(c, lv, spent) for c in curves] for lv in task.levels}
    row["mean_of_curve"] = [mean_of_curve(c, task.tokens) for c in curves]
    row["end"] = [end_of(c) for c in curves]
    return row


def final(
    options: argparse.Namespace, pool: ThreadPoolExecutor, tuned: Mapping[str, Any]
) -> dict[str, Any]:
    """The arms on seeds they were not tuned on: what each level took, and where each run ended."""
    task = TASKS[options.task]
    cells = {"trl_default": ("trl", Cell(32, 8, 1, 3e-4))}
    cells |= {f"{family}_tuned": (family, Cell.named(tuned[family]["best"])) for family in tuned}
    found = {}
    for arm, (family, cell) in cells.items():
        jobs = [(family, cell, seed) for seed in options.seeds]
        curves = [r["curve"] for r in pool.map(lambda job: run_one(options, job), jobs)]
        found[arm] = row_of(task, cell, options.seeds, curves)
    return {"levels": [f"{level:g}" for level in task.levels], "arms": found}


def ratio_interval(
    ours: Sequence[float | None], theirs: Sequence[float | None]
) -> tuple[float, float, float] | None:
    """Geometric mean of paired ratios ours / theirs, and its 95 % interval (Student's t on logarithms).

    None unless every seed of both reached the level, at least two of them.
    """
    if len(ours) < 2 or None in ours or None in theirs:
        return None
    from scipy import stats

    logs = np.log(np.array(ours, dtype=float) / np.array(theirs, dtype=float))
    half = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / len(logs) ** 0.5
    middle = float(logs.mean())
    return float(np.exp(middle)), float(np.exp(middle - half)), float(np.exp(middle + half))


def show(task: str, found: Mapping[str, Any], baseline: str = "trl_default") -> None:
    """Print what each level took, as ratios to the baseline's, paired by seed."""
    from rich.console import Console
    from rich.table import Table

    view = Table(
        title=f"{task}: tokens (CPU seconds) to a level as ratios to {baseline}, 95 % interval"
    )
    view.add_column("arm")
    for level in found["levels"]:
        view.add_column(f"to {level}")
    view.add_column("end")
    reference = found["arms"][baseline]
    for arm, row in found["arms"].items():
        cells = []
        for level in found["levels"]:
            parts = []
            for spent in ("tokens", "cpu_seconds"):
                ratio = ratio_interval(row[spent][level], reference[spent][level])
                reached = sum(v is not None for v in row[spent][level])
                parts.append(
                    f"{reached} of {len(row[spent][level])} seeds"
                    if ratio is None
                    else "{:.2f} [{:.2f}, {:.2f}]".format(*ratio)
                )
            cells.append(parts[0] if parts[0] == parts[1] else f"{parts[0]} ({parts[1]})")
        view.add_row(f"{arm} {row['cell']}", *cells, f"{np.mean(row['end']):.3f}")
    Console(width=200).print(view)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["tune", "final", "show", "one", "quick"])
    parser.add_argument("--task", choices=list(TASKS), default="arithmetic")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument(
        "--cells", nargs="+", default=[], help="tune: these, in place of the grid; 64x1-u4-lr0.0003"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(11, 23)))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "to_level")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--one", nargs=3, metavar=("FAMILY", "CELL", "SEED"))
    options = parser.parse_args()
    if options.what == "quick":
        quick()
        return
    tuning, levels = options.results / "tuning.json", options.results / "to_level.json"
    if options.what == "one":
        import torch

        torch.set_num_threads(1)
        family, cell, seed = options.one[0], Cell.named(options.one[1]), int(options.one[2])
        target, task = target_of(options, family, cell, seed), TASKS[options.task]
        for left in target.glob("run/*"):  # of a run that was stopped
            left.unlink() if left.is_file() else None
        result = run(task, family, cell, seed, target)
        (target / "result.json").write_text(json.dumps(result))
        return
    known = json.loads(tuning.read_text()) if tuning.exists() else {}
    with ThreadPoolExecutor(options.jobs) as pool:
        if options.what == "tune":
            of_task = tune(options, pool)
            summaries.write(tuning, known | {options.task: of_task})
            for family, row in of_task.items():
                print(f"{family}: best {row['best']} of {row['runs']} runs")
            return
        found = json.loads(levels.read_text()) if levels.exists() else {}
        if options.what == "final":
            tuned = {f: row for f, row in known[options.task].items() if f in options.families}
            of_task = final(options, pool, tuned)
            of_task["arms"] = found.get(options.task, {}).get("arms", {}) | of_task["arms"]
            found[options.task] = of_task
            summaries.write(levels, found)
    show(options.task, found[options.task])


def quick() -> None:
    """One tiny run of each kind of arm and their table: the script works, and nothing is measured."""
    with tempfile.TemporaryDirectory() as folder:
        task = replace(
            TASKS["arithmetic"],
            tokens=200,
            validate_every=100,
            max_completion_length=16,
            levels=(0.0,),
            settings=arms.QUICK_TASK | {"folder": f"{folder}/warm-start"},
        )
        cell, found = Cell(4, 2, 1, 3e-4), {}
        for arm in ("trl", "grpo"):
            targets = {seed: Path(folder) / f"{arm}{seed}" for seed in (1, 2)}
            curves = [run(task, arm, cell, *target)["curve"] for target in targets.items()]
            found[arm] = row_of(task, cell, list(targets), curves)
        show(task.name, {"levels": ["0"], "arms": found}, baseline="trl")


if __name__ == "__main__":
    main()
