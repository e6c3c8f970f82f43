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
    search_path,
    shortest_path,
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
    assert len(WORDS) == len(set(WORDS)) == 64 + 2 * 56 + 4


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
    assert walk(WALLED, "~c5~~c6d6") == (["d5", "c5", "c6", "d6"], 1.0)  # guesses move nowhere
    assert walk(WALLED, "") == walk(WALLED, "~") == (["d5"], None)
    assert walk(WALLED, "c5c") == (["d5", "c5"], None)  # half a name
    for wrong in ("c5>", " c5", "S", "\n", "z", "cc"):
        assert walk(WALLED, wrong) == (["d5"], 0.0)


def test_a_search_without_guesses_reaches_every_goal_and_goes_back_from_dead_ends():
    for maze in mazes(4, loops=0.0):
        path, moves, kinds = search_path(maze, 0.0, longest=999, generator=generator())
        cells, outcome = walk(maze, path)
        assert outcome == 1.0 and moves == len(kinds) == len(cells) - 1 and set(kinds) <= {*"nb"}
        # Depth first: a move marked new leads to a cell for the first time, and no passage is taken
        # twice the same way.
        for number, kind in enumerate(kinds, start=1):
            assert (cells[number] in cells[:number]) == (kind == "b")
        assert len(set(itertools.pairwise(cells))) == moves
    for maze in mazes(4, loops=0.5):
        assert walk(maze, search_path(maze, 0.0, longest=999, generator=generator())[0])[1] == 1.0


def test_the_search_goes_towards_the_goal_first_and_back_last_by_hand():
    # b2 is the middle of a cross.
    ways = {"a2": ("b2",), "b2": ("a2", "b1", "b3", "c2"), "b1": ("b2",), "b3": ("b2",)}
    ways |= {"c2": ("b2",)}
    for goal in ("a2", "b1", "b3", "c2"):
        maze = Maze(ways=ways, start="b2", goal=goal)
        assert search_path(maze, 0.0, longest=9, generator=generator())[0] == goal
    # c1 is two moves from the goal a2 as the crow flies, and a dead end: out of it before a2.
    ways = {
        "a1": ("b1",),
        "b1": ("a1", "b2"),
        "b2": ("b1", "c2"),
        "c2": ("b2", "c3"),
        "c3": ("c2",),
    }
    maze = Maze(ways=ways, start="b1", goal="c3")
    found = search_path(maze, 0.0, longest=9, generator=generator())
    assert found == ("b2c2c3", 3, "nnn")
    maze = Maze(ways=ways, start="b2", goal="a1")
    assert search_path(maze, 0.0, longest=9, generator=generator())[0] == "b1a1"
    # Towards the goal lies a dead end: into it, back, and round.
    ways = {"a1": ("a2", "b1"), "a2": ("a1",), "b1": ("a1", "c1"), "c1": ("b1", "c2")}
    ways |= {"c2": ("c1", "c3"), "c3": ("b3", "c2"), "b3": ("a3", "c3"), "a3": ("b3",)}
    maze = Maze(ways=ways, start="a1", goal="a3")
    assert search_path(maze, 0.0, longest=9, generator=generator()) == (
        "a2a1b1c1c2c3b3a3",
        8,
        "nbnnnnnn",
    )


def test_guesses_are_as_often_as_declared_marked_and_drawn_from_the_cells_beside():
    draws = generator(4)
    found = [(m, *search_path(m, 0.4, longest=99, generator=draws)) for m in mazes(40)]
    kinds = "".join(row[3] for row in found)
    guessed = kinds.count("g") + kinds.count("s")
    error = (0.4 * 0.6 / len(kinds)) ** 0.5
    assert abs(guessed / len(kinds) - 0.4) < 4 * error  # false alarms: 6 in 100,000
    for maze, path, moves, letters in found:
        cells, outcome = walk(maze, path)
        assert path.count("~") == letters.count("g") + letters.count("s")
        assert moves == len(letters) and (outcome == 0.0) == letters.endswith("s")
        assert "s" not in letters[:-1]
        assert outcome != 0.0 or path[-2:] in BESIDE[cells[-1]]
    # From d5 a guess is c5, the only open one of the four cells beside it.
    first = [search_path(WALLED, 1.0, longest=1, generator=draws)[0] for _ in range(400)]
    for cell in BESIDE["d5"]:  # false alarms: 6 in 100,000 each
        assert abs(first.count(f"~{cell}") - 100) < 4 * (400 * 0.25 * 0.75) ** 0.5


def test_the_cells_beside_a_cell_by_hand():
    assert set(BESIDE["a1"]) == {"a2", "b1"}
    assert set(BESIDE["c5"]) == {"b5", "d5", "c4", "c6"}
    assert sum(map(len, BESIDE.values())) == 2 * len(PASSAGES)


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
    for guess in (-1, 2):
        with pytest.raises(ValueError, match=rf"guess must lie in \[0, 1\], got {guess}"):
            search_path(WALLED, guess, longest=9, generator=np.random.default_rng(0))
