"""How a run ends before its last step: for want of signal, by an error, by a spent budget; and then
goes on, or is refused for what it was told."""

import json
import random

import pytest
import torch
from transformers import TrainerCallback

from rl.run import checkpoint
from rl.run.end import NoSignalError
from rollouts.rewards.contract import RewardError
from tests import tiny
from tests.launched import ON_CPU, launch
from tests.launched import RUNS as RUNS_OF_TWO

pytestmark = pytest.mark.slow  # whole runs

SAVED = {"save_strategy": "steps", "save_steps": 100}


def never(completions, **_):
    return [0.0] * len(completions)


class Fails:
    """`small_digit` with a little noise of the global generator; raises from call number `at` on."""

    __name__ = "fails"

    def __init__(self, at: int | None) -> None:
        self.calls, self.at = 0, at

    def __call__(self, completions, **columns):
        self.calls += 1
        noise = random.random()
        if self.at is not None and self.calls >= self.at:
            raise KeyError("the verifier is away")
        return [max(0.0, value - 0.1 * noise) for value in tiny.small_digit(completions)]


def saved_steps(folder):
    return sorted(int(path.name.split("-")[1]) for path in checkpoint.checkpoints(folder))


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def timeless(rows):
    """Rows of a log without what a clock measured."""
    left_out = ("seconds", "runtime", "per_second", "step_time", "train_loss")
    return [{n: v for n, v in row.items() if not any(x in n for x in left_out)} for row in rows]


# -- no signal


def test_a_run_without_signal_ends_as_any_other_before_it_says_so(tmp_path):
    settings = {"max_steps": 9, "logging_steps": 100, "reward": never, **SAVED}
    validated = {"eval_strategy": "steps", "eval_steps": 100, "eval_dataset": tiny.rows("c")}
    settings |= validated | {"data": tiny.rows("ab")}
    with pytest.raises(NoSignalError, match=r"last 3 steps.*reward 0\.000.*max_empty_steps"):
        tiny.run(tmp_path, max_empty_steps=3, **settings)
    assert saved_steps(tmp_path) == [3]
    (log,) = tiny.step_logs(tmp_path)
    assert log["step"] == 3 and log["reward"] == 0
    assert [
        row["step"] for row in tiny.lines(tmp_path, "metrics.jsonl") if "eval_reward" in row
    ] == [3]

    with pytest.raises(NoSignalError, match="last 3 steps"):  # without another step
        tiny.run(tmp_path, max_empty_steps=3, resume=True, **settings)
    assert len(tiny.lines(tmp_path)) == 3

    with pytest.raises(NoSignalError, match="last 5 steps"):
        tiny.run(tmp_path, max_empty_steps=5, resume=True, **settings)
    assert [row["step"] for row in tiny.lines(tmp_path)] == [1, 2, 3, 4, 5]
    assert saved_steps(tmp_path) == [3, 5]


def test_a_recipe_without_signal_leaves_its_model_and_report(tmp_path):
    from recipes.train import main

    tiny.model().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "mine.py").write_text(
        "def never(completions, **columns):\n    return [0.0] * len(completions)\n"
    )
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in tiny.rows()))
    settings = {
        "model_name_or_path": tmp_path / "model",
        "dataset_name": data,
        "rewards": f"{tmp_path / 'mine.py'}:never",
        "validation_size": 0,
        "output_dir": tmp_path / "run",
        "max_steps": 5,
        "max_empty_steps": 2,
        "prompts_per_step": 4,
        "rollouts_per_prompt": 4,
        "max_completion_length": 4,
        "use_cpu": "true",
        "report_to": "none",
        "num_threads": 1,
    }
    with pytest.raises(NoSignalError, match="last 2 steps"):
        main([str(word) for name, value in settings.items() for word in (f"--{name}", value)])
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
    assert (tmp_path / "run" / "report.html").exists()
    assert saved_steps(tmp_path / "run") == [2]


@pytest.mark.slow
def test_two_processes_without_signal_save_what_they_have(tmp_path):
    settings = ON_CPU | RUNS_OF_TWO["sparse"] | SAVED | {"max_empty_steps": 1}
    done = launch((tmp_path, settings))
    assert done.returncode != 0
    assert "NoSignalError: no rollout carried a gradient in the last 1 steps" in done.stderr
    assert saved_steps(tmp_path) == [len(tiny.lines(tmp_path))]


# -- a step that fails

RUNS = {
    "one round": {},
    "updates": {"updates_per_step": 2, "trainer": "grpo", "lr_scheduler_type": "cosine"},
    "pilots": {"pilot_rollouts": 2, "pilot_estimate": "pilot", "gvm_gradient_norm": "rms"},
    "refill": {
        "allocator": "uniform",
        "refill": True,
        "refill_min_prompts": 5,
        "refill_max_age": 1,
        "refill_at_cap": "partial",
        "prompts_per_step": 3,
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_resumed_after_its_reward_failed_is_the_run_in_which_it_did_not(tmp_path, name):
    settings = RUNS[name] | SAVED | {"max_steps": 6}
    random.seed(1)
    whole = tiny.run(tmp_path / "whole", reward=Fails(at=None), **settings)
    for call in (3, 4):  # in the first round of a step, and in its second where there are two
        folder = tmp_path / str(call)
        random.seed(1)
        with pytest.raises(RewardError, match="the verifier is away"):
            tiny.run(folder, reward=Fails(at=call), **settings)
        done = len(tiny.lines(folder))
        assert 0 < done < 6
        assert saved_steps(folder) == [done]
        random.seed(2)
        resumed = tiny.run(folder, reward=Fails(at=None), resume=True, **settings)
        assert tiny.lines(folder) == tiny.lines(tmp_path / "whole")
        assert equal(tiny.parameters(resumed), tiny.parameters(whole))
        ours, theirs = (timeless(tiny.step_logs(run)) for run in (folder, tmp_path / "whole"))
        assert ours == theirs


def test_log_lines_that_wait_are_written_when_a_step_fails(tmp_path):
    tiny.run(tmp_path / "whole", reward=Fails(at=None), max_steps=3)
    with pytest.raises(RewardError):
        tiny.run(tmp_path / "failed", reward=Fails(at=4), logging_steps=100, max_steps=9)
    assert saved_steps(tmp_path / "failed") == []  # save_strategy is "no"
    (log,) = tiny.step_logs(tmp_path / "failed")
    each = tiny.step_logs(tmp_path / "whole")
    assert log["step"] == 3
    assert log["ledger_total/rollouts_drawn"] == each[-1]["ledger_total/rollouts_drawn"]
    for column in ("reward", "loss"):
        assert log[column] == pytest.approx(sum(row[column] for row in each) / 3, abs=0.05)


def test_a_reward_that_fails_in_validation_costs_no_step(tmp_path):
    def fails_on_c(completions, prompts, **_):
        if any(prompt.startswith("c") for prompt in prompts):
            raise ConnectionError("away")
        return tiny.small_digit(completions)

    settings = {"data": tiny.rows("ab"), "eval_dataset": tiny.rows("c"), "eval_strategy": "steps"}
    with pytest.raises(RewardError, match="away"):
        tiny.run(tmp_path, reward=fails_on_c, eval_steps=2, max_steps=4, **settings, **SAVED)
    assert saved_steps(tmp_path) == [2]
    tiny.run(
        tmp_path,
        reward=tiny.small_digit,
        resume=True,
        eval_steps=2,
        max_steps=4,
        **settings,
        **SAVED,
    )
    assert len(tiny.lines(tmp_path)) == 4


def test_a_checkpoint_that_cannot_be_written_does_not_hide_the_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    made = tiny.trainer(tmp_path, reward=Fails(at=3), max_steps=4, **SAVED)
    monkeypatch.setattr(checkpoint, "commit", full)
    with pytest.raises(RewardError, match="the verifier is away"):
        made.train()
    assert saved_steps(tmp_path) == []


# -- a gradient that is not finite


@pytest.mark.parametrize(
    ("updates", "bad"), [(1, float("nan")), (1, float("inf")), (2, float("nan"))]
)
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_gradient_that_is_not_finite_reaches_nothing(tmp_path, updates, bad, max_grad_norm):
    settings = SAVED | {"save_steps": 2, "save_total_limit": 1, "max_steps": 4, "trainer": "grpo"}
    settings |= {"updates_per_step": updates, "max_grad_norm": max_grad_norm, "logging_steps": 100}
    settings |= {"reward": tiny.small_digit, "per_device_train_batch_size": 64}
    last = []

    class Look(TrainerCallback):
        def on_step_end(self, *_, **__):
            last.append(tiny.parameters(made))

    made = tiny.trainer(tmp_path, callbacks=[Look()], **settings)
    backwards = []

    def spoil(gradient):
        backwards.append(1)
        return gradient * bad if len(backwards) > 3 * updates else gradient

    next(made.model.parameters()).register_hook(spoil)
    with pytest.raises(
        FloatingPointError, match=r"gradient norm of step 4 is (nan|inf).*learning_rate"
    ):
        made.train()
    assert len(backwards) == 3 * updates + 1  # the first update of the step, and no other
    assert equal(tiny.parameters(made), last[-1]) and len(last) == 3
    assert saved_steps(tmp_path) == [2]  # step 3 may have begun to go wrong
    assert [row["step"] for row in tiny.step_logs(tmp_path)] == [3]

    resumed = tiny.run(tmp_path, resume=True, **settings)
    whole = tiny.run(tmp_path / "whole", **settings)
    assert equal(tiny.parameters(resumed), tiny.parameters(whole))


# -- a budget that is spent


def test_a_resumed_run_whose_tokens_are_spent_takes_no_step(tmp_path, caplog):
    settings = SAVED | {"max_steps": 9, "max_generated_tokens": 300, "log_level": "warning"}
    first = tiny.run(tmp_path, **settings)
    done = first.state.global_step
    assert done < 9 and saved_steps(tmp_path) == [done]
    for _ in range(2):
        again = tiny.run(tmp_path, resume=True, **settings)
        assert again.state.global_step == done == len(tiny.lines(tmp_path))
        assert equal(tiny.parameters(again), tiny.parameters(first))
        assert again.args.max_steps == 9
    told = [record.message for record in caplog.records if "no step is taken" in record.message]
    assert told[0] == f"max_generated_tokens=300 reached by step {done}: no step is taken"
    more = tiny.run(tmp_path, resume=True, **settings | {"max_generated_tokens": 10_000})
    assert more.state.global_step == 9


# -- settings that changed


def test_settings_that_changed_at_a_resume_are_told_and_remembered(tmp_path, caplog):
    settings = {"save_strategy": "steps", "save_steps": 2, "log_level": "warning"}
    tiny.run(tmp_path, max_steps=4, **settings)

    def resume(**changed):
        caplog.clear()
        at = changed.pop("resume", True)
        tiny.run(tmp_path, resume=at, **{"max_steps": 6} | settings | changed)
        about = json.loads((tmp_path / "run.json").read_text())
        told = [record.message for record in caplog.records if "other settings" in record.message]
        return about.get("changes"), told

    changes, told = resume(learning_rate=1e-3, logging_steps=2, save_total_limit=3)
    expected = {"max_steps": [4, 6], "learning_rate": [3e-3, 1e-3]}
    assert changes == [{"step": 4, "settings": expected}]
    (message,) = told
    assert "from step 4" in message and "learning_rate was 0.003, is 0.001" in message
    assert "logging_steps" not in message and "save_total_limit" not in message

    later, told = resume(learning_rate=1e-3, max_steps=8)
    assert later == [*changes, {"step": 6, "settings": {"max_steps": [6, 8]}}]
    same, told = resume(learning_rate=1e-3, max_steps=8)
    assert same == later and not told

    # From before any change: what counts is what made the steps up to there.
    back, told = resume(resume=str(tmp_path / "checkpoint-2"), learning_rate=3e-3, max_steps=4)
    assert back == [] and not told


def test_a_quantile_that_decides_the_temperature_must_not_change(tmp_path):
    settings = SAVED | {"adaptive_temperature_tau": 0.5, "max_steps": 1}
    tiny.run(tmp_path, hapo_quantile=0.8, **settings)
    with pytest.raises(ValueError, match=r"hapo_quantile was 0\.8, is 0\.5"):
        tiny.run(tmp_path, resume=True, hapo_quantile=0.5, **settings)


# -- refused at once


def test_a_column_that_only_validation_lacks_is_missed_before_training(tmp_path):
    held_out = [{"prompt": row["prompt"]} for row in tiny.rows("c")]
    with pytest.raises(RewardError, match="eval_dataset: .*first_digit needs a column 'answer'"):
        tiny.trainer(tmp_path, data=tiny.rows("ab"), eval_dataset=held_out)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": 0}, "max_steps must be at least 1, or -1 .*, got 0"),
        ({"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs must be positive, got 0"),
        ({"max_steps": -1, "num_train_epochs": 0.01}, "num_train_epochs=0.01 of 24 prompts"),
    ],
)
def test_a_run_of_no_steps_is_refused_with_the_value(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny.trainer(tmp_path, **settings)
