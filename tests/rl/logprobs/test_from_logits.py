import math
from types import MethodType

import pytest
import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

from rl.logprobs.from_logits import (
    _SelectedLogprob,
    completion_logprobs,
    completion_statistics,
    ends,
    head_inputs,
    logit_gradient,
    selected,
)
from rollouts.batch import TokenRollouts

PAD = 0
PROMPTS = ((4, 8, 6), (3,), (5, 5, 2, 9, 7))


def qwen(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    config = Qwen3Config(
        **{
            "vocab_size": 13,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "tie_word_embeddings": False,
        }
        | changes
    )
    return stirred(Qwen3ForCausalLM(config).to(dtype))


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=13,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        bos_token_id=None,
        eos_token_id=None,
    )
    return stirred(GPT2LMHeadModel(config).double().eval())


def stirred(model):
    """Weights larger than the initialisation, so that attention and positions matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


class Bare(nn.Module):
    """A model that takes token ids and the attention mask, and nothing else."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, input_ids, attention_mask):
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


def rollouts(mask=((1, 1, 1, 1), (1, 1, 0, 0), (1, 1, 1, 0), (1, 0, 0, 0)), prompt=(0, 2, 1, 0)):
    generator = torch.Generator().manual_seed(1)
    mask_NT = torch.tensor(mask, dtype=torch.bool)
    return TokenRollouts(
        prompt_N=torch.tensor(prompt),
        mask_NT=mask_NT,
        logprob_NT=torch.zeros(mask_NT.shape),
        version=0,
        token_NT=torch.randint(1, 13, mask_NT.shape, generator=generator),
        truncated_N=torch.zeros(len(mask_NT), dtype=torch.bool),
        seed_N=torch.arange(len(mask_NT)),
        prompt_ids=PROMPTS,
    )


def by_loop(model, batch, temperature=1.0):
    """The definition: one row at a time, no padding, nothing but token ids."""
    logprob_NT = torch.zeros(batch.mask_NT.shape, dtype=torch.float64)
    for n, p in enumerate(batch.prompt_N.tolist()):
        prompt, token_T, mask_T = batch.prompt_ids[p], batch.token_NT[n], batch.mask_NT[n]
        sequence = torch.tensor([[*prompt, *token_T.tolist()]])
        logits = model(input_ids=sequence, attention_mask=torch.ones_like(sequence)).logits[0]
        for t in mask_T.nonzero().flatten().tolist():
            z = logits[len(prompt) + t - 1].double() / temperature
            logprob_NT[n, t] = z.log_softmax(-1)[token_T[t]]
    return logprob_NT


@pytest.mark.parametrize("make", [qwen, gpt2])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_the_unpadded_model_row_by_row(make, temperature):
    model, batch = make(), rollouts()
    actual = completion_logprobs(model, batch, temperature=temperature, pad_id=PAD)
    expected = by_loop(model, batch, temperature)
    assert expected[batch.mask_NT].std() > 0.3  # the rows differ, so a mix-up would show
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)


def test_gradient_is_that_of_the_unpadded_model():
    model, batch = qwen(), rollouts()
    weight_NT = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    parameters = list(model.parameters())
    actual = completion_logprobs(model, batch, temperature=0.7, pad_id=PAD)
    grads = torch.autograd.grad((actual * weight_NT).sum(), parameters)
    expected = torch.autograd.grad((by_loop(model, batch, 0.7) * weight_NT).sum(), parameters)
    for one, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


def test_a_model_that_keeps_all_logits_and_makes_its_own_positions_is_served_too():
    model, batch = qwen(), rollouts()
    actual = completion_logprobs(Bare(model), batch, pad_id=PAD)
    # Rotary positions are relative, so the left padding's shift does not matter to this model; but
    # transformers computes their sines in float32, whatever the model's dtype.
    torch.testing.assert_close(actual, by_loop(model, batch), atol=1e-6, rtol=0)


def test_off_the_mask_is_0_and_what_stands_there_does_not_matter():
    model, batch = qwen(), rollouts()
    before = completion_logprobs(model, batch, pad_id=PAD)
    assert (before[~batch.mask_NT] == 0).all()
    token_NT = torch.where(batch.mask_NT, batch.token_NT, 12)
    object.__setattr__(batch, "token_NT", token_NT)
    torch.testing.assert_close(completion_logprobs(model, batch, pad_id=7), before, atol=0, rtol=0)


def test_tool_output_inside_a_row_is_context_but_has_no_logprob():
    model, batch = qwen(), rollouts(mask=((1, 0, 0, 1),), prompt=(0,))
    actual = completion_logprobs(model, batch, pad_id=PAD)
    assert actual[0, 1] == 0 and actual[0, 2] == 0 and actual[0, 3] < 0
    torch.testing.assert_close(actual, by_loop(model, batch), atol=1e-12, rtol=0)


@pytest.mark.parametrize("prompt", [(0, 2, 1, 0), (1, 1, 1, 1)])
def test_the_micro_batch_a_row_is_in_does_not_matter(prompt):
    model, batch = qwen(), rollouts(prompt=prompt)
    whole = completion_logprobs(model, batch, pad_id=PAD)
    parts = [
        completion_logprobs(model, batch.take(rows), pad_id=PAD)
        for rows in (torch.tensor([1]), torch.tensor([3, 0, 2]))
    ]
    torch.testing.assert_close(torch.cat(parts), whole[[1, 3, 0, 2]], atol=1e-12, rtol=0)


@pytest.mark.parametrize("mask", [((0, 0, 0, 0), (1, 1, 0, 0)), ((0, 0, 0, 0), (0, 0, 0, 0))])
def test_a_row_without_decisions_is_0_and_still_takes_part_in_the_graph(mask):
    model, batch = qwen(), rollouts(mask=mask, prompt=(0, 2))
    logprob_NT = completion_logprobs(model, batch, pad_id=PAD)
    assert logprob_NT.shape == (2, 4)
    assert (logprob_NT[0] == 0).all()
    logprob_NT[0].sum().backward()
    # Every parameter gets a gradient, as DistributedDataParallel wants, and it is 0.
    assert all((parameter.grad == 0).all() for parameter in model.parameters())


def test_half_precision_gives_float32_logprobs_of_the_half_precision_logits():
    model, batch = qwen(torch.bfloat16), rollouts()
    actual = completion_logprobs(model, batch, pad_id=PAD)
    assert actual.dtype == torch.float32
    # Rounding in bfloat16 layers depends on the padding; a log-softmax in bfloat16 would be worse.
    torch.testing.assert_close(actual.double(), by_loop(model, batch), atol=0.15, rtol=0)
    logits_NTV = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)).bfloat16() * 5
    token_NT, mask_NT = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.ones(2, 3, dtype=torch.bool)
    selected = _SelectedLogprob.apply(logits_NTV, token_NT, mask_NT, 1.0, False)[0]
    exact = logits_NTV.double().log_softmax(-1).gather(2, token_NT[..., None])[..., 0]
    torch.testing.assert_close(selected.double(), exact, atol=2e-6, rtol=0)


def test_selected_logprob_has_the_gradient_of_its_values():
    generator = torch.Generator().manual_seed(0)
    logits_NTV = torch.randn(3, 4, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    token_NT = torch.randint(0, 5, (3, 4), generator=generator)
    mask_NT = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]], dtype=torch.bool)
    assert torch.autograd.gradcheck(
        lambda z: _SelectedLogprob.apply(z, token_NT, mask_NT, 0.6, False)[0], (logits_NTV,)
    )


@pytest.mark.parametrize("chunk", [1, 13, 40])
def test_the_chunks_in_which_it_is_computed_do_not_matter(monkeypatch, chunk):
    model, batch = qwen(), rollouts()

    def result():
        logprob_NT = completion_logprobs(model, batch, temperature=0.7, pad_id=PAD)
        return logprob_NT, torch.autograd.grad(logprob_NT.sum(), model.lm_head.weight)[0]

    whole = result()
    # 13 tokens of vocabulary: chunks of one position, one and three.
    monkeypatch.setattr("rl.logprobs.from_logits.CHUNK", chunk)
    for one, other in zip(result(), whole, strict=True):
        torch.testing.assert_close(one, other, atol=1e-14, rtol=0)


def test_entropy_by_hand():
    # Two tokens of probability 3/4 and 1/4: 3/4 log(4/3) + 1/4 log 4; four alike: log 4; and one
    # that is certain, the others left out by -inf.
    z_LV = torch.tensor([[3.0, 1.0, 0, 0], [1, 1, 1, 1], [5, 0, 0, 0]], dtype=torch.float64).log()
    logprob_L, normaliser_L, entropy_L = selected(z_LV, torch.tensor([1, 2, 0]), entropy=True)
    quarter = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    assert logprob_L.tolist() == pytest.approx([math.log(1 / 4), math.log(1 / 4), 0.0])
    assert normaliser_L.tolist() == pytest.approx([math.log(4), math.log(4), math.log(5)])
    assert entropy_L.tolist() == pytest.approx([quarter, math.log(4), 0.0], abs=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropy_is_that_of_the_whole_vocabulary_at_the_same_temperature(temperature):
    model, batch = qwen(), rollouts(mask=((1, 0, 0, 1), (1, 1, 0, 0)), prompt=(0, 2))
    logprob_NT, entropy_NT = completion_statistics(
        model, batch, temperature=temperature, pad_id=PAD
    )
    expected = completion_logprobs(model, batch, temperature=temperature, pad_id=PAD)
    torch.testing.assert_close(logprob_NT, expected, atol=0, rtol=0)
    logits_NTV = head_inputs(model, batch, pad_id=PAD) @ model.lm_head.weight.T
    slow_NT = torch.distributions.Categorical(logits=logits_NTV / temperature).entropy()
    mask_NT = batch.mask_NT
    torch.testing.assert_close(entropy_NT[mask_NT], slow_NT[mask_NT], atol=1e-12, rtol=0)
    assert entropy_NT[mask_NT].std() > 0.05
    assert (entropy_NT[~mask_NT] == 0).all()
    assert logprob_NT.requires_grad and not entropy_NT.requires_grad


def test_an_entropy_has_the_gradient_of_the_textbook_where_it_is_asked_for():
    model, batch = qwen(), rollouts(mask=((1, 0, 0, 1), (1, 1, 0, 0)), prompt=(0, 2))
    found = completion_statistics(model, batch, temperature=0.7, pad_id=PAD, differentiable=True)
    head = model.lm_head.weight
    hidden_NTC = head_inputs(model, batch, pad_id=PAD)
    slow_NT = torch.distributions.Categorical(logits=hidden_NTC @ head.T / 0.7).entropy()
    # A weight per token, so that no two of them can be confused.
    weight_NT = batch.mask_NT * torch.arange(1.0, 9.0, dtype=torch.float64).reshape(2, 4)
    (ours,) = torch.autograd.grad((weight_NT * found.entropy_NT).sum(), head)
    (theirs,) = torch.autograd.grad((weight_NT * slow_NT).sum(), head)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    assert theirs.abs().max() > 1e-2


def test_a_token_left_out_by_minus_infinity_takes_no_part_in_the_gradient_of_an_entropy():
    z_LV = torch.tensor([[0.3, -0.2, -math.inf, 1.0]], dtype=torch.float64)
    one_L = torch.ones(1, dtype=torch.float64)
    kept = z_LV[:, [0, 1, 3]].clone().requires_grad_()
    entropy = torch.distributions.Categorical(logits=kept).entropy()
    expected = torch.autograd.grad(entropy.sum(), kept)[0]
    found = logit_gradient(
        z_LV.clone(), z_LV.logsumexp(1), torch.tensor([0]), 0 * one_L, entropy.detach(), one_L
    )
    torch.testing.assert_close(found[:, [0, 1, 3]], expected, atol=1e-14, rtol=0)
    assert found[0, 2] == 0


def test_a_sure_token_has_entropy_0_in_float32():
    # Far from 0, where a normaliser minus a mean logit would lose 1e-5.
    z_LV = torch.full((1, 1000), 200.0)
    z_LV[0, 3] = 300.0
    assert selected(z_LV, torch.tensor([3]), entropy=True)[2].item() == pytest.approx(0, abs=1e-30)


def half_precision(model, dtype=torch.bfloat16):
    """`forward` wrapped as `Accelerator.prepare_model` wraps it."""
    forward = torch.autocast("cpu", dtype)(model.forward.__func__)
    model.forward = MethodType(forward, model)
    model.forward = MethodType(convert_outputs_to_fp32(model.forward.__func__), model)
    return model


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives, by type."""

    def __init__(self):
        super().__init__()
        self.numel = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.numel[value.dtype] = max(self.numel.get(value.dtype, 0), value.numel())
        return result


def test_mixed_precision_leaves_the_logits_in_half_precision(monkeypatch):
    monkeypatch.setattr("rl.logprobs.from_logits.CHUNK", 5000)
    model, batch = half_precision(qwen(torch.float32, vocab_size=5000)), rollouts()
    logits = model(input_ids=batch.token_NT).logits
    assert logits.dtype == torch.float32  # accelerate's cast, which is the reason for all this
    num_logits, forward = batch.mask_NT.numel() * 5000, model.forward
    with Largest() as largest:
        completion_logprobs(model, batch, pad_id=PAD).sum().backward()
    assert largest.numel[torch.bfloat16] >= num_logits
    # The head's weight and its gradient are the largest in float32.
    assert largest.numel[torch.float32] == 5000 * 16 < num_logits * 1.1
    assert model.forward == forward

    # And nothing but memory is changed.
    without = completion_logprobs(model, batch, pad_id=PAD)
    monkeypatch.setattr("rl.logprobs.from_logits.ConvertOutputsToFp32", type(None))
    assert torch.equal(completion_logprobs(model, batch, pad_id=PAD), without)


def test_accelerates_cast_is_put_back_when_the_model_raises():
    model, batch = half_precision(qwen(torch.float32)), rollouts()
    forward = model.forward
    object.__setattr__(batch, "token_NT", batch.token_NT + 100)
    with pytest.raises(IndexError):
        completion_logprobs(model, batch, pad_id=PAD)
    assert model.forward == forward


def test_a_wrapper_that_casts_is_unwrapped_wherever_it_sits():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = half_precision(get_peft_model(qwen(torch.float32, vocab_size=5000), config))
    with Largest() as largest, torch.no_grad():
        completion_logprobs(model, rollouts(), pad_id=PAD)
    assert largest.numel[torch.float32] <= 5000 * 16


def test_positions_without_gradient_cost_nothing_and_pass_no_nan_on():
    logits_NTV = torch.zeros(1, 3, 4, dtype=torch.float64)
    logits_NTV[0, 2] = float("nan")
    logits_NTV.requires_grad_()
    token_NT, mask_NT = torch.tensor([[0, 1, 2]]), torch.ones(1, 3, dtype=torch.bool)
    logprob_NT = _SelectedLogprob.apply(logits_NTV, token_NT, mask_NT, 1.0, False)[0]
    assert logprob_NT[0, 2].isnan()  # reported where it is looked at
    logprob_NT[:, :2].sum().backward()
    # softmax 1/4 each, 1 at the token.
    assert logits_NTV.grad[0, 0].tolist() == [0.75, -0.25, -0.25, -0.25]
    assert (logits_NTV.grad[0, 2] == 0).all()


def test_activation_checkpointing_gives_the_same_gradients():
    batch = rollouts()

    def gradients(model):
        completion_logprobs(model.train(), batch, temperature=0.7, pad_id=PAD).sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    saving = qwen()
    saving.gradient_checkpointing_enable()
    calls = []
    saving.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for one, other in zip(gradients(saving), gradients(qwen()), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
    assert len(calls) == 2  # forward, and again in the backward pass


def test_ends_are_one_past_the_last_decision():
    mask_NT = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    assert ends(mask_NT).tolist() == [3, 0, 4]
    assert ends(mask_NT[:, :0]).tolist() == [0, 0, 0]


def test_nan_logits_off_the_mask_reach_neither_value_nor_gradient():
    logits_NTV = torch.zeros(1, 3, 4, dtype=torch.float64)
    logits_NTV[0, 2] = float("nan")
    logits_NTV.requires_grad_()
    token_NT, mask_NT = torch.tensor([[0, 1, 2]]), torch.tensor([[True, True, False]])
    logprob_NT = _SelectedLogprob.apply(logits_NTV, token_NT, mask_NT, 1.0, False)[0]
    # Uniform over four tokens: log(1/4) twice, and nothing for the third.
    expected = torch.tensor([[0.25, 0.25, 1.0]], dtype=torch.float64).log()
    torch.testing.assert_close(logprob_NT, expected)
    logprob_NT.sum().backward()
    assert (logits_NTV.grad[0, 2] == 0).all() and logits_NTV.grad.isfinite().all()


@pytest.mark.parametrize("make", [qwen, gpt2])
def test_head_inputs_times_the_head_are_the_logits(make):
    model, batch = make(), rollouts(mask=((1, 0, 0, 1, 0, 0), (1, 1, 0, 0, 0, 0)), prompt=(0, 2))
    hidden_NTC = head_inputs(model, batch, pad_id=PAD)
    assert hidden_NTC.shape == (2, 6, 16) and not hidden_NTC.requires_grad
    assert (hidden_NTC[~batch.mask_NT] == 0).all()
    logits_NTV = hidden_NTC @ model.get_output_embeddings().weight.T
    logprob_NT = logits_NTV.log_softmax(-1).gather(2, batch.token_NT[..., None])[..., 0]
    expected = completion_logprobs(model, batch, pad_id=PAD)
    torch.testing.assert_close(
        logprob_NT[batch.mask_NT], expected[batch.mask_NT], atol=1e-12, rtol=0
    )
    # The hooks are gone: the next call has all its logits again.
    torch.testing.assert_close(completion_logprobs(model, batch, pad_id=PAD), expected)


def test_head_inputs_refuses_a_model_that_rescales_its_logits():
    class Scaled(Qwen3ForCausalLM):
        def forward(self, *args, logits_to_keep=0, **kwargs):
            output = super().forward(*args, logits_to_keep=logits_to_keep, **kwargs)
            output.logits = output.logits * 0.5
            return output

    with pytest.raises(ValueError, match="changes its logits after the head"):
        head_inputs(Scaled(qwen().config), rollouts(), pad_id=PAD)


def test_wrapped_models_are_called_through():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.calls = module, []

        def forward(self, *args, **kwargs):
            self.calls.append(set(kwargs))
            return self.module(*args, **kwargs)

    model, batch = qwen(), rollouts()
    wrapper = Wrapper(model)
    actual = completion_logprobs(wrapper, batch, pad_id=PAD)
    torch.testing.assert_close(actual, completion_logprobs(model, batch, pad_id=PAD))
    assert {"position_ids", "logits_to_keep"} <= wrapper.calls[0]


def test_an_adapter_is_part_of_the_model():
    from peft import LoraConfig, get_peft_model

    batch = rollouts()
    before = completion_logprobs(qwen(), batch, pad_id=PAD)
    adapted = get_peft_model(qwen(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    torch.testing.assert_close(completion_logprobs(adapted, batch, pad_id=PAD), before)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.5)
    after = completion_logprobs(adapted, batch, pad_id=PAD)
    torch.testing.assert_close(after, by_loop(adapted, batch), atol=1e-12, rtol=0)
    assert (after - before).abs().max() > 1e-3
    # The frozen head keeps its norm, taken at the adapted model's hidden states.
    hidden_NTC = head_inputs(adapted, batch, pad_id=PAD)
    logits_NTV = hidden_NTC @ adapted.get_base_model().lm_head.weight.T
    logprob_NT = logits_NTV.log_softmax(-1).gather(2, batch.token_NT[..., None])[..., 0]
    torch.testing.assert_close(logprob_NT[batch.mask_NT], after[batch.mask_NT], atol=1e-12, rtol=0)


def test_messages():
    model, batch = qwen(), rollouts()
    with pytest.raises(ValueError, match=r"temperature must be positive, got 0\.0"):
        completion_logprobs(model, batch, temperature=0.0, pad_id=PAD)
    with pytest.raises(ValueError, match="rollouts has no row"):
        completion_logprobs(model, batch.take(torch.tensor([], dtype=torch.int64)), pad_id=PAD)
    object.__setattr__(batch, "prompt_ids", ((1,), (2,), ()))
    with pytest.raises(ValueError, match="row 1 has an empty prompt"):
        completion_logprobs(model, batch, pad_id=PAD)
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match=r"head that is an nn\.Linear, got Sequential"):
        head_inputs(model, rollouts(), pad_id=PAD)
