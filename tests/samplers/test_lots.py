"""The number in [0, 1) that a stopping rule may draw by: one per draw of a prompt."""

import numpy as np

from samplers import allocation
from samplers.planner import Planner
from samplers.posterior import BetaPosterior
from samplers.selection import UniformSelector

KEYS = [f"key {i}" for i in range(6)]


def lots(steps, *, seed=0):
    """{(key, draw): lots of its rounds}, of steps that each exclude some rows of the data set."""
    seen = {}

    def stopping(counts):
        for index, draw, chance in zip(at[0].index_P, at[0].draw_P, counts.chance_P, strict=True):
            seen.setdefault((KEYS[index], int(draw)), []).append(float(chance))
        return np.ones(len(counts.chance_P), bool)

    planner = Planner(
        BetaPosterior(len(KEYS)),
        UniformSelector(len(KEYS), seed=0, keys=KEYS),
        allocation.uniform,
        keys=KEYS,
        run_seed=seed,
        prompts_per_step=2,
        rollouts_per_step=12,
        stopping=stopping,
        round_size=2,
    )
    for exclude in steps:
        at = [None]
        while at[0] is None or planner.is_open:
            at[0] = planner.propose(exclude=exclude)
            planner.observe(at[0], np.zeros(len(at[0].prompt_N)), at[0].prompt_N)
    return seen


ONLY_01, ONLY_23 = [2, 3, 4, 5], [0, 1, 4, 5]


def test_a_lot_is_the_same_in_every_round_of_a_draw_and_new_in_the_next():
    seen = lots([ONLY_01, ONLY_01])
    assert sorted(seen) == [(KEYS[i], draw) for i in (0, 1) for draw in (0, 1)]
    for of_rounds in seen.values():
        assert len(of_rounds) >= 2 and len(set(of_rounds)) == 1
        assert 0 <= of_rounds[0] < 1
    assert len({of_rounds[0] for of_rounds in seen.values()}) == 4


def test_a_lot_belongs_to_the_draw_and_not_to_the_step():
    early, late = lots([ONLY_01, ONLY_23]), lots([ONLY_23, ONLY_01])
    assert early == late and len(early) == 4


def test_a_lot_depends_on_the_seed_of_the_run():
    one, other = lots([ONLY_01]), lots([ONLY_01], seed=1)
    assert one.keys() == other.keys()
    assert all(one[key][0] != other[key][0] for key in one)
