import inspect
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samplers.downsampling import (
    TIE,
    balanced,
    best_and_worst,
    d3s,
    d3s_two_stage,
    fraction,
    half,
    max_variance,
    max_variance_batch,
    row_fraction,
    selection_metrics,
    token_fraction,
    zero_variance_filter,
)


def one_group(values):
    return np.zeros(len(values), dtype=np.int64)


def best_by_search(values, keep):
    """The largest variance over every subset, tried in turn."""
    return max(np.var(subset) for subset in itertools.combinations(values, keep))


def by_scan(values, keep):
    """The method as it is defined, one group, one split at a time."""
    keep = min(keep, len(values))
    order = sorted(range(len(values)), key=lambda row: (values[row], row))
    centred = [values[row] - math.fsum(values) / len(values) for row in order]
    tie = TIE * sum(x * x for x in centred) / len(centred)
    incumbent, rows = None, None
    for low in range(keep + 1):
        places = [*range(low), *range(len(values) - keep + low, len(values))]
        kept = [centred[place] for place in places]
        variance = sum(x * x for x in kept) / keep - (sum(kept) / keep) ** 2
        if incumbent is None or variance > incumbent + tie:
            incumbent, rows = variance, sorted(order[place] for place in places)
    return rows


def ragged(seed, num_prompts=30, largest=12, continuous=True):
    """Values and shuffled prompts of groups of 1 to `largest` rows, ids neither dense nor sorted."""
    generator = np.random.default_rng(seed)
    size_P = generator.integers(1, largest + 1, num_prompts)
    ids_P = generator.choice(10_000, num_prompts, replace=False)
    prompt_N = generator.permutation(np.repeat(ids_P, size_P))
    value_N = (
        generator.normal(size=len(prompt_N))
        if continuous
        else generator.integers(0, 3, len(prompt_N)).astype(float)
    )
    return value_N, prompt_N


def grpo(reward_N, prompt_N):
    """Reward minus mean over population std, group by group; 0 where the rewards are equal."""
    advantage_N = np.zeros(len(reward_N))
    for prompt in np.unique(prompt_N):
        rows = np.flatnonzero(prompt_N == prompt)
        if np.ptp(reward_N[rows]) > 0:
            advantage_N[rows] = (reward_N[rows] - reward_N[rows].mean()) / reward_N[rows].std()
    return advantage_N


def successes_first(counts, size=8):
    reward_N = np.concatenate([[1.0] * c + [0.0] * (size - c) for c in counts])
    return reward_N, np.repeat(np.arange(len(counts)), size)


# few distinct values, so that ties and constant groups are common
few = st.lists(st.sampled_from([0.0, 1.0, -1.0, 0.5, 3.0]), min_size=1, max_size=8)
many = st.lists(
    st.floats(-100, 100, allow_nan=False, width=32, allow_subnormal=False), min_size=1, max_size=8
)


class TestMaxVariance:
    def test_by_hand(self):
        # {1, 5} + two 0 has mean 1.5, square 6.5: 4.25. Three 0 and 5: mean 1.25, square 6.25.
        x = np.array([0, 0, 0, 0, 0, 0, 1, 5.0])
        rows = max_variance(x, one_group(x), keep=4)
        assert rows.tolist() == [0, 1, 2, 7]
        assert rows.dtype == np.int64
        assert x[rows].var() == 6.25 - 1.25**2 == 4.6875

    @pytest.mark.parametrize(
        ("keep", "rows", "variance"),
        [(2, [4, 5], 0.25), (3, [2, 4, 5], 0.2022222), (4, [0, 2, 4, 5], 0.205)],
    )
    def test_golden_values(self, keep, rows, variance):
        x = np.array([0.1, 0.2, 0.9, 0.3, 1, 0, 0.5, 0.4])
        assert max_variance(x, one_group(x), keep=keep).tolist() == rows
        assert x[rows].var() == pytest.approx(variance, abs=5e-8)

    def test_one_right_of_eight(self):
        reward_N, prompt_N = successes_first([1])
        rows = max_variance(reward_N, prompt_N, keep=4)
        assert rows.tolist() == [0, 5, 6, 7]
        advantage_N = grpo(reward_N, prompt_N)
        assert advantage_N[rows] == pytest.approx([2.645751] + [-0.377964] * 3, abs=5e-7)
        # PODS computes its advantages on the rows kept: unbiased std, 1e-4 outside the root.
        kept_K = reward_N[rows]
        again_K = (kept_K - kept_K.mean()) / (kept_K.std(ddof=1) + 1e-4)
        assert again_K == pytest.approx([1.4997] + [-0.4999] * 3, abs=5e-7)

    @pytest.mark.slow
    @given(values=few | many, keep=st.integers(1, 9))
    @settings(max_examples=300, deadline=None)
    def test_no_subset_varies_more(self, values, keep):
        rows = max_variance(values, one_group(values), keep=keep)
        size = min(keep, len(values))
        assert len(rows) == size
        best = best_by_search(values, size)
        assert np.var(np.array(values)[rows]) == pytest.approx(best, rel=1e-9, abs=1e-11)
        # What is dropped is one contiguous block of the sorted values.
        order = sorted(range(len(values)), key=lambda row: (values[row], row))
        dropped = [place for place, row in enumerate(order) if row not in rows]
        assert dropped == list(range(min(dropped, default=0), max(dropped, default=-1) + 1))

    @pytest.mark.parametrize("values", [[0, 1, 1, 0, 2, 2, 2, 0, 5, 1], [3] * 10, range(10)])
    def test_no_subset_of_ten_varies_more(self, values):
        values = np.array(values, dtype=float)
        for keep in range(1, 11):
            rows = max_variance(values, one_group(values), keep=keep)
            assert values[rows].var() == pytest.approx(best_by_search(values, keep), abs=1e-12)

    @pytest.mark.slow
    @given(values=few | many, keep=st.integers(1, 9))
    @settings(max_examples=200, deadline=None)
    def test_ties_go_as_the_scan_says(self, values, keep):
        assert max_variance(values, one_group(values), keep=keep).tolist() == by_scan(values, keep)

    @pytest.mark.parametrize("continuous", [True, False])
    @pytest.mark.parametrize("seed", range(5))
    def test_ragged_groups_do_not_touch_each_other(self, seed, continuous):
        value_N, prompt_N = ragged(seed, continuous=continuous)
        # One group of another magnitude: sums that ran across groups would lose the small ones.
        value_N[prompt_N == prompt_N[0]] *= 1e12
        kept = max_variance(value_N, prompt_N, keep=4)
        expected = []
        for prompt in np.unique(prompt_N):
            rows = np.flatnonzero(prompt_N == prompt)
            expected += rows[by_scan(value_N[rows].tolist(), 4)].tolist()
        assert kept.tolist() == sorted(expected)

    @pytest.mark.slow
    @given(values=few | many, keep=st.integers(1, 9), data=st.data())
    @settings(max_examples=100, deadline=None)
    def test_reordered_rows_keep_equal_values(self, values, keep, data):
        order = data.draw(st.permutations(range(len(values))))
        value_N = np.array(values)
        rows = max_variance(value_N, one_group(values), keep=keep)
        moved = max_variance(value_N[order], one_group(values), keep=keep)
        assert sorted(value_N[order][moved]) == sorted(value_N[rows])
        if len(set(values)) == len(values):
            assert {order[row] for row in moved} == set(rows.tolist())

    @pytest.mark.slow
    @given(
        values=st.lists(st.integers(-64, 64), min_size=1, max_size=12),
        keep=st.integers(1, 12),
        scale=st.sampled_from([2.0, 0.125, 3.0, 1e6, 2.0**-300, 2.0**500]),
    )
    @settings(max_examples=200, deadline=None)
    def test_shift_and_positive_scale_change_nothing(self, values, keep, scale):
        value_N = np.array(values) / 32  # dyadic, so that the shift by 1e8 is exact
        rows = max_variance(value_N, one_group(values), keep=keep).tolist()
        assert max_variance(value_N + 1e8, one_group(values), keep=keep).tolist() == rows
        assert max_variance(value_N - 1e8, one_group(values), keep=keep).tolist() == rows
        assert max_variance(value_N * scale, one_group(values), keep=keep).tolist() == rows

    def test_a_large_offset_loses_nothing(self):
        # Uncentred prefix sums answer this with another split than the exact one.
        draw_N = np.round(np.random.default_rng(0).normal(size=200) * 2**20) / 2**20
        rows = max_variance(draw_N, one_group(draw_N), keep=50)
        assert rows.tolist() == by_scan(draw_N.tolist(), 50)
        assert max_variance(draw_N + 1e8, one_group(draw_N), keep=50).tolist() == rows.tolist()

        def uncentred(x, keep):
            x = np.sort(x)
            c1, c2 = (np.concatenate([[0], np.cumsum(x**power)]) for power in (1, 2))
            low = np.arange(keep + 1)
            from_ = len(x) - keep + low
            sums, squares = c1[low] + c1[-1] - c1[from_], c2[low] + c2[-1] - c2[from_]
            return int((squares / keep - (sums / keep) ** 2).argmax())

        assert uncentred(draw_N, 50) != uncentred(draw_N + 1e8, 50)

    def test_few_of_many_are_told_apart(self):
        # Keeping 2 of 200,000: a total minus a prefix would carry the rounding of the total.
        value_N = np.random.default_rng(0).normal(size=200_000)
        rows = max_variance(value_N, one_group(value_N), keep=2)
        assert rows.tolist() == sorted([value_N.argmin(), value_N.argmax()])

    def test_a_staircase_of_near_ties_is_scanned_as_defined(self):
        from samplers.downsampling import _first_best

        score = np.array([[1.0, 1.6, 2.2, 2.2], [0.0, 0.9, 1.7, 0.0], [0.0, 3.0, 3.5, -np.inf]])
        # Tie 1: 1.6 does not beat 1.0 but 2.2 does, though 1.6 is within 1 of the best.
        # 1.7 beats 0.0 after 0.9 did not. 3.5 does not beat 3.0.
        assert _first_best(score, np.ones(3)).tolist() == [2, 2, 1]

    def test_dtype_and_memory_order_change_nothing(self):
        reward_N, prompt_N = ragged(3, continuous=False)
        rows = max_variance(reward_N, prompt_N, keep=3).tolist()
        for dtype in (np.float32, np.float16, np.int64):
            assert max_variance(reward_N.astype(dtype), prompt_N, keep=3).tolist() == rows
        assert max_variance(np.repeat(reward_N, 2)[::2], prompt_N, keep=3).tolist() == rows
        assert max_variance(reward_N.tolist(), prompt_N.astype(np.int32), keep=3).tolist() == rows

    def test_edges(self):
        value_N, prompt_N = ragged(0)
        everything = list(range(len(value_N)))
        assert max_variance(value_N, prompt_N, keep=100).tolist() == everything
        for prompt in np.unique(prompt_N):
            rows = np.flatnonzero(prompt_N == prompt)
            kept = max_variance(value_N[rows], prompt_N[rows], keep=len(rows))
            assert kept.tolist() == list(range(len(rows)))
        assert max_variance([4.0, 9.0, 9.0, 1.0], [0] * 4, keep=1).tolist() == [2]
        assert max_variance([0.7] * 8, [0] * 8, keep=3).tolist() == [5, 6, 7]
        assert max_variance([0.1 + 0.2] * 7, [5] * 7, keep=6).tolist() == [1, 2, 3, 4, 5, 6]
        assert max_variance([2.0], [3], keep=1).tolist() == [0]
        assert max_variance([], [], keep=1).tolist() == []
        assert max_variance([1e308, -1e308, 0.0], [0] * 3, keep=2).tolist() == [0, 1]
        assert max_variance([5e-324, 0.0, 0.0], [0] * 3, keep=2).tolist() == [0, 2]

    def test_keep_may_differ_between_prompts(self):
        value_N = np.array([3.0, 1.0, 2.0, 1.0, 5.0, 4.0])
        prompt_N = np.array([9, 2, 9, 9, 2, 2])
        # Prompts in increasing order: 2 keeps 1 (value 5), 9 keeps 2 (values 3 and 1).
        assert max_variance(value_N, prompt_N, keep=[1, 2]).tolist() == [0, 3, 4]
        by_row = np.where(prompt_N == 2, 1, 2)
        assert max_variance(value_N, prompt_N, keep=by_row).tolist() == [0, 3, 4]

    def test_nothing_is_modified(self):
        value_N, prompt_N = ragged(1)
        keep_P = np.full(len(np.unique(prompt_N)), 3)
        copies = value_N.copy(), prompt_N.copy(), keep_P.copy()
        for array in (value_N, prompt_N, keep_P):
            array.setflags(write=False)
        max_variance(value_N, prompt_N, keep=keep_P)
        balanced(value_N, prompt_N, keep=keep_P)
        d3s_two_stage(value_N, prompt_N, row_fraction=0.3)
        for array, copy in zip((value_N, prompt_N, keep_P), copies, strict=True):
            np.testing.assert_array_equal(array, copy)

    @pytest.mark.parametrize("size", range(1, 13))
    def test_binary_rewards_are_kept_as_balanced_as_can_be(self, size):
        for correct, keep in itertools.product(range(1, size), range(2, size + 1, 2)):
            reward_N, prompt_N = successes_first([correct], size)
            kept = reward_N[max_variance(reward_N, prompt_N, keep=keep)].sum()
            assert kept == min(correct, max(keep // 2, keep - (size - correct)))

    def test_binary_golden_counts(self):
        reward_N, prompt_N = successes_first(range(9))
        rows = max_variance(reward_N, prompt_N, keep=4)
        kept_P = np.bincount(prompt_N[rows], weights=reward_N[rows])
        assert kept_P.tolist() == [0, 1, 2, 2, 2, 2, 2, 3, 4]

    def test_rewards_and_normalised_advantages_choose_the_same_rows(self):
        for seed in range(10):
            reward_N, prompt_N = ragged(seed, continuous=False)
            advantage_N = grpo(reward_N, prompt_N)
            mixed = np.isin(prompt_N, prompt_N[advantage_N != 0])  # in others all advantages are 0
            reward_N, prompt_N, advantage_N = (x[mixed] for x in (reward_N, prompt_N, advantage_N))
            pods = max_variance(reward_N, prompt_N, keep=4)
            assert pods.tolist() == max_variance(advantage_N, prompt_N, keep=4).tolist()

    def test_pods_advantages_are_centred_and_equal_grpo_when_all_are_kept(self):
        reward_N, prompt_N = ragged(2)
        rows = max_variance(reward_N, prompt_N, keep=5)
        again_K = grpo(reward_N[rows], prompt_N[rows])
        mean_P = np.bincount(prompt_N[rows], weights=again_K)
        np.testing.assert_allclose(mean_P, 0, atol=1e-12)
        rows = max_variance(reward_N, prompt_N, keep=12)
        np.testing.assert_array_equal(
            grpo(reward_N[rows], prompt_N[rows]), grpo(reward_N, prompt_N)
        )


class TestVarianceClaims:
    @pytest.mark.parametrize("seed", range(20))
    def test_a_subset_of_unbiased_variance_one_exists_in_a_standardised_set(self, seed):
        generator = np.random.default_rng(seed)
        size = int(generator.integers(2, 20))
        x = generator.standard_exponential(size)
        x = (x - x.mean()) / x.std(ddof=1)
        for keep in range(2, size + 1):
            rows = max_variance(x, one_group(x), keep=keep)
            assert x[rows].var(ddof=1) >= 1 - 1e-12

    def test_with_the_population_variance_that_claim_is_false(self):
        # 4 of 8 right, keep 7: standardised +-1, and 3 of 7 has variance 4 (3/7) (4/7) = 48/49.
        reward_N, prompt_N = successes_first([4])
        advantage_N = grpo(reward_N, prompt_N)
        rows = max_variance(advantage_N, prompt_N, keep=7)
        assert advantage_N[rows].var() == pytest.approx(48 / 49)
        assert not advantage_N[rows].var() >= 1
        # The unbiased variance of the subset is that of the full set, 8/7.
        assert advantage_N[rows].var(ddof=1) == pytest.approx(8 / 7)
        assert advantage_N.var(ddof=1) == pytest.approx(8 / 7)


class TestHalf:
    def test_by_hand(self):
        # {0, 0, 1, 5}: mean 1.5, mean square 6.5.
        x = np.array([0, 0, 0, 0, 0, 0, 1, 5.0])
        assert half(x, one_group(x), keep=4).tolist() == [0, 1, 6, 7]
        assert half(x, one_group(x), keep=3).tolist() == [0, 6, 7]

    def test_it_is_not_the_best_split(self):
        # The share of sets where it loses: 21.6 % of normal, 66.7 % of exponential, 77.2 % of
        # log-normal ones (20,000 draws). 3,000 draws have a standard error below 0.9 %.
        generator = np.random.default_rng(0)
        shapes = {
            "normal": (generator.normal, 0.216),
            "exponential": (generator.exponential, 0.667),
            "lognormal": (generator.lognormal, 0.772),
        }
        prompt_N = np.repeat(np.arange(3000), 12)
        for draw, expected in shapes.values():
            value_N = draw(size=len(prompt_N))
            exact_P, half_P = (
                value_N[choose(value_N, prompt_N, keep=6)].reshape(3000, 6).var(axis=1)
                for choose in (max_variance, half)
            )
            assert (half_P <= exact_P * (1 + 1e-12)).all()
            lost = (half_P < exact_P * (1 - 1e-9)).mean()
            assert abs(lost - expected) < 4 * 0.009


class TestAcrossTheBatch:
    def test_golden_values(self):
        reward_N, prompt_N = successes_first([1, 4, 7, 8])
        advantage_N = grpo(reward_N, prompt_N)
        lone = math.sqrt(7)
        assert advantage_N[0] == pytest.approx(lone)
        rows = max_variance_batch(advantage_N, keep=4)
        assert rows.tolist() == [0, 11, 12, 23]
        assert advantage_N[rows].var() == pytest.approx(4)
        rows = max_variance_batch(advantage_N, keep=8)
        assert rows.tolist() == [0, *range(9, 15), 23]
        assert advantage_N[rows].var() == pytest.approx(2.5)
        within = max_variance(advantage_N, prompt_N, keep=4)
        both = within[max_variance_batch(advantage_N[within], keep=8)]
        assert advantage_N[both].var() == pytest.approx(2.285714, abs=5e-7)

    @given(values=few | many, keep=st.integers(1, 9))
    @settings(max_examples=100, deadline=None)
    def test_it_is_max_variance_of_one_group(self, values, keep):
        assert max_variance_batch(values, keep=keep).tolist() == by_scan(values, keep)

    @pytest.mark.slow
    @given(values=few, keep=st.integers(1, 8))
    @settings(max_examples=200, deadline=None)
    def test_a_zero_row_is_kept_only_with_every_negative_or_every_positive(self, values, keep):
        value_N = np.array(values)
        kept = np.isin(np.arange(len(values)), max_variance_batch(value_N, keep=keep))
        varies = keep > 1 and np.ptp(value_N) > 0
        if varies and (kept & (value_N == 0)).any():
            assert kept[value_N < 0].all() or kept[value_N > 0].all()

    def test_zero_rows_are_not_always_last(self):
        value_N = np.array([-1, 3, 3, 3, *[0.1] * 5, *[0] * 4])
        rows = max_variance_batch(value_N, keep=5)
        assert sorted(value_N[rows]) == [-1, 0, 3, 3, 3]

    def test_two_stages_never_vary_more_than_one(self):
        gaps = []
        for seed in range(40):
            generator = np.random.default_rng(seed)
            prompt_N = np.repeat(np.arange(32), 8)
            pass_N = np.repeat(generator.random(32), 8)
            advantage_N = grpo((generator.random(256) < pass_N).astype(float), prompt_N)
            one = advantage_N[d3s(advantage_N, row_fraction=0.25)]
            two = advantage_N[d3s_two_stage(advantage_N, prompt_N, row_fraction=0.25)]
            assert len(one) == len(two) == 64
            assert two.var() <= one.var() * (1 + 1e-12)
            gaps.append(1 - two.var() / one.var())
        # 7.3 % on average, from 0.8 to 18.6 % (our 40 batches have a standard error near 0.6 %).
        assert abs(np.mean(gaps) - 0.073) < 4 * np.std(gaps, ddof=1) / math.sqrt(40)

    def test_two_stages_by_hand(self):
        # Group 0 has sizes 2.. and keeps max(2, floor(min(1, .6) n + .5)): 4 of 6 and 2 of 2.
        advantage_N = np.array([5.0, 4.0, 0.0, 0.0, -4.0, -5.0, 1.0, -1.0])
        prompt_N = np.array([0, 0, 0, 0, 0, 0, 1, 1])
        # Left after stage one: 5, 4, -4, -5 and 1, -1. floor(.3 * 8 + .5) = 2 of them: 5 and -5.
        assert d3s_two_stage(advantage_N, prompt_N, row_fraction=0.3).tolist() == [0, 5]
        assert d3s(advantage_N, row_fraction=0.3).tolist() == [0, 5]

    def test_every_prompt_hands_two_rows_to_the_second_stage(self):
        # floor(.18 * 8 + .5) is 1, which would leave no negative row; 2 leave one of each sign.
        advantage_N = np.tile([3.0, 1, 1, 0, 0, -1, -1, -3.0], 10)
        rows = d3s_two_stage(advantage_N, np.repeat(np.arange(10), 8), row_fraction=0.09)
        assert sorted(advantage_N[rows]) == [-3, -3, -3, 3, 3, 3, 3]

    def test_all_rows_are_kept_at_fraction_one(self):
        value_N, prompt_N = ragged(5)
        everything = list(range(len(value_N)))
        assert d3s(value_N, row_fraction=1.0).tolist() == everything
        assert d3s_two_stage(value_N, prompt_N, row_fraction=1.0).tolist() == everything
        assert d3s([0.3], row_fraction=0.25).tolist() == [0]
        assert d3s([], row_fraction=0.25).tolist() == []

    def test_columns_stay_in_step_and_advantages_keep_their_bits(self):
        reward_N, prompt_N = ragged(6, continuous=False)
        advantage_N = grpo(reward_N, prompt_N)
        columns = {"row": np.arange(len(reward_N)), "reward": reward_N, "advantage": advantage_N}
        stages = [
            lambda c: zero_variance_filter(c["reward"], prompt_N[c["row"]]),
            lambda c: max_variance(c["advantage"], prompt_N[c["row"]], keep=6),
            lambda c: d3s(c["advantage"], row_fraction=0.5),
        ]
        for stage in stages:
            rows = stage(columns)
            assert (np.diff(rows) > 0).all()
            columns = {name: column[rows] for name, column in columns.items()}
            assert len({len(column) for column in columns.values()}) == 1
            assert columns["advantage"].tobytes() == advantage_N[columns["row"]].tobytes()
            assert columns["reward"].tobytes() == reward_N[columns["row"]].tobytes()


class TestSchedule:
    def test_golden_values(self):
        progress = (0, 0.25, 0.5, 0.75, 1)
        keep = [len(d3s(np.arange(8.0), row_fraction=row_fraction(p))) for p in progress]
        assert keep == [2, 4, 5, 7, 8]
        assert [token_fraction(p) for p in progress] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])

    def test_ends_are_exact_and_progress_is_clamped(self):
        for share in (row_fraction, token_fraction):
            first = inspect.signature(share).parameters["initial"].default
            assert share(0.0) == share(-0.5) == share(-math.inf) == first
            assert share(1.0) == share(1.5) == share(math.inf) == 1.0
        assert fraction(0.0, initial=0.3, final=0.7) == 0.3
        assert fraction(1.0, initial=0.3, final=0.7) == 0.7

    def test_it_is_monotone(self):
        shares = [row_fraction(step / 997) for step in range(998)]
        assert (np.diff(shares) > 0).all()
        falling = [fraction(step / 997, initial=0.9, final=0.1) for step in range(998)]
        assert (np.diff(falling) < 0).all()

    def test_it_says_what_is_wrong(self):
        with pytest.raises(ValueError, match=r"initial must be in \(0, 1\], got 0.0"):
            row_fraction(0.5, initial=0.0)
        with pytest.raises(ValueError, match=r"final must be in \(0, 1\], got 1.5"):
            token_fraction(0.5, final=1.5)
        with pytest.raises(ValueError, match="progress must be a number"):
            row_fraction(math.nan)
        with pytest.raises(ValueError, match=r"row_fraction must be in \(0, 1\], got nan"):
            d3s([1.0], row_fraction=math.nan)


class TestZeroVarianceFilter:
    def test_by_hand(self):
        reward_N = np.array([1.0, 0.5, 1.0, 0.5, 0.0, 0.3])
        prompt_N = np.array([4, 2, 4, 2, 4, 7])
        assert zero_variance_filter(reward_N, prompt_N).tolist() == [0, 2, 4]

    def test_equal_float32_rewards_have_no_spread(self):
        reward_N = np.full(8, 0.7, dtype=np.float32)
        assert zero_variance_filter(reward_N, one_group(reward_N)).tolist() == []
        # A std test would pass them: summed one by one in float32 they have a residual.
        assert abs(reward_N - np.cumsum(reward_N)[-1] / np.float32(8)).max() > 5e-8
        reward_N[3] = np.nextafter(np.float32(0.7), np.float32(1))
        assert zero_variance_filter(reward_N, one_group(reward_N)).tolist() == list(range(8))

    def test_a_group_goes_whole_or_not_at_all(self):
        value_N, prompt_N = ragged(7, continuous=False)
        kept = np.zeros(len(value_N), dtype=bool)
        kept[zero_variance_filter(value_N, prompt_N)] = True
        for prompt in np.unique(prompt_N):
            group = prompt_N == prompt
            assert kept[group].tolist() == [np.ptp(value_N[group]) > 0] * group.sum()

    def test_tolerance_is_exclusive(self):
        reward_N = [0.0, 0.25, 0.0, 0.5]
        prompt_N = [0, 0, 1, 1]
        assert zero_variance_filter(reward_N, prompt_N, tolerance=0.25).tolist() == [2, 3]
        assert zero_variance_filter([], []).tolist() == []

    def test_it_says_what_is_wrong(self):
        for tolerance in (-0.1, math.nan):
            with pytest.raises(ValueError, match=f"non-negative, got {tolerance}"):
                zero_variance_filter([0.0], [0], tolerance=tolerance)


class TestBalanced:
    @pytest.mark.parametrize(
        ("correct", "rows"),
        [
            (0, [0, 1, 2, 3]),  # one-sided: the first four drawn
            (1, [0, 1, 2, 3]),  # the only success and the first three failures
            (2, [0, 1, 2, 3]),
            (4, [0, 1, 4, 5]),
            (7, [0, 1, 2, 7]),
            (8, [0, 1, 2, 3]),
        ],
    )
    def test_the_first_drawn_of_each_side(self, correct, rows):
        reward_N, prompt_N = successes_first([correct])
        assert balanced(reward_N, prompt_N, keep=4).tolist() == rows

    def test_draw_order_is_row_order_within_the_prompt(self):
        reward_N = np.array([0, 0, 1, 1, 0, 1, 1, 0], dtype=float)
        prompt_N = np.array([3, 3, 1, 3, 1, 1, 3, 1])
        # Prompt 1: rows 2+ 4- 5+ 7-. Prompt 3: rows 0- 1- 3+ 6+.
        assert balanced(reward_N, prompt_N, keep=2).tolist() == [0, 2, 3, 4]
        # Of three one is correct, floor(3/2); the rest are wrong.
        assert balanced(reward_N, prompt_N, keep=3).tolist() == [0, 1, 2, 3, 4, 7]

    @pytest.mark.parametrize("keep", [2, 4, 6])
    def test_counts_are_those_of_pods(self, keep):
        generator = np.random.default_rng(0)
        prompt_N = generator.integers(0, 40, 400)
        reward_N = (generator.random(400) < 0.3).astype(float)
        rows, pods = (f(reward_N, prompt_N, keep=keep) for f in (balanced, max_variance))
        for part in (rows, pods):
            assert (np.diff(part) > 0).all()
        np.testing.assert_array_equal(
            np.bincount(prompt_N[rows], minlength=40), np.bincount(prompt_N[pods], minlength=40)
        )
        np.testing.assert_array_equal(
            np.bincount(prompt_N[rows], weights=reward_N[rows], minlength=40),
            np.bincount(prompt_N[pods], weights=reward_N[pods], minlength=40),
        )

    def test_the_baseline_of_the_whole_pool_comes_along(self):
        # 2 of 16 right. Advantages of the pool, then rows: success 1 - 1/8, failure -1/8.
        reward_N, prompt_N = successes_first([2], size=16)
        advantage_N = reward_N - reward_N.mean()
        rows = balanced(reward_N, prompt_N, keep=4)
        assert advantage_N[rows].tolist() == [0.875, 0.875, -0.125, -0.125]

    def test_the_threshold_is_exclusive(self):
        reward_N = [0.7, 0.71, 0.2, 0.9]
        assert balanced(reward_N, [0] * 4, keep=2).tolist() == [0, 1]
        assert balanced(reward_N, [0] * 4, keep=2, success_above=0.1).tolist() == [0, 1]
        assert balanced(reward_N, [0] * 4, keep=2, success_above=0.8).tolist() == [0, 3]
        assert balanced([], [], keep=2).tolist() == []
        with pytest.raises(ValueError, match="success_above must be a number"):
            balanced(reward_N, [0] * 4, keep=2, success_above=math.nan)


class TestBestAndWorst:
    def test_by_hand(self):
        value_N = np.array([0.6, -0.2, 0.5, -0.5, -0.6, 0.1, 0.4, -0.4])
        branch_N = np.array([0, 0, 1, 1, 2, 2, 3, 3])
        # Branch 0 keeps its best, 1 its best (-.5 is not below -.5), 2 its worst, 3 nothing.
        assert best_and_worst(value_N, branch_N, threshold=0.5).tolist() == [0, 2, 4]
        assert best_and_worst(value_N, branch_N, threshold=0.0).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
        assert best_and_worst(value_N, branch_N, threshold=0.45).tolist() == [0, 2, 3, 4]

    def test_without_a_threshold_both_stay_unless_all_are_equal(self):
        value_N = np.array([3.0, 1.0, 2.0, 5.0, 5.0, 7.0])
        branch_N = np.array([1, 1, 1, 0, 0, 4])
        assert best_and_worst(value_N, branch_N, threshold=None).tolist() == [0, 1]
        # Under a threshold a branch of equal values keeps its last row as the best.
        assert best_and_worst(value_N, branch_N, threshold=5.0).tolist() == [4, 5]

    def test_of_equals_the_best_is_the_later_and_the_worst_the_earlier(self):
        assert best_and_worst([1.0, -1.0, 1.0, -1.0], [0] * 4, threshold=None).tolist() == [1, 2]

    @pytest.mark.parametrize("threshold", [None, 0.0, 0.5, 0.7])
    def test_matches_the_definition_on_ragged_branches(self, threshold):
        value_N, branch_N = ragged(9)
        expected = set()
        for branch in np.unique(branch_N):
            rows = np.flatnonzero(branch_N == branch)
            best, worst = rows[value_N[rows].argmax()], rows[value_N[rows].argmin()]
            if threshold is None:
                expected |= {best, worst} if len(rows) > 1 else set()
            else:
                expected |= {best} if value_N[best] >= threshold else set()
                expected |= {worst} if value_N[worst] < -threshold else set()
        kept = best_and_worst(value_N, branch_N, threshold=threshold)
        assert kept.tolist() == sorted(expected)

    def test_edges_and_errors(self):
        assert best_and_worst([], [], threshold=0.5).tolist() == []
        for threshold in (-0.5, math.nan):
            with pytest.raises(ValueError, match="threshold must be non-negative or None"):
                best_and_worst([1.0], [0], threshold=threshold)
        with pytest.raises(ValueError, match=r"got nan in row 1 \(branch_N 3\)"):
            best_and_worst([1.0, math.nan], [0, 3], threshold=None)


def test_metrics_by_hand():
    metrics = selection_metrics(
        [0, 3],
        reward_N=[1.0, 0.0, 0.0, 1.0, 1.0],
        advantage_N=[2.0, -1.0, -1.0, 0.0, 0.0],
        prompt_N=[0, 0, 0, 1, 1],
        length_N=[10, 20, 30, 40, 50],
    )
    assert metrics == {
        "select/rows_in": 5,
        "select/rows_kept": 2,
        "select/tokens_in": 150,
        "select/tokens_kept": 50,
        "select/mixed_share": 0.5,
        "select/reward_unfiltered": pytest.approx(0.6),
        "select/reward_kept": 1.0,
        "select/variance": 1.0,  # of 2 and 0
        "select/advantage_mean": 1.0,
        "select/positive_fraction": 0.5,
        "select/length_kept": 25.0,
        "select/mean_abs_advantage_ratio": pytest.approx(1.0 / 0.8),
        "select/length_dropped": pytest.approx(100 / 3),
    }
    nothing = {name: [] for name in ("reward_N", "advantage_N", "prompt_N", "length_N")}
    assert selection_metrics([], **nothing)["select/rows_in"] == 0
    with pytest.raises(ValueError, match="equally long, got 1, 2 and 1"):
        selection_metrics([], reward_N=[1.0], advantage_N=[1.0, 2.0], prompt_N=[0], length_N=[1])


def test_the_doubled_step_of_a_cross_group_selection_shows_in_the_metrics():
    # 32 prompts of 8, pass rates spread evenly, 64 rows kept: mean |A| is 2.16 times that of all.
    ratios, means = [], []
    for seed in range(60):
        generator = np.random.default_rng(seed)
        prompt_N = np.repeat(np.arange(32), 8)
        reward_N = (generator.random(256) < np.repeat(generator.random(32), 8)).astype(float)
        advantage_N = grpo(reward_N, prompt_N)
        metrics = selection_metrics(
            d3s(advantage_N, row_fraction=0.25),
            reward_N=reward_N,
            advantage_N=advantage_N,
            prompt_N=prompt_N,
            length_N=np.ones(256),
        )
        ratios.append(metrics["select/mean_abs_advantage_ratio"])
        means.append(metrics["select/advantage_mean"])
    assert abs(np.mean(ratios) - 2.16) < 4 * np.std(ratios, ddof=1) / math.sqrt(60)
    # Rows of a prompt no longer sum to 0: the mean of the batch kept has std 0.095 over batches;
    # the relative standard error of a std of 60 is about 1 / sqrt(120).
    assert abs(np.std(means) / 0.095 - 1) < 4 / math.sqrt(120)


@pytest.mark.parametrize("choose", [max_variance, half, balanced])
class TestErrors:
    def test_keep(self, choose):
        for keep in (0, -2, [2, 0]):
            with pytest.raises(ValueError, match=f"keep must be at least 1, got {np.min(keep)}"):
                choose([1.0, 0.0, 1.0], [0, 1, 1], keep=keep)
        with pytest.raises(ValueError, match="keep must be integers, got float64"):
            choose([1.0], [0], keep=1.5)
        with pytest.raises(ValueError, match=r"2 prompts or one for each of 3 rows, .* \(4,\)"):
            choose([1.0, 0.0, 1.0], [0, 1, 1], keep=[1, 1, 1, 1])
        with pytest.raises(ValueError, match="equal within a prompt, got 2 and 1 in rows 1 and 2"):
            choose([1.0, 0.0, 1.0], [0, 1, 1], keep=[1, 2, 1])

    def test_rows(self, choose):
        with pytest.raises(ValueError, match=r"1-d and equally long, got \(2,\) and \(3,\)"):
            choose([1.0, 0.0], [0, 1, 1], keep=1)
        with pytest.raises(ValueError, match="must be integers, got float64"):
            choose([1.0], [0.5], keep=1)
        for value in (math.nan, math.inf):
            with pytest.raises(ValueError, match=rf"got {value} in row 1 \(prompt_N 8\)"):
                choose([1.0, value], [0, 8], keep=1)


def test_the_batch_says_what_is_wrong_too():
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        max_variance_batch([1.0], keep=0)
    with pytest.raises(ValueError, match="must be finite, got nan in row 0"):
        max_variance_batch([math.nan], keep=1)
    with pytest.raises(TypeError):
        max_variance_batch([1.0], keep=1.5)
    with pytest.raises(ValueError, match="1-d and equally long"):
        max_variance_batch(np.ones((2, 2)), keep=1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([-1], r"rows_K must be in \[0, 3\), got \[-1\]"),
        ([3], r"rows_K must be in \[0, 3\), got \[3\]"),
        ([0.9], "rows_K must be integers, got 0.9"),
        ([True, False, True], "rows_K must be integers, got True of bool"),
        (1, r"rows_K must be 1-d, got shape \(\)"),
    ],
)
def test_metrics_are_of_rows(rows, message):
    columns = {"reward_N": [1.0, 0, 1], "advantage_N": [1.0, -1, 0], "prompt_N": [0, 0, 1]}
    with pytest.raises(ValueError, match=message):
        selection_metrics(rows, **columns, length_N=[1, 2, 3])
