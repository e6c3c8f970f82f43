"""The embedded task: problems, worked solutions, tokenizer, warm start."""

import json

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.arithmetic import task as arithmetic
from recipes.arithmetic.tasks import (
    LARGEST_MISS,
    LEVELS,
    problems,
    verifier_reward,
    warm_start_rows,
    worked_solution,
)
from recipes.arithmetic.words import build_tokenizer
from recipes.tiny_model import build_model
from samplers.keys import step_generator


@pytest.fixture(scope="module")
def rows():
    return problems(0, train=30, validation=20)


@pytest.fixture(scope="module")
def solutions(rows):
    return warm_start_rows(0, size=6000, held_out=rows[1], seed=3)


def reward(completion, row):
    (score,) = verifier_reward(completions=[completion], task=[row["task"]], entry=[row["entry"]])
    return score


def generator(seed=0):
    return step_generator(seed, "test", 0)


@pytest.mark.slow
def test_prompts_are_distinct_and_held_out_ones_occur_nowhere_else(rows, solutions):
    train, validation = ([row["prompt"] for row in part] for part in rows)
    assert len(set(train)) == 30 * len(LEVELS)
    assert len(set(validation)) == 20 * len(LEVELS)
    assert not set(train) & set(validation)
    assert not {row["prompt"] for row in solutions} & set(validation)


def test_every_level_has_its_share_of_the_prompts(rows):
    for part, count in zip(rows, (30, 20), strict=True):
        names = [row["level"] for row in part]
        assert {level.name: count for level in LEVELS} == {n: names.count(n) for n in names}


def test_the_validation_prompts_do_not_depend_on_how_many_train(rows):
    assert problems(0, train=3, validation=20)[1] == rows[1]


@pytest.mark.slow
def test_the_same_seed_draws_the_same_and_another_seed_draws_others(rows, solutions):
    assert problems(0, train=30, validation=20) == rows
    assert warm_start_rows(0, size=6000, held_out=rows[1], seed=3) == solutions
    other = problems(1, train=30, validation=20)
    shared = {r["prompt"] for r in other[0]} & {r["prompt"] for r in rows[0]}
    # Only the two smallest levels can meet again: 200 sums of two terms, short words.
    assert len(shared) < 30
    assert warm_start_rows(0, size=6000, held_out=rows[1], seed=4) != solutions


def test_the_verifier_accepts_every_clean_solution_and_no_wrong_answer(rows):
    for part in rows:
        for row in part:
            clean = worked_solution(json.loads(row["entry"]), 0.0, generator=generator())
            assert clean.corrupted == 0
            assert reward(clean.text, row) == 1.0
            assert reward(clean.text.replace("</answer>", "7</answer>"), row) == 0.0


def test_partial_credit_is_no_success():
    entry = {
        "question": "Spell this word backward (example: sun -> nus): bell",
        "answer": "lleb",
        "metadata": {"source_dataset": "spell_backward", "word": "bell"},
    }
    row = {"task": "spell_backward", "entry": json.dumps(entry)}
    assert reward("<answer>lleb</answer>", row) == 1.0
    assert reward("<answer>lleB</answer>", row) == 1.0  # the verifier ignores case
    assert reward("<answer>llbe</answer>", row) == 0.0
    assert reward("<answer>lleb", row) == 0.0


@pytest.mark.slow
def test_steps_go_wrong_as_often_as_declared(solutions):
    for level in LEVELS:
        rows = [row for row in solutions if row["level"] == level.name]
        assert len(rows) == round(6000 * level.warm_start_share)
        if not rows:
            continue
        steps = sum(row["steps"] for row in rows)
        share = sum(row["corrupted"] for row in rows) / steps
        standard_error = (level.corruption * (1 - level.corruption) / steps) ** 0.5
        assert abs(share - level.corruption) < 4 * standard_error, level.name


def test_the_shares_of_the_warm_start_add_up():
    assert sum(level.warm_start_share for level in LEVELS) == pytest.approx(1.0, abs=1e-12)


def test_a_chain_is_computed_from_left_to_right_and_goes_on_from_an_estimate():
    entry = {"metadata": {"source_dataset": "chain_sum", "expression": "4 - 1 - 7"}}
    clean = worked_solution(entry, 0.0, generator=generator())
    assert (clean.text, clean.steps) == ("4-1=3-7=<answer>-4</answer>", 2)
    misses = set()
    for seed in range(60):
        estimated = worked_solution(entry, 1.0, generator=generator(seed))
        assert estimated.corrupted == 2
        start, rest = estimated.text.removesuffix("</answer>").split("-7~<answer>")
        value = int(start.removeprefix("4-1~"))
        misses |= {value - 3, int(rest) - (value - 7)}
    assert misses == {m for m in range(-LARGEST_MISS, LARGEST_MISS + 1) if m}


def test_a_spelled_letter_is_lost_doubled_or_swapped():
    entry = {"metadata": {"source_dataset": "spell_backward", "word": "abc"}}
    assert worked_solution(entry, 0.0, generator=generator()).text == "<answer>cba</answer>"

    class FirstLetterGoesWrong:
        def __init__(self, kind):
            self.kind, self.draws = kind, iter([0.0, 0.9, 0.9])

        def random(self):
            return next(self.draws)

        def integers(self, high):
            return self.kind

    texts = [worked_solution(entry, 0.5, generator=FirstLetterGoesWrong(k)) for k in range(3)]
    assert [t.text for t in texts] == [
        "<answer>ba</answer>",
        "<answer>ccba</answer>",
        "<answer>bca</answer>",
    ]
    assert [(t.steps, t.corrupted) for t in texts] == [(3, 1), (3, 1), (2, 1)]


def test_too_few_problems_are_refused_with_the_numbers():
    with pytest.raises(
        ValueError, match=r"2 terms' has 200 distinct problems, fewer than 20 \+ 190"
    ):
        problems(0, train=190, validation=20)
    with pytest.raises(
        ValueError, match="worked solutions of chain_sum and spell_backward, not of"
    ):
        worked_solution({"metadata": {"source_dataset": "gcd"}}, 0.0, generator=generator())


@pytest.mark.slow
def test_the_tokenizer_gives_every_text_back(rows, solutions):
    tokenizer = build_tokenizer()
    texts = [row["prompt"] + row["completion"] for row in solutions]
    texts += [row["prompt"] for part in rows for row in part]
    ids = tokenizer(texts)["input_ids"]
    assert tokenizer.batch_decode(ids) == texts
    assert tokenizer.unk_token_id not in set(np.concatenate(ids).tolist())
    assert max(map(len, ids)) <= 48


@pytest.mark.slow
def test_a_prompt_and_its_completion_are_tokenized_apart_as_together(solutions):
    tokenizer = build_tokenizer()
    for row in solutions:
        apart = tokenizer(row["prompt"])["input_ids"] + tokenizer(row["completion"])["input_ids"]
        assert tokenizer(row["prompt"] + row["completion"])["input_ids"] == apart


def test_tokens_by_hand():
    tokenizer = build_tokenizer()
    tokens = tokenizer.convert_ids_to_tokens(
        tokenizer("4 - 12 =4-12=<answer>-8</answer>").input_ids
    )
    assert tokens == [
        "4",
        " - ",
        "12",
        " =",
        "4",
        "-",
        "12",
        "=",
        "<answer>",
        "-",
        "8",
        "</answer>",
    ]
    assert tokenizer("é").input_ids == [tokenizer.unk_token_id]
    messages = [{"role": "user", "content": "4 - 1 ="}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "4 - 1 ="


@pytest.mark.slow
def test_the_warm_start_is_an_ordinary_checkpoint(tmp_path):
    folder, train, validation, rewards = arithmetic.prepare(
        {
            "folder": str(tmp_path / "model"),
            "train": 2,
            "validation": 2,
            "warm_start": {
                "steps": 2,
                "rows": 40,
                "batch_size": 4,
                "hidden_size": 16,
                "num_layers": 1,
                "num_heads": 2,
            },
        },
        seed=0,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.model_type == "qwen3"
    assert tokenizer.pad_token_id == model.config.pad_token_id
    prompt = train[0]["prompt"]
    assert tokenizer.decode(tokenizer(prompt)["input_ids"]) == prompt
    assert tokenizer.chat_template
    untrained = build_model(build_tokenizer(), seed=0, hidden_size=16, num_layers=1, num_heads=2)
    moved = model.model.embed_tokens.weight - untrained.model.embed_tokens.weight
    assert 0 < moved.abs().max() < 0.1
    assert {p.suffix for p in folder.iterdir()} <= {".json", ".safetensors", ".jinja"}
    assert len(validation) == 2 * len(LEVELS) and rewards == [verifier_reward]


def test_unknown_settings_of_the_task_are_refused():
    with pytest.raises(ValueError, match="task_settings has no 'trian'. Did you mean 'train'"):
        arithmetic.prepare({"trian": 3}, seed=0)
    with pytest.raises(ValueError, match="warm_start has no 'step'. Did you mean 'steps'"):
        arithmetic.prepare({"warm_start": {"step": 3}}, seed=0)
    with pytest.raises(ValueError, match="write validation in task_settings itself"):
        arithmetic.prepare({"warm_start": {"validation": 3}}, seed=0)
