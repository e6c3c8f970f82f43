"""docs/metrics.md lists the metrics that runs log, and no others."""

import re
import warnings
from pathlib import Path

import pytest

from tests import tiny, tiny_denoising

pytestmark = pytest.mark.slow  # whole runs

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "metrics.md").read_text()
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}
GRPO = {"trainer": "grpo", "allocator": "uniform"}
LANGUAGE = {
    "plain": {},
    "pilots": {"trainer": "raft++", "allocator": "gvm", "pilot_rollouts": 2}
    | {"gvm_gradient_norm": "rms"},
    "kl": {"refill": True, "refill_max_age": 2, "updates_per_step": 2, "beta": 0.1},
    "stopping": {"stopping": "early_unbiased", "stopping_round_size": 2, "success_above": 0.5},
    "selected": {"selector": "band", "down_sampling": "d3s", "token_selection": "d3s"},
    "hapo": {"loss": "hapo", "advantage": "token_level", "adaptive_temperature_tau": 0.1},
    "corrected": {"importance_correction": "sequence_mask", "loss": "vespo"},
    "capped": {"loss": "cispo"},
    "replayed": {"replay_share": 0.4},
    "decided": {"reward": tiny.decided_digit, "verdict_every": 8},
    "retired": {"retire_above": 0.9, "greso_explore": 0.5},
    "started": {"starts": "traces", "starts_delta": 0.0, "starts_until": 1.0, "max_steps": 5},
}
"""Runs that together log every metric of a language model."""


def documented() -> set[str]:
    """Names in the first column of the tables; what is counted per step is also counted per run."""
    names = set(re.findall(r"^\| `([^`]+)` \|", TEXT, flags=re.MULTILINE))
    return names | {name.replace("ledger/", "ledger_total/") for name in names}


def with_wildcard(name: str) -> str:
    """A logged name as the page writes it: NAME for the name of a reward function."""
    return re.sub(r"(rewards)/[^/]+/", r"\1/NAME/", name)


def names_of(folder: Path) -> set[str]:
    lines = tiny.lines(folder, "metrics.jsonl")
    return {with_wildcard(name) for line in lines for name in line}


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings that change the objective
        held_out = [{"prompt": "aa1=", "answer": "1"}, {"prompt": "bb2=", "answer": "2"}]
        for name, settings in LANGUAGE.items():
            settings = EVALUATED | GRPO | settings
            tiny.run(folder / name, eval_dataset=held_out, **settings)
        rewards = {"chain": "brightness", "branched": tiny_denoising.bright}
        for name, plan in (("chain", tiny_denoising.CHAIN), ("branched", tiny_denoising.BRANCHED)):
            tiny_denoising.run(
                folder / name,
                plan=plan,
                reward=rewards[name],
                eval_dataset=[{"prompt": "picture 9"}],
                **EVALUATED,
            )
    return set().union(*(names_of(folder / name) for name in (*LANGUAGE, *rewards)))


def test_every_metric_that_a_run_logs_is_documented(logged):
    assert logged - documented() == set()


def test_every_documented_metric_is_logged_by_a_run(logged):
    assert documented() - logged == set()


def test_no_metric_is_documented_twice():
    names = re.findall(r"^\| `([^`]+)` \|", TEXT, flags=re.MULTILINE)
    assert len(names) == len(set(names))
