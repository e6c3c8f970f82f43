"""Retirement and skipping in front of other selectors."""

import numpy as np
import pytest

from samplers.allocation import uniform
from samplers.check import check_sampler
from samplers.planner import Planner
from samplers.posterior import BetaPosterior
from samplers.selection import (
    OnlineBandSelector,
    PosteriorMeanSelector,
    RetiringSelector,
    ThompsonSelector,
    UniformSelector,
)

D = 20
INNER = {
    "uniform": lambda posterior, keys: UniformSelector(len(keys), seed=1, keys=keys),
    "thompson": lambda posterior, keys: ThompsonSelector(posterior, keys=keys),
    "mean": lambda posterior, keys: PosteriorMeanSelector(posterior, keys=keys),
    "band": lambda posterior, keys: OnlineBandSelector(posterior, short="uniform", keys=keys),
}


def posterior(solved=(), num_prompts=D, passes=18):
    """Beta(1, 1), and Beta(passes + 1, 1) of the solved ones: at 18 a mean of .95."""
    made = BetaPosterior(num_prompts, decay_chosen=1, decay_rest=1)
    solved = np.array(solved, dtype=np.int64)
    made.observe(solved, np.full(len(solved), passes), np.full(len(solved), passes))
    return made


def retiring(made, **settings):
    return RetiringSelector(UniformSelector(made.num_prompts, seed=1), made, **settings)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize(
    "settings", [{"retire_above": 0.9}, {"explore": 0.5}, {"retire_above": 0.6, "explore": 0.3}]
)
def test_in_front_of_any_selector_it_keeps_the_contract(inner, settings):
    def make(posterior, keys):
        return RetiringSelector(INNER[inner](posterior, keys), posterior, keys=keys, **settings)

    check_sampler(selector=make)


@pytest.mark.parametrize("inner", INNER)
def test_without_a_retired_or_skipped_prompt_the_selector_chooses_as_it_would(inner):
    made = posterior()
    keys = [f"k{i}" for i in range(D)]
    plain = INNER[inner](made, keys)
    behind = RetiringSelector(
        INNER[inner](made, keys), made, explore=1.0, retire_above=0.9, keys=keys
    )
    for seed in range(5):
        # What the wrapper draws for itself comes first.
        before, after = np.random.default_rng(seed), np.random.default_rng(seed)
        before.random(1), before.random(D)
        assert (
            behind.select(6, generator=after).tolist() == plain.select(6, generator=before).tolist()
        )


@pytest.mark.slow
def test_a_retired_prompt_gets_the_share_of_the_picks_and_no_more():
    made = posterior(solved=range(12))
    selector = retiring(made, retire_above=0.9, retire_share=0.05)
    picked = [
        selector.select(6, generator=np.random.default_rng(seed)).tolist() for seed in range(2000)
    ]
    assert all(len(set(rows)) == 6 for rows in picked)
    count_D = np.bincount(np.concatenate(picked), minlength=D)
    # .05 x 6 = .3 picks a call; a Bernoulli's standard error over 2000 calls is .0102.
    assert abs(count_D[:12].sum() / 2000 - 0.3) < 4 * 0.0102
    # Each of 12 expects 50; 600 picks over 12 cells, chi-square with 11 degrees: above 31 in .1 %.
    assert ((count_D[:12] - count_D[:12].mean()) ** 2 / count_D[:12].mean()).sum() < 31.3
    assert selector.metrics()["retired"] == 12
    none = retiring(made, retire_above=0.9, retire_share=0)
    assert min(none.select(8, generator=np.random.default_rng(0))) == 12
    assert none.metrics() == {"retired": 12, "retired_picks": 0, "skipped": 0, "filled": 0}


def test_a_prompt_that_is_forgotten_comes_back():
    made = BetaPosterior(4, decay_chosen=1, decay_rest=0.5)
    made.observe([0], [18], [18])
    selector = retiring(made, retire_above=0.9, retire_share=0)
    assert 0 not in selector.select(3, generator=np.random.default_rng(0))
    made.decay_others([])  # 9 passes, a mean of 10 / 11
    assert 0 not in selector.select(3, generator=np.random.default_rng(0))
    made.decay_others([])  # 4.5, and 5.5 / 6.5
    assert 0 in selector.select(4, generator=np.random.default_rng(0))


def test_the_best_of_the_retired_fill_a_pool_that_is_too_small():
    made = posterior(solved=range(17))
    made.observe([3, 8], [0, 0], [1, 1])  # 19 / 21: still retired, and the lowest
    selector = retiring(made, retire_above=0.9, retire_share=0)
    chosen = selector.select(5, generator=np.random.default_rng(0)).tolist()
    assert sorted(chosen[:3]) == [17, 18, 19] and sorted(chosen[3:]) == [3, 8]
    assert selector.metrics() == {"retired": 17, "retired_picks": 2, "skipped": 0, "filled": 2}
    everything = selector.select(20, generator=np.random.default_rng(0))
    assert sorted(everything) == list(range(20))
    others = selector.select(
        2, generator=np.random.default_rng(0), exclude=[17, 18, 19, 3]
    ).tolist()
    assert 8 in others and not {17, 18, 19, 3} & {*others}


def test_epochs_do_not_pile_up_visits_of_retired_prompts():
    made = posterior(solved=[0, 1])
    inner = UniformSelector(D, seed=1)
    selector = RetiringSelector(inner, made, retire_above=0.9, retire_share=0)
    for _ in range(90):  # ten epochs of the 18 others
        selector.select(2, generator=np.random.default_rng(0))
    assert not len(inner.state_dict()["owed"])


def told(selector, rows, *, alike):
    spread = np.full(len(rows), 0.0 if alike else 1.0)
    selector.observe_spread(rows, np.full(len(rows), 4), np.zeros(len(rows)), spread)


@pytest.mark.slow
def test_a_turn_is_skipped_with_the_chance_of_the_paper():
    made = posterior()
    first = UniformSelector(D, seed=1).select(2, generator=np.random.default_rng(0))
    chosen = []
    for seed in range(1500):
        selector = retiring(made, explore=0.5)
        told(selector, first, alike=True)
        told(selector, first[1:], alike=True)
        chosen.append(selector.select(6, generator=np.random.default_rng(seed)))
    share = [np.mean([row in rows for rows in chosen]) for row in first]
    # Chances .5 and .25, each within 4 standard errors of 1500 tries.
    for found, chance in zip(share, (0.5, 0.25), strict=True):
        assert abs(found - chance) < 4 * (chance * (1 - chance) / 1500) ** 0.5


def test_spread_ends_the_count_and_a_lone_rollout_says_nothing():
    selector = retiring(posterior(), explore=0.5)
    for alike, expected in ((True, 1), (True, 2), (False, 0), (True, 1)):
        told(selector, [4], alike=alike)
        assert selector.state_dict()["alike_D"][4] == expected
    selector.observe_spread([4, 5, 6], [1, 0, 2], [0.0, np.inf, 0.3], [0.0, -np.inf, 0.3])
    assert selector.state_dict()["alike_D"][4:7].tolist() == [1, 0, 1]


def test_where_every_prompt_is_skipped_those_of_the_best_chance_fill_the_step():
    selector = retiring(posterior(), explore=1e-9)
    told(selector, range(D), alike=True)
    told(selector, range(5, D), alike=True)
    chosen = selector.select(5, generator=np.random.default_rng(0))
    assert sorted(chosen) == [0, 1, 2, 3, 4]
    assert selector.metrics()["filled"] == 5 and selector.metrics()["skipped"] == D


def planner(seed=0):
    made = BetaPosterior(D)
    inner = RetiringSelector(
        UniformSelector(D, seed=seed), made, retire_above=0.8, explore=0.4, retire_share=0.2
    )
    return Planner(
        made,
        inner,
        uniform,
        keys=[f"k{i}" for i in range(D)],
        prompts_per_step=4,
        rollouts_per_step=24,
    )


def step(made, rate_D):
    proposal = made.propose()
    generator = np.random.default_rng(int(proposal.seed_N[0] % 2**32))
    prompt_N = np.repeat(np.arange(4), proposal.budget_P)
    reward_N = (generator.random(24) < rate_D[proposal.index_P][prompt_N]).astype(float)
    made.observe(proposal, reward_N, prompt_N)
    return proposal.index_P.tolist()


def test_a_planner_tells_of_spread_and_a_restored_one_goes_on_alike():
    rate_D = np.linspace(0, 1, D)
    rate_D[:6], rate_D[-6:] = 0, 1
    whole, cut = planner(), planner()
    for _ in range(12):
        assert step(whole, rate_D) == step(cut, rate_D)
    restored = planner()
    restored.load_state_dict(cut.state_dict())
    chosen = [step(whole, rate_D) for _ in range(30)]
    assert [step(restored, rate_D) for _ in range(30)] == chosen
    assert whole.metrics() == restored.metrics()
    metrics = whole.metrics()
    assert metrics["selector/retired"] > 0
    # Two fifths of the pool never mixed; skipped and retired they get much less of the visits.
    visits = np.bincount(np.concatenate(chosen), minlength=D)
    assert visits[6:-6].sum() > 0.6 * visits.sum()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "neither retire_above nor explore is given"),
        ({"retire_above": 1.0}, r"retire_above must lie in \(0, 1\), got 1.0"),
        ({"retire_above": 0.9, "retire_share": 1.5}, r"retire_share must lie in \[0, 1\], got 1.5"),
        ({"explore": 0.0}, "explore must be above 0 and at most 1, got 0.0"),
    ],
)
def test_it_says_what_is_wrong(settings, message):
    with pytest.raises(ValueError, match=message):
        retiring(posterior(), **settings)


def test_the_state_of_another_run_is_refused():
    selector = retiring(posterior(), explore=0.5)
    with pytest.raises(ValueError, match="without retire_above and greso_explore"):
        selector.load_state_dict(UniformSelector(D, seed=1).state_dict())
    other = retiring(posterior(num_prompts=9), explore=0.5)
    with pytest.raises(ValueError, match="another data set"):
        selector.load_state_dict(other.state_dict())
