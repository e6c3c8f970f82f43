import math

import diffusers
import numpy as np
import pytest
import torch

from rollouts.diffusion.branch_points import (
    best_children,
    branch_statistics,
    probe_branch_points,
    share_errors,
)
from rollouts.rewards.contract import RewardError
from rollouts.step_plan import StepPlan
from tests import tiny_denoising
from tests.tiny_pipelines import image_prompts

torch.set_num_threads(1)
diffusers.utils.logging.set_verbosity_error()


def columns(*prompts):
    """Rewards of nested lists: prompts of branches of rows."""
    rewards, prompt, branch, count = [], [], [], 0
    for p, branches in enumerate(prompts):
        for rows in branches:
            rewards += rows
            prompt += [p] * len(rows)
            branch += [count] * len(rows)
            count += 1
    return torch.tensor(rewards, dtype=torch.float64), torch.tensor(prompt), torch.tensor(branch)


def test_by_hand():
    # Branch means 1 and 4, grand mean 2.5. Within: (1 + 1 + 1 + 1) / 2 = 2. Between branches: two
    # rows of 1.5^2 each, twice, = 9 over 1 degree of freedom; (9 - 2) / 2 = 3.5.
    share, informative = branch_statistics(*columns([[0.0, 2.0], [3.0, 5.0]]))
    assert share == pytest.approx(2 / 5.5)
    assert informative == 1


def test_prompts_of_different_means_do_not_count_as_branches():
    near = branch_statistics(*columns([[0.0, 2.0], [3.0, 5.0]], [[0.0, 2.0], [3.0, 5.0]]))
    far = branch_statistics(*columns([[0.0, 2.0], [3.0, 5.0]], [[90.0, 92.0], [93.0, 95.0]]))
    assert far == pytest.approx(near)


def test_rows_in_any_order():
    reward_N, prompt_N, branch_N = columns([[0.0, 1, 4], [3.0, 5]], [[1.0, 1.0], [2.0, 0.0, 7.0]])
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    shuffled = branch_statistics(reward_N[order], 9 - prompt_N[order], 50 - branch_N[order])
    assert shuffled == pytest.approx(branch_statistics(reward_N, prompt_N, branch_N))
    moved = branch_statistics(7 - 3 * reward_N, prompt_N, branch_N)
    assert moved == pytest.approx(branch_statistics(reward_N, prompt_N, branch_N))


def test_ends_of_the_range():
    # Branches alike inside: all between. Means alike: all within. Nothing varies: unknown.
    assert branch_statistics(*columns([[0.1] * 3, [0.3] * 3])) == (0.0, 0.0)
    assert branch_statistics(*columns([[0.0, 1.0], [1.0, 0.0]])) == (1.0, 1.0)
    assert branch_statistics(*columns([[0.1] * 3, [0.1] * 3])) == (None, 0.0)
    # A lone row cannot be informative and is left out of that share.
    assert branch_statistics(*columns([[0.0, 1.0], [2.0]]))[1] == 1


def test_variance_components_are_estimated_without_bias():
    # Within 1, between 0.5, ragged branches; 3000 prompts of 3 branches.
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    size = torch.tensor([2, 3, 5]).repeat(3000)
    branch_N = torch.arange(9000).repeat_interleave(size)
    prompt_N = branch_N // 3
    reward_N = (10 * draw(3000))[prompt_N] + math.sqrt(0.5) * draw(9000)[branch_N] + draw(30000)
    share, _ = branch_statistics(reward_N, prompt_N, branch_N)
    # Forty seeds have a standard deviation of .008; four of them, a false alarm in 16,000 runs.
    assert share == pytest.approx(1 / 1.5, abs=0.032)


def test_what_cannot_be_estimated_is_refused():
    with pytest.raises(ValueError, match=r"those of rows \[1\] are not"):
        branch_statistics(*columns([[0.0, math.nan], [3.0, 5.0]]))
    with pytest.raises(ValueError, match="2 rows in 2 branches of 1 prompts"):
        branch_statistics(*columns([[0.0], [3.0]]))
    with pytest.raises(ValueError, match="4 rows in 2 branches of 2 prompts"):
        branch_statistics(*columns([[0.0, 1.0]], [[3.0, 4.0]]))


def plan(**settings):
    defaults = dict(num_steps=6, rule="ddim", level=1.0, stochastic=tuple(range(6)))
    return StepPlan(**defaults | settings)


def brightness(image_NHWC, prompts, metadata):
    assert image_NHWC.dtype == np.uint8 and len(prompts) == len(metadata) == len(image_NHWC)
    return image_NHWC.mean(axis=(1, 2, 3)), {"width": np.full(len(prompts), 8)}


def engine():
    return tiny_denoising.engine(tiny_denoising.pipeline())


@pytest.mark.slow
def test_less_is_open_the_later_a_chain_branches():
    ours = engine()
    found = probe_branch_points(
        ours, image_prompts(4), brightness, points=[0, 3, 5], children=3, branches=4, params=plan()
    )
    assert [point.step for point in found] == [0, 3, 5]
    # Four prompts of four branches: (t0 + 1) + 3 (5 - t0)
    assert [point.evaluations for point in found] == [16 * (1 + 15), 16 * (4 + 6), 16 * 6]
    shares = [point.within_share for point in found]
    assert shares[0] > shares[1] > shares[2]
    for point in found:
        w = point.within_share
        assert point.effective_count == pytest.approx(12 / (w + 3 * (1 - w)))
    assert found[1].best_children == best_children(shares[1], 3, 6)
    assert found[2].best_children == math.inf


def cost_of_a_mean(share, step, num_steps, children):
    """Variance of a prompt's mean reward times evaluations, for one branch."""
    variance = share / children + 1 - share
    return variance * (step + 1 + children * (num_steps - step - 1))


@pytest.mark.parametrize(
    ("share", "step", "num_steps"), [(0.98, 10, 20), (0.79, 10, 20), (0.5, 3, 5)]
)
def test_the_best_number_of_children_has_the_least_cost(share, step, num_steps):
    best = best_children(share, step, num_steps)
    cost = cost_of_a_mean(share, step, num_steps, best)
    assert all(
        cost < cost_of_a_mean(share, step, num_steps, best * x) for x in (0.9, 0.99, 1.01, 1.1)
    )


def test_the_best_number_of_children_at_the_ends():
    assert best_children(0.01, 0, 20) == 1
    assert best_children(1.0, 0, 20) == best_children(0.5, 19, 20) == math.inf


def test_a_reward_that_never_varies_leaves_the_share_unknown():
    def constant(images, prompts, metadata):
        return [0.25] * len(images)

    (point,) = probe_branch_points(
        engine(), image_prompts(2), constant, points=[2], children=2, branches=2, params=plan()
    )
    assert point.within_share is point.effective_count is point.best_children is None
    assert point.informative_share == 0


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda count: [0.5] * (count - 1), r"shape \(\d+,\).*expected one number per image"),
        (lambda count: None, r"shape \(\) and type object.*expected one number per image"),
        (lambda count: 0.5, r"shape \(\).*expected one number per image"),
        (lambda count: [math.nan] * count, "nan"),
    ],
)
def test_a_reward_that_gives_something_else_than_one_number_an_image_is_named(returned, message):
    def wrong(images, prompts, metadata):
        return returned(len(images))

    with pytest.raises(RewardError, match=f"wrong.*{message}"):
        probe_branch_points(
            engine(), image_prompts(1), wrong, points=[2], children=2, branches=2, params=plan()
        )


def test_probes_are_checked():
    settings = dict(points=[1], children=2, branches=2, params=plan())
    for name in ("children", "branches"):
        with pytest.raises(ValueError, match=f"at least 2 children and 2 branches, got.*{name}=1"):
            probe_branch_points(engine(), image_prompts(1), brightness, **settings | {name: 1})
    branching = plan(splits=((1, 2),))
    with pytest.raises(ValueError, match=r"must not branch, got splits=\(\(1, 2\),\)"):
        probe_branch_points(
            engine(), image_prompts(1), brightness, **settings | {"params": branching}
        )


def test_standard_errors_by_hand():
    # Informative shares of the prompts' two branches: 1, 1/2, 0. Without one prompt each: 1/4, 1/2,
    # 3/4; the squared deviations from 1/2 sum to 1/8, times 2/3.
    reward_N = torch.tensor([0.0, 1, 0, 1, 0, 1, 1, 1, 0, 0, 1, 1])
    branch_N = torch.arange(6).repeat_interleave(2)
    prompt_N = torch.arange(3).repeat_interleave(4)
    _, informative = share_errors(reward_N, prompt_N, branch_N)
    assert informative == pytest.approx(math.sqrt(2 / 3 / 8))


@pytest.mark.slow
def test_standard_errors_are_the_spread_over_repeated_probes():
    """True w of these rewards is .5; the std of 60 estimates is known to 9 %, and this is 3 of that."""
    generator = torch.Generator().manual_seed(0)
    branch_N = torch.arange(12 * 4).repeat_interleave(3)
    prompt_N = torch.arange(12).repeat_interleave(12)
    shares, errors = [], []
    for _ in range(60):
        between = torch.randn(48, generator=generator, dtype=torch.float64)
        within = torch.randn(144, generator=generator, dtype=torch.float64)
        reward_N = between[branch_N] + within
        shares.append(branch_statistics(reward_N, prompt_N, branch_N)[0])
        errors.append(share_errors(reward_N, prompt_N, branch_N)[0])
    spread = torch.tensor(shares).std().item()
    assert torch.tensor(errors).mean().item() == pytest.approx(spread, rel=0.27)


def test_one_prompt_has_errors_over_its_branches_and_too_few_groups_have_none():
    reward_N = torch.tensor([0.0, 1, 0, 0.2, 1, 0.9])
    one_N, branch_N = torch.zeros(6, dtype=torch.int64), torch.tensor([0, 0, 1, 1, 2, 2])
    share, informative = share_errors(reward_N, one_N, branch_N)
    assert share is not None and share > 0 and informative == 0  # all three differ
    assert share_errors(reward_N[:4], one_N[:4], branch_N[:4]) == (None, None)
    flat_N = torch.zeros(6)
    assert share_errors(flat_N, one_N, branch_N) == (None, 0.0)
