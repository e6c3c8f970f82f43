import re

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rl.logprobs.from_hidden import _FusedHead, fused_logprobs, fused_statistics, refusal
from rl.logprobs.from_logits import completion_logprobs, completion_statistics
from rollouts.batch import TokenRollouts
from tests.tiny_lm import PAD, VOCABULARY, tiny_model


def rollouts(mask=((1, 1, 1, 1), (1, 1, 0, 0), (1, 0, 0, 1), (1, 0, 0, 0)), prompt=(0, 2, 1, 0)):
    mask_NT = torch.tensor(mask, dtype=torch.bool)
    generator = torch.Generator().manual_seed(1)
    return TokenRollouts(
        prompt_N=torch.tensor(prompt),
        mask_NT=mask_NT,
        logprob_NT=torch.zeros(mask_NT.shape),
        version=0,
        token_NT=torch.randint(2, VOCABULARY, mask_NT.shape, generator=generator),
        truncated_N=torch.zeros(len(mask_NT), dtype=torch.bool),
        seed_N=torch.arange(len(mask_NT)),
        prompt_ids=((4, 8, 6), (3,), (5, 5, 2, 9, 7)),
    )


def untied(dtype=torch.float64, *, bias=False):
    model = tiny_model("qwen3").to(dtype)
    head = nn.Linear(32, VOCABULARY, bias=bias).to(dtype)
    head.weight.data.mul_(4)
    model.lm_head = head
    return model


def gradients(score, model, batch, **settings):
    """Values, and the gradient of a weighted sum of them; a parameter without one has None."""
    values = score(model, batch, pad_id=PAD, **settings)
    logprob_NT = values if isinstance(values, torch.Tensor) else values.logprob_NT
    generator = torch.Generator().manual_seed(3)
    weight_NT = torch.randn(batch.mask_NT.shape, generator=generator)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return values, torch.autograd.grad((logprob_NT * weight_NT).sum(), parameters)


def assert_equal_to_plain(model, batch, *, atol, **settings):
    (fused, entropy), ours = gradients(fused_statistics, model, batch, **settings)
    (plain, expected), theirs = gradients(completion_statistics, model, batch, **settings)
    assert fused.dtype == plain.dtype and fused.shape == plain.shape
    torch.testing.assert_close(fused, plain, atol=atol, rtol=0)
    torch.testing.assert_close(entropy, expected, atol=atol, rtol=0)
    assert not entropy.requires_grad
    assert (fused[~batch.mask_NT] == 0).all() and (entropy[~batch.mask_NT] == 0).all()
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        # Relative to each parameter's largest entry, which lies between 0.01 and 100.
        scale = max(1.0, float(other.abs().max()))
        torch.testing.assert_close(one, other, atol=atol * scale, rtol=0)
    assert max(float(g.abs().max()) for g in theirs) > 0.1


MODELS = {
    "untied": untied,
    "bias": lambda: untied(bias=True),
    "tied": lambda: tied("qwen3"),
    "gpt2": lambda: tied("gpt2"),
}


def tied(architecture):
    model = tiny_model(architecture).double()
    model.set_output_embeddings(model.get_output_embeddings())
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    return model


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_entropies_equal_those_of_the_plain_path(name):
    model, batch = MODELS[name](), rollouts()
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = []
    for score in (fused_statistics, completion_statistics):
        both = score(model, batch, temperature=0.7, pad_id=PAD, differentiable=True)
        value = (both.entropy_NT.square() + 0.3 * both.logprob_NT).sum()
        found.append(torch.autograd.grad(value, parameters))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)
    assert max(float(g.abs().max()) for g in found[0]) > 0.1


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_plain_path_in_float64(name):
    assert_equal_to_plain(MODELS[name](), rollouts(), atol=1e-10, temperature=0.7)


@pytest.mark.parametrize("chunk", [1, 3])
def test_the_chunks_in_which_it_is_computed_do_not_matter(monkeypatch, chunk):
    monkeypatch.setattr("rl.logprobs.from_hidden.LEAST", chunk)
    monkeypatch.setattr("rl.logprobs.from_logits.CHUNK", 1)
    assert_equal_to_plain(untied(bias=True), rollouts(), atol=1e-10)


def test_equals_the_plain_path_in_float32():
    assert_equal_to_plain(untied(torch.float32, bias=True), rollouts(), atol=1e-5)


def test_a_half_precision_model_agrees_within_its_rounding():
    # bfloat16 has 8 bits: a logit near 8 is rounded by up to 1/64, by either path, and not always
    # alike, because products of other shapes are added up in another order.
    model, batch = untied(torch.bfloat16), rollouts()
    fused, ours = gradients(fused_logprobs, model, batch)
    plain, theirs = gradients(completion_logprobs, model, batch)
    assert fused.dtype == plain.dtype == torch.float32
    torch.testing.assert_close(fused, plain, atol=0.05, rtol=0)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype == torch.bfloat16
        scale = float(other.float().norm())
        assert float((one.float() - other.float()).norm()) < 0.03 * scale


def test_autocast_rounds_as_in_the_plain_path():
    model, batch = untied(torch.float32, bias=True), rollouts()
    with torch.autocast("cpu", torch.bfloat16):
        fused, ours = gradients(fused_logprobs, model, batch)
        plain, theirs = gradients(completion_logprobs, model, batch)
    exact, _ = gradients(completion_logprobs, model, batch)
    torch.testing.assert_close(fused, plain, atol=1e-4, rtol=0)
    assert (fused - exact).abs().max() > 1e-2  # the head did run in bfloat16
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == torch.float32
        assert float((one - other).norm()) < 0.02 * float(other.norm())


def test_asking_inside_an_autocast_takes_no_gradient_away():
    model, batch = untied(torch.float32), rollouts()
    with torch.autocast("cpu", torch.bfloat16):
        _, expected = gradients(fused_logprobs, model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert refusal(model) is None
        _, found = gradients(fused_logprobs, model, batch)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)


def test_function_has_the_gradient_of_its_values():
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)
        for shape in ((4, 3), (6, 3), (6,))
    )
    token_M = torch.tensor([0, 5, 2, 2])
    assert torch.autograd.gradcheck(
        lambda h, w, b: _FusedHead.apply(h, w, b, token_M, 0.6, False)[0], (hidden, weight, bias)
    )


@pytest.mark.parametrize("bias", [False, True])
def test_equals_trls_fused_head(bias):
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 16, generator=generator, requires_grad=True)
    weight = torch.randn(70, 16, generator=generator, requires_grad=True)
    bias_V = torch.randn(70, generator=generator, requires_grad=True) if bias else None
    token_M = torch.randint(0, 70, (50,), generator=generator)
    leaves = [leaf for leaf in (hidden, weight, bias_V) if leaf is not None]

    def result(logprob_M, entropy_M):
        scale_M = torch.linspace(-1, 2, 50)
        return logprob_M, entropy_M, *torch.autograd.grad((logprob_M * scale_M).sum(), leaves)

    ours = result(*_FusedHead.apply(hidden, weight, bias_V, token_M, 0.7, True)[:2])
    theirs = ChunkedLogProbFunction.apply(
        hidden, weight, bias_V, token_M, 0.7, 32, None, 1.0, ("entropy",)
    )
    for one, other in zip(ours, result(*theirs[:2]), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)


def test_by_hand():
    # Hidden 1 and weights 0, log 3: logits 0 and log 3, probabilities 1/4 and 3/4.
    weight = torch.tensor([[0.0], [3.0]], dtype=torch.float64).log1p_()
    weight[1] = torch.tensor(3.0, dtype=torch.float64).log()
    hidden = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    weight.requires_grad_()
    logprob_M, entropy_M, first_V = _FusedHead.apply(
        hidden, weight, None, torch.tensor([1]), 1.0, True
    )
    assert first_V.tolist() == pytest.approx([0, 1.0986122886681098])
    assert logprob_M.item() == pytest.approx(-0.2876820724517809)  # log 3/4
    assert entropy_M.item() == pytest.approx(0.5623351446188083)
    # d H / d z = -p (log p + H): 1/4 (log 4 - H) and 3/4 (log 4/3 - H).
    (of_entropy,) = torch.autograd.grad(entropy_M.sum(), weight, retain_graph=True)
    falls = 0.75 * (0.2876820724517809 - 0.5623351446188083)
    assert of_entropy[:, 0].tolist() == pytest.approx([-falls, falls])
    logprob_M.sum().backward()
    # delta = (-1/4, 1 - 3/4), times the hidden state, and times the weights.
    assert weight.grad[:, 0].tolist() == pytest.approx([-0.25, 0.25])
    assert hidden.grad.item() == pytest.approx(0.25 * 1.0986122886681098)  # log 3


@pytest.mark.parametrize("mask", [((0, 0, 0, 0), (1, 1, 0, 0)), ((0, 0, 0, 0), (0, 0, 0, 0))])
def test_a_row_without_decisions_is_0_and_still_takes_part_in_the_graph(mask):
    model, batch = untied(bias=True), rollouts(mask=mask, prompt=(0, 2))
    logprob_NT = fused_logprobs(model, batch, pad_id=PAD)
    assert logprob_NT.shape == (2, 4) and (logprob_NT[0] == 0).all()
    logprob_NT[0].sum().backward()
    assert all((parameter.grad == 0).all() for parameter in model.parameters())


class Bare(nn.Module):
    """A model that takes token ids and the attention mask, and gives every column's logits."""

    def __init__(self, model):
        super().__init__()
        self.inner = model
        self.get_output_embeddings = model.get_output_embeddings

    def forward(self, input_ids, attention_mask):
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


def test_a_model_that_keeps_every_column_is_served_too():
    assert refusal(Bare(untied())) is None
    assert_equal_to_plain(Bare(untied()), rollouts(), atol=1e-10)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
def test_no_operation_gives_the_logits_of_all_decisions(monkeypatch, autocast):
    monkeypatch.setattr("rl.logprobs.from_hidden.LEAST", 2)
    monkeypatch.setattr("rl.logprobs.from_logits.CHUNK", 1)
    model = untied(torch.float32)
    batch = rollouts(mask=torch.ones(20, 30).bool().tolist(), prompt=[0] * 20)
    num_logits, num_weights = 600 * VOCABULARY, VOCABULARY * 32

    def peak(score):
        with Largest() as largest, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            score(model, batch, pad_id=PAD).sum().backward()
        return largest.numel

    # What remains is the largest activation: 20 rows of 3 + 30 tokens, 48 wide.
    assert peak(fused_logprobs) == 20 * 33 * 48 > num_weights
    assert peak(completion_logprobs) >= num_logits


def test_decisions_without_gradient_are_not_multiplied_again(monkeypatch):
    model, batch = untied(), rollouts()
    logprob_NT = fused_logprobs(model, batch, pad_id=PAD)
    seen = []
    monkeypatch.setattr(
        "rl.logprobs.from_hidden.logit_gradient",
        lambda z_LV, *_: seen.append(len(z_LV)) or torch.zeros_like(z_LV),
    )
    (logprob_NT * torch.tensor([1.0, 0, 0, 1])).sum().backward()
    # Columns 0 and 3 hold 4 and 2 decisions.
    assert sum(seen) == 6


def test_no_graph_where_gradients_are_off():
    model, batch = untied(), rollouts()
    with torch.no_grad():
        logprob_NT, entropy_NT = fused_statistics(model, batch, pad_id=PAD)
    assert not logprob_NT.requires_grad
    assert entropy_NT[batch.mask_NT].min() > 0


def test_an_adapter_on_the_body_and_a_frozen_head():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(untied(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.5)
    assert refusal(model) is None
    assert not model.get_base_model().lm_head.weight.requires_grad
    assert_equal_to_plain(model, rollouts(), atol=1e-10)


def test_activation_checkpointing_gives_the_same_gradients():
    saving = untied().train()
    saving.gradient_checkpointing_enable()
    _, ours = gradients(fused_logprobs, saving, rollouts())
    _, theirs = gradients(fused_logprobs, untied().train(), rollouts())
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "architecture", ["qwen3", "llama", "gpt2", "gemma3", "qwen3_next", "mamba", "gemma2"]
)
def test_which_architectures_are_refused(architecture):
    model, batch = tiny_model(architecture), rollouts()
    if architecture == "gemma2":  # soft-caps its logits at 30
        with pytest.raises(ValueError, match=r"soft-cap.*use the functions of rl\.logprobs"):
            fused_logprobs(model, batch, pad_id=PAD)
        assert "changes its logits after the head" in refusal(model)
        completion_logprobs(model, batch, pad_id=PAD)  # and the head is its own again
    else:
        assert refusal(model) is None
        fused_logprobs(model, batch, pad_id=PAD)
    assert "forward" not in vars(model.get_output_embeddings())
    assert not model.get_output_embeddings()._forward_hooks


def adapted(**settings):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(untied(), LoraConfig(task_type="CAUSAL_LM", **settings))


def quantised():
    class Packed(torch.Tensor):
        """A weight that is a tensor of its own kind, as of torchao or of tensor parallelism."""

    model = untied()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.data.as_subclass(Packed))
    return model


def eight_bit():
    class Linear8bit(nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden)

    model = untied()
    model.lm_head.__class__ = Linear8bit
    return model


def replaced():
    model = untied()
    model.lm_head.forward = lambda hidden: hidden
    return model


def masked():
    class Masked(type(untied())):
        def forward(self, *args, logits_to_keep=0, **kwargs):
            output = super().forward(*args, logits_to_keep=logits_to_keep, **kwargs)
            output.logits[..., 5] = -1e9
            return output

    model = untied()
    model.__class__ = Masked
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: adapted(target_modules=["lm_head"]), r"not a plain nn\.Linear but peft"),
        (
            lambda: adapted(target_modules=["q_proj"], modules_to_save=["lm_head"]),
            r"not a plain nn\.Linear but peft.*ModulesToSaveWrapper",
        ),
        (lambda: torch.compile(untied()), "compiled"),
        (lambda: nn.DataParallel(untied()), "one process per device"),
        (quantised, "sharded or quantised"),
        (eight_bit, r"not a plain nn\.Linear but .*Linear8bit"),
        (replaced, "replaced already"),
        (masked, "changes its logits after the head"),
    ],
)
def test_refusals(make, reason):
    model = make()
    assert re.search(reason, refusal(model))
    with pytest.raises(ValueError, match=f"{reason}.*use the functions of rl.logprobs.from_logits"):
        fused_logprobs(model, rollouts(), pad_id=PAD)


def test_nan_weights_are_reported_as_nan_and_not_as_a_soft_cap():
    model = untied()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    assert refusal(model) is None
    assert fused_logprobs(model, rollouts(), pad_id=PAD)[0].isnan().all()


def test_the_head_is_put_back_when_the_model_raises():
    model, batch = untied(), rollouts()
    object.__setattr__(batch, "token_NT", batch.token_NT + 100)
    with pytest.raises(IndexError):
        fused_logprobs(model, batch, pad_id=PAD)
    assert "forward" not in vars(model.lm_head)


def test_messages_of_the_plain_path():
    model, batch = untied(), rollouts()
    with pytest.raises(ValueError, match=r"temperature must be positive, got 0\.0"):
        fused_logprobs(model, batch, temperature=0.0, pad_id=PAD)
    with pytest.raises(ValueError, match="rollouts has no row"):
        fused_logprobs(model, batch.take(torch.tensor([], dtype=torch.int64)), pad_id=PAD)
