import copy
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samplers import allocation
from samplers.keys import rollout_seeds, step_generator
from samplers.ledger import Ledger
from samplers.planner import Planner
from samplers.posterior import BetaPosterior
from samplers.selection import UniformSelector

KEYS = [f"key {i}" for i in range(10)]
MODES = [
    {},
    {"pilot": 2},
    {"pilot": 2, "pilots": "discard"},
    {"pilot": 3, "estimate": "pilot", "scale": allocation.gvm_plug_in},
    {"pilot": 2, "pilots": "discard", "estimate": "pilot", "scale": allocation.inverse_sqrt},
    {"allocate": allocation.leave_one_out, "minimum": 2, "maximum": 9},
    {"scale": allocation.gvm, "success_above": 0.3},
    {"scale": allocation.thompson_std},
    {"scale": None, "allocate": allocation.knapsack_posterior, "minimum": 2},
]


def make(keys=KEYS, *, allocate=allocation.neyman, seed=0, selector=None, **settings):
    settings = {"prompts_per_step": 4, "rollouts_per_step": 24} | settings
    posterior = BetaPosterior(len(keys), decay_chosen=0.5, decay_rest=0.99)
    if selector is None:
        selector = UniformSelector(len(keys), seed=seed, keys=keys)
    return Planner(posterior, selector, allocate, keys=keys, run_seed=seed, **settings)


def rewards(proposal, keys=KEYS):
    """A reward per rollout that depends on its prompt, draw and slot only; some are fractional."""
    reward_N = []
    for seed, place in zip(proposal.seed_N.tolist(), proposal.prompt_N.tolist(), strict=True):
        row = proposal.index_P[place]
        difficulty = int(keys[row].split()[-1]) / 10
        reward_N.append(float(seed % 1000 / 1000 > difficulty) * (0.7 if seed % 3 else 1.0))
    return np.array(reward_N)


def decisions(proposal, keys=KEYS):
    """Everything a proposal decides, by key."""
    return {
        "step": proposal.step,
        "round": proposal.round,
        "is_last": proposal.is_last,
        "prompts": [
            (keys[row], *(column[place].item() for column in columns))
            for columns in [
                (proposal.budget_P, proposal.draw_P, proposal.first_slot_P, proposal.pass_rate_P)
            ]
            for place, row in enumerate(proposal.index_P)
        ],
        "seeds": proposal.seed_N.tolist(),
    }


def rounds(planner, count, keys=KEYS):
    """Decisions of the next rounds, each observed."""
    made = []
    for _ in range(count):
        proposal = planner.propose()
        made.append(decisions(proposal, keys))
        planner.observe(proposal, rewards(proposal, keys), proposal.prompt_N)
    return made


class Chosen:
    """A selector that is told what to choose."""

    def __init__(self, *calls):
        self.calls = list(calls)

    def select(self, num_prompts, *, generator):
        return np.array(self.calls.pop(0))

    def state_dict(self):
        return {"calls": len(self.calls)}

    def load_state_dict(self, state):
        pass


def through_a_file(state):
    """What a checkpoint of arrays and JSON gives back; anything else in the state fails here."""
    if isinstance(state, np.ndarray):
        return np.frombuffer(state.tobytes(), dtype=state.dtype).reshape(state.shape)
    if isinstance(state, dict):
        return {name: through_a_file(value) for name, value in state.items()}
    return json.loads(json.dumps(state, allow_nan=False))


def test_by_hand():
    planner = make(selector=Chosen([3, 1]), prompts_per_step=2, rollouts_per_step=5)
    planner.posterior.add([1], [4], [8])
    proposal = planner.propose()
    assert proposal.index_P.tolist() == [3, 1]
    # E[p (1 - p)] is 1/6 = .167 for Beta(1, 1) and 25/110 = .227 for Beta(5, 5). The gains of a
    # 2nd rollout are .083 and .114, of a 3rd .028 and .038: row 1, row 3, row 1.
    assert proposal.budget_P.tolist() == [2, 3]
    assert proposal.prompt_N.tolist() == [0, 0, 1, 1, 1]
    assert proposal.pass_rate_P.tolist() == [0.5, 0.5]
    assert (proposal.step, proposal.round, proposal.is_last) == (0, 0, True)
    expected = [rollout_seeds(0, KEYS[row], 0, range(n)) for row, n in [(3, 2), (1, 3)]]
    np.testing.assert_array_equal(proposal.seed_N, np.concatenate(expected))
    planner.observe(proposal, [1, 0, 1, 1, 0.5], proposal.prompt_N)
    assert planner.posterior.alpha_D[[3, 1]].tolist() == [1, 0.5 * 4 + 2.5]
    assert planner.posterior.beta_D[[3, 1]].tolist() == [1, 0.5 * 4 + 0.5]


@pytest.mark.parametrize("mode", MODES)
def test_every_step_spends_exactly_its_rollouts(mode):
    # 10 prompts by 4: the data set ends in the middle of every third step.
    planner = make(**mode)
    steps = {}
    for made in rounds(planner, 30):
        steps.setdefault(made["step"], []).append(made)
        budgets = [prompt[1] for prompt in made["prompts"]]
        assert len(made["seeds"]) == sum(budgets)
        assert len({prompt[0] for prompt in made["prompts"]}) == 4
    assert list(steps) == list(range(30 // (2 if mode.get("pilot") else 1)))
    for made in steps.values():
        assert sum(len(one["seeds"]) for one in made) == 24
        assert [one["is_last"] for one in made] == [False] * (len(made) - 1) + [True]


def test_pooled_pilots_count_towards_the_budget():
    planner = make(pilot=2, minimum=1, maximum=9)
    pilots, rest = rounds(planner, 2)
    assert [prompt[1] for prompt in pilots["prompts"]] == [2, 2, 2, 2]
    assert [prompt[0] for prompt in rest["prompts"]] == [prompt[0] for prompt in pilots["prompts"]]
    assert [prompt[2:] for prompt in rest["prompts"]] == [
        (draw, 2, mean) for _, _, draw, _, mean in pilots["prompts"]
    ]
    # Both rounds are slots of one draw, so no seed comes twice.
    assert len({*pilots["seeds"], *rest["seeds"]}) == 24
    whole = [2 + prompt[1] for prompt in rest["prompts"]]
    assert sum(whole) == 24 and max(whole) <= 9


def test_pooled_budgets_are_those_of_the_allocator_with_the_pilots_as_minimum():
    planner = make(pilot=3, rollouts_per_step=22, selector=Chosen([7, 2, 5, 0]))
    pilots = planner.propose()
    # Successes 3, 2, 0 and 0 of 3.
    planner.observe(pilots, [1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0], pilots.prompt_N)
    std_P = allocation.posterior_std([4, 3, 1, 1], [1, 2, 4, 4])
    expected = allocation.neyman(std_P, 22, minimum=3) - 3
    # Costs .133, .2, .133, .133: the root of 3/2 apart, 5.2 and 6.4 of 22.
    assert expected.tolist() == [2, 4, 2, 2]
    assert planner.propose().budget_P.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("pilots", "total", "expected"),
    # p_hat = 1, 1/2, 0, so scales 1, 1.41, 0. Pooled, 21 in all of which 2 each are pilots:
    # 8, 11, 2. Discarded, 15 fresh ones, at least 1 each: 6, 8, 1.
    [("pool", 21, [6, 9, 0]), ("discard", 21, [6, 8, 1])],
)
def test_pilots_alone_decide_where_they_are_the_estimate(pilots, total, expected):
    planner = make(
        selector=Chosen([4, 9, 6]),
        prompts_per_step=3,
        rollouts_per_step=total,
        pilot=2,
        pilots=pilots,
        estimate="pilot",
        scale=allocation.inverse_sqrt,
    )
    # What earlier steps know does not count here.
    planner.posterior.add([6], [50], [50])
    proposal = planner.propose()
    planner.observe(proposal, [1, 1, 0, 1, 0, 0], proposal.prompt_N)
    assert planner.propose().budget_P.tolist() == expected


def test_a_prompt_without_a_scored_pilot_gets_its_minimum():
    planner = make(selector=Chosen([0, 1, 2, 3]), pilot=2, estimate="pilot", scale=allocation.live)
    # Row 3 lost both pilots, row 2 one of its two.
    planner.observe(planner.propose(), [1, 0, 1, 1, 1], [0, 0, 1, 1, 2])
    # 24 in all, 2 for row 3: the others share 22 of which 6 are pilots.
    budget_P = planner.propose().budget_P
    assert sorted(budget_P[:3]) == [5, 5, 6] and budget_P[3] == 0


def test_the_posterior_decays_once_a_step_and_counts_every_scored_rollout():
    planner = make(selector=Chosen([0, 1, 2, 3]), pilot=2)
    planner.posterior.add([0, 1, 9], [8, 6, 8], [8, 6, 8])
    pilots = planner.propose()
    # Two of eight pilots were not scored, both of row 1: it decays with its first scored round.
    planner.observe(pilots, [1, 1, 0, 0, 1, 0], [0, 0, 2, 2, 3, 3])
    assert planner.posterior.alpha_D[[0, 1, 2, 3, 9]].tolist() == [0.5 * 8 + 2, 6, 0, 1, 8]
    rest = planner.propose()
    planner.observe(rest, np.ones(len(rest.seed_N)), rest.prompt_N)
    assert planner.posterior.alpha_D[9] == 7.92  # not chosen: at the end of the step
    expected = np.array([6, 0.5 * 6, 0, 1]) + rest.budget_P
    assert planner.posterior.alpha_D[:4].tolist() == expected.tolist()
    assert planner.posterior.beta_D[[0, 1, 2, 3, 9]].tolist() == [0, 0, 2, 1, 0]


def test_a_prompt_none_of_whose_rollouts_was_scored_keeps_what_was_known():
    planner = make(selector=Chosen([0, 1]), prompts_per_step=2)
    planner.posterior.add([0, 1], [4, 4], [8, 8])
    proposal = planner.propose()
    planner.observe(proposal, [1.0], [1])
    assert planner.posterior.alpha_D[:2].tolist() == [0.99 * 4, 0.5 * 4 + 1]


def test_rewards_above_the_threshold_are_successes():
    planner = make(
        selector=Chosen([5]), prompts_per_step=1, rollouts_per_step=4, success_above=-0.5
    )
    planner.observe(planner.propose(), [-3, -0.5, 0, 7], [0, 0, 0, 0])
    assert (planner.posterior.alpha_D[5], planner.posterior.beta_D[5]) == (2, 2)


@pytest.mark.parametrize("mode", MODES)
def test_the_order_in_which_rollouts_finish_changes_nothing(mode):
    planner, shuffled = make(**mode), make(**mode)
    generator = np.random.default_rng(0)
    for _ in range(12):
        proposal, same = planner.propose(), shuffled.propose()
        assert decisions(proposal) == decisions(same)
        reward_N = generator.random(len(proposal.seed_N))
        order = generator.permutation(len(reward_N))
        planner.observe(proposal, reward_N, proposal.prompt_N)
        shuffled.observe(same, reward_N[order], proposal.prompt_N[order])
        np.testing.assert_array_equal(planner.posterior.alpha_D, shuffled.posterior.alpha_D)


@pytest.mark.parametrize("mode", MODES)
def test_equal_planners_decide_equally(mode):
    assert rounds(make(**mode), 12) == rounds(make(**mode), 12)
    assert rounds(make(**mode), 12) != rounds(make(**mode, seed=1), 12)


@pytest.mark.parametrize("mode", MODES)
def test_a_shuffle_of_the_rows_changes_nothing(mode):
    shuffled = [KEYS[row] for row in np.random.default_rng(0).permutation(10)]
    expected, found = rounds(make(**mode), 12), rounds(make(shuffled, **mode), 12, shuffled)
    assert expected == found


@pytest.mark.slow
@given(
    order=st.permutations(range(10)),
    counts=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=10, max_size=10),
    rollouts=st.integers(20, 50),
)
@settings(max_examples=50)
def test_budgets_belong_to_keys_whatever_rows_and_places_they_are_in(order, counts, rollouts):
    # The selector knows no keys, and many posteriors are equal: ties must go by key as well.
    def budgets(rows):
        keys = [KEYS[row] for row in rows]
        planner = make(
            keys,
            selector=UniformSelector(10, seed=0),
            prompts_per_step=10,
            rollouts_per_step=rollouts,
        )
        successes, failures = np.array([counts[row] for row in rows]).T
        planner.posterior.add(range(10), successes, successes + failures)
        proposal = planner.propose()
        named = [keys[row] for row in proposal.index_P]
        seeds = np.split(proposal.seed_N, np.cumsum(proposal.budget_P)[:-1])
        return {
            key: (budget.item(), seed_n.tolist())
            for key, budget, seed_n in zip(named, proposal.budget_P, seeds, strict=True)
        }

    assert budgets(order) == budgets(range(10))


def test_what_does_not_divide_goes_to_no_prompt_for_good():
    planner = make(
        prompts_per_step=10, rollouts_per_step=25, allocate=allocation.uniform, minimum=0
    )
    extra = dict.fromkeys(KEYS, 0)
    for made in rounds(planner, 200):
        for key, budget, *_ in made["prompts"]:
            extra[key] += budget - 2
    # Each gets a third rollout half of the time: 100 of 200, standard deviation 7.
    assert max(abs(count - 100) for count in extra.values()) < 4 * 7.1


def test_seeds_never_come_twice_and_draws_are_numbered():
    planner = make(pilot=2)
    seeds, draws = [], {}
    for made in rounds(planner, 60):
        seeds += made["seeds"]
        for key, _, draw, _, _ in made["prompts"]:
            draws.setdefault(key, []).append(draw)
    assert len(set(seeds)) == len(seeds) == 30 * 24
    for numbers in draws.values():
        assert numbers == [draw for draw in range(len(numbers) // 2) for _ in range(2)]


def test_a_steps_rewards_decide_the_next_step_and_not_their_own():
    planners = [make(prompts_per_step=10, rollouts_per_step=60) for _ in range(2)]
    rounds(planners[0], 3), rounds(planners[1], 3)
    proposals = [planner.propose() for planner in planners]
    assert decisions(proposals[0]) == decisions(proposals[1])
    for planner, proposal, sign in zip(planners, proposals, (1, -1), strict=True):
        reward_N = (sign * (proposal.prompt_N - 4.5) > 0).astype(float)
        planner.observe(proposal, reward_N, proposal.prompt_N)
    after = [planner.propose() for planner in planners]
    # The uniform selector does not look at rewards, the budgets do.
    assert after[0].index_P.tolist() == after[1].index_P.tolist()
    assert after[0].budget_P.tolist() != after[1].budget_P.tolist()


def test_the_proposal_in_flight_is_not_moved_by_what_the_posterior_learns():
    planner = make()
    before = decisions(planner.propose())
    planner.posterior.add([0, 1], [8, 1], [8, 8])
    planner.observe_gradient_norms([0, 1], [3.0, 9.0])
    assert decisions(planner.propose()) == before


def test_allocation_reads_the_posterior_itself():
    planner = make(selector=Chosen([0, 1], [0, 1]), prompts_per_step=2, rollouts_per_step=20)
    proposal = planner.propose()
    assert proposal.budget_P.tolist() == [10, 10]
    planner.observe(proposal, [], [])
    planner.posterior.beta_D[0] = 1000.0
    assert planner.propose().budget_P.tolist()[0] < 5


def test_an_allocator_of_the_posterior_is_given_its_parameters():
    seen = []

    def allocate(a_P, b_P, total, *, minimum, maximum):
        seen.append((a_P, b_P))
        return allocation.uniform(a_P, total, minimum=minimum, maximum=maximum)

    planner = make(allocate=allocate, scale=None)
    for _ in range(3):
        proposal = planner.propose()
        a_P, b_P = planner.posterior.parameters(proposal.index_P)
        # The planner asks in an order of its own, that of a hash.
        assert sorted(zip(*seen[-1], strict=True)) == sorted(zip(a_P, b_P, strict=True))
        planner.observe(proposal, rewards(proposal), proposal.prompt_N)
    with pytest.raises(ValueError, match="gradient norms multiply a scale"):
        planner.observe_gradient_norms([0], [1.0])
    with pytest.raises(ValueError, match="lengths divide a scale"):
        planner.observe_lengths([0], [1.0])
    with pytest.raises(ValueError, match="needs a scale that takes counts, got scale=None"):
        make(allocate=allocate, scale=None, pilot=1, estimate="pilot")


def test_a_scale_that_draws_is_given_the_generator_of_the_step():
    seen = []

    def scale(a_P, b_P, *, generator):
        seen.append(generator.random())
        return np.ones(len(a_P))

    planner = make(scale=scale)
    rounds(planner, 3)
    assert seen[0] == seen[1]  # the trial of the settings draws what step 0 will
    assert seen[1:] == [step_generator(0, "scale", step).random() for step in range(3)]


def test_no_evidence_means_uniform_budgets():
    planner = make(prompts_per_step=10, rollouts_per_step=30)
    assert planner.propose().budget_P.tolist() == [3] * 10


def test_gradient_norms_scale_the_steps_after_the_one_they_were_measured_in():
    planner = make(
        selector=Chosen([0, 1, 2, 3], [0, 1, 2, 3]), rollouts_per_step=40, pilot=1, scale=flat
    )
    pilots = planner.propose()
    planner.observe(pilots, [1, 0, 1, 0], [0, 1, 2, 3])
    planner.observe_gradient_norms([0, 1], [1.0, 3.0])
    rest = planner.propose()
    assert rest.budget_P.tolist() == [9, 9, 9, 9]
    planner.observe(rest, np.zeros(36), rest.prompt_N)
    planner.observe_gradient_norms([0], [2.0])
    pilots = planner.propose()
    planner.observe(pilots, [1, 0, 1, 0], [0, 1, 2, 3])
    # The last norms are 2 and 3; rows 2 and 3 take their mean: 2 : 3 : 2.5 : 2.5 of 40.
    assert (planner.propose().budget_P + 1).tolist() == [8, 12, 10, 10]


def flat(a_P, b_P):
    return np.ones(len(a_P))


def test_without_any_measured_norm_all_are_one():
    planner = make(selector=Chosen([0, 1], [2, 3]), prompts_per_step=2, scale=flat)
    planner.observe(planner.propose(), [], [])
    planner.observe_gradient_norms([7, 8], [5.0, 0.0])
    assert planner.propose().budget_P.tolist() == [12, 12]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kill", range(13))
def test_a_run_killed_anywhere_and_resumed_decides_the_same(mode, kill):
    # Even kills fall between rounds, odd ones while a round is in flight.
    def prepare():
        planner = make(**mode)
        if mode.get("scale", "default") is not None:
            planner.observe_gradient_norms([0, 5], [0.5, 2.0])
        return planner

    whole = rounds(prepare(), 12)
    killed = prepare()
    made = rounds(killed, kill // 2)
    if kill % 2:
        killed.propose()
    state = through_a_file(killed.state_dict())
    metrics = killed.metrics()
    rounds(killed, 3)  # what the dead run did after its checkpoint does not matter

    resumed = make(**mode)
    resumed.load_state_dict(state)
    assert resumed.metrics() == metrics
    assert made + rounds(resumed, 12 - kill // 2) == whole
    original = prepare()
    rounds(original, 12)
    assert_same_state(resumed.state_dict(), original.state_dict())


def assert_same_state(one, other):
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_same_state(one[name], other[name])
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    else:
        assert one == other


def test_a_round_is_proposed_until_it_is_observed():
    planner = make(pilot=2)
    for _ in range(4):
        proposal = planner.propose()
        assert decisions(planner.propose()) == decisions(proposal)
        planner.observe(proposal, rewards(proposal), proposal.prompt_N)


def test_a_proposal_kept_from_before_the_restart_may_be_observed():
    planner, resumed = make(), make()
    proposal = planner.propose()
    resumed.load_state_dict(planner.state_dict())
    resumed.observe(proposal, rewards(proposal), proposal.prompt_N)
    assert resumed.propose().step == 1


def test_a_state_is_a_copy():
    planner = make()
    rounds(planner, 2)
    state = planner.state_dict()
    kept = copy.deepcopy(state)
    rounds(planner, 2)
    planner.observe_gradient_norms([1], [1.0])
    assert_same_state(state, kept)
    resumed = make()
    resumed.load_state_dict(state)
    rounds(resumed, 2)
    assert_same_state(state, kept)


def test_the_ledger_of_a_planned_run_balances():
    planner, ledger = make(pilot=2), Ledger()
    for step in range(6):
        ledger.begin(step)
        seen = []
        while True:
            proposal = planner.propose()
            reward_N, prompt_N = rewards(proposal), proposal.prompt_N
            failed_N = proposal.seed_N % 11 == 0
            ledger.drawn(
                len(reward_N), 7 * len(reward_N), kind="rollout" if proposal.is_last else "pilot"
            )
            ledger.account("failed", failed_N.sum(), 7 * failed_N.sum(), reason="timeout")
            planner.observe(proposal, reward_N[~failed_N], prompt_N[~failed_N])
            seen.append((reward_N[~failed_N], prompt_N[~failed_N]))
            if proposal.is_last:
                break
        reward_N, prompt_N = (np.concatenate(column) for column in zip(*seen, strict=True))
        for place in np.unique(prompt_N):
            group = reward_N[prompt_N == place]
            decision = planner.admit(group)
            fate = "trained" if decision.kept else "filtered"
            reason = "" if decision.kept else decision.reason
            ledger.account(fate, len(group), 7 * len(group), reason=reason)
        ledger.end()
    totals = ledger.totals
    assert totals["rollouts_drawn"] == 6 * 24
    assert totals["rollouts_drawn_pilot"] == 6 * 8
    assert totals["rollouts_failed"] > 0 and totals["rollouts_filtered"] > 0


@pytest.mark.parametrize(
    ("reward_n", "kept", "reason"),
    [
        ([1, 0, 1], True, "mixed"),
        ([0.3, 0.3, 0.4], True, "mixed"),
        ([1, 1], False, "all_pass"),
        ([0.3, 0.3, 0.3], False, "all_fail"),
        ([0, 0, 0], False, "all_fail"),
        ([1], False, "lone"),
        ([0], False, "lone"),
    ],
)
def test_a_group_is_kept_for_its_spread(reward_n, kept, reason):
    decision = make().admit(reward_n)
    assert (decision.kept, decision.reason) == (kept, reason)


def test_passing_is_what_the_success_threshold_says():
    planner = make(success_above=0.5)
    assert planner.admit([0.4, 0.4]).reason == "all_fail"
    assert planner.admit([0.6, 0.6]).reason == "all_pass"


def test_metrics_by_hand():
    planner = make(selector=Chosen([0, 1, 2, 3], [4, 0]), rollouts_per_step=10, minimum=1)
    assert planner.metrics() == {
        "planner/posterior_mean": 0.5,
        "planner/coverage": 0,
        "planner/prompts_visited": 0,
        "planner/visits_max": 0,
        "planner/steps_unvisited_max": 0,
        "planner/gradient_norm_coverage": 0,
    }
    planner.posterior.add([0], [0], [38])
    proposal = planner.propose()
    # Costs 39 / (40 * 41) = .024 for row 0 and 1/6 for the others.
    assert sorted(proposal.budget_P.tolist()) == [1, 3, 3, 3]
    reward_N = np.choose(proposal.prompt_N, [1.0, 0.0, 1.0, 0.0])
    reward_N[-1] = 1.0  # row 3 is mixed, row 0 alone, row 1 all failed, row 2 all passed
    planner.observe(proposal, reward_N, proposal.prompt_N)
    planner.observe_gradient_norms([3], [2.0])
    # Row 0 holds Beta(1 + 1, 1 + 38 / 2), rows 1 to 3 Beta(1, 4), (4, 1), (2, 3).
    mean = (2 / 22 + 1 / 5 + 4 / 5 + 2 / 5 + 6 * 0.5) / 10
    metrics = planner.metrics()
    assert 0 <= metrics.pop("planner/calibration_pit_ends") <= 1  # see test_calibration.py
    assert metrics == pytest.approx(
        {
            # Row 0 passed its only rollout, which Beta(1, 39) gives 1/40; each of 0..3 of 3 has 1/4.
            "planner/calibration_log_score": (math.log(1 / 40) + 3 * math.log(1 / 4)) / 4,
            # Row 0 was given 1/40 and the others, all in one decile, 1/2: 5 of 9 passed.
            "planner/calibration_error": (39 / 40 + abs(5 - 4.5)) / 10,
            "planner/posterior_mean": mean,
            "planner/coverage": 0.4,
            "planner/prompts_visited": 4,
            "planner/visits_max": 1,
            "planner/steps_unvisited_max": 1,
            "planner/gradient_norm_coverage": 0.1,
            "planner/step": 0,
            "planner/posterior_mean_chosen": (1 / 40 + 3 * 0.5) / 4,
            "planner/budget_min": 1,
            "planner/budget_mean": 2.5,
            "planner/budget_max": 3,
            "planner/budget_std": 0.75**0.5,
            "planner/share_mixed": 0.25,
            "planner/share_all_pass": 0.25,
            "planner/share_all_fail": 0.25,
            "planner/share_lone": 0.25,
            "planner/share_unscored": 0,
        }
    )


def test_metrics_pool_the_rounds_of_a_step():
    planner = make(selector=Chosen([0, 1]), prompts_per_step=2, rollouts_per_step=4, pilot=1)
    planner.observe(planner.propose(), [1.0], [0])
    metrics = planner.metrics()
    assert (metrics["planner/share_lone"], metrics["planner/share_unscored"]) == (0.5, 0.5)
    planner.observe(planner.propose(), [0.0, 0.0], [0, 1])
    metrics = planner.metrics()
    assert (metrics["planner/share_mixed"], metrics["planner/share_lone"]) == (0.5, 0.5)
    assert metrics["planner/budget_mean"] == 2


@pytest.mark.parametrize(
    ("reward_N", "prompt_N", "message"),
    [
        ([0.5, float("nan")], [1, 0], r"rewards must be finite; got nan for prompt key 3 "),
        ([float("inf")], [1], "rewards must be finite; got inf for prompt key 1"),
        ([1, 1], [0], r"equally long, got \(2,\) and \(1,\)"),
        ([1], [2], r"places in index_P, in \[0, 2\), got \[2\]"),
        ([1], [-1], r"places in index_P, in \[0, 2\), got \[-1\]"),
        ([1], [0.0], "must be integer places"),
        ([1] * 4, [0] * 4, "prompt key 3 has 4 rewards for 3 rollouts"),
    ],
)
def test_rewards_that_cannot_be_are_refused_and_nothing_is_learnt(reward_N, prompt_N, message):
    planner = make(selector=Chosen([3, 1]), prompts_per_step=2, rollouts_per_step=6)
    proposal = planner.propose()
    before = planner.state_dict()
    with pytest.raises(ValueError, match=message):
        planner.observe(proposal, reward_N, prompt_N)
    assert_same_state(planner.state_dict(), before)


def test_not_finite_rewards_are_refused_with_a_threshold_too():
    planner = make(selector=Chosen([3]), prompts_per_step=1, success_above=0.0)
    with pytest.raises(ValueError, match="rewards must be finite; got nan"):
        planner.observe(planner.propose(), [float("nan")], [0])


def test_a_proposal_is_observed_once_and_by_its_own_planner():
    planner = make(pilot=2)
    pilots = planner.propose()
    planner.observe(pilots, rewards(pilots), pilots.prompt_N)
    with pytest.raises(ValueError, match=r"step 0, round 0 is not in flight \(none is\)"):
        planner.observe(pilots, rewards(pilots), pilots.prompt_N)
    planner.propose()
    with pytest.raises(ValueError, match=r"not in flight \(step 0, round 1 is"):
        planner.observe(pilots, rewards(pilots), pilots.prompt_N)
    other, fresh = make(seed=1, pilot=2).propose(), make(pilot=2)
    fresh.propose()
    with pytest.raises(ValueError, match=r"step 0, round 0 is, with its own prompts\): each"):
        fresh.observe(other, rewards(other), other.prompt_N)


def test_what_a_proposal_holds_cannot_be_changed():
    proposal = make().propose()
    for name in ("index_P", "budget_P", "draw_P", "first_slot_P", "a_P", "b_P", "seed_N"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(proposal, name)[0] = 0


def test_another_data_set_or_seed_is_refused():
    state = make().state_dict()
    for keys in (KEYS[::-1], [*KEYS[:9], "other"]):
        with pytest.raises(ValueError, match="the checkpoint was made with another data set"):
            make(keys).load_state_dict(state)
    with pytest.raises(ValueError, match="made with run_seed=0, this run has 1"):
        make(seed=1).load_state_dict(state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"keys": ["a", "b", "a"], "selector": Chosen()},
            "rows 0 and 2 of the data set share the key 'a'",
        ),
        ({"prompts_per_step": 11}, r"prompts_per_step must be in \[1, 10\], .* got 11"),
        ({"prompts_per_step": 0}, r"prompts_per_step must be in \[1, 10\], .* got 0"),
        ({"rollouts_per_step": 3}, "total=3 cannot give 4 prompts 1 rollouts each"),
        ({"maximum": 5}, "total=24 exceeds what 4 prompts may get; it must be at most 20"),
        ({"pilot": 6}, "leaves nothing to allocate after 6 pilots of 4 prompts; it must exceed 24"),
        ({"pilot": -1}, "pilot must be at least 0, got -1"),
        ({"estimate": "pilot"}, "pilot must be at least 1, got 0"),
        ({"estimate": "pilots"}, "estimate must be 'posterior' or 'pilot', got 'pilots'"),
        ({"pilots": "keep"}, "pilots must be 'pool' or 'discard', got 'keep'"),
        ({"pilot": 5, "pilots": "discard", "minimum": 2}, "total=4 cannot give 4 prompts 2"),
        ({"allocate": lambda std, total, **box: std}, "the allocator must give 4 integers"),
        ({"scale": lambda a, b: allocation.gvm(a, b, alpha=0)}, "alpha must be positive"),
        ({"allocate": allocation.leave_one_out}, "minimum must be at least 2, got 1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_keys_and_posterior_must_be_of_one_data_set():
    with pytest.raises(ValueError, match="there are 2 keys but the posterior has 3 prompts"):
        Planner(
            BetaPosterior(3),
            UniformSelector(3, seed=0),
            allocation.neyman,
            keys=["a", "b"],
            prompts_per_step=1,
            rollouts_per_step=1,
        )


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ([1, 1, 2, 3], r"rows must be distinct and in \[0, 10\), got \[1, 1, 2, 3\]"),
        ([1, 2, 3, 10], "rows must be distinct"),
        ([1, 2, 3], r"the selector chose an array of shape \(3,\), expected \(4,\)"),
    ],
)
def test_a_selector_that_breaks_its_contract_is_refused(chosen, message):
    with pytest.raises(ValueError, match=message):
        make(selector=Chosen(chosen)).propose()


def test_norms_that_cannot_be_are_refused():
    planner = make()
    with pytest.raises(ValueError, match="finite and non-negative, got nan for prompt key 4"):
        planner.observe_gradient_norms([3, 4], [1.0, float("nan")])
    with pytest.raises(ValueError, match=r"rows must be distinct and in \[0, 10\), got \[3, 3\]"):
        planner.observe_gradient_norms([3, 3], [1.0, 2.0])
    with pytest.raises(ValueError, match=r"equally long, got \(1,\) and \(2,\)"):
        planner.observe_gradient_norms([3], [1.0, 2.0])
    planner.observe_gradient_norms([], [])
    with pytest.raises(ValueError, match="lengths must be finite and positive, got 0.0 for prompt"):
        planner.observe_lengths([3], [0.0])


def test_lengths_move_rollouts_to_where_they_are_short():
    """As neyman does of std / sqrt(length): from the next step on, and also after a restart."""
    planner = make(selector=Chosen(*[[0, 1, 2]] * 3), prompts_per_step=3, rollouts_per_step=30)
    planner.posterior.alpha_D[:3] = planner.posterior.beta_D[:3] = [3.0, 5.0, 8.0]
    first = planner.propose()
    planner.observe_lengths([0, 2], [4.0, 64.0])
    assert planner.propose() is first
    planner.observe(first, [], [])
    restarted = make(selector=Chosen(*[[0, 1, 2]] * 3), prompts_per_step=3, rollouts_per_step=30)
    restarted.load_state_dict(planner.state_dict())
    a_P, b_P = planner.posterior.parameters(np.array([0, 1, 2]))
    length_P = np.array([4.0, 34.0, 64.0])  # the one not measured has the mean
    expected = allocation.neyman(allocation.posterior_std(a_P, b_P) / np.sqrt(length_P), 30)
    for one in (planner, restarted):
        assert one.propose().budget_P.tolist() == expected.tolist()
    assert expected[0] > 2 * expected[2] and first.budget_P.max() - first.budget_P.min() <= 1


@pytest.mark.parametrize("reward_n", [[], [float("nan"), 1.0]])
def test_no_group_and_no_number_are_refused(reward_n):
    with pytest.raises(ValueError, match="reward_n must be 1-d, finite and not empty"):
        make().admit(reward_n)


def test_rows_of_an_open_step_cannot_be_excluded_any_more():
    planner = make(selector=Chosen([3, 1]), prompts_per_step=2, rollouts_per_step=6)
    proposal = planner.propose()
    with pytest.raises(ValueError, match=r"step 0 is open, and its prompts hold rows \[1\]"):
        planner.propose(exclude=[1, 5])
    assert planner.propose(exclude=[5]) is proposal


def test_a_state_holds_nothing_that_changes_and_names_its_data_set_once(monkeypatch):
    planner = make()
    planner.observe_gradient_norms([2], [4.0])
    before = planner.state_dict()
    assert before["norm_D"].flags.writeable is False
    monkeypatch.setattr("samplers.planner.fingerprint", lambda keys: 1 / 0)
    planner.load_state_dict(planner.state_dict())
    planner.observe_gradient_norms([2], [9.0])
    assert before["next_norm_D"][2] == 4
    assert planner.state_dict()["next_norm_D"][2] == 9


def discarding(**settings):
    chosen = {"selector": Chosen([0, 1]), "prompts_per_step": 2, "rollouts_per_step": 16}
    pilots = {"pilot": 2, "pilots": "discard", "estimate": "pilot", "scale": allocation.gvm_plug_in}
    return make(**chosen | pilots | {"minimum": 0} | settings)


def test_norms_of_discarded_pilots_act_in_their_own_step():
    planner = discarding()
    pilots = planner.propose()
    planner.observe(pilots, [1, 0, 1, 0], pilots.prompt_N)
    planner.observe_gradient_norms([0, 1], [3.0, 1.0], at_once=True)
    # 16 - 4 pilots, by equal pass rates and norms of 3 to 1.
    assert planner.propose().budget_P.tolist() == [9, 3]
    resumed = discarding()
    resumed.load_state_dict(planner.state_dict())
    assert resumed.propose().budget_P.tolist() == [9, 3]


def test_a_prompt_none_of_whose_pilots_passed_may_get_nothing_more():
    planner = discarding()
    pilots = planner.propose()
    planner.observe(pilots, [1, 0, 0, 0], pilots.prompt_N)
    rest = planner.propose()
    assert rest.budget_P.tolist() == [12, 0]
    planner.observe(rest, np.ones(12), rest.prompt_N)


@pytest.mark.parametrize("settings", [{"pilots": "pool"}, {"pilot": 0, "estimate": "posterior"}])
def test_norms_of_rollouts_that_train_never_act_at_once(settings):
    planner = discarding(**settings)
    rollouts = planner.propose()
    planner.observe(rollouts, [1.0, 0.0], [0, 1])
    with pytest.raises(ValueError, match="only between pilots that are discarded and the round"):
        planner.observe_gradient_norms([0], [3.0], at_once=True)


def test_norms_act_at_once_before_the_round_is_proposed_and_not_later():
    planner = discarding()
    pilots = planner.propose()
    with pytest.raises(ValueError, match="only between pilots"):
        planner.observe_gradient_norms([0], [3.0], at_once=True)
    planner.observe(pilots, [1, 0, 1, 0], pilots.prompt_N)
    planner.propose()
    with pytest.raises(ValueError, match="only between pilots"):
        planner.observe_gradient_norms([0], [3.0], at_once=True)
