"""A maze and the path of a completion, drawn."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from .mazes import COLUMNS, ROWS, read, walk

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REACHED, FAILED, WALL = "#009E73", "#D55E00", "#333333"


def picture(ax: Axes, prompt: str, completion: str) -> None:
    """Draw the maze of a prompt and the path of a completion, up to the goal or the first wall.

    The path is green if it reaches the goal and else orange; a cross is where it hits a wall or ends.
    """
    maze = read(prompt)
    cells, outcome = walk(maze, completion)

    def place(cell: str) -> tuple[float, float]:
        return COLUMNS.index(cell[1]) + 0.5, ROWS.index(cell[0]) + 0.5

    for cell, others in maze.ways.items():
        x, y = place(cell)
        open_to = {place(other) for other in others}
        for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            if (x + dx, y + dy) not in open_to:
                ends = [(x + dx / 2 + s * dy / 2, y + dy / 2 + s * dx / 2) for s in (-1, 1)]
                ax.plot(*zip(*ends, strict=True), color=WALL, linewidth=1.5, solid_capstyle="round")
    colour = REACHED if outcome == 1 else FAILED
    for one, two in pairwise(map(place, cells)):
        ax.plot(*zip(one, two, strict=True), color=colour, linewidth=2.5, alpha=0.7)
    if outcome != 1:
        ax.plot(*place(cells[-1]), "x", color=colour, markersize=7, markeredgewidth=2)
    ax.plot(*place(maze.start), "o", color=WALL, markersize=4)
    ax.plot(*place(maze.goal), "*", color=REACHED, markersize=9)
    ax.set_aspect("equal")
    ax.invert_yaxis()
    ax.axis("off")
