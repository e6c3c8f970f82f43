"""Mazes: what is drawn, how it is written and read back, ways through it and where a path ends."""

import itertools

import numpy as np
import pytest

from recipes.maze.mazes import (
    BESIDE,
    PASSAGES,
    SIZES,
    WORD,
    WORDS,
    Maze,
    distances,
    distinct,
    draw,
    read,
    shortest_path,
    stray_path,
    walk,
)
from samplers.keys import step_generator

#   c5   c6
#   |  - |      open: c5-c6, c5-d5, c6-d6, d5-d6 not
WALLED = Maze(
    ways={"c5": ("c6", "d5"), "c6": ("c5", "d6"), "d5": ("c5",), "d6": ("c6",)},
    start="d5",
    goal="d6",
)


def generator(seed=0):
    return step_generator(seed, "test", 0)


def mazes(count=3, loops=0.2, sizes=SIZES):
    draws = generator(5)
    return [draw(size, loops=loops, generator=draws) for size in sizes for _ in range(count)]


def openings(maze):
    return sum(map(len, maze.ways.values())) // 2


def simple_paths(maze, cells):
    """Every path to the goal that enters no cell twice, by exhaustion."""
    if cells[-1] == maze.goal:
        return [cells[1:]]
    further = [cell for cell in maze.ways[cells[-1]] if cell not in cells]
    return [path for cell in further for path in simple_paths(maze, [*cells, cell])]


def test_a_maze_as_words_by_hand():
    assert WALLED.text == "c5>c5vc6v\nGd6Sd5"
    assert WALLED.content == "a1>a1va2v\nGb2Sb1"
    assert WALLED.size == 5
    assert WORD.findall("c5>c5v\nGd6Sd5d6") == ["c5>", "c5v", "\n", "G", "d6", "S", "d5", "d6"]
    assert PASSAGES["c5>"] == ("c5", "c6") and PASSAGES["c5v"] == ("c5", "d5")
    assert len(WORDS) == len(set(WORDS)) == 64 + 2 * 56 + 3


def test_every_maze_is_read_back_as_it_was():
    for maze in mazes():
        assert read(maze.text) == maze
        assert set(WORD.findall(maze.text)) <= set(WORDS)


@pytest.mark.parametrize("size", SIZES)
def test_a_drawn_maze_is_a_square_of_neighbours_all_of_which_can_be_reached(size):
    for loops in (0.0, 0.3, 1.0):
        maze = draw(size, loops=loops, generator=generator(size))
        n = size // 2
        assert maze.size == size and len(maze.ways) == n * n
        assert len({cell[0] for cell in maze.ways}) == len({cell[1] for cell in maze.ways}) == n
        for cell, others in maze.ways.items():
            assert list(others) == sorted(others)
            for other in others:
                apart = [abs(ord(a) - ord(b)) for a, b in zip(cell, other, strict=True)]
                assert sorted(apart) == [0, 1] and cell in maze.ways[other]
        assert distances(maze).keys() == maze.ways.keys()
        assert distances(maze)[maze.start] >= max(1, n - 1)


@pytest.mark.parametrize("size", [5, 7, 9])
def test_in_a_perfect_maze_exactly_one_path_joins_two_cells(size):
    draws = generator(1)
    for _ in range(5):
        maze = draw(size, loops=0.0, generator=draws)
        assert openings(maze) == len(maze.ways) - 1
        for start, goal in itertools.permutations(maze.ways, 2):
            pair = Maze(ways=maze.ways, start=start, goal=goal)
            assert len(simple_paths(pair, [start])) == 1


def test_loops_open_every_wall_or_the_declared_share():
    assert openings(draw(9, loops=1.0, generator=generator())) == 2 * 4 * 3
    # Of 112 inner walls of size 17, 49 are left by a perfect maze; 40 mazes have 1960 of them.
    draws = generator(2)
    opened = [openings(draw(17, loops=0.3, generator=draws)) - 63 for _ in range(40)]
    standard_error = (0.3 * 0.7 / 1960) ** 0.5
    assert abs(sum(opened) / 1960 - 0.3) < 4 * standard_error  # false alarms: 6 in 100,000


def test_every_perfect_maze_of_the_smallest_size_is_about_as_likely():
    draws = generator(3)
    drawn = [draw(5, loops=0.0, generator=draws).content.split("\n")[:-1] for _ in range(400)]
    counts = [drawn.count(trees) for trees in map(list, {tuple(lines) for lines in drawn})]
    assert len(counts) == 4  # a square has four spanning trees
    assert all(abs(c - 100) < 4 * (400 * 0.25 * 0.75) ** 0.5 for c in counts)


@pytest.mark.parametrize("loops", [0.0, 0.5])
def test_the_solver_finds_the_shortest_of_all_paths(loops):
    for maze in mazes(6, loops, sizes=(5, 7, 9)):
        paths = simple_paths(maze, [maze.start])
        fewest = min(map(len, paths))
        assert distances(maze)[maze.start] == fewest
        found = WORD.findall(shortest_path(maze))
        assert found in paths and len(found) == fewest


def test_without_a_way_there_is_no_path():
    cut = Maze(ways={"a1": (), "a2": ()}, start="a1", goal="a2")
    with pytest.raises(ValueError, match="no way leads from a1 to a2"):
        shortest_path(cut)


def test_where_a_path_ends_by_hand():
    assert walk(WALLED, "c5c6d6") == (["d5", "c5", "c6", "d6"], 1.0)
    assert walk(WALLED, "c5c6d6a1") == (["d5", "c5", "c6", "d6"], 1.0)  # the goal was reached
    assert walk(WALLED, "d6") == (["d5"], 0.0)  # the wall between d5 and d6
    assert walk(WALLED, "c5d6") == (["d5", "c5"], 0.0)  # no neighbour of c5
    assert walk(WALLED, "c5c5") == (["d5", "c5"], 0.0)
    assert walk(WALLED, "c5d5c5") == (["d5", "c5", "d5", "c5"], None)  # there and back is allowed
    assert walk(WALLED, "") == (["d5"], None)
    assert walk(WALLED, "c5c") == (["d5", "c5"], None)  # half a name
    for wrong in ("c5>", " c5", "S", "\n", "z", "cc"):
        assert walk(WALLED, wrong) == (["d5"], 0.0)


def test_a_path_that_does_not_stray_is_a_shortest_one():
    for maze in mazes(2):
        path, moves, kinds = stray_path(maze, 0.0, 0.0, longest=99, generator=generator())
        assert path == shortest_path(maze)
        assert moves == len(kinds) == distances(maze)[maze.start] and set(kinds) == {"n"}


def test_a_path_that_wanders_reaches_the_goal_and_one_that_stumbles_ends_there():
    for maze in mazes(2):
        path, moves, kinds = stray_path(maze, 0.5, 0.0, longest=10_000, generator=generator(1))
        assert walk(maze, path)[1] == 1.0 and len(path) == 2 * moves == 2 * len(kinds)
        assert stray_path(maze, 1.0, 0.0, longest=1, generator=generator(1))[1] == 1
        path, moves, kinds = stray_path(maze, 0.0, 1.0, longest=99, generator=generator(1))
        cells, outcome = walk(maze, path)
        assert (outcome == 0.0) == (kinds[-1] == "s") and "s" not in kinds[:-1]
        if outcome == 0.0:
            assert len(cells) == moves and path[-2:] in BESIDE[cells[-1]]


def test_the_cells_beside_a_cell_by_hand():
    assert set(BESIDE["a1"]) == {"a2", "b1"}
    assert set(BESIDE["c5"]) == {"b5", "d5", "c4", "c6"}
    assert sum(map(len, BESIDE.values())) == 2 * len(PASSAGES)


def test_moves_stray_as_often_as_declared():
    draws = generator(4)
    paths = [stray_path(m, 0.4, 0.0, longest=99, generator=draws)[2] for m in mazes(20)]
    moves = sum(map(len, paths))
    share = sum(kinds.count("w") for kinds in paths) / moves
    assert abs(share - 0.4) < 4 * (0.4 * 0.6 / moves) ** 0.5  # false alarms: 6 in 100,000
    # Every cell of a perfect maze of size 5 within the names has a wall beside it.
    walled = [draw(5, loops=0.0, generator=draws) for _ in range(300)]
    paths = [stray_path(m, 0.0, 0.3, longest=99, generator=draws)[2] for m in walled]
    moves = sum(map(len, paths))
    share = sum(kinds.count("s") for kinds in paths) / moves
    assert share < 0.3 + 4 * (0.3 * 0.7 / moves) ** 0.5 and share > 0.2


def test_a_seed_draws_the_same_mazes_and_another_seed_others():
    assert mazes(1) == mazes(1)
    assert draw(9, loops=0.2, generator=generator(1)) != draw(9, loops=0.2, generator=generator(2))


@pytest.mark.slow
def test_there_are_sixty_smallest_mazes():
    # Four spanning trees and the ring, twelve pairs of start and goal.
    found = [maze.content for maze in distinct(5, loops=0.2, generator=generator())]
    assert len(found) == len(set(found)) == 60


@pytest.mark.parametrize(
    "text",
    [
        "",
        "What is 2 + 3?",
        "c5>c5vc6v\nGd6",
        "c5>c5vc6v\nSd5Gd6",
        "c5vc5>c6v\nGd6Sd5",  # out of order
        "c5>c5vc6v\nGd6Sa1",  # a start that is no cell of it
        "c5>c5>c6v\nGd6Sd5",
        "c5>xc6v\nGd6Sc5",
    ],
)
def test_what_is_no_maze_is_refused(text):
    with pytest.raises(ValueError, match="this prompt is no maze"):
        read(text)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="size must be odd, 5 to 17, got 8"):
        draw(8, loops=0.0, generator=generator())
    with pytest.raises(ValueError, match=r"loops must lie in \[0, 1\], got 2"):
        draw(9, loops=2, generator=generator())
    for given, wrong in (((-1, 0), "wander must lie in .* got -1"), ((0, 2), "stumble .* got 2")):
        with pytest.raises(ValueError, match=wrong):
            stray_path(WALLED, *given, longest=9, generator=np.random.default_rng(0))
