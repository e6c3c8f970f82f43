"""Question sets as they are published, brought into rows and a corpus to search.

    python -m recipes.search.real_data --source hotpot_train_v1.1.json --out data/hotpot
    python -m recipes.search.real_data --source nq.jsonl --corpus wiki-18.jsonl --out data/nq

writes `questions.jsonl` for `dataset_name` (with `prompt_column: question`), and `corpus.jsonl` with its
`index.sqlite` for `rollouts.agents.search.SearchIndex`. Layouts:

* hotpotqa: HotpotQA (Yang et al., 2018, arXiv:1809.09600), JSON or as on the hub
* 2wiki: 2WikiMultihopQA (Ho et al., 2020, arXiv:2011.01060), JSON; `--aliases id_aliases.json` adds
  other names of the answer
* musique: MuSiQue (Trivedi et al., 2022, arXiv:2108.00573), JSONL
* nq: Natural Questions (Kwiatkowski et al., 2019), simplified JSONL; questions with short answers only
* nq_open: NQ-open (Lee et al., 2019, arXiv:1906.00300), JSONL with `question` and `answer`
* dpr: NQ and others as DPR (Karpukhin et al., 2020, arXiv:2004.04906) publishes them, JSON
* flashrag: JSONL with `question` and `golden_answers`

Answers are compared by the rewards `exact_answer` and `f1` (SQuAD's rules), against each accepted one.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rollouts.agents.search import SearchIndex

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Found:
    """One question of a set."""

    question: str
    answers: list[str]
    """Accepted ones, the main one first; empty where the set has none for this question."""
    passages: list[tuple[str, str, bool]] = field(default_factory=list)
    """(title, text, whether it leads to the answer) of the passages that come with the question."""
    id: str | None = None
    hops: int | None = None
    answer_id: str | None = None
    """Wikidata's id of the answer, for aliases."""


def _hotpotqa(row: Row) -> Found:
    context, support = _loaded(row["context"]), _loaded(row["supporting_facts"])
    if isinstance(context, dict):  # as on the hub
        texts = context["sentences" if "sentences" in context else "content"]
        context = list(zip(context["title"], texts, strict=True))
    titles = support["title"] if isinstance(support, dict) else [fact[0] for fact in support]
    passages = [
        (str(title), " ".join(sentence.strip() for sentence in sentences), title in titles)
        for title, sentences in context
    ]
    identity = row.get("_id", row.get("id"))
    return Found(row["question"], [row["answer"]], passages, identity)


def _2wiki(row: Row) -> Found:
    found = _hotpotqa(row)
    return Found(
        found.question, found.answers, found.passages, found.id, answer_id=row.get("answer_id")
    )


def _musique(row: Row) -> Found:
    passages = [
        (part["title"], part["paragraph_text"], bool(part.get("is_supporting")))
        for part in row["paragraphs"]
    ]
    answers = [row["answer"], *row.get("answer_aliases", [])] if row.get("answerable", True) else []
    hops = len(row["question_decomposition"]) if row.get("question_decomposition") else None
    return Found(row["question"], answers, passages, row["id"], hops)


def _nq(row: Row) -> Found:
    tokens = row["document_text"].split(" ")
    spans = [span for note in row["annotations"] for span in note["short_answers"]]
    answers = [" ".join(tokens[span["start_token"] : span["end_token"]]) for span in spans]
    said = {note.get("yes_no_answer", "NONE").lower() for note in row["annotations"]} & {
        "yes",
        "no",
    }
    return Found(row["question_text"], [*answers, *sorted(said)], [], str(row["example_id"]))


def _nq_open(row: Row) -> Found:
    return Found(row["question"], _list(row["answer"]))


def _dpr(row: Row) -> Found:
    passages = [
        (passage["title"], passage["text"], kind == "positive_ctxs")
        for kind in ("positive_ctxs", "negative_ctxs", "hard_negative_ctxs")
        for passage in row.get(kind, [])
    ]
    return Found(row["question"], _list(row["answers"]), passages)


def _flashrag(row: Row) -> Found:
    return Found(row["question"], _list(row["golden_answers"]), [], row.get("id"))


LAYOUTS: dict[str, tuple[frozenset[str], Callable[[Row], Found]]] = {
    "musique": (frozenset({"paragraphs", "question", "answer"}), _musique),
    "2wiki": (frozenset({"context", "supporting_facts", "question", "evidences"}), _2wiki),
    "hotpotqa": (frozenset({"context", "supporting_facts", "question", "answer"}), _hotpotqa),
    "nq": (frozenset({"document_text", "question_text", "annotations", "example_id"}), _nq),
    "dpr": (frozenset({"question", "answers", "positive_ctxs"}), _dpr),
    "flashrag": (frozenset({"question", "golden_answers"}), _flashrag),
    "nq_open": (frozenset({"question", "answer"}), _nq_open),
}
"""Columns by which a layout is recognised, in this order, and how it is read."""


def questions(
    source: Path,
    *,
    layout: str | None = None,
    aliases: Path | None = None,
    limit: int | None = None,
) -> tuple[list[Row], list[dict[str, str]], int]:
    """Questions of a file, and the passages that come with them.

    Args:
        source: JSON with a list (or a list under `data`), or JSONL.
        layout: a name in `LAYOUTS`; None recognises it by the columns of the first row.
        aliases: 2wiki's `id_aliases.json`.
        limit: at most so many questions, the first ones.

    Returns:
        (rows, passages, how many questions were left out because the set has no answer to them). Rows
        have the columns `id`, `question`, `answer` (a list of accepted ones), `hops` (None where the
        set does not say) and `supports` (ids of passages that lead to the answer). Passages have `id`,
        `title` and `text`; the same title and text occur once, whatever questions they come with.

    Raises:
        ValueError: no such layout, or a row that has not its shape; the row or line is named.
    """
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"no layout {layout!r}; write one of {sorted(LAYOUTS)}")
    other_names = _aliases(aliases) if aliases is not None else {}
    rows: list[Row] = []
    passages: dict[str, dict[str, str]] = {}
    left_out = 0
    for where, row in _rows(source):
        if len(rows) == limit:
            break
        layout = layout or _recognised(row, where)
        try:
            found = LAYOUTS[layout][1](row)
            _check(found)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            said = f"misses {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{where} has not the layout {layout}: {said}") from None
        answers = [*found.answers, *other_names.get(found.answer_id or "", [])]
        answers = list(dict.fromkeys(answer for answer in answers if answer.strip()))
        if not answers:
            left_out += 1
            continue
        supports = []
        for title, text, leads in found.passages:
            identity = hashlib.sha256(f"{title}\0{text}".encode()).hexdigest()[:16]
            passages[identity] = {"id": identity, "title": title, "text": text}
            supports += [identity] if leads else []
        rows.append(
            {
                "id": str(found.id if found.id is not None else len(rows) + left_out),
                "question": found.question,
                "answer": answers,
                "hops": found.hops,
                "supports": supports,
            }
        )
    if not rows:
        raise ValueError(f"{source} has no question with an answer ({left_out} without)")
    return rows, list(passages.values()), left_out


def _check(found: Found) -> None:
    if not isinstance(found.question, str) or not found.question.strip():
        raise ValueError(f"the question is no text: {found.question!r:.60}")
    if not all(isinstance(answer, str) for answer in found.answers):
        raise ValueError(f"answers must be texts, got {found.answers!r:.60}")
    if not all(
        isinstance(part, str) for title, text, _ in found.passages for part in (title, text)
    ):
        raise ValueError("titles and texts of passages must be texts")


def _recognised(row: Row, where: str) -> str:
    for name, (columns, _) in LAYOUTS.items():
        if columns <= row.keys():
            return name
    raise ValueError(
        f"{where} has columns {sorted(row)}, which is none of the layouts {sorted(LAYOUTS)}"
    )


def _rows(source: Path) -> Iterator[tuple[str, Row]]:
    """Where each row is, and the row."""
    if not source.is_file():
        raise ValueError(f"no file {source}")
    with source.open("rb") as file:
        is_list = file.read(1) == b"["
    each: Iterable[tuple[str, Any]]
    if is_list:
        try:
            each = [
                (f"{source}, row {n}", row) for n, row in enumerate(json.loads(source.read_bytes()))
            ]
        except ValueError as error:
            raise ValueError(f"{source} is not JSON: {error}") from None
    else:
        each = _lines(source)
    for where, row in each:
        if not isinstance(row, dict):
            raise ValueError(f"{where} must be an object, got {type(row).__name__}")
        yield where, row


def _lines(source: Path) -> Iterator[tuple[str, Any]]:
    with source.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{source}, line {number}"
                try:
                    yield where, json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{where} is not JSON: {error}") from None


def _aliases(path: Path) -> dict[str, list[str]]:
    """Other names of each Wikidata id."""
    names: dict[str, list[str]] = {}
    for where, row in _rows(path):
        try:
            names[row["Q_id"]] = [*row["aliases"], *row.get("demonyms", [])]
        except (LookupError, TypeError) as error:
            raise ValueError(f"{where} is no line of id_aliases.json: misses {error}") from None
    return names


def _list(value: Any) -> list[str]:
    """A list of answers; some sets write it as the text of a Python list."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        value = ast.literal_eval(value)
    return [value] if isinstance(value, str) else list(value)


def _loaded(value: Any) -> Any:
    """A column that some copies of a set hold as the text of its JSON."""
    return json.loads(value) if isinstance(value, str) else value


def write_jsonl(path: Path, rows: Iterable[Row]) -> Path:
    """Write rows, one per line; the file appears when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.staged")
    with staged.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    staged.replace(path)
    return path


def main(arguments: list[str] | None = None) -> None:
    """Read a question set, write rows and a corpus, and build its index."""
    parser = argparse.ArgumentParser(
        description="Turn a published question set into questions.jsonl and a search index."
    )
    parser.add_argument("--source", type=Path, required=True, help="File of the question set.")
    parser.add_argument("--out", type=Path, required=True, help="Folder to write to.")
    parser.add_argument("--layout", choices=sorted(LAYOUTS), help="Default: recognised by columns.")
    parser.add_argument("--aliases", type=Path, help="id_aliases.json of 2WikiMultihopQA.")
    parser.add_argument("--limit", type=int, help="At most so many questions, the first ones.")
    parser.add_argument(
        "--corpus", type=Path, help="Corpus to search instead of the passages of the questions."
    )
    given = parser.parse_args(arguments)
    try:
        rows, passages, left_out = questions(
            given.source, layout=given.layout, aliases=given.aliases, limit=given.limit
        )
        if not passages and given.corpus is None:
            raise ValueError(f"{given.source} has no passages: name a corpus with --corpus")
        write_jsonl(given.out / "questions.jsonl", rows)
        corpus = given.corpus or write_jsonl(given.out / "corpus.jsonl", passages)
        index = SearchIndex.build(corpus, given.out / "index.sqlite")
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"{len(rows)} questions ({left_out} left out, without an answer), {len(index)} passages")


if __name__ == "__main__":
    main()
