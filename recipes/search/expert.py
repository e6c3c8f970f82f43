"""Demonstrations for the warm start: a scripted searcher that errs on purpose.

Reinforcement learning has nothing to find in transcripts that are all alike and all right. So the
searcher asks up to `MOST_CALLS` times, from not at all to more than it needs. It blurs queries, stops
early and answers wrongly, each with a declared probability. (All probabilities: project default.)
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast
from transformers.utils import get_json_schema

from rollouts.agents.search import Retriever, SearchIndex
from samplers.keys import stable_hash, step_generator

from .words import build_tokenizer
from .world import RELATIONS, Fact, Question, Size, draw, smaller

Row = dict[str, Any]
Message = dict[str, Any]

MOST_CALLS = 4
"""Searches of a demonstration, at most."""
PASSAGES = 2
"""Passages that a search of this task returns."""


@dataclass(frozen=True, slots=True)
class Level:
    """Questions of so many hops."""

    hops: int
    warm_start_share: float
    """Share of the warm start's rows."""
    guess: float = 0.15
    """Probability that a demonstration answers without any search."""
    stop: float = 0.15
    """Probability, before each further search, that it answers instead."""
    repeat: float = 0.12
    """Probability that it asks for what it has just found again."""
    blur: float = 0.2
    """Probability that a query lacks the word that finds the fact, or has that of another fact."""
    retry: float = 0.6
    """Probability that it asks again where a query did not find the fact; else it answers."""

    @property
    def name(self) -> str:
        return "1 hop" if self.hops == 1 else f"{self.hops} hops"


LEVELS = (Level(1, 0.4), Level(2, 0.35), Level(3, 0.25))
"""The shares add up to 1."""


def search_tool(retriever: Retriever) -> Callable[[str], str]:
    """The tool of this task: the texts of the best passages, one after the other."""

    def search(query: str) -> str:
        """Search the corpus and return the best matching passages.

        Args:
            query: The words to search for.
        """
        return "".join(f" {passage['text']}" for passage in retriever.search(query, PASSAGES))

    return search


def demonstrate(
    question: Question,
    level: Level,
    search: Callable[[str], str],
    names: dict[str, list[str]],
    *,
    generator: np.random.Generator,
) -> list[Message]:
    """Messages of one transcript: the question, calls and what they returned, and an answer.

    Args:
        question: what is asked.
        level: probabilities of what goes wrong.
        search: the tool.
        names: of each kind of thing, to guess from.
        generator: of everything random.
    """
    messages: list[Message] = [{"role": "user", "content": question.text}]
    calls = 0

    def ask(query: str) -> str:
        nonlocal calls
        calls += 1
        function = {"name": "search", "arguments": {"query": f" {query}"}}
        call = {"type": "function", "function": function}
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        messages.append({"role": "tool", "name": "search", "content": search(query)})
        return messages[-1]["content"]

    def chance(probability: float) -> bool:
        return bool(generator.random() < probability)

    found, seen = 0, ""
    if not chance(level.guess):
        while found < question.hops and calls < MOST_CALLS:
            fact = question.chain[found]
            query = _blurred(fact, generator) if chance(level.blur) else fact.query
            seen = ask(query)
            if _statement(fact) in seen:
                found += 1
                if calls < MOST_CALLS and chance(level.repeat):
                    ask(fact.query)
                if found < question.hops and chance(level.stop):
                    break
            elif not chance(level.retry):
                break
    if found == question.hops:
        answer = question.answer
    else:
        kind = RELATIONS[question.chain[-1].relation].object
        near = [name for name in names[kind] if name in seen and name not in question.text]
        guesses = near or names[kind]
        answer = guesses[generator.integers(len(guesses))]
    messages.append({"role": "assistant", "content": f"<answer> {answer}</answer>"})
    return messages


def _blurred(fact: Fact, generator: np.random.Generator) -> str:
    others = ["", *(rule.asked for rule in RELATIONS.values())]
    others.remove(RELATIONS[fact.relation].asked)
    return f"{fact.subject} {others[generator.integers(len(others))]}".strip()


def _statement(fact: Fact) -> str:
    return RELATIONS[fact.relation].passage.format(s=fact.subject, o=fact.object)


def token_row(messages: list[Message], tokenizer: PreTrainedTokenizerFast, tools: list[Any]) -> Row:
    """Token ids of a transcript, and 1 where the policy wrote the token."""
    ids: list[int] = []
    mask: list[int] = []
    for number, message in enumerate(messages):
        written = message["role"] == "assistant"
        text = str(
            tokenizer.apply_chat_template(
                [message],
                tools=tools if number == 0 else None,
                add_generation_prompt=not written,
                tokenize=False,
            )
        )
        text = text.removeprefix("<|assistant|>") if written else text  # the message before has it
        new = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += new
        mask += [int(written)] * len(new)
    return {"input_ids": ids, "completion_mask": mask}


def demonstrations(
    data_seed: int, *, size: int, held_out: list[Row], seed: int, worlds: int = 30
) -> list[Row]:
    """Transcripts for supervised training, in worlds of their own.

    The worlds share words with the one of the rollouts, but facts are drawn anew in each. So a fact
    cannot be learnt by heart, and none of a held-out question's is told.

    Args:
        data_seed: of the worlds.
        size: rows, over all levels; each level gets its share, rounded.
        held_out: validation rows; they are in another world, so there is nothing to leave out.
        seed: of what goes wrong.
        worlds: how many worlds, at most; each has 100 rows or more.

    Returns:
        Rows with `input_ids` and `completion_mask`, and `messages` and `level` for a reader.
    """
    del held_out
    tokenizer = build_tokenizer()
    generator = step_generator(seed, "demonstrations of the search task", 0)
    rows: list[Row] = []
    worlds = max(1, min(worlds, size // 100))
    with tempfile.TemporaryDirectory() as folder:
        for number in range(worlds):
            share = size * (number + 1) // worlds - size * number // worlds
            rows += _in_one_world(
                stable_hash(data_seed, "warm start of the search task", number) % 2**40,
                share,
                Path(folder) / str(number),
                tokenizer,
                generator,
            )
    return rows


def _in_one_world(
    seed: int,
    size: int,
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    generator: np.random.Generator,
) -> Iterator[Row]:
    world = draw(seed, train=smaller(Size(), 0.4), validation=Size(0, 0, 0, 0))
    corpus = world.write(folder / "corpus.jsonl")
    index = SearchIndex.build(corpus, folder / "index.sqlite", quiet=True)
    search = functools.cache(search_tool(index))
    tools = [get_json_schema(search_tool(index))]
    edges = np.cumsum([level.warm_start_share for level in LEVELS])
    for row in range(size):
        level = LEVELS[int(np.searchsorted(edges, (row + 0.5) / size))]
        asked = [question for question in world.train if question.hops == level.hops]
        question = asked[generator.integers(len(asked))]
        messages = demonstrate(question, level, search, world.names, generator=generator)
        yield {**token_row(messages, tokenizer, tools), "messages": messages, "level": level.name}
