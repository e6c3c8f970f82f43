"""What the planner refuses, and that it is then as before; decay over the rounds of a step."""

import functools

import numpy as np
import pytest

from samplers import allocation, stopping
from samplers.planner import Planner
from samplers.posterior import BetaPosterior

KEYS = [f"key {i}" for i in range(6)]


class Rows:
    """The first rows, always."""

    def select(self, num_prompts, *, generator, exclude=()):
        return np.setdiff1d(np.arange(len(KEYS)), exclude)[:num_prompts]

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Chosen(Rows):
    """The rows of `calls`, one entry per selection."""

    def __init__(self):
        self.calls = []

    def select(self, num_prompts, *, generator, exclude=()):
        return np.array(self.calls.pop(0))


def make(*, allocate=allocation.uniform, decays=(0.2, 0.999), selector=None, **settings):
    posterior = BetaPosterior(len(KEYS), decay_chosen=decays[0], decay_rest=decays[1])
    settings = {"prompts_per_step": 2, "rollouts_per_step": 16} | settings
    return Planner(posterior, selector or Rows(), allocate, keys=KEYS, **settings)


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other, equal_nan=True)
    return one == other


def going_on(counts):
    return np.ones(len(counts.a_P), dtype=bool)


IN_ROUNDS = {"stopping": going_on, "round_size": 2}
ROUNDS = [{"pilot": 2}, {"pilot": 2, "pilots": "discard"}, IN_ROUNDS]


# -- decay


@pytest.mark.parametrize("settings", ROUNDS)
def test_a_prompt_is_decayed_as_chosen_in_its_first_scored_round(settings):
    planner = make(**settings)
    planner.posterior.add([0, 1, 5], [10, 10, 10], [10, 14, 10])
    alpha_D, beta_D = planner.posterior.alpha_D, planner.posterior.beta_D
    first = planner.propose()
    planner.observe(first, [1.0, 0.0], [1, 1])  # nothing of row 0
    assert (alpha_D[0], alpha_D[1], beta_D[1]) == (10, 0.2 * 10 + 1, 0.2 * 4 + 1)
    second = planner.propose()
    num_passed = second.budget_P[0]
    planner.observe(second, np.ones(num_passed), np.zeros(num_passed, dtype=int))
    assert (alpha_D[0], beta_D[0]) == (0.2 * 10 + num_passed, 0)
    while planner.is_open:
        proposal = planner.propose()
        planner.observe(proposal, np.ones(len(proposal.seed_N)), proposal.prompt_N)
    # Row 1 once as chosen, row 5 once as not chosen, and rollouts of all rounds are counted.
    scored = 16 - 2 * 2 if "round_size" in settings else num_passed
    assert alpha_D[0] + beta_D[0] == 0.2 * 10 + (6 if "round_size" in settings else scored)
    assert alpha_D[5] == 0.999 * 10


def test_the_specified_example():
    # alpha 10, decays .2 and .999, pilots not scored, then 6 of 6: .2 * 10 + 6.
    planner = make(pilot=2)
    planner.posterior.add([0], [10], [10])
    planner.observe(planner.propose(), [0.0, 1.0], [1, 1])
    rest = planner.propose()
    assert rest.budget_P.tolist() == [6, 6]
    planner.observe(rest, np.ones(6), np.zeros(6, dtype=int))
    assert planner.posterior.alpha_D[0] == 8


@pytest.mark.parametrize("settings", ROUNDS)
def test_a_prompt_no_round_of_which_was_scored_decays_once_as_not_chosen(settings):
    planner = make(**settings)
    planner.posterior.add([0, 5], [10, 10], [12, 12])
    while True:
        planner.observe(planner.propose(), [], [])
        if not planner.is_open:
            break
        assert planner.posterior.alpha_D[0] == 10
    assert planner.posterior.alpha_D[[0, 5]].tolist() == [0.999 * 10] * 2
    assert planner.posterior.beta_D[[0, 5]].tolist() == [0.999 * 2] * 2


@pytest.mark.parametrize("settings", ROUNDS)
@pytest.mark.parametrize("kill", range(6))
def test_what_is_still_to_decay_survives_a_restart(settings, kill):
    def advance(planner, rounds):
        for at in rounds:
            proposal = planner.propose()
            # Row 0 is scored in every third round only, row 1 in every second.
            scored_N = np.where(proposal.prompt_N == 0, at % 3 == 2, at % 2 == 1)
            passed_N = (proposal.seed_N % 2).astype(float)
            planner.observe(proposal, passed_N[scored_N], proposal.prompt_N[scored_N])

    whole, killed, resumed = make(**settings), make(**settings), make(**settings)
    for planner in (whole, killed):
        planner.posterior.add([0, 1, 5], [10, 3, 2], [12, 12, 12])
    advance(whole, range(6))
    advance(killed, range(kill))
    resumed.load_state_dict(killed.state_dict())
    advance(resumed, range(kill, 6))
    assert same(resumed.state_dict(), whole.state_dict())


def refilled(planner, training_step, selections, *, scored=(True, True)):
    """A training step of several selections, in which rows pass if their seed is even."""
    planner.begin(training_step)
    for index_P in selections:
        planner.selector.calls.append(index_P)
        while True:
            proposal = planner.propose()
            rows_N = np.repeat(scored, proposal.budget_P)
            passed_N = (proposal.seed_N % 2).astype(float)
            planner.observe(proposal, passed_N[rows_N], proposal.prompt_N[rows_N])
            if not planner.is_open:
                break


@pytest.mark.parametrize("settings", [{}, *ROUNDS])
def test_selections_of_one_training_step_decay_once(settings):
    planner = make(decays=(0.5, 0.75), **settings, selector=Chosen())
    planner.posterior.add(range(6), [8] * 6, [8] * 6)
    alpha_D, beta_D = planner.posterior.alpha_D, planner.posterior.beta_D
    refilled(planner, 0, [[0, 1], [2, 3], [1, 4]])
    trials_D = np.array([1, 2, 1, 1, 1, 0]) * 8
    remembered_D = np.array([4, 4, 4, 4, 4, 8])
    assert (alpha_D + beta_D).tolist() == (remembered_D + trials_D).tolist()
    before_D = alpha_D.copy()
    planner.begin(0)  # again: nothing happens
    assert (alpha_D == before_D).all()
    planner.begin(1)  # row 5 was not chosen
    assert alpha_D.tolist() == [*before_D[:5], 6]
    refilled(planner, 1, [[5, 0]], scored=(True, False))  # nothing of row 0 is scored
    planner.begin(2)
    assert alpha_D[1] == 0.75 * before_D[1] and alpha_D[0] == 0.75 * before_D[0]
    assert alpha_D[5] + beta_D[5] == 0.5 * 6 + 8


def test_one_selection_a_training_step_learns_the_same_begun_or_not():
    one, other = (make(selector=Chosen()) for _ in range(2))
    for step, index_P in enumerate([[0, 1], [2, 3], [0, 4]]):
        refilled(one, step, [index_P])
        other.selector.calls.append(index_P)
        proposal = other.propose()
        other.observe(proposal, (proposal.seed_N % 2).astype(float), proposal.prompt_N)
    one.begin(3)
    assert one.posterior.alpha_D.tolist() == other.posterior.alpha_D.tolist()
    assert one.posterior.beta_D.tolist() == other.posterior.beta_D.tolist()


def test_a_training_step_that_was_killed_between_its_selections_goes_on():
    whole, killed, resumed = (make(selector=Chosen()) for _ in range(3))
    refilled(whole, 0, [[0, 1], [2, 3], [1, 4]])
    refilled(killed, 0, [[0, 1]])
    resumed.load_state_dict(killed.state_dict())
    refilled(resumed, 0, [[2, 3], [1, 4]])
    for planner in (whole, resumed):
        planner.begin(1)
    assert same(resumed.state_dict(), whole.state_dict())


def test_a_training_step_begins_in_order_and_between_selections():
    planner = make()
    planner.begin(3)
    with pytest.raises(ValueError, match="training step 2 cannot begin after training step 3"):
        planner.begin(2)
    planner.propose()
    with pytest.raises(ValueError, match="observe all rounds of the open step 0 first"):
        planner.begin(4)
    planner.begin(3)


# -- norms and lengths


def spends(planner, rounds):
    budgets = []
    for _ in range(rounds):
        proposal = planner.propose()
        budgets.append(proposal.budget_P.tolist())
        planner.observe(proposal, proposal.seed_N % 3 == 0, proposal.prompt_N)
    return budgets


@pytest.mark.parametrize(
    ("allocate", "scale"),
    [
        (allocation.uniform, allocation.posterior_std),
        (allocation.neyman, allocation.posterior_std),
        (allocation.neyman, allocation.gvm),
        (allocation.neyman, lambda a_P, b_P: 3 * a_P / b_P),
        (allocation.leave_one_out, allocation.mean_std),
        (allocation.dr_grpo, allocation.plug_in_std),
        (allocation.knapsack, allocation.mean_pass_rate),
        (allocation.knapsack, functools.partial(allocation.mean_pass_rate)),
        (allocation.knapsack, lambda a_P, b_P: a_P / (a_P + b_P)),
        (functools.partial(allocation.knapsack, maximum=None), allocation.mean_pass_rate),
        (allocation.knapsack_posterior, None),
    ],
)
@pytest.mark.parametrize("call", ["observe_lengths", "observe_gradient_norms"])
@pytest.mark.parametrize("equal", [4.0, 0.37, 1000.0])
def test_equal_numbers_change_no_budget_or_are_refused(allocate, scale, call, equal):
    settings = {"prompts_per_step": 6, "rollouts_per_step": 60, "scale": scale, "minimum": 3}
    plain, told = make(**settings, allocate=allocate), make(**settings, allocate=allocate)
    if scale is None or allocate in (allocation.knapsack,) or "knapsack" in repr(allocate):
        with pytest.raises(ValueError, match=r"scale=|given pass rates"):
            getattr(told, call)(np.arange(6), np.full(6, equal))
        assert same(told.state_dict(), plain.state_dict())
    else:
        getattr(told, call)(np.arange(6), np.full(6, equal))
    budgets = spends(plain, 4)
    assert budgets == spends(told, 4)
    assert allocate is allocation.uniform or len(set(map(tuple, budgets))) > 1


# -- scales of pilots


@pytest.mark.parametrize("name", ["log_std", "mean_std", "gvm", "thompson_std"])
def test_a_scale_that_takes_no_counts_is_refused_before_the_first_pilot(name):
    scale = getattr(allocation, name)
    settings = {"pilot": 2, "scale": scale, "allocate": allocation.neyman}
    with pytest.raises(
        ValueError, match=rf"{name} cannot take 2 pilots without a success: .* plug"
    ):
        make(**settings, estimate="pilot")
    make(**settings)


def test_a_scale_that_wants_a_failure_is_refused_too():
    def odds(a_P, b_P):
        with np.errstate(divide="ignore"):
            return a_P / b_P

    with pytest.raises(
        ValueError, match=r"odds cannot take 3 pilots without a failure: it gives inf"
    ):
        make(pilot=3, estimate="pilot", scale=odds)


@pytest.mark.parametrize(
    "name",
    ["plug_in_std", "accepted_std", "gvm_plug_in", "inverse_sqrt", "live", "reinforce_ada_std"],
)
@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_scales_that_take_counts_live_through_pilots_all_alike(name, reward):
    planner = make(
        pilot=2, estimate="pilot", scale=getattr(allocation, name), allocate=allocation.neyman
    )
    proposal = planner.propose()
    planner.observe(proposal, np.full(4, reward), proposal.prompt_N)
    assert planner.propose().budget_P.tolist() == [6, 6]


# -- stopping rules


def answering(*answers):
    """A rule of given answers, one per round."""
    answers = list(answers)

    def rule(counts):
        return answers.pop(0)

    return rule


GO = np.ones(2, dtype=bool)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((GO, [1.0, np.nan]), r"weights must be finite and non-negative, got \[1.0, nan\]"),
        ((GO, [np.inf, 1.0]), "weights must be finite and non-negative, got"),
        ((GO, [1.0, -0.5]), "weights must be finite and non-negative, got"),
        ((GO, [1.0, 1.0, 1.0]), r"must give 2 weights, got shape \(3,\)"),
        ((GO, 1.0), r"must give 2 weights, got shape \(\)"),
        ((GO, [1.0, 1.0], [1.0, 1.0]), "booleans, or booleans and weights, got 3 columns"),
        (np.ones(3, dtype=bool), "must give 2 booleans"),
        (None, "must give 2 booleans"),
    ],
)
def test_a_rule_that_answers_wrongly_leaves_the_planner_as_it_was(answer, message):
    planner = make(stopping=answering(answer, GO), round_size=2)
    planner.posterior.add([0], [10], [10])
    proposal = planner.propose()
    before = planner.state_dict()
    with pytest.raises(ValueError, match=message):
        planner.observe(proposal, [1, 0, 1, 0], proposal.prompt_N)
    assert same(planner.state_dict(), before)
    planner.observe(proposal, [1, 0, 1, 0], proposal.prompt_N)
    assert planner.posterior.alpha_D[0] == 0.2 * 10 + 1 and planner.propose().round == 1


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        # A prompt that goes on has the largest of its weights, one that stops its last.
        ([(GO, [0.5, 2.0])] * 3, [0.5, 2.0]),
        ([(GO, [0.5, 2.0]), (GO, [0.25, 1.0]), (GO, [0.25, 3.0])], [0.5, 3.0]),
        ([(GO, [0.5, 2.0]), (~GO, [0.25, 0.0])], [0.25, 0.0]),
        ([(np.array([True, False]), [0.5, 0.0]), *[(GO, [0.5, 9.0])] * 2], [0.5, 0.0]),
        ([GO, (GO, [0.5, 2.0]), GO], [0.5, 2.0]),
        ([(np.array([True, False])), *[(GO, [0.5, 9.0])] * 2], [0.5, 1.0]),
        ([GO] * 3, [1.0, 1.0]),
    ],
)
def test_weights_below_1_survive(answers, expected):
    planner = make(stopping=answering(*answers), round_size=2)
    while True:
        proposal = planner.propose()
        planner.observe(proposal, np.ones(len(proposal.seed_N)), proposal.prompt_N)
        if not planner.is_open:
            break
    assert planner.group_weight_P.tolist() == expected


def test_a_stopping_rule_is_given_no_fractional_passes():
    rule = stopping.early(threshold=0.5)
    planner = make(stopping=rule, round_size=2)
    proposal = planner.propose()
    before = planner.state_dict()
    with pytest.raises(
        ValueError, match=r"key 1 \(row 2\) is 0.5 of full marks; write success_above"
    ):
        planner.observe(proposal, [1, 0, 0.5, 0.5], [0, 0, 1, 1])
    assert same(planner.state_dict(), before)
    told = make(stopping=rule, round_size=2, success_above=0.4)
    told.observe(told.propose(), [1, 0, 0.5, 0.5], [0, 0, 1, 1])
    assert told.posterior.alpha_D[:2].tolist() == [1, 2]
    plain = make()  # without a rule a half is half a pass
    plain.observe(plain.propose(), [0.5], [0])
    assert plain.posterior.alpha_D[0] == 0.5


# -- states


def test_a_state_of_another_shape_is_refused_by_name():
    state = make().state_dict()
    before = make().state_dict()
    planner = make()
    lacking = {name: value for name, value in state.items() if name != "length_D"}
    with pytest.raises(ValueError, match=r"state lacks \['length_D'\] and has the unknown nothing"):
        planner.load_state_dict(lacking)
    with pytest.raises(ValueError, match=r"lacks nothing and has the unknown \['more'\]"):
        planner.load_state_dict(state | {"more": 1})
    with pytest.raises(ValueError, match="another version, or is the state of something else"):
        planner.load_state_dict({"waiting": 3})
    with pytest.raises(ValueError, match="must be a dict, got None"):
        planner.load_state_dict(None)
    planner.propose()
    opened = planner.state_dict()
    del opened["last"]["weight_P"]
    with pytest.raises(
        ValueError, match=r"the last step of a planner's state lacks \['weight_P'\]"
    ):
        make().load_state_dict(opened)
    with pytest.raises(ValueError, match=r"a posterior's state lacks \['beta_D'\]"):
        BetaPosterior(6).load_state_dict({"alpha_D": np.zeros(6)})
    assert same(make().state_dict(), before)


def test_an_open_step_keeps_its_kind_of_rounds():
    in_rounds, plain = make(**IN_ROUNDS), make()
    for planner in (in_rounds, plain):
        planner.propose()
    with pytest.raises(ValueError, match="planned under a stopping rule, this planner has none"):
        make().load_state_dict(in_rounds.state_dict())
    with pytest.raises(ValueError, match="planned without a stopping rule, this planner has stopp"):
        make(**IN_ROUNDS).load_state_dict(plain.state_dict())
    while in_rounds.is_open:
        in_rounds.observe(in_rounds.propose(), [], [])
    closed = make()
    closed.load_state_dict(in_rounds.state_dict())
    assert closed.propose().step == 1


# -- raw errors


@pytest.mark.parametrize(
    ("exclude", "message"),
    [
        (3, r"exclude must be 1-d, got shape \(\)"),
        (None, "exclude must be integers, got None"),
        ([1.7], "exclude must be integers, got 1.7"),
        ([True, False, False, False, False, False], "exclude must be integers, got True of bool"),
        ([[1, 2]], r"exclude must be 1-d, got shape \(1, 2\)"),
    ],
)
def test_rows_to_exclude_are_integers(exclude, message):
    planner = make()
    with pytest.raises(ValueError, match=message):
        planner.propose(exclude=exclude)
    assert planner.propose(exclude=range(2)).index_P.tolist() == [2, 3]


@pytest.mark.parametrize("columns", [(None, None), (1.0, 0), ([[1.0]], [[0]]), ([1.0], None)])
def test_rewards_are_columns(columns):
    planner = make()
    with pytest.raises(ValueError, match="reward_N and prompt_N must be 1-d and equally long, got"):
        planner.observe(planner.propose(), *columns)


@pytest.mark.parametrize("rows", [[1.7], [1.0], [True], ["1"], [None]])
def test_rows_that_are_no_integers_are_refused(rows):
    planner, posterior = make(), BetaPosterior(3)
    for call in (
        lambda: planner.observe_lengths(rows, [2.0]),
        lambda: planner.observe_gradient_norms(rows, [2.0]),
        lambda: posterior.observe(rows, [1], [1]),
        lambda: posterior.add(rows, [1], [1]),
        lambda: posterior.decay(rows),
        lambda: posterior.mean(rows),
    ):
        with pytest.raises(ValueError, match="must be integers, got"):
            call()
    assert not posterior.alpha_D.any() and not posterior.beta_D.any()
