"""Exact match, F1 and searches of a model on held-out questions, by hops.

    python -m recipes.search.by_hops runs/search-warm-start [--show 3]

Each transcript is sampled turn by turn at temperature 1: what the policy writes, what the search
returns. It ends with a turn that calls nothing, a call that cannot be read, or a call beyond the limit.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    set_seed,
)

from rollouts.agents.search import SearchError
from rollouts.rewards.text import exact_answer, f1

from .expert import LEVELS, MOST_CALLS, search_tool
from .task import problems, world_index


@dataclass(slots=True)
class Transcript:
    """One attempt at a question."""

    row: dict[str, Any]
    ids: list[int]
    calls: int = 0
    last: str = ""
    """What the policy wrote last."""
    is_open: bool = True


def transcripts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    search: Callable[[str], str],
    *,
    most_calls: int = MOST_CALLS,
    most_tokens: int = 16,
    batch_size: int = 64,
) -> list[Transcript]:
    """One transcript for each row.

    Args:
        model: the policy.
        tokenizer: its tokenizer, with chat template and response template.
        rows: questions.
        search: the tool.
        most_calls: of a transcript.
        most_tokens: of a turn.
        batch_size: transcripts decoded together.
    """
    begun = [
        Transcript(
            row,
            tokenizer(
                tokenizer.apply_chat_template(
                    row["prompt"], tools=[search], add_generation_prompt=True, tokenize=False
                ),
                add_special_tokens=False,
            )["input_ids"],
        )
        for row in rows
    ]
    while live := [each for each in begun if each.is_open]:
        for start in range(0, len(live), batch_size):
            part = live[start : start + batch_size]
            for each, new in zip(part, _turns(model, tokenizer, part, most_tokens), strict=True):
                each.ids += new
                each.last = str(tokenizer.decode(new, skip_special_tokens=True))
                query = _query(tokenizer, str(tokenizer.decode(new)))
                if query is None or each.calls == most_calls:
                    each.is_open = False
                    continue
                each.calls += 1
                try:
                    said = search(query)
                except SearchError as error:
                    said = f" {error}"
                message = [{"role": "tool", "name": "search", "content": said}]
                text = tokenizer.apply_chat_template(
                    message, add_generation_prompt=True, tokenize=False
                )
                each.ids += tokenizer(text, add_special_tokens=False)["input_ids"]
    return begun


@torch.no_grad()
def _turns(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    part: list[Transcript],
    most_tokens: int,
) -> list[list[int]]:
    longest = max(len(each.ids) for each in part)
    padded = [[tokenizer.pad_token_id] * (longest - len(each.ids)) + each.ids for each in part]
    mask = [[0] * (longest - len(each.ids)) + [1] * len(each.ids) for each in part]
    tokens = model.generate(
        input_ids=torch.tensor(padded),
        attention_mask=torch.tensor(mask),
        do_sample=True,
        top_k=0,
        max_new_tokens=most_tokens,
    )
    written = []
    for new in tokens[:, longest:].tolist():
        end = new.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in new else len(new)
        written.append(new[:end])
    return written


def _query(tokenizer: PreTrainedTokenizerBase, text: str) -> str | None:
    """The query of the first call; None if there is none that can be read."""
    try:
        calls = tokenizer.parse_response(text, prefix="<|assistant|>").get("tool_calls") or []
        query = calls[0]["function"]["arguments"]["query"]
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    return query if isinstance(query, str) else None


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", help="folder of a model")
    parser.add_argument("--validation", type=int, default=28, help="questions of each level")
    parser.add_argument("--samples", type=int, default=4, help="transcripts of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--world", type=Path, default=Path("runs/search-world"))
    parser.add_argument("--show", type=int, default=0, help="transcripts to print")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(given.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(given.folder)
    search = search_tool(world_index(0, given.world))
    _, rows = problems(0, train=1, validation=given.validation)
    set_seed(given.seed)
    done = transcripts(model, tokenizer, [r for r in rows for _ in range(given.samples)], search)
    print("| level | exact | F1 | calls: share, exact |")
    print("|---|---|---|---|")
    for level in LEVELS:
        part = [each for each in done if each.row["level"] == level.name]
        answers = [each.row["answer"] for each in part]
        exact = exact_answer(completions=[each.last for each in part], answer=answers)
        overlap = f1(completions=[each.last for each in part], answer=answers)
        by_calls = Counter(each.calls for each in part)
        right = Counter(each.calls for each, e in zip(part, exact, strict=True) if e)
        shown = ", ".join(
            f"{calls}: {number / len(part):.2f}, {right[calls] / number:.2f}"
            for calls, number in sorted(by_calls.items())
        )
        print(f"| {level.name} | {_mean(exact):.2f} | {_mean(overlap):.2f} | {shown} |")
    for each in done[:: max(1, len(done) // given.show)][: given.show] if given.show else []:
        print(f"\n{tokenizer.decode(each.ids)}\n    answer: {each.row['answer']}")


def _mean(values: list[float | None]) -> float:
    return sum(value or 0.0 for value in values) / len(values)


if __name__ == "__main__":
    main()
