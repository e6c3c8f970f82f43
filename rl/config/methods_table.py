"""docs/methods.md, made of the records: `python -m rl.config.methods_table > docs/methods.md`."""

from __future__ import annotations

from rl.config.methods import METHODS, OWN_STAGES, Method

TITLES = {
    "trainer": "Presets",
    "selector": "Which prompts are rolled out",
    "posterior_prior": "What is expected of a prompt before it is visited",
    "starts": "Where rollouts begin",
    "allocator": "How many rollouts each prompt gets",
    "allocation_scale": "How the reward's std is estimated for allocators that go by it",
    "pilot_use": "What becomes of pilots",
    "stopping": "When a group ends early",
    "advantage": "How rewards become advantages",
    "multi_objective_aggregation": "How several rewards become one advantage",
    "baseline": "What a sample of a diffusion model is compared with",
    "objective": "What is ascended",
    "down_sampling": "Which rows train",
    "token_selection": "Which tokens of these rows train",
    "loss": "What is differentiated",
}
"""Stage -> heading, in the order of a training step."""

HEAD = """# Methods

Each method is a value of a setting, a function in the file named beside it, and a record in
`rl/config/methods.py`. This page is made of the records: `python -m rl.config.methods_table >
docs/methods.md`. *Unequal budgets* says whether a method keeps the objective where prompts get different
numbers of rollouts; where it does not, a run warns. *Own settings* act with the methods that list them.
"""


def table() -> str:
    """The whole page."""
    parts = [HEAD]
    for stage, title in TITLES.items():
        methods = METHODS[stage]
        parts.append(f"## {title}: `{stage}`\n")
        if stage in OWN_STAGES:
            parts.append("Or `path/to/file.py:function`: see [own.md](own.md).\n")
        budgets = any(method.budgets for method in methods.values())
        head = ["value", "what it does", "file", "source", "own settings"]
        head += ["unequal budgets"] * budgets
        lines = [head, ["---"] * len(head)]
        lines += [_row(method, budgets=budgets) for method in methods.values()]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
    return "\n".join(parts)


def _row(method: Method, *, budgets: bool) -> list[str]:
    own = sorted({*method.settings, *method.needs} - {"seed"})
    row = [
        f"`{method.name}`",
        method.help,
        f"`{method.file}`" if method.file else "",
        method.source,
        ", ".join(f"`{name}`" for name in own),
    ]
    return row + [method.budgets or "keeps the objective"] * budgets


if __name__ == "__main__":
    print(table(), end="")
