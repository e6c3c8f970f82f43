"""What can be wrong with a run, and the error that says so before it costs anything."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple

import pytest
import torch

from rl.run import checkpoint, tracking
from rl.trainer import RolloutTrainer
from rollouts.rewards.contract import RewardError
from tests import tiny

pytestmark = pytest.mark.slow  # whole runs

Usage = namedtuple("Usage", "total used free")


def row(text, answer="1"):
    return {"prompt": text, "answer": answer}


# Data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "the data set is empty"),
        ([{"question": "a1="}], r"row 0 has no column 'prompt'.*question"),
        ([row("a1="), row("  ")], "row 1 has an empty prompt"),
        ([row("a1="), row("a2="), row("a1=")], "rows 0 and 2 have the same prompt"),
        ([row("a1="), row("a2=")], r"prompts_per_step=6 exceeds the 2 prompts.*: 2 or less"),
        (
            [row([{"role": "user", "content": "a1="}])],
            "no chat template.*set tokenizer.chat_template",
        ),
    ],
    ids=["empty", "no prompt", "blank", "duplicate", "too few", "no template"],
)
def test_data_that_cannot_be_trained_on(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        tiny.trainer(tmp_path, data=data)
    assert not tiny_files(tmp_path)


def tiny_files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_no_data(tmp_path):
    with pytest.raises(ValueError, match="train_dataset is missing: give rows"):
        RolloutTrainer(
            tiny.model(),
            tiny.first_digit,
            tiny.config(tmp_path),
            None,
            processing_class=tiny.tokenizer(),
        )


def test_a_tokenizer_without_pad_token(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"no pad token: set tokenizer\.pad_token"):
        RolloutTrainer(
            tiny.model(),
            tiny.first_digit,
            tiny.config(tmp_path),
            tiny.rows(),
            processing_class=tokenizer,
        )


def test_a_model_from_nowhere_needs_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="give its tokenizer too"):
        RolloutTrainer(tiny.model(), tiny.first_digit, tiny.config(tmp_path), tiny.rows())


def test_overlong_prompts(tmp_path):
    data = [*tiny.rows(), row("abcabc5=", "5")]
    with pytest.raises(ValueError, match=r"row 24 has 8 tokens, but max_prompt_length is 5"):
        tiny.trainer(tmp_path, data=data, max_prompt_length=5)
    for overlong, dropped, truncated in (("drop", 1, 0), ("truncate", 0, 1)):
        folder = tmp_path / overlong
        made = tiny.run(
            folder, data=data, max_prompt_length=5, overlong_prompts=overlong, max_steps=1
        )
        report = json.loads((folder / "run.json").read_text())["prompt_report"]
        assert (report["dropped"], report["truncated"]) == (dropped, truncated)
        assert report["kept"] == len(made.prompts) == 25 - dropped
        assert max(len(prompt.token_ids) for prompt in made.prompts) <= 5


def test_a_prompt_that_is_trained_on_and_validated_with(tmp_path):
    with pytest.raises(ValueError, match=r"2 prompts are both in train_dataset and eval_dataset"):
        tiny.trainer(tmp_path, eval_dataset=tiny.rows()[3:5])
    data = [row | {"id": f"train-{i}"} for i, row in enumerate(tiny.rows())]
    held_out = [{"prompt": "a3=", "answer": "another", "id": "test-0"}]
    with pytest.raises(ValueError, match=r"1 prompts are both in .* such as key test-0"):
        tiny.trainer(tmp_path, data=data, eval_dataset=held_out, id_column="id")


# Rewards


def test_no_reward(tmp_path):
    with pytest.raises(ValueError, match="reward_funcs is empty"):
        tiny.trainer(tmp_path, reward=[])
    with pytest.raises(ValueError, match="reward_weights has 2 entries for 1 reward functions"):
        tiny.trainer(tmp_path, reward_weights=[1.0, 2.0])


def returns(value):
    def odd(completions, **_):
        return [value if "0" in text else 0.0 for text in completions]

    return odd


def raises(completions, **_):
    raise KeyError("no such verifier")


def hangs(completions, **_):
    while True:
        time.sleep(0.01)


def short(completions, **_):
    return [0.0] * (len(completions) - 1)


def wants_more(completions, solution, **_):
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (raises, "raises.*KeyError: 'no such verifier'"),
        (hangs, "hangs.*took longer than 0.2 s"),
        (short, r"reward function short returned 35 rewards for 36 completions"),
        (returns(float("nan")), "odd.*returned nan"),
        (returns(float("inf")), "odd.*returned inf"),
        (returns("1"), "'1' of type str"),
    ],
    ids=["raises", "hangs", "short", "nan", "inf", "text"],
)
def test_a_failing_reward_stops_the_run_and_names_function_and_prompt(tmp_path, reward, message):
    made = tiny.trainer(tmp_path, reward=reward, reward_timeout=0.2)
    started = time.monotonic()
    with pytest.raises(RewardError, match=message) as caught:
        made.train()
    assert time.monotonic() - started < 10
    if reward is not short and "type str" not in message:
        assert any(prompt.key in str(caught.value) for prompt in made.prompts)
    assert made.state.global_step == 0


def test_a_column_a_reward_lacks_is_said_before_training(tmp_path):
    with pytest.raises(RewardError, match=r"wants_more needs a column 'solution'.*'answer'"):
        tiny.trainer(tmp_path, reward=wants_more)


def test_the_share_of_failures_that_is_allowed_is_counted_and_listed(tmp_path):
    def flaky(completions, prompts, **_):
        if any(prompt == "a3=" for prompt in prompts):
            raise OSError("verifier is down")
        return tiny.small_digit(completions)

    tiny.run(
        tmp_path,
        reward=flaky,
        max_failed_share=0.9,
        max_steps=4,  # every prompt once
        trainer="grpo",
        posterior_decay_rest=1.0,
    )
    steps, logs = tiny.lines(tmp_path), tiny.step_logs(tmp_path)
    failed = [len(step["failures"]) for step in steps]
    assert sorted(failed)[:3] == [0, 0, 0]
    assert [log["ledger/rollouts_failed"] for log in logs] == failed
    at = failed.index(max(failed))
    (key,) = {failure["prompt"] for failure in steps[at]["failures"]}
    place = steps[at]["prompts"].index(key)
    assert failed[at] == steps[at]["budgets"][place] > 0
    assert steps[at]["reward_sums"][place] == 0
    assert "OSError: verifier is down" in steps[at]["failures"][0]["reason"]
    assert logs[at]["ledger/tokens_failed"] > 0
    assert logs[at]["groups/unscored_prompts"] == 1
    assert logs[at]["ledger/rollouts_drawn"] == 36


def test_more_failures_than_allowed_stop_the_run(tmp_path):
    with pytest.raises(RewardError, match="max_failed_share=0.05"):
        tiny.run(tmp_path, reward=returns(float("nan")), max_failed_share=0.05)


def test_failures_are_judged_over_all_processes(tmp_path):
    made = tiny.trainer(tmp_path, reward=returns(float("nan")), max_failed_share=0.05)
    score = made.policy.reward

    def one_of_many(*rows, max_failed_share):  # a process that by itself sees few enough
        return score(*rows, max_failed_share=1.0)

    made.policy.reward = one_of_many
    message = r"\d+ of 36 rollouts could not be scored.*max_failed_share=0.05.*odd: returned nan"
    with pytest.raises(RewardError, match=message):
        made.train()


def test_a_step_in_which_every_reward_failed_is_a_step_without_signal(tmp_path):
    tiny.run(
        tmp_path,
        reward=raises,
        max_failed_share=1.0,
        max_steps=2,
        completions_every=1,
        eval_dataset=[row("8=", "1")],
        eval_strategy="steps",
        eval_steps=2,
    )
    for step, log in zip(tiny.lines(tmp_path), tiny.step_logs(tmp_path), strict=True):
        assert len(step["failures"]) == log["ledger/rollouts_failed"] == 36
        assert "reward" not in log
    (validation,) = [r for r in tiny.lines(tmp_path, "metrics.jsonl") if r["step"] == 2][1:2]
    assert set(validation) == {"step", "epoch", "eval_rollouts"}  # nothing else was measured


def test_one_function_may_not_apply_where_another_does(tmp_path):
    def sometimes(completions, answer, **_):
        return [1.0 if digit < "4" else None for digit in answer]

    tiny.run(tmp_path, reward=[tiny.small_digit, sometimes], reward_weights=[0.5, 0.5], max_steps=1)
    (log,) = tiny.step_logs(tmp_path)
    assert log["rewards/sometimes/mean"] == 1.0  # None is not a 0 in its mean
    assert 0 < log["reward"] < 1


# Numbers


def test_weights_that_are_nan_stop_the_run_and_name_a_prompt(tmp_path):
    made = tiny.trainer(tmp_path)
    with torch.no_grad():
        made.model.model.norm.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite") as caught:
        made.train()
    assert any(prompt.key in str(caught.value) for prompt in made.prompts)


def test_a_log_probability_that_turns_nan_in_training_stops_the_run_and_names_the_prompt(tmp_path):
    model = tiny.model()
    head = model.lm_head

    def spoil(module, args, output):
        return output * float("nan") if torch.is_grad_enabled() else output

    head.register_forward_hook(spoil)
    made = tiny.trainer(tmp_path, model=model, reward=tiny.small_digit)
    before = tiny.parameters(made)
    with pytest.raises(
        FloatingPointError, match=r"NaN or infinite, in rollouts of prompt"
    ) as caught:
        made.train()
    assert any(prompt.key in str(caught.value) for prompt in made.prompts)
    assert all(torch.equal(before[name], value) for name, value in tiny.parameters(made).items())


# Run folders and checkpoints


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    tiny.run(folder, max_steps=2, save_strategy="steps", save_steps=1)
    return folder


@pytest.fixture
def run_folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_a_folder_that_holds_a_run_is_not_overwritten(run_folder):
    before = (run_folder / "steps.jsonl").read_text()
    with pytest.raises(tracking.RunExistsError, match=r"already holds a run; write resume_from_ch"):
        tiny.run(run_folder)
    assert (run_folder / "steps.jsonl").read_text() == before
    made = tiny.run(run_folder, if_run_exists="resume", max_steps=3)
    assert [step["step"] for step in tiny.lines(run_folder)] == [1, 2, 3]
    assert made.state.global_step == 3


def test_a_folder_that_holds_another_run_is_not_resumed_into(run_folder, tmp_path):
    other = shutil.copytree(run_folder, tmp_path / "other")
    with pytest.raises(tracking.RunExistsError, match="is of another"):
        tiny.run(run_folder, resume=str(other / "checkpoint-1"))
    made = tiny.run(tmp_path / "fresh", resume=str(other / "checkpoint-1"), max_steps=2)
    assert made.state.global_step == 2
    assert [step["step"] for step in tiny.lines(tmp_path / "fresh")] == [2]


def test_resuming_where_there_is_nothing(tmp_path, run_folder):
    with pytest.raises(ValueError, match=r"nothing to resume: .*leave resume_from_checkpoint out"):
        tiny.run(tmp_path / "fresh", resume=True)
    with pytest.raises(
        ValueError, match=r"checkpoint-7 is not a folder.*checkpoint-2, checkpoint-1"
    ):
        tiny.run(run_folder, resume=str(run_folder / "checkpoint-7"))


def test_a_checkpoint_of_another_data_set(run_folder):
    with pytest.raises(ValueError, match="made with another data set"):
        tiny.run(run_folder, data=tiny.rows("ab"), resume=True)
    assert len(tiny.lines(run_folder)) == 2


def test_a_checkpoint_of_other_settings(run_folder):
    with pytest.raises(
        ValueError,
        match=r"allocator was 'gvm', is 'neyman'; temperature was 1\.0, is 0\.8; write the old",
    ):
        tiny.run(run_folder, allocator="neyman", temperature=0.8, resume=True)
    assert len(tiny.lines(run_folder)) == 2
    tiny.run(run_folder, learning_rate=1e-4, resume=True, max_steps=3)  # decides no rollout


def test_a_torn_checkpoint_is_named_and_the_one_before_it_is_used(run_folder, finished, caplog):
    (run_folder / "checkpoint-2" / "model.safetensors").write_bytes(b"")
    checkpoint.logger.propagate = True
    checkpoint.logger.setLevel("WARNING")
    found = tracking.checkpoint_to_resume(tiny.config(run_folder), True)
    assert found == run_folder / "checkpoint-1"
    assert "checkpoint-2 is torn and not used" in caplog.text
    assert "model.safetensors has 0 bytes" in caplog.text
    (run_folder / "checkpoint-1" / "model.safetensors").write_bytes(b"")
    (run_folder / "checkpoint-2").rename(run_folder / "checkpoint-0")
    shutil.copytree(finished / "checkpoint-2", run_folder / "checkpoint-2")
    with pytest.raises(checkpoint.TornCheckpointError, match="none of the 2 checkpoints"):
        # What was asked for is torn and so is the one before; a later one is not what was asked for.
        tracking.checkpoint_to_resume(tiny.config(run_folder), str(run_folder / "checkpoint-1"))


HOLD = """
import fcntl, sys, time, os
lock = open(sys.argv[1], "a+")
fcntl.flock(lock, fcntl.LOCK_EX)
lock.truncate(0); lock.write(str(os.getpid())); lock.flush()
print("held", flush=True)
time.sleep(60)
"""


def test_a_folder_that_another_process_writes(tmp_path):
    made = tiny.trainer(tmp_path)
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / ".lock")], stdout=subprocess.PIPE
    )
    try:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(tracking.RunExistsError, match=f"in use by process {other.pid}; wait"):
            made.train()
    finally:
        other.kill()
        other.wait()
    made.train()  # the lock goes with its process
    assert (tmp_path / ".lock").read_text() == str(os.getpid())


# Disk space


def test_too_little_space_is_said_before_the_first_step(tmp_path, monkeypatch):
    made = tiny.trainer(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=2)
    monkeypatch.setattr(tracking.shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 1000))
    with pytest.raises(
        OSError, match=r"0\.00 GB free, 3 checkpoints need .*lower save_total_limit"
    ):
        made.train()
    assert not (tmp_path / "steps.jsonl").exists()
    tiny.run(tmp_path / "unsaved", max_steps=1)  # nothing to save, nothing to refuse


@pytest.mark.parametrize("at", ["weights", "state", "manifest"])
def test_a_full_disk_leaves_the_earlier_checkpoints_whole(tmp_path, monkeypatch, at):
    settings = {"save_strategy": "steps", "save_steps": 1, "reward": tiny.small_digit}
    whole = tiny.run(tmp_path / "whole", max_steps=3, **settings)
    made = tiny.trainer(tmp_path / "run", max_steps=3, **settings)
    full = OSError(errno.ENOSPC, "No space left on device")
    owner, name = {
        "weights": (made, "_save_optimizer_and_scheduler"),
        "state": (checkpoint, "save_state"),
        "manifest": (checkpoint, "seal"),
    }[at]
    inner = getattr(owner, name)

    def fail_at_step_2(*args, **kwargs):
        if made.state.global_step == 2:
            raise full
        return inner(*args, **kwargs)

    monkeypatch.setattr(owner, name, fail_at_step_2)
    with pytest.raises(
        OSError, match=r"checkpoint-2 could not.*No space left.*free space"
    ) as caught:
        made.train()
    assert caught.value.__cause__ is full
    left = [path.name for path in checkpoint.checkpoints(tmp_path / "run")]
    assert left == ["checkpoint-1"]
    checkpoint.verify(tmp_path / "run" / "checkpoint-1")
    assert not (tmp_path / "run" / checkpoint.STAGING).exists()  # gives its space back
    monkeypatch.undo()
    resumed = tiny.run(tmp_path / "run", max_steps=3, resume=True, **settings)
    expected = tiny.parameters(whole)
    assert all(torch.equal(expected[n], value) for n, value in tiny.parameters(resumed).items())
