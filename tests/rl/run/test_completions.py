"""Tables of completions: whose rollouts they show, what they say of each, and where they go."""

import pandas
import pytest
from transformers.utils import logging

from rl.run import completions
from rl.stages.records import Batch
from tests import tiny


@pytest.mark.slow
def test_a_table_shows_several_prompts_with_answers_rewards_and_advantages(tmp_path):
    made = tiny.run(
        tmp_path,
        reward=[tiny.small_digit, tiny.first_digit],
        reward_weights=[0.5, 0.5],
        trainer="grpo",
        allocator="uniform",
        max_steps=4,
        completions_every=2,
        completions_rows=8,
    )
    files = sorted((tmp_path / "completions").iterdir())
    assert [path.name for path in files] == ["step-000002.parquet", "step-000004.parquet"]
    table = pandas.read_parquet(files[0])
    assert len(table) == 8 and set(table["step"]) == {2}
    assert table["prompt_key"].value_counts().tolist() == [4, 4]
    prompts = {prompt.key: prompt for prompt in made.prompts}
    for row in table.to_dict("records"):
        prompt = prompts[row["prompt_key"]]
        assert (row["prompt"], row["answer"]) == (prompt.prompt, prompt.columns["answer"])
        text = row["completion"].replace(" ", "")
        small, first = float(text[:1] in tuple("0123")), float(text[:1] == prompt.columns["answer"])
        assert (row["reward/small_digit"], row["reward/first_digit"]) == (small, first)
        assert row["reward"] == (small + first) / 2
        assert 1 <= row["tokens"] <= 5
        assert row["truncated"] in (True, False)
    for _, group in table.groupby("prompt_key"):
        known = group.dropna(subset="advantage")
        order = known.sort_values("reward")["advantage"]
        assert order.is_monotonic_increasing
    assert table["advantage"].notna().any()


@pytest.mark.slow
def test_a_validation_leaves_a_table_of_its_greedy_completions(tmp_path):
    def run(name, **settings):
        made = tiny.run(
            tmp_path / name,
            reward=tiny.small_digit,
            data=tiny.rows("ab"),
            eval_dataset=tiny.rows("c"),
            eval_strategy="steps",
            eval_steps=2,
            max_steps=2,
            **settings,
        )
        return made, tmp_path / name / "validation"

    made, folder = run("with", completions_every=2)
    assert [path.name for path in folder.iterdir()] == ["step-000002.parquet"]
    table = pandas.read_parquet(folder / "step-000002.parquet").to_dict("records")
    prompts = made.eval_prompts
    assert [row["prompt_key"] for row in table] == [prompt.key for prompt in prompts]
    assert [row["prompt"] for row in table] == [prompt.prompt for prompt in prompts]
    for row in table:
        assert row["step"] == 2
        assert row["reward"] == tiny.small_digit([row["completion"]])[0]
    accuracy = tiny.lines(tmp_path / "with", "metrics.jsonl")
    (greedy,) = (r["eval_greedy_accuracy"] for r in accuracy if "eval_greedy_accuracy" in r)
    assert greedy == sum(row["reward"] for row in table) / len(table)
    _, folder = run("without", completions_every=0)
    assert not folder.exists()


def batch_of(folder, **settings) -> Batch:
    made = tiny.trainer(
        folder, reward=tiny.small_digit, trainer="grpo", allocator="uniform", **settings
    )
    return tiny.collect(made, version=0)


def test_advantages_are_those_of_the_rows_that_train(tmp_path):
    batch = batch_of(tmp_path)
    table = completions.table_of(batch, rows=36, step=1)
    assert len(table) == 36
    shown = [row["advantage"] for row in table if row["advantage"] is not None]
    assert sorted(shown) == pytest.approx(sorted(batch.rollouts.advantage_N.tolist()))
    mixed = {batch.prompts[p].key for p in batch.rollouts.prompt_N.tolist()}
    assert {row["prompt_key"] for row in table if row["advantage"] is not None} == mixed


@pytest.mark.parametrize(("rows", "prompts"), [(1, 1), (3, 1), (8, 2), (24, 6), (30, 6)])
def test_rows_are_spread_over_the_prompts_of_a_step(tmp_path, rows, prompts):
    table = completions.table_of(batch_of(tmp_path), rows=rows, step=1)
    assert len(table) == rows
    assert len({row["prompt_key"] for row in table}) == prompts


def test_chat_is_shown_as_text():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+3?"}]
    assert completions.text_of(messages) == "system: Be brief.\nuser: 2+3?"
    assert completions.text_of("2+3=") == "2+3="


def test_a_tracker_without_tables_is_named_in_a_warning(monkeypatch):
    said = []
    monkeypatch.setattr(completions.logger, "warning_once", said.append)
    table = [{"completion": "a | b\nc", "reward": 1.0}]
    completions.track(table, step=1, report_to=["comet_ml"], callbacks=[])
    assert said == [
        "tables of completions are not sent to comet_ml: they are in the run folder, as "
        "completions/*.parquet"
    ]
    assert logging.get_logger("rl.run.completions") is completions.logger


def test_cells_of_a_text_table_keep_their_bars_and_lines():
    text = completions._markdown(["completion", "reward"], [["a | b\nc", 1.0]])
    assert text == "| completion | reward |\n| --- | --- |\n| a \\| b<br>c | 1.0 |"
