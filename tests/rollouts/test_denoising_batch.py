from dataclasses import replace

import pytest
import torch

from rollouts.batch import DenoisingRollouts, Rollouts, StateTree, concatenate
from rollouts.step_plan import StepPlan

PLAN = StepPlan(num_steps=2, rule="cps", level=0.7, stochastic=(1,), splits=((1, 2),), trained=(1,))


def tree(**changes):
    """Two prompts, one root each, whose second edge has two children."""
    columns = {
        "latent_M": torch.arange(8.0).view(8, 1),
        "parent_M": torch.tensor([-1, -1, 0, 1, 2, 2, 3, 3]),
        "step_M": torch.tensor([0, 0, 1, 1, 2, 2, 2, 2]),
        "leaves_M": torch.tensor([2, 2, 2, 2, 1, 1, 1, 1]),
        "prompt_M": torch.tensor([0, 1, 0, 1, 0, 0, 1, 1]),
        "levels": torch.tensor([[0.0, 1.0, 0.5, 0.5], [0.5, 0.5, 0.8, 0.2]], dtype=torch.float64),
        "timesteps": torch.tensor([1000.0, 500.0]),
        "plan": PLAN,
        "conditions": {"prompt_embeds": torch.arange(6.0).view(2, 3)},
    }
    return StateTree(**columns | changes)


def four(**changes):
    columns = {
        "prompt_N": torch.tensor([0, 0, 1, 1]),
        "mask_NT": torch.tensor([[False, True]]).repeat(4, 1),
        "logprob_NT": torch.tensor([[0.0, -1], [0, -2], [0, -3], [0, -4]], dtype=torch.float64),
        "version": 3,
        "branch_N": torch.tensor([0, 0, 1, 1]),
        "node_NS": torch.tensor([[0, 2, 4], [0, 2, 5], [1, 3, 6], [1, 3, 7]]),
        "seed_N": torch.tensor([11, 12, 13, 14]),
        "tree": tree(),
    }
    return DenoisingRollouts(**columns | changes)


def test_take_keeps_the_columns_in_step_and_shares_the_tree():
    batch = four()
    taken = batch.take(torch.tensor([3, 0]))
    assert taken.node_NS.tolist() == [[1, 3, 7], [0, 2, 4]]
    assert taken.branch_N.tolist() == [1, 0]
    assert taken.seed_N.tolist() == [14, 11]
    assert taken.tree is batch.tree


def test_credit_of_single_steps_is_a_column_of_any_rollouts():
    credit_NT = torch.arange(8.0).view(4, 2)
    batch = replace(four(), advantage_NT=credit_NT).take(torch.tensor([2]))
    assert batch.advantage_NT.tolist() == [[4.0, 5.0]]
    with pytest.raises(ValueError, match=r"advantage_NT has shape \(4,\), expected \(4, 2\)"):
        replace(four(), advantage_NT=torch.zeros(4))


def paths(batch):
    """Every row's latents and prompt embedding, whatever the numbers of states."""
    tree = batch.tree
    conditions_N = tree.conditions["prompt_embeds"][tree.prompt_M[batch.node_NS[:, -1]]]
    return tree.latent_M[batch.node_NS].flatten(1).tolist(), conditions_N.tolist()


def check_tree(batch):
    """Rows walk up by `parent_M`; step, prompt and leaf counts are those of the walk."""
    tree = batch.tree
    for row, nodes in enumerate(batch.node_NS.tolist()):
        assert tree.parent_M[nodes].tolist() == [-1, *nodes[:-1]]
        assert tree.step_M[nodes].tolist() == list(range(len(nodes)))
        assert (tree.prompt_M[nodes] == batch.prompt_N[row]).all()


def test_batches_of_other_prompts_are_chained_with_their_trees():
    other = four(
        tree=tree(
            latent_M=torch.arange(8.0).view(8, 1) + 50,
            conditions={"prompt_embeds": torch.ones(2, 3)},
        )
    )
    joined = concatenate([four(), other], offsets=[0, 2])
    check_tree(joined)
    assert joined.prompt_N.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert joined.branch_N.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(joined.tree) == 16
    for ours, first, second in zip(paths(joined), paths(four()), paths(other), strict=True):
        assert ours == first + second


def test_rounds_of_one_list_of_prompts_keep_its_conditions():
    joined = concatenate([four(), four()])
    check_tree(joined)
    assert joined.prompt_N.tolist() == [0, 0, 1, 1] * 2
    assert joined.branch_N.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(joined.tree.conditions["prompt_embeds"]) == 2
    assert paths(joined)[0] == paths(four())[0] * 2


def test_parts_of_one_batch_go_back_to_its_tree():
    batch = four()
    joined = concatenate([batch.take(torch.tensor([2, 3])), batch.take(torch.tensor([0]))])
    assert joined.tree is batch.tree
    assert joined.branch_N.tolist() == [1, 1, 0]
    assert paths(joined) == paths(batch.take(torch.tensor([2, 3, 0])))


def test_trees_that_do_not_fit_together_are_refused():
    with pytest.raises(
        ValueError, match=r"running totals.*got \[0, 3\] for conditions of \[2, 2\]"
    ):
        concatenate([four(), four()], offsets=[0, 3])
    with pytest.raises(ValueError, match="batches of different prompts need offsets"):
        concatenate([four(), four(tree=tree(conditions={"prompt_embeds": torch.ones(2, 3)}))])
    with pytest.raises(ValueError, match="trees of one batch must have one levels"):
        concatenate([four(), four(tree=tree(levels=torch.ones(2, 4, dtype=torch.float64)))])
    with pytest.raises(ValueError, match="trees of one batch must have one plan"):
        concatenate([four(), four(tree=tree(plan=replace(PLAN, level=0.5)))])


def test_columns_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"node_NS has shape \(4, 2\), expected \(4, 3\)"):
        four(node_NS=torch.zeros(4, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="node_NS must index the 8 states.*from 0 to 8"):
        four(node_NS=four().node_NS.clamp(max=6) + four().node_NS // 7 * 2)
    with pytest.raises(ValueError, match=r"logprob_NT must be float64, got torch\.float32"):
        four(logprob_NT=four().logprob_NT.float())
    with pytest.raises(ValueError, match=r"branch_N must be int64, got torch\.int32"):
        four(branch_N=four().branch_N.int())
    longer = tree(
        plan=StepPlan(num_steps=3, rule="cps", level=0.7, stochastic=()),
        levels=torch.ones(3, 4, dtype=torch.float64),
        timesteps=torch.zeros(3),
    )
    with pytest.raises(ValueError, match="mask_NT has 2 steps, the plan of the tree 3"):
        four(tree=longer)


def test_a_tree_that_is_none_is_refused():
    with pytest.raises(ValueError, match="one step after its parent, and a root at step 0"):
        tree(parent_M=torch.tensor([-1, -1, 0, 1, 2, 2, 1, 3]))
    with pytest.raises(ValueError, match="one step after its parent, and a root at step 0"):
        tree(parent_M=torch.tensor([-1, -1, 0, 1, 2, 2, -1, 3]))
    with pytest.raises(ValueError, match=r"leaves_M must be int64 of shape \(8,\).*torch\.float32"):
        tree(leaves_M=torch.ones(8))
    plan = StepPlan(num_steps=1, rule="cps", level=0.7, stochastic=())
    with pytest.raises(ValueError, match="states lie at steps 0 to 2, but the plan has 1 steps"):
        tree(plan=plan, levels=torch.ones(1, 4), timesteps=torch.ones(1))
    with pytest.raises(ValueError, match=r"must have 2 rows.*shapes \(2, 3\) and \(2,\)"):
        tree(levels=torch.zeros(2, 3))


def test_plain_rollouts_do_not_know_trees():
    plain = Rollouts(
        prompt_N=torch.tensor([0]),
        mask_NT=torch.ones(1, 2, dtype=torch.bool),
        logprob_NT=torch.zeros(1, 2),
        version=0,
    )
    assert len(concatenate([plain, plain])) == 2
