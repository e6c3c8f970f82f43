import contextlib
import json
import math
import multiprocessing
import pickle
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollouts.agents import search as module
from rollouts.agents.search import (
    RemoteSearch,
    SearchError,
    SearchIndex,
    as_text,
    make_server,
    search_tool,
)

PASSAGES = [
    {
        "id": "m",
        "title": "Melville",
        "text": "Herman Melville wrote Moby-Dick, a novel on a whale.",
    },
    {"id": "w", "title": "Whales", "text": "A whale is a mammal. Whales sing."},
    {"id": "c", "title": "Café", "text": "The café opened in 1851 and sold coffee."},
    {
        "id": "n",
        "title": "Nothing",
        "text": "Not one word of the others; NEAR, AND, OR and NOT are here.",
    },
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    return SearchIndex.build(write(folder / "c.jsonl", PASSAGES), folder / "c.sqlite", quiet=True)


def ids(passages):
    return [passage["id"] for passage in passages]


def bm25(passages, query, *, k1=1.2, b=0.75):
    """The textbook formula on words that the stemmer leaves alone."""
    words_of = [re.findall(r"\w+", f"{p['title']} {p['text']}".lower()) for p in passages]
    mean = sum(map(len, words_of)) / len(words_of)
    scores = []
    for words in words_of:
        count, score = Counter(words), 0.0
        for word in query.split():
            having = sum(word in other for other in words_of)
            if having:
                inverse = math.log((len(words_of) - having + 0.5) / (having + 0.5))
                part = count[word] * (k1 + 1)
                part /= count[word] + k1 * (1 - b + b * len(words) / mean)
                score += max(inverse, 1e-6) * part
        scores.append(score)
    return scores


def test_scores_are_bm25(tmp_path):
    rows = [
        {"id": str(n), "title": f"t{n}", "text": text}
        for n, text in enumerate(["ab cd ab", "cd ef gh ij kl", "mn op", "qr ab st uv", "wx", "yz"])
    ]
    built = SearchIndex.build(write(tmp_path / "c.jsonl", rows), tmp_path / "x", quiet=True)
    expected = bm25(rows, "ab ef")
    found = built.search("ab ef", k=6)
    assert len(found) == sum(score > 0 for score in expected) == 3
    for passage in found:
        assert passage["score"] == pytest.approx(expected[int(passage["id"])], rel=1e-9)
    assert [p["score"] for p in found] == sorted((p["score"] for p in found), reverse=True)


def test_a_search_finds_stems_accents_and_titles(index):
    assert len(index) == 4
    assert ids(index.search("novels", k=1)) == ["m"]
    assert ids(index.search("CAFE")) == ids(index.search("cafe\u0301")) == ["c"]
    assert ids(index.search("melville")) == ["m"]
    assert index.search("mammal") == [PASSAGES[1] | {"score": pytest.approx(0.7, abs=0.7)}]
    assert index.search("unheard of zebras") != []  # "of" occurs
    assert index.search("zebras") == []


def test_equal_passages_come_in_the_order_of_the_corpus(tmp_path):
    rows = [{"id": f"{9 - n}", "text": "the same words"} for n in range(9)]
    built = SearchIndex.build(write(tmp_path / "c.jsonl", rows), tmp_path / "x", quiet=True)
    assert ids(built.search("same", k=4)) == ["9", "8", "7", "6"]


HOSTILE = [
    'whale" OR "1"="1',
    "whale'; DROP TABLE passages; --",
    "title : whale",
    "NEAR(whale mammal, 2)",
    "^whale*",
    "whale AND NOT (",
    "{title text} : whale",
    "-whale + \\ % _ whale",
    "whale\x00\x01\x1b[2J\ud800",
    "whale " * 150,
    "whale " + " ".join(f"w{n}" for n in range(63)),
    "whale " + "x" * 990,
]


@pytest.mark.parametrize("query", HOSTILE)
def test_operators_quotes_and_sql_are_words_like_any_other(index, query):
    before = index.path.read_bytes()
    assert "w" in ids(index.search(query, k=4))
    assert index.path.read_bytes() == before
    assert not list(index.path.parent.glob("*-journal")) + list(index.path.parent.glob("*-wal"))


@pytest.mark.parametrize(
    ("query", "k", "message"),
    [
        ("", 3, "no word to search for"),
        (" \t\n\"'*()-^:_", 3, "no word to search for"),
        ("\x00\ud83d", 3, "no word to search for"),
        ("x" * 2**20, 3, "has 1048576 characters, at most 1000"),
        (" ".join(map(str, range(65))), 3, "65 different words, at most 64"),
        (None, 3, "must be a text, got NoneType"),
        (b"whale", 3, "must be a text, got bytes"),
        (["whale"], 3, "must be a text, got list"),
        ("whale", 0, "from 1 to 50, got 0"),
        ("whale", 51, "from 1 to 50, got 51"),
        ("whale", True, "from 1 to 50, got True"),
        ("whale", "3", "from 1 to 50, got str"),
        ("whale", 1e300, "from 1 to 50, got 1e[+]300"),
    ],
)
def test_what_a_query_may_not_be_is_an_error_for_the_model(index, query, k, message):
    with pytest.raises(SearchError, match=message):
        index.search(query, k)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=60), st.integers(1, 5))
def test_any_text_gives_a_result_or_a_search_error(index, query, k):
    try:
        found = index.search(query, k)
    except SearchError:
        return
    assert len(found) <= k


def test_common_words_are_left_out_and_refused_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_COMMON", 4)
    rows = [{"id": str(n), "text": f"the thing word{n} {'rather' * (n < 6)}"} for n in range(20)]
    path = write(tmp_path / "c.jsonl", rows)
    SearchIndex.build(path, tmp_path / "x", quiet=True)
    narrow = SearchIndex(tmp_path / "x", most_matches=10)
    # word7 counts at most 3 and "rather" 6, so both are within 10 and "the" with 20 is not.
    assert set(ids(narrow.search("the rather word7", k=20))) == {"7", *"012345"}
    assert ids(narrow.search("the word7", k=20)) == ["7"]
    # Alone a word may be in ten times as many.
    assert len(SearchIndex(tmp_path / "x", most_matches=4).search("the", k=20)) == 20
    monkeypatch.setattr(module, "_ALONE", 2)
    assert len(SearchIndex(tmp_path / "x", most_matches=10).search("the", k=20)) == 20
    with pytest.raises(SearchError, match="every word of the query is in more than 18 passages"):
        SearchIndex(tmp_path / "x", most_matches=9).search("the things")  # "things" is in all, too


def test_a_search_that_takes_too_long_is_given_up(tmp_path):
    rows = [{"id": str(n), "text": "the thing"} for n in range(4000)]
    path = write(tmp_path / "c.jsonl", rows)
    SearchIndex.build(path, tmp_path / "x", quiet=True)
    hasty = SearchIndex(tmp_path / "x", seconds=1e-9)
    with pytest.raises(SearchError, match="took longer than 1e-09 seconds"):
        hasty.search("thing")
    assert len(SearchIndex(tmp_path / "x").search("thing")) == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ("[1]", "line 2 must be an object with a text, got list"),
        ('{"id": 1}', "line 2 needs a text .keys: id"),
        ('{"text": " "}', "line 2 needs a text"),
        ('{"text": "a", "title": 3}', "line 2: title must be a text, got int"),
        ('{"text": "a", "id": [1]}', "line 2: id must be a text or a number, got list"),
        ('{"text": "a\\ud800"}', "line 2: text has half a character"),
        ('{"text": "a", "id": "m"}', "lines 1 and 2 have the same id 'm'"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, message):
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps(PASSAGES[0]) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        SearchIndex.build(path, tmp_path / "x", quiet=True)
    assert not (tmp_path / "x").exists()
    write(path, PASSAGES)  # nothing of the failed build is in the way of the next
    assert len(SearchIndex.build(path, tmp_path / "x", quiet=True)) == 4


def test_an_empty_or_missing_corpus_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no corpus at"):
        SearchIndex.build(tmp_path / "none.jsonl", tmp_path / "x")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="has no passages"):
        SearchIndex.build(tmp_path / "empty.jsonl", tmp_path / "x", quiet=True)


def test_ids_and_titles_may_be_missing_and_contents_hold_both(tmp_path):
    rows = [{"text": "first"}, {"id": 7, "contents": '"A Title"\nsecond line\nthird'}]
    built = SearchIndex.build(write(tmp_path / "c.jsonl", rows), tmp_path / "x", quiet=True)
    (first,), (second,) = built.search("first"), built.search("second")
    assert (first["id"], first["title"], first["text"]) == ("1", "", "first")
    assert (second["id"], second["title"]) == ("7", "A Title")
    assert second["text"] == "second line\nthird"


def test_an_unchanged_corpus_is_not_read_into_an_index_again(tmp_path):
    path, file = write(tmp_path / "c.jsonl", PASSAGES), tmp_path / "x.sqlite"
    SearchIndex.build(path, file, quiet=True)
    made = file.stat().st_ino
    SearchIndex.build(path, file)
    write(path, PASSAGES)  # another time of change, the same bytes
    SearchIndex.build(path, file)
    assert file.stat().st_ino == made
    write(path, PASSAGES[:3])
    with pytest.warns(UserWarning, match="made anew, because the corpus had"):
        assert len(SearchIndex.build(path, file, quiet=True)) == 3
    same_size = path.read_text().replace("whale", "shale")
    path.write_text(same_size)
    with pytest.warns(UserWarning, match="the corpus has changed"):
        assert ids(SearchIndex.build(path, file, quiet=True).search("shale", k=1)) == ["w"]


@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_a_damaged_index_is_made_anew(tmp_path, damage):
    path, file = write(tmp_path / "c.jsonl", PASSAGES), tmp_path / "x.sqlite"
    SearchIndex.build(path, file, quiet=True)
    if damage == "other":
        file.unlink()
        sqlite3.connect(file).execute("CREATE TABLE record (a)").connection.close()
    else:
        file.write_bytes(file.read_bytes()[: 8192 if damage == "cut" else 0])
    with pytest.raises(ValueError, match="is no search index, or a damaged one"):
        SearchIndex(file)
    with pytest.warns(UserWarning, match="damaged or of another kind"):
        assert len(SearchIndex.build(path, file, quiet=True)) == 4


def test_a_file_that_is_no_index_is_left_alone(tmp_path):
    path, file = write(tmp_path / "c.jsonl", PASSAGES), tmp_path / "notes.txt"
    file.write_text("years of work, not SQLite")
    with pytest.raises(ValueError, match="is no search index; choose another path"):
        SearchIndex.build(path, file)
    assert file.read_text() == "years of work, not SQLite"
    with pytest.raises(ValueError, match="make it with SearchIndex.build"):
        SearchIndex(tmp_path / "nowhere")


KILLED = """
import os, signal, sys
from rollouts.agents import search
batches = search._batches
def dying(*arguments):
    for number, batch in enumerate(batches(*arguments)):
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch
search._batches = dying
search.SearchIndex.build(sys.argv[1], sys.argv[2], batch=100, quiet=True)
"""


@pytest.mark.slow
def test_a_killed_build_goes_on_from_its_last_batch(tmp_path, monkeypatch):
    rows = [{"id": f"p{n}", "text": f"the text of word{n % 37}"} for n in range(1000)]
    path, file = write(tmp_path / "c.jsonl", rows), tmp_path / "x.sqlite"
    killed = subprocess.run([sys.executable, "-c", KILLED, path, file], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not file.exists()
    seen = []
    read = module.read_passage
    monkeypatch.setattr(module, "read_passage", lambda *a: seen.append(a) or read(*a))
    resumed = SearchIndex.build(path, file, batch=100, quiet=True)
    assert len(seen) == 700 and len(resumed) == 1000
    whole = SearchIndex.build(path, tmp_path / "y.sqlite", quiet=True)
    assert resumed.search("word5", k=50) == whole.search("word5", k=50)
    assert resumed.corpus_sha256 == whole.corpus_sha256


def test_a_build_killed_at_its_very_end_is_not_repeated(tmp_path, monkeypatch):
    path, file = write(tmp_path / "c.jsonl", PASSAGES), tmp_path / "x.sqlite"
    monkeypatch.setattr(module, "_sync", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        SearchIndex.build(path, file, quiet=True)
    assert not file.exists()
    monkeypatch.undo()
    monkeypatch.setattr(module, "read_passage", lambda *a: 1 / 0)
    assert ids(SearchIndex.build(path, file, quiet=True).search("mammal")) == ["w"]


def test_what_a_killed_build_left_of_another_corpus_is_not_used(tmp_path):
    rows = [{"id": f"p{n}", "text": f"the text of word{n % 37}"} for n in range(1000)]
    path, file = write(tmp_path / "c.jsonl", rows), tmp_path / "x.sqlite"
    subprocess.run([sys.executable, "-c", KILLED, path, file], check=False)
    write(path, [{"id": "new", "text": "another corpus"}, *rows])
    built = SearchIndex.build(path, file, quiet=True)
    assert len(built) == 1001 and ids(built.search("another")) == ["new"]


def test_what_is_left_of_a_build_may_be_damaged(tmp_path):
    path, file = write(tmp_path / "c.jsonl", PASSAGES), tmp_path / "x.sqlite"
    (tmp_path / ".x.sqlite.partial").write_bytes(b"SQLite format 3\0" + b"\xff" * 9000)
    with pytest.warns(UserWarning, match="is damaged .*begins anew"):
        assert len(SearchIndex.build(path, file, quiet=True)) == 4


def found_by_another_process(index, queue):
    queue.put(ids(index.search("whale", k=2)))


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_processes_and_threads_search_one_index(index, start):
    expected = ids(index.search("whale", k=2))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: ids(index.search("whale", k=2)), range(64)))
    assert found == [expected] * 64
    assert ids(pickle.loads(pickle.dumps(index)).search("whale", k=2)) == expected
    context = multiprocessing.get_context(start)
    queue = context.Queue()
    child = context.Process(target=found_by_another_process, args=(index, queue))
    child.start()
    assert queue.get(timeout=60) == expected
    child.join()


def test_of_several_builders_one_builds(tmp_path, monkeypatch):
    path = write(tmp_path / "c.jsonl", PASSAGES)
    built = []
    build = module._build
    monkeypatch.setattr(module, "_build", lambda *a, **k: built.append(a) or build(*a, **k))
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: SearchIndex.build(path, tmp_path / "x"), range(4)))
    assert len(built) == 1 and [len(each) for each in made] == [4] * 4


def test_a_connection_cannot_write(index):
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        index._connection().execute("DELETE FROM passages")


def test_a_tool_gives_passages_as_text(index):
    search = search_tool(index, k=1, most_characters=20)
    assert search.__name__ == "search"
    assert search("mammal") == "Whales: A whale is a mammal...."
    assert search("zebras") == ""
    with pytest.raises(SearchError):
        search("")
    with pytest.raises(SearchError, match="k must be"):
        search_tool(index, k=0)
    assert as_text([{"id": "1", "title": "", "text": "a\n b", "score": 0.0}] * 2) == "a b\na b"


@pytest.mark.parametrize("changes", [{"most_words": 0}, {"seconds": 0}, {"most_matches": -1}])
def test_limits_must_be_positive(index, changes):
    with pytest.raises(ValueError, match="must be positive"):
        SearchIndex(index.path, **changes)


# Over HTTP.


@pytest.fixture
def serving():
    servers = []

    def start(server):
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def answering(answer):
    """A server that calls `answer(handler, number)` for the number-th request."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            answer(self, len(asked))

        def say(self, status, body):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    return server, asked


def test_a_remote_search_gives_what_the_index_gives(index, serving):
    remote = RemoteSearch(serving(make_server(index, 0)))
    assert remote.search("whale mammal", k=2) == index.search("whale mammal", k=2)
    assert remote.search("zebras") == []
    assert ids(remote.search("whale\ud800", k=1)) == ["w"]
    with pytest.raises(SearchError, match="no word to search for"):
        remote.search("?")


def test_an_error_of_the_other_side_is_a_search_error(serving):
    class Broken:
        def search(self, query, k=3):
            if query == "mine":
                raise SearchError("say something else")
            raise KeyError("lost")

    remote = RemoteSearch(serving(make_server(Broken(), 0)), retry_wait=0)
    with pytest.raises(SearchError, match="refused: say something else"):
        remote.search("mine")
    with pytest.raises(SearchError, match="refused: KeyError: 'lost'"):
        remote.search("yours")


def test_a_service_that_is_busy_is_asked_again(serving):
    body = json.dumps([{"id": "a", "title": "", "text": "b", "score": 1}]).encode()
    server, asked = answering(lambda handler, number: handler.say(503 if number < 3 else 200, body))
    remote = RemoteSearch(serving(server), retries=2, retry_wait=0)
    assert remote.search("x y", k=2) == [{"id": "a", "title": "", "text": "b", "score": 1.0}]
    assert asked == [{"query": "x y", "k": 2}] * 3
    server, asked = answering(lambda handler, number: handler.say(429, b""))
    with pytest.raises(SearchError, match=r"did not answer in 2 attempts \(HTTP 429\)"):
        RemoteSearch(serving(server), retries=1, retry_wait=0).search("x")
    assert len(asked) == 2


@pytest.mark.parametrize(
    "body",
    [
        *(
            b"",
            b"no JSON",
            b"{}",
            b"[1]",
            b'[{"id": 1}]',
            b"null",
            b'"abc"',
            b"\xff",
            b"[" * 100_000,
        ),
        b'[{"id": "a", "title": null, "text": "b", "score": 1}]',
    ],
)
def test_an_answer_that_is_none_is_a_search_error(serving, body):
    server, _ = answering(lambda handler, number: handler.say(200, body))
    with pytest.raises(SearchError, match="no list of passages"):
        RemoteSearch(serving(server)).search("x")


@pytest.mark.slow
def test_silence_and_trickles_end(serving, monkeypatch):
    def trickle(handler, number):
        handler.send_response(200)
        handler.end_headers()
        with contextlib.suppress(OSError):  # the other side has hung up
            for _ in range(40):
                handler.wfile.write(b" ")
                handler.wfile.flush()
                time.sleep(0.05)

    for answer in (lambda handler, number: time.sleep(2), trickle):
        server, _ = answering(answer)
        remote = RemoteSearch(serving(server), timeout=0.15, retries=0)
        with pytest.raises(SearchError, match=r"in 1 attempts \(TimeoutError\)"):
            remote.search("x")
    server, _ = answering(lambda handler, number: handler.say(200, b" " * 3000))
    monkeypatch.setattr(module, "_MOST_BYTES", 2000)
    with pytest.raises(SearchError, match="too long"):
        RemoteSearch(serving(server)).search("x")
    with pytest.raises(SearchError, match="did not answer in 1 attempts"):
        RemoteSearch("http://127.0.0.1:9", timeout=1, retries=0).search("x")


def test_the_layout_of_search_r1(serving):
    document = {"id": "3", "contents": '"A Title"\nits text'}
    body = json.dumps({"result": [[{"document": document, "score": 0.5}]]}).encode()
    server, asked = answering(lambda handler, number: handler.say(200, body))
    found = RemoteSearch(serving(server), layout="search_r1").search("x", k=2)
    assert found == [{"id": "3", "title": "A Title", "text": "its text", "score": 0.5}]
    assert asked == [{"queries": ["x"], "topk": 2, "return_scores": True}]


@pytest.mark.parametrize(
    "changes", [{"url": "ftp://x"}, {"layout": "other"}, {"timeout": 0}, {"retries": -1}]
)
def test_settings_of_a_remote_search_are_checked(changes):
    with pytest.raises(
        ValueError, match="|".join(["begin with", "layout must", "must be positive"])
    ):
        RemoteSearch(**{"url": "http://x"} | changes)
