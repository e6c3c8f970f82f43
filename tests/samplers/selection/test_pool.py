import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from samplers.selection._pool import Pool, top


def generator(seed=0):
    return np.random.default_rng(seed)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.data())
def test_the_best_scores_are_chosen_best_first(scores, data):
    num_chosen = data.draw(st.integers(1, len(scores)))
    score_K = np.array(scores, dtype=float)
    chosen = top(score_K, num_chosen, generator())
    assert chosen.dtype == np.int64
    assert len(set(chosen.tolist())) == num_chosen
    # Ties make the places ambiguous but never the scores.
    assert score_K[chosen].tolist() == sorted(scores, reverse=True)[:num_chosen]
    pairs = [(-score_K[place], place) for place in chosen]
    assert pairs == sorted(pairs)


def test_without_ties_it_is_the_argsort():
    score_K = generator().random(1000)
    np.testing.assert_array_equal(top(score_K, 50, generator(1)), np.argsort(-score_K)[:50])


def test_ties_are_reproducible_and_favour_nobody():
    score_K = np.array([0.0, 1, 1, 1, 1, 2])
    assert top(score_K, 3, generator(5)).tolist() == top(score_K, 3, generator(5)).tolist()
    counts = np.zeros(6)
    for seed in range(2000):
        counts[top(score_K, 3, generator(seed))] += 1
    assert counts[0] == 0 and counts[5] == 2000
    # Each of the four gets one of the two places: 1000 of 2000, standard deviation 22.
    assert np.abs(counts[1:5] - 1000).max() < 4 * 22.4


def test_minus_infinity_is_last_and_nan_is_refused():
    assert top(np.array([-np.inf, 3.0, -np.inf, -5.0]), 2, generator()).tolist() == [1, 3]
    for place in range(4):
        score_K = np.array([0.1, 0.4, 0.2, 0.3])
        score_K[place] = np.nan
        with pytest.raises(ValueError, match=f"got nan for candidate {place}"):
            top(score_K, 2, generator())
    with pytest.raises(ValueError, match="got nan"):
        top(np.full(3, np.nan), 3, generator())


def test_candidates_are_distinct_free_and_in_the_order_of_their_keys():
    pool = Pool(6, ["f", "c", "a", "e", "b", "d"])
    assert pool.row_D.tolist() == [2, 4, 1, 5, 3, 0]
    assert not pool.in_row_order and Pool(6).in_row_order and Pool(2, ["a", "b"]).in_row_order
    everyone = pool.candidates(None, np.array([1, 3]), generator())
    assert everyone.tolist() == [2, 4, 5, 0]
    assert pool.candidates(9, np.array([1, 3]), generator()).tolist() == [2, 4, 5, 0]
    counts = np.zeros(6)
    for seed in range(1000):
        rows = pool.candidates(2, np.array([1, 3]), generator(seed)).tolist()
        assert rows == [row for row in [2, 4, 5, 0] if row in rows] and len(rows) == 2
        counts[rows] += 1
    # 500 each, standard deviation 16.
    assert counts[[1, 3]].tolist() == [0, 0]
    assert np.abs(counts[[0, 2, 4, 5]] - 500).max() < 4 * 15.9


@pytest.mark.parametrize(
    ("num_prompts", "exclude", "message"),
    [
        (4, (), r"num_prompts must be in \[1, 3\], the size of the data set, got 4"),
        (0, (), r"num_prompts must be in \[1, 3\]"),
        (2, [0, 2, 2], "num_prompts=2 exceeds the 1 prompts .* left when 2 are excluded"),
        (1, [3], r"exclude must be rows in \[0, 3\), got \[3\]"),
        (1, [-1], r"exclude must be rows in \[0, 3\), got \[-1\]"),
        (1, [0.5], r"exclude must be rows in \[0, 3\), got \[0.5\]"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(num_prompts, exclude, message):
    with pytest.raises(ValueError, match=message):
        Pool(3).excluded(num_prompts, exclude)
