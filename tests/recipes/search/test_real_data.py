import json

import pytest

from recipes.search.real_data import main, questions
from rollouts.agents.search import SearchIndex
from rollouts.rewards.text import exact_answer, f1

HOTPOT = {
    "_id": "5a7a06935542990198eaf050",
    "question": "Which magazine was started first, Alpha or Beta?",
    "answer": "Alpha",
    "type": "comparison",
    "level": "medium",
    "supporting_facts": [["Alpha", 0], ["Beta", 0]],
    "context": [
        ["Alpha", ["Alpha (1844) was a magazine.", " It ended in 1846."]],
        ["Beta", ["Beta is a magazine since 1989."]],
        ["Gamma", ["Gamma is a river."]],
    ],
}
ON_THE_HUB = {
    "id": "5a7a06935542990198eaf050",
    "question": HOTPOT["question"],
    "answer": "Alpha",
    "supporting_facts": {"title": ["Alpha", "Beta"], "sent_id": [0, 0]},
    "context": {
        "title": [title for title, _ in HOTPOT["context"]],
        "sentences": [sentences for _, sentences in HOTPOT["context"]],
    },
}
TWO_WIKI = HOTPOT | {
    "_id": "8813f87c0bdd11eba7f7acde48001122",
    "answer": "United States",
    "answer_id": "Q30",
    "evidences": [["Alpha", "country", "United States"]],
}
MUSIQUE = {
    "id": "2hop__1_2",
    "paragraphs": [
        {"idx": 0, "title": "Alpha", "paragraph_text": "Alpha text.", "is_supporting": True},
        {"idx": 1, "title": "Beta", "paragraph_text": "Beta text.", "is_supporting": False},
    ],
    "question": "Who is the spouse of the author?",
    "question_decomposition": [
        {"id": 1, "question": "Alpha >> author", "answer": "X", "paragraph_support_idx": 0},
        {
            "id": 2,
            "question": "#1 >> spouse",
            "answer": "Miquette Giraudy",
            "paragraph_support_idx": 1,
        },
    ],
    "answer": "Miquette Giraudy",
    "answer_aliases": ["Giraudy", "Miquette Giraudy"],
    "answerable": True,
}
NQ = {
    "example_id": 4549465242785278785,
    "question_text": "when is the last episode",
    "document_text": "The last one : April 26 , 2017 <P> end",
    "annotations": [
        {
            "yes_no_answer": "NONE",
            "short_answers": [{"start_token": 4, "end_token": 8}],
            "long_answer": {"start_token": 0, "end_token": 9, "candidate_index": 0},
            "annotation_id": 1,
        }
    ],
    "long_answer_candidates": [],
}
NQ_OPEN = {"question": "who got the first nobel prize in physics", "answer": ["Röntgen", "W. C."]}
DPR = {
    "dataset": "nq_train_psgs_w100",
    "question": "big little lies how many episodes",
    "answers": ["seven"],
    "positive_ctxs": [
        {"title": "Big", "text": "It has seven episodes.", "score": 1000, "passage_id": "1"}
    ],
    "negative_ctxs": [],
    "hard_negative_ctxs": [{"title": "Little", "text": "Another.", "score": 14, "passage_id": "2"}],
}
FLASHRAG = {"id": "test_0", "question": "who?", "golden_answers": ["A", "B"], "metadata": {}}


def as_json(path, rows):
    path.write_text(json.dumps(rows))
    return path


def as_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("rows", "write", "answer", "num_passages", "num_supports", "hops"),
    [
        ([HOTPOT], as_json, ["Alpha"], 3, 2, None),
        ([ON_THE_HUB], as_lines, ["Alpha"], 3, 2, None),
        ([TWO_WIKI], as_json, ["United States"], 3, 2, None),
        ([MUSIQUE], as_lines, ["Miquette Giraudy", "Giraudy"], 2, 1, 2),
        ([NQ], as_lines, ["April 26 , 2017"], 0, 0, None),
        ([NQ_OPEN], as_lines, ["Röntgen", "W. C."], 0, 0, None),
        ([DPR], as_json, ["seven"], 2, 1, None),
        ([FLASHRAG], as_lines, ["A", "B"], 0, 0, None),
    ],
)
def test_each_layout_is_recognised_and_read(
    tmp_path, rows, write, answer, num_passages, num_supports, hops
):
    found, passages, left_out = questions(write(tmp_path / "set", rows))
    assert len(found) == 1 and left_out == 0
    assert found[0]["answer"] == answer
    assert found[0]["hops"] == hops
    assert len(passages) == num_passages
    assert len(found[0]["supports"]) == num_supports
    assert set(found[0]["supports"]) <= {passage["id"] for passage in passages}


def test_sentences_are_joined_and_equal_passages_occur_once(tmp_path):
    rows, passages, _ = questions(as_json(tmp_path / "set", [HOTPOT, HOTPOT | {"_id": "2"}]))
    assert len(rows) == 2 and len(passages) == 3
    assert passages[0]["text"] == "Alpha (1844) was a magazine. It ended in 1846."
    assert rows[0]["supports"] == [passages[0]["id"], passages[1]["id"]]


def test_both_layouts_of_hotpotqa_give_the_same(tmp_path):
    published = questions(as_json(tmp_path / "a", [HOTPOT]))
    assert questions(as_lines(tmp_path / "b", [ON_THE_HUB])) == published
    as_text = HOTPOT | {name: json.dumps(HOTPOT[name]) for name in ("context", "supporting_facts")}
    assert questions(as_lines(tmp_path / "c", [as_text])) == published


def test_aliases_of_2wiki(tmp_path):
    lines = [{"Q_id": "Q30", "aliases": ["USA", "the States"], "demonyms": ["American"]}]
    path = as_lines(tmp_path / "id_aliases.json", lines)
    rows, _, _ = questions(as_json(tmp_path / "set", [TWO_WIKI]), aliases=path)
    assert rows[0]["answer"] == ["United States", "USA", "the States", "American"]


def test_a_question_without_an_answer_is_left_out_and_counted(tmp_path):
    without = json.loads(json.dumps(NQ))
    without["annotations"][0]["short_answers"] = []
    says_yes = json.loads(json.dumps(without))
    says_yes["annotations"][0]["yes_no_answer"] = "YES"
    rows, _, left_out = questions(as_lines(tmp_path / "set", [NQ, without, says_yes]))
    assert [row["answer"] for row in rows] == [["April 26 , 2017"], ["yes"]]
    assert left_out == 1
    unanswerable = MUSIQUE | {"answerable": False}
    assert questions(as_lines(tmp_path / "m", [MUSIQUE, unanswerable]))[2] == 1
    with pytest.raises(ValueError, match="no question with an answer .1 without"):
        questions(as_lines(tmp_path / "n", [unanswerable]))


@pytest.mark.parametrize(
    ("text", "layout", "message"),
    [
        (
            '{"question": "a", "answer": ["b"]}\n{"question": 3, "answer": ["b"]}',
            None,
            "line 2 has not",
        ),
        (
            '{"question": "a", "answer": ["b"]}\n{"question": "a"}',
            None,
            "line 2 .* misses 'answer'",
        ),
        ('{"question": "a", "answer": [1]}', None, "answers must be texts, got .1."),
        ('{"question": "a", "answer": ["b"]}\n{', None, "line 2 is not JSON"),
        ('{"query": "a"}', None, "line 1 has columns .'query'., which is none of the layouts"),
        ("3", None, "line 1 must be an object, got int"),
        ("[3]", None, "row 0 must be an object, got int"),
        ("[{", None, "is not JSON"),
        (
            '{"question": "a", "answer": "b"}',
            "hotpotqa",
            "not the layout hotpotqa: misses 'context'",
        ),
        ("", "squad", "no layout 'squad'; write one of"),
    ],
)
def test_a_malformed_row_is_named(tmp_path, text, layout, message):
    path = tmp_path / "set.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        questions(path, layout=layout)


def test_the_command_writes_rows_and_an_index(tmp_path, capsys):
    source = as_json(tmp_path / "hotpot.json", [HOTPOT, HOTPOT | {"_id": "2"}])
    main(["--source", str(source), "--out", str(tmp_path / "out"), "--limit", "1"])
    assert "1 questions (0 left out, without an answer), 3 passages" in capsys.readouterr().out
    (row,) = [json.loads(line) for line in (tmp_path / "out" / "questions.jsonl").open()]
    found = SearchIndex(tmp_path / "out" / "index.sqlite").search("magazine 1844", k=1)
    assert found[0]["id"] in row["supports"]


def test_the_command_takes_a_corpus_of_ones_own(tmp_path):
    source = as_lines(tmp_path / "nq.jsonl", [NQ_OPEN])
    corpus = as_lines(tmp_path / "c.jsonl", [{"id": "1", "contents": '"X"\nRöntgen won.'}])
    out = str(tmp_path / "out")
    with pytest.raises(SystemExit, match="has no passages: name a corpus with --corpus"):
        main(["--source", str(source), "--out", out])
    main(["--source", str(source), "--out", out, "--corpus", str(corpus)])
    assert SearchIndex(tmp_path / "out" / "index.sqlite").search("rontgen")[0]["title"] == "X"
    assert not (tmp_path / "out" / "corpus.jsonl").exists()


def test_rewards_take_the_answers_as_they_are(tmp_path):
    rows, _, _ = questions(as_lines(tmp_path / "set", [MUSIQUE]))
    said = ["<answer>the giraudy.</answer>", "<answer>Miquette X</answer>"]
    gold = [rows[0]["answer"]] * 2
    assert exact_answer(completions=said, answer=gold) == [1.0, 0.0]
    # "miquette x" and "miquette giraudy": one word of two in common on both sides; 2 * 1 / (2 + 2).
    assert f1(completions=said, answer=gold) == [1.0, 0.5]
