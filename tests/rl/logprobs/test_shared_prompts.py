"""Rows packed behind one prompt give what separate rows give."""

import copy
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.utils import logging

from rl.logprobs.from_hidden import fused_logprobs
from rl.logprobs.from_logits import completion_logprobs, completion_statistics, ends
from rl.logprobs.micro_batches import by_prompts, by_tokens_of_prompts
from rl.logprobs.scorer import Scorer
from rl.logprobs.shared_prompts import cost, packed_layout, refusal
from rollouts.batch import TokenRollouts
from tests import tiny
from tests.tiny import model as qwen3


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=14, n_positions=64, n_embd=32, n_layer=2, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def llama(**settings):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=14, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, bos_token_id=None, eos_token_id=1, **settings,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def mistral(**settings):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=14, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, bos_token_id=None, eos_token_id=1,
        **{"sliding_window": None} | settings,
    )  # fmt: skip
    return MistralForCausalLM(config)


def rows(prompt, lengths, prompts=((3, 4, 5, 6), (7, 8), (2, 9, 11))):
    lengths, longest = torch.tensor(lengths), max(lengths) + 1
    mask_NT = torch.arange(longest) < lengths[:, None]
    mask_NT[0, 1] = False  # a tool's output, which is context
    return TokenRollouts(
        prompt_N=torch.tensor(prompt),
        mask_NT=mask_NT,
        logprob_NT=torch.zeros(mask_NT.shape),
        version=0,
        token_NT=torch.randint(14, mask_NT.shape, generator=torch.Generator().manual_seed(1)),
        truncated_N=torch.zeros(len(prompt), dtype=torch.bool),
        seed_N=torch.arange(len(prompt)),
        prompt_ids=prompts,
    )


SHAPES = {
    "ragged, siblings apart": rows([0, 1, 0, 2, 0, 1], [5, 2, 7, 1, 3, 4]),
    "one rollout of each": rows([2, 0, 1], [5, 2, 3]),
    "one prompt": rows([1] * 5, [3, 3, 0, 2, 6]),
}


def found(model, rollouts, layout, score=completion_logprobs):
    model.zero_grad()
    logprob_NT = score(model, rollouts, temperature=0.7, pad_id=0, layout=layout)
    weight_NT = torch.linspace(-1, 2, logprob_NT.numel(), dtype=logprob_NT.dtype)
    (logprob_NT * weight_NT.view_as(logprob_NT)).sum().backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return logprob_NT.detach(), torch.cat(grads)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("make", [qwen3, llama, mistral, gpt2])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_log_probabilities_and_gradients_are_those_of_separate_rows(make, shape, attention):
    model, rollouts = make().double(), SHAPES[shape]
    # Compared with sdpa: in float64, transformers' eager attention gives NaN where padding sees nothing.
    logprob_NT, grad = found(model, rollouts, None)
    model.set_attn_implementation(attention)
    packed_NT, packed_grad = found(model, rollouts, packed_layout(model, rollouts, 0))
    # Eager attention but for GPT-2's, and all norms but GPT-2's, compute in float32 in a float64 model.
    limit = 1e-10 if attention == "sdpa" or make is gpt2 else 1e-6
    torch.testing.assert_close(packed_NT, logprob_NT, atol=limit, rtol=0)
    assert (packed_grad - grad).norm() <= (1e-10 if make is gpt2 else 1e-6) * grad.norm()
    assert (packed_NT[~rollouts.mask_NT] == 0).all()


def test_a_rollout_sees_neither_its_siblings_nor_the_padding():
    model, rollouts = qwen3().double(), SHAPES["one prompt"]
    logprob_NT, _ = found(model, rollouts, packed_layout(model, rollouts, 0))
    changed = rollouts.token_NT.clone()
    changed[0, :3] = (changed[0, :3] + 1) % 14
    other = replace(rollouts, token_NT=changed)
    other_NT, _ = found(model, other, packed_layout(model, other, 5))
    assert torch.equal(other_NT[1:], logprob_NT[1:])
    assert not torch.equal(other_NT[0], logprob_NT[0])


@pytest.mark.parametrize("change", ["adapter", "recomputed activations"])
def test_adapters_and_recomputed_activations_give_the_gradients_of_separate_rows(change):
    model, rollouts = llama().double(), SHAPES["ragged, siblings apart"]
    if change == "adapter":
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = get_peft_model(model, lora)
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert refusal(model) is None
    logprob_NT, grad = found(model, rollouts, None)
    packed_NT, packed_grad = found(model, rollouts, packed_layout(model, rollouts, 0))
    torch.testing.assert_close(packed_NT, logprob_NT, atol=1e-10, rtol=0)
    assert (packed_grad - grad).norm() <= 1e-6 * grad.norm()


def test_float32_agrees_to_a_millionth_also_with_the_head_fused():
    model, rollouts = qwen3(), SHAPES["ragged, siblings apart"]
    logprob_NT, grad = found(model, rollouts, None)
    for score in (completion_logprobs, fused_logprobs):
        packed_NT, packed_grad = found(model, rollouts, packed_layout(model, rollouts, 0), score)
        torch.testing.assert_close(packed_NT, logprob_NT, atol=2e-6, rtol=0)
        assert (packed_grad - grad).norm() <= 1e-6 * grad.norm()


def test_entropies_are_those_of_separate_rows():
    model, rollouts = qwen3().double(), SHAPES["ragged, siblings apart"]
    layout = packed_layout(model, rollouts, 0)
    packed = completion_statistics(model, rollouts, pad_id=0, layout=layout)
    separate = completion_statistics(model, rollouts, pad_id=0)
    torch.testing.assert_close(packed.entropy_NT, separate.entropy_NT, atol=1e-10, rtol=0)


def test_each_prompt_goes_through_the_model_once():
    rollouts = SHAPES["one prompt"]
    ids_GS = packed_layout(qwen3(), rollouts, 0).inputs["input_ids"]
    assert ids_GS.shape == (1, 2 + 3 + 3 + 0 + 2 + 6)
    assert ids_GS[0, :2].tolist() == [7, 8]


def test_the_cost_counts_columns_and_their_attention():
    # Two prompts of 4 and 2, rollouts of 2, 3 (first) and 2, 3 (second). Packed: 2 rows of 4 + 5.
    found = cost(rows([0, 0, 1, 1], [2, 3, 2, 3]), width=32)
    assert (found.packed_tokens, found.separate_tokens) == (2 * 9, 4 * 7)
    assert found.packed == pytest.approx(18 * (1 + 9 / 192))
    assert found.separate == pytest.approx(28 * (1 + 7 / 192))


def test_packing_pays_for_siblings_and_not_for_strangers_or_long_rollouts():
    def pays(*shape):
        found = cost(rows(*shape), width=32)
        return found.packed < found.separate

    assert pays([0, 0, 0, 0], [2, 3, 2, 3])
    assert not pays([0, 1, 2], [5, 5, 5])
    assert not pays([0] * 8, [300] * 8)  # attention between siblings outweighs a prompt of 4


def test_rows_of_a_prompt_stand_together_in_as_many_micro_batches_as_by_rows():
    # The prompts' sums are 4, 7 and 4.
    micro = by_prompts(torch.tensor([0, 1, 0, 2, 1]), torch.tensor([1, 5, 3, 4, 2]), 2)
    assert [part.tolist() for part in micro] == [[4, 1], [0, 2], [3]]
    assert by_prompts(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), 2) == []


def test_packed_rows_keep_to_a_budget_of_tokens_and_hold_each_row_once():
    # Prompt 0 (2 tokens): 5 3 1; prompt 1 (4 tokens): 4 2. Budget 10: [0: 5 3], [1: 4 2], [0: 1].
    prompt, size = torch.tensor([0, 1, 0, 1, 0]), torch.tensor([2, 4, 2, 4, 2])
    length = torch.tensor([1, 4, 5, 2, 3])
    micro = by_tokens_of_prompts(prompt, size, length, 10)
    assert [part.tolist() for part in micro] == [[2, 4], [1, 3], [0]]
    # Side by side both groups take 2 (4 + 9) = 26 columns.
    for budget, expected in ((25, [[2, 4, 0], [1, 3]]), (26, [[2, 4, 0, 1, 3]])):
        micro = by_tokens_of_prompts(prompt, size, length, budget)
        assert [part.tolist() for part in micro] == expected
    # Rows longer than the budget stand alone.
    assert [len(part) for part in by_tokens_of_prompts(prompt, size, length, 1)] == [1] * 5


@pytest.mark.parametrize("budget", [1, 20, 50, 200])
def test_what_a_budget_of_tokens_forwards_fits_it(budget):
    generator = torch.Generator().manual_seed(budget)
    prompt = torch.randint(6, (40,), generator=generator)
    ids = tuple(tuple(range(1, 2 + p)) for p in range(6))
    rollouts = rows(prompt.tolist(), torch.randint(12, (40,), generator=generator).tolist(), ids)
    size = torch.tensor([len(ids[p]) for p in prompt.tolist()])
    micro = by_tokens_of_prompts(prompt, size, ends(rollouts.mask_NT), budget)
    assert sorted(torch.cat(micro).tolist()) == list(range(40))
    for row_B in micro:
        inputs = packed_layout(qwen3(), rollouts.take(row_B), 0).inputs
        assert inputs["input_ids"].numel() <= budget or len(row_B) == 1


def test_models_that_do_not_allow_it_are_refused_with_the_reason():
    assert refusal(qwen3()) is None
    assert "dropout" in refusal(llama(attention_dropout=0.1))
    assert refusal(llama(attention_dropout=0.1).eval(), in_eval=True) is None
    window = llama()
    window.config.sliding_window = 4
    assert "sliding window" in refusal(window)
    flash = copy.deepcopy(qwen3())
    flash.config._attn_implementation = "flash_attention_2"
    assert "flash_attention_2" in refusal(flash)


def test_the_probe_refuses_a_model_that_packed_rows_change(monkeypatch):
    model = qwen3()
    forward = model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda **inputs: forward(**inputs | {"position_ids": None})
    )
    assert "nats from those of separate ones" in refusal(model)


def test_a_scorer_packs_where_it_may_and_gives_the_same():
    model, rollouts = qwen3().double(), rows([0, 0, 0, 1, 1, 1], [2, 3, 2, 3, 1, 2])
    packed = Scorer(temperature=1.0, pad_id=0, fused=None, share_prompts="auto")
    separate = Scorer(temperature=1.0, pad_id=0, fused=None)
    assert packed._layout(model, rollouts) is None  # nobody has asked the model yet
    assert packed.refuses_to_share(model) is None
    packed.width = 32
    assert packed._layout(model, rollouts) is not None
    assert separate._layout(model, rollouts) is None
    torch.testing.assert_close(
        packed.logprobs(model, rollouts), separate.logprobs(model, rollouts), atol=1e-10, rtol=0
    )
    packed.right_padded = True
    assert "mask hides" in packed.refuses_to_share(model)


def test_separate_rows_that_exceed_the_budget_of_tokens_are_packed_though_that_costs_more():
    rollouts = rows([0] * 4, [20] * 4)
    found = cost(rollouts, width=2)
    assert found.packed > found.separate and found.packed_tokens < found.separate_tokens
    for most, packs in ((None, False), (96, False), (95, True)):
        scorer = Scorer(
            temperature=1.0, pad_id=0, fused=None, share_prompts="auto", max_tokens=most
        )
        scorer.width = 2
        assert (scorer._layout(qwen3(), rollouts) is not None) is packs
        assert scorer.cost(rollouts) == (found.packed if packs else found.separate)


@pytest.mark.slow
def test_the_reason_of_a_refusal_is_said_once_in_a_run(tmp_path, caplog):
    logging.enable_propagation()
    window = mistral(sliding_window=32)
    made = tiny.run(tmp_path, model=window, share_prompts="always", max_steps=2)
    said = [line for line in caplog.messages if "share_prompts" in line]
    assert said == [
        "share_prompts has no effect, each rollout is scored with its own copy of the prompt: the "
        "model attends to a sliding window"
    ]
    assert made.policy.scorer.width is None


@pytest.mark.slow
def test_a_run_that_shares_prompts_ends_at_the_weights_of_one_that_does_not(tmp_path):
    common = {"trainer": "grpo", "reward": tiny.small_digit, "beta": 0.1, "num_iterations": 2}
    common |= {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 1e9, "max_steps": 2}
    cuts = [
        {"share_prompts": "never"},
        {"share_prompts": "always", "per_device_train_batch_size": 8},
        {"share_prompts": "auto", "micro_batch_tokens": 40, "fused_logprobs": True},
    ]
    weights = []
    for i, cut in enumerate(cuts):
        model = qwen3(dtype=torch.float64)
        made = tiny.run(tmp_path / str(i), model=model, **(common | cut))
        assert (made.policy.scorer.width == 32) is (i > 0)
        weights.append(torch.cat([value.flatten() for value in tiny.parameters(made).values()]))
    start = torch.cat([v.flatten() for v in qwen3(dtype=torch.float64).state_dict().values()])
    moved = (weights[0] - start).norm()
    assert moved > 1e-2
    for other in weights[1:]:
        assert (other - weights[0]).norm() <= 1e-6 * moved
