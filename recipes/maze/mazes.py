"""Mazes: how they are drawn at random, written as words, read back, and solved.

A maze of size 2n + 1 (odd, walls included) has n x n cells, each named by its row and its column. It
is written as its passages, a line for each row of cells: `c5>` is open to the right, to c6, and `c5v`
down, to d5. The last line names the goal and the start:

    c5>c5vc6v
    d5>
    Gd5Sc6

A path names the cells it goes through after the start, `c5~d5`; a name of no cell that is open to the
last one is a wall. `~` says that the next move is a guess; it moves nowhere. Each passage and each cell
is one word, so that a small model finds what is open from a cell by looking for few words: with words
for rows, columns and the shapes of cells it took longer than a warm start may.

The names are those of 8 rows, a to h, and 8 columns, 1 to 8. Smaller mazes lie anywhere among them, so
that small mazes teach a model the names that large ones need.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import isqrt

import numpy as np

ROWS, COLUMNS = "abcdefgh", "12345678"
RIGHT, DOWN, GOAL, START, LINE, GUESS = ">", "v", "G", "S", "\n", "~"
CELLS = tuple(row + column for row in ROWS for column in COLUMNS)
PASSAGES = {
    **{a + c + RIGHT: (a + c, a + d) for a in ROWS for c, d in pairwise(COLUMNS)},
    **{a + c + DOWN: (a + c, b + c) for a, b in pairwise(ROWS) for c in COLUMNS},
}
"""Word -> the two cells that it joins."""
BESIDE = {
    cell: tuple(b if a == cell else a for a, b in PASSAGES.values() if cell in (a, b))
    for cell in CELLS
}
"""Cell -> the cells beside it, walls or not, also of those outside a small maze."""
WORDS = (*CELLS, *PASSAGES, GOAL, START, LINE, GUESS)
WORD = re.compile("[a-h][1-8][>v]?|[\\s\\S]")
"""What is one word of a text; what is neither a passage nor a cell is a character."""
SIZES = tuple(range(5, 2 * len(ROWS) + 2, 2))

Ways = Mapping[str, tuple[str, ...]]
"""Cell -> the cells that it is open to, in order of their names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Maze:
    """Which cells are open to each other, a start and a goal.

    Example, two by two cells with a wall between the upper two::

        Maze(
            ways={"a1": ("b1",), "a2": ("b2",), "b1": ("a1", "b2"), "b2": ("a2", "b1")},
            start="a1",
            goal="a2",
        )
    """

    ways: Ways
    """Every cell of the maze is in it."""
    start: str
    goal: str

    @property
    def size(self) -> int:
        """Of the grid with its walls."""
        return 2 * isqrt(len(self.ways)) + 1

    @property
    def text(self) -> str:
        """The maze as a prompt."""
        lines: dict[str, str] = {}
        for cell, others in sorted(self.ways.items()):
            for other in (other for other in others if other > cell):
                word = cell + (RIGHT if other[0] == cell[0] else DOWN)
                lines[cell[0]] = lines.get(cell[0], "") + word
        return LINE.join([*lines.values(), GOAL + self.goal + START + self.start])

    @property
    def content(self) -> str:
        """The maze as a prompt, moved to the first row and column: equal for mazes that are alike."""
        up = ROWS.index(min(cell[0] for cell in self.ways))
        left = COLUMNS.index(min(cell[1] for cell in self.ways))

        def moved(word: str) -> str:
            if word[:2] not in CELLS:
                return word
            row, column = ROWS.index(word[0]) - up, COLUMNS.index(word[1]) - left
            return ROWS[row] + COLUMNS[column] + word[2:]

        return "".join(map(moved, WORD.findall(self.text)))


@lru_cache(maxsize=20_000)
def read(text: str) -> Maze:
    """The maze that a prompt shows.

    Raises:
        ValueError: if the text is not a maze's.
    """
    *lines, ends = text.split(LINE)
    ways: dict[str, list[str]] = {}
    for word in WORD.findall("".join(lines)):
        one, two = PASSAGES.get(word, (word, word))
        ways.setdefault(one, []).append(two)
        ways.setdefault(two, []).append(one)
    maze = Maze(
        ways={cell: tuple(sorted(others)) for cell, others in sorted(ways.items())},
        goal=ends[1:3],
        start=ends[4:6],
    )
    # What is no passage, stands twice or elsewhere than it should is not given back as it was.
    if not {maze.goal, maze.start} <= ways.keys() <= {*CELLS} or maze.text != text:
        raise ValueError(f"this prompt is no maze: {text[:80]!r}")
    return maze


def walk(maze: Maze, path: str) -> tuple[list[str], float | None]:
    """Follow a path until the goal or the first wall.

    Returns:
        The cells that the path has been in, the start first, and 1 if the goal was reached, 0 if a
        wall was hit, None if the path ended before either, if need be in the middle of a name.
    """
    cells = [maze.start]
    words = WORD.findall(path)
    for number, word in enumerate(words, start=1):
        if number == len(words) and word in ROWS:
            break  # the name of a cell may follow
        if word == GUESS:
            continue
        if word not in maze.ways[cells[-1]]:
            return cells, 0.0
        cells.append(word)
        if word == maze.goal:
            return cells, 1.0
    return cells, None


def distances(maze: Maze) -> dict[str, int]:
    """Fewest moves from every cell to the goal, by breadth-first search; without cells cut off."""
    found = {maze.goal: 0}
    queue = deque([maze.goal])
    while queue:
        cell = queue.popleft()
        for reached in maze.ways[cell]:
            if reached not in found:
                found[reached] = found[cell] + 1
                queue.append(reached)
    return found


def shortest_path(maze: Maze) -> str:
    """A shortest path from the start to the goal; of several, the first in order of names.

    Raises:
        ValueError: if there is no way.
    """
    distance = distances(maze)
    if maze.start not in distance:
        raise ValueError(f"no way leads from {maze.start} to {maze.goal}")
    path, cell = "", maze.start
    while cell != maze.goal:
        cell = min(maze.ways[cell], key=distance.__getitem__)
        path += cell
    return path


def search_path(
    maze: Maze, guess: float, *, longest: int, generator: np.random.Generator
) -> tuple[str, int, str]:
    """A path of somebody who searches the maze depth first, and guesses now and then.

    Before each move he guesses with probability `guess`, which is the word `~` in the path: the move is
    drawn evenly from the cells beside this one, and the path ends with it if there is a wall. Other
    moves are the search's: of the open cells that the path has not been in, the one with the fewest
    rows and columns to the goal (of several, the first in order of names); where there is none, back to
    the cell from which this one was reached first. Every move of the search follows from the cells
    beside this one and the path so far, so a small model can learn it; a shortest path it could not.
    (Project default, not from a paper.)

    Args:
        maze: with a way from every cell to the goal.
        guess: probability in [0, 1].
        longest: moves of the path, at most.
        generator: draws the guesses.

    Returns:
        The path, its number of moves, and a letter for how each was chosen: n new cell, b back,
        g guessed and open, s guessed and stopped by a wall.
    """
    if not 0 <= guess <= 1:
        raise ValueError(f"guess must lie in [0, 1], got {guess}")

    def to_goal(cell: str) -> int:
        across = COLUMNS.index(cell[1]) - COLUMNS.index(maze.goal[1])
        return abs(ROWS.index(cell[0]) - ROWS.index(maze.goal[0])) + abs(across)

    path, cell, kinds = "", maze.start, ""
    reached_from = {cell: cell}
    while cell != maze.goal and len(kinds) < longest:
        ways = maze.ways[cell]
        new = [other for other in ways if other not in reached_from]
        back = reached_from[cell]
        if generator.random() < guess:
            beside = BESIDE[cell]
            reached = beside[generator.integers(len(beside))]
            path, kinds = path + GUESS + reached, kinds + ("g" if reached in ways else "s")
            if reached not in ways:
                return path, len(kinds), kinds
        elif new:
            reached = min(new, key=to_goal)
            path, kinds = path + reached, kinds + "n"
        else:  # at the start, when guesses went everywhere: the first of its ways
            reached = back if back != cell else ways[0]
            path, kinds = path + reached, kinds + "b"
        reached_from.setdefault(reached, cell)
        cell = reached
    return path, len(kinds), kinds


def draw(size: int, *, loops: float, generator: np.random.Generator) -> Maze:
    """A maze by Kruskal's algorithm over the walls in random order, with some more walls opened.

    Without `loops` the maze is perfect: exactly one way joins any two cells. Start and goal are drawn
    evenly from the pairs of cells at least n - 1 moves apart.

    Args:
        size: of the grid with its walls, 2n + 1 for n x n cells; odd, 5 to 17.
        loops: probability in [0, 1] that a wall which cuts no cell off is opened all the same.
        generator: draws walls, start, goal, and where the maze lies.

    Raises:
        ValueError: if a setting is out of range.
    """
    if size not in SIZES:
        raise ValueError(f"size must be odd, {SIZES[0]} to {SIZES[-1]}, got {size}")
    if not 0 <= loops <= 1:
        raise ValueError(f"loops must lie in [0, 1], got {loops}")
    n = size // 2
    up, left = generator.integers(len(ROWS) - n + 1, size=2).tolist()
    cells = [ROWS[up + r] + COLUMNS[left + c] for r in range(n) for c in range(n)]
    part = list(range(n * n))  # of each cell: another cell of its part of the maze, or itself

    def root(cell: int) -> int:
        while part[cell] != cell:
            cell = part[cell]
        return cell

    walls = [(c, c + 1) for c in range(n * n) if (c + 1) % n]
    walls += [(c, c + n) for c in range(n * n - n)]
    ways: dict[str, list[str]] = {cell: [] for cell in cells}
    opened_anyway = (generator.random(len(walls)) < loops).tolist()
    for number in generator.permutation(len(walls)).tolist():
        cell, other = walls[number]
        one, two = root(cell), root(other)
        if one != two or opened_anyway[number]:
            part[one] = two
            ways[cells[cell]].append(cells[other])
            ways[cells[other]].append(cells[cell])
    sorted_ways = {cell: tuple(sorted(others)) for cell, others in ways.items()}
    while True:
        start, goal = (cells[c] for c in generator.integers(n * n, size=2).tolist())
        maze = Maze(ways=sorted_ways, start=start, goal=goal)
        if start != goal and distances(maze)[start] >= n - 1:
            return maze


def distinct(size: int, *, loops: float, generator: np.random.Generator) -> Iterator[Maze]:
    """Mazes that are not alike, wherever they lie; ends after 2,000 draws without a new one."""
    seen: set[str] = set()
    misses = 0
    while misses < 2_000:
        maze = draw(size, loops=loops, generator=generator)
        misses += 1
        if maze.content not in seen:
            seen.add(maze.content)
            misses = 0
            yield maze
