"""A generated world: facts on people, towns, regions and books, passages, and questions of 1 to 3 hops.

    world = draw(seed=0)
    world.passages                      # rows of a corpus for rollouts.agents.search.SearchIndex
    world.train, world.validation       # questions; nothing that one asks about occurs in the other

A name is two words drawn at random, from lists that kinds of things do not share, so a name says
nothing about a fact. Training and validation have worlds apart in one corpus: no fact leads from one to
the other, but words of names and passages around them are alike.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from samplers.keys import step_generator

WORDS_OF = {
    "person": (
        "Mira Orin Talia Bruno Selma Edgar Noemi Caspar Ilse Rufus Delia Anton Perla Hugo Wanda Felix "
        "Greta Ivo Leona Magnus Nadia Otis Petra Quentin",
        "Tolen Vask Brandt Kestrel Moravec Ludd Pelham Quist Rask Sorel Thorne Ulmer Varga Wexley "
        "Yarrow Zeller Abbot Corvin Dunmore Ellery Farrow Gorman Hale Jarvis",
    ),
    "town": (
        "Port Mount Saint Old New Fort Lake Castle Bridge Market Abbey High Low North South East West "
        "Upper Lower Great Little Long Broad Kings",
        "Ashby Brill Carden Dunlow Elmer Fenton Garth Holm Inver Juna Kelda Lorne Marsk Nairn Orley "
        "Penrith Quorn Redda Selby Tarn Ulva Vennor Wick Yeld",
    ),
    "region": (
        "Inner Outer Central Coastal Royal Free Ancient United Northern Southern Eastern Western",
        "Albara Borovia Cestria Dalmora Estria Fennia Galdor Hesper Istria Jorvia Kalmar Lusitor",
    ),
    "book": (
        "Silver Amber Crimson Hidden Broken Silent Golden Frozen Burning Distant Hollow Iron Ivory Jade "
        "Lonely Marble Narrow Painted Quiet Restless Scarlet Velvet Wooden Yellow",
        "Harbor Gate Mirror Garden River Tower Lantern Orchard Staircase Compass Voyage Winter Anchor "
        "Bell Candle Desert Engine Forest Ghost Horizon Island Journey Key Ladder",
    ),
}
"""First and second words of the names of each kind. No word is in two lists."""


@dataclass(frozen=True, slots=True)
class Relation:
    """What a fact says."""

    subject: str
    object: str
    passage: str
    """The passage that states it."""
    asked: str
    """The word that finds it, beside the subject's name."""


RELATIONS = {
    "author": Relation("book", "person", "The book {s} was written by {o}.", "written"),
    "birthplace": Relation("person", "town", "{s} was born in {o}.", "born"),
    "teacher": Relation("person", "person", "{s} was taught by {o}.", "taught"),
    "region": Relation("town", "region", "The town {s} lies in {o}.", "lies"),
}
"""Every subject of the kind has each of these facts exactly once."""

DISTRACTORS = (
    ("person", "town", "{s} often visited {o}."),
    ("person", "book", "{s} owned the book {o}."),
    ("book", "person", "The book {s} was praised by {o}."),
    ("town", "town", "The town {s} trades with {o}."),
)
"""Kinds of subject and object, and the passage. What such a passage says answers no question."""

QUESTIONS = {
    ("author",): "Who wrote the book {}?",
    ("birthplace",): "Where was {} born?",
    ("teacher",): "Who taught {}?",
    ("region",): "In which region lies the town {}?",
    ("author", "birthplace"): "Where was the author of the book {} born?",
    ("author", "teacher"): "Who taught the author of the book {}?",
    ("teacher", "birthplace"): "Where was the teacher of {} born?",
    ("birthplace", "region"): "In which region was {} born?",
    ("author", "birthplace", "region"): "In which region was the author of the book {} born?",
    ("author", "teacher", "birthplace"): "Where was the teacher of the author of the book {} born?",
    ("teacher", "birthplace", "region"): "In which region was the teacher of {} born?",
}
"""A question for each chain of relations."""


@dataclass(frozen=True, slots=True)
class Fact:
    """A passage that states one fact of `RELATIONS`."""

    id: str
    subject: str
    relation: str
    object: str

    @property
    def query(self) -> str:
        """Words that find the passage."""
        return f"{self.subject} {RELATIONS[self.relation].asked}"


@dataclass(frozen=True, slots=True)
class Question:
    """A question, and the facts that lead to its answer."""

    text: str
    chain: tuple[Fact, ...]

    @property
    def answer(self) -> str:
        """The object of the last fact."""
        return self.chain[-1].object

    @property
    def hops(self) -> int:
        """How many facts have to be looked up."""
        return len(self.chain)


@dataclass(frozen=True, slots=True)
class Size:
    """How many things of each kind there are."""

    people: int = 120
    towns: int = 60
    regions: int = 24
    books: int = 80

    def of(self, kind: str) -> int:
        """Things of a kind."""
        counts = {"person": self.people, "town": self.towns, "region": self.regions}
        return counts.get(kind, self.books)


HELD_OUT = Size(people=60, towns=30, regions=12, books=40)
"""Of the world that validation asks about."""


@dataclass(frozen=True, slots=True)
class World:
    """Passages and questions."""

    passages: list[dict[str, str]]
    """`{"id", "title", "text"}`, in random order."""
    names: dict[str, list[str]]
    """Names of each kind, those of training first."""
    train: list[Question]
    validation: list[Question]

    def write(self, path: Path) -> Path:
        """Write the corpus as JSONL; a file with the same content is left as it is."""
        text = "".join(json.dumps(passage) + "\n" for passage in self.passages)
        if not path.is_file() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            staged = path.with_name(f".{path.name}.staged")
            staged.write_text(text)
            staged.replace(path)
        return path


def draw(seed: int, *, train: Size | None = None, validation: Size = HELD_OUT) -> World:
    """A world.

    Args:
        seed: of everything.
        train: size of the world that training asks about.
        validation: size of the one that validation asks about; `Size(0, 0, 0, 0)` for none.

    Returns:
        Passages in random order, and all questions of each part in random order. Equal seeds and sizes
        give equal worlds.

    Raises:
        ValueError: there are not enough names.
    """
    generator = step_generator(seed, "world of the search task", 0)
    parts = [train or Size(), validation]
    names = {
        kind: _names(kind, sum(part.of(kind) for part in parts), generator) for kind in WORDS_OF
    }
    passages: list[dict[str, str]] = []
    questions: list[list[Question]] = []
    for number, part in enumerate(parts):
        skip = parts[0] if number else Size(0, 0, 0, 0)
        own = {kind: names[kind][skip.of(kind) :][: part.of(kind)] for kind in names}
        facts = {(f.subject, f.relation): f for f in _facts(own, f"{number}-", generator)}
        passages += [_passage(fact) for fact in facts.values()]
        passages += _distractors(own, f"{number}-d", facts, generator)
        drawn = list(_questions(own, facts))
        questions.append([drawn[row] for row in generator.permutation(len(drawn))])
    shuffled = [passages[row] for row in generator.permutation(len(passages))]
    return World(shuffled, names, *questions)


def smaller(size: Size, share: float) -> Size:
    """A size with that share of everything, at least two of each kind."""
    return replace(
        size,
        **{name: max(2, round(share * getattr(size, name))) for name in Size.__dataclass_fields__},
    )


def _names(kind: str, number: int, generator: np.random.Generator) -> list[str]:
    first, second = (words.split() for words in WORDS_OF[kind])
    every = [" ".join(pair) for pair in itertools.product(first, second)]
    if number > len(every):
        raise ValueError(f"there are {len(every)} names of a {kind}, {number} are wanted")
    return [every[row] for row in generator.permutation(len(every))[:number]]


def _facts(
    names: dict[str, list[str]], prefix: str, generator: np.random.Generator
) -> Iterator[Fact]:
    number = itertools.count()
    for relation, rule in RELATIONS.items():
        for subject in names[rule.subject]:
            found = _other(subject, names[rule.object], generator)
            yield Fact(f"{prefix}{next(number)}", subject, relation, found)


def _other(name: str, among: list[str], generator: np.random.Generator) -> str:
    """One that shares no word with the name, so that neither hints at the other."""
    allowed = [other for other in among if not set(name.split()) & set(other.split())]
    if not allowed:
        raise ValueError(f"each of {len(among)} names shares a word with {name}; draw more of them")
    return allowed[generator.integers(len(allowed))]


def _passage(fact: Fact) -> dict[str, str]:
    text = RELATIONS[fact.relation].passage.format(s=fact.subject, o=fact.object)
    return {"id": fact.id, "title": fact.subject, "text": text}


def _distractors(
    names: dict[str, list[str]],
    prefix: str,
    facts: dict[tuple[str, str], Fact],
    generator: np.random.Generator,
) -> Iterator[dict[str, str]]:
    number = itertools.count()
    true = {(fact.subject, fact.object) for fact in facts.values()}
    for kind, other_kind, passage in DISTRACTORS:
        for subject in names[kind]:
            others = [o for o in names[other_kind] if not {(subject, o), (o, subject)} & true]
            text = passage.format(s=subject, o=_other(subject, others, generator))
            yield {"id": f"{prefix}{next(number)}", "title": subject, "text": text}


def _questions(
    names: dict[str, list[str]], facts: dict[tuple[str, str], Fact]
) -> Iterator[Question]:
    for relations, text in QUESTIONS.items():
        for start in names[RELATIONS[relations[0]].subject]:
            chain, subject = [], start
            for relation in relations:
                chain.append(facts[subject, relation])
                subject = chain[-1].object
            # A name that shares a word with the answer would hint at it.
            met = " ".join([start, *(fact.object for fact in chain[:-1])]).split()
            if not set(met) & set(subject.split()):
                yield Question(text.format(start), tuple(chain))
