"""Log-probabilities of recorded rollouts under the model being trained.

A row is laid out as [left padding | prompt | completion | right padding], so that all completions
of a micro-batch start in one column and only their logits are asked for. Padding reaches the
longest row of the micro-batch and no further.

Assumes a causal language model with the interface of transformers: `model(input_ids=...,
attention_mask=...)` gives an object with `logits`. Wrappers (DistributedDataParallel, DeepSpeed,
PEFT, compiled modules) are called through, never around.

Axes: N rollouts, T decision steps (columns of the rollouts), S columns of the model's input,
V vocabulary, C width of the head's input.
"""

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rollouts.batch import TokenRollouts

CHUNK = 2**23
"""Logits that are worked on in float32 at a time: 32 MiB."""


def completion_logprobs(
    model: nn.Module, rollouts: TokenRollouts, *, temperature: float = 1.0, pad_id: int
) -> Tensor:
    """Log-probability of each recorded token under `model`, differentiable.

        logprob_nt = z_nt[token_nt] - logsumexp_v z_nt[v],    z = logits / temperature

    The logits stay in the model's dtype; float32 copies are made of a few positions at a time,
    forwards and backwards, so no (N, T, V) tensor in float32 ever stands beside one in bfloat16.

    Args:
        model: gradients flow to its parameters unless they are switched off around the call.
        rollouts: on the model's device, at least one row. Everything up to a row's last decision
            is context, also where the mask is False in between (tool output).
        temperature: the sampling temperature; positive. A row sampled greedily (temperature 0) is
            scored at temperature 1.
        pad_id: any valid token id; what the padding holds never matters.

    Returns:
        (N, T) log-probabilities in nats, float32 (float64 for a float64 model); exactly 0 where
        the mask is False. A row without decisions is all 0 and has gradient 0.

    Raises:
        ValueError: without rows, for an empty prompt, or for a temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    layout = _layout(model, rollouts, pad_id)
    logits_NTV = layout.predicting(model(**layout.inputs).logits)
    num_steps = logits_NTV.shape[1]
    logprob_NT = _SelectedLogprob.apply(
        logits_NTV, rollouts.token_NT[:, :num_steps], rollouts.mask_NT[:, :num_steps], temperature
    )
    return nn.functional.pad(logprob_NT, (0, rollouts.mask_NT.shape[1] - num_steps))


@torch.no_grad()
def head_inputs(model: nn.Module, rollouts: TokenRollouts, *, pad_id: int) -> Tensor:
    """What the language-model head sees where it predicts each recorded token, without gradient.

    For `gradient_norm`, which needs the hidden states after the final norm and the head's weight
    (`model.get_output_embeddings().weight`) but no logits: the head itself is run on one column
    only. That column is compared with the model's logits, because a model that scales or soft-caps
    them afterwards has another gradient than the closed form gives.

    Args:
        model: as `completion_logprobs`; its head must be a plain `nn.Linear`.
        rollouts: as `completion_logprobs`.
        pad_id: any valid token id.

    Returns:
        (N, T, C) in the model's dtype; entry (n, t) predicts `token_NT[n, t]`. Exactly 0 where
        the mask is False.

    Raises:
        ValueError: as `completion_logprobs`; if the head is not an `nn.Linear`; or if the model
            changes its logits after the head.
    """
    layout = _layout(model, rollouts, pad_id)
    head = _innermost(model).get_output_embeddings()
    if type(head) is not nn.Linear:
        raise ValueError(
            f"the gradient norm needs a head that is an nn.Linear, got {type(head).__name__}"
        )
    seen: dict[str, Tensor] = {}

    def keep_input(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen["hidden"] = args[0]
        return (args[0][:, -1:],)

    def keep_output(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        seen["logits"] = output.clone()

    hooks = [head.register_forward_pre_hook(keep_input), head.register_forward_hook(keep_output)]
    try:
        logits = model(**layout.inputs).logits
    finally:
        for hook in hooks:
            hook.remove()
    if not torch.equal(logits.to(seen["logits"].dtype), seen["logits"]):
        raise ValueError(
            "the model changes its logits after the head (a scale or soft-cap), for which the "
            "closed form of the gradient norm does not hold"
        )
    hidden_NTC = layout.predicting(seen["hidden"])
    num_steps = hidden_NTC.shape[1]
    hidden_NTC = torch.where(rollouts.mask_NT[:, :num_steps, None], hidden_NTC, 0)
    return nn.functional.pad(hidden_NTC, (0, 0, 0, rollouts.mask_NT.shape[1] - num_steps))


class _Layout(NamedTuple):
    inputs: dict[str, Any]
    num_steps: int

    def predicting(self, value_NSX: Tensor) -> Tensor:
        """The columns that predict the completion: its own, one to the left."""
        return value_NSX[:, value_NSX.shape[1] - self.num_steps - 1 : -1]


def _layout(model: nn.Module, rollouts: TokenRollouts, pad_id: int) -> _Layout:
    if len(rollouts) == 0:
        raise ValueError(
            "rollouts has no row; a process without rows takes part with a row of weight 0"
        )
    prompts = [rollouts.prompt_ids[p] for p in rollouts.prompt_N.tolist()]
    if not all(prompts):
        row = [len(prompt) for prompt in prompts].index(0)
        raise ValueError(f"row {row} has an empty prompt: nothing predicts its first token")
    device = rollouts.token_NT.device
    end_N = _end(rollouts.mask_NT)
    num_steps, width = int(end_N.max()), max(map(len, prompts))

    prompt_NS = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts])
    start_N = torch.tensor([width - len(p) for p in prompts])
    real_prompt_NS = torch.arange(width) >= start_N[:, None]
    real_NT = torch.arange(num_steps, device=device) < end_N[:, None]
    token_NT = torch.where(real_NT, rollouts.token_NT[:, :num_steps], pad_id)
    real_NS = torch.cat([real_prompt_NS.to(device), real_NT], dim=1)
    inputs: dict[str, Any] = {
        "input_ids": torch.cat([prompt_NS.to(device), token_NT], dim=1),
        "attention_mask": real_NS.long(),
    }
    taken = inspect.signature(type(_innermost(model)).forward).parameters
    if "position_ids" in taken:
        inputs["position_ids"] = (real_NS.long().cumsum(1) - 1).clamp(min=0)
    if "logits_to_keep" in taken:
        inputs["logits_to_keep"] = num_steps + 1
    if "use_cache" in taken:
        inputs["use_cache"] = False
    return _Layout(inputs, num_steps)


def _end(mask_NT: Tensor) -> Tensor:
    """One past the last True of each row; 0 for a row without any."""
    step_T = torch.arange(1, mask_NT.shape[1] + 1, device=mask_NT.device)
    if not len(step_T):
        return mask_NT.new_zeros(len(mask_NT), dtype=torch.int64)
    return (mask_NT * step_T).amax(dim=1)


def _innermost(model: Any) -> Any:
    """The language model inside its wrappers, whose signature is the one that counts."""
    while True:
        if isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


class _SelectedLogprob(torch.autograd.Function):
    """log softmax(logits / temperature) at the tokens of the mask, a chunk of positions at a time.

    Autograd of log_softmax would keep a float32 copy of all logits until the backward pass. Here
    only the logits are kept, and the gradient is written in their dtype:

        d logprob_t / d logits_tv = (1[v = token_t] - softmax_tv) / temperature
    """

    @staticmethod
    def forward(
        ctx: Any, logits_NTV: Tensor, token_NT: Tensor, mask_NT: Tensor, temperature: float
    ) -> Tensor:
        dtype = torch.promote_types(logits_NTV.dtype, torch.float32)
        logprob_NT = torch.zeros(mask_NT.shape, dtype=dtype, device=logits_NTV.device)
        normaliser_NT = torch.zeros_like(logprob_NT)
        for at in _chunks(mask_NT, logits_NTV.shape[-1]):
            z_LV = logits_NTV[at].to(dtype) / temperature
            normaliser_NT[at] = z_LV.logsumexp(-1)
            logprob_NT[at] = z_LV.gather(1, token_NT[at][:, None])[:, 0] - normaliser_NT[at]
        ctx.save_for_backward(logits_NTV, token_NT, mask_NT, normaliser_NT)
        ctx.temperature = temperature
        return logprob_NT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        logits_NTV, token_NT, mask_NT, normaliser_NT = ctx.saved_tensors
        (grad_NT,) = grads
        grad_NTV = torch.zeros_like(logits_NTV)
        for at in _chunks(mask_NT, logits_NTV.shape[-1]):
            z_LV = logits_NTV[at].to(grad_NT.dtype) / ctx.temperature
            grad_LV = -(z_LV - normaliser_NT[at][:, None]).exp()
            token_L1 = token_NT[at][:, None]
            grad_LV.scatter_add_(1, token_L1, torch.ones_like(token_L1, dtype=grad_LV.dtype))
            grad_LV *= grad_NT[at][:, None] / ctx.temperature
            grad_NTV[at] = grad_LV.to(grad_NTV.dtype)
        return grad_NTV, None, None, None


def _chunks(mask_NT: Tensor, vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The positions of the mask, as many at a time as fit CHUNK logits: rows and columns (L,)."""
    row_M, step_M = mask_NT.nonzero(as_tuple=True)
    size = max(1, CHUNK // vocabulary)
    yield from zip(row_M.split(size), step_M.split(size), strict=True)
