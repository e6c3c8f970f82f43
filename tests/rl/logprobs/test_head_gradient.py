import pytest
import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from rl.logprobs.from_logits import completion_logprobs, head_inputs
from rl.logprobs.head_gradient import block_norm, gram_norm, head_gradient_norm, mean_norm, rms_norm
from rollouts.batch import TokenRollouts

NORMS = [gram_norm, block_norm, head_gradient_norm]
V, C = 11, 5


def batch(dtype=torch.float64, seed=0, sharpness=1.0):
    """Four ragged rows with a hole, one of them empty; NaN wherever nothing may be read."""
    generator = torch.Generator().manual_seed(seed)
    mask_NT = torch.tensor(
        [[1, 1, 1, 1, 1, 1], [1, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]],
        dtype=torch.bool,
    )
    hidden_NTC = torch.randn(*mask_NT.shape, C, dtype=torch.float64, generator=generator)
    weight_VC = torch.randn(V, C, dtype=torch.float64, generator=generator) * sharpness
    token_NT = torch.randint(0, V, mask_NT.shape, generator=generator)
    hidden_NTC[~mask_NT] = float("nan")
    token_NT[~mask_NT] = -100
    return hidden_NTC.to(dtype), token_NT, mask_NT, weight_VC.to(dtype)


def by_autograd(hidden_NTC, token_NT, mask_NT, weight_VC, bias_V=None, temperature=1.0):
    """The definition: differentiate log p of each row with respect to weight (and bias)."""
    norms = []
    for hidden_TC, token_T, mask_T in zip(hidden_NTC, token_NT, mask_NT, strict=True):
        weight = weight_VC.double().clone().requires_grad_()
        bias = torch.zeros(len(weight), dtype=torch.float64) if bias_V is None else bias_V.double()
        bias = bias.clone().requires_grad_()
        logits = (hidden_TC[mask_T].double() @ weight.T + bias) / temperature
        logp = logits.log_softmax(-1).gather(1, token_T[mask_T, None]).sum()
        d_weight, d_bias = torch.autograd.grad(logp, (weight, bias))
        square = d_weight.square().sum()
        if bias_V is not None:
            square = square + d_bias.square().sum()
        norms.append(square.sqrt())
    return torch.stack(norms)


@pytest.mark.parametrize("norm", NORMS)
def test_by_hand(norm):
    hidden_NTC = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]] * 2, dtype=torch.float64)
    token_NT = torch.tensor([[0, 1], [0, 0]])
    mask_NT = torch.ones(2, 2, dtype=torch.bool)
    # W = 0: pi = 1/3 each. delta(0) = (2, -1, -1)/3 and delta(1) = (-1, 2, -1)/3 have squares 6/9
    # and product -3/9. H H^T = (1 1; 1 2).
    # y = (0, 1): 6/9 + 2 * 6/9 - 2 * 3/9 = 12/9.  y = (0, 0): (1+2+2) * 6/9.
    actual = norm(hidden_NTC, token_NT, mask_NT, torch.zeros(3, 2, dtype=torch.float64))
    expected = torch.tensor([4 / 3, 10 / 3], dtype=torch.float64).sqrt()
    torch.testing.assert_close(actual, expected, atol=1e-14, rtol=0)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("block", [1, 3, 4, V, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_autograd_for_any_block(norm, block, temperature, with_bias):
    rows = batch()
    bias_V = torch.linspace(-1, 2, V, dtype=torch.float64) if with_bias else None
    actual = norm(*rows, bias_V=bias_V, temperature=temperature, block=block)
    expected = by_autograd(*rows, bias_V, temperature)
    assert len(set(expected.tolist())) == 4 and expected[2] == 0
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)
    assert actual[2] == 0


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("sharpness", [1.0, 6.0])
def test_float32_keeps_its_digits_also_where_tokens_are_confident(norm, sharpness):
    hidden_NTC, token_NT, mask_NT, weight_VC = batch(torch.float32, sharpness=sharpness)
    likeliest_NT = (hidden_NTC.nan_to_num() @ weight_VC.T).argmax(-1)
    token_NT = torch.where(mask_NT, likeliest_NT, token_NT)
    expected = by_autograd(hidden_NTC, token_NT, mask_NT, weight_VC)
    actual = norm(hidden_NTC, token_NT, mask_NT, weight_VC, block=4)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=0)


def confident():
    """One row of 8 tokens, each with 2e-4 of probability elsewhere."""
    generator = torch.Generator().manual_seed(0)
    weight_VC = torch.randn(V, V, generator=generator) * 0.1 + 12 * torch.eye(V)
    hidden_NTC = torch.eye(V)[None, :8]
    return hidden_NTC, torch.arange(8)[None], torch.ones(1, 8, dtype=torch.bool), weight_VC


@pytest.mark.parametrize("norm", NORMS)
def test_the_sampled_entry_survives_float32_where_subtraction_would_not(norm):
    hidden_NTC, token_NT, mask_NT, weight_VC = confident()
    expected = by_autograd(hidden_NTC, token_NT, mask_NT, weight_VC)[0].item()
    actual = norm(hidden_NTC, token_NT, mask_NT, weight_VC)[0].item()
    assert actual == pytest.approx(expected, rel=1e-5)
    # The expanded Gram matrix, 1[y_s = y_t] - pi_s[y_t] - pi_t[y_s] + pi_s . pi_t, cancels.
    pi = (hidden_NTC[0] @ weight_VC.T).softmax(-1)
    cross = pi[:, token_NT[0]]
    gram = torch.eye(8) - cross - cross.T + pi @ pi.T
    naive = (gram * (hidden_NTC[0] @ hidden_NTC[0].T)).sum().clamp(min=0).sqrt().item()
    assert abs(naive / expected - 1) > 1e-3


@pytest.mark.parametrize("norm", NORMS)
def test_a_batch_is_its_rows_and_padding_is_nothing(norm):
    hidden_NTC, token_NT, mask_NT, weight_VC = batch()
    whole = norm(hidden_NTC, token_NT, mask_NT, weight_VC)
    for n, mask_T in enumerate(mask_NT):
        row = norm(
            hidden_NTC[n, mask_T][None], token_NT[n, mask_T][None], mask_T[mask_T][None], weight_VC
        )
        torch.testing.assert_close(row[0], whole[n], atol=1e-12, rtol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_tokens_have_cross_terms_and_the_mean_divides_by_the_length(norm):
    hidden_NTC, token_NT, mask_NT, weight_VC = batch()
    total = norm(hidden_NTC, token_NT, mask_NT, weight_VC)
    mean = norm(hidden_NTC, token_NT, mask_NT, weight_VC, reduction="mean")
    # Rows have 6, 3, 0 and 1 decisions.
    torch.testing.assert_close(mean * torch.tensor([6, 3, 1, 1]), total)
    alone = norm(
        hidden_NTC[0, :, None],
        token_NT[0, :, None],
        mask_NT[0, :, None],
        weight_VC,
    )
    assert abs(total[0] - alone.square().sum().sqrt()) > 0.01


def policy(tied):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=V,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        tie_word_embeddings=tied,
    )
    model = Qwen3ForCausalLM(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def rollouts():
    mask_NT = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0]], dtype=torch.bool)
    return TokenRollouts(
        prompt_N=torch.tensor([0, 1, 1]),
        mask_NT=mask_NT,
        logprob_NT=torch.zeros(3, 4),
        version=0,
        token_NT=torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [7, 8, 9, 0]]),
        truncated_N=torch.zeros(3, dtype=torch.bool),
        seed_N=torch.arange(3),
        prompt_ids=((4, 8, 6), (3,)),
    )


def measured(model, temperature):
    rows = rollouts()
    return head_gradient_norm(
        head_inputs(model, rows, pad_id=0),
        rows.token_NT,
        rows.mask_NT,
        model.get_output_embeddings().weight,
        temperature=temperature,
        block=4,
    )


def gradient_norm_of(model, parameter, temperature):
    rows = rollouts()
    norms = []
    for n in range(len(rows)):
        logprob_NT = completion_logprobs(
            model, rows.take(torch.tensor([n])), temperature=temperature, pad_id=0
        )
        norms.append(torch.autograd.grad(logprob_NT.sum(), parameter)[0].norm())
    return torch.stack(norms)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_autograd_through_an_untied_model(temperature):
    model = policy(tied=False)
    expected = gradient_norm_of(model, model.lm_head.weight, temperature)
    torch.testing.assert_close(measured(model, temperature), expected, atol=1e-10, rtol=0)


def test_of_a_tied_head_it_is_the_heads_part_and_not_the_shared_matrix_gradient():
    tied, untied = policy(tied=True), policy(tied=False)
    untied.load_state_dict(tied.state_dict())
    untied.lm_head.weight = nn.Parameter(tied.lm_head.weight.detach().clone())
    actual = measured(tied, 1.0)
    heads_part = gradient_norm_of(untied, untied.lm_head.weight, 1.0)
    torch.testing.assert_close(actual, heads_part, atol=1e-10, rtol=0)
    shared = gradient_norm_of(tied, tied.lm_head.weight, 1.0)
    assert ((actual - shared).abs() > 0.01 * shared).all()


def test_per_prompt_norms_by_hand_use_accepted_rows_only():
    norm_N = torch.tensor([100.0, 3.0, float("nan"), 7.0, 4.0, 5.0])
    prompt_N = torch.tensor([0, 2, 1, 0, 2, 0])
    accepted_N = torch.tensor([False, True, False, True, True, True])
    # Prompt 0: (7 + 5)/2 and sqrt((49 + 25)/2). Prompt 2: (3 + 4)/2 and sqrt((9 + 16)/2).
    prompt_K, mean_K = mean_norm(norm_N, prompt_N, accepted_N)
    assert prompt_K.tolist() == [0, 2] and mean_K.tolist() == [6.0, 3.5]
    prompt_K, rms_K = rms_norm(norm_N, prompt_N, accepted_N)
    assert prompt_K.tolist() == [0, 2]
    assert rms_K.tolist() == pytest.approx([37**0.5, 12.5**0.5], abs=1e-12)
    assert rms_K.dtype == mean_K.dtype == torch.float64


def test_without_accepted_rows_nothing_is_measured():
    prompt_K, norm_K = mean_norm(torch.ones(2), torch.tensor([0, 1]), torch.zeros(2).bool())
    assert len(prompt_K) == len(norm_K) == 0


@pytest.mark.parametrize("norm", NORMS)
def test_norms_say_what_is_wrong(norm):
    hidden_NTC, token_NT, mask_NT, weight_VC = batch()
    with pytest.raises(ValueError, match=r"hidden_NTC \(N, T, 5\), got torch.bool \(4, 6\)"):
        norm(hidden_NTC[..., :4], token_NT, mask_NT, weight_VC)
    with pytest.raises(ValueError, match=r"token_NT must lie in 0 \.\. 10"):
        norm(hidden_NTC, token_NT + 11, mask_NT, weight_VC)
    with pytest.raises(ValueError, match=r"bias_V must have shape \(11,\), got \(5,\)"):
        norm(hidden_NTC, token_NT, mask_NT, weight_VC, bias_V=torch.zeros(5))
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        norm(hidden_NTC, token_NT, mask_NT, weight_VC, temperature=0)
    with pytest.raises(ValueError, match="reduction must be one of sum, mean, got 'max'"):
        norm(hidden_NTC, token_NT, mask_NT, weight_VC, reduction="max")
    with pytest.raises(ValueError, match="block must be at least 1, got 0"):
        norm(hidden_NTC, token_NT, mask_NT, weight_VC, block=0)


def test_per_prompt_norms_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"equally long, got \(2,\), \(2,\) and \(3,\)"):
        mean_norm(torch.ones(2), torch.zeros(2), torch.ones(3).bool())
    with pytest.raises(ValueError, match=r"accepted_N must be bool, got torch\.float32"):
        rms_norm(torch.ones(2), torch.zeros(2), torch.ones(2))
