"""Measure how long samplers take to decide, as ratios to one plain NumPy call of the same size.

    python benchmarks/samplers.py                # a minute or two; writes results/samplers.json
    python benchmarks/samplers.py --quick        # small sizes, nothing written

    proposal     choose 1,024 of 1,000,000 prompts by Thompson draws and give them 8,192 rollouts,
                 to generator.beta(a, b) for the same million; target at most 2
    allocation   100,000 rollouts over 10,000 prompts, to np.sort of as many floats as there are
                 rollouts, and as there are prompts; target at most 10
    down-sample  maximum variance, 4 of each of 10,000 ragged groups with 100,000 rows in all, to
                 np.lexsort of the rows; target at most 10

Each round times the call and the yardstick next to each other, because other work may share the
machine: the figure to read is `ratio_median`, over the ratios of neighbouring runs, with their
smallest and largest beside it. Growth curves run from 1e3 to 1e6. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np

from benchmarks import summaries
from samplers import allocation
from samplers.downsampling import max_variance
from samplers.posterior import BetaPosterior
from samplers.selection import ThompsonSelector

SEED = 0


def seconds(call: Callable[[], Any], at_least: float) -> float:
    """Mean seconds of one call, repeated until `at_least` have passed."""
    count, start = 0, time.perf_counter()
    while True:
        call()
        count += 1
        elapsed = time.perf_counter() - start
        if elapsed >= at_least:
            return elapsed / count


def compare(
    call: Callable[[], Any], yardsticks: dict[str, Callable[[], Any]], *, rounds: int
) -> dict[str, Any]:
    """Times of `call` and its ratios to each yardstick."""
    for function in (call, *yardsticks.values()):
        function()
    times = [
        (seconds(call, 0.02), {name: seconds(f, 0.02) for name, f in yardsticks.items()})
        for _ in range(rounds)
    ]
    result: dict[str, Any] = {"milliseconds_median": round_(1e3, [t for t, _ in times])}
    for name in yardsticks:
        ratios = [t / yard[name] for t, yard in times]
        result[name] = {
            "milliseconds_median": round_(1e3, [yard[name] for _, yard in times]),
            "ratio_median": round(statistics.median(ratios), 3),
            "ratio_min": round(min(ratios), 3),
            "ratio_max": round(max(ratios), 3),
        }
    return result


def round_(unit: float, values: list[float]) -> float:
    return float(f"{unit * statistics.median(values):.4g}")


def peak_bytes(call: Callable[[], Any]) -> int:
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def visited(num_prompts: int) -> BetaPosterior:
    """Half of the prompts never seen, the others after a few groups of 8 and decay."""
    generator = np.random.default_rng(SEED)
    posterior = BetaPosterior(num_prompts)
    for _ in range(3):
        index = generator.permutation(num_prompts)[: num_prompts // 4]
        posterior.observe(index, generator.binomial(8, generator.random(len(index))), 8 + 0 * index)
    return posterior


def proposal(num_prompts: int) -> tuple[Callable[[], Any], dict[str, Callable[[], Any]]]:
    posterior = visited(num_prompts)
    selector = ThompsonSelector(posterior)
    generator = np.random.default_rng(SEED)
    chosen = min(1024, num_prompts // 8)

    def propose() -> np.ndarray:
        index = selector.select(chosen, generator=generator)
        std_P = allocation.posterior_std(*posterior.parameters(index))
        return allocation.neyman(std_P, 8 * chosen, minimum=2, maximum=64)

    a_D, b_D = posterior.parameters()
    return propose, {"generator.beta": lambda: generator.beta(a_D, b_D)}


def allocate(rule: str, num_prompts: int) -> tuple[Callable[[], Any], dict[str, Callable[[], Any]]]:
    generator = np.random.default_rng(SEED)
    p_P = generator.random(num_prompts)
    std_P, total = np.sqrt(p_P * (1 - p_P)), 10 * num_prompts
    calls = {
        "uniform": partial(allocation.uniform, std_P, total),
        "neyman": partial(allocation.neyman, std_P, total),
        "neyman, boxes [2, 32]": partial(allocation.neyman, std_P, total, minimum=2, maximum=32),
        "leave_one_out": partial(allocation.leave_one_out, std_P, total),
        "dr_grpo": partial(allocation.dr_grpo, std_P, total),
        "cost_aware": partial(
            allocation.cost_aware,
            std_P,
            generator.integers(50, 2000, num_prompts).astype(float),
            1000.0 * total,
            minimum=1,
        ),
        "knapsack": partial(allocation.knapsack, p_P, total),
        "knapsack_posterior": partial(
            allocation.knapsack_posterior, 1 + 8 * p_P, 9 - 8 * p_P, total
        ),
    }
    rollouts, prompts = generator.random(total), generator.random(num_prompts)
    return calls[rule], {
        "np.sort, one per rollout": lambda: np.sort(rollouts),
        "np.sort, one per prompt": lambda: np.sort(prompts),
    }


def down_sample(num_groups: int) -> tuple[Callable[[], Any], dict[str, Callable[[], Any]]]:
    generator = np.random.default_rng(SEED)
    size_P = generator.integers(1, 20, num_groups)
    prompt_N = generator.permutation(np.repeat(np.arange(num_groups), size_P))
    value_N = generator.random(len(prompt_N))
    return partial(max_variance, value_N, prompt_N, keep=4), {
        "np.lexsort": lambda: np.lexsort((value_N, prompt_N))
    }


RULES = [
    "uniform",
    "neyman",
    "neyman, boxes [2, 32]",
    "leave_one_out",
    "dr_grpo",
    "cost_aware",
    "knapsack",
    "knapsack_posterior",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results" / "samplers.json"
    )
    arguments = parser.parse_args()
    scale = 100 if arguments.quick else 1
    rounds = 3 if arguments.quick else arguments.rounds

    cases: dict[str, Callable[[], tuple[Callable[[], Any], dict[str, Callable[[], Any]]]]] = {
        f"proposal of {1_000_000 // scale} prompts": partial(proposal, 1_000_000 // scale)
    }
    for rule in RULES:
        cases[f"{rule}: {100_000 // scale} over {10_000 // scale}"] = partial(
            allocate, rule, 10_000 // scale
        )
    cases[f"max_variance: {10_000 // scale} ragged groups"] = partial(down_sample, 10_000 // scale)

    results: dict[str, Any] = {}
    for name, case in cases.items():
        call, yardsticks = case()
        results[name] = compare(call, yardsticks, rounds=rounds)
        print(name, json.dumps(results[name]), flush=True)

    growth: dict[str, dict[str, Any]] = {}
    sizes = [1_000, 10_000, 100_000, 1_000_000][: 2 if arguments.quick else 4]
    curves: dict[str, Callable[[int], Any]] = {
        "proposal, prompts": proposal,
        "neyman, prompts (10 rollouts each)": partial(allocate, "neyman"),
        "knapsack, prompts (10 rollouts each)": partial(allocate, "knapsack"),
        # About ten rows a group.
        "max_variance, rows": lambda rows: down_sample(rows // 10),
    }
    for name, curve in curves.items():
        growth[name] = {}
        for size in sizes:
            call, _ = curve(size)
            call()
            times = [seconds(call, 0.01) for _ in range(3 if size > 100_000 else 5)]
            growth[name][str(size)] = {
                "milliseconds_median": round_(1e3, times),
                "nanoseconds_each": round_(1e9 / size, times),
                "peak_bytes_each": round(peak_bytes(call) / size),
            }
        print(name, json.dumps(growth[name]), flush=True)

    if arguments.quick:
        return
    report = {
        "command": f"python benchmarks/samplers.py --rounds {rounds}",
        "seed": SEED,
        "rounds": rounds,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load_average": [round(x, 1) for x in os.getloadavg()],
        "results": results,
        "growth": growth,
    }
    summaries.write(arguments.output, report)


if __name__ == "__main__":
    main()
