"""What users of TRL bring as rewards runs here: asynchronous ones, models, and what rewards report."""

import asyncio
import os

import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3ForSequenceClassification

from rl.run.end import NoSignalError
from rl.trainer import RolloutTrainer
from rollouts.prompts import Prompt
from rollouts.rewards.contract import RewardError, score
from tests import tiny

pytestmark = pytest.mark.slow  # whole runs


def judge(folder):
    """A folder with a reward model."""
    torch.manual_seed(1)
    config = tiny.model().config
    config.num_labels = 1
    Qwen3ForSequenceClassification(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def test_functions_coroutines_and_models_are_added_up_and_report_to_log_and_table(tmp_path):
    states, logged = [], []

    async def waits(completions, log_metric, **_):
        await asyncio.sleep(0.01)
        log_metric("reward", 7.0)  # a name that is taken
        return tiny.small_digit(completions)

    def reports(completions, trainer_state, log_extra, log_metric, **_):
        states.append((trainer_state.global_step, trainer_state.max_steps))
        lengths = [float(len(text)) for text in completions]
        log_extra("length", lengths)
        log_metric("judged/mean_length", sum(lengths) / len(lengths))
        logged.append(sum(lengths) / len(lengths))
        return [1.0] * len(completions)

    tiny.run(
        tmp_path / "run",
        reward=[waits, reports, judge(tmp_path / "judge")],
        reward_weights=[1.0, 0.5, 0.1],
        trainer="grpo",
        allocator="uniform",
        selector="uniform",
        max_steps=2,
        completions_every=1,
        eval_dataset=[{"prompt": "c0=", "answer": "0"}],
        data=tiny.rows("ab"),
        eval_strategy="steps",
        eval_steps=2,
    )
    assert states[0] == (0, 2)
    assert states[1] == (1, 2)
    logs = tiny.step_logs(tmp_path / "run")
    assert [log["judged/mean_length"] for log in logs] == pytest.approx(logged[:2])
    assert [log["logged/reward"] for log in logs] == [7.0, 7.0]
    for log in logs:
        of_each = [log[f"rewards/{name}/mean"] for name in ("waits", "reports", "judge")]
        assert log["reward"] == pytest.approx(of_each[0] + 0.5 + 0.1 * of_each[2], abs=1e-6)
    (validation,) = [
        row for row in tiny.lines(tmp_path / "run", "metrics.jsonl") if "eval_pass_rate" in row
    ]
    assert validation["eval_judged/mean_length"] == pytest.approx(logged[-1])
    table = pyarrow.parquet.read_table(
        tmp_path / "run" / "completions" / "step-000001.parquet"
    ).to_pylist()
    assert all(row["logged/length"] == len(row["completion"]) for row in table)
    assert {"reward/waits", "reward/reports", "reward/judge"} <= set(table[0])


def test_rows_to_which_nothing_applies_stand_apart_and_stop_nothing(tmp_path, caplog):
    def sometimes(completions, answer, **_):
        marks = tiny.small_digit(completions)
        return [None if digit in "01" else mark for digit, mark in zip(answer, marks, strict=True)]

    made = tiny.run(
        tmp_path,
        reward=sometimes,
        max_steps=4,
        selector="uniform",
        allocator="uniform",
        trainer="grpo",
        log_level="warning",
    )
    told = [r.getMessage() for r in caplog.records if "returned None" in r.getMessage()]
    assert len(told) == 1
    assert "filtered_unrewarded" in told[0]
    steps, logs = tiny.lines(tmp_path), tiny.step_logs(tmp_path)
    assert sum(step["unrewarded"] for step in steps) == 6 * 6  # six of the 24 prompts
    for step, log in zip(steps, logs, strict=True):
        assert step["failures"] == []
        assert log["ledger/rollouts_filtered_unrewarded"] == step["unrewarded"]
        assert log["ledger/rollouts_drawn"] == 36
    without = [i for i, prompt in enumerate(made.prompts) if prompt.columns["answer"] in "01"]
    posterior = made.planner.posterior
    observed_D = posterior.alpha_D + posterior.beta_D
    assert (observed_D[without] == 0).all()
    assert (observed_D > 0).sum() == 18


def none(completions, **_):
    return [None] * len(completions)


def raises(completions, **_):
    raise KeyError("down")


@pytest.mark.parametrize(("reward", "share"), [(none, 0.0), (raises, 1.0)])
def test_a_run_without_any_reward_is_not_called_solved_or_hopeless(tmp_path, reward, share):
    with pytest.raises(NoSignalError, match="no reward could be had in the last 2 steps") as told:
        tiny.run(tmp_path, reward=reward, max_failed_share=share, max_steps=5, max_empty_steps=2)
    assert "solved" not in str(told.value)


def test_a_buffer_accounts_for_rows_without_a_reward(tmp_path):
    def sometimes(completions, answer, **_):
        marks = tiny.small_digit(completions)
        return [None if digit in "01" else mark for digit, mark in zip(answer, marks, strict=True)]

    tiny.run(tmp_path, reward=sometimes, max_steps=2, refill=True, allocator="uniform")
    assert len(tiny.lines(tmp_path)) == 2  # the ledger closes every step


def test_an_exit_in_a_reward_stops_the_run_with_an_error_and_a_checkpoint(tmp_path):
    calls = []

    def runs_code(completions, **_):
        calls.append(1)
        if len(calls) >= 3:
            exec("exit()")
        return tiny.small_digit(completions)

    with pytest.raises(RewardError, match="reward function runs_code: raised SystemExit") as told:
        tiny.run(tmp_path, reward=runs_code, max_steps=6, save_strategy="steps", save_steps=100)
    assert told.value.on_all_ranks
    assert [name for name in os.listdir(tmp_path) if name.startswith("checkpoint")] == [
        "checkpoint-2"
    ]


def cleaning_tokenizer():
    """A tokenizer that would clean " !" up to "!", as Llama 3's says of itself."""
    words = ["<pad>", "<eos>", "0", "1", "2", "3", " !", " =", " .", " ,", "a", "b", " y", "="]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return words, PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=True,
    )


@pytest.mark.parametrize("skip", [True, False])
def test_rewards_read_what_was_generated_to_the_space(tmp_path, skip):
    words, tokenizer = cleaning_tokenizer()
    seen = []

    def reward(completions, completion_ids, **_):
        seen.extend(zip(completions, completion_ids, strict=True))
        return [float(i % 2) for i in range(len(completions))]

    config = tiny.config(
        tmp_path, trainer="grpo", allocator="uniform", max_steps=1, skip_special_tokens=skip
    )
    rows = [{"prompt": f"{x}{d}="} for x in "ab" for d in "0123"]
    RolloutTrainer(tiny.model(), reward, config, rows, processing_class=tokenizer).train()
    assert any(1 in ids for _, ids in seen)
    assert any(" " in text for text, _ in seen)
    for text, ids in seen:
        assert text == "".join(words[i] for i in ids if i > 1 or not skip)


def test_what_a_reward_does_to_messages_is_not_seen_by_others(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    lengths = []

    def completes(completions, prompts, **_):
        for messages, completion in zip(prompts, completions, strict=True):
            messages.append(completion[0])
            lengths.append(len(messages))
        return [float("0" in completion[0]["content"]) for completion in completions]

    config = tiny.config(tmp_path, max_steps=2, prompts_per_step=8, trainer="grpo")
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in tiny.rows("a")]
    RolloutTrainer(tiny.model(), completes, config, rows, processing_class=tokenizer).train()
    assert set(lengths) == {2}


def test_rewards_of_trl_run_as_they_are():
    rewards = pytest.importorskip("trl.rewards")
    pytest.importorskip("math_verify")
    messages = [{"role": "user", "content": "1/3?"}]
    asked = Prompt(key="k", prompt=messages, token_ids=(1,), columns={"solution": r"\frac{1}{3}"})
    texts = [r"<think>so</think>\boxed{\frac{1}{3}}", r"\boxed{\frac{1}{2}}", "<think>"]
    result = score(
        [
            rewards.think_format_reward,
            rewards.accuracy_reward,
            rewards.reasoning_accuracy_reward,
            rewards.get_cosine_scaled_reward(max_len=10),
            rewards.get_repetition_penalty_reward(),
            rewards.get_soft_overlong_punishment(10, 4),
        ],
        [asked] * 3,
        texts,
        [[1] * 8, [1, 2], [3]],
        timeout=60.0,
    )
    assert result.per_function["think_format_reward"] == [1.0, 0.0, 0.0]
    assert result.per_function["accuracy_reward"] == [1.0, 0.0, 0.0]
    assert result.per_function["reasoning_accuracy_reward"] == [1.0, 0.0, 0.0]
    assert result.per_function["soft_overlong_punishment_reward"] == [-0.5, 0.0, 0.0]
    assert {"solution", "gold_parsed", "answer_parsed"} <= set(result.columns)
