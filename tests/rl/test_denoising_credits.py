"""Credits of samples and of steps, and the rows and steps that train by them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rl.objective import advantages
from rl.objective import tree_advantages as branch_advantages
from rl.objective.prompt_history import PromptHistory
from rl.policies.diffusion import decision_weights, validations_of
from rl.stages.denoising_objective import credit_of, denoising_loss, keep_of
from rl.stages.objective import has_signal, with_credit
from tests import tiny_denoising as tiny
from tests.tiny_denoising import drawn
from tests.tiny_pipelines import image_prompts

torch.set_num_threads(1)


def config(**settings):
    return tiny.config("unused", **settings)


REWARDS = [1.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.3, 0.6, 0.9]
"""Branches 1, 0, .5 (mean .5) and 0, 0, 0 of prompt 0, whose mean is .25; .3, .6, .9 of prompt 1."""


def scored(reward_N=REWARDS):
    _, rollouts = drawn()
    return replace(rollouts, reward_N=torch.tensor(reward_N, dtype=torch.float64))


def credit(rollouts, *, history=None, rows=None, prompts=None, **settings):
    settings = {"credit_scale": "none", "advantage_clip": None} | settings
    rows = rows or {f"prompt-{i}": i for i in range(2)}
    return credit_of(config(**settings), rows, history)(rollouts, prompts or image_prompts(2))


def test_credit_is_compared_with_the_prompt_or_with_siblings():
    rollouts = scored()
    # Means .25 and .6.
    expected = [0.75, -0.25, 0.25, -0.25, -0.25, -0.25, -0.3, 0.0, 0.3]
    assert credit(rollouts).tolist() == pytest.approx(expected)
    # 1 - (0 + .5)/2, 0 - (1 + .5)/2, .5 - 1/2; .3 - .75, .6 - .6, .9 - .45.
    expected = [0.75, -0.75, 0.0, 0.0, 0.0, 0.0, -0.45, 0.0, 0.45]
    assert credit(rollouts, baseline="siblings").tolist() == pytest.approx(expected, abs=1e-12)


def test_credit_is_divided_by_the_std_of_the_prompt_or_of_the_batch():
    rollouts = scored()
    plain = credit(rollouts)
    everything = np.array(REWARDS)
    batch = credit(rollouts, credit_scale="batch")
    torch.testing.assert_close(batch, plain / everything.std(), rtol=1e-7, atol=0)
    assert torch.equal(
        credit(rollouts, credit_scale="prompt"),
        advantages.grpo(rollouts.reward_N, rollouts.prompt_N, correction=0, eps=1e-6),
    )
    siblings = credit(rollouts, baseline="siblings")
    std_N = torch.tensor([everything[:6].std()] * 6 + [everything[6:].std()] * 3)
    scaled = credit(rollouts, baseline="siblings", credit_scale="prompt")
    torch.testing.assert_close(scaled, siblings / std_N, rtol=1e-7, atol=0)
    tree = credit(rollouts, baseline="parent", credit_scale="prompt")
    plain = credit(rollouts, baseline="parent")
    torch.testing.assert_close(tree, plain / std_N[:, None], rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    ("baseline", "function"),
    [
        ("branch", branch_advantages.branch_mean),
        ("leave_one_out", branch_advantages.leave_branch_out),
        ("depth", branch_advantages.depth_normalised),
        ("parent", branch_advantages.parent_difference),
    ],
)
def test_credits_of_the_steps_of_one_chain_are_those_of_the_tree(baseline, function):
    rollouts = scored()
    tree = rollouts.tree
    expected_NT = function(
        rollouts.reward_N,
        branch_advantages.Tree(
            rollouts.node_NS, tree.parent_M, tree.step_M, tree.leaves_M, rollouts.prompt_N
        ),
    )
    assert torch.equal(credit(rollouts, baseline=baseline), expected_NT)
    std = np.array(REWARDS).std()
    scaled = credit(rollouts, baseline=baseline, credit_scale="batch")
    torch.testing.assert_close(scaled, expected_NT / std, rtol=1e-7, atol=0)


@pytest.mark.parametrize("baseline", ["prompt", "siblings", "branch", "leave_one_out", "parent"])
@pytest.mark.parametrize("scale", ["none", "prompt", "batch"])
def test_equal_rewards_earn_exactly_nothing(baseline, scale):
    rollouts = scored([0.1] * 6 + [0.7] * 3)
    found = credit(rollouts, baseline=baseline, credit_scale=scale)
    # Roots of one prompt have equal means here, so nothing is compared across prompts.
    assert (found == 0).all()
    assert not has_signal(with_credit(rollouts, found)).any()


def test_credit_is_cut_off_at_both_ends_in_the_loss_and_not_before():
    found = credit(scored(), baseline="siblings", advantage_clip=0.5)
    assert found.tolist() == pytest.approx([0.75, -0.75, 0, 0, 0, 0, -0.45, 0, 0.45], abs=1e-12)
    made = config(advantage_clip=0.5)
    for advantage in (found, found[:, None].repeat(1, 4)):
        logprob_NT = torch.zeros(9, 4, dtype=torch.float64, requires_grad=True)
        one_NT = torch.ones(9, 4, dtype=torch.float64)
        old_NT = torch.zeros_like(logprob_NT)
        sizes = {"denominator": 1.0, "elements": 64}
        loss, _ = denoising_loss(made)(logprob_NT, old_NT, advantage, one_NT, **sizes)
        # At ratio 1 the gradient is minus the advantage.
        (gradient_NT,) = torch.autograd.grad(loss, logprob_NT)
        for edge in range(4):
            expected = [-0.5, 0.5, 0.0, 0.0, 0.0, 0.0, 0.45, 0.0, -0.45]
            assert gradient_NT[:, edge].tolist() == pytest.approx(expected, abs=1e-12)


def test_rows_are_chosen_by_advantages_that_are_not_cut_off():
    """Of three siblings beyond the clip the best trains, not the last; so of the worst."""
    history = PromptHistory(steps=8)
    history.observe(torch.tensor([0.5, 0.49] * 200).double(), torch.zeros(400, dtype=torch.int64))
    settings = {"baseline": "history", "advantage_clip": 5.0, "history": history}
    rollouts = scored([0.9, 0.85, 0.8, 0.1, 0.05, 0.15, 0.3, 0.3, 0.3])
    z_N = credit(rollouts, **settings)
    assert z_N[:3].min() > 5 and z_N[3:6].max() < -5
    keep = keep_of(config(branch_threshold=0.5, advantage_clip=5.0))
    assert keep(with_credit(rollouts, z_N), 0.0).tolist() == [0, 4]


def test_a_step_in_which_every_reward_failed_is_a_step_of_the_history():
    history = PromptHistory(steps=1)
    settings = {"baseline": "history", "history": history}
    credit(scored(), **settings)
    assert history.past(0) == REWARDS[:6]
    none = replace(scored().take(torch.zeros(0, dtype=torch.int64)))
    assert credit(none, **settings).shape == (0,)
    assert history.past(0) == []


def test_a_history_is_of_data_set_rows_and_is_told_every_step():
    """Two steps that draw the prompts in another order; the second knows the first's rewards."""
    history = PromptHistory(steps=2)
    rows, prompts = {"prompt-0": 7, "prompt-1": 4}, image_prompts(2)
    settings = {"baseline": "history", "history": history, "rows": rows}
    first = credit(scored(), prompts=prompts, **settings)
    r = np.array(REWARDS)
    assert history.past(7) == REWARDS[:6] and history.past(4) == REWARDS[6:]
    expected = (r[:6] - r[:6].mean()) / r[:6].std(ddof=1)
    assert first[:6].tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    second = credit(scored([0.8] * 9), prompts=prompts[::-1], **settings)
    known = np.array(REWARDS[6:] + [0.8] * 6)  # of data-set row 4, now the batch's prompt 0
    assert second[0].item() == pytest.approx((0.8 - known.mean()) / known.std(ddof=1), rel=1e-6)
    assert history.past(4) == REWARDS[6:] + [0.8] * 6


def test_a_buffer_of_few_rewards_is_used_once_it_is_full():
    history = PromptHistory(rewards=6)
    settings = {"baseline": "buffer", "history_steps": 6, "history": history}
    rollouts = scored()
    r = np.array(REWARDS)
    found = credit(rollouts, **settings)
    # Prompt 0 has 6 rewards, its own; prompt 1 has 3, so all of the step's count.
    assert found[0].item() == pytest.approx((1 - r[:6].mean()) / r[:6].std(), rel=1e-4)
    assert found[8].item() == pytest.approx((0.9 - r.mean()) / r.std(), rel=1e-4)
    found = credit(scored([0.0] * 6 + [0.3, 0.3, 0.6]), **settings)
    known = np.array([0.3, 0.6, 0.9, 0.3, 0.3, 0.6])
    assert found[8].item() == pytest.approx((0.6 - known.mean()) / known.std(), rel=1e-4)


def test_nothing_scored_earns_nothing():
    none = scored().take(torch.zeros(0, dtype=torch.int64))
    assert credit(none, baseline="parent").shape == (0,)


def test_a_credit_of_steps_leaves_their_mean_as_the_rows():
    """By hand: the last of four edges drew no noise, so its credit does not count."""
    _, rollouts = drawn(plan=replace(config().step_plan(0), stochastic=(0, 1, 2)))
    advantage_NT = torch.tensor([[1.0, -1.0, 0.0, 5.0]] * 9, dtype=torch.float64)
    advantage_NT[0] = torch.tensor([3.0, 0.0, 3.0, 5.0])
    advantage_NT[8] = torch.tensor([0.0, 0.0, 0.0, 5.0])
    found = with_credit(rollouts, advantage_NT)
    assert found.advantage_NT[0].tolist() == [3, 0, 3, 0]
    assert found.advantage_N.tolist() == [2.0, *[0.0] * 8]
    assert has_signal(found).tolist() == [True] * 8 + [False]  # opposite credits are a signal
    one_a_row = with_credit(rollouts, torch.arange(9.0))
    assert one_a_row.advantage_NT is None and has_signal(one_a_row).tolist() == [False] + [True] * 8


# Rows and steps that train


def test_the_best_and_the_worst_of_each_branch_train():
    rollouts = with_credit(scored(), torch.tensor([0.9, -0.9, 0.1, 0, 0, 0, -0.4, 0.2, 0.4]))
    assert keep_of(config())(rollouts, 0.0).tolist() == list(range(9))
    assert keep_of(config(branch_threshold=0.0))(rollouts, 0.0).tolist() == [0, 1, 6, 8]
    assert keep_of(config(branch_threshold=0.5))(rollouts, 0.0).tolist() == [0, 1]
    assert keep_of(config(branch_threshold=0.3))(rollouts, 0.0).tolist() == [0, 1, 6, 8]


def test_trained_steps_weigh_alike_or_by_their_noise():
    engine, rollouts = drawn()  # edges 0 .. 2 are trained, 3 draws noise as well
    assert decision_weights(config(), rollouts).tolist() == [[1, 1, 1, 0]] * 9
    found = decision_weights(config(noise_weight="std"), rollouts)
    std = [engine.replay(rollouts, step=step)[1][0].item() for step in range(4)]
    expected = [s / np.mean(std[:3]) for s in std[:3]] + [0.0]  # of all edges but the last
    assert found.tolist() == [pytest.approx(expected, rel=1e-6)] * 9


def test_validation_samples_once_with_noise_and_once_without():
    found = validations_of(config(eval_rollouts_per_prompt=5))
    assert {name: count for name, (count, _) in found.items()} == {"deterministic": 5, "sampled": 5}
    still, noisy = found["deterministic"][1], found["sampled"][1]
    assert (still.num_steps, still.stochastic, still.level, still.splits) == (4, (), 0.0, ())
    assert (noisy.num_steps, noisy.stochastic, noisy.level, noisy.splits) == (
        4,
        (0, 1, 2, 3),
        1,
        (),
    )
    found = validations_of(config(validation_steps=7))
    assert found["sampled"][1].stochastic == tuple(range(7))
    # The noise of training where it draws some on part of the chain only.
    part = tiny.CHAIN | {"stochastic": {"schedule": "last_steps", "last": 3}}
    assert validations_of(config(plan=part))["sampled"][1].stochastic == (1, 2, 3)
    # And of every edge where a window of noise ever is, not of the first step's.
    moving = {"schedule": "sliding_window", "size": 1, "every": 1, "stop": 3}
    moved = tiny.CHAIN | {"stochastic": moving}
    for steps, expected in ((1, (0,)), (2, (0, 1)), (9, (0, 1, 2))):
        found = validations_of(config(plan=moved, max_steps=steps))
        assert found["sampled"][1].stochastic == expected
        assert found["deterministic"][1].stochastic == ()
