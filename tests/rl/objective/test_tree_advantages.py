"""Credit along branching chains: by hand, by walking the tree, and what the docstrings claim.

The last part drives a one-dimensional linear-Gaussian chain whose gradient is known through kernel,
weights and loss, so that what each estimator expects of its gradient can be compared with the
derivative, edge by edge.
"""

import itertools

import pytest
import torch

from rl.objective.advantages import centred, leave_one_out
from rl.objective.denoising_weights import trained_steps
from rl.objective.losses import clipped_surrogate
from rl.objective.tree_advantages import (
    Tree,
    branch_mean,
    depth_normalised,
    leave_branch_out,
    parent_difference,
)
from rollouts.diffusion.sde import gaussian_step, step_logprob
from rollouts.step_plan import StepPlan
from tests.tiny_denoising import drawn

EVERY = [branch_mean, depth_normalised, parent_difference, leave_branch_out]


def grow(splits, num_steps, roots_P, seed=None):
    """Columns of a forest: `roots_P[p]` roots for prompt p, each with the plan's splits.

    With a seed rows and state ids are shuffled, and prompts have gaps in their ids.
    """
    plan = StepPlan(
        num_steps=num_steps,
        rule="ddim",
        level=1.0,
        stochastic=tuple(range(num_steps)),
        splits=splits,
    )
    parent, step, leaves, paths, prompts = [], [], [], [], []

    def add(path, t, prompt):
        parent.append(path[-1] if path else -1)
        step.append(t)
        leaves.append(plan.leaves_per_root // plan.states_at(t))
        path = [*path, len(parent) - 1]
        if t == num_steps:
            paths.append(path)
            prompts.append(prompt)
            return
        for _ in range(plan.children_of(t)):
            add(path, t + 1, prompt)

    for prompt, num_roots in enumerate(roots_P):
        for _ in range(num_roots):
            add([], 0, prompt)
    node_NS, parent_M = torch.tensor(paths), torch.tensor(parent)
    step_M, leaves_M, prompt_N = torch.tensor(step), torch.tensor(leaves), torch.tensor(prompts)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(node_NS), generator=generator)
        new_M = torch.randperm(len(parent_M), generator=generator)
        old_M = new_M.argsort()
        parent_M = torch.where(parent_M < 0, -1, new_M[parent_M])[old_M]
        step_M, leaves_M = step_M[old_M], leaves_M[old_M]
        node_NS, prompt_N = new_M[node_NS][rows], 3 * prompt_N[rows] + 2
    return Tree(node_NS, parent_M, step_M, leaves_M, prompt_N)


def uneven(seed):
    """Three splits, two of them nested in the last; prompts of 1, 3 and 2 roots; shuffled."""
    columns = grow(((1, 2), (2, 3), (4, 2)), 6, [1, 3, 2], seed)
    generator = torch.Generator().manual_seed(seed)
    reward_N = torch.randn(len(columns[0]), dtype=torch.float64, generator=generator)
    return reward_N, columns


def by_walking(name, reward_N, node_NS, prompt_N):
    """The definitions, one edge of one row at a time, from the paths alone."""
    rewards, paths, prompts = reward_N.tolist(), node_NS.tolist(), prompt_N.tolist()
    num_rows, num_states = node_NS.shape

    def below(state):
        return [n for n in range(num_rows) if state in paths[n]]

    def mean(rows):
        return sum(rewards[n] for n in rows) / len(rows)

    credit = torch.zeros(num_rows, num_states - 1, dtype=torch.float64)
    for n, t in itertools.product(range(num_rows), range(num_states - 1)):
        path = paths[n]
        group = [m for m in range(num_rows) if prompts[m] == prompts[n]]
        value, parent = mean(below(path[t + 1])), mean(below(path[t]))
        if name == "branch_mean":
            root = below(path[0])
            shared = len(below(path[t + 1])) == len(root)
            credit[n, t] = 0.0 if shared else rewards[n] - mean(root)
        elif name == "parent_difference":
            credit[n, t] = value - parent
        elif name == "depth_normalised":
            values = [mean(below(s)) for s in {paths[m][t + 1] for m in group}]
            if len(values) > 1:
                centre = sum(values) / len(values)
                variance = sum((v - centre) ** 2 for v in values) / (len(values) - 1)
                credit[n, t] = (value - centre) / (variance**0.5 + 1e-8)
        else:
            others = [m for m in group if paths[m][0] != path[0]]
            for s in range(t + 1):
                if len(below(path[s + 1])) < len(below(path[s])):
                    others = [m for m in below(path[s]) if path[s + 1] not in paths[m]]
            credit[n, t] = value - mean(others) if others else 0.0
    return credit


def two_roots():
    """T = 3, two roots, two children at edge 1; rewards 1, 0 below the first, 5, 2 the second."""
    columns = grow(((1, 2),), 3, [2])
    return torch.tensor([1.0, 0.0, 5.0, 2.0], dtype=torch.float64), columns


@pytest.mark.parametrize(
    ("credit", "expected"),
    [
        # The roots' means are .5 and 3.5; edge 0 is shared.
        (branch_mean, [[0, 0.5, 0.5], [0, -0.5, -0.5], [0, 1.5, 1.5], [0, -1.5, -1.5]]),
        # Only edge 1 splits.
        (parent_difference, [[0, 0.5, 0], [0, -0.5, 0], [0, 1.5, 0], [0, -1.5, 0]]),
        # Edge 0 against the other root, .5 - 3.5; below the split against the sibling.
        (leave_branch_out, [[-3, 1, 1], [-3, -1, -1], [3, 3, 3], [3, -3, -3]]),
    ],
)
def test_by_hand(credit, expected):
    reward_N, columns = two_roots()
    assert credit(reward_N, columns).tolist() == expected


def test_depth_normalised_by_hand():
    reward_N, columns = two_roots()
    advantage_NT = depth_normalised(reward_N, columns, eps=0.0)
    # Depth 1: values .5, 3.5, mean 2, unbiased std 3 / sqrt(2). Depths 2 and 3: 1, 0, 5, 2, mean 2,
    # unbiased variance (1 + 4 + 9 + 0) / 3.
    first = torch.tensor([-1.0, -1.0, 1.0, 1.0], dtype=torch.float64) / 2**0.5
    second = torch.tensor([-1.0, -2.0, 3.0, 0.0], dtype=torch.float64) / (14 / 3) ** 0.5
    torch.testing.assert_close(advantage_NT, torch.stack([first, second, second], dim=1))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("credit", EVERY)
def test_matches_the_definition_on_shuffled_uneven_trees(credit, seed):
    reward_N, columns = uneven(seed)
    expected_NT = by_walking(credit.__name__, reward_N, columns[0], columns[-1])
    torch.testing.assert_close(credit(reward_N, columns), expected_NT, atol=1e-12, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_parent_differences_telescope_and_cancel_over_the_children(seed):
    reward_N, columns = uneven(seed)
    node_NS, parent_M, _, leaves_M, _ = columns
    credit_NT = parent_difference(reward_N, columns)
    value_M = torch.zeros(len(parent_M), dtype=torch.float64)
    value_M = value_M.index_add(0, node_NS.flatten(), reward_N.repeat_interleave(7)) / leaves_M
    # Along a path: r_leaf - V(root).
    telescoped_N = reward_N - value_M[node_NS[:, 0]]
    torch.testing.assert_close(credit_NT.sum(1), telescoped_N, atol=1e-12, rtol=0)
    # One row per leaf, so the sum over rows below a state is the leaf-weighted sum over children.
    below_M = torch.zeros(len(parent_M), dtype=torch.float64)
    below_M = below_M.index_add(0, node_NS[:, :-1].flatten(), credit_NT.flatten())
    torch.testing.assert_close(below_M, torch.zeros_like(below_M), atol=1e-12, rtol=0)
    # Exactly 0 on every edge of a state with one child.
    children_M = torch.bincount(parent_M[parent_M >= 0], minlength=len(parent_M))
    assert (credit_NT[children_M[node_NS[:, :-1]] == 1] == 0).all()


def test_depth_normalised_sums_to_0_over_the_states_of_a_depth():
    reward_N, columns = uneven(0)
    node_NS, prompt_N = columns[0], columns[-1]
    advantage_NT = depth_normalised(reward_N, columns)
    for t in range(6):
        for prompt in prompt_N.unique():
            credits = {}
            for n in (prompt_N == prompt).nonzero().flatten().tolist():
                credits[int(node_NS[n, t + 1])] = advantage_NT[n, t].item()
            assert sum(credits.values()) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("credit", [depth_normalised, parent_difference, leave_branch_out])
def test_unique_edges_times_leaf_counts_are_the_rows(credit):
    """The loss over the rows of an engine's tree is one over its edges, each times its leaves."""
    plan = StepPlan(
        num_steps=4,
        rule="ddim",
        level=1.0,
        stochastic=(0, 1, 2, 3),
        splits=((0, 2), (2, 3)),
        trained=(0, 2, 3),
    )
    _, rollouts = drawn(budgets=(12, 6), plan=plan)
    tree, node_NS = rollouts.tree, rollouts.node_NS
    reward_N = torch.randn(18, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shape = Tree(node_NS, tree.parent_M, tree.step_M, tree.leaves_M, rollouts.prompt_N)
    advantage_NT = credit(reward_N, shape)
    logprob_M = torch.zeros(len(tree), dtype=torch.float64, requires_grad=True)
    logprob_NT = logprob_M[node_NS[:, 1:]]
    weight_NT = trained_steps(torch.ones_like(reward_N), rollouts.mask_NT, plan.trained)
    loss, _ = clipped_surrogate(
        logprob_NT, logprob_NT.detach(), advantage_NT, weight_NT, denominator=1.0
    )
    (gradient_M,) = torch.autograd.grad(loss, logprob_M)
    expected_M = torch.zeros(len(tree), dtype=torch.float64)
    for n, t in itertools.product(range(18), plan.trained):
        child = node_NS[n, t + 1]
        expected_M[child] = -tree.leaves_M[child] * advantage_NT[n, t]  # the same in all its rows
    torch.testing.assert_close(gradient_M, expected_M, rtol=1e-12, atol=1e-12)
    counted = [expected_M[tree.step_M == t + 1].count_nonzero() for t in range(4)]
    assert counted[0] == 6 and counted[1] == 0 and counted[2] == 18


@pytest.mark.parametrize("credit", [depth_normalised, parent_difference, leave_branch_out])
def test_rows_that_share_an_edge_share_its_credit(credit):
    reward_N, columns = uneven(1)
    advantage_NT = credit(reward_N, columns)
    node_NS = columns[0]
    for t in range(6):
        for state in node_NS[:, t + 1].unique():
            assert len(advantage_NT[node_NS[:, t + 1] == state, t].unique()) == 1


@pytest.mark.parametrize("credit", EVERY)
def test_equal_rewards_give_exactly_0_however_they_round(credit):
    _, columns = uneven(0)
    for value in (0.7, 0.1, 1e-9, 1e9 + 0.1):
        reward_N = torch.full((len(columns[0]),), value, dtype=torch.float64)
        assert not credit(reward_N, columns).any()


@pytest.mark.parametrize("credit", [branch_mean, parent_difference, leave_branch_out])
def test_a_root_of_equal_rewards_is_silent_below_its_split(credit):
    # Sum of three 0.7 over 3 is not 0.7.
    columns = grow(((1, 3),), 3, [2])
    reward_N = torch.tensor([0.7, 0.7, 0.7, 1.0, 2.0, 3.0], dtype=torch.float64)
    advantage_NT = credit(reward_N, columns)
    assert not advantage_NT[:3, 1:].any()
    assert advantage_NT[3:, 1].any()


def test_a_plan_without_splits_is_leave_one_out_and_within_a_branch_nothing():
    columns = grow((), 4, [3, 1, 2])
    prompt_N = columns[-1]
    reward_N = torch.tensor([1.0, 0.5, 0.0, 9.0, 4.0, 1.0], dtype=torch.float64)
    expected_N = leave_one_out(reward_N, prompt_N)
    advantage_NT = leave_branch_out(reward_N, columns)
    torch.testing.assert_close(advantage_NT, expected_N[:, None].expand(6, 4))
    assert not branch_mean(reward_N, columns).any()
    assert not parent_difference(reward_N, columns).any()


def test_below_its_only_split_leave_branch_out_is_leave_one_out_in_the_branch():
    columns = grow(((2, 4),), 5, [2, 3], seed=0)
    reward_N = torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected_N = leave_one_out(reward_N, columns[0][:, 0])
    advantage_NT = leave_branch_out(reward_N, columns)
    torch.testing.assert_close(advantage_NT[:, 2:], expected_N[:, None].expand(20, 3))


def test_the_prefix_of_a_prompts_only_root_is_compared_with_nothing():
    columns = grow(((2, 4),), 5, [1])
    reward_N = torch.tensor([1.0, 0.0, 3.0, 2.0], dtype=torch.float64)
    assert not leave_branch_out(reward_N, columns)[:, :2].any()
    assert not depth_normalised(reward_N, columns)[:, :2].any()


@pytest.mark.parametrize("credit", EVERY)
def test_dtype_row_order_and_a_shift_of_one_prompt(credit):
    reward_N, tree = uneven(2)
    advantage_NT = credit(reward_N, tree)
    rows = torch.randperm(len(reward_N), generator=torch.Generator().manual_seed(5))
    shuffled = tree._replace(node_NS=tree.node_NS[rows], prompt_N=tree.prompt_N[rows])
    again_NT = credit(reward_N[rows], shuffled)
    torch.testing.assert_close(again_NT, advantage_NT[rows], atol=1e-12, rtol=0)
    shifted_NT = credit(reward_N + 100.0 * (tree.prompt_N == 5), tree)
    torch.testing.assert_close(shifted_NT, advantage_NT, atol=1e-10, rtol=0)
    single_NT = credit(reward_N.float(), tree)
    assert single_NT.dtype == torch.float32


@pytest.mark.parametrize("credit", EVERY)
def test_no_rows_give_no_credit(credit):
    none = torch.zeros(0, dtype=torch.int64)
    reward_N = torch.zeros(0, dtype=torch.float64)
    assert credit(reward_N, Tree(none.reshape(0, 4), none, none, none, none)).shape == (0, 3)


@pytest.mark.parametrize("credit", EVERY)
def test_a_wrong_tree_is_refused(credit):
    reward_N, tree = two_roots()
    node_NS, parent_M, step_M, _, prompt_N = tree
    with pytest.raises(ValueError, match=r"state 0 has 2 leaves, but 1 rows go through it"):
        credit(reward_N[1:], tree._replace(node_NS=node_NS[1:], prompt_N=prompt_N[1:]))
    with pytest.raises(ValueError, match=r"must be \(4, T \+ 1\) .* got \(4, 1\)"):
        credit(reward_N, tree._replace(node_NS=node_NS[:, :1]))
    with pytest.raises(ValueError, match=r"does not follow parent_M: state 2 at place 1 of row 0"):
        credit(reward_N, tree._replace(node_NS=node_NS[:, [0, 2, 1, 3]]))
    with pytest.raises(ValueError, match=r"does not follow step_M: .* has 1, expected 0"):
        credit(reward_N, tree._replace(step_M=step_M + 1))
    with pytest.raises(ValueError, match=r"node_NS must lie in 0..11, got 0 .. 12"):
        credit(reward_N, tree._replace(node_NS=node_NS.clamp(min=0) + (node_NS == 11)))
    with pytest.raises(ValueError, match="equally long"):
        credit(reward_N, tree._replace(parent_M=parent_M[1:]))
    with pytest.raises(ValueError, match="reward_N must be finite, got nan in row 2"):
        credit(torch.tensor([0.0, 1.0, float("nan"), 1.0]), tree)
    with pytest.raises(ValueError, match="state 0 is the root of two prompts"):
        credit(reward_N, tree._replace(prompt_N=torch.tensor([0, 1, 1, 1])))


def test_depth_normalised_refuses_a_negative_eps():
    reward_N, columns = two_roots()
    with pytest.raises(ValueError, match="eps must be at least 0, got -1"):
        depth_normalised(reward_N, columns, eps=-1)


# The chain: four steps of a flow model whose output is theta_t, one number, from x_0 ~ N(0, 1); the
# reward is x_T. Through kernel, log-probabilities, credit, weights and loss, in units of dJ/dtheta_t,
# which is that of the chain without noise, as it is linear.

TRIALS = 40_000
SIGMAS = (0.9, 0.7, 0.5, 0.3, 0.1)
RULE = dict(rule="constant_sde", level=0.7, prediction="flow")


def flow_step(x_R, theta_R, t):
    """Mean and std of step t for rows of one number each."""
    now, after = SIGMAS[t], SIGMAS[t + 1]
    levels = torch.tensor([1 - now, now, 1 - after, after], dtype=torch.float64)
    mean, std_R = gaussian_step(theta_R[:, None], x_R[:, None], levels, **RULE)
    return mean[:, 0], std_R


def derivative():
    """(T,) dJ/dtheta."""
    theta_T = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    x = torch.zeros(1, dtype=torch.float64)
    for t in range(4):
        x, _ = flow_step(x, theta_T[t : t + 1], t)
    return torch.autograd.grad(x.sum(), theta_T)[0]


def simulate(splits, num_steps, num_roots, credit, trials=TRIALS, seed=0):
    """Mean gradient estimate of each theta and its standard error and variance, over many trials.

    A trial is one prompt with a theta of its own, so that the gradient of one loss over all trials is
    the estimate of each.
    """
    columns = grow(splits, num_steps, [num_roots])
    node_NS, parent_M, step_M, leaves_M, _ = columns
    num_rows, num_states = node_NS.shape[0], len(parent_M)
    generator = torch.Generator().manual_seed(seed)
    x_RM = torch.randn(trials, num_states, dtype=torch.float64, generator=generator)
    theta_RT = torch.zeros(trials, num_steps, dtype=torch.float64, requires_grad=True)
    logprob_RM = torch.zeros_like(x_RM)
    for t in range(num_steps):
        child_U = (step_M == t + 1).nonzero().flatten()
        theta_K = theta_RT[:, t].repeat_interleave(len(child_U))
        mean_K, std_K = flow_step(x_RM[:, parent_M[child_U]].flatten(), theta_K, t)
        next_K = mean_K.detach() + std_K * x_RM[:, child_U].flatten()
        logprob_K = step_logprob(next_K[:, None], mean_K[:, None], std_K)
        logprob_RM = logprob_RM.index_copy(1, child_U, logprob_K.reshape(trials, -1))
        x_RM[:, child_U] = next_K.reshape(trials, -1)
    offset_R = num_states * torch.arange(trials)
    forest = Tree(
        (node_NS + offset_R[:, None, None]).reshape(-1, num_steps + 1),
        torch.where(parent_M < 0, -1, parent_M + offset_R[:, None]).flatten(),
        step_M.repeat(trials),
        leaves_M.repeat(trials),
        torch.arange(trials).repeat_interleave(num_rows),
    )
    advantage_NT = credit(x_RM[:, node_NS[:, -1]].flatten(), forest)
    logprob_NT = logprob_RM[:, node_NS[:, 1:]].reshape(-1, num_steps)
    one_N = torch.ones(trials * num_rows, dtype=torch.float64)
    weight_NT = trained_steps(one_N, torch.ones_like(logprob_NT) > 0, range(num_steps))
    loss, _ = clipped_surrogate(
        logprob_NT, logprob_NT.detach(), advantage_NT, weight_NT, denominator=num_rows
    )
    estimate_RT = -torch.autograd.grad(loss, theta_RT)[0] / derivative()
    return estimate_RT.mean(0), estimate_RT.std(0) / trials**0.5, estimate_RT.var(0)


def leaf_left_out(reward_N, tree):
    return leave_one_out(reward_N, tree.prompt_N)[:, None].expand(-1, tree.node_NS.shape[1] - 1)


def prompt_mean(reward_N, tree):
    return centred(reward_N, tree.prompt_N)[:, None].expand(-1, tree.node_NS.shape[1] - 1)


def assert_within(mean_T, error_T, expected):
    """4 standard errors; all of the T numbers pass by chance in 1 - T * 6e-5 of all seeds."""
    expected_T = torch.as_tensor(expected, dtype=torch.float64).expand_as(mean_T)
    assert ((mean_T - expected_T).abs() < 4 * error_T).all(), (mean_T, error_T, expected_T)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("splits", "num_roots"),
    [((), 8), (((2, 4),), 2), (((0, 4),), 2), (((0, 2), (1, 2), (3, 2)), 2)],
    ids=["linear", "branch", "branch at the start", "tree"],
)
def test_leaving_out_the_branch_is_unbiased_for_every_edge(splits, num_roots):
    mean_T, error_T, _ = simulate(splits, 4, num_roots, leave_branch_out)
    assert_within(mean_T, error_T, 1.0)
    assert error_T.max() < 0.02


@pytest.mark.slow
def test_leaving_out_the_leaf_shrinks_the_prefix_and_only_the_prefix():
    # Two roots of four: 1 - (k - 1) / (n - 1) = 4/7 above the split, 1 below.
    mean_T, error_T, _ = simulate(((2, 4),), 4, 2, leaf_left_out)
    assert_within(mean_T, error_T, [4 / 7, 4 / 7, 1, 1])
    assert mean_T[0] < 1 - 40 * error_T[0]


@pytest.mark.slow
def test_the_mean_over_the_prompt_shrinks_the_prefix_by_k_over_n():
    # 1 - 4/8 above the split; below, where leaves differ, (n - 1) / n.
    mean_T, error_T, _ = simulate(((2, 4),), 4, 2, prompt_mean)
    assert_within(mean_T, error_T, [1 / 2, 1 / 2, 7 / 8, 7 / 8])


@pytest.mark.slow
def test_within_a_branch_the_estimate_is_the_partial_derivative_of_the_suffix():
    # Nothing above the split; below (k - 1) / k of the derivative with the mean as baseline.
    mean_T, error_T, _ = simulate(((2, 4),), 4, 2, branch_mean)
    assert mean_T[:2].tolist() == [0.0, 0.0]
    assert_within(mean_T[2:], error_T[2:], 3 / 4)


@pytest.mark.slow
def test_the_parents_value_gives_k_minus_1_over_k_on_splits_and_nothing_elsewhere():
    mean_T, error_T, _ = simulate(((0, 2), (2, 4)), 4, 2, parent_difference)
    assert mean_T[[1, 3]].tolist() == [0.0, 0.0]
    assert_within(mean_T[[0, 2]], error_T[[0, 2]], [1 / 2, 3 / 4])


@pytest.mark.slow
def test_branching_does_not_raise_the_variance_of_the_suffix_at_equal_leaves():
    # The siblings' shared past cancels: the reward's variance below the split is .167 of .711.
    *_, linear_T = simulate((), 4, 8, leave_branch_out)
    *_, branch_T = simulate(((2, 4),), 4, 2, leave_branch_out)
    # A variance of 40,000 estimates is known to about 2 %, the factor is about a third.
    assert (branch_T[2:] < 0.5 * linear_T[2:]).all(), (branch_T, linear_T)
