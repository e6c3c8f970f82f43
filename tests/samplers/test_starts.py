"""Where rollouts begin: choice, length, memory, and what a planner learns from groups with a start."""

import numpy as np
import pytest

from samplers import BetaPosterior, Planner, allocation
from samplers.saving import load_state, save_state
from samplers.selection import UniformSelector
from samplers.starts import NUM_BANDS, ChosenStarts, Starts

HOPELESS, SOLVED = (1.0, 9.0), (9.0, 1.0)
"""Parameters of posteriors of mean .1 and .9."""


def starts(num_prompts=3, **changes):
    defaults = {"most_tokens": 100, "plain_share": 0.0, "run_seed": 5}
    return Starts([f"p{row}" for row in range(num_prompts)], **(defaults | changes))


def choose(made, rows, *beliefs, draw=0):
    a_P, b_P = (np.array(each) for each in zip(*beliefs, strict=True))
    return made.choose(rows, [draw] * len(rows), a_P, b_P)


def remember(made, row, ids, success):
    made.remember(row, ids, success=success, reward=success, version=3)


def learn(made, row, chosen, successes, trials):
    made.learn(np.array([row]), chosen, np.array([successes]), np.array([trials]))


# -- choice


def test_hopeless_prompts_start_along_their_success_and_solved_ones_along_their_failure():
    made = starts()
    for row in range(3):
        remember(made, row, [10 + row, 20, 30, 40], 1.0)
        remember(made, row, [50 + row, 60], 0.0)
    chosen = choose(made, [2, 0, 1], HOPELESS, (1.0, 1.0), SOLVED)
    assert chosen.length_P.tolist() == [2, 0, 1]
    assert chosen.sign_P.tolist() == [1, 0, -1]
    assert chosen.prefix_P == [(12, 20), (), (51,)]
    # Half of a success ends in its third quarter; half of a failure likewise.
    assert chosen.band_P.tolist() == [3, 0, -3]
    assert chosen.token_L.dtype == np.int32


@pytest.mark.parametrize(
    ("settings", "mean", "sign"),
    [
        ({}, 0.299, 1),
        ({}, 0.3, 0),
        ({"delta": 0.4}, 0.11, 0),
        ({"delta": 0.4}, 0.09, 1),
        ({"until": 0.1}, 0.11, 0),
        ({"delta": 0.0, "until": 1.0}, 0.49, 1),
        ({"delta": 0.0, "until": 1.0}, 0.5, 0),
        ({}, 0.7, 0),
        ({}, 0.701, -1),
        ({"delta": 0.4}, 0.89, 0),
        ({"delta": 0.4}, 0.91, -1),
        ({"until": 0.0}, 0.001, 0),
    ],
)
def test_delta_and_until_say_from_which_pass_rate_on_there_is_a_start(settings, mean, sign):
    made = starts(**settings)
    remember(made, 0, [1, 2, 3], 1.0)
    remember(made, 0, [4, 5, 6], 0.0)
    assert choose(made, [0], (mean, 1 - mean)).sign_P.tolist() == [sign]


def test_a_prompt_without_a_trace_of_the_kind_has_no_start():
    made = starts()
    remember(made, 0, [1, 2, 3], 0.0)  # only a failure
    remember(made, 1, [1, 2, 3], 1.0)  # only a success
    chosen = choose(made, [0, 1, 2], HOPELESS, SOLVED, HOPELESS)
    assert not chosen.sign_P.any() and not chosen.length_P.any()
    assert chosen.prefix_P == [(), (), ()]


def test_a_reference_serves_until_the_prompt_has_a_success_of_its_own():
    made = starts(2, references=[[7, 8, 9, 10], None])
    assert choose(made, [0, 1], HOPELESS, HOPELESS).prefix_P == [(7, 8), ()]
    remember(made, 0, [1, 2], 1.0)
    assert choose(made, [0], HOPELESS).prefix_P == [(1,)]
    assert choose(made, [0], SOLVED).prefix_P == [()]  # and never stands for a failure


def test_without_memory_references_alone_remain():
    made = starts(1, references=[[7, 8, 9, 10]], memory_tokens=0)
    remember(made, 0, [1, 2], 1.0)
    assert choose(made, [0], HOPELESS).prefix_P == [(7, 8)]


@pytest.mark.parametrize("length", range(1, 8))
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("most", [1, 3, 100])
def test_a_start_is_its_share_of_the_trace_and_leaves_something_to_draw(length, fraction, most):
    made = starts(first_fraction=fraction, max_fraction=1.0, most_tokens=most)
    remember(made, 0, list(range(length)), 1.0)
    (chosen,) = choose(made, [0], HOPELESS).length_P.tolist()
    assert chosen == min(int(fraction * length + 1e-9), length - 1, most)


def test_every_band_is_reached_and_none_is_passed():
    made = starts(max_fraction=1.0)
    remember(made, 0, list(range(8)), 1.0)
    bands = []
    for fraction in np.arange(0, 1.01, 1 / 8):
        made._first = fraction
        bands += choose(made, [0], HOPELESS).band_P.tolist()
    assert bands == [0, 1, 2, 2, 3, 3, 4, 4, 4]
    assert max(bands) == NUM_BANDS


def test_a_start_may_be_cut_at_line_ends_alone():
    made = starts(cuts=lambda token_L: token_L == 9, first_fraction=0.8)
    remember(made, 0, [1, 9, 2, 3, 9, 4, 9, 5, 6, 7], 1.0)  # 8 tokens are due, 7 end a line
    remember(made, 1, [1, 2, 3, 4, 9], 1.0)  # no line ends among the first four
    chosen = choose(made, [0, 1], HOPELESS, HOPELESS)
    assert chosen.prefix_P == [(1, 9, 2, 3, 9, 4, 9), ()]


def test_some_visits_have_no_start_whatever_happened_before():
    made = starts(400, plain_share=0.2)
    plain = [made.is_plain(row, draw) for row in range(400) for draw in range(25)]
    # 10,000 lots of chance .2: four standard errors are .016.
    assert abs(np.mean(plain) - 0.2) < 0.016
    again = starts(400, plain_share=0.2, run_seed=6)
    assert plain != [again.is_plain(row, draw) for row in range(400) for draw in range(25)]
    draw = next(d for d in range(100) if made.is_plain(0, d))
    remember(made, 0, [1, 2, 3, 4], 1.0)
    chosen = choose(made, [0], HOPELESS, draw=draw)
    assert chosen.length_P.tolist() == chosen.sign_P.tolist() == [0]
    other = next(d for d in range(100) if not made.is_plain(0, d))
    assert choose(made, [0], HOPELESS, draw=other).length_P.tolist() == [2]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_plain_share_holds_at_its_ends(share):
    made = starts(plain_share=share)
    assert {made.is_plain(row, draw) for row in range(3) for draw in range(50)} == {share == 1}


# -- the controller


def test_the_length_moves_towards_a_half_by_hand():
    made = starts(step=0.2)
    remember(made, 0, list(range(10)), 1.0)
    remember(made, 0, list(range(10)), 0.0)
    for successes, fraction in [(0.0, 0.6), (1.0, 0.65), (4.0, 0.55), (2.0, 0.55)]:
        learn(made, 0, choose(made, [0], HOPELESS), successes, 4)
        assert made.fraction(0, 1) == pytest.approx(fraction)
    assert made.fraction(0, -1) == 0.5  # of failures it is another one
    # More of a failure makes a group fail more: the other way round.
    learn(made, 0, choose(made, [0], SOLVED), 4.0, 4)
    assert made.fraction(0, -1) == pytest.approx(0.6)
    assert made.fraction(0, 1) == pytest.approx(0.55)
    assert made.fraction(1, 1) == 0.5


@pytest.mark.parametrize(("successes", "end"), [(0.0, 0.9), (4.0, 0.0)])
def test_the_length_stays_between_nothing_and_its_largest(successes, end):
    made = starts(step=0.3)
    remember(made, 0, list(range(10)), 1.0)
    for _ in range(9):
        learn(made, 0, choose(made, [0], HOPELESS), successes, 4)
    assert made.fraction(0, 1) == end


def test_a_start_that_shrank_to_nothing_grows_again_when_the_prompt_fails_without():
    made = starts(first_fraction=0.0)
    remember(made, 0, list(range(10)), 1.0)
    chosen = choose(made, [0], HOPELESS)
    assert chosen.length_P.tolist() == [0] and chosen.sign_P.tolist() == [1]
    learn(made, 0, chosen, 0.0, 4)
    assert choose(made, [0], HOPELESS).length_P.tolist() == [1]
    # It was no start: nothing was counted for one.
    assert not made._failures_S2B.any()


def test_a_group_that_was_never_scored_moves_nothing():
    made = starts()
    remember(made, 0, list(range(10)), 1.0)
    before = made.state_dict()
    learn(made, 0, choose(made, [0], HOPELESS), 0.0, 0)
    assert str(made.state_dict()) == str(before)


def test_the_length_finds_where_half_of_the_rollouts_pass():
    # Five steps remain to be got right with chance .8 each: .33 pass from the beginning, and half from
    # about 40 % on. Started at both ends, f ends near it: the mean of the last 200 of groups of 8.
    rng = np.random.Generator(np.random.PCG64(1))
    for first in (0.0, 0.9):
        made = starts(step=0.1, first_fraction=first)
        remember(made, 0, list(range(10)), 1.0)
        visited = []
        for _ in range(400):
            chosen = choose(made, [0], HOPELESS)
            left = 10 - int(chosen.length_P[0])
            learn(made, 0, chosen, float(rng.binomial(8, 0.8 ** (left / 2))), 8)
            visited.append(made.fraction(0, 1))
        # Standard error of the mean below .01; lengths are whole tokens, .1 apart.
        assert np.mean(visited[200:]) == pytest.approx(0.4, abs=0.1)


def test_starts_have_counts_of_their_own_for_each_prompt_and_band():
    made = starts(decay=0.5)
    remember(made, 0, list(range(8)), 1.0)
    chosen = choose(made, [0], HOPELESS)
    assert chosen.band_P.tolist() == [3]
    learn(made, 0, chosen, 3.0, 4)
    learn(made, 0, chosen, 1.0, 4)
    a_P, b_P = made.parameters([0, 0, 1, 0], [3, -3, 3, 0], np.full(4, 7.0), np.full(4, 5.0))
    assert a_P.tolist() == [1 + 1.5 + 1, 1, 1, 7]
    assert b_P.tolist() == [1 + 0.5 + 3, 1, 1, 5]


# -- the memory


def test_the_memory_holds_the_latest_of_each_kind():
    made = starts()
    remember(made, 0, [1, 2], 1.0)
    remember(made, 0, [3], 0.0)
    remember(made, 0, [4, 5, 6], 1.0)
    assert made.trace(0, 1).token_L.tolist() == [4, 5, 6]
    assert made.trace(0, -1).token_L.tolist() == [3]
    assert (made.trace(0, 1).reward, made.trace(0, 1).version) == (1.0, 3)
    assert made.metrics()["memory_tokens"] == 4
    assert made.trace(1, 1) is None


@pytest.mark.parametrize(("success", "sign"), [(1.0, 1), (0.5, 1), (0.4, -1), (0.0, -1)])
def test_fractions_of_full_marks_are_successes_from_a_half_on(success, sign):
    made = starts()
    remember(made, 0, [1], success)
    assert made.trace(0, sign) is not None and made.trace(0, -sign) is None


def test_what_was_used_longest_ago_is_forgotten_first():
    made = starts(4, memory_tokens=9)
    for row in range(3):
        remember(made, row, [row] * 3, 1.0)
    choose(made, [0], HOPELESS)  # uses the oldest
    remember(made, 3, [3] * 3, 1.0)
    assert [made.trace(row, 1) is not None for row in range(4)] == [True, False, True, True]
    remember(made, 1, [1] * 5, 1.0)  # takes the room of two
    assert [made.trace(row, 1) is not None for row in range(4)] == [False, True, False, True]
    assert made.metrics()["memory_tokens"] == 8
    remember(made, 2, [2] * 10, 1.0)  # more than all of it
    assert [made.trace(row, 1) is not None for row in range(4)] == [False, True, False, True]


def test_the_memory_never_holds_more_than_it_may_and_counts_what_it_holds():
    rng = np.random.Generator(np.random.PCG64(0))
    made = starts(20, memory_tokens=40)
    for _ in range(500):
        remember(made, int(rng.integers(20)), list(range(rng.integers(1, 15))), rng.integers(2))
        held = sum(len(trace.token_L) for trace in made._traces.values())
        assert made.metrics()["memory_tokens"] == held <= 40


def test_a_state_restores_everything_exactly(tmp_path):
    rng = np.random.Generator(np.random.PCG64(0))

    def go_on(made, rng, steps):
        found = []
        for _ in range(steps):
            rows = rng.permutation(20)[:4]
            chosen = made.choose(rows, rng.integers(9, size=4), rng.random(4), rng.random(4))
            made.learn(rows, chosen, rng.integers(5, size=4) * 1.0, np.full(4, 4))
            for row in rows.tolist():
                remember(made, row, rng.integers(50, size=rng.integers(1, 9)), rng.integers(2))
            found.append((chosen.prefix_P, chosen.band_P.tolist(), made.metrics()))
        return found

    first = starts(20, memory_tokens=60)
    go_on(first, rng, 50)
    save_state(tmp_path / "state.npz", first.state_dict())
    second = starts(20, memory_tokens=60)
    second.load_state_dict(load_state(tmp_path / "state.npz"))
    assert first.state_dict()["trace_token_L"].dtype == np.int32
    one, other = (np.random.Generator(np.random.PCG64(7)) for _ in range(2))
    assert go_on(first, one, 100) == go_on(second, other, 100)


def test_an_empty_state_restores_too():
    made = starts()
    remember(made, 0, [1, 2], 1.0)
    made.load_state_dict(starts().state_dict())
    assert made.trace(0, 1) is None and made.metrics()["memory_tokens"] == 0
    remember(made, 0, [1, 2], 1.0)
    assert made.metrics()["memory_tokens"] == 2


def test_a_state_does_not_change_with_what_comes_after():
    made = starts()
    remember(made, 0, list(range(8)), 1.0)
    learn(made, 0, choose(made, [0], HOPELESS), 0.0, 4)
    state = made.state_dict()
    before = str(state)
    learn(made, 0, choose(made, [0], HOPELESS), 0.0, 4)
    remember(made, 0, [5], 1.0)
    assert str(state) == before


# -- with a planner


def planner(made, *, seed=2, num_prompts=6, **settings):
    keys = [f"p{row}" for row in range(num_prompts)]
    posterior = BetaPosterior(num_prompts, decay_chosen=1.0)
    defaults = {"prompts_per_step": 3, "rollouts_per_step": 12, "run_seed": seed}
    return Planner(
        posterior,
        UniformSelector(num_prompts, seed=seed),
        settings.pop("allocate", allocation.uniform),
        keys=keys,
        starts=made,
        **(defaults | settings),
    )


def with_starts(**changes):
    """Starts of six hopeless prompts, each of which has a success of eight tokens."""
    made = starts(6, **changes)
    for row in range(6):
        remember(made, row, [10 * row + place for place in range(8)], 1.0)
    return made


def hopeless(plans):
    plans.posterior.observe(range(6), [0.0] * 6, [8] * 6)
    return plans


def test_a_proposal_says_what_rollouts_begin_with_and_that_it_counts_by_itself():
    plans = hopeless(planner(with_starts()))
    proposal = plans.propose()
    assert proposal.start_P.tolist() == [4, 4, 4]
    rows = proposal.index_P.tolist()
    assert proposal.starts.prefix_P == [tuple(10 * row + i for i in range(4)) for row in rows]
    assert proposal.a_P.tolist() == proposal.b_P.tolist() == [1, 1, 1]
    plain = hopeless(planner(None)).propose()
    assert plain.starts is None and plain.start_P.tolist() == [0, 0, 0]
    assert plain.a_P.tolist() == [1, 1, 1] and plain.b_P.tolist() == [9, 9, 9]
    # Which prompts, how many rollouts and by which seeds does not change with starts.
    assert plain.index_P.tolist() == rows
    assert plain.seed_N.tolist() == proposal.seed_N.tolist()


def test_rewards_of_started_rollouts_do_not_reach_the_posterior():
    made = with_starts()
    plans = hopeless(planner(made))
    before = plans.posterior.state_dict()
    proposal = plans.propose()
    plans.observe(proposal, np.ones(12), proposal.prompt_N)
    chosen = proposal.index_P
    after = plans.posterior.state_dict()
    # Neither as evidence nor as a visit: decay_chosen is 1, and decay_rest .999.
    for name in ("alpha_D", "beta_D"):
        np.testing.assert_allclose(after[name], before[name] * 0.999, rtol=1e-12)
    assert plans.state_dict()["draw_D"][chosen].tolist() == [1, 1, 1]
    a_P, b_P = made.parameters(chosen, proposal.starts.band_P, np.zeros(3), np.zeros(3))
    assert a_P.tolist() == [5, 5, 5] and b_P.tolist() == [1, 1, 1]
    assert [made.fraction(row, 1) for row in chosen.tolist()] == pytest.approx([0.4] * 3)


def test_groups_without_a_start_reach_the_posterior_beside_started_ones():
    made = starts(6)
    remember(made, 0, list(range(8)), 1.0)
    plans = hopeless(planner(made, prompts_per_step=6))
    proposal = plans.propose()
    started = proposal.start_P > 0
    assert sorted(proposal.index_P[started].tolist()) == [0]
    plans.observe(proposal, np.ones(12), proposal.prompt_N)
    alpha_D = plans.posterior.state_dict()["alpha_D"]
    assert alpha_D.tolist() == [0, 2, 2, 2, 2, 2]


def test_the_line_of_success_does_not_move_with_started_rollouts():
    plans = hopeless(planner(with_starts(), full_marks=1.0))
    proposal = plans.propose()
    with pytest.warns(UserWarning, match="outside"):
        plans.observe(proposal, np.full(12, 100.0), proposal.prompt_N)
    assert plans.state_dict()["success"]["step"]["count"] == 0


def test_a_started_group_is_allocated_by_its_own_counts():
    made = starts(6)
    remember(made, 0, list(range(8)), 1.0)
    plans = planner(made, prompts_per_step=6, rollouts_per_step=30, allocate=allocation.neyman)
    plans.posterior.observe(range(6), [0.0] * 6, [60] * 6)
    proposal = plans.propose()
    most = int(proposal.budget_P.argmax())
    # All are as good as hopeless; of the start nothing is known, so its reward varies most.
    assert proposal.index_P[most] == 0 and proposal.budget_P[most] > 2 * np.median(
        proposal.budget_P
    )


def test_pilots_of_a_started_group_count_in_its_own_allocation():
    plans = planner(
        with_starts(), allocate=allocation.neyman, pilot=4, rollouts_per_step=60, minimum=4
    )
    hopeless(plans)
    first = plans.propose()
    # All four pilots of one prompt pass, none of another's and two of the last: that one varies most.
    plans.observe(first, [1] * 4 + [0] * 4 + [1, 1, 0, 0], first.prompt_N)
    second = plans.propose()
    assert second.starts is first.starts
    # Beta(5, 1), Beta(1, 5) and Beta(3, 3): the reward's std is .345, .345 and .463.
    assert (second.budget_P + 4).tolist() == [18, 18, 24]


def test_the_rounds_of_a_step_share_their_start_and_move_its_length_once(tmp_path):
    made = with_starts()
    plans = hopeless(planner(made, pilot=2))
    first = plans.propose()
    plans.observe(first, np.zeros(6), first.prompt_N)
    for row in first.index_P.tolist():
        remember(made, row, [99] * 8, 1.0)  # a success on the way does not change the start
        assert made.fraction(row, 1) == 0.5
    save_state(tmp_path / "state.npz", plans.state_dict())
    resumed = planner(starts(6), pilot=2)
    resumed.load_state_dict(load_state(tmp_path / "state.npz"))
    for each in (plans, resumed):
        second = each.propose()
        assert second.starts.prefix_P == first.starts.prefix_P
        each.observe(second, np.zeros(6), second.prompt_N)
        fractions = [each.starts.fraction(row, 1) for row in first.index_P.tolist()]
        assert fractions == pytest.approx([0.6] * 3)
        assert each.propose().starts.prefix_P == plans.propose().starts.prefix_P


def test_a_refused_reward_leaves_the_starts_as_they_were():
    made = with_starts()
    plans = hopeless(planner(made))
    proposal = plans.propose()
    before = str(made.state_dict())
    with pytest.raises(ValueError, match="finite"):
        plans.observe(proposal, np.full(12, np.nan), proposal.prompt_N)
    assert str(made.state_dict()) == before


def test_a_resumed_planner_goes_on_with_the_same_starts():
    rng = np.random.Generator(np.random.PCG64(3))

    def go_on(plans, rng, steps):
        found = []
        for _ in range(steps):
            proposal = plans.propose()
            reward_N = (rng.random(12) < 0.2).astype(float)
            plans.observe(proposal, reward_N, proposal.prompt_N)
            for p, reward in zip(proposal.prompt_N.tolist(), reward_N.tolist(), strict=True):
                remember(plans.starts, int(proposal.index_P[p]), rng.integers(9, size=6), reward)
            found.append(
                (proposal.starts.prefix_P, proposal.a_P.tolist(), proposal.seed_N.tolist())
            )
        return found

    first = planner(starts(6, plain_share=0.2))
    assert any(any(prefixes) for prefixes, *_ in go_on(first, rng, 20))
    second = planner(starts(6, plain_share=0.2))
    second.load_state_dict(first.state_dict())
    one, other = (np.random.Generator(np.random.PCG64(7)) for _ in range(2))
    assert go_on(first, one, 20) == go_on(second, other, 20)


def test_a_state_with_starts_is_refused_by_a_planner_without_and_the_other_way_round():
    with pytest.raises(ValueError, match="saved with starts, and this planner chooses no starts"):
        planner(None).load_state_dict(planner(starts(6)).state_dict())
    with pytest.raises(ValueError, match="saved without starts, and this planner chooses starts"):
        planner(starts(6)).load_state_dict(planner(None).state_dict())


# -- messages


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"delta": 0.5}, r"delta must be in \[0, 0.5\), got 0.5"),
        ({"step": 0.0}, "step must be finite and above 0, got 0.0"),
        ({"max_fraction": 1.1}, r"max_fraction must be in \[0, 1\], got 1.1"),
        ({"until": -0.1}, r"until must be in \[0, 1\], got -0.1"),
        ({"plain_share": float("nan")}, r"plain_share must be in \[0, 1\], got nan"),
        ({"memory_tokens": -1}, "must not be negative, got -1 and 100"),
        ({"references": [None]}, "there are 1 references for 3 prompts"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        starts(**settings)


def test_wrong_tokens_and_states_are_named():
    made = starts()
    with pytest.raises(ValueError, match="list of integers, got float64"):
        remember(made, 0, [1.5], 1.0)
    with pytest.raises(ValueError, match=r"\[0, 2\^31\), got -1 to 3"):
        remember(made, 0, [3, -1], 1.0)
    with pytest.raises(ValueError, match="the state of starts lacks"):
        made.load_state_dict({})
    with pytest.raises(ValueError, match="the starts of a step lacks"):
        ChosenStarts.from_state({})


# -- from end to end, on a policy small enough for a table


def trained(with_reference, *, words=4, length=5, vocabulary=8, steps=400):
    """Pass rates, by enumeration, of a policy that is to spell a word of each prompt.

    A softmax per prompt and place, trained with leave-one-out on groups of 8 of the tokens drawn.
    """
    rng = np.random.Generator(np.random.PCG64(4))
    word_PT = rng.integers(vocabulary, size=(words, length))
    logits_PTV = np.zeros((words, length, vocabulary))
    made = starts(
        words,
        most_tokens=length - 1,
        plain_share=0.2,
        first_fraction=0.8,
        references=word_PT.tolist() if with_reference else None,
    )
    plans = planner(made, num_prompts=words, prompts_per_step=2, rollouts_per_step=16)
    for step in range(steps):
        proposal = plans.propose()
        reward_N = np.zeros(16)
        for p, row in enumerate(proposal.index_P.tolist()):
            start = proposal.starts.prefix_P[p]
            prob_TV = np.exp(logits_PTV[row])
            prob_TV /= prob_TV.sum(axis=1, keepdims=True)
            token_nT = np.array([[rng.choice(vocabulary, p=q) for q in prob_TV] for _ in range(8)])
            token_nT[:, : len(start)] = start
            reward_n = (token_nT == word_PT[row]).all(axis=1).astype(float)
            advantage_n = (reward_n - reward_n.mean()) * 8 / 7
            for tokens, advantage in zip(token_nT, advantage_n, strict=True):
                for place in range(len(start), length):
                    gradient = -prob_TV[place]
                    gradient[tokens[place]] += 1
                    logits_PTV[row, place] += 0.5 * advantage * gradient
            for tokens, reward in zip(token_nT, reward_n, strict=True):
                made.remember(row, tokens, success=reward, reward=reward, version=step)
            reward_N[proposal.prompt_N == p] = reward_n
        plans.observe(proposal, reward_N, proposal.prompt_N)
    prob_PTV = np.exp(logits_PTV) / np.exp(logits_PTV).sum(axis=2, keepdims=True)
    return np.take_along_axis(prob_PTV, word_PT[:, :, None], axis=2).prod(axis=(1, 2))


@pytest.mark.slow
def test_hopeless_prompts_are_learnt_from_their_references_and_not_without():
    # A word of five of eight tokens passes with chance 3e-5: in 6,400 rollouts .2 passes are expected.
    assert trained(False) == pytest.approx([8.0**-5] * 4)
    assert trained(True).min() > 0.9
