import itertools
import math

import pytest
import torch

from rl.objective.importance import correction
from tests.table_policy import TablePolicy

MODES = list(itertools.product(["token", "sequence"], ["truncate", "mask"]))


def close(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def batch(seed=0, num_rollouts=8, num_steps=5):
    """Rows with a hole and a ragged tail, one without decisions, rubbish off the mask."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_rollouts, num_steps)
    engine_NT = -torch.rand(shape, dtype=torch.float64, generator=generator) * 3
    trainer_NT = engine_NT + torch.randn(shape, dtype=torch.float64, generator=generator) * 0.4
    length_N = torch.randint(1, num_steps + 1, (num_rollouts, 1), generator=generator)
    mask_NT = torch.arange(num_steps) < length_N
    mask_NT[:, 1] = False
    mask_NT[3] = False
    engine_NT[~mask_NT] = math.nan
    return trainer_NT, engine_NT, mask_NT


def by_loop(trainer_NT, engine_NT, mask_NT, level, mode, cap, floor):
    """The definition, one decision at a time, in plain Python."""
    factor_NT = torch.zeros_like(trainer_NT)
    names = ("is_count", "is_ratio", "is_above", "is_below", "is_tokens", "is_unknown")
    names += ("is_difference",)
    found = dict.fromkeys(names, 0.0) | {"is_ratio_max": 0.0, "is_difference_max": 0.0}
    for n in range(len(mask_NT)):
        steps = [t for t in range(mask_NT.shape[1]) if mask_NT[n, t]]
        logs = {t: (trainer_NT[n, t] - engine_NT[n, t]).item() for t in steps}
        units = [[t] for t in steps] if level == "token" else [steps] * bool(steps)
        for unit in units:
            ratio = math.exp(sum(logs[t] for t in unit))
            least = 0 if floor is None else floor
            outside = ratio > cap or ratio < least
            kept = min(max(ratio, least), cap) if mode == "truncate" else ratio
            value = 0.0 if mode == "mask" and outside else kept
            for t in unit:
                factor_NT[n, t] = value
            found["is_count"] += 1
            found["is_ratio"] += ratio
            found["is_above"] += ratio > cap
            found["is_below"] += ratio < least
            found["is_ratio_max"] = max(found["is_ratio_max"], ratio)
        for gap in map(abs, logs.values()):
            found["is_tokens"] += 1
            found["is_difference"] += gap
            found["is_difference_max"] = max(found["is_difference_max"], gap)
    return factor_NT, found


def test_by_hand():
    # Ratios 2, 1/2 and 3 in row 0, their product 3; 1/4 alone in row 1.
    trainer_NT = torch.tensor([[2.0, 0.5, 3.0], [0.25, 1.0, 1.0]], dtype=torch.float64).log()
    engine_NT = torch.zeros_like(trainer_NT)
    mask_NT = torch.tensor([[True, True, True], [True, False, False]])

    def factors(**changes):
        factor_NT, statistics = correction(trainer_NT, engine_NT, mask_NT, **changes)
        return factor_NT, {name: x.item() for name, x in statistics.items()}

    found, statistics = factors(level="token", mode="truncate", cap=2.5)
    close(found, torch.tensor([[2, 0.5, 2.5], [0.25, 0, 0]]).double())
    logs = [math.log(x) for x in (2, 2, 3, 4)]
    assert statistics == pytest.approx(
        {
            "is_count": 4,
            "is_ratio": 5.75,
            "is_above": 1,
            "is_below": 0,
            "is_tokens": 4,
            "is_unknown": 0,
            "is_difference": sum(logs),
            "is_ratio_max": 3,
            "is_difference_max": math.log(4),
        },
        abs=1e-12,
    )
    found, statistics = factors(level="token", mode="mask", cap=2.5, floor=0.4)
    close(found, torch.tensor([[2, 0.5, 0], [0, 0, 0]]).double())
    assert (statistics["is_above"], statistics["is_below"]) == (1, 1)
    found, statistics = factors(level="sequence", mode="truncate", cap=2.5)
    close(found, torch.tensor([[2.5, 2.5, 2.5], [0.25, 0, 0]]).double())
    assert (statistics["is_count"], statistics["is_ratio"]) == pytest.approx((2, 3.25))
    found, _ = factors(level="sequence", mode="truncate", cap=4, floor=0.5)
    close(found, torch.tensor([[3, 3, 3], [0.5, 0, 0]]).double())
    found, _ = factors(level="sequence", mode="mask", cap=2.5)
    close(found, torch.tensor([[0, 0, 0], [0.25, 0, 0]]).double())


@pytest.mark.parametrize(("level", "mode"), MODES)
@pytest.mark.parametrize(("cap", "floor"), [(1.2, None), (1.5, 0.8), (math.inf, 0.9)])
@pytest.mark.parametrize("seed", range(3))
def test_matches_a_loop(level, mode, cap, floor, seed):
    rows = batch(seed)
    factor_NT, statistics = correction(*rows, level=level, mode=mode, cap=cap, floor=floor)
    expected_NT, found = by_loop(*rows, level, mode, cap, floor)
    close(factor_NT, expected_NT)
    assert {k: v.item() for k, v in statistics.items()} == pytest.approx(found, abs=1e-12)
    assert not factor_NT.requires_grad


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_bounds_belong_to_the_interval(level):
    two_NT = torch.full((1, 1), math.log(2), dtype=torch.float64)
    settings = {"level": level, "mode": "mask"}
    ratio = two_NT.exp().item()
    one_NT, yes_NT = torch.zeros(1, 1).double(), torch.ones(1, 1) > 0
    assert correction(two_NT, one_NT, yes_NT, cap=ratio, **settings)[0].item() == ratio
    assert correction(two_NT, one_NT, yes_NT, cap=ratio - 1e-9, **settings)[0].item() == 0
    half = (-two_NT).exp().item()
    assert correction(-two_NT, one_NT, yes_NT, cap=2, floor=half, **settings)[0].item() == half
    above = half + 1e-9
    assert correction(-two_NT, one_NT, yes_NT, cap=2, floor=above, **settings)[0].item() == 0


@pytest.mark.parametrize(("level", "mode"), MODES)
def test_where_engine_and_trainer_agree_every_factor_is_1(level, mode):
    trainer_NT, _, mask_NT = batch()
    factor_NT, statistics = correction(
        trainer_NT, trainer_NT, mask_NT, level=level, mode=mode, cap=1.0, floor=1.0
    )
    assert torch.equal(factor_NT, mask_NT.double())
    assert statistics["is_difference"] == statistics["is_above"] == statistics["is_below"] == 0
    assert statistics["is_ratio"] == statistics["is_count"]


def test_row_ratios_make_the_gradient_exact_and_token_ratios_do_not():
    # By enumeration: the engine draws from another table than the one that is trained.
    trainer, engine = TablePolicy(1, seed=3), TablePolicy(1, seed=4)
    answer_N = torch.arange(len(trainer.answers))
    prompt_N = torch.zeros_like(answer_N)
    reward_N = (answer_N % 3 == 1).double()
    drawn_N = engine.probability_PA()[0].detach()
    logprob_NT = trainer.logprob_NT(prompt_N, answer_N)
    exact = trainer.gradient((trainer.probability_PA()[0] * reward_N).sum())

    def expected_gradient(level, cap=math.inf):
        factor_NT, statistics = correction(
            logprob_NT,
            engine.logprob_NT(prompt_N, answer_N),
            trainer.mask_AT,
            level=level,
            mode="truncate",
            cap=cap,
        )
        weight_NT = factor_NT * drawn_N[:, None] * reward_N[:, None]
        scalar = (weight_NT * trainer.logprob_NT(prompt_N, answer_N)).sum()
        return trainer.gradient(scalar), statistics

    grad, _ = expected_gradient("sequence")
    close(grad, exact)
    # Negative controls: the prefix is not corrected; a cap that binds; no correction at all.
    assert (expected_gradient("token")[0] - exact).abs().max() > 1e-2
    grad, statistics = expected_gradient("sequence", cap=1.0)
    assert (grad - exact).abs().max() > 1e-2 and statistics["is_above"] > 0
    plain = (drawn_N * reward_N * trainer.logprob_NT(prompt_N, answer_N).sum(1)).sum()
    assert (trainer.gradient(plain) - exact).abs().max() > 1e-2


@pytest.mark.parametrize(("level", "mode"), MODES)
def test_parts_of_a_batch_add_up_and_padding_and_row_order_change_nothing(level, mode):
    rows = batch()
    settings = {"level": level, "mode": mode, "cap": 1.3, "floor": 0.7}
    whole_NT, statistics = correction(*rows, **settings)
    parts = [correction(*(x[part] for x in rows), **settings) for part in (slice(3), slice(3, 8))]
    assert torch.equal(torch.cat([factor_NT for factor_NT, _ in parts]), whole_NT)
    for name, x in statistics.items():
        combine = max if name.endswith("_max") else sum
        close(combine([s[name] for _, s in parts]), x)
    order = torch.tensor([3, 7, 0, 5, 1, 6, 4, 2])
    wide = [torch.nn.functional.pad(x[order], (0, 2)) for x in rows]
    factor_NT, _ = correction(*wide, **settings)
    assert torch.equal(factor_NT[:, :5], whole_NT[order]) and (factor_NT[:, 5:] == 0).all()


@pytest.mark.parametrize(("level", "mode"), MODES)
def test_edges(level, mode):
    settings = {"level": level, "mode": mode}
    for shape in ((0, 4), (3, 0), (3, 4)):
        zero_NT = torch.zeros(shape)
        factor_NT, statistics = correction(zero_NT, zero_NT, zero_NT > 0, cap=2.0, **settings)
        assert factor_NT.shape == shape and (factor_NT == 0).all()
        assert all(x == 0 for x in statistics.values())
    far_NT, yes_NT = torch.full((1, 3), 400.0), torch.ones(1, 3, dtype=torch.bool)
    factor_NT, statistics = correction(far_NT, -far_NT, yes_NT, cap=math.inf, **settings)
    assert factor_NT.isfinite().all() and all(x.isfinite() for x in statistics.values())
    half_NT = torch.zeros(1, 3, dtype=torch.bfloat16)
    assert correction(half_NT, half_NT, yes_NT, cap=2.0, **settings)[0].dtype == torch.float32


def test_it_says_what_is_wrong():
    trainer_NT, engine_NT, mask_NT = batch()
    good = {"level": "token", "mode": "mask", "cap": 2.0}
    rows = (trainer_NT, engine_NT, mask_NT)
    with pytest.raises(ValueError, match="level must be one of token, sequence, got 'row'"):
        correction(*rows, **good | {"level": "row"})
    with pytest.raises(ValueError, match="mode must be one of truncate, mask, got 'clip'"):
        correction(*rows, **good | {"mode": "clip"})
    with pytest.raises(ValueError, match=r"cap must be at least 1, got 0\.2"):
        correction(*rows, **good | {"cap": 0.2})
    with pytest.raises(ValueError, match=r"floor must lie in \[0, 1\], got 1\.5"):
        correction(*rows, **good, floor=1.5)
    with pytest.raises(TypeError, match="cap"):
        correction(*rows, level="token", mode="mask")
    with pytest.raises(ValueError, match=r"mask_NT must be bool.*got torch\.int64"):
        correction(trainer_NT, engine_NT, mask_NT.long(), **good)
    with pytest.raises(ValueError, match=r"share one shape.*\(8, 5\), \(7, 5\) and \(8, 5\)"):
        correction(trainer_NT, engine_NT[1:], mask_NT, **good)
    bad_NT = engine_NT.clone()
    bad_NT[2, 0] = -math.inf
    with pytest.raises(ValueError, match=r"got .* -inf \(engine\) at row 2, step 0"):
        correction(trainer_NT, bad_NT, mask_NT, **good)
    for wrong in (math.nan, -math.inf):
        bad_NT = trainer_NT.clone()
        bad_NT[2, 0] = wrong
        with pytest.raises(ValueError, match=rf"got {wrong} \(trainer\) and .* at row 2, step 0"):
            correction(bad_NT, engine_NT, mask_NT, **good)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_token_the_engine_could_not_score_has_ratio_1_and_is_counted(level):
    trainer_NT = torch.tensor([[-1.0, -2.0], [-0.5, -0.7]])
    engine_NT = torch.tensor([[-1.5, math.nan], [math.nan, math.nan]])
    mask_NT = torch.tensor([[True, True], [True, False]])
    settings = {"level": level, "mode": "truncate", "cap": 10.0}
    factor_NT, sums = correction(trainer_NT, engine_NT, mask_NT, **settings)
    same = math.exp(0.5)
    expected = [[same, 1.0 if level == "token" else same], [1.0, 0.0]]
    torch.testing.assert_close(factor_NT, torch.tensor(expected))
    assert sums["is_unknown"] == 2 and sums["is_difference"] == 0.5
