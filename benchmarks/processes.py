"""Measure rollouts per second of two processes as a ratio to one, with one thread each.

    python -m benchmarks.processes [--quick] [--rounds 7]

A 5M-parameter Qwen3 with random weights, 32 prompts of 32 tokens with 1 to 15 rollouts each (256 in
all), at most 64 new tokens, batches of at most 64 rows on a process, through `roll_out`: dealt
by expected length, generated, decoded, rewarded and gathered. "even": every rollout has 64 tokens.
"ragged": lengths are nearly geometric with mean 21. In every round both processes share the request,
then the first makes all of it alone while the other waits, or the other way round, since other work
may share the machine: `ratio_median` is over the ratios of the rounds.

`load_before` is the machine's load average; above 0.5 or so the two cores were not ours and the ratio
is too low. `cpu_ratio_median` compares processor seconds instead, of one process and of the busier of
two, which other work changes little: what the dealing allows on free cores. Nothing here is asserted.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from benchmarks import summaries
from benchmarks.engine import NUM_ENDS, PROMPT_LENGTH, VOCABULARY, build_model, build_tokenizer
from rl.config.language import RolloutConfig
from rl.lengths import ExpectedLengths
from rl.policies.language import LanguagePolicy
from rl.ranks import Ranks
from rl.stages.draw import roll_out
from rl.stages.records import Request, Scored
from rollouts.engines.contract import SamplingParams
from rollouts.engines.transformers import TransformersEngine
from rollouts.prompts import Prompt
from samplers.ledger import Ledger

RESULT = Path(__file__).parent / "results" / "processes.json"
NUM_PROMPTS = 32


def request(round_number: int, *, quick: bool) -> Request:
    """Ragged budgets, the same in every round; fresh seeds."""
    generator = np.random.default_rng(0)
    prompts = [
        Prompt(
            key=str(p),
            token_ids=tuple(generator.integers(1, VOCABULARY - NUM_ENDS, PROMPT_LENGTH).tolist()),
            prompt="",
            columns={},
        )
        for p in range(NUM_PROMPTS)
    ]
    budget_P = 1 + np.arange(NUM_PROMPTS) % 8 * (1 if quick else 2)
    num_rollouts = int(budget_P.sum())
    return Request(
        prompts=prompts,
        budget_P=budget_P.astype(np.int64),
        seed_N=np.arange(num_rollouts) + round_number * num_rollouts,
    )


class Process:
    """A policy of its own on these ranks, and what `roll_out` remembers."""

    def __init__(
        self, ranks: Ranks, lengths: str, config: RolloutConfig, accelerator: Accelerator
    ) -> None:
        model = build_model(torch.float32, "cpu")
        ends = list(range(VOCABULARY - NUM_ENDS, VOCABULARY)) if lengths == "ragged" else []
        model.generation_config.eos_token_id = ends or None
        tokenizer: Any = build_tokenizer()

        def length(completions: list[str], **_: Any) -> list[float]:
            return [float(len(text)) for text in completions]

        self.ranks, self.lengths, self.ledger = ranks, ExpectedLengths(), Ledger()
        self.policy = LanguagePolicy(
            config,
            model=model,
            tokenizer=tokenizer,
            rewards=[length],
            engine=TransformersEngine(model, tokenizer, max_batch_rows=64),
            whole=partial(nullcontext, model),
            accelerator=accelerator,
            prompts=[],
            trainer_state=lambda: None,
        )

    def roll_out(self, request: Request, params: SamplingParams) -> Scored:
        return roll_out(
            self.policy,
            self.ranks,
            self.lengths,
            request,
            params,
            version=0,
            max_failed_share=0.0,
            ledger=self.ledger,
        )


def worker(arguments: argparse.Namespace) -> None:
    """One of two processes: every round together, and by the first alone."""
    torch.set_num_threads(1)
    # Before the accelerator, whose state it would reset.
    config = RolloutConfig(output_dir="unused", use_cpu=True, report_to="none")
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    one: Any = SimpleNamespace(
        num_processes=1, process_index=0, distributed_type=DistributedType.NO
    )
    found = {}
    for lengths in ("even", "ragged"):
        processes = {
            "two": Process(Ranks(accelerator), lengths, config, accelerator),
            "one": Process(Ranks(one), lengths, config, accelerator),
        }
        params = SamplingParams(max_completion_length=64)
        seconds: dict[str, list[float]] = {"one": [], "two": []}
        cpu: dict[str, list[float]] = {"one": [], "two": []}
        tokens: dict[str, list[int]] = {"one": [], "two": []}
        for number in range(arguments.rounds + 1):
            asked = request(number, quick=arguments.quick)
            for who in ("one", "two") if number % 2 else ("two", "one"):
                accelerator.wait_for_everyone()
                start, cpu_start = time.perf_counter(), time.process_time()
                if who == "two" or accelerator.is_main_process:
                    scored = processes[who].roll_out(asked, params)
                cpu_seconds = time.process_time() - cpu_start
                accelerator.wait_for_everyone()
                if number and (who == "two" or accelerator.is_main_process):  # the first warms up
                    seconds[who].append(time.perf_counter() - start)
                    tokens[who].append(int(scored.rollouts.length_N.sum()))
                    busiest = processes[who].ranks.most(cpu_seconds)
                    cpu[who].append(busiest)
        if accelerator.is_main_process:
            assert tokens["one"] == tokens["two"], "the same rollouts, however many processes"
            num_rollouts = len(asked.seed_N)
            ratios = [a / b for a, b in zip(seconds["one"], seconds["two"], strict=True)]
            found[lengths] = {
                "rollouts": num_rollouts,
                "tokens_median": statistics.median(tokens["one"]),
                "rollouts_per_second_one": num_rollouts / statistics.median(seconds["one"]),
                "rollouts_per_second_two": num_rollouts / statistics.median(seconds["two"]),
                "ratio_median": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "cpu_ratio_median": statistics.median(
                    a / b for a, b in zip(cpu["one"], cpu["two"], strict=True)
                ),
            }
    if accelerator.is_main_process:
        print(json.dumps(found), flush=True)
    accelerator.end_training()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="half the rollouts, nothing written")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments)
        return
    load_before = os.getloadavg()[0]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    command += ["-m", "benchmarks.processes", "--worker", "--rounds", str(arguments.rounds)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        command + ["--quick"] * arguments.quick,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=environment,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    result = {
        "command": "python -m benchmarks.processes",
        "rounds": arguments.rounds,
        "load_before": load_before,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "cases": found,
    }
    for name, case in found.items():
        print(
            f"{name:7s} one {case['rollouts_per_second_one']:6.1f}  two "
            f"{case['rollouts_per_second_two']:6.1f} rollouts/s  ratio {case['ratio_median']:.2f} "
            f"({case['ratio_min']:.2f} to {case['ratio_max']:.2f}), of processor seconds "
            f"{case['cpu_ratio_median']:.2f}"
        )
    if not arguments.quick:
        summaries.write(RESULT, result)


if __name__ == "__main__":
    main()
