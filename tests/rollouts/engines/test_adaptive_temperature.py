import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from scipy import stats

from rollouts.engines.adaptive_temperature import (
    AdaptiveTemperature,
    entropy,
    signed_heterogeneity,
)
from rollouts.engines.check import check_engine
from rollouts.engines.contract import SamplingParams
from rollouts.engines.drawing import draw
from rollouts.engines.transformers import TransformersEngine
from tests.tiny_lm import tiny_model, tiny_prompts, tiny_tokenizer

# The pivot of the entropies .05 .1 .5 1 2, at log 1.
GOLDEN = AdaptiveTemperature(tau=0.1, log_quantile=0.0, above=math.log(2), below=math.log(20))
# For the model below, whose entropies lie around 2.
STRONG = AdaptiveTemperature(tau=0.9, log_quantile=0.6, above=0.7, below=2.0)
LIMIT = 12
PLAIN = SamplingParams(max_completion_length=LIMIT, adaptive_temperature=STRONG)


def decided_model():
    """A tiny model that is sure of some tokens and not of others."""
    model = tiny_model("qwen3")
    with torch.no_grad():
        model.lm_head.weight.mul_(6)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def engine():
    return TransformersEngine(decided_model(), tiny_tokenizer())


def logits_of_entropy(target):
    """Logits of two tokens and more whose entropy is `target` nats, by bisection."""
    low, high = 0.0, 60.0
    for _ in range(200):
        middle = (low + high) / 2
        logits = torch.zeros(1, 12, dtype=torch.float64)
        logits[0, 0] = middle
        low, high = (middle, high) if entropy(logits).item() > target else (low, middle)
    return logits


@pytest.mark.parametrize(
    ("nats", "h", "temperature"),
    [(0.05, -1, 0.9), (0.1, -0.7686, 0.9231), (0.5, -0.2314, 0.9769), (1, 0, 1), (2, 1, 1.1)],
)
def test_golden_temperatures(nats, h, temperature):
    column = {name: getattr(GOLDEN, name) for name in ("log_quantile", "above", "below")}
    found = signed_heterogeneity(torch.tensor([float(nats)]), **column)
    assert found.item() == pytest.approx(h, abs=5e-5)
    factor = GOLDEN.factor(logits_of_entropy(nats))
    assert factor.shape == (1, 1) and factor.item() == pytest.approx(temperature, abs=5e-5)


def test_certain_tokens_are_drawn_colder_and_undecided_ones_hotter():
    # The released code loses the sign and draws the certain ones hotter too.
    sharp, flat = logits_of_entropy(0.05), logits_of_entropy(2.0)
    assert GOLDEN.factor(sharp) < 1 < GOLDEN.factor(flat)
    released = replace(GOLDEN, signed=False)
    assert released.factor(sharp).item() == pytest.approx(2 - GOLDEN.factor(sharp).item())
    assert torch.equal(released.factor(flat), GOLDEN.factor(flat))
    assert entropy(sharp / GOLDEN.factor(sharp)) < entropy(sharp)
    assert entropy(flat / GOLDEN.factor(flat)) > entropy(flat)


def test_h_is_clamped_monotone_and_0_on_a_side_without_spread():
    nats = torch.cat([torch.zeros(1), torch.linspace(0.001, 9, 300)])
    h = signed_heterogeneity(nats, log_quantile=0.0, above=0.5, below=1.0)
    assert h[0] == -1 and h[-1] == 1 and (h.diff() >= 0).all() and h.dtype == torch.float64
    h = signed_heterogeneity(nats, log_quantile=0.0, above=0.0, below=1.0)
    assert (h[nats > 1] == 0).all() and h[0] == -1
    assert signed_heterogeneity(
        torch.tensor(math.nan), log_quantile=0.0, above=0.0, below=0.0
    ).isnan()


def test_entropy_is_that_of_the_definition_also_where_tokens_are_left_out():
    score_NV = 3 * torch.randn(5, 9, generator=torch.Generator().manual_seed(0)).double()
    score_NV[0, 4:] = -math.inf
    p_NV = score_NV.softmax(-1)
    expected = [-sum(p * math.log(p) for p in row if p > 0) for row in p_NV.tolist()]
    torch.testing.assert_close(
        entropy(score_NV), torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0
    )


def teacher_forced(engine, rollouts, row, params):
    """Log-probs at T_t and entropies at T of one completion, by a pass without cache or padding."""
    prompt = rollouts.prompt_ids[rollouts.prompt_N[row]]
    completion = rollouts.token_NT[row][rollouts.mask_NT[row]]
    ids = torch.cat([torch.tensor(prompt), completion])[None]
    with torch.no_grad():
        logits = engine.model(input_ids=ids, use_cache=False).logits.double()[
            0, len(prompt) - 1 : -1
        ]
    score = logits / params.temperature
    p = score.softmax(-1)
    nats = -(p * p.log()).sum(-1)
    if params.adaptive_temperature is not None:
        score = score / params.adaptive_temperature.factor(score)
    return score.log_softmax(-1).gather(1, completion[:, None]).squeeze(1), nats


@pytest.mark.parametrize("adaptive", [None, STRONG])
@pytest.mark.parametrize("filters", [{}, {"top_k": 5, "top_p": 0.9, "min_p": 0.02}])
def test_the_engine_records_logprobs_at_t_t_and_entropies_at_t(engine, adaptive, filters):
    params = replace(
        PLAIN, temperature=0.8, record_entropy=True, adaptive_temperature=adaptive, **filters
    )
    rollouts = engine.generate(tiny_prompts(3, 8), [3, 2], seeds_N=torch.arange(5), params=params)
    for row in range(5):
        mask_T = rollouts.mask_NT[row]
        logprob, nats = teacher_forced(engine, rollouts, row, params)
        torch.testing.assert_close(
            rollouts.logprob_NT[row][mask_T].double(), logprob, atol=5e-5, rtol=0
        )
        torch.testing.assert_close(
            rollouts.entropy_NT[row][mask_T].double(), nats, atol=5e-5, rtol=0
        )


def test_the_trainer_recomputes_at_the_base_temperature_and_the_ratio_says_by_how_much(engine):
    rollouts = engine.generate(tiny_prompts(4), [4], seeds_N=torch.arange(4), params=PLAIN)
    base = replace(PLAIN, adaptive_temperature=None)
    for row in range(4):
        base_T, _ = teacher_forced(engine, rollouts, row, base)
        drawn_T = rollouts.logprob_NT[row][rollouts.mask_NT[row]]
        assert (drawn_T - base_T).abs().max() > 0.1


def test_tau_0_draws_the_same_rollouts_as_no_adaptation(engine):
    off = replace(PLAIN, adaptive_temperature=None)
    calm = replace(PLAIN, adaptive_temperature=replace(STRONG, tau=0.0))
    batches = [
        engine.generate(tiny_prompts(3, 8), [3, 2], seeds_N=torch.arange(5), params=params)
        for params in (off, calm, PLAIN)
    ]
    assert torch.equal(batches[0].token_NT, batches[1].token_NT)
    assert torch.equal(batches[0].logprob_NT, batches[1].logprob_NT)
    assert not torch.equal(batches[0].token_NT, batches[2].token_NT)
    assert batches[0].entropy_NT is None


def test_draws_are_as_frequent_as_the_probabilities_at_t_t():
    logits = logits_of_entropy(2.2).float()
    count = 20_000
    uniform_N = torch.rand(count, generator=torch.Generator().manual_seed(0)).double()
    token_N, logprob_N = draw(logits.expand(count, -1), uniform_N, PLAIN)
    p = (logits[0].double() / STRONG.factor(logits.double())[0]).softmax(-1)
    torch.testing.assert_close(logprob_N.double().exp(), p[token_N], atol=1e-6, rtol=0)
    # A false alarm once in a million.
    observed = token_N.bincount(minlength=12).numpy()
    assert stats.chisquare(observed, (p / p.sum() * count).numpy()).pvalue > 1e-6
    # At T it is another distribution.
    base = logits[0].double().softmax(-1)
    assert stats.chisquare(observed, (base * count).numpy()).pvalue < 1e-6


def test_greedy_decoding_is_not_changed(engine):
    batches = [
        engine.generate(
            tiny_prompts(3, 8),
            [1, 1],
            seeds_N=torch.arange(2),
            params=SamplingParams(
                max_completion_length=LIMIT, temperature=0, adaptive_temperature=adaptive
            ),
        )
        for adaptive in (None, STRONG)
    ]
    assert torch.equal(batches[0].token_NT, batches[1].token_NT)
    assert torch.equal(batches[0].logprob_NT, batches[1].logprob_NT)


def test_a_rollout_does_not_depend_on_its_company():
    # Ends that differ, so that rollouts leave the batch; batches that split a prompt's rollouts.
    model = decided_model()
    model.generation_config.eos_token_id = [1, 5, 12, 17, 20]
    params = replace(PLAIN, record_entropy=True)
    prompts, seed_N = tiny_prompts(3, 8, 5), torch.arange(12)
    whole = TransformersEngine(model, tiny_tokenizer()).generate(
        prompts, [4, 4, 4], seeds_N=seed_N, params=params
    )
    batches = TransformersEngine(model, tiny_tokenizer(), max_batch_rows=5).generate(
        prompts, [4, 4, 4], seeds_N=seed_N, params=params
    )
    assert whole.length_N.unique().numel() > 2
    assert torch.equal(whole.token_NT, batches.token_NT)
    torch.testing.assert_close(whole.entropy_NT, batches.entropy_NT, atol=1e-5, rtol=0)
    assert not whole.entropy_NT[~whole.mask_NT].any()
    assert (whole.entropy_NT[whole.mask_NT] > 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("record_entropy", [False, True])
def test_check_engine_passes(engine, temperature, record_entropy):
    params = replace(PLAIN, temperature=temperature, record_entropy=record_entropy)
    check_engine(engine, tiny_prompts(3, 5, 9), params)


def test_settings_are_json_able_and_checked():
    assert AdaptiveTemperature(**json.loads(json.dumps(asdict(GOLDEN)))) == GOLDEN

    def made(**changes):
        return AdaptiveTemperature(**asdict(GOLDEN) | changes)

    for tau in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=f"tau must be at least 0 and below 1, got {tau}"):
            made(tau=tau)
    with pytest.raises(ValueError, match="log_quantile must be finite, got inf"):
        made(log_quantile=math.inf)
    with pytest.raises(ValueError, match="above must be finite and not below 0, got -1"):
        made(above=-1.0)
    with pytest.raises(ValueError, match="below must be finite and not below 0, got nan"):
        made(below=math.nan)
