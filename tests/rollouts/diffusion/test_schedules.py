"""Step schedules: which edges each gives, by hand and against their definitions."""

import numpy as np
import pytest

from rollouts.diffusion.schedules import (
    all_steps,
    backward_progressive,
    last_steps,
    random_steps,
    random_window,
    sliding_window,
)

B2 = {"num_steps": 20, "first": 14, "last": 20, "stages": 100}
EVERY = [
    (all_steps, {}),
    (last_steps, {"last": 3}),
    (backward_progressive, {"first": 2, "last": 9, "stages": 30}),
    (sliding_window, {"size": 3, "every": 4}),
    (sliding_window, {"size": 3, "stride": 2, "every": 1, "wrap": True}),
    (random_window, {"size": 3, "seed": 7}),
    (random_steps, {"count": 4, "seed": 7}),
]


def test_the_plain_ones_by_hand():
    assert all_steps(5, num_steps=3) == (0, 1, 2)
    assert last_steps(5, num_steps=10, last=3) == (7, 8, 9)
    assert last_steps(0, num_steps=4, last=4) == (0, 1, 2, 3)


def test_b2s_lengths_begin_at_the_stages_of_its_released_code():
    lengths = [len(backward_progressive(s, **B2)) for s in range(100)]
    begins = [s for s in range(100) if s == 0 or lengths[s] != lengths[s - 1]]
    assert begins == [0, 15, 29, 43, 58, 72, 86]
    assert sorted(set(lengths)) == [14, 15, 16, 17, 18, 19, 20]


def test_backward_progressive_trains_exactly_the_last_edges_and_then_stays():
    assert backward_progressive(0, **B2) == tuple(range(6, 20))
    assert backward_progressive(99, **B2) == tuple(range(20))
    assert backward_progressive(100_000, **B2) == tuple(range(20))


@pytest.mark.parametrize("stages", [3, 4, 7, 50])
@pytest.mark.parametrize("first", [1, 4, 6])
def test_backward_progressive_is_the_formula_monotone_and_exact_at_both_ends(first, stages):
    last = first + 2
    lengths = []
    for s in range(stages):
        edges = backward_progressive(s, num_steps=9, first=first, last=last, stages=stages)
        assert edges == tuple(range(9 - len(edges), 9))
        assert len(edges) == first + (s * (last - first + 1)) // stages
        lengths.append(len(edges))
    assert lengths == sorted(lengths)
    assert (lengths[0], lengths[-1]) == (first, last)


def test_one_length_is_the_plain_schedule():
    settings = {"num_steps": 9, "first": 4, "last": 4, "stages": 1}
    assert backward_progressive(3, **settings) == last_steps(3, num_steps=9, last=4)


def test_the_window_of_mixgrpo_moves_every_25_steps_and_shrinks_at_the_end():
    def window(step):
        return sliding_window(step, num_steps=25, stop=23)

    assert window(0) == window(24) == (0, 1, 2, 3)
    assert window(25) == (1, 2, 3, 4)
    assert window(19 * 25) == (19, 20, 21, 22)
    assert window(20 * 25) == (20, 21, 22)
    assert window(22 * 25) == window(10**6) == (22,)


def test_a_window_of_one_visits_every_edge_in_turn():
    edges = [sliding_window(s, num_steps=5, size=1, every=1, stop=4, wrap=True) for s in range(6)]
    assert edges == [(0,), (1,), (2,), (3,), (0,), (1,)]


def test_a_window_whose_stride_does_not_divide_the_chain_still_begins_again_at_0():
    starts = [
        sliding_window(s, num_steps=5, size=2, stride=2, every=1, wrap=True) for s in range(4)
    ]
    assert starts == [(0, 1), (2, 3), (4,), (0, 1)]


@pytest.mark.parametrize(("schedule", "settings"), EVERY)
def test_every_schedule_gives_increasing_edges_of_the_chain_and_the_same_when_asked_again(
    schedule, settings
):
    for step in range(40):
        edges = schedule(step, num_steps=10, **settings)
        assert edges == schedule(step, num_steps=10, **settings)
        assert list(edges) == sorted(set(edges))
        assert edges[0] >= 0 and edges[-1] < 10
        assert all(type(edge) is int for edge in edges)


@pytest.mark.slow
def test_random_edges_are_uniform():
    # 9 of 15, 4000 draws: an edge is drawn 2400 times, s.e. sqrt(4000 * .6 * .4) = 31; the worst
    # of 15 edges is past 4 s.e. in about 1 seed of 1000, and the seed is fixed.
    counts = np.zeros(16)
    for step in range(4000):
        counts[list(random_steps(step, num_steps=16, count=9, seed=0, stop=15))] += 1
    assert counts[15] == 0
    assert np.abs(counts[:15] - 2400).max() < 4 * 31


def test_random_windows_are_uniform_over_the_places_that_fit():
    # 4 places for 2 edges in 1 .. 5; 4000 draws, s.e. sqrt(4000 / 4 * .75) = 27.4.
    starts = [
        random_window(step, num_steps=10, size=2, seed=0, start=1, stop=6) for step in range(4000)
    ]
    assert all(second == first + 1 for first, second in starts)
    counts = np.bincount([first for first, _ in starts], minlength=10)
    assert np.flatnonzero(counts).tolist() == [1, 2, 3, 4]
    assert np.abs(counts[1:5] - 1000).max() < 4 * 27.4


def test_another_seed_draws_other_edges():
    for schedule, settings in [(random_steps, {"count": 5}), (random_window, {"size": 1})]:
        runs = [
            [schedule(step, num_steps=20, seed=seed, **settings) for step in range(10)]
            for seed in (0, 1)
        ]
        assert runs[0] != runs[1]


@pytest.mark.parametrize(
    ("schedule", "settings", "message"),
    [
        (all_steps, {"step": -1}, "step must be at least 0, got -1"),
        (all_steps, {"num_steps": 0}, "num_steps must be at least 1, got 0"),
        (all_steps, {"num_steps": 2.0}, "num_steps must be an integer, got 2.0"),
        (last_steps, {"last": 11}, r"last must be in 1..10, got 11"),
        (last_steps, {"last": True}, "last must be an integer, got True"),
        (
            backward_progressive,
            {"first": 5, "last": 4, "stages": 9},
            "first must be in 1..4, got 5",
        ),
        (
            backward_progressive,
            {"first": 2, "last": 4, "stages": 2},
            "stages must be at least 3, one for each length from first=2 to last=4, got 2",
        ),
        (sliding_window, {"size": 11}, r"size must be in 1..10, got 11"),
        (sliding_window, {"stride": 0}, "stride must be at least 1, got 0"),
        (sliding_window, {"every": 0}, "every must be at least 1, got 0"),
        (sliding_window, {"stop": 11}, r"stop must be in 1..10, got 11"),
        (random_window, {"size": 4, "seed": 0, "start": 7}, r"size must be in 1..3, got 4"),
        (random_window, {"size": 1, "seed": -1}, "seed must be at least 0, got -1"),
        (random_steps, {"count": 10, "seed": 0, "stop": 9}, r"count must be in 1..9, got 10"),
    ],
)
def test_schedules_say_what_is_wrong(schedule, settings, message):
    with pytest.raises(ValueError, match=message):
        schedule(**{"step": 0, "num_steps": 10} | settings)
