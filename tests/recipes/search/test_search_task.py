import json
from collections import Counter

import numpy as np
import pytest
import torch
import trl
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.chat_template_utils import is_chat_template_prefix_preserving, supports_tool_calling

from recipes.search.by_hops import transcripts
from recipes.search.expert import LEVELS, MOST_CALLS, demonstrate, demonstrations, search_tool
from recipes.search.task import TASK, problems, world_index
from recipes.search.words import RESPONSE_TEMPLATE, build_tokenizer, words
from recipes.search.world import draw
from recipes.warm_start import WarmStart, warm_start

TOOLS = [search_tool(None)]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def rows():
    return demonstrations(0, size=300, held_out=[], seed=0, worlds=1)


def calls_of(row):
    return [
        call["function"]["arguments"]["query"]
        for message in row["messages"]
        for call in message.get("tool_calls", [])
    ]


@pytest.mark.slow
def test_every_text_of_the_world_is_given_back_and_known(tokenizer):
    world = draw(0)
    texts = [f" {passage['text']}" for passage in world.passages]
    texts += [f" {question.text}" for question in world.train + world.validation]
    for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    assert len(set(words())) == len(words())


def test_a_name_is_the_same_tokens_wherever_it_stands(tokenizer):
    name = tokenizer(" Mira Tolen")["input_ids"]
    assert len(name) == 2
    call = json.dumps({"name": "search", "arguments": {"query": " Mira Tolen born"}})
    for text in (f"<tool_call>{call}</tool_call>", "<answer> Mira Tolen</answer>"):
        ids = tokenizer(text)["input_ids"]
        assert any(ids[start : start + 2] == name for start in range(len(ids)))
    assert len(tokenizer(f"<tool_call>{call}</tool_call>")["input_ids"]) == 7


def test_an_unknown_word_is_one_token(tokenizer):
    ids = tokenizer(" the query's wörd was 3,000 characters <long> { } ")["input_ids"]
    assert ids.count(tokenizer.unk_token_id) > 3
    assert len(ids) < 20


def test_the_template_does_what_tool_calling_needs(tokenizer):
    assert supports_tool_calling(tokenizer)
    assert is_chat_template_prefix_preserving(tokenizer)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who?"}],
        tools=TOOLS,
        add_generation_prompt=True,
        tokenize=False,
    )
    assert text == "<tools> search</tools><|user|> Who?<|assistant|>"


def test_what_the_policy_writes_is_parsed_back(tokenizer, rows):
    row = next(row for row in rows if calls_of(row))
    for message in row["messages"]:
        if message["role"] == "assistant":
            prefix = "<|assistant|>"
            text = tokenizer.apply_chat_template([message], tokenize=False).removeprefix(prefix)
            parsed = tokenizer.parse_response(text, prefix=prefix)
            assert parsed.get("content", "") == message["content"]
            assert parsed.get("tool_calls") == message.get("tool_calls")


def test_a_row_is_the_whole_template_and_trains_what_the_policy_writes(tokenizer, rows):
    for row in rows[:50]:
        whole = tokenizer.apply_chat_template(row["messages"], tools=TOOLS, return_dict=False)
        assert row["input_ids"] == whole
        assert len(whole) <= tokenizer.model_max_length
        mask = np.array(row["completion_mask"], dtype=bool)
        written = tokenizer.decode(np.array(whole)[mask])
        own = [m for m in row["messages"] if m["role"] == "assistant"]
        expected = tokenizer.apply_chat_template(own, tokenize=False)
        assert written == expected.replace("<|assistant|>", "")


def test_demonstrations_vary(rows):
    # 300 rows. Zero calls have probability .15: fewer than 20 are 4 standard deviations below 45.
    number = Counter(len(calls_of(row)) for row in rows)
    assert set(number) == set(range(MOST_CALLS + 1))
    assert 20 <= number[0] <= 75
    assert Counter(row["level"] for row in rows) == {"1 hop": 120, "2 hops": 105, "3 hops": 75}
    per_question = Counter(row["messages"][0]["content"] for row in rows)
    assert max(per_question.values()) < 10


class Fixed:
    """A generator whose every draw is the same."""

    def __init__(self, value):
        self.value = value

    def random(self):
        return self.value

    def integers(self, high):
        return 0


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_without_noise_as_many_searches_as_hops_give_the_answer(level, tmp_path):
    world, index = draw(0), world_index(0, tmp_path)
    for question in [q for q in world.train if q.hops == level.hops][:20]:
        messages = demonstrate(
            question, level, search_tool(index), world.names, generator=Fixed(0.999)
        )
        assert len(calls_of({"messages": messages})) == level.hops
        assert messages[-1]["content"] == f"<answer> {question.answer}</answer>"
        guess = demonstrate(question, level, search_tool(index), world.names, generator=Fixed(0.0))
        assert [message["role"] for message in guess] == ["user", "assistant"]


def test_a_right_answer_was_read_or_guessed(rows):
    right = 0
    for row in rows:
        answer = row["messages"][-1]["content"].removeprefix("<answer> ").removesuffix("</answer>")
        read = [message["content"] for message in row["messages"] if message["role"] == "tool"]
        right += any(answer in text for text in read)
    assert 0.5 < right / len(rows) < 0.9


@pytest.mark.slow
def test_problems_are_as_many_of_each_level_and_apart():
    train, validation = problems(0, train=10, validation=5)
    assert Counter(row["level"] for row in train) == {level.name: 10 for level in LEVELS}
    assert Counter(row["hops"] for row in validation) == {1: 5, 2: 5, 3: 5}
    assert problems(0, train=3, validation=5)[1] == validation
    assert not {row["prompt"][0]["content"] for row in train} & {
        row["prompt"][0]["content"] for row in validation
    }
    with pytest.raises(ValueError, match="validation must be from 1 to .*, the questions of 1 hop"):
        problems(0, train=1, validation=10_000)


class Scripted:
    """A policy that writes the texts it is given, one per turn, for every transcript."""

    def __init__(self, tokenizer, texts):
        self.tokenizer, self.texts, self.read = tokenizer, list(texts), []

    def generate(self, input_ids, attention_mask, **settings):
        self.read.append(self.tokenizer.decode(input_ids[0][attention_mask[0].bool()]))
        new = torch.tensor(self.tokenizer(self.texts.pop(0))["input_ids"])
        return torch.cat([input_ids, new.expand(len(input_ids), -1)], dim=1)


def call(query):
    function = json.dumps({"name": "search", "arguments": {"query": query}})
    return f"<tool_call>{function}</tool_call><eos>"


def test_a_transcript_is_what_the_policy_wrote_and_what_the_search_returned(tokenizer):
    def search(query: str) -> str:
        """Search.

        Args:
            query: Words.
        """
        return " Mira Tolen was taught by Ivo Hale." if "taught" in query else ""

    row = {"prompt": [{"role": "user", "content": "Who taught Mira Tolen?"}], "answer": "Ivo Hale"}
    policy = Scripted(tokenizer, [call(" Mira Tolen taught"), "<answer> Ivo Hale</answer><eos>"])
    (done,) = transcripts(policy, tokenizer, [row], search)
    assert (done.calls, done.last) == (1, "<answer> Ivo Hale</answer>")
    assert tokenizer.decode(done.ids) == policy.read[1] + "<answer> Ivo Hale</answer><eos>"
    assert policy.read[1].endswith("<|tool|> Mira Tolen was taught by Ivo Hale.<|assistant|>")
    # A call that cannot be read ends a transcript, and so does one beyond the limit.
    (done,) = transcripts(Scripted(tokenizer, ["<tool_call> born<eos>"]), tokenizer, [row], search)
    assert done.calls == 0
    policy = Scripted(tokenizer, [call(" born")] * 3)
    (done,) = transcripts(policy, tokenizer, [row], search, most_calls=2)
    assert done.calls == 2 and not policy.texts


@pytest.mark.slow
def test_the_warm_start_learns_what_the_policy_writes_and_nothing_else(tmp_path, monkeypatch):
    seen = []
    train = trl.SFTTrainer.train
    monkeypatch.setattr(
        trl.SFTTrainer, "train", lambda self: seen.extend(self.train_dataset) or train(self)
    )
    settings = WarmStart(rows=40, steps=2, batch_size=4, hidden_size=16, num_layers=1)
    folder = warm_start(TASK, tmp_path / "model", settings, quiet=True)
    expected = demonstrations(0, size=40, held_out=[], seed=0)
    assert len(seen) == 40
    for row, made in zip(seen, expected, strict=True):
        assert row["input_ids"] == made["input_ids"]
        learnt = [
            token if bit else -100
            for token, bit in zip(made["input_ids"], made["completion_mask"], strict=True)
        ]
        assert row["labels"] == learnt
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.response_template == RESPONSE_TEMPLATE
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == len(tokenizer)
