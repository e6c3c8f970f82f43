"""Build and search an index of short generated passages: seconds, latency, size.

python benchmarks/search.py [--passages 1000000] [--queries 2000] [--out results/search.json] [--quick]

Words of passages follow Zipf's law (exponent 1.1) over 200,000 words, 60 words a passage, as long as a
third of a Wikipedia passage of 100 words. Queries are 8 words of one passage, so they have common words.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rollouts.agents.search import SearchError, SearchIndex


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--folder", type=Path, help="Keep corpus and index here.")
    parser.add_argument("--quick", action="store_true", help="5,000 passages and 200 queries.")
    given = parser.parse_args()
    if given.quick:
        given.passages, given.queries = 5000, 200
    generator = np.random.default_rng(0)
    share = 1 / np.arange(1, 200_001) ** 1.1
    cumulative = np.cumsum(share / share.sum())
    queries = []
    with tempfile.TemporaryDirectory() as folder:
        corpus, path = Path(folder) / "corpus.jsonl", Path(folder) / "index.sqlite"
        with corpus.open("w") as file:
            for number in range(given.passages):
                drawn = np.searchsorted(cumulative, generator.random(60))
                words = [f"w{word:x}q" for word in drawn]
                if len(queries) < given.queries and number % 17 == 0:
                    queries.append(" ".join(words[:8]))
                row = {"id": str(number), "title": f"passage {number}", "text": " ".join(words)}
                file.write(json.dumps(row) + "\n")
        start, work = time.perf_counter(), time.process_time()
        index = SearchIndex.build(corpus, path)
        build = time.perf_counter() - start
        build_work = time.process_time() - work
        start = time.perf_counter()
        SearchIndex.build(corpus, path)
        reopen = time.perf_counter() - start
        taken, busy, refused = [], [], 0
        for query in queries:
            start, work = time.perf_counter(), time.process_time()
            try:
                index.search(query)
            except SearchError:
                refused += 1
            taken.append(1000 * (time.perf_counter() - start))
            busy.append(1000 * (time.process_time() - work))
        result = {
            "passages": given.passages,
            "corpus_megabytes": round(corpus.stat().st_size / 1e6, 1),
            "index_megabytes": round(path.stat().st_size / 1e6, 1),
            "build_seconds": round(build, 1),
            "build_cpu_seconds": round(build_work, 1),
            "reopen_seconds": round(reopen, 4),
            "queries": len(queries),
            "refused": refused,
            "query_ms_median": round(float(np.median(taken)), 2),
            "query_ms_p99": round(float(np.quantile(taken, 0.99)), 2),
            "query_cpu_ms_median": round(float(np.median(busy)), 2),
            "query_cpu_ms_p99": round(float(np.quantile(busy, 0.99)), 2),
            "query_ms_max": round(max(taken), 2),
        }
    print(json.dumps(result, indent=1))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
