import math
from dataclasses import replace

import pytest
import torch
from scipy import stats
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rollouts.engines.contract import SamplingParams
from rollouts.engines.drawing import draw, mix64, penalised, truncate, uniform

PLAIN = SamplingParams(max_completion_length=16)


def test_uniforms_are_those_of_splitmix64():
    # The published stream of SplitMix64 for seed 1234567.
    stream = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    key_N = torch.tensor([1234567])
    assert [uniform(key_N, t).item() for t in range(5)] == [(x >> 11) / 2**53 for x in stream]


def test_mix64_by_python_integers():
    def reference(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    values = [0, 1, -1, 2**62, -(2**63), 2**63 - 1, 1234567890123456789]
    mixed = mix64(torch.tensor(values)).tolist()
    assert [x % 2**64 for x in mixed] == [reference(v % 2**64) for v in values]


def test_uniforms_are_uniform_and_unrelated():
    # 10,000 seeds times 20 steps. Kolmogorov-Smirnov at 1e-6; correlations have a standard error
    # of 1 / sqrt(190,000) = 0.0023, and 5 of them are allowed.
    key_N = mix64(torch.arange(10_000))
    u_NT = torch.stack([uniform(key_N, t) for t in range(20)], dim=1)
    assert u_NT.min() >= 0
    assert u_NT.max() < 1
    assert u_NT.unique().numel() == u_NT.numel()
    assert stats.kstest(u_NT.flatten().numpy(), "uniform").pvalue > 1e-6
    for one, two in ((u_NT[:, 1:], u_NT[:, :-1]), (u_NT[1:], u_NT[:-1])):
        correlation = torch.corrcoef(torch.stack([one.flatten(), two.flatten()]))[0, 1]
        assert abs(correlation) < 5 / math.sqrt(190_000)


def test_draw_by_hand():
    # Probabilities 1/8, 0, 1/2, 3/8: the CDF steps at 0.125, 0.125, 0.625, 1.
    probability = torch.tensor([0.125, 0.0, 0.5, 0.375])
    u_N = torch.tensor([0.0, 0.1249, 0.1251, 0.6249, 0.6251, 1 - 2**-53], dtype=torch.float64)
    token_N, logprob_N = draw(probability.log().expand(6, 4), u_N, PLAIN)
    assert token_N.tolist() == [0, 0, 2, 2, 3, 3]
    torch.testing.assert_close(logprob_N.exp(), probability[token_N])


def test_a_token_of_probability_zero_is_never_drawn():
    # Zeros first, last and between; uniforms at both ends and exactly on the steps of the CDF.
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, -torch.inf, 0.0, -torch.inf])
    u_N = torch.tensor([0.0, 0.5 - 2**-53, 0.5, 0.5 + 2**-53, 1 - 2**-53], dtype=torch.float64)
    token_N, _ = draw(logits.expand(5, 6), u_N, PLAIN)
    assert token_N.tolist() == [1, 1, 4, 4, 4]


def test_the_largest_uniform_draws_the_last_token_whatever_the_total():
    # Totals that round differently, and a token of probability 0 behind the last possible one.
    logits_NV = torch.randn(5000, 7, generator=torch.Generator().manual_seed(0))
    logits_NV[:, 6] = -torch.inf
    u_N = torch.full((5000,), 1 - 2**-53, dtype=torch.float64)
    token_N, _ = draw(logits_NV, u_N, PLAIN)
    assert (token_N == 5).all()


def test_a_sum_that_rises_where_the_probability_is_zero_draws_no_impossible_token(monkeypatch):
    # Sums in parallel, as on a GPU, associate differently at every position. This one is 0.1 too
    # large at the impossible token 1, so that its target falls there.
    cumsum = torch.Tensor.cumsum

    def uneven(weight_NV, dim):
        return cumsum(weight_NV, dim) + torch.tensor([0.0, 0.1, 0.0])

    monkeypatch.setattr(torch.Tensor, "cumsum", uneven)
    logits_NV = torch.tensor([[0.5, 0.0, 0.5]]).log()
    token_N, logprob_N = draw(logits_NV, torch.tensor([0.55], dtype=torch.float64), PLAIN)
    assert token_N.item() != 1
    assert logprob_N.isfinite().all()


def test_draws_are_as_frequent_as_their_probabilities():
    count = 200_000
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(20, generator=generator)
    u_N = uniform(mix64(torch.arange(count)), 0)
    params = replace(PLAIN, temperature=0.8)
    token_N, _ = draw(logits.expand(count, 20), u_N, params)
    p = (logits.double() / 0.8).softmax(0)
    standard_error = (count * p * (1 - p)).sqrt()
    # Five standard errors at 20 tokens: false alarms for 1 in 90,000 choices of seeds.
    assert ((token_N.bincount(minlength=20) - count * p).abs() < 5 * standard_error).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("setting", "warper"),
    [
        ({"top_k": 1}, [TopKLogitsWarper(1)]),
        ({"top_k": 7}, [TopKLogitsWarper(7)]),
        ({"top_k": 500}, [TopKLogitsWarper(500)]),
        ({"top_p": 1e-6}, [TopPLogitsWarper(1e-6)]),
        ({"top_p": 0.5}, [TopPLogitsWarper(0.5)]),
        ({"top_p": 0.95}, [TopPLogitsWarper(0.95)]),
        ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        ({"min_p": 1.0}, [MinPLogitsWarper(1.0)]),
        (
            {"top_k": 20, "top_p": 0.8, "min_p": 0.05},
            [TopKLogitsWarper(20), TopPLogitsWarper(0.8), MinPLogitsWarper(0.05)],
        ),
    ],
)
def test_filters_keep_what_those_of_transformers_keep(setting, warper, dtype):
    generator = torch.Generator().manual_seed(0)
    score_NV = 2 * torch.randn(200, 50, generator=generator, dtype=dtype)
    score_NV[:50] = score_NV[:50].round()  # ties
    expected_NV = score_NV
    for one in warper:
        expected_NV = one(None, expected_NV)
    actual_NV = truncate(score_NV, replace(PLAIN, **setting))
    assert torch.equal(actual_NV, expected_NV)
    assert (actual_NV.isfinite().sum(1) >= 1).all()


def test_filtered_tokens_are_never_drawn():
    count = 20_000
    logits_NV = torch.randn(30, generator=torch.Generator().manual_seed(0)).expand(count, 30)
    u_N = uniform(mix64(torch.arange(count)), 3)
    params = replace(PLAIN, top_k=5)
    token_N, _ = draw(logits_NV, u_N, params)
    assert set(token_N.tolist()) == set(logits_NV[0].topk(5).indices.tolist())


# Repetition penalty


def test_the_repetition_penalty_is_that_of_transformers():
    generator = torch.Generator().manual_seed(0)
    logits_NV = torch.randn(5, 12, generator=generator)
    ids_NT = torch.randint(12, (5, 7), generator=generator)
    seen_NV = torch.zeros(5, 12, dtype=torch.bool).scatter_(1, ids_NT, True)
    for penalty in (0.5, 1.0, 1.7):
        expected_NV = RepetitionPenaltyLogitsProcessor(penalty)(ids_NT, logits_NV)
        torch.testing.assert_close(penalised(logits_NV, seen_NV, penalty), expected_NV)


def test_a_penalised_draw_reports_the_log_probability_of_the_policy():
    # Logits log 4, log 2, log 1, the first seen: log 4 / 2 = log 2, so q = 2/5, 2/5, 1/5 and p = 4/7 ...
    logits_NV = torch.tensor([4.0, 2.0, 1.0]).log().expand(4, 3)
    seen_NV = torch.tensor([[True, False, False]]).expand(4, 3)
    params = replace(PLAIN, repetition_penalty=2.0)
    u_N = torch.tensor([0.0, 0.399, 0.401, 0.801], dtype=torch.float64)
    token_N, logprob_N = draw(logits_NV, u_N, params, seen_NV)
    assert token_N.tolist() == [0, 0, 1, 2]
    torch.testing.assert_close(logprob_N.exp(), torch.tensor([4.0, 2.0, 1.0])[token_N] / 7)


def test_greedy_drawing_takes_the_largest_penalised_logit():
    params = replace(PLAIN, repetition_penalty=3.0, temperature=0.0)
    logits_NV, seen_NV = torch.tensor([[2.0, 1.0]]), torch.tensor([[True, False]])
    assert draw(logits_NV, torch.zeros(1).double(), params, seen_NV)[0].tolist() == [1]


@pytest.mark.parametrize("penalty", [0.0, -1.0, math.inf, math.nan])
def test_a_repetition_penalty_is_finite_and_positive(penalty):
    with pytest.raises(ValueError, match="repetition_penalty must be finite and positive"):
        SamplingParams(max_completion_length=1, repetition_penalty=penalty)
