"""A posterior with a prior that learns, inside the planner."""

import copy

import numpy as np
import pytest

from samplers import allocation
from samplers.planner import Planner
from samplers.posterior import BetaPosterior
from samplers.prior import StrataPrior
from samplers.selection import ThompsonSelector
from samplers.selection.uniform_share import UniformShare
from samplers.stopping import early
from tests.samplers.test_planner import decisions, rewards

KEYS = [f"key {i % 10} of {i} {i % 10}" for i in range(40)]
MODES = [
    {},
    {"pilot": 2, "scale": allocation.gvm},
    {"stopping": early(threshold=0.5), "round_size": 2, "success_above": 0.3},
    {"scale": None, "allocate": allocation.knapsack_posterior, "minimum": 2},
]


def make(keys=KEYS, *, allocate=allocation.neyman, kappa=None, **settings):
    prior = StrataPrior([key.split()[-1] for key in keys], rare=4, kappa=kappa, decay=0.9)
    posterior = BetaPosterior(len(keys), decay_chosen=0.8, prior=prior)
    selector = UniformShare(ThompsonSelector(posterior, keys=keys), len(keys), share=0.2, keys=keys)
    settings = {"prompts_per_step": 6, "rollouts_per_step": 36} | settings
    return Planner(posterior, selector, allocate, keys=keys, run_seed=3, **settings)


def rounds(planner, num, keys=KEYS):
    made = []
    for _ in range(num):
        proposal = planner.propose()
        made.append(decisions(proposal, keys))
        planner.observe(proposal, rewards(proposal, keys), proposal.prompt_N)
    return made


@pytest.mark.parametrize("settings", MODES)
def test_killed_and_resumed_it_decides_as_if_never_killed(settings):
    whole = rounds(make(**settings), 16)
    for kill in (0, 3, 8):
        planner = make(**settings)
        rounds(planner, kill)
        state, kept = planner.state_dict(), copy.deepcopy(planner.state_dict())
        rounds(planner, 2)
        np.testing.assert_equal(state, kept)  # nothing in it changes when the planner goes on
        restored = make(**settings)
        restored.load_state_dict(state)
        assert rounds(restored, 16 - kill) == whole[kill:]


def test_the_order_of_the_rows_of_the_data_set_changes_nothing():
    shuffled = [KEYS[row] for row in np.random.default_rng(0).permutation(40)]
    one, other = rounds(make(), 12), rounds(make(shuffled), 12, shuffled)
    assert [step["prompts"] for step in one] == [step["prompts"] for step in other]


def test_it_learns_every_scored_rollout_and_decays_once_in_a_training_step():
    planner = make(kappa=8)
    seen = {}
    for training_step in range(3):
        planner.begin(training_step)
        for _ in range(2):  # as a refill does
            proposal = planner.propose()
            reward_N = rewards(proposal, KEYS)
            planner.observe(proposal, reward_N, proposal.prompt_N)
            for place, reward in zip(proposal.prompt_N, reward_N, strict=True):
                name = KEYS[proposal.index_P[place]].split()[-1]
                passed, trials = seen.get(name, (0.0, 0.0))
                seen[name] = (passed + reward, trials + 1)
        if training_step < 2:
            seen = {name: (0.9 * p, 0.9 * n) for name, (p, n) in seen.items()}
    state = planner.posterior.prior.state_dict()
    for name, passed, failed in zip(
        state["names"], state["passed_S"], state["failed_S"], strict=False
    ):
        expected = seen.get(name, (0.0, 0.0))
        assert (passed, passed + failed) == pytest.approx(expected)


@pytest.mark.parametrize("settings", MODES)
def test_what_a_group_is_compared_with_knows_nothing_of_its_own_rewards(settings):
    # Whatever the rewards of the step are, the parameters handed out with every round of it are those
    # from before its first.
    found = []
    for reward in (0.0, 1.0):
        planner = make(**settings)
        rounds(planner, 4)
        while planner.is_open:
            rounds(planner, 1)
        parameters = []
        while True:
            proposal = planner.propose()
            parameters.append((proposal.a_P.tolist(), proposal.b_P.tolist()))
            planner.observe(proposal, np.full(len(proposal.prompt_N), reward), proposal.prompt_N)
            if not planner.is_open:
                break
        assert all(each == parameters[0] for each in parameters)
        found.append(parameters[0])
    assert found[0] == found[1]


def test_reliability_forgets_once_a_training_step():
    planner = make()
    rounds(planner, 2)  # of 36 rollouts each
    for table in planner.reliability().values():
        assert sum(trials for *_, trials in table) == pytest.approx((36 * 0.95 + 36) * 0.95)


def test_metrics_say_what_the_prior_expects_and_how_well():
    planner = make(kappa=5)
    rounds(planner, 10)
    metrics = planner.metrics()
    prior = planner.posterior.prior
    assert metrics["planner/prior_mean"] == prior.mean().mean()
    assert metrics["planner/prior_std"] == prior.mean().std() > 0
    assert metrics["planner/prior_kappa"] == 5
    assert 0 < metrics["planner/prior_calibration_error"] < 0.5
    assert 0 <= metrics["selector/uniform_share"] <= 1
    tables = planner.reliability()
    assert [*tables] == ["posterior", "prior"]
    for name, error in (("posterior", "calibration_error"), ("prior", "prior_calibration_error")):
        predicted, observed, trials = np.array(tables[name]).T
        distance = (np.abs(predicted - observed) * trials).sum() / trials.sum()
        assert metrics[f"planner/{error}"] == pytest.approx(distance)
