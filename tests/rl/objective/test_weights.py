import pytest
import torch

from rl.objective.advantages import leave_one_out, raft
from rl.objective.losses import clipped_surrogate
from rl.objective.weights import (
    DENOMINATORS,
    LENGTH_RULES,
    after_selection,
    denominator,
    objective_weight,
    token_weight,
)

# Prompt 0: one success in three; prompt 1: both fail; prompt 2: nothing scored; prompt 3: a success.
REWARD_N = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
PROMPT_N = torch.tensor([0, 1, 3, 0, 1, 0])
PASS_RATE_P = torch.tensor([0.5, 0.01, 0.3, 1.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ("mean", [1 / 3, 1 / 2, 1, 1 / 3, 1 / 2, 1 / 3]),
        # Times 1/0.5 for prompt 0, 1/0.05 (the floor) for prompt 1, 1 for prompt 3.
        ("log", [2 / 3, 10, 1, 2 / 3, 10, 2 / 3]),
        # One accepted row each in prompts 0 and 3.
        ("em", [1, 0, 1, 0, 0, 0]),
        ("flat", [1, 1, 1, 1, 1, 1]),
    ],
)
def test_row_weights_by_hand(objective, expected):
    weight_N = objective_weight(
        objective, REWARD_N, PROMPT_N, num_prompts=4, pass_rate_P=PASS_RATE_P
    )
    assert weight_N.tolist() == pytest.approx(expected, abs=1e-14)
    assert weight_N.dtype == torch.float64


def test_em_divides_by_the_accepted_rows_and_accepts_the_best_of_general_rewards():
    reward_N = torch.tensor([0.2, 0.9, 0.9, 0.0])
    weight_N = objective_weight("em", reward_N, torch.zeros(4).long(), num_prompts=1)
    assert weight_N.tolist() == [0, 0.5, 0.5, 0]
    assert weight_N.dtype == torch.float32


@pytest.mark.parametrize("objective", ["mean", "log", "em"])
def test_a_prompts_weight_does_not_depend_on_its_budget(objective):
    generator = torch.Generator().manual_seed(0)
    prompt_N = torch.randint(0, 5, (60,), generator=generator)
    reward_N = (torch.rand(60, generator=generator) < 0.5).double()
    pass_rate_P = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    weight_N = objective_weight(
        objective, reward_N, prompt_N, num_prompts=5, pass_rate_P=pass_rate_P
    )
    total_P = torch.zeros(5).double().index_add(0, prompt_N, weight_N)
    expected_P = 1 / pass_rate_P.double() if objective == "log" else torch.ones(5).double()
    assert len(set(prompt_N.bincount().tolist())) > 1
    torch.testing.assert_close(total_P, expected_P, atol=1e-6, rtol=0)


MASK_NT = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("row_mean", [[1, 1, 0, 0], [1, 0, 1, 1], [0, 0, 0, 0]]),  # 2/2, 3/3
        ("token_sum", [[0.25, 0.25, 0, 0], [0.375, 0, 0.375, 0.375], [0, 0, 0, 0]]),  # 2/8, 3/8
        ("token_mean", [[2, 2, 0, 0], [3, 0, 3, 3], [0, 0, 0, 0]]),
        ("row_sum", [[2, 2, 0, 0], [3, 0, 3, 3], [0, 0, 0, 0]]),
    ],
)
def test_decision_weights_by_hand(kind, expected):
    row_weight_N = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64)
    weight_NT = token_weight(kind, row_weight_N, MASK_NT, max_completion_length=8)
    assert weight_NT.tolist() == expected
    assert weight_NT.dtype == torch.float64


@pytest.mark.parametrize("objective", ["mean", "log", "em", "flat"])
@pytest.mark.parametrize("kind", LENGTH_RULES)
def test_denominators_by_hand(objective, kind):
    total = denominator(
        objective,
        kind,
        num_prompts=7,
        num_rollouts=3,
        row_weight_N=torch.tensor([2.0, 3.0, 5.0]),
        length_N=MASK_NT.sum(1),
    )
    # 2 * 2 + 3 * 3 + 5 * 0 = 13; otherwise rollouts under flat, prompts under the others.
    by_count = 3.0 if objective == "flat" else 7.0
    assert total == (13.0 if kind == "token_mean" else by_count)
    assert isinstance(total, float)


def test_an_all_fail_batch_under_em_has_a_denominator_to_divide_its_empty_sum_by():
    reward_N, prompt_N = torch.zeros(2), torch.zeros(2).long()
    weight_N = objective_weight("em", reward_N, prompt_N, num_prompts=1)
    total = denominator(
        "em",
        "token_mean",
        num_prompts=1,
        num_rollouts=2,
        row_weight_N=weight_N,
        length_N=torch.tensor([2, 3]),
    )
    assert weight_N.tolist() == [0, 0] and total == 1.0


def step_loss(objective, kind, advantage, reward_N, prompt_N, logprob_NT, mask_NT):
    num_prompts = int(prompt_N.max()) + 1
    row_weight_N = objective_weight(objective, reward_N, prompt_N, num_prompts=num_prompts)
    total = denominator(
        objective,
        kind,
        num_prompts=num_prompts,
        num_rollouts=len(reward_N),
        row_weight_N=row_weight_N,
        length_N=mask_NT.sum(1),
    )
    weight_NT = token_weight(kind, row_weight_N, mask_NT, max_completion_length=8)
    return clipped_surrogate(
        logprob_NT,
        logprob_NT.detach(),
        advantage if torch.is_tensor(advantage) else advantage(reward_N, prompt_N),
        weight_NT,
        denominator=total,
    )[0]


@pytest.mark.parametrize(
    ("objective", "kind", "expected"),
    [
        ("flat", "row_mean", -1.0),  # grpo: -(1 - 1 + 3)/3
        ("flat", "token_mean", -1 / 7),  # dapo: -(2 - 4 + 3)/7
        ("flat", "token_sum", -1 / 24),  # dr_grpo: -(2 - 4 + 3)/(3 * 8)
        ("flat", "row_sum", -1 / 3),  # luspo: -(2 - 4 + 3)/3
        ("mean", "token_mean", -0.5),  # -(1 - 2 + 3)/(2/2 + 4/2 + 1)
        ("mean", "row_mean", -1.5),  # -((1 - 1)/2 + 3)/2
    ],
)
def test_golden_losses_of_three_rows(objective, kind, expected):
    mask_NT = torch.arange(4) < torch.tensor([2, 4, 1])[:, None]
    loss = step_loss(
        objective,
        kind,
        torch.tensor([1.0, -1.0, 3.0]),
        torch.zeros(3).double(),
        torch.tensor([0, 0, 1]),
        torch.zeros(3, 4).double(),
        mask_NT,
    )
    assert loss.item() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("kind", LENGTH_RULES)
@pytest.mark.parametrize(
    ("objective", "advantage"), [("mean", leave_one_out), ("em", raft), ("flat", raft)]
)
def test_a_prompt_that_always_fails_contributes_exactly_0_and_stays_in_the_denominator(
    objective, advantage, kind
):
    generator = torch.Generator().manual_seed(0)
    logprob_NT = torch.randn(6, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    mask_NT = torch.ones(6, 4, dtype=torch.bool)
    prompt_N = torch.tensor([0, 1, 0, 1, 0, 0])
    reward_N = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0]).double()
    loss = step_loss(objective, kind, advantage, reward_N, prompt_N, logprob_NT, mask_NT)
    (grad_NT,) = torch.autograd.grad(loss, logprob_NT)
    assert (grad_NT[prompt_N == 1] == 0).all() and (grad_NT[prompt_N == 0] != 0).any()
    live = prompt_N == 0
    alone = step_loss(
        objective, kind, advantage, reward_N[live], prompt_N[live], logprob_NT[live], mask_NT[live]
    )
    # Without prompt 1 the sum is the same and the denominator smaller: 1 of 2 prompts, 4 of 6 rows;
    # under em the failing rows have no weight, so their tokens are not counted either.
    ratio = {"mean": 1 / 2, "em": 1 / 2, "flat": 4 / 6}[objective]
    ratio = 1.0 if (objective, kind) == ("em", "token_mean") else ratio
    assert loss.item() == pytest.approx(ratio * alone.item(), abs=1e-14)
    assert alone.item() != 0


def test_a_lone_rollout_contributes_0_and_stays_in_the_denominator():
    logprob_NT = torch.zeros(3, 2).double().requires_grad_()
    mask_NT = torch.ones(3, 2, dtype=torch.bool)
    reward_N, prompt_N = torch.tensor([1.0, 0.0, 1.0]).double(), torch.tensor([0, 0, 1])
    loss = step_loss("mean", "token_sum", leave_one_out, reward_N, prompt_N, logprob_NT, mask_NT)
    (grad_NT,) = torch.autograd.grad(loss, logprob_NT)
    # A = 1, -1, 0; weight 1/2 in prompt 0; constant 8; two prompts: 1 * 1/2 / 8 / 2 = 1/32.
    assert grad_NT.tolist() == [[-1 / 32, -1 / 32], [1 / 32, 1 / 32], [0, 0]]


def test_objective_weight_says_what_is_wrong():
    def weight(objective="log", prompt_N=PROMPT_N, **changes):
        settings = {"num_prompts": 4, "pass_rate_P": PASS_RATE_P} | changes
        return objective_weight(objective, REWARD_N, prompt_N, **settings)

    with pytest.raises(ValueError, match="objective must be one of mean, log, em, flat, got 'max'"):
        weight("max")
    with pytest.raises(ValueError, match=r"prompt_N must lie in 0 \.\. 2, got 0 \.\. 3"):
        weight("mean", num_prompts=3)
    with pytest.raises(ValueError, match=r"prompt_N must lie in 0 \.\. 3, got -1 \.\. 2"):
        weight("flat", PROMPT_N - 1)
    with pytest.raises(ValueError, match="the log objective needs pass_rate_P"):
        weight(pass_rate_P=None)
    with pytest.raises(ValueError, match=r"pass_rate_P must have shape \(4,\), got \(3,\)"):
        weight(pass_rate_P=PASS_RATE_P[:3])
    with pytest.raises(ValueError, match=r"pass_rate_P must lie in \[0, 1\]"):
        weight(pass_rate_P=PASS_RATE_P * 2)
    with pytest.raises(ValueError, match=r"pass_rate_P must lie in \[0, 1\]"):
        weight(pass_rate_P=PASS_RATE_P * float("nan"))
    with pytest.raises(ValueError, match=r"floor must be in \(0, 1\], got 0"):
        weight(floor=0)


def test_token_weight_and_denominator_say_what_is_wrong():
    one_N = torch.ones(3)
    with pytest.raises(ValueError, match="token_sum, token_mean, row_sum, got 'tokens'"):
        token_weight("tokens", one_N, MASK_NT, max_completion_length=8)
    with pytest.raises(ValueError, match=r"mask_NT must be bool of shape \(2, T\)"):
        token_weight("row_mean", one_N[:2], MASK_NT, max_completion_length=8)
    with pytest.raises(ValueError, match="max_completion_length must be at least 1, got 0"):
        token_weight("token_sum", one_N, MASK_NT, max_completion_length=0)
    counts = {"num_prompts": 1, "num_rollouts": 3, "row_weight_N": one_N, "length_N": one_N}
    with pytest.raises(ValueError, match="objective must be one of"):
        denominator("max", "row_mean", **counts)
    with pytest.raises(ValueError, match="must cover all 4 rollouts of the step"):
        denominator("mean", "row_mean", **counts | {"num_rollouts": 4})
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 3"):
        denominator("mean", "row_mean", **counts | {"num_prompts": 0})


# After decisions were left out

KEPT_NT = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
FULL_NT = torch.arange(4) < torch.tensor([2, 4, 3])[:, None]


def weights(kind, row_weight_N=(1.0, 1.0, 1.0), mask_NT=FULL_NT):
    row_weight_N = torch.tensor(row_weight_N, dtype=torch.float64)
    return token_weight(kind, row_weight_N, mask_NT, max_completion_length=8)


def base(objective, kind, row_weight_N, mask_NT, num_prompts=5):
    return denominator(
        objective,
        kind,
        num_prompts=num_prompts,
        num_rollouts=len(mask_NT),
        row_weight_N=torch.tensor(row_weight_N, dtype=torch.float64),
        length_N=mask_NT.sum(1),
    )


@pytest.mark.parametrize(
    ("name", "expected_NT", "total"),
    [
        # 2 + 4 + 3 decisions of the kept rows, of which 4 are kept; 21 in all rows drawn.
        ("kept_tokens", KEPT_NT.double().tolist(), 4),
        ("kept_row_tokens", KEPT_NT.double().tolist(), 9),
        ("original_tokens", KEPT_NT.double().tolist(), 21),
    ],
)
def test_denominators_after_selection_by_hand(name, expected_NT, total):
    weight_NT, found = after_selection(
        name,
        weights("token_mean"),
        FULL_NT,
        KEPT_NT,
        denominator=9.0,
        original_denominator=21.0,
    )
    assert weight_NT.tolist() == expected_NT
    assert found == pytest.approx(total, rel=1e-15) and isinstance(found, float)


def test_the_sequence_mean_over_kept_decisions_by_hand():
    weight_NT, total = after_selection(
        "kept_rows", weights("row_mean", (1.0, 1.0, 2.0)), FULL_NT, KEPT_NT, denominator=3.0
    )
    # w / L with the kept decisions as L: 1/1, none, 2/3. The empty row is 0, not 0/0, and counts.
    assert weight_NT.tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [2 / 3, 2 / 3, 2 / 3, 0]]
    assert total == 3.0


def test_kept_tokens_is_the_sum_of_the_weights_left_under_token_mean():
    row_weight_N = (0.3, 1.7, 0.25)
    weight_NT, total = after_selection(
        "kept_tokens",
        weights("token_mean", row_weight_N),
        FULL_NT,
        KEPT_NT,
        denominator=base("mean", "token_mean", row_weight_N, FULL_NT),
    )
    assert total == pytest.approx(0.3 + 3 * 0.25, rel=1e-14)
    assert total == pytest.approx(weight_NT.sum().item(), rel=1e-14)


def test_kept_tokens_scales_the_denominator_by_the_weight_left_under_any_length_rule():
    # row_mean: 1/2 of row 0, none of row 1, all of row 2 is left: 1.5 of 3 rows, of 5 prompts.
    assert after_selection("kept_tokens", weights("row_mean"), FULL_NT, KEPT_NT, denominator=5.0)[
        1
    ] == pytest.approx(2.5, rel=1e-15)
    # token_sum: 4 of 9 decisions.
    assert after_selection("kept_tokens", weights("token_sum"), FULL_NT, KEPT_NT, denominator=5.0)[
        1
    ] == pytest.approx(5 * 4 / 9, rel=1e-15)


@pytest.mark.parametrize("name", DENOMINATORS)
@pytest.mark.parametrize("kind", LENGTH_RULES)
def test_keeping_every_decision_changes_nothing(name, kind):
    weight_NT = weights(kind, (0.3, 1.7, 0.25)).float()
    after_NT, total = after_selection(
        name, weight_NT, FULL_NT, FULL_NT, denominator=2.3, original_denominator=2.3
    )
    assert torch.equal(after_NT, weight_NT) and after_NT.dtype == torch.float32
    assert total == 2.3


@pytest.mark.parametrize("name", DENOMINATORS)
@pytest.mark.parametrize("kind", LENGTH_RULES)
def test_after_selection_micro_batches_add_up_and_padding_is_irrelevant(name, kind):
    generator = torch.Generator().manual_seed(0)
    logprob_NT = torch.randn(3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    old_NT = logprob_NT.detach() + 0.1 * torch.randn(3, 4, dtype=torch.float64, generator=generator)
    advantage_N = torch.tensor([1.0, -1.0, 3.0]).double()

    def loss(mask_NT, kept_NT, logprob_NT, old_NT, rows=slice(None)):
        weight_NT, total = after_selection(
            name,
            weights(kind, (0.3, 1.7, 0.25), mask_NT),
            mask_NT,
            kept_NT,
            denominator=base("mean", kind, (0.3, 1.7, 0.25), mask_NT),
            original_denominator=11.0,
        )
        columns = (logprob_NT[rows], old_NT[rows], advantage_N[rows], weight_NT[rows])
        return clipped_surrogate(*columns, denominator=total)[0]

    whole = loss(FULL_NT, KEPT_NT, logprob_NT, old_NT)
    (grad_NT,) = torch.autograd.grad(whole, logprob_NT)
    assert (grad_NT[~KEPT_NT] == 0).all() and (grad_NT[KEPT_NT] != 0).any()
    parts = [loss(FULL_NT, KEPT_NT, logprob_NT, old_NT, rows) for rows in ([0], [1, 2])]
    torch.testing.assert_close(sum(parts), whole, atol=1e-12, rtol=0)
    (part_grad_NT,) = torch.autograd.grad(sum(parts), logprob_NT)
    torch.testing.assert_close(part_grad_NT, grad_NT, atol=1e-12, rtol=0)

    def longer(value_NT):
        return torch.nn.functional.pad(value_NT, (0, 3))

    padded = loss(longer(FULL_NT), longer(KEPT_NT), longer(logprob_NT), longer(old_NT))
    torch.testing.assert_close(padded, whole, atol=1e-12, rtol=0)


def test_original_tokens_shrinks_the_step_with_rows_and_tokens():
    # 16 rows of 5 decisions; 4 are kept, of each 1 decision: 1/20 of the decisions, and of the step.
    kept_row_NT = torch.ones(4, 5, dtype=torch.bool)
    kept_NT = torch.arange(5).expand(4, 5) == 0
    weight_NT = weights("token_mean", (1.0,) * 4, kept_row_NT)
    totals = {
        name: after_selection(
            name, weight_NT, kept_row_NT, kept_NT, denominator=20.0, original_denominator=80.0
        )
        for name in ("kept_tokens", "kept_row_tokens", "original_tokens")
    }
    step = {name: float(w.sum()) / total for name, (w, total) in totals.items()}
    assert step == pytest.approx(
        {"kept_tokens": 1, "kept_row_tokens": 1 / 5, "original_tokens": 1 / 20}, rel=1e-15
    )


def test_weights_over_drawn_rows_multiply_a_prompt_by_its_keep_ratio():
    # Prompt 0 keeps 1 of 4 rows, prompt 1 all of its 2.
    prompt_N, kept = torch.tensor([0, 0, 1, 0, 0, 1]), torch.tensor([0, 2, 5])
    reward_N = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 0.0]).double()
    drawn_K = objective_weight("mean", reward_N, prompt_N, num_prompts=2)[kept]
    loss_K = objective_weight("mean", reward_N[kept], prompt_N[kept], num_prompts=2)
    assert drawn_K.tolist() == [1 / 4, 1 / 2, 1 / 2]
    assert loss_K.tolist() == [1, 1 / 2, 1 / 2]


def test_no_kept_weight_leaves_the_denominator_to_divide_an_empty_sum_by():
    for name in DENOMINATORS:
        weight_NT, total = after_selection(
            name,
            weights("row_mean"),
            FULL_NT,
            torch.zeros_like(FULL_NT),
            denominator=3.0,
            original_denominator=3.0,
        )
        assert not weight_NT.any() and total == 3.0


def test_after_selection_says_what_is_wrong():
    good = (weights("token_mean"), FULL_NT, KEPT_NT)
    with pytest.raises(ValueError, match="name must be one of kept_tokens, kept_row_tokens, "):
        after_selection("tokens", *good, denominator=1.0)
    with pytest.raises(ValueError, match=r"share one shape, got \(3, 4\), \(3, 4\) and \(2, 4\)"):
        after_selection("kept_tokens", *good[:2], KEPT_NT[:2], denominator=1.0)
    with pytest.raises(ValueError, match=r"must be bool, got torch.bool and torch.float64"):
        after_selection("kept_tokens", *good[:2], KEPT_NT.double(), denominator=1.0)
    with pytest.raises(ValueError, match="True off the mask, first at row 0, step 2"):
        after_selection("kept_tokens", *good[:2], torch.ones_like(KEPT_NT), denominator=1.0)
    with pytest.raises(ValueError, match="original_tokens needs original_denominator"):
        after_selection("original_tokens", *good, denominator=1.0)
