"""A run that goes on: with the learning rate and schedule of now, the log lines and the best checkpoint
it had, from weights that are finite, after SIGTERM and interrupts."""

import json
import math
import os
import shutil
import signal

import pytest
import torch
from transformers import TrainerCallback

from rl.run import checkpoint, schedule
from rl.run.termination import Terminated
from tests import tiny

pytestmark = pytest.mark.slow  # whole runs

SETTINGS = {
    "reward": tiny.small_digit,
    "trainer": "raft++",
    "allocator": "uniform",
    "save_strategy": "steps",
    "save_steps": 1,
    "prompts_per_step": 4,
    "rollouts_per_prompt": 4,
}


def equal(one, other):
    one, other = tiny.parameters(one), tiny.parameters(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def rates(folder):
    return [row["learning_rate"] for row in tiny.step_logs(folder)]


# -- optimizer and schedule


def linear(steps, rate):
    return [rate * (steps - k) / steps for k in range(steps)]


def cosine(steps, rate):
    return [rate * 0.5 * (1 + math.cos(math.pi * k / steps)) for k in range(steps)]


def warmed_up(steps, rate):
    return [rate * min(k / 3, 1.0) for k in range(steps)]


SCHEDULES = {
    "constant": (lambda steps, rate: [rate] * steps, {}),
    "linear": (linear, {}),
    "cosine": (cosine, {}),
    "constant_with_warmup": (warmed_up, {"warmup_steps": 3}),
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_resumed_run_follows_the_schedule_of_now(tmp_path, kind):
    """Linear and cosine had ended at 0: with more steps they are where the longer schedule is."""
    expected, more = SCHEDULES[kind]
    settings = SETTINGS | {"lr_scheduler_type": kind} | more
    tiny.run(tmp_path, max_steps=2, learning_rate=1e-2, **settings)
    made = tiny.run(tmp_path, max_steps=5, learning_rate=1e-3, resume=True, **settings)
    assert rates(tmp_path) == pytest.approx(expected(2, 1e-2) + expected(5, 1e-3)[2:], rel=1e-12)
    (group, *_) = made.optimizer.param_groups
    assert group["initial_lr"] == 1e-3


def test_weight_decay_and_betas_given_on_resume_are_used(tmp_path):
    tiny.run(tmp_path, max_steps=1, **SETTINGS)
    given = {"weight_decay": 0.3, "adam_beta1": 0.5, "adam_beta2": 0.7, "adam_epsilon": 1e-3}
    made = tiny.run(tmp_path, max_steps=2, resume=True, **SETTINGS | given)
    decays = {group["weight_decay"] for group in made.optimizer.param_groups}
    assert decays == {0.3, 0.0}  # none of norms and biases
    for group in made.optimizer.param_groups:
        assert group["betas"] == (0.5, 0.7) and group["eps"] == 1e-3


def test_a_schedule_that_is_no_function_of_the_step_keeps_its_share_of_the_rate():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    optimizer.param_groups[0]["lr"] = 0.02  # as loaded: reduced to a fifth
    given = [{"lr": 0.5, "momentum": 0.9}]
    schedule.apply(optimizer, plateau, given, rate=0.5, rate_before=0.1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    assert optimizer.param_groups[0]["momentum"] == 0.9
    schedule.apply(optimizer, plateau, given, rate=0.5, rate_before=0.5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optim": "sgd"}, "optim was 'adamw_torch_fused', is 'sgd'"),
        ({"optim_args": "amsgrad=True"}, "optim_args was None"),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"},
            "lr_scheduler_type was 'constant'",
        ),
    ],
)
def test_the_state_of_another_optimizer_is_not_used(once, tmp_path, change, message):
    folder = shutil.copytree(once, tmp_path / "run")
    more = {"max_steps": 3, "data": tiny.rows("ab"), "eval_dataset": tiny.rows("c")}
    with pytest.raises(ValueError, match=message):
        tiny.run(folder, resume=True, **SETTINGS | more | change)


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("once") / "run"
    tiny.run(folder, max_steps=2, data=tiny.rows("ab"), **SETTINGS)
    return folder


def test_a_checkpoint_without_optimizer_is_refused(once, tmp_path):
    folder = tmp_path / "run"
    tiny.run(folder, max_steps=1, **SETTINGS, save_only_model=True)
    for change in ({"resume": True}, {"if_run_exists": "resume"}):
        with pytest.raises(ValueError, match="checkpoint-1 has no optimizer, as save_only_model"):
            tiny.run(folder, max_steps=2, **SETTINGS | change)
    checkpoint.require_optimizer(once / "checkpoint-1")


# -- what a log line and a record say


def test_the_loss_of_a_log_line_that_spans_a_resume_is_of_all_its_steps(tmp_path):
    settings = SETTINGS | {"logging_steps": 3, "learning_rate": 3e-2, "updates_per_step": 2}
    made = tiny.run(tmp_path / "whole", max_steps=6, **settings)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in (5, 6):
        shutil.rmtree(tmp_path / "cut" / f"checkpoint-{step}")
    resumed = tiny.run(tmp_path / "cut", max_steps=6, resume=True, **settings)
    losses = [[row["loss"] for row in tiny.step_logs(tmp_path / run)] for run in ("whole", "cut")]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    ours, theirs = (
        next(row["train_loss"] for row in run.state.log_history if "train_loss" in row)
        for run in (resumed, made)
    )
    assert ours != theirs  # it is of the two steps made after the resume
    assert equal(made, resumed)


def test_a_run_folder_that_was_moved_finds_its_own_best_checkpoint(tmp_path):
    settings = SETTINGS | {"data": tiny.rows("ab"), "eval_dataset": tiny.rows("c")}
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    settings |= {"metric_for_best_model": "reward", "greater_is_better": False}  # so an early one
    settings |= {"learning_rate": 3e-2, "save_total_limit": 1}
    tiny.run(tmp_path / "run", max_steps=3, **settings)
    state = json.loads((tmp_path / "run" / "checkpoint-3" / "trainer_state.json").read_text())
    best = tmp_path / "run" / f"checkpoint-{state['best_global_step']}"
    assert best.name != "checkpoint-3"  # both are there, as a run goes on from the last
    moved = shutil.copytree(tmp_path / "run", tmp_path / "moved")
    where = checkpoint.best_of(moved / "checkpoint-3")
    assert where == str(moved / best.name)
    again = tiny.run(tmp_path / "run", max_steps=3, resume=True, **settings)
    shutil.rmtree(tmp_path / "run")
    made = tiny.run(moved, max_steps=3, resume=True, **settings)
    assert made.state.best_model_checkpoint == where and equal(made, again)
    (moved / best.name / "manifest.json").write_text("{")
    assert checkpoint.best_of(moved / "checkpoint-3") is None


# -- weights that are not finite


def spoil(trainer, bad):
    with torch.no_grad():
        next(trainer.model.parameters()).view(-1)[3] = bad


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, bad):
    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                spoil(made, bad)

    settings = SETTINGS | {"save_total_limit": 1}
    made = tiny.trainer(tmp_path, max_steps=5, callbacks=[Spoil()], **settings)
    with pytest.raises(FloatingPointError, match="embed_tokens.weight is not finite after step 3"):
        made.train()
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-2"]
    with pytest.raises(FloatingPointError, match="is not saved"):
        made.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final").exists()


def test_an_error_saves_no_weights_that_are_not_finite_and_deletes_no_checkpoint(tmp_path):
    calls = []

    def fails(completions, **_):
        calls.append(1)
        if len(calls) >= 4:
            raise KeyError("away")
        return tiny.small_digit(completions)

    settings = SETTINGS | {"reward": fails, "save_steps": 2, "save_total_limit": 1, "max_steps": 9}

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                spoil(made, math.nan)

    made = tiny.trainer(tmp_path / "bad", callbacks=[Spoil()], **settings)
    with pytest.raises(Exception):  # noqa: B017 -- of the engine or the reward
        made.train()
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "bad")] == ["checkpoint-2"]

    calls.clear()
    with pytest.raises(Exception, match="away"):
        tiny.run(tmp_path / "good", **settings)
    names = [path.name for path in checkpoint.checkpoints(tmp_path / "good")]
    assert names == ["checkpoint-3", "checkpoint-2"]


# -- ended from outside


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_a_step_keeps_the_steps_before_it(tmp_path, monkeypatch, error):
    settings = SETTINGS | {"save_steps": 100, "logging_steps": 100, "max_steps": 4}
    whole = tiny.run(tmp_path / "whole", **settings)
    made = tiny.trainer(tmp_path / "run", **settings)
    generate = made.policy.engine.generate

    def interrupted(*args, **kwargs):
        if made.state.global_step == 2:
            raise error(1)
        return generate(*args, **kwargs)

    monkeypatch.setattr(made.policy.engine, "generate", interrupted)
    with pytest.raises(error):
        made.train()
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert [row["step"] for row in tiny.step_logs(tmp_path / "run")] == [2]
    resumed = tiny.run(tmp_path / "run", resume=True, **settings)
    assert tiny.lines(tmp_path / "run") == tiny.lines(tmp_path / "whole")
    assert equal(resumed, whole)


@pytest.mark.parametrize("save_strategy", ["steps", "no"])
def test_sigterm_ends_a_run_between_two_steps(tmp_path, save_strategy):
    settings = SETTINGS | {"save_strategy": save_strategy, "save_steps": 100, "max_steps": 5}
    settings |= {"selector": "vade", "logging_steps": 2, "enable_jit_checkpoint": True}
    whole = tiny.run(tmp_path / "whole", **settings)
    before, folder, calls = signal.getsignal(signal.SIGTERM), tmp_path / "run", []

    def sends(completions, **_):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return tiny.small_digit(completions)

    sends.__name__ = "small_digit"
    with pytest.raises(Terminated) as raised:
        tiny.run(folder, **settings | {"reward": sends})
    assert raised.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    assert [path.name for path in checkpoint.checkpoints(folder)] == ["checkpoint-3"]
    resumed = tiny.run(folder, resume=True, **settings)
    assert tiny.lines(folder) == tiny.lines(tmp_path / "whole")
    assert equal(resumed, whole)
    ours, theirs = (
        [(row["step"], row["loss"]) for row in tiny.step_logs(run)]
        for run in (folder, tmp_path / "whole")
    )
    assert ours == theirs


def test_sigterm_in_the_last_step_ends_a_run_as_any_other(tmp_path):
    def sends(completions, **_):
        os.kill(os.getpid(), signal.SIGTERM)
        return tiny.small_digit(completions)

    settings = SETTINGS | {"reward": sends, "max_steps": 1, "enable_jit_checkpoint": True}
    assert tiny.run(tmp_path, **settings).state.global_step == 1


def test_the_state_of_the_stages_is_a_copy(tmp_path):
    """`failing.kept` relies on it: what a step does must not reach the state before it."""
    made = tiny.trainer(
        tmp_path,
        selector="vade",
        refill=True,
        refill_max_age=1,
        max_steps=2,
        **{name: value for name, value in SETTINGS.items() if name != "save_steps"}
        | {"save_strategy": "no"},
    )
    before = made.stages_state()
    as_text = repr(before)
    made.train()
    assert repr(before) == as_text
    assert repr(made.stages_state()) != as_text
