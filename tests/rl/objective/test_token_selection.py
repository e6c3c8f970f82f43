import itertools
import math

import pytest
import torch

from rl.objective.losses import clipped_surrogate
from rl.objective.sequence_losses import gspo_token
from rl.objective.token_selection import above_quantile, top_entropy, top_tokens
from rl.objective.weights import (
    DENOMINATORS,
    LENGTH_RULES,
    after_selection,
    denominator,
    token_weight,
)
from samplers.downsampling import token_fraction

# Eight decisions; the row of advantage 0 has score 0 whatever its entropy.
ADVANTAGE_N = torch.tensor([2.0, -0.5, 0.0])
ENTROPY_NT = torch.tensor([[0.1, 0.6, 0.3], [1.2, 0.2, 0.0], [2.0, 1.0, 0.5]])
MASK_NT = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]], dtype=torch.bool)


def places(kept_NT):
    return [tuple(place) for place in kept_NT.nonzero().tolist()]


def random_rows(seed=0, num_rollouts=7, num_steps=6, holes=True):
    """Ragged rows with tool output inside, an empty row, an advantage 0 and rubbish off the mask."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_rollouts, num_steps)
    length_N1 = torch.randint(1, num_steps + 1, (num_rollouts, 1), generator=generator)
    mask_NT = torch.arange(num_steps) < length_N1
    if holes:
        mask_NT &= torch.rand(shape, generator=generator) < 0.8
    mask_NT[-1] = False
    entropy_NT = torch.rand(shape, generator=generator) * 3
    entropy_NT = torch.where(mask_NT, entropy_NT, 99.0)
    advantage_N = torch.randn(num_rollouts, generator=generator)
    advantage_N[1] = 0
    return advantage_N, entropy_NT, mask_NT


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [(0.25, [(0, 1), (0, 2)]), (0.5, [(0, 0), (0, 1), (0, 2), (1, 0)])],
)
def test_golden_tokens(fraction, expected):
    # Scores .2 1.2 .6 | .6 .1 | 0 0 0: the tie at .6 goes to the earlier row.
    assert places(top_tokens(ADVANTAGE_N, ENTROPY_NT, MASK_NT, fraction=fraction)) == expected


def by_loop(advantage_N, entropy_NT, mask_NT, fraction):
    """Every decision with its score, ranked, one list for all."""
    ranked = sorted(
        (-abs(float(advantage_N[i])) * float(entropy_NT[i, t]), i, t)
        for i, t in mask_NT.nonzero().tolist()
    )
    num = min(len(ranked), math.ceil(fraction * len(ranked) - 1e-9))
    return sorted((i, t) for _, i, t in ranked[:num])


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.83, 1.0])
def test_matches_the_definition(seed, fraction):
    rows = random_rows(seed)
    assert places(top_tokens(*rows, fraction=fraction)) == by_loop(*rows, fraction)
    # Per response it is the same of each row alone.
    apart = [
        (i, t)
        for i in range(7)
        for _, t in by_loop(*(column[i : i + 1] for column in rows), fraction)
    ]
    assert places(top_tokens(*rows, fraction=fraction, scope="response")) == apart


@pytest.mark.parametrize("seed", range(5))
def test_exactly_m_are_kept_none_below_a_dropped_one_and_none_off_the_mask(seed):
    advantage_N, entropy_NT, mask_NT = random_rows(seed)
    score_NT = advantage_N.abs()[:, None] * entropy_NT
    kept_NT = top_tokens(advantage_N, entropy_NT, mask_NT, fraction=0.4)
    assert int(kept_NT.sum()) == math.ceil(0.4 * int(mask_NT.sum()) - 1e-9)
    assert not (kept_NT & ~mask_NT).any()
    assert score_NT[kept_NT].min() >= score_NT[mask_NT & ~kept_NT].max()


def test_the_count_forgives_the_rounding_of_the_fraction():
    assert 0.07 * 100 > 7  # 7.000000000000001
    mask_NT = torch.ones(10, 10, dtype=torch.bool)
    kept_NT = top_tokens(torch.ones(10), torch.rand(10, 10), mask_NT, fraction=0.07)
    assert int(kept_NT.sum()) == 7


@pytest.mark.parametrize("scope", ["batch", "response"])
def test_a_fraction_of_1_is_the_mask(scope):
    rows = random_rows()
    assert torch.equal(top_tokens(*rows, fraction=1.0, scope=scope), rows[2])


def test_ties_go_to_the_earlier_row_then_step_and_score_0_comes_last():
    mask_NT = torch.ones(3, 3, dtype=torch.bool)
    even_NT = torch.ones(3, 3)
    kept_NT = top_tokens(torch.tensor([0.0, 1.0, -1.0]), even_NT, mask_NT, fraction=4 / 9)
    assert places(kept_NT) == [(1, 0), (1, 1), (1, 2), (2, 0)]
    kept_NT = top_tokens(torch.tensor([0.0, 1.0, -1.0]), even_NT, mask_NT, fraction=7 / 9)
    assert places(kept_NT)[0] == (0, 0) and int(kept_NT.sum()) == 7


@pytest.mark.parametrize("seed", range(5))
def test_per_response_it_is_entropy_ranking_under_outcome_rewards(seed):
    advantage_N, entropy_NT, mask_NT = random_rows(seed)
    advantage_N[1] = 0.3  # with 0 every score of the row is 0
    settings = {"fraction": 0.3, "scope": "response"}
    kept_NT = top_tokens(advantage_N, entropy_NT, mask_NT, **settings)
    assert torch.equal(kept_NT, top_entropy(entropy_NT, mask_NT, **settings))
    pooled_NT = top_tokens(advantage_N, entropy_NT, mask_NT, fraction=0.3)
    assert not torch.equal(pooled_NT, top_entropy(entropy_NT, mask_NT, fraction=0.3))


def test_top_entropy_by_hand():
    # 8 decisions, ceil(1.6) = 2 of them: 2.0 and 1.2.
    assert places(top_entropy(ENTROPY_NT, MASK_NT, fraction=0.2)) == [(1, 0), (2, 0)]


@pytest.mark.parametrize("scope", ["batch", "response"])
def test_what_changes_nothing(scope):
    advantage_N, entropy_NT, mask_NT = random_rows(3)

    def kept(advantage, entropy, mask):
        return top_tokens(advantage, entropy, mask, fraction=0.35, scope=scope)

    expected_NT = kept(advantage_N, entropy_NT, mask_NT)
    # Sign and scale of all advantages, dtype, padding, rubbish off the mask.
    assert torch.equal(kept(-4 * advantage_N, entropy_NT, mask_NT), expected_NT)
    assert torch.equal(kept(advantage_N.double(), entropy_NT.double(), mask_NT), expected_NT)
    rubbish_NT = entropy_NT.masked_fill(~mask_NT, math.nan)
    assert torch.equal(kept(advantage_N, rubbish_NT, mask_NT), expected_NT)
    longer = [torch.nn.functional.pad(x, (0, 4)) for x in (entropy_NT, mask_NT, expected_NT)]
    assert torch.equal(kept(advantage_N, *longer[:2]), longer[2])
    # Without ties, rows in another order keep the same decisions.
    order = torch.randperm(len(mask_NT), generator=torch.Generator().manual_seed(0))
    advantage_N = advantage_N.where(advantage_N != 0, 0.01)
    expected_NT = kept(advantage_N, entropy_NT, mask_NT)
    again_NT = kept(advantage_N[order], entropy_NT[order], mask_NT[order])
    assert torch.equal(again_NT, expected_NT[order])


def test_selecting_per_micro_batch_would_be_another_selection():
    advantage_N, entropy_NT, mask_NT = random_rows(1)
    whole_NT = top_tokens(advantage_N, entropy_NT, mask_NT, fraction=0.3)
    parts = [
        top_tokens(advantage_N[rows], entropy_NT[rows], mask_NT[rows], fraction=0.3)
        for rows in (slice(0, 3), slice(3, 7))
    ]
    assert not torch.equal(torch.cat(parts), whole_NT)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_every_rank_finds_the_same_from_the_gathered_rows(num_ranks):
    advantage_N, entropy_NT, mask_NT = random_rows(5)
    entropy_NT = entropy_NT.round(decimals=1)  # with ties
    expected_NT = top_tokens(advantage_N, entropy_NT, mask_NT, fraction=0.4)
    shares = [torch.arange(rank, 7, num_ranks) for rank in range(num_ranks)]
    # Each rank knows the entropies of its own rows; they meet by global row.
    gathered_NT = torch.zeros_like(entropy_NT)
    for share in reversed(shares):
        gathered_NT[share] = entropy_NT[share]
    kept_NT = top_tokens(advantage_N, gathered_NT, mask_NT, fraction=0.4)
    for share in shares:
        assert torch.equal(kept_NT[share], expected_NT[share])


def test_advantages_may_vary_within_a_row():
    advantage_NT = torch.tensor([[0.0, -3.0], [1.0, 1.0]])
    mask_NT = torch.ones(2, 2, dtype=torch.bool)
    kept_NT = top_tokens(advantage_NT, torch.ones(2, 2), mask_NT, fraction=0.25)
    assert places(kept_NT) == [(0, 1)]


def test_entropy_and_advantage_receive_no_gradient():
    advantage_N, entropy_NT = ADVANTAGE_N.clone(), ENTROPY_NT.clone()
    rows = (advantage_N.requires_grad_(), entropy_NT.requires_grad_(), MASK_NT)
    kept_NT = top_tokens(*rows, fraction=0.5)
    assert not kept_NT.requires_grad
    logprob_NT = entropy_NT.double() * 0.5  # a graph in which the entropy could be reached
    weight_NT = kept_NT.double()
    (grad_NT,) = torch.autograd.grad(
        (weight_NT * logprob_NT).sum(), entropy_NT, materialize_grads=True
    )
    torch.testing.assert_close(grad_NT, 0.5 * weight_NT.float())


@pytest.mark.parametrize("loss", [clipped_surrogate, gspo_token])
def test_a_dropped_token_has_gradient_exactly_0(loss):
    advantage_N, entropy_NT, mask_NT = random_rows(2)
    generator = torch.Generator().manual_seed(0)
    logprob_NT = torch.randn(mask_NT.shape, dtype=torch.float64, generator=generator)
    logprob_NT.requires_grad_()
    kept_NT = top_tokens(advantage_N, entropy_NT, mask_NT, fraction=0.4)
    more = {"mask_NT": mask_NT} if loss is gspo_token else {}
    value, _ = loss(
        logprob_NT,
        logprob_NT.detach(),
        advantage_N.double(),
        kept_NT.double(),
        denominator=3.0,
        **more,
    )
    (grad_NT,) = torch.autograd.grad(value, logprob_NT)
    assert (grad_NT[~kept_NT] == 0).all() and (grad_NT[kept_NT] != 0).all()


def test_masking_the_outer_sum_of_gspo_drops_no_token():
    # The ratio of a whole row, by definition; only its first decision is kept.
    logprob_NT = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    ratio = logprob_NT.mean(1, keepdim=True).exp()
    kept_NT = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    (grad_NT,) = torch.autograd.grad((kept_NT * ratio).sum(), logprob_NT)
    assert grad_NT.tolist() == [[pytest.approx(1 / 3)] * 3]  # all three alike, and none is 0


@pytest.mark.parametrize("name", DENOMINATORS)
@pytest.mark.parametrize("kind", LENGTH_RULES)
def test_with_all_rows_and_tokens_kept_loss_and_gradient_are_the_plain_ones(name, kind):
    advantage_N, entropy_NT, mask_NT = random_rows(4)
    row_weight_N = torch.tensor([0.5, 0.5, 1.0, 0.25, 0.25, 0.25, 0.25], dtype=torch.float64)
    weight_NT = token_weight(kind, row_weight_N, mask_NT, max_completion_length=6)
    total = denominator(
        "mean",
        kind,
        num_prompts=3,
        num_rollouts=7,
        row_weight_N=row_weight_N,
        length_N=mask_NT.sum(1),
    )
    kept_NT = top_tokens(advantage_N, entropy_NT, mask_NT, fraction=token_fraction(1.0))
    after_NT, after = after_selection(
        name, weight_NT, mask_NT, kept_NT, denominator=total, original_denominator=total
    )
    generator = torch.Generator().manual_seed(0)
    logprob_NT = torch.randn(mask_NT.shape, dtype=torch.float64, generator=generator)
    logprob_NT.requires_grad_()
    found = []
    for weights, over in ((weight_NT, total), (after_NT, after)):
        value, _ = clipped_surrogate(
            logprob_NT, logprob_NT.detach(), advantage_N.double(), weights, denominator=over
        )
        found.append((value, *torch.autograd.grad(value, logprob_NT)))
    for plain, selected in zip(*found, strict=True):
        torch.testing.assert_close(selected, plain, atol=1e-12, rtol=0)


def test_the_schedule_is_a_function_of_progress_alone_and_ends_with_the_mask():
    rows = random_rows(6)
    progress = [0.0, 0.25, 0.5, 0.75, 1.0]
    kept = [top_tokens(*rows, fraction=token_fraction(p)) for p in progress]
    count = [int(k.sum()) for k in kept]
    num = int(rows[2].sum())
    assert count == [math.ceil(f * num - 1e-9) for f in (0.2, 0.4, 0.6, 0.8, 1.0)]
    # More is kept as the schedule goes on, and nothing that was kept is dropped again.
    assert all((a <= b).all() for a, b in itertools.pairwise(kept))
    # A run resumed at step 6 of 12 selects what the uninterrupted one does.
    again = top_tokens(*rows, fraction=token_fraction(6 / 12))
    assert torch.equal(again, kept[2])


def test_a_step_without_decisions_keeps_none():
    for shape in ((2, 0), (0, 3), (2, 3)):
        mask_NT = torch.zeros(shape, dtype=torch.bool)
        for scope in ("batch", "response"):
            kept_NT = top_tokens(
                torch.ones(shape[0]), torch.ones(shape), mask_NT, fraction=0.5, scope=scope
            )
            assert kept_NT.shape == shape and not kept_NT.any()


def test_what_is_wrong_is_said():
    def kept(advantage=ADVANTAGE_N, entropy=ENTROPY_NT, mask=MASK_NT, **settings):
        return top_tokens(advantage, entropy, mask, **{"fraction": 0.5} | settings)

    with pytest.raises(ValueError, match="fraction must be above 0 and at most 1, got 0"):
        kept(fraction=0)
    with pytest.raises(ValueError, match="fraction must be above 0 and at most 1, got 1.01"):
        kept(fraction=1.01)
    with pytest.raises(ValueError, match="scope must be one of batch, response, got 'row'"):
        kept(scope="row")
    for bad in (math.nan, math.inf, -0.2):
        entropy_NT = ENTROPY_NT.clone()
        entropy_NT[1, 1] = bad
        message = rf"entropy_NT must be finite and not negative, got {bad:.4}\d* in row 1, step 1"
        with pytest.raises(ValueError, match=message):
            kept(entropy=entropy_NT)
    with pytest.raises(ValueError, match="advantage_N must be finite, got nan in row 1, step 0"):
        kept(advantage=torch.tensor([1.0, math.nan, 0.0]))
    with pytest.raises(ValueError, match=r"advantage_N must be of shape \(3,\) or \(3, 3\)"):
        kept(advantage=torch.ones(2))
    with pytest.raises(ValueError, match=r"mask_NT must be bool of the shape \(N, T\)"):
        kept(mask=MASK_NT.double())
    with pytest.raises(ValueError, match=r"mask_NT must be bool of the shape \(N, T\)"):
        kept(entropy=ENTROPY_NT[:, :2])


def test_tokens_from_a_quantile_on_stay_with_all_their_ties():
    entropy_NT = torch.tensor([[1.0, 2.0, 3.0], [3.0, 0.5, 9.0]])
    mask_NT = torch.tensor([[True, True, True], [True, True, False]])
    # Sorted: .5, 1, 2, 3, 3. The .6 quantile is 2.4, the .75 one 3.
    assert above_quantile(entropy_NT, mask_NT, quantile=0.6).int().tolist() == [
        [0, 0, 1],
        [1, 0, 0],
    ]
    assert above_quantile(entropy_NT, mask_NT, quantile=0.5).int().tolist() == [
        [0, 1, 1],
        [1, 0, 0],
    ]
    assert above_quantile(entropy_NT, mask_NT, quantile=1.0).sum() == 2
    assert torch.equal(above_quantile(entropy_NT, mask_NT, quantile=0.0), mask_NT)
    none_NT = torch.zeros_like(mask_NT)
    assert torch.equal(above_quantile(entropy_NT, none_NT, quantile=0.8), none_NT)
    with pytest.raises(ValueError, match=r"quantile must lie in \[0, 1\], got 1.5"):
        above_quantile(entropy_NT, mask_NT, quantile=1.5)
