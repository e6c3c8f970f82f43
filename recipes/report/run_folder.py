"""Run folders as numbers: what `rl.run.tracking` wrote, as far as it can be read.

Read are `run.json`, `metrics.jsonl`, `steps.jsonl` and the newest of `completions/*.parquet`. A run
that is unfinished, or was killed while it wrote a line, is read as far as it got, with a note.
Axes: S steps, R runs of one curve.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

Row = dict[str, Any]
TOTAL = "ledger_total/"
SET = re.compile(r"eval_(?:(.+)_)?pass_rate")
"""Pass rate of a validation set: of the only one, or of the one named."""
SAME = (
    *("seed", "data_seed", "output_dir", "logging_dir", "run_name", "resume_from_checkpoint"),
    *("if_run_exists", "report_to", "disable_tqdm", "logging_steps", "local_rank"),
)
"""Settings in which the seeds of one experiment may differ."""
SEED = re.compile(r"(.+?)[-_.](?:seed|s)[-_=]?\d+", re.IGNORECASE)


@dataclass(kw_only=True)
class Run:
    """What a run folder holds; lists are sorted by step, one entry a step."""

    folder: Path
    name: str
    about: Row = field(default_factory=dict)  # run.json
    log: list[Row] = field(default_factory=list)  # training lines of metrics.jsonl
    validation: list[Row] = field(default_factory=list)  # validation lines of metrics.jsonl
    steps: list[Row] = field(default_factory=list)  # steps.jsonl
    completions: list[Row] = field(default_factory=list)  # the first, a middle and the newest table
    notes: list[str] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        return max((rows[-1]["step"] for rows in (self.steps, self.log) if rows), default=0)

    def note(self, text: str) -> None:
        self.notes.append(f"{self.folder}: {text}")


Groups = dict[str, list[Run]]
"""Label of a curve -> its runs: one, or several seeds whose mean it shows."""


def read_run(folder: Path, name: str) -> Run:
    """A run as far as its files can be read; what is missing or torn is in `notes`."""
    run = Run(folder=folder, name=name)
    run.about = _about(run)
    lines = _lines(run, "metrics.jsonl", _wrong_metric)
    run.log = _by_step(row for row in lines if "loss" in row)
    run.validation = _by_step(row for row in lines if any(map(SET.fullmatch, row)))
    run.steps = _by_step(_lines(run, "steps.jsonl", _wrong_decision))
    run.completions = _completions(run)
    last, logged = run.last_step, run.log[-1]["step"] if run.log else 0
    planned = run.about["settings"].get("max_steps")
    planned = planned if _is_number(planned) else last
    if not last:
        run.note("no step is finished yet; what is there is shown")
    elif last < planned and any("train_runtime" in row and row["step"] >= last for row in lines):
        run.note(f"ended at step {last}, by its budget or a callback, before max_steps={planned}")
    elif last < planned:
        run.note(f"ends at step {last} of {planned}: still running, or stopped")
    if logged < last:
        run.note(
            f"tokens, updates and seconds are those of its last log line, step {logged} of {last}"
        )
    if last and not run.validation:
        run.note("metrics.jsonl has no validation line")
    elif last and run.validation[0]["step"] > 0:
        run.note(f"first validated at step {run.validation[0]['step']}: differences start there")
    return run


def _completions(run: Run) -> list[Row]:
    """Rows of the first, a middle and the newest table of completions that can be read."""
    paths, tables = sorted(run.folder.glob("completions/*.parquet")), []
    last = len(paths) - 1
    for place in sorted({0, last // 2, last}) if paths else []:
        # Of a table that cannot be read, the nearest older one stands in.
        for path in reversed(paths[: place + 1]):
            if (rows := _read_table(run, path)) is None:
                continue
            if rows not in tables:
                tables.append(rows)
            break
    return [row for rows in tables for row in rows]


def validation_tables(run: Run) -> list[list[Row]]:
    """The first and the last table of validation completions that can be read; none without any."""
    found: dict[Path, list[Row]] = {}
    paths = sorted(run.folder.glob("validation/step-*.parquet"))
    for order in (paths, paths[::-1]):
        for path in order:
            if path in found:
                break
            if rows := _read_table(run, path):
                found[path] = rows
                break
    return list(found.values())


def _read_table(run: Run, path: Path) -> list[Row] | None:
    """The rows of a table; None, with a note, if it cannot be read."""
    from pyarrow import ArrowInvalid, parquet

    try:
        return parquet.read_table(path).to_pylist()
    except (ArrowInvalid, OSError) as error:
        run.note(f"{path.name} cannot be read: {error}")
        return None


def _about(run: Run) -> Row:
    """`run.json`, with settings whatever it holds."""
    about, state = None, "torn"
    try:
        about = json.loads((run.folder / "run.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        state = "missing"
    except ValueError:  # not JSON, or not text
        pass
    if not isinstance(about, dict):
        run.note(f"run.json is {state}; settings are not shown")
        return {"settings": {}}
    if not isinstance(about.get("settings"), dict):
        run.note("run.json has no settings; none are shown")
        about["settings"] = {}
    return about


def _lines(run: Run, name: str, wrong: Callable[[Row], str]) -> list[Row]:
    """The lines of a log that are whole; of others the note says which, and what is `wrong`."""
    path, rows = run.folder / name, []
    if not path.is_file():
        run.note(f"{name} is missing")
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        which = "the last line" if number == len(lines) else f"line {number}"
        try:
            row = json.loads(line)
            row |= {"step": int(row["step"])}
        except (ValueError, TypeError, KeyError, OverflowError):
            run.note(f"{which} of {name} is torn and left out (killed while writing?)")
            continue
        if reason := wrong(row):
            run.note(f"{which} of {name} is torn and left out: {reason}")
        else:
            rows.append(row)
    return rows


def _wrong_metric(row: Row) -> str:
    """Why a line of metrics cannot be shown, or nothing."""
    for name, value in row.items():
        if value is not None and not _is_number(value):
            return f"{name} is {repr(value)[:60]}, not a number"
    return ""


def _wrong_decision(row: Row) -> str:
    """Why a line of decisions cannot be shown, or nothing; one without a histogram can."""
    for name in ("budgets", "pass_rates_before", "posterior_histogram"):
        value = row.get(name, [] if name == "posterior_histogram" else None)
        if not isinstance(value, list) or not all(
            _is_number(v) and math.isfinite(v) for v in value
        ):
            return f"{name} is {repr(value)[:60]}, not a list of finite numbers"
    if len(row["budgets"]) != len(row["pass_rates_before"]):
        return "budgets and pass_rates_before differ in length"
    return ""


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _by_step(rows: Iterable[Row]) -> list[Row]:
    """Sorted by step; lines of one step become one, in which the later has the last word."""
    by_step: dict[int, Row] = {}
    for row in rows:
        by_step[row["step"]] = by_step.get(row["step"], {}) | row
    return [row for _, row in sorted(by_step.items())]


def sets_of(runs: Iterable[Run]) -> list[str]:
    """Names of the validation sets of the runs, in order of appearance; "" is the only set of a run."""
    found = (SET.fullmatch(name) for run in runs for row in run.validation for name in row)
    return list(dict.fromkeys(match[1] or "" for match in found if match))


def named(folders: Sequence[str | Path]) -> list[tuple[Path, str]]:
    """Checked folders and names: the last part, with as many parents as tells them apart."""
    paths = [Path(folder) for folder in folders]
    if not paths:
        raise ValueError("nothing to report: name at least one run folder")
    for i, path in enumerate(paths):
        if not path.is_dir():
            near = ", ".join(p.parent.name for p in sorted(path.parent.glob("*/run.json")))
            raise ValueError(f"{path} is not a folder; {path.parent} has {near or 'no runs'}")
        if not any((path / n).is_file() for n in ("run.json", "metrics.jsonl", "steps.jsonl")):
            raise ValueError(f"{path} holds no run: run.json, metrics.jsonl, steps.jsonl missing")
        if path.resolve() in [p.resolve() for p in paths[:i]]:
            raise ValueError(f"{path} is given twice")
    parts, depth = [path.resolve().parts for path in paths], 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return [(path, "/".join(part[-depth:])) for path, part in zip(paths, parts, strict=True)]


def grouped(runs: list[Run], *, group_seeds: bool) -> Groups:
    """The runs that have something to draw, under the label of their curve.

    Runs are seeds of one experiment if `run.json` gives them the same settings but for the seed (and
    paths and logging) and different seeds. A run without settings is grouped by its name, up to a
    trailing seed (`gvm-seed1`, `gvm-s2`).
    """
    groups: Groups = {}
    seeds: dict[str, set] = {}
    for run in (run for run in runs if run.log or run.steps or run.validation):
        kind, seed = _experiment(run)
        if not group_seeds or seed in seeds.get(kind, ()):
            kind = f"{kind} {run.name}"
        groups.setdefault(kind, []).append(run)
        seeds.setdefault(kind, set()).add(seed)
    labelled: Groups = {}
    for members in groups.values():
        label = members[0].name
        if len(members) > 1:
            label = f"{_common([run.name for run in members])} (mean of {len(members)})"
            if label in labelled:
                label = f"{members[0].name} and {len(members) - 1} more seeds"
        labelled[label] = members
    return labelled


def seeds_apart(groups: Groups) -> list[str]:
    """Notes on runs that are shown alone although they look like seeds of one experiment."""
    alone = [members[0] for members in groups.values() if len(members) == 1]
    by_kind: dict[str, list[Run]] = {}
    by_name: dict[str, list[Run]] = {}
    for run in alone:
        by_kind.setdefault(_experiment(run)[0], []).append(run)
        if match := SEED.fullmatch(run.name):
            by_name.setdefault(match[1], []).append(run)
    notes = [
        f"{', '.join(run.name for run in runs)} differ by their seed alone; --group-seeds shows their "
        "mean"
        for kind, runs in by_kind.items()
        if len(runs) > 1 and len({_experiment(run)[1] for run in runs}) == len(runs)
    ]
    for name, runs in by_name.items():
        kinds = [run.about.get("settings", {}) for run in runs]
        differ = sorted(
            setting
            for setting in set().union(*kinds) - set(SAME)
            if len({repr(of.get(setting)) for of in kinds}) > 1
        )
        if len(runs) > 1 and differ:
            notes.append(
                f"{name}: its runs are no seeds of one experiment, they differ in {', '.join(differ)}"
            )
    return notes


def _experiment(run: Run) -> tuple[str, Any]:
    """What the seeds of an experiment share, as text, and the run's own seed."""
    settings = run.about.get("settings") or {}
    if "seed" in settings:
        kind = {name: value for name, value in settings.items() if name not in SAME}
        return json.dumps(kind, sort_keys=True, default=str), settings["seed"]
    match = SEED.fullmatch(run.name)
    return (match[1] if match else run.name), run.name


def _common(names: list[str]) -> str:
    """What names begin with alike, without a seed that is cut in two."""
    match = SEED.fullmatch(names[0])
    if match and all(name.startswith(match[1]) for name in names):
        return match[1]
    start = names[0]
    while not all(name.startswith(start) for name in names):
        start = start[:-1]
    start = re.sub(r"[-_./]*(?:seed|s)?[-_./=]*$", "", start, flags=re.IGNORECASE)
    return start or names[0]


def values_of(runs: list[Run], source: str, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Steps that all runs have with `name`, and its values (R, S, ...); None without any.

    `source` is the list of `Run` to look in: "log", "validation" or "steps".
    """
    found = [
        {row["step"]: row[name] for row in getattr(run, source) if row.get(name) is not None}
        for run in runs
    ]
    steps = sorted(set.intersection(*map(set, found)))
    if not steps:
        return None
    return np.array(steps), np.array([[values[s] for s in steps] for values in found], dtype=float)


def curve_of(runs: list[Run], source: str, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Steps (R, S) at which `name` is known, and its values (R, S); None without any.

    The steps are those that all runs have, and at the end each run's own last one: runs that end by a
    budget end at different steps, and where they arrived is what counts.
    """
    common = values_of(runs, source, name)
    if common is None:
        return None
    step_RS, value_RS = np.tile(common[0], (len(runs), 1)), common[1]
    ends = [
        next(r for r in reversed(getattr(run, source)) if r.get(name) is not None) for run in runs
    ]
    last_R = np.array([row["step"] for row in ends])
    if (last_R != step_RS[:, -1]).any():
        step_RS = np.column_stack([step_RS, last_R])
        value_RS = np.column_stack([value_RS, [row[name] for row in ends]])
    return step_RS, value_RS


def tokens_until(run: Run, step_S: np.ndarray) -> np.ndarray | None:
    """Tokens (denoising steps) generated up to and including each step, by the log; None if unknown."""
    name = f"{TOTAL}tokens_drawn"
    drawn = [(0, 0.0), *((row["step"], row[name]) for row in run.log if row.get(name) is not None)]
    return np.interp(step_S, *np.array(drawn, dtype=float).T) if len(drawn) > 1 else None


def mean_over_tokens(run: Run, name: str, until: float) -> float | None:
    """Mean of a validation curve over the first `until` generated tokens; None if it is not known.

    The curve is linear between validations and constant before the first and after the last.
    """
    rows = [row for row in run.validation if row.get(name) is not None]
    token_S = tokens_until(run, np.array([row["step"] for row in rows]))
    if not rows or token_S is None or until <= 0:
        return None
    value_S = np.array([row[name] for row in rows], dtype=float)
    inside = token_S[(token_S > 0) & (token_S < until)]
    at = np.concatenate([[0.0], inside, [until]])
    return float(np.trapezoid(np.interp(at, token_S, value_S), at) / until)


def paired(
    baseline: list[Run],
    runs: list[Run],
    values: Callable[[Run, Run], tuple[float | None, float | None]],
) -> tuple[float, float, int] | None:
    """Mean difference to the baseline's run of the same seed, its standard error, number of pairs.

    Args:
        baseline: runs of the arm compared with.
        runs: runs of another arm.
        values: (the baseline's value, the other's) of a pair; None where one is not known.

    Returns:
        None without a pair; with one pair the standard error is NaN.
    """
    of_seed = {_experiment(run)[1]: run for run in baseline}
    pairs = [values(of_seed[seed], run) for run in runs if (seed := _experiment(run)[1]) in of_seed]
    difference = [b - a for a, b in pairs if a is not None and b is not None]
    if not difference:
        return None
    error = (
        float(np.std(difference, ddof=1)) / len(difference) ** 0.5
        if len(difference) > 1
        else math.nan
    )
    return float(np.mean(difference)), error, len(difference)


def rollouts_until(run: Run, step_S: np.ndarray) -> np.ndarray:
    """Rollouts generated up to and including each step: from the budgets, else from the ledger."""
    if run.steps:
        at_S = [row["step"] for row in run.steps]
        total_S = np.cumsum([0.0] + [sum(row["budgets"]) for row in run.steps])
        return total_S[np.searchsorted(at_S, step_S, side="right")]
    name = f"{TOTAL}rollouts_drawn"
    drawn = [(0, 0.0), *((row["step"], row[name]) for row in run.log if name in row)]
    return np.interp(step_S, *np.array(drawn).T)


def smooth(value_S: np.ndarray, window: int) -> np.ndarray:
    """Centred running mean over `window` entries, an odd number; at the ends, over those there are."""
    half, ones = window // 2, np.ones(window)
    total_S = np.convolve(value_S, ones)[half : half + len(value_S)]
    return total_S / np.convolve(np.ones(len(value_S)), ones)[half : half + len(value_S)]


def window_of(num_entries: int) -> int:
    """The running mean that makes a curve of so many noisy entries readable; 1 for a short one."""
    return max(1, num_entries // 25) | 1


def change(run: Run, source: str, name: str) -> tuple[float, float, float] | None:
    """First value, last value, standard error of their difference (NaN: unknown); None without any.

    Training values are noisy: their ends are means over the first and last tenth of the log lines. The
    error of a validation difference is sqrt(se_first^2 + se_last^2) over prompts, which is on the safe
    side, as both validate the same prompts. For greedy accuracy p of n prompts, se^2 = p(1-p)/(n-1).
    """
    rows = [row for row in getattr(run, source) if row.get(name) is not None]
    if not rows:
        return None
    ends = rows[0], rows[-1]
    if source == "log":
        value_S, tenth = [float(row[name]) for row in rows], max(1, len(rows) // 10)
        return float(np.mean(value_S[:tenth])), float(np.mean(value_S[-tenth:])), math.nan
    if name.endswith("greedy_accuracy"):
        prompts = run.about.get("validation_prompts")
        freedom = prompts - 1 if _is_number(prompts) else 0
        variances = [r[name] * (1 - r[name]) / freedom if freedom > 0 else math.nan for r in ends]
    else:
        variances = [float(row.get(f"{name}_se", math.nan)) ** 2 for row in ends]
    return ends[0][name], ends[1][name], math.sqrt(sum(variances))
