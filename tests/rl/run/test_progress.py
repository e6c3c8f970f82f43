"""The progress line: what stands first, what fits, and what a run is measured by."""

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from rl.run.end import Budget
from rl.run.progress import ProgressLine, fitting, short, training_of, validation_of

LOGS = {
    "reward": 0.25,
    "reward_trained": 0.5,
    "step_time": 1.234,
    "groups/mixed_share": 0.5,
    "ledger_total/rollouts_drawn": 200,
    "ledger_total/rollouts_trained": 50,
    "ledger_total/tokens_drawn": 4000,
    "ledger_total/tokens_trained": 1000,
    "ledger_total/seconds_rollout": 12.3,
}
VALIDATION = {"eval_pass_rate": 0.412, "eval_greedy_accuracy": 0.5}


def test_figures_of_a_log_line():
    first, more = training_of(LOGS)
    assert first == ["reward 0.250"]
    assert more == [
        "1.2 s/step",
        "mixed 50%",
        "4k tokens, 25% trained",
        "200 rollouts, 25% trained",
        "reward trained 0.500",
        "s rollout 12",
    ]
    assert "4k denoising steps, 25% trained" in training_of(LOGS | {"denoiser_evaluations": 9.0})[1]
    nothing = {name: value for name, value in LOGS.items() if name != "reward_trained"}
    assert "none trained" in training_of(nothing)[1]
    assert training_of({"loss": 0.1}) == ([], [])


def test_every_validation_set_is_named():
    assert validation_of(VALIDATION) == ["validation 41.2% greedy 50.0%"]
    assert validation_of({"eval_hard_pass_rate": 0.1, "eval_easy_pass_rate": 0.9}) == [
        "hard 10.0%",
        "easy 90.0%",
    ]
    assert validation_of({"eval_reward": 1.0, "eval_pass_rate_se": 0.1}) == []


def test_what_does_not_fit_is_left_out_whole_and_shorter_parts_follow():
    assert fitting(["ab"], ["cdefgh", "ij"], width=7) == "ab | ij"
    assert fitting(["ab"], ["cd", "ef"], width=7) == "ab | cd"
    assert fitting(["longer than it"], ["x"], width=3) == "longer than it"
    assert fitting([], ["x"], width=3) == "x"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        *[(0, "0"), (999, "999"), (999.9, "1k"), (1500, "1.5k"), (150_000, "150k")],
        *[(999_499, "999k"), (999_700, "1M"), (2_345_678, "2.35M"), (7e9, "7G")],
    ],
)
def test_counts_are_short(count, text):
    assert short(count) == text


def shown(width, *, budget=None, logs=LOGS):
    """The live line after the third of ten steps in a terminal of `width` columns, without colours."""
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=width, color_system=None)
    args = SimpleNamespace(disable_tqdm=False, log_level="passive")
    state = SimpleNamespace(is_world_process_zero=True, global_step=3, max_steps=10)
    progress = ProgressLine(args, console)
    if budget is not None:
        progress.count(budget, "tokens")
    progress.on_train_begin(args, state, None)
    progress.on_step_end(args, state, None)
    progress.on_log(args, state, None, logs=VALIDATION)
    progress.on_log(args, state, None, logs=logs)
    progress.close()
    lines = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", text.getvalue()).replace("\r", "\n").splitlines()
    return [line for line in lines if line.strip()][-1].rstrip(), progress


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_step_time_left_reward_and_validation_are_seen_at_every_width(width):
    line, _ = shown(width)
    assert len(line) <= width
    assert re.match(r"step 3/10 .* reward 0\.250 \| validation 41\.2% greedy 50\.0%", line), line
    assert "…" not in line
    assert ("s rollout 12" in line) == (width == 200)


def test_a_run_with_a_budget_is_measured_by_it():
    line, progress = shown(120, budget=Budget(lambda: 37_500, 150_000, setting="of_tokens"))
    assert line.startswith("step 3, 37.5k/150k tokens "), line
    (task,) = progress._progress.tasks
    assert (task.completed, task.total) == (37_500, 150_000)


def test_piped_output_is_a_line_a_log(capsys):
    args = SimpleNamespace(disable_tqdm=False, log_level="passive")
    state = SimpleNamespace(is_world_process_zero=True, global_step=3, max_steps=10)
    progress = ProgressLine(args, Console(file=io.StringIO(), force_terminal=False))
    progress.on_train_begin(args, state, None)
    progress.on_log(args, state, None, logs={"train_runtime": 1.0})
    progress.on_log(args, state, None, logs=LOGS)
    assert capsys.readouterr().err == (
        "step 3/10 | reward 0.250 | 1.2 s/step | mixed 50% | 4k tokens, 25% trained | "
        "200 rollouts, 25% trained\n"
    )
