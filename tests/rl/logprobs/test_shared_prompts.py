"""Rows packed behind one prompt give what separate rows give."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rl.logprobs.from_hidden import fused_logprobs
from rl.logprobs.from_logits import completion_logprobs, completion_statistics
from rl.logprobs.micro_batches import by_prompts
from rl.logprobs.scorer import Scorer
from rl.logprobs.shared_prompts import packed_layout, pays, refusal
from rollouts.batch import TokenRollouts
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
@pytest.mark.parametrize("make", [qwen3, llama, gpt2])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_log_probabilities_and_gradients_are_those_of_separate_rows(make, shape, attention):
    model, rollouts = make().double(), SHAPES[shape]
    model.set_attn_implementation(attention)
    logprob_NT, grad = found(model, rollouts, None)
    packed_NT, packed_grad = found(model, rollouts, packed_layout(model, rollouts, 0))
    torch.testing.assert_close(packed_NT, logprob_NT, atol=1e-10, rtol=0)
    # The norms of Qwen3 and Llama compute in float32 in a float64 model; GPT-2's do not.
    limit = 1e-10 if make is gpt2 else 1e-6
    assert (packed_grad - grad).norm() <= limit * grad.norm()
    assert (packed_NT[~rollouts.mask_NT] == 0).all()


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


def test_packing_pays_for_siblings_and_not_for_strangers():
    model = qwen3()
    assert pays(model, rows([0, 0, 0, 0], [2, 3, 2, 3]))
    assert not pays(model, rows([0, 1, 2], [5, 5, 5]))


def test_rows_of_a_prompt_stand_together_in_as_many_micro_batches_as_by_rows():
    micro = by_prompts(torch.tensor([0, 1, 0, 2, 1]), torch.tensor([1, 5, 3, 4, 2]), 2)
    assert [part.tolist() for part in micro] == [[4, 1], [3, 0], [2]]
    assert by_prompts(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), 2) == []


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
    assert packed._layout(model, rollouts) is not None
    assert separate._layout(model, rollouts) is None
    torch.testing.assert_close(
        packed.logprobs(model, rollouts), separate.logprobs(model, rollouts), atol=1e-10, rtol=0
    )
    packed.right_padded = True
    assert packed._layout(model, rollouts) is None
