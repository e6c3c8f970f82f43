"""Search a corpus of passages: SQLite FTS5 with BM25 here, or a retriever over HTTP.

    index = SearchIndex.build("corpus.jsonl", "corpus.sqlite")     # once; later calls re-use the file
    index.search("Who wrote Moby-Dick?", k=3)                      # in any process and thread
    search = search_tool(index)                                    # a tool for a model

A corpus is a JSONL file with one passage per line: `{"id": ..., "title": ..., "text": ...}`, where `id`
(default: the line's number) and `title` (default: empty) may be missing. A line may also be
`{"id": ..., "contents": ...}`, with the title as the first line of the contents.

A query comes from a model, so it is data: it is cut into words, and every word is quoted. What a query
may not be raises `SearchError`, whose message is for the model to read.
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import http.server
import json
import os
import re
import sqlite3
import sys
import threading
import time
import unicodedata
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol

Passage = dict[str, Any]
"""`{"id": str, "title": str, "text": str, "score": float}`; a larger score is a better match."""

MOST_CHARACTERS = 1000
"""Characters of a query. Project default."""
MOST_WORDS = 64
"""Different words of a query. Project default."""
MOST_RESULTS = 50
"""Passages that one search may ask for. Project default."""
MOST_MATCHES = 20_000
"""Passages that a search scores at most: the commonest words are left out beyond it. Project default."""
_ALONE = 10
"""The rarest word of a query may be in that many times as many. Project default."""
SECONDS = 20.0
"""Seconds after which a search is given up. Project default."""

_FORMAT = 1
_TOKENIZER = "porter unicode61 remove_diacritics 2"
_COMMON = 500
"""From how many passages on the file records how many passages have a word."""
_MOST_BYTES = 2**24
"""Longest answer of a remote retriever, and longest request of one served here, that is read."""
_WORD = re.compile(r"[^\W_]+")
_RETRIED = (
    HTTPStatus.BAD_GATEWAY,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
    HTTPStatus.TOO_MANY_REQUESTS,
)


class SearchError(Exception):
    """A search that cannot be done as asked; the message says to the model what to do instead."""


class Retriever(Protocol):
    """What `search_tool` needs: a `SearchIndex`, a `RemoteSearch`, or an object of the user's."""

    def search(self, query: str, k: int = 3) -> list[Passage]:
        """The k best passages, best first; fewer or none if fewer match."""


class SearchIndex:
    """A corpus in one file that is only read; every process and every thread may search it.

    A passage matches if it has any of the query's words, compared after lower-casing, removal of
    diacritics and Porter's stemmer. Matches are ordered by BM25 (k1 = 1.2, b = 0.75, title and text
    alike; Robertson and Zaragoza, 2009), equal ones in the order of the corpus. A script without
    spaces between words is found by whole runs of letters only.

    A word that most passages have costs much time and says little. So words are used from the rarest on,
    as long as no more than `most_matches` passages have them. The rarest is always used, unless more
    than ten times as many have it: such a query is refused. All of that depends on corpus and query
    only, never on time. (Project default.)
    """

    def __init__(
        self,
        path: str | Path,
        *,
        most_characters: int = MOST_CHARACTERS,
        most_words: int = MOST_WORDS,
        most_matches: int = MOST_MATCHES,
        seconds: float = SECONDS,
    ) -> None:
        """Open an index that `build` made.

        Args:
            path: the file.
            most_characters: of a query.
            most_words: different words of a query.
            most_matches: passages scored by one search.
            seconds: after which a search is given up with a `SearchError`.

        Raises:
            ValueError: there is no such file, or it is no index, or damaged.
        """
        if min(most_characters, most_words, most_matches) < 1 or not seconds > 0:
            raise ValueError(
                "most_characters, most_words, most_matches and seconds must be positive, got "
                f"{most_characters}, {most_words}, {most_matches} and {seconds}"
            )
        self.path = Path(path).absolute()
        self.most_characters = most_characters
        self.most_words = most_words
        self.most_matches = most_matches
        self.seconds = seconds
        self._open_here = threading.local()
        if not self.path.is_file():
            raise ValueError(
                f"no search index at {self.path}: make it with SearchIndex.build(corpus, path)"
            )
        try:
            record = _record(self._connection())
        except (sqlite3.Error, LookupError, ValueError) as error:
            raise ValueError(f"{self.path} is no search index, or a damaged one: {error}") from None
        self.num_passages: int = record["passages"]
        self.corpus_sha256: str = record["sha256"]

    @classmethod
    def build(
        cls, corpus: str | Path, path: str | Path, *, batch: int = 20_000, quiet: bool = False
    ) -> SearchIndex:
        """Index a corpus, unless `path` holds its index already.

        The file appears under its name when it is complete. A build that is killed goes on from its last
        whole batch when it is called again, if what it had read of the corpus is unchanged. Of
        several processes that call this at once one builds and the others wait.

        An index is re-used if the corpus has the recorded size and time of change, or else the recorded
        SHA-256. Another corpus's index, or a damaged one, is replaced with a warning.

        Args:
            corpus: JSONL file of passages.
            path: where the index is, or is put.
            batch: passages between two points that a killed build goes on from.
            quiet: print no progress.

        Raises:
            ValueError: a line is not a passage, or two have one id (both lines are named); the corpus is
                empty or missing; or `path` holds something that is no SQLite file.
        """
        corpus, path = Path(corpus).absolute(), Path(path).absolute()
        if not corpus.is_file():
            raise ValueError(f"no corpus at {corpus}")
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(path.with_name(f".{path.name}.lock")):
            if path.exists():
                changed = _why_not(corpus, path)
                if not changed:
                    return cls(path)
                warnings.warn(f"{path} is made anew, because {changed}", stacklevel=2)
            _build(corpus, path, batch=batch, quiet=quiet)
        return cls(path)

    def __len__(self) -> int:
        return self.num_passages

    def search(self, query: str, k: int = 3) -> list[Passage]:
        """The k passages that match best, best first; fewer or none if fewer match.

        Raises:
            SearchError: the query is no text, has no words, is too long or has too many words, has
                only words that too many passages have, or took too long; or k is no number of passages.
            RuntimeError: the file could not be read. That is not the query's fault.
        """
        words = check_query(
            query, k, most_characters=self.most_characters, most_words=self.most_words
        )
        connection = self._connection()
        end = time.monotonic() + self.seconds
        connection.set_progress_handler(lambda: time.monotonic() > end, 10_000)
        try:
            chosen = self._affordable(connection, words)
            found = connection.execute(_SEARCH, (" OR ".join(f'"{word}"' for word in chosen), k))
            return [
                {"id": identity, "title": title, "text": text, "score": -rank}
                for identity, title, text, rank in found
            ]
        except sqlite3.OperationalError as error:
            if "interrupted" in str(error):
                raise SearchError(
                    f"the search took longer than {self.seconds:g} seconds; use fewer or rarer words"
                ) from None
            raise RuntimeError(f"search index {self.path}: {error}") from error
        except sqlite3.Error as error:
            raise RuntimeError(f"search index {self.path}: {error}") from error
        finally:
            connection.set_progress_handler(None, 0)

    def _affordable(self, connection: sqlite3.Connection, words: list[str]) -> list[str]:
        """The words from the rarest on, as long as `most_matches` is not exceeded."""
        stems = _stems(words)
        marks = ",".join("?" * len(stems))
        number_of = dict(
            connection.execute(f"SELECT word, passages FROM common WHERE word IN ({marks})", stems)
        )
        number_W = [number_of.get(stem, _COMMON - 1) for stem in stems]
        chosen: list[str] = []
        total = 0
        for number, word in sorted(zip(number_W, words, strict=True), key=lambda pair: pair[0]):
            total += number
            if total > max(self.most_matches, _COMMON) * (1 if chosen else _ALONE):
                break
            chosen.append(word)
        if not chosen:
            raise SearchError(
                f"every word of the query is in more than {_ALONE * self.most_matches} passages; "
                "use rarer words"
            )
        return chosen

    def _connection(self) -> sqlite3.Connection:
        """A connection of this thread in this process; a forked process does not use its parent's."""
        if getattr(self._open_here, "pid", None) != os.getpid():
            # The file is only ever replaced as a whole, so it is immutable: no locks, no side files.
            self._open_here.connection = sqlite3.connect(
                f"{self.path.as_uri()}?mode=ro&immutable=1", uri=True, check_same_thread=False
            )
            self._open_here.pid = os.getpid()
        return self._open_here.connection

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_open_here"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _open_here=threading.local())


_SEARCH = """
SELECT passages.id, passages.title, passages.text, best.score
FROM (
    SELECT rowid AS line, rank AS score FROM words WHERE words MATCH ? ORDER BY rank, rowid LIMIT ?
) AS best
JOIN passages ON passages.line = best.line
ORDER BY best.score, best.line
"""


def check_query(
    query: Any,
    k: Any = 3,
    *,
    most_characters: int = MOST_CHARACTERS,
    most_words: int = MOST_WORDS,
) -> list[str]:
    """The different words of a query, in its order.

    Raises:
        SearchError: the query or `k` is not what a search takes.
    """
    if not isinstance(query, str):
        raise SearchError(f"query must be a text, got {type(query).__name__}")
    if len(query) > most_characters:
        raise SearchError(
            f"the query has {len(query)} characters, at most {most_characters} are allowed; "
            "search for a few words"
        )
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= MOST_RESULTS:
        shown = repr(k) if isinstance(k, int | float) else type(k).__name__
        raise SearchError(f"k must be a whole number from 1 to {MOST_RESULTS}, got {shown:.30}")
    words = list(dict.fromkeys(_WORD.findall(unicodedata.normalize("NFC", query).lower())))
    if not words:
        raise SearchError("the query has no word to search for")
    if len(words) > most_words:
        raise SearchError(
            f"the query has {len(words)} different words, at most {most_words} are allowed; "
            "search for a few words"
        )
    return words


def search_tool(
    retriever: Retriever, *, k: int = 3, most_characters: int = 2000
) -> Callable[[str], str]:
    """A tool `search(query)` that gives a model the k best passages as text.

    Args:
        retriever: what is searched.
        k: passages per search.
        most_characters: of a passage; a longer one ends in "...".
    """
    check_query("k", k)

    def search(query: str) -> str:
        """Search the corpus and return the best matching passages.

        Args:
            query: The words to search for.
        """
        return as_text(retriever.search(query, k), most_characters=most_characters)

    return search


def as_text(passages: list[Passage], *, most_characters: int = 2000) -> str:
    """Passages as a model reads them: a line each, "title: text"; empty if there are none."""

    def line(passage: Passage) -> str:
        text = " ".join(passage["text"].split())
        text = text if len(text) <= most_characters else text[:most_characters] + "..."
        return f"{passage['title']}: {text}" if passage["title"] else text

    return "\n".join(line(passage) for passage in passages)


# A corpus, and how its index is built.


def read_passage(line: bytes, where: str) -> tuple[str | None, str, str]:
    """Id (None if it has none), title and text of a corpus line.

    Raises:
        ValueError: it is no passage; `where` begins the message.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be an object with a text, got {type(row).__name__}")
    title, text = row.get("title", ""), row.get("text")
    if text is None and isinstance(row.get("contents"), str):
        first, _, rest = row["contents"].partition("\n")
        title, text = (title or first.strip().strip('"'), rest) if rest else (title, first)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where} needs a text (keys: {', '.join(map(str, row))[:80]})")
    if not isinstance(title, str):
        raise ValueError(f"{where}: title must be a text, got {type(title).__name__}")
    identity = row.get("id")
    if isinstance(identity, bool) or not isinstance(identity, str | int | None):
        raise ValueError(f"{where}: id must be a text or a number, got {type(identity).__name__}")
    for name, value in (("id", str(identity)), ("title", title), ("text", text)):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: {name} has half a character: {error.reason}") from None
    return None if identity is None else str(identity), title, text


def _build(corpus: Path, path: Path, *, batch: int, quiet: bool) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        _fill(corpus, partial, batch=batch, quiet=quiet)
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError) and "malformed" not in str(error):
            raise  # the disk is full, say: another attempt would end alike
        warnings.warn(f"{partial} is damaged ({error}); the build begins anew", stacklevel=3)
        _remove(partial)
        _fill(corpus, partial, batch=batch, quiet=quiet)
    except ValueError:
        _remove(partial)  # the corpus has to be changed, so nothing of this goes on
        raise
    _sync(partial)
    os.replace(partial, path)
    _sync(path.parent)


def _fill(corpus: Path, partial: Path, *, batch: int, quiet: bool) -> None:
    with closing(sqlite3.connect(partial, isolation_level=None)) as connection:
        offset, line_number, digest = _resume(connection, corpus)
        if not digest:
            connection.close()
            _remove(partial)
            _fill(corpus, partial, batch=batch, quiet=quiet)
            return
        before = corpus.stat()
        said = started = time.monotonic()
        with corpus.open("rb") as file:
            file.seek(offset)
            for rows, lines in _batches(file, digest, corpus, line_number, batch):
                connection.execute("BEGIN")
                connection.executemany("INSERT INTO passages VALUES (?, ?, ?, ?)", rows)
                connection.executemany(
                    "INSERT INTO words(rowid, title, text) VALUES (?, ?, ?)",
                    ((line, title, text) for line, _, title, text in rows),
                )
                _write(connection, offset=file.tell(), lines=lines, sha256=digest.hexdigest())
                connection.execute("COMMIT")
                if not quiet and time.monotonic() - said > 5:
                    said = time.monotonic()
                    share = 100 * file.tell() / max(1, before.st_size)
                    _say(f"{lines:,} lines, {share:.0f} % of {corpus.name}")
        (count,) = connection.execute("SELECT count(*) FROM passages").fetchone()
        if not count:
            raise ValueError(f"corpus {corpus} has no passages")
        after = corpus.stat()
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise ValueError(f"corpus {corpus} changed while it was read; build again")
        _finish(connection, corpus)
        _write(
            connection,
            format=_FORMAT,
            passages=count,
            size=before.st_size,
            mtime_ns=before.st_mtime_ns,
            sha256=digest.hexdigest(),
        )
    if not quiet:
        _say(f"{count:,} passages after {time.monotonic() - started:.0f} s")


def _resume(connection: sqlite3.Connection, corpus: Path) -> tuple[int, int, Any]:
    """Offset, lines read and digest so far; without a digest what is there belongs to another corpus."""
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    if "record" not in tables:
        if tables:
            return 0, 0, None
        connection.executescript(
            f"""
            BEGIN;
            CREATE TABLE record (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
            CREATE TABLE passages (line INTEGER PRIMARY KEY, id TEXT, title TEXT, text TEXT);
            CREATE VIRTUAL TABLE words USING fts5(
                title, text, content='passages', content_rowid='line', tokenize='{_TOKENIZER}'
            );
            COMMIT;
            """
        )
    record = dict(connection.execute("SELECT name, value FROM record"))
    if not record:
        return 0, 0, hashlib.sha256()
    digest = _digest(corpus, record["offset"])
    if digest.hexdigest() != record["sha256"]:
        return 0, 0, None
    return record["offset"], record["lines"], digest


def _batches(
    file: Any, digest: Any, corpus: Path, line_number: int, batch: int
) -> Iterator[tuple[list[tuple[int, str, str, str]], int]]:
    """Rows and lines read so far; the digest takes in what is read."""
    rows = []
    for line in iter(file.readline, b""):
        line_number += 1
        digest.update(line)
        if line.strip():
            where = f"corpus {corpus}, line {line_number}"
            identity, title, text = read_passage(line, where)
            rows.append((line_number, identity or str(line_number), title, text))
        if len(rows) == batch:
            yield rows, line_number
            rows = []
    yield rows, line_number


def _finish(connection: sqlite3.Connection, corpus: Path) -> None:
    """Merge the index, check ids, and record how many passages have the common words."""
    try:
        connection.execute("CREATE UNIQUE INDEX IF NOT EXISTS passages_id ON passages (id)")
    except sqlite3.IntegrityError:
        identity, first, second = connection.execute(
            "SELECT id, min(line), max(line) FROM passages GROUP BY id HAVING count(*) > 1 LIMIT 1"
        ).fetchone()
        raise ValueError(
            f"corpus {corpus}, lines {first} and {second} have the same id {identity[:80]!r}"
        ) from None
    connection.execute("INSERT INTO words(words) VALUES ('optimize')")
    connection.executescript(
        f"""
        BEGIN;
        DROP TABLE IF EXISTS common;
        CREATE TABLE common (word TEXT PRIMARY KEY, passages INTEGER) WITHOUT ROWID;
        CREATE VIRTUAL TABLE temp.vocabulary USING fts5vocab('main', 'words', 'row');
        INSERT INTO common SELECT term, doc FROM temp.vocabulary WHERE doc >= {_COMMON};
        DROP TABLE temp.vocabulary;
        COMMIT;
        """
    )


def _stems(words: list[str]) -> list[str]:
    """Each word as the index has it; what the tokenizer cuts into several is given by its last part."""
    connection = getattr(_here, "stemmer", None)
    if connection is None or _here.pid != os.getpid():
        connection = sqlite3.connect(":memory:", isolation_level=None)
        connection.execute(f"CREATE VIRTUAL TABLE w USING fts5(word, tokenize='{_TOKENIZER}')")
        connection.execute("CREATE VIRTUAL TABLE v USING fts5vocab('w', 'instance')")
        _here.stemmer, _here.pid = connection, os.getpid()
    connection.execute("BEGIN")
    connection.executemany("INSERT INTO w(rowid, word) VALUES (?, ?)", enumerate(words))
    stem_of = dict(connection.execute("SELECT doc, term FROM v"))
    connection.execute("ROLLBACK")
    return [stem_of.get(number, word) for number, word in enumerate(words)]


_here = threading.local()
"""The stemmer of this thread in this process: SQLite has no function for it."""


def _why_not(corpus: Path, path: Path) -> str:
    """Why the index is not that of the corpus; empty if it is."""
    with path.open("rb") as file:
        start = file.read(16)
    if start and start != b"SQLite format 3\0":
        raise ValueError(f"{path} is no search index; choose another path or remove it")
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True)) as opened:
            record = _record(opened)
            opened.execute("SELECT count(*) FROM words WHERE words MATCH 'a'").fetchone()
    except (sqlite3.Error, LookupError, ValueError) as error:
        return f"it is damaged or of another kind: {error}"
    now = corpus.stat()
    if now.st_size != record["size"]:
        return f"the corpus had {record['size']} bytes, now {now.st_size}"
    if now.st_mtime_ns != record["mtime_ns"] and _digest(corpus).hexdigest() != record["sha256"]:
        return "the corpus has changed"
    return ""


def _record(connection: sqlite3.Connection) -> dict[str, Any]:
    """What a complete index says of itself."""
    record = dict(connection.execute("SELECT name, value FROM record"))
    if record["format"] != _FORMAT:
        raise ValueError(f"format {record['format']}, this version reads {_FORMAT}")
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    (size,) = connection.execute("PRAGMA page_size").fetchone()
    name = connection.execute("PRAGMA database_list").fetchone()[2]
    if os.path.getsize(name) < pages * size:
        raise ValueError(f"{os.path.getsize(name)} of {pages * size} bytes are there")
    return record


def _write(connection: sqlite3.Connection, **values: Any) -> None:
    connection.executemany("INSERT OR REPLACE INTO record VALUES (?, ?)", values.items())


def _digest(corpus: Path, length: int | None = None) -> Any:
    """SHA-256 of the first bytes of a file, or of all of it."""
    digest = hashlib.sha256()
    left = corpus.stat().st_size if length is None else length
    with corpus.open("rb") as file:
        while left and (part := file.read(min(left, 2**20))):
            digest.update(part)
            left -= len(part)
    return digest


@contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Hold the lock of a file that stays where it is; it is released when a process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove(partial: Path) -> None:
    partial.unlink(missing_ok=True)
    partial.with_name(f"{partial.name}-journal").unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _say(text: str) -> None:
    print(f"search index: {text}", file=sys.stderr, flush=True)


# The same over HTTP.


class RemoteSearch:
    """A retriever that another process runs; used like a `SearchIndex`.

    Connections that fail, time out, or are refused for the moment (HTTP 429, 502, 503, 504) are tried
    again, after 1, 2, 4, ... seconds. Proxies in the environment are not used. What remains of an
    error becomes a `SearchError`, so the rollout goes on and the tool event is recorded as an error.

    Layouts of request and answer:

    * "plain", which `serve` speaks: `{"query": ..., "k": ...}` and a list of passages
      `[{"id", "title", "text", "score"}, ...]`
    * "search_r1", the retriever of Search-R1: `{"queries": [...], "topk": ..., "return_scores": true}`
      and `{"result": [[{"document": {"id", "contents"}, "score"}, ...]]}`
    """

    def __init__(
        self,
        url: str,
        *,
        layout: str = "plain",
        timeout: float = 20.0,
        retries: int = 2,
        retry_wait: float = 1.0,
    ) -> None:
        """Nothing is sent yet.

        Args:
            url: "http://host:port/path".
            layout: "plain" or "search_r1".
            timeout: seconds that one attempt may take.
            retries: repetitions of a request that failed.
            retry_wait: seconds before the first repetition, doubled before each further one.
        """
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url must begin with http:// or https://, got {url!r}")
        if layout not in ("plain", "search_r1"):
            raise ValueError(f"layout must be 'plain' or 'search_r1', got {layout!r}")
        if not (timeout > 0 and retries >= 0 and retry_wait >= 0):
            raise ValueError(
                f"timeout must be positive, retries and retry_wait not negative; got {timeout}, "
                f"{retries} and {retry_wait}"
            )
        self.url = url
        self.layout = layout
        self.timeout = timeout
        self.retries = retries
        self.retry_wait = retry_wait

    def search(self, query: str, k: int = 3) -> list[Passage]:
        """The k best passages by the other side's measure, best first.

        Raises:
            SearchError: the query is not allowed, nobody answered, or the answer is no list of passages.
        """
        check_query(query, k)
        query = query.encode(errors="replace").decode()  # half characters cannot be sent
        if self.layout == "plain":
            question: Any = {"query": query, "k": k}
        else:
            question = {"queries": [query], "topk": k, "return_scores": True}
        answer = self._answer(json.dumps(question).encode())
        try:
            found = json.loads(answer)
            rows = found if self.layout == "plain" else found["result"][0]
            return [_passage(row, self.layout) for row in rows[:k]]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise SearchError(
                "the search service gave an answer that is no list of passages"
            ) from None

    def _answer(self, body: bytes) -> bytes:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        for attempt in range(self.retries + 1):
            request = urllib.request.Request(self.url, data=body, method="POST")
            request.add_header("Content-Type", "application/json")
            end = time.monotonic() + self.timeout
            try:
                with opener.open(request, timeout=self.timeout) as answer:
                    return _read(answer, end)
            except urllib.error.HTTPError as error:
                said = error.read(300).decode("utf-8", errors="replace")
                if error.code not in _RETRIED:
                    raise SearchError(f"the search service refused: {said or error.code}") from None
                reason = f"HTTP {error.code}"
            except (OSError, http.client.HTTPException) as error:  # timeouts are OSErrors
                reason = type(getattr(error, "reason", error)).__name__
            if attempt < self.retries:
                time.sleep(self.retry_wait * 2**attempt)
        raise SearchError(
            f"the search service did not answer in {self.retries + 1} attempts ({reason})"
        )


def _read(answer: Any, end: float) -> bytes:
    """The body of an answer, unless it is too long or trickles in too slowly."""
    parts: list[bytes] = []
    size = 0
    while part := answer.read1(2**16):
        parts.append(part)
        size += len(part)
        if size > _MOST_BYTES:
            raise SearchError("the search service gave an answer that is too long")
        if time.monotonic() > end:
            raise TimeoutError
    return b"".join(parts)


def _passage(row: Any, layout: str) -> Passage:
    """A passage of an answer, with the types that `Passage` states."""
    score = float(row["score"])
    if layout == "search_r1":
        identity, title, text = read_passage(json.dumps(row["document"]).encode(), "the passage")
        return {"id": identity or "", "title": title, "text": text, "score": score}
    words = {name: row[name] for name in ("id", "title", "text")}
    if not all(isinstance(value, str) for value in words.values()):
        raise TypeError("id, title and text must be text")
    return {**words, "score": score}


def make_server(
    retriever: Retriever, port: int, *, host: str = "127.0.0.1"
) -> http.server.ThreadingHTTPServer:
    """A server for `RemoteSearch`: `serve_forever` runs it, `server_address` tells its port.

    There is no encryption and no password: keep the port inside one's own network.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                length = int(self.headers.get("Content-Length", ""))
                if not 0 < length <= _MOST_BYTES:
                    raise ValueError(f"length {length} is not in (0, {_MOST_BYTES}]")
                question = json.loads(self.rfile.read(length))
                query, k = question["query"], question.get("k", 3)
            except Exception as error:
                self._send(HTTPStatus.BAD_REQUEST, f"unreadable request: {error}".encode())
                return
            try:
                self._send(HTTPStatus.OK, json.dumps(retriever.search(query, k)).encode())
            except SearchError as error:
                self._send(HTTPStatus.UNPROCESSABLE_ENTITY, str(error).encode())
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
                self._send(HTTPStatus.INTERNAL_SERVER_ERROR, said.encode())

        def _send(self, status: HTTPStatus, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """One line per request would bury everything else."""

    server = http.server.ThreadingHTTPServer((host, port), Handler)
    server.daemon_threads = True
    return server


def serve(retriever: Retriever, port: int, *, host: str = "127.0.0.1") -> None:
    """Answer searches until interrupted.

    Args:
        retriever: what is searched; it is called from several threads at once.
        port: TCP port; 0 takes a free one.
        host: address to listen at; the default is reached from this machine only.
    """
    with make_server(retriever, port, host=host) as server:
        server.serve_forever()
