"""The planner with every selector, with stopping rules, with parts of steps: sums, resume, keys."""

import numpy as np
import pytest

from samplers import allocation
from samplers.keys import rollout_seeds
from samplers.planner import Planner
from samplers.posterior import BetaPosterior
from samplers.selection import PosteriorMeanSelector, ThompsonSelector, UniformSelector, mopps
from samplers.selection.bands import OnlineBandSelector, StaticBandSelector
from samplers.selection.diverse import DiverseSelector

KEYS = [f"key {i}" for i in range(10)]


def by_key(keys, columns):
    """(D, ...) an array in row order from one value per key."""
    return np.array([columns[int(key.split()[-1])] for key in keys])


EMBEDDING = np.random.default_rng(1).normal(size=(10, 2))
SELECTORS = {
    "uniform": lambda p, keys: UniformSelector(len(keys), seed=0, keys=keys),
    "thompson": lambda p, keys: ThompsonSelector(p, keys=keys),
    "mopps": lambda p, keys: mopps(p, candidates=2, keys=keys),
    "mopps_band": lambda p, keys: OnlineBandSelector(
        p, rate="draw", candidates=2, short="uniform", keys=keys
    ),
    "posterior_mean": lambda p, keys: PosteriorMeanSelector(p, keys=keys),
    "online_band": lambda p, keys: OnlineBandSelector(p, short="nearest", keys=keys),
    "static_band": lambda p, keys: StaticBandSelector(
        by_key(keys, np.linspace(0, 1, 10)), short="nearest", keys=keys
    ),
    "diverse": lambda p, keys: DiverseSelector(p, by_key(keys, EMBEDDING), gamma=0.1, keys=keys),
}


def stop_when_mixed(counts):
    return ~((counts.successes_P > 0) & (counts.failures_P > 0))


def at_random(counts):
    return counts.chance_P < 0.5


MODES = [
    {},
    {"pilot": 2},
    {"stopping": stop_when_mixed, "round_size": 2},
    {"stopping": at_random, "round_size": 1, "allocate": allocation.uniform},
]


def make(keys=KEYS, *, selector="thompson", allocate=allocation.neyman, seed=0, **settings):
    settings = {"prompts_per_step": 4, "rollouts_per_step": 24} | settings
    posterior = BetaPosterior(len(keys), decay_chosen=0.5, decay_rest=0.99)
    chooser = SELECTORS[selector](posterior, keys) if isinstance(selector, str) else selector
    return Planner(posterior, chooser, allocate, keys=keys, run_seed=seed, **settings)


def rewards(proposal, keys=KEYS):
    """0/1 rewards that depend on prompt, draw and slot only."""
    difficulty_P = np.array([int(keys[row].split()[-1]) / 10 for row in proposal.index_P])
    chance_N = proposal.seed_N % 1000 / 1000
    return (chance_N > difficulty_P[proposal.prompt_N]).astype(float)


def advance(planner, count, keys=KEYS):
    """The next rounds, each observed, by key."""
    made = []
    for _ in range(count):
        proposal = planner.propose()
        columns = (proposal.budget_P, proposal.draw_P, proposal.first_slot_P, proposal.pass_rate_P)
        prompts = [
            (keys[row], *(column[place].item() for column in columns))
            for place, row in enumerate(proposal.index_P)
        ]
        made.append((proposal.step, proposal.round, prompts, proposal.seed_N.tolist()))
        planner.observe(proposal, rewards(proposal, keys), proposal.prompt_N)
    return made


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("kill", [0, 1, 3, 4, 7])
def test_a_run_killed_anywhere_and_resumed_decides_the_same(selector, mode, kill):
    whole = advance(make(selector=selector, **mode), 9)
    killed = make(selector=selector, **mode)
    made = advance(killed, kill)
    if kill % 2:
        killed.propose()
    state, metrics = killed.state_dict(), killed.metrics()
    advance(killed, 2)
    resumed = make(selector=selector, **mode)
    resumed.load_state_dict(state)
    assert resumed.metrics() == metrics
    assert made + advance(resumed, 9 - kill) == whole


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("selector", SELECTORS)
def test_a_shuffle_of_the_rows_changes_nothing(selector, mode):
    shuffled = [KEYS[row] for row in np.random.default_rng(0).permutation(10)]
    expected = advance(make(selector=selector, **mode), 8)
    assert expected == advance(make(shuffled, selector=selector, **mode), 8, shuffled)
    assert expected != advance(make(selector=selector, seed=1, **mode), 8)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("selector", SELECTORS)
def test_the_order_in_which_rollouts_finish_changes_nothing(selector, mode):
    planner, shuffled = make(selector=selector, **mode), make(selector=selector, **mode)
    generator = np.random.default_rng(0)
    for _ in range(8):
        proposal, same = planner.propose(), shuffled.propose()
        np.testing.assert_array_equal(proposal.index_P, same.index_P)
        np.testing.assert_array_equal(proposal.budget_P, same.budget_P)
        reward_N, order = rewards(proposal), generator.permutation(len(proposal.seed_N))
        planner.observe(proposal, reward_N, proposal.prompt_N)
        shuffled.observe(same, reward_N[order], proposal.prompt_N[order])


@pytest.mark.parametrize("selector", sorted(SELECTORS.keys() - {"uniform", "static_band"}))
def test_a_steps_rewards_decide_the_next_step_and_not_their_own(selector):
    # Predictability: keys and budgets are fixed before the rewards they lead to.
    pair = [make(selector=selector), make(selector=selector)]
    for planner in pair:
        advance(planner, 2)
    proposals = [planner.propose() for planner in pair]
    for name in ("index_P", "budget_P", "seed_N"):
        np.testing.assert_array_equal(getattr(proposals[0], name), getattr(proposals[1], name))
    differ = 0
    for step in range(6):
        for planner, reward in zip(pair, (1.0, step % 2), strict=True):
            proposal = planner.propose()
            planner.observe(proposal, np.full(len(proposal.seed_N), reward), proposal.prompt_N)
        after = [planner.propose() for planner in pair]
        differ += after[0].index_P.tolist() != after[1].index_P.tolist()
    assert differ > 0


def test_selection_allocation_and_stopping_read_one_posterior():
    seen = []

    def stopping(counts):
        seen.append((counts.a_P.tolist(), counts.b_P.tolist()))
        return np.zeros(len(counts.a_P), dtype=bool)

    planner = make(prompts_per_step=2, rollouts_per_step=20, stopping=stopping, round_size=2)
    # Written to the arrays themselves: whoever kept a copy would not see it.
    planner.posterior.alpha_D[:], planner.posterior.beta_D[:] = 1e6, 0.0
    planner.posterior.alpha_D[[3, 8]], planner.posterior.beta_D[[3, 8]] = [1e6, 2], [2e6, 4]
    proposal = planner.propose()
    assert sorted(proposal.index_P.tolist()) == [3, 8]
    planner.observe(proposal, np.ones(4), proposal.prompt_N)
    order = proposal.index_P.tolist()
    expected = {3: (1e6 + 1, 2e6 + 1), 8: (3.0, 5.0)}
    assert seen == [([expected[r][0] for r in order], [expected[r][1] for r in order])]
    assert vars(planner.selector)["_posterior"] is planner.posterior


class Chosen:
    """A selector that is told what to choose; it cannot pass over rows."""

    def __init__(self, *calls):
        self.calls = list(calls)

    def select(self, num_prompts, *, generator):
        return np.array(self.calls.pop(0))

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_rounds_by_hand():
    planner = make(
        selector=Chosen([0, 1, 2], [3, 4, 5]),
        prompts_per_step=3,
        rollouts_per_step=15,
        stopping=stop_when_mixed,
        round_size=2,
        allocate=allocation.uniform,
    )
    first = planner.propose()
    assert first.budget_P.tolist() == [2, 2, 2] and not first.is_last and planner.is_open
    planner.observe(first, [1, 0, 0, 0, 1, 1], first.prompt_N)  # row 0 is mixed
    second = planner.propose()
    assert (second.step, second.round) == (0, 1)
    assert second.budget_P.tolist() == [0, 2, 2] and not second.is_last
    assert second.first_slot_P.tolist() == [2, 2, 2]
    planner.observe(second, [0, 0, 1, 1], second.prompt_N)
    third = planner.propose()
    assert third.budget_P.tolist() == [0, 1, 1] and third.is_last and planner.is_open
    planner.observe(third, [0, 1], third.prompt_N)
    assert not planner.is_open
    metrics = planner.metrics()
    assert metrics["planner/budget_planned_mean"] == 5
    assert metrics["planner/budget_mean"] == 4
    assert metrics["planner/share_stopped_early"] == pytest.approx(1 / 3)
    # Decayed once, in the first round, and every rollout counted.
    assert planner.posterior.alpha_D[:3].tolist() == [1, 0, 5]
    assert planner.posterior.beta_D[:3].tolist() == [1, 5, 0]
    # Slots follow each other over the rounds of one draw.
    expected = np.concatenate([rollout_seeds(0, KEYS[1], 0, range(a, b)) for a, b in [(2, 4)]])
    np.testing.assert_array_equal(second.seed_N[:2], expected)
    following = planner.propose()
    assert (following.step, following.round) == (1, 0)


def test_a_step_ends_when_every_prompt_is_stopped():
    planner = make(
        selector=Chosen([0, 1], [2, 3]),
        prompts_per_step=2,
        rollouts_per_step=12,
        stopping=stop_when_mixed,
        round_size=2,
    )
    proposal = planner.propose()
    assert not proposal.is_last
    planner.observe(proposal, [1, 0, 0, 1], proposal.prompt_N)
    assert not planner.is_open
    assert planner.propose().index_P.tolist() == [2, 3]


@pytest.mark.slow
def test_chance_is_one_number_per_group_and_uniform():
    seen = {}

    def stopping(counts):
        for place, chance in enumerate(counts.chance_P):
            seen.setdefault((planner._step, place), set()).add(chance)
        return np.ones(len(counts.a_P), dtype=bool)

    planner = make(selector="uniform", stopping=stopping, round_size=2)
    advance(planner, 400)
    assert all(len(chances) == 1 for chances in seen.values())
    chances = np.array([chance for one in seen.values() for chance in one])
    assert len(np.unique(chances)) == len(chances) > 300 and (chances < 1).all()
    # Uniform on [0, 1): standard deviation .289.
    assert abs(chances.mean() - 0.5) < 4 * 0.289 / len(chances) ** 0.5


def test_a_smaller_step_has_its_share_of_the_rollouts():
    planner = make(selector="uniform", rollouts_per_step=32)
    proposal = planner.propose(num_prompts=3)
    assert len(proposal.index_P) == 3 and proposal.budget_P.sum() == 24
    assert planner.propose(num_prompts=3) is planner.propose()
    with pytest.raises(ValueError, match="step 0 is open with 3 prompts, 2 were asked for"):
        planner.propose(num_prompts=2)
    planner.observe(proposal, [], [])
    assert planner.propose().budget_P.sum() == 32
    discarded = make(selector="uniform", rollouts_per_step=32, pilot=2, pilots="discard")
    pilots = discarded.propose(num_prompts=2)
    assert pilots.budget_P.tolist() == [2, 2]
    discarded.observe(pilots, np.ones(4), pilots.prompt_N)
    assert discarded.propose(num_prompts=2).budget_P.sum() == 12


def test_a_share_that_is_no_integer_is_refused_before_anything_is_chosen():
    planner = make(selector="uniform", rollouts_per_step=30)
    before = planner.selector.state_dict()["waiting"]
    with pytest.raises(ValueError, match="a step of 3 instead of 4 prompts cannot have its share"):
        planner.propose(num_prompts=3)
    np.testing.assert_array_equal(planner.selector.state_dict()["waiting"], before)


@pytest.mark.parametrize("selector", SELECTORS)
def test_excluded_rows_are_not_proposed(selector):
    planner = make(selector=selector)
    for step in range(5):
        exclude = [(step + at) % 10 for at in range(5)]
        proposal = planner.propose(exclude=exclude)
        assert not set(proposal.index_P.tolist()) & set(exclude)
        planner.observe(proposal, rewards(proposal), proposal.prompt_N)


def test_a_selector_that_ignores_what_is_excluded_is_refused():
    with pytest.raises(TypeError, match="exclude"):
        make(selector=Chosen([0, 1, 2, 3])).propose(exclude=[0])

    class Careless(Chosen):
        def select(self, num_prompts, *, generator, exclude=()):
            return np.arange(num_prompts)

    with pytest.raises(ValueError, match=r"without rows \[2\], got \[0, 1, 2, 3\]"):
        make(selector=Careless()).propose(exclude=[2])


def test_coverage_by_hand():
    planner = make(selector=Chosen([0, 1], [0, 2], [0, 1], [0, 3]), prompts_per_step=2)
    found = []
    for _ in range(4):
        planner.observe(planner.propose(), [], [])
        metrics = planner.metrics()
        names = ("coverage", "prompts_visited", "visits_max", "steps_unvisited_max")
        found.append([metrics[f"planner/{name}"] for name in names])
    # Rows 4 to 9 are never visited: 1, 2, 3, 4 steps.
    assert found == [[0.2, 2, 1, 1], [0.3, 3, 2, 2], [0.3, 3, 3, 3], [0.4, 4, 4, 4]]


def test_the_age_counts_from_the_last_visit_where_there_is_one():
    planner = make(KEYS[:3], selector=Chosen([0, 1], [2, 1], [2, 1], [0, 1]), prompts_per_step=2)
    ages = []
    for _ in range(4):
        planner.observe(planner.propose(), [], [])
        ages.append(planner.metrics()["planner/steps_unvisited_max"])
    assert ages == [1, 1, 2, 1]


def test_a_selectors_own_metrics_are_reported():
    planner = make(selector="static_band")
    planner.propose()
    # .33, .44, .56, .67 of ten.
    assert planner.metrics()["selector/share_in_band"] == 0.4
    assert planner.metrics()["selector/prompts_filled"] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"stopping": at_random},
            "round_size must be at least 1 with a stopping rule and None without",
        ),
        (
            {"round_size": 2},
            "round_size must be at least 1 with a stopping rule and None without",
        ),
        ({"stopping": at_random, "round_size": 0}, "round_size=0"),
        ({"stopping": at_random, "round_size": 1, "pilot": 1}, "pilot must be 0, got 1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


@pytest.mark.parametrize("answer", [[True], [1, 0, 1, 0], [0.5] * 4])
def test_a_stopping_rule_that_gives_something_else_is_refused(answer):
    planner = make(stopping=lambda *args, **others: np.array(answer), round_size=2)
    with pytest.raises(ValueError, match="the stopping rule must give 4 booleans"):
        planner.observe(planner.propose(), [], [])
