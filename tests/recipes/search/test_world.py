import itertools
import json
import re
from collections import Counter

import pytest

from recipes.search.world import (
    DISTRACTORS,
    QUESTIONS,
    RELATIONS,
    WORDS_OF,
    Size,
    draw,
    smaller,
)
from rollouts.agents import search
from rollouts.agents.search import SearchIndex


@pytest.fixture(scope="module")
def world():
    return draw(seed=3)


def words(text):
    return set(re.findall(r"\w+", text.lower()))


def entities(question):
    return {name for fact in question.chain for name in (fact.subject, fact.object)}


def test_equal_seeds_give_equal_worlds_and_others_do_not(world):
    assert draw(seed=3) == world
    assert draw(seed=4).passages != world.passages


def test_names_are_distinct_and_kinds_share_no_word_and_no_stem():
    lists = [half.split() for pair in WORDS_OF.values() for half in pair]
    every = list(itertools.chain(*lists))
    texts = " ".join([*QUESTIONS.values(), *(r.passage for r in RELATIONS.values())])
    texts += " ".join(passage for *_, passage in DISTRACTORS)
    stems = search._stems([word.lower() for word in every])
    assert len(set(stems)) == len(every)
    assert not set(stems) & set(search._stems(sorted(words(texts))))


def test_every_kind_of_question_is_asked_of_both_parts(world):
    for questions in (world.train, world.validation):
        kinds = {tuple(fact.relation for fact in question.chain) for question in questions}
        assert kinds == set(QUESTIONS)
        assert Counter(q.hops for q in questions).keys() == {1, 2, 3}
        assert len({q.text for q in questions}) == len(questions)
    assert len(world.train) > 900 and len(world.validation) > 450


def test_held_out_questions_share_no_entity_with_training(world):
    trained = set().union(*map(entities, world.train))
    held_out = set().union(*map(entities, world.validation))
    assert trained and held_out and not trained & held_out
    # No passage leads from one part to the other either.
    for passage in world.passages:
        parts = [any(name in passage["text"] for name in part) for part in (trained, held_out)]
        assert parts != [True, True]


@pytest.mark.slow
def test_a_fact_is_stated_once_and_its_answer_is_the_only_one(world):
    texts = [passage["text"] for passage in world.passages]
    assert len(set(texts)) == len(texts)
    for question in world.train + world.validation:
        subject = question.chain[0].subject
        for fact in question.chain:
            assert fact.subject == subject
            start, end = RELATIONS[fact.relation].passage.format(s=subject, o="|").split("|")
            answers = {text[len(start) : -len(end)] for text in texts if text.startswith(start)}
            assert answers == {fact.object}
            subject = fact.object
        assert question.answer == subject


def test_neither_the_question_nor_a_name_on_the_way_says_a_word_of_the_answer(world):
    for question in world.train + world.validation:
        met = question.text + " ".join(
            [question.chain[0].subject, *(fact.object for fact in question.chain[:-1])]
        )
        assert not words(question.answer) & words(met)


def test_names_do_not_predict_facts(world):
    # If the second word of a person's name said anything about the town, the commonest town of each
    # would be right more often than a draw allows. 120 people, 24 names, 60 towns: per name some 5
    # people, whose commonest town is expected 1.2 times; the sum is 30 with a standard deviation of 3.
    town_of = {
        f.subject: f.object for q in world.train for f in q.chain if f.relation == "birthplace"
    }
    counts = {}
    for person, town in town_of.items():
        counts.setdefault(person.split()[1], Counter())[town] += 1
    right = sum(count.most_common(1)[0][1] for count in counts.values())
    assert right < 45


@pytest.mark.slow
def test_every_question_is_answered_by_as_many_searches_as_hops(world, tmp_path):
    corpus = world.write(tmp_path / "corpus.jsonl")
    index = SearchIndex.build(corpus, tmp_path / "index.sqlite", quiet=True)
    facts = {fact for question in world.train + world.validation for fact in question.chain}
    for fact in facts:
        assert index.search(fact.query, k=2)[0]["id"] == fact.id


def test_a_corpus_is_written_once(world, tmp_path):
    path = world.write(tmp_path / "deep" / "corpus.jsonl")
    assert [json.loads(line) for line in path.open()] == world.passages
    made = path.stat().st_ino
    assert world.write(path).stat().st_ino == made
    draw(seed=4).write(path)
    assert path.stat().st_ino != made


def test_sizes_and_what_they_refuse():
    little = draw(0, train=smaller(Size(), 0.2), validation=Size(0, 0, 0, 0))
    assert little.validation == [] and len(little.names["person"]) == 24
    with pytest.raises(ValueError, match="there are 144 names of a region, 200 are wanted"):
        draw(0, train=Size(regions=200), validation=Size(0, 0, 0, 0))
    with pytest.raises(ValueError, match="each of 1 names shares a word with"):
        draw(0, train=Size(people=1), validation=Size(0, 0, 0, 0))
