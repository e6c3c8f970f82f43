import warnings
from dataclasses import replace

import pytest
import torch
from scipy import stats
from transformers import (
    BertConfig,
    BertLMHeadModel,
    DynamicCache,
    Phi3Config,
    Phi3ForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.cache_utils import DynamicLayer

from rollouts.engines import transformers as transformers_engine
from rollouts.engines.check import check_engine
from rollouts.engines.contract import SamplingParams
from rollouts.engines.transformers import (
    TransformersEngine,
    _GrowingLayer,
    _StopStrings,
)
from tests.tiny_lm import (
    EOS,
    PAD,
    PIECES,
    POSITIONS,
    VOCABULARY,
    tiny_model,
    tiny_prompts,
    tiny_tokenizer,
)

SHARING = ["qwen3", "llama", "gpt2", "gemma2", "gemma3", "qwen3_next"]
NOT_SHARING = ["mamba"]
LIMIT = 16
PLAIN = SamplingParams(max_completion_length=LIMIT)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def qwen3():
    return tiny_model("qwen3")


@pytest.fixture
def engine(qwen3, tokenizer):
    return TransformersEngine(qwen3, tokenizer)


def with_frequent_ends(model):
    """About every eighth token ends a rollout, so lengths differ and stay small."""
    model.generation_config.eos_token_id = [EOS, 5, 12, 17, 20]
    return model


def without_ends(model):
    """The model's rollouts all run to the length limit."""
    model.generation_config.eos_token_id = None
    return model


def seeds(count, start=0):
    return torch.arange(start, start + count)


def teacher_forced(model, rollouts, row, temperature=1.0):
    """Log-probs of one completion by a forward pass over it alone, without cache or padding."""
    prompt = rollouts.prompt_ids[rollouts.prompt_N[row]]
    completion = rollouts.token_NT[row][rollouts.mask_NT[row]]
    ids = torch.cat([torch.tensor(prompt), completion])[None]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits.float()[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(1, completion[:, None]).squeeze(1)


def completions(rollouts):
    return [
        row[mask].tolist() for row, mask in zip(rollouts.token_NT, rollouts.mask_NT, strict=True)
    ]


# The rollouts are the model's


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SHARING + NOT_SHARING)
@pytest.mark.filterwarnings("ignore:.*keeps no cache")
def test_logprobs_are_those_of_a_plain_forward_pass(architecture, tokenizer):
    model = with_frequent_ends(tiny_model(architecture))
    # Prompts longer and shorter than the sliding window of 6, one of a single token, one unused;
    # batches that split a prompt's rollouts.
    prompts = tiny_prompts(3, 11, 1, 7, 9)
    engine = TransformersEngine(model, tokenizer, max_batch_rows=5)
    rollouts = engine.generate(prompts, [4, 2, 3, 0, 5], seeds_N=seeds(14), params=PLAIN)
    assert rollouts.length_N.unique().numel() > 3  # rollouts do end at different times
    assert rollouts.truncated_N.any()
    for row in range(len(rollouts)):
        torch.testing.assert_close(
            rollouts.logprob_NT[row][rollouts.mask_NT[row]],
            teacher_forced(model, rollouts, row),
            atol=1e-5 if architecture != "mamba" else 5e-5,  # its scan sums in another order
            rtol=0,
        )


def test_logprobs_are_at_the_sampling_temperature_and_before_truncation(engine):
    params = replace(PLAIN, temperature=0.7, top_k=5, top_p=0.9, min_p=0.02)
    rollouts = engine.generate(tiny_prompts(3, 8), [2, 2], seeds_N=seeds(4), params=params)
    for row in range(4):
        expected = teacher_forced(engine.model, rollouts, row, temperature=0.7)
        actual = rollouts.logprob_NT[row][rollouts.mask_NT[row]]
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_temperature_zero_is_greedy_and_reports_temperature_one(engine):
    params = replace(PLAIN, temperature=0)
    rollouts = engine.generate(tiny_prompts(3, 8), [1, 2], seeds_N=seeds(3), params=params)
    assert completions(rollouts)[1] == completions(rollouts)[2]
    for row in range(2):
        prompt = rollouts.prompt_ids[row]
        output = engine.model.generate(
            torch.tensor([prompt]), max_new_tokens=LIMIT, do_sample=False, use_cache=False
        )
        assert completions(rollouts)[row] == output[0, len(prompt) :].tolist()
        torch.testing.assert_close(
            rollouts.logprob_NT[row][rollouts.mask_NT[row]],
            teacher_forced(engine.model, rollouts, row),
            atol=1e-5,
            rtol=0,
        )


@pytest.mark.slow
def test_the_repetition_penalty_is_that_of_generate_and_no_part_of_the_log_probabilities(tokenizer):
    model = with_frequent_ends(tiny_model("qwen3"))
    engine = TransformersEngine(model, tokenizer, max_batch_rows=4)
    params = replace(PLAIN, temperature=0.0, repetition_penalty=1.6)
    prompts = tiny_prompts(3, 8, 5)
    rollouts = engine.generate(prompts, [2, 2, 2], seeds_N=seeds(6), params=params)
    plain = engine.generate(
        prompts, [2, 2, 2], seeds_N=seeds(6), params=replace(PLAIN, temperature=0.0)
    )
    assert completions(rollouts) != completions(plain)  # the penalty decides something here
    for row, tokens in enumerate(completions(rollouts)):
        ids = torch.tensor(rollouts.prompt_ids[rollouts.prompt_N[row]])[None]
        model.generation_config.pad_token_id = PAD
        made = model.generate(
            ids, do_sample=False, max_new_tokens=LIMIT, repetition_penalty=1.6, bos_token_id=None
        )
        assert made[0, ids.shape[1] :].tolist() == tokens
        torch.testing.assert_close(
            rollouts.logprob_NT[row][rollouts.mask_NT[row]],
            teacher_forced(model, rollouts, row),
            atol=1e-5,
            rtol=0,
        )
    sampled = replace(PLAIN, repetition_penalty=1.3)
    check_engine(engine, prompts, sampled)


def test_first_tokens_follow_the_softmax(engine):
    # Chi-square over all tokens expected at least 5 times; the threshold is its 1 - 1e-6 quantile,
    # so a correct engine fails for one choice of seeds in a million.
    count, prompts = 4000, tiny_prompts(5)
    params = replace(PLAIN, max_completion_length=1, temperature=1.5)
    rollouts = engine.generate(prompts, [count], seeds_N=seeds(count, 10**6), params=params)
    with torch.no_grad():
        logits = engine.model(input_ids=torch.tensor([prompts[0].token_ids])).logits[0, -1]
    expected = count * (logits.double() / 1.5).softmax(0)
    observed = rollouts.token_NT[:, 0].bincount(minlength=VOCABULARY)
    often = expected >= 5
    assert often.sum() > 10
    chi2 = ((observed - expected) ** 2 / expected)[often].sum().item()
    assert chi2 < stats.chi2.isf(1e-6, df=int(often.sum()) - 1)


# A rollout does not depend on its company


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SHARING + NOT_SHARING)
@pytest.mark.filterwarnings("ignore:.*keeps no cache")
def test_a_rollout_is_the_same_in_any_batch(architecture, tokenizer):
    model = with_frequent_ends(tiny_model(architecture))
    prompts, budget = tiny_prompts(3, 11, 1, 7), [3, 2, 0, 4]
    seed_N = seeds(9, 50)
    engine = TransformersEngine(model, tokenizer, max_batch_rows=256)
    together = engine.generate(prompts, budget, seeds_N=seed_N, params=PLAIN)

    narrow = TransformersEngine(model, tokenizer, max_batch_rows=2)
    by_two = narrow.generate(prompts, budget, seeds_N=seed_N, params=PLAIN)
    assert completions(by_two) == completions(together)
    torch.testing.assert_close(by_two.logprob_NT, together.logprob_NT, atol=5e-5, rtol=0)

    backwards = engine.generate(
        prompts[::-1], budget[::-1], seeds_N=seed_N[[5, 6, 7, 8, 3, 4, 0, 1, 2]], params=PLAIN
    )
    again = backwards.take(torch.tensor([6, 7, 8, 4, 5, 0, 1, 2, 3]))
    assert completions(again) == completions(together)

    alone = engine.generate(prompts[1:2], [1], seeds_N=seed_N[4:5], params=PLAIN)
    assert completions(alone) == completions(together)[4:5]


def test_finished_rollouts_that_leave_change_nothing(tokenizer, monkeypatch):
    engine = TransformersEngine(with_frequent_ends(tiny_model()), tokenizer)
    prompts, budget = tiny_prompts(3, 11, 7), [6, 5, 5]
    batches = []
    for compact_below in (0.0, 1.0):  # never, and as soon as one finishes
        monkeypatch.setattr(transformers_engine, "COMPACT_BELOW", compact_below)
        batches.append(engine.generate(prompts, budget, seeds_N=seeds(16), params=PLAIN))
    never, always = batches
    assert completions(never) == completions(always)
    assert never.truncated_N.tolist() == always.truncated_N.tolist()
    torch.testing.assert_close(never.logprob_NT, always.logprob_NT, atol=1e-5, rtol=0)


def test_each_prompt_is_prefilled_once_and_finished_rollouts_are_not_computed(
    tokenizer, monkeypatch
):
    engine = TransformersEngine(with_frequent_ends(tiny_model()), tokenizer)
    monkeypatch.setattr(transformers_engine, "COMPACT_BELOW", 1.0)
    engine.check_model()  # runs it on tokens of its own
    shapes = []
    hook = engine.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    rollouts = engine.generate(tiny_prompts(3, 11, 7), [6, 0, 5], seeds_N=seeds(11), params=PLAIN)
    hook.remove()
    # Two prompts are asked for, the longest has 7 tokens.
    assert shapes[0] == (2, 7)
    # Step t of decoding computes exactly the rollouts longer than t.
    running = [(int((rollouts.length_N > t).sum()), 1) for t in range(1, LIMIT)]
    assert shapes[1:] == [shape for shape in running if shape[0]]
    assert len({rows for rows, _ in shapes[1:]}) > 3


def test_prompts_of_similar_length_share_a_batch(qwen3, tokenizer):
    engine = TransformersEngine(qwen3, tokenizer, max_batch_rows=2)
    engine.check_model()
    shapes = []
    hook = qwen3.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    one = replace(PLAIN, max_completion_length=1)
    prompts = tiny_prompts(3, 11, 2, 10)
    rollouts = engine.generate(prompts, [1, 1, 1, 1], seeds_N=seeds(4), params=one)
    hook.remove()
    assert shapes == [(2, 11), (2, 3)]
    assert rollouts.prompt_N.tolist() == [0, 1, 2, 3]


def test_equal_prompts_are_prefilled_once(engine):
    prompt = tiny_prompts(5)[0]
    engine.check_model()
    shapes = []
    hook = engine.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    twins = [prompt, replace(prompt, key="twin")]
    rollouts = engine.generate(twins, [1, 1], seeds_N=[4, 4], params=PLAIN)
    hook.remove()
    assert shapes[0] == (1, 5)
    assert completions(rollouts)[0] == completions(rollouts)[1]


@pytest.mark.slow
def test_check_engine_passes(tokenizer):
    for architecture in ("qwen3", "gemma3"):
        engine = TransformersEngine(tiny_model(architecture), tokenizer, max_batch_rows=100)
        for changes in ({}, {"temperature": 0.6, "top_p": 0.9}, {"temperature": 0}):
            params = replace(SamplingParams(max_completion_length=6), **changes)
            check_engine(engine, tiny_prompts(3, 9, 1), params)


# Where a rollout ends


def cut(tokens, is_end):
    """The tokens up to the first position where `is_end(tokens so far)`."""
    for length in range(1, len(tokens) + 1):
        if is_end(tokens[:length]):
            return tokens[:length], False
    return tokens, True


@pytest.mark.parametrize("ends", [[EOS], [EOS, 5, 17], list(range(2, 14))])
def test_any_end_token_ends_a_rollout_and_is_part_of_it(ends, tokenizer):
    model = without_ends(tiny_model())
    engine = TransformersEngine(model, tokenizer)
    prompts, budget = tiny_prompts(4, 2), [6, 6]
    # EOS is an end by itself, as the tokenizer's; so the endless rollouts need another tokenizer.
    endless = TransformersEngine(model, without_eos(tokenizer))
    full = endless.generate(prompts, budget, seeds_N=seeds(12), params=PLAIN)
    assert full.truncated_N.all() and (full.length_N == LIMIT).all()

    model.generation_config.eos_token_id = ends
    rollouts = engine.generate(prompts, budget, seeds_N=seeds(12), params=PLAIN)
    expected = [cut(tokens, lambda t: t[-1] in {EOS, *ends}) for tokens in completions(full)]
    assert completions(rollouts) == [tokens for tokens, _ in expected]
    assert rollouts.truncated_N.tolist() == [truncated for _, truncated in expected]
    assert not rollouts.truncated_N.all()
    assert (rollouts.token_NT[~rollouts.mask_NT] == PAD).all()


def without_eos(tokenizer):
    other = tiny_tokenizer()
    other.eos_token = None
    return other


def test_end_tokens_come_from_the_generation_config_and_the_tokenizer(tokenizer):
    model = tiny_model()
    engine = TransformersEngine(model, tokenizer)
    for configured, expected in ((None, (EOS,)), (7, (EOS, 7)), ([9, EOS, 7], (EOS, 7, 9))):
        model.generation_config.eos_token_id = configured
        assert engine.eos_token_ids == expected
    model.generation_config.eos_token_id = None
    assert TransformersEngine(model, without_eos(tokenizer)).eos_token_ids == ()


def test_an_end_at_the_length_limit_is_no_truncation(tokenizer):
    model = tiny_model()
    engine = TransformersEngine(model, without_eos(tokenizer))
    model.generation_config.eos_token_id = list(range(VOCABULARY))
    one = replace(PLAIN, max_completion_length=1)
    rollouts = engine.generate(tiny_prompts(3), [2], seeds_N=[1, 2], params=one)
    assert rollouts.truncated_N.tolist() == [False, False]
    model.generation_config.eos_token_id = None
    rollouts = engine.generate(tiny_prompts(3), [2], seeds_N=[1, 2], params=one)
    assert rollouts.truncated_N.tolist() == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize("stop", [("a",), ("abc", "yz"), ("cdc", "é", " .")])
def test_a_rollout_ends_with_the_token_that_completes_a_stop_string(stop, tokenizer):
    model = without_ends(tiny_model())
    engine = TransformersEngine(model, without_eos(tokenizer))
    prompts, budget = tiny_prompts(4, 2), [100, 100]
    params = replace(PLAIN, max_completion_length=40, temperature=3.0)
    full = engine.generate(prompts, budget, seeds_N=seeds(200), params=params)
    rollouts = engine.generate(
        prompts, budget, seeds_N=seeds(200), params=replace(params, stop=stop)
    )
    expected = [
        cut(tokens, lambda t: any(s in tokenizer.decode(t) for s in stop))
        for tokens in completions(full)
    ]
    assert completions(rollouts) == [tokens for tokens, _ in expected]
    assert rollouts.truncated_N.tolist() == [truncated for _, truncated in expected]
    assert 0 < sum(rollouts.truncated_N) < 200


def test_a_stop_string_in_the_prompt_does_not_count(tokenizer):
    model = without_ends(tiny_model())
    engine = TransformersEngine(model, without_eos(tokenizer))
    a, b = PIECES.index("a"), PIECES.index("b")
    prompt = replace(tiny_prompts(1)[0], token_ids=(a, b, a))
    free = engine.generate([prompt], [50], seeds_N=seeds(50), params=PLAIN)
    # Of "aba" the prompt holds all; "ab" + a would be found if its text were part of the search.
    stopped = engine.generate(
        [prompt], [50], seeds_N=seeds(50), params=replace(PLAIN, stop=("aba",))
    )
    text = [tokenizer.decode(tokens) for tokens in completions(free)]
    assert [len(t) for t in completions(stopped)] == [
        LIMIT if "aba" not in t else len(c) for t, c in zip(text, completions(stopped), strict=True)
    ]


def test_only_the_tail_is_decoded():
    decoded = []

    class Recorder:
        def batch_decode(self, tails, **kwargs):
            decoded.extend(len(tail) for tail in tails)
            return ["".join(PIECES[i] for i in tail) for tail in tails]

    stops = _StopStrings(Recorder(), ("zz",))
    token_RT = torch.full((1, 100), PIECES.index("q"))
    token_RT[0, 59] = token_RT[0, 58] = PIECES.index("z")
    row_K, running_K = torch.tensor([0]), torch.tensor([True])
    found = [bool(stops.found(token_RT, row_K, running_K, t)) for t in range(60)]
    assert found == [False] * 59 + [True]
    assert max(decoded) == 2 + 4
    assert not stops.found(token_RT, row_K, torch.tensor([False]), 59).any()


# Budgets, order and bookkeeping


def test_rows_are_ordered_by_prompt_then_slot_with_their_seeds(engine):
    prompts = tiny_prompts(3, 11, 1)
    seed_N = [2**62, 5, 9, 1]
    state = torch.get_rng_state()
    rollouts = engine.generate(prompts, [1, 0, 3], seeds_N=seed_N, params=PLAIN, version=4)
    assert torch.equal(torch.get_rng_state(), state)  # seeds are the only randomness
    assert rollouts.prompt_N.tolist() == [0, 2, 2, 2]
    assert rollouts.seed_N.tolist() == seed_N
    assert rollouts.version == 4
    assert rollouts.prompt_ids == tuple(p.token_ids for p in prompts)
    assert rollouts.mask_NT.shape[1] == rollouts.length_N.max()
    assert not rollouts.logprob_NT.requires_grad
    assert not rollouts.logprob_NT.is_inference()  # a loss may save it for its backward


def test_no_budget_gives_no_rows(engine):
    rollouts = engine.generate(tiny_prompts(3, 1), [0, 0], seeds_N=[], params=PLAIN)
    assert rollouts.token_NT.shape == (0, 0)
    assert len(rollouts.prompt_ids) == 2


def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_generated(engine, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("the model ran")

    prompts = tiny_prompts(3, POSITIONS - LIMIT + 1)
    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "forward", never)
        with pytest.raises(
            ValueError, match="'prompt-1' has 113 tokens.*length=16.* 128 positions"
        ):
            engine.generate(prompts, [1, 1], seeds_N=[1, 2], params=PLAIN)
    # Unused it may stay, and one token less fits exactly.
    engine.generate(prompts, [1, 0], seeds_N=[1], params=PLAIN)
    engine.generate(tiny_prompts(POSITIONS - LIMIT), [1], seeds_N=[1], params=PLAIN)


def test_malformed_requests_are_refused(engine):
    with pytest.raises(ValueError, match="at least one prompt"):
        engine.generate([], [], seeds_N=[], params=PLAIN)
    with pytest.raises(ValueError, match="must not be negative"):
        engine.generate(tiny_prompts(2), [-1], seeds_N=[], params=PLAIN)
    with pytest.raises(ValueError, match="seeds_N has 1 entries"):
        engine.generate(tiny_prompts(2), [2], seeds_N=[1], params=PLAIN)


def test_unusable_settings_are_refused(qwen3, tokenizer):
    with pytest.raises(ValueError, match="max_batch_rows must be at least 1, got 0"):
        TransformersEngine(qwen3, tokenizer, max_batch_rows=0)
    unpadded = tiny_tokenizer()
    unpadded.pad_token = None
    with pytest.raises(ValueError, match="has no pad token; set tokenizer.pad_token"):
        TransformersEngine(qwen3, unpadded)
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        TransformersEngine(t5, tokenizer)


def test_a_model_that_gives_nan_stops_the_step_and_names_the_prompt(tokenizer):
    model = tiny_model()
    engine = TransformersEngine(model, tokenizer)
    prompts = tiny_prompts(3, 4)
    with torch.no_grad():
        model.model.embed_tokens.weight[prompts[1].token_ids[0]] = torch.nan
    prompts[0] = replace(prompts[0], token_ids=(5,) * 3)
    assert prompts[1].token_ids[0] != 5
    one = replace(PLAIN, max_completion_length=1)
    engine.generate(prompts, [1, 0], seeds_N=[1], params=one)
    with pytest.raises(FloatingPointError, match="not finite for 2 of 3 .*'prompt-1'"):
        engine.generate(prompts, [1, 2], seeds_N=[1, 2, 3], params=one)


# The model is left as it was found


def test_modes_and_flags_are_restored_even_after_an_error(tokenizer):
    model = tiny_model()
    model.train()
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    frozen = model.model.layers[0].mlp
    frozen.eval()
    engine = TransformersEngine(model, tokenizer)

    seen = []
    hook = model.register_forward_pre_hook(lambda module, args: seen.append(module.training))
    rollouts = engine.generate(tiny_prompts(3), [2], seeds_N=[1, 2], params=PLAIN)
    hook.remove()
    with torch.no_grad():
        model.model.embed_tokens.weight += torch.nan
    with pytest.raises(FloatingPointError):
        engine.generate(tiny_prompts(3), [1], seeds_N=[1], params=PLAIN)

    assert not any(seen) and len(seen) > 2
    assert model.training and model.model.layers[1].mlp.training
    assert not frozen.training
    assert model.is_gradient_checkpointing
    assert model.config.use_cache is False
    assert torch.is_grad_enabled()
    # Checkpointing would have dropped the cache, and the rollouts with it.
    plain = TransformersEngine(tiny_model(), tokenizer)
    expected = plain.generate(tiny_prompts(3), [2], seeds_N=[1, 2], params=PLAIN)
    assert completions(rollouts) == completions(expected)


def test_weights_follow_the_model(tokenizer):
    def first(engine):
        return completions(engine.generate(tiny_prompts(3), [3], seeds_N=[1, 2, 3], params=PLAIN))

    model, other = tiny_model(), tiny_model(seed=1)
    engine = TransformersEngine(model, tokenizer)
    before = first(engine)
    engine.load_weights(model)
    assert first(engine) == before
    engine.load_weights(other)
    assert engine.model is other
    assert first(engine) != before
    # Steps of the optimizer need no call at all.
    other.load_state_dict(model.state_dict())
    assert first(engine) == before


def test_bfloat16_models_generate(tokenizer):
    model = tiny_model().to(torch.bfloat16)
    engine = TransformersEngine(model, tokenizer)
    rollouts = engine.generate(tiny_prompts(3, 9), [4, 4], seeds_N=seeds(8), params=PLAIN)
    assert rollouts.logprob_NT.dtype == torch.float32
    for row in range(8):
        # bfloat16 keeps 8 bits: logits of a few units are off by a few hundredths.
        torch.testing.assert_close(
            rollouts.logprob_NT[row][rollouts.mask_NT[row]],
            teacher_forced(model, rollouts, row),
            atol=0.15,
            rtol=0,
        )


def test_lora_models_share_their_prefill(tokenizer):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_model(), config).eval()
    engine = TransformersEngine(model, tokenizer)
    assert engine.shares_prefill
    rollouts = engine.generate(tiny_prompts(3, 9), [2, 2], seeds_N=seeds(4), params=PLAIN)
    for row in range(4):
        torch.testing.assert_close(
            rollouts.logprob_NT[row][rollouts.mask_NT[row]],
            teacher_forced(model, rollouts, row),
            atol=1e-5,
            rtol=0,
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("architecture", ["qwen3", "gemma3"])
def test_a_gpu_draws_the_same_rollouts(architecture, tokenizer):
    prompts, budget = tiny_prompts(3, 9, 1), [4, 0, 4]
    batches = [
        TransformersEngine(tiny_model(architecture).to(device), tokenizer).generate(
            prompts, budget, seeds_N=seeds(8), params=replace(PLAIN, top_p=0.9)
        )
        for device in ("cpu", "cuda")
    ]
    assert completions(batches[0]) == completions(batches[1])
    torch.testing.assert_close(batches[0].logprob_NT, batches[1].logprob_NT, atol=1e-3, rtol=0)


# Models without a cache to share


def test_a_model_without_a_shareable_cache_says_so_once(tokenizer):
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        engine = TransformersEngine(tiny_model("mamba"), tokenizer)
        engine.generate(tiny_prompts(3), [1], seeds_N=[1], params=PLAIN)
        engine.generate(tiny_prompts(3), [1], seeds_N=[1], params=PLAIN)
        engine.load_weights(engine.model)
    said = [str(warning.message) for warning in record if "no cache" in str(warning.message)]
    assert len(said) == 1
    assert said[0].startswith("MambaForCausalLM keeps no cache that rollouts can share")
    assert not engine.shares_prefill


def test_models_that_share_say_nothing(qwen3, tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = TransformersEngine(qwen3, tokenizer)
        engine.check_model()
    assert engine.shares_prefill


def recurrent_gemma():
    """Keeps the state of its recurrent layers in its modules, where no cache has it."""
    torch.manual_seed(0)
    config = RecurrentGemmaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=8,
        lru_width=32,
        attention_window_size=6,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
    )
    return larger(RecurrentGemmaForCausalLM(config))


def larger(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model.eval()


class IgnoresTheMask(torch.nn.Module):
    """A model that takes an attention mask and looks at what it hides, as xLSTM and RWKV do."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.config, self.generation_config = (
            model,
            model.config,
            model.generation_config,
        )

    device = property(lambda self: self.inner.device)

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=None):
        return self.inner(input_ids, past_key_values=past_key_values, use_cache=use_cache)


class RefusesOthersCaches(IgnoresTheMask):
    """A model that takes no cache but its own, as MiniMax does."""

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=None):
        if past_key_values is not None:
            raise ValueError("this model uses a cache of its own")
        return self.inner(input_ids, attention_mask=attention_mask, use_cache=use_cache)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (recurrent_gemma, "off by 0"),
        (lambda: IgnoresTheMask(tiny_model()), "off by 0"),
        (lambda: RefusesOthersCaches(tiny_model()), "ValueError: this model uses a cache"),
    ],
)
def test_a_model_whose_cache_gives_other_probabilities_runs_without(make, why, tokenizer):
    model = make()
    engine = TransformersEngine(model, tokenizer)
    with pytest.warns(UserWarning, match=f"other probabilities with a cache than without .{why}"):
        rollouts = engine.generate(tiny_prompts(5, 2), [3, 2], seeds_N=seeds(5), params=PLAIN)
    assert not engine.shares_prefill
    for row in range(5):
        torch.testing.assert_close(
            rollouts.logprob_NT[row][rollouts.mask_NT[row]],
            teacher_forced(model, rollouts, row),
            atol=1e-5,
            rtol=0,
        )


def test_a_model_that_looks_ahead_is_refused(tokenizer):
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=POSITIONS,
    )
    engine = TransformersEngine(larger(BertLMHeadModel(config)), tokenizer)
    with pytest.raises(ValueError, match="BertLMHeadModel cannot generate .* has to be causal"):
        engine.generate(tiny_prompts(3), [1], seeds_N=[1], params=PLAIN)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", SHARING)
def test_the_check_passes_whatever_a_model_of_its_kind_weighs(architecture, dtype, tokenizer):
    # Small weights give nearly equal probabilities, in which a fault would be a few nats at most.
    for scale in (0.25, 1.0):
        model = tiny_model(architecture)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(scale)
        engine = TransformersEngine(model.to(dtype), tokenizer)
        engine.check_model()
        assert engine.shares_prefill


# What a model or a tokenizer does not have


def padded_vocabulary(rows=VOCABULARY + 30):
    """A model with more ids than the tokenizer has tokens."""
    model = tiny_model()
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():  # and they are likely
        model.lm_head.weight[VOCABULARY:] = model.lm_head.weight[2:32] * 3
    return model


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_without_a_token_are_never_drawn(temperature, tokenizer):
    model = padded_vocabulary()
    params = replace(PLAIN, temperature=temperature)
    engine = TransformersEngine(model, tokenizer)
    rollouts = engine.generate(tiny_prompts(3, 7), [20, 20], seeds_N=seeds(40), params=params)
    assert rollouts.token_NT.max() < VOCABULARY
    engine.known_ids = None  # of a tokenizer that cannot say
    anything = engine.generate(tiny_prompts(3, 7), [20, 20], seeds_N=seeds(40), params=params)
    assert anything.token_NT.max() >= VOCABULARY
    for row in range(40):  # as with top_k, log-probabilities are those before the filter
        torch.testing.assert_close(
            rollouts.logprob_NT[row][rollouts.mask_NT[row]],
            teacher_forced(model, rollouts, row),
            atol=1e-5,
            rtol=0,
        )


def test_an_end_that_the_tokenizer_does_not_have_may_be_drawn(tokenizer):
    model = padded_vocabulary()
    model.generation_config.eos_token_id = VOCABULARY + 3
    engine = TransformersEngine(model, without_eos(tokenizer))
    rollouts = engine.generate(tiny_prompts(3), [60], seeds_N=seeds(60), params=PLAIN)
    assert set(rollouts.token_NT[rollouts.token_NT >= VOCABULARY].tolist()) == {VOCABULARY + 3}


def test_a_pad_token_without_an_embedding_is_never_looked_up():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == VOCABULARY
    for architecture in ("qwen3", "mamba"):
        engine = TransformersEngine(with_frequent_ends(tiny_model(architecture)), tokenizer)
        rollouts = engine.generate(tiny_prompts(3, 7), [8, 8], seeds_N=seeds(16), params=PLAIN)
        assert not rollouts.mask_NT.all()
        assert (rollouts.token_NT[~rollouts.mask_NT] == VOCABULARY).all()
        assert (rollouts.token_NT[rollouts.mask_NT] < VOCABULARY).all()


def test_a_prompt_with_an_id_that_has_no_embedding_is_refused(engine):
    prompt = replace(tiny_prompts(2)[0], token_ids=(3, VOCABULARY + 4))
    with pytest.raises(ValueError, match=r"'prompt-0' holds token id 38.*resize_token_embeddings"):
        engine.generate([prompt], [1], seeds_N=[1], params=PLAIN)


def test_longrope_does_not_pass_the_length_where_its_frequencies_change(tokenizer):
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 4.0, 8.0, 16.0],
        "factor": 8.0,
        "original_max_position_embeddings": 20,
        "partial_rotary_factor": 1.0,
    }
    config = Phi3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        original_max_position_embeddings=20,
        rope_parameters=rope,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
    )
    model = larger(Phi3ForCausalLM(config))
    engine = TransformersEngine(model, tokenizer)
    rollouts = engine.generate(tiny_prompts(4), [3], seeds_N=seeds(3), params=PLAIN)
    for row in range(3):
        torch.testing.assert_close(
            rollouts.logprob_NT[row][rollouts.mask_NT[row]],
            teacher_forced(model, rollouts, row),
            atol=1e-5,
            rtol=0,
        )
    with pytest.raises(ValueError, match="does not fit the 20 positions up to which .*longrope"):
        engine.generate(tiny_prompts(5), [3], seeds_N=seeds(3), params=PLAIN)


def test_virtual_tokens_are_refused(tokenizer):
    peft = pytest.importorskip("peft")
    for config in (
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    ):
        model = peft.get_peft_model(tiny_model(), config)
        with pytest.raises(ValueError, match="_TUNING puts learnt tokens before every call"):
            TransformersEngine(model, tokenizer)


def test_both_ways_of_running_a_model_agree(tokenizer):
    engine = TransformersEngine(tiny_model(), tokenizer)
    prompts, budget = tiny_prompts(3, 11), [3, 3]
    shared = engine.generate(prompts, budget, seeds_N=seeds(6), params=PLAIN)
    engine.shares_prefill = False
    plain = engine.generate(prompts, budget, seeds_N=seeds(6), params=PLAIN)
    assert completions(shared) == completions(plain)
    torch.testing.assert_close(shared.logprob_NT, plain.logprob_NT, atol=1e-5, rtol=0)


def test_the_growing_layer_holds_what_a_dynamic_layer_holds():
    # Pins what the layer relies on: `update`, `reorder_cache` and the fields keys and values.
    generator = torch.Generator().manual_seed(0)
    growing, dynamic = _GrowingLayer(), DynamicLayer()
    rows, copies, place = 3, 0, None
    for step in range(60):
        length = 5 if step == 0 else 1
        states = [torch.randn(rows, 2, length, 4, generator=generator) for _ in range(2)]
        for one, two in zip(growing.update(*states), dynamic.update(*states), strict=True):
            assert torch.equal(one, two)
        copies += growing.keys.data_ptr() != place
        place = growing.keys.data_ptr()
        assert growing.get_seq_length() == dynamic.get_seq_length()
        assert growing.get_mask_sizes(1) == dynamic.get_mask_sizes(1)
        if step in (0, 20, 50):  # repeat, reorder, drop
            index = torch.tensor({0: [0, 0, 1, 2, 2], 20: [4, 0, 3], 50: [1]}[step])
            growing.reorder_cache(index)
            dynamic.reorder_cache(index)
            rows = len(index)
            assert torch.equal(growing.keys, dynamic.keys)
            assert torch.equal(growing.values, dynamic.values)
    # One copy at the start, one after each of the three calls, one when the first room is used up.
    assert copies <= 6


def test_a_cache_is_a_list_of_layers_that_may_be_replaced(qwen3):
    # Pins what `_growing_cache` relies on.
    cache = DynamicCache(config=qwen3.config)
    assert [type(layer) for layer in cache.layers] == [DynamicLayer, DynamicLayer]
    cache.layers = [_GrowingLayer() for _ in cache.layers]
    with torch.no_grad():
        qwen3(torch.tensor([[3, 4, 5]]), past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 3
