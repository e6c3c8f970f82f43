"""Compute log-probs and entropies of recorded rollouts from the logits of the trained model.

A row is laid out as [left padding | prompt | completion | right padding], so that all completions
of a micro-batch start in one column and only their logits are asked for. Padding reaches the
longest row of the micro-batch and no further. With `right_padded` a row is [prompt | completion | right
padding]: for models that do not honour the attention mask, but for the order of tokens.

Assumes a causal language model with the interface of transformers: `model(input_ids=...,
attention_mask=...)` gives an object with `logits`. Wrappers (DistributedDataParallel, DeepSpeed,
PEFT, compiled modules) are called through, never around.

The functions here serve every such model and hold its logits once, in its own dtype.
`rl.logprobs.from_hidden` has both without any (N, T, V) tensor, for heads that allow it.

Axes: N rollouts, T decision steps (columns of the rollouts), S columns of the model's input,
V vocabulary, C width of the head's input, M decisions of the mask, L decisions of a chunk.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any, NamedTuple

import torch
from accelerate.utils.operations import ConvertOutputsToFp32
from torch import Tensor, nn

from rollouts.batch import TokenRollouts

CHUNK = 2**20
"""Logits that are worked on in float32 at a time on a CPU: 4 MiB, which stay in its caches."""
CHUNK_OF_ACCELERATOR = 2**26
"""The same on an accelerator, 256 MiB: few launches, and products of many rows."""


class Statistics(NamedTuple):
    """What a model says about recorded decisions; 0 where the mask is False."""

    logprob_NT: Tensor
    """(N, T) float, nats: log-probability of each recorded token, differentiable."""
    entropy_NT: Tensor
    """(N, T) float, nats: entropy of the distribution over the whole vocabulary; detached unless asked
    for with its gradient."""


def completion_logprobs(
    model: nn.Module,
    rollouts: TokenRollouts,
    *,
    temperature: float = 1.0,
    pad_id: int,
    right_padded: bool = False,
    layout: Layout | None = None,
) -> Tensor:
    """Log-probability of each recorded token under `model`, differentiable.

        logprob_nt = z_nt[token_nt] - logsumexp_v z_nt[v],    z = logits / temperature

    The logits stay in the dtype the head gives them, also under the mixed precision of
    accelerate, which casts a model's outputs to float32; float32 copies are made of a few
    positions at a time, forwards and backwards, so no (N, T, V) tensor in float32 ever stands
    beside one in bfloat16.

    Args:
        model: gradients flow to its parameters unless they are switched off around the call.
        rollouts: on the model's device, at least one row. Everything up to a row's last decision
            is context, also where the mask is False in between (tool output).
        temperature: the sampling temperature; positive. A row sampled greedily (temperature 0) is
            scored at temperature 1.
        pad_id: any valid token id; what the padding holds never matters.
        right_padded: pad on the right only, which costs the logits of the prompts.
        layout: of these rows, where it is not `layout_of`'s.

    Returns:
        (N, T) log-probabilities in nats, float32 (float64 for a float64 model); exactly 0 where
        the mask is False. A row without decisions is all 0 and has gradient 0.

    Raises:
        ValueError: without rows, for an empty prompt, or for a temperature that is not positive.
    """
    layout = layout or layout_of(model, rollouts, pad_id, right_padded=right_padded)
    return _scored(model, rollouts, temperature, layout, entropy=False).logprob_NT


def completion_statistics(
    model: nn.Module,
    rollouts: TokenRollouts,
    *,
    temperature: float = 1.0,
    pad_id: int,
    right_padded: bool = False,
    differentiable: bool = False,
    layout: Layout | None = None,
) -> Statistics:
    """Log-probabilities as `completion_logprobs`, and the entropy of each decision.

        entropy_nt = -sum_v p_ntv log p_ntv,    p = softmax(logits / temperature)

    over the whole vocabulary, before any top-k or top-p. A logit of -inf has probability 0 and adds
    nothing. It is detached unless `differentiable`, for a loss that rewards it:

        d entropy / d z_v = -p_v (log p_v + entropy)

    Args and Raises: as `completion_logprobs`.

    Returns:
        Both (N, T), in nats and the dtype of `completion_logprobs`; exactly 0 off the mask.
    """
    layout = layout or layout_of(model, rollouts, pad_id, right_padded=right_padded)
    found = _scored(model, rollouts, temperature, layout, entropy=True)
    return found if differentiable else found._replace(entropy_NT=found.entropy_NT.detach())


@torch.no_grad()
def head_inputs(
    model: nn.Module, rollouts: TokenRollouts, *, pad_id: int, right_padded: bool = False
) -> Tensor:
    """What the language-model head sees where it predicts each recorded token, without gradient.

    For `gradient_norm`, which needs the hidden states after the final norm and the head's weight
    (`model.get_output_embeddings().weight`) but no logits: the head itself is run on one column
    only. That column is compared with the model's logits, because a model that scales or soft-caps
    them afterwards has another gradient than the closed form gives.

    Args:
        model: as `completion_logprobs`; its head must be a plain `nn.Linear`.
        rollouts: as `completion_logprobs`.
        pad_id: any valid token id.
        right_padded: as `completion_logprobs`.

    Returns:
        (N, T, C) in the model's dtype; entry (n, t) predicts `token_NT[n, t]`. Exactly 0 where
        the mask is False.

    Raises:
        ValueError: as `completion_logprobs`; if the head is not an `nn.Linear`; or if the model
            changes its logits after the head.
    """
    layout = layout_of(model, rollouts, pad_id, right_padded=right_padded)
    head = innermost(model).get_output_embeddings()
    # FSDP2 makes a class of its own of the head, whose forward is still that of nn.Linear.
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
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


class Layout(NamedTuple):
    """The model's input, and where in its output the completions are predicted."""

    inputs: dict[str, Any]
    num_steps: int
    size_N: Tensor | None = None
    """(N,) tokens of each prompt, where rows begin in the first column; None: completions do in one."""
    at: tuple[Tensor, Tensor] | None = None
    """(N, 1) rows and (N, T) columns, counted from the right, of outputs that predict completions."""

    def predicting(self, value_NSX: Tensor) -> Tensor:
        """The columns that predict the completion: its own, one to the left."""
        num_columns = value_NSX.shape[1]
        if self.at is not None:
            return value_NSX[self.at]
        if self.size_N is None:
            return value_NSX[:, num_columns - self.num_steps - 1 : -1]
        step_T = torch.arange(self.num_steps, device=value_NSX.device)
        column_NT = (self.size_N[:, None] - 1 + step_T).clamp(max=num_columns - 1)
        row_N1 = torch.arange(len(value_NSX), device=value_NSX.device)[:, None]
        return value_NSX[row_N1, column_NT]


def layout_of(
    model: nn.Module, rollouts: TokenRollouts, pad_id: int, *, right_padded: bool = False
) -> Layout:
    """The rows as one input of `model`, with the arguments that its signature takes."""
    if len(rollouts) == 0:
        raise ValueError(
            "rollouts has no row; a process without rows takes part with a row of weight 0"
        )
    prompts = [rollouts.prompt_ids[p] for p in rollouts.prompt_N.tolist()]
    if not all(prompts):
        row = [len(prompt) for prompt in prompts].index(0)
        raise ValueError(f"row {row} has an empty prompt: nothing predicts its first token")
    device = rollouts.token_NT.device
    end_N = ends(rollouts.mask_NT)
    num_steps, width = int(end_N.max()), max(map(len, prompts))
    size_N = torch.tensor([len(prompt) for prompt in prompts])
    taken = inspect.signature(type(innermost(model)).forward).parameters
    real_NT = torch.arange(num_steps, device=device) < end_N[:, None]
    if right_padded:
        rows = [
            [*prompt, *token_T[:end].tolist()]
            for prompt, token_T, end in zip(prompts, rollouts.token_NT, end_N.tolist(), strict=True)
        ]
        longest = max(map(len, rows))
        ids_NS = torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows]).to(device)
        inputs: dict[str, Any] = {
            "input_ids": ids_NS
        }  # positions count from 0, and nothing to mask
    else:
        prompt_NS = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts])
        real_prompt_NS = torch.arange(width) >= (width - size_N)[:, None]
        token_NT = torch.where(real_NT, rollouts.token_NT[:, :num_steps], pad_id)
        ids_NS = torch.cat([prompt_NS.to(device), token_NT], dim=1)
        real_NS = torch.cat([real_prompt_NS.to(device), real_NT], dim=1)
        inputs = {"input_ids": ids_NS, "attention_mask": real_NS.long()}
        if "position_ids" in taken:
            inputs["position_ids"] = (real_NS.long().cumsum(1) - 1).clamp(min=0)
        if "logits_to_keep" in taken:
            inputs["logits_to_keep"] = num_steps + 1
    if "use_cache" in taken:
        inputs["use_cache"] = False
    return Layout(inputs, num_steps, size_N.to(device) if right_padded else None)


def ends(mask_NT: Tensor) -> Tensor:
    """(N,) one past the last True of each row, the columns a row takes; 0 for a row without any."""
    step_T = torch.arange(1, mask_NT.shape[1] + 1, device=mask_NT.device)
    if not len(step_T):
        return mask_NT.new_zeros(len(mask_NT), dtype=torch.int64)
    return (mask_NT * step_T).amax(dim=1)


def wrappers(model: Any) -> Iterator[Any]:
    """The model and what it wraps, from the outside in; the last is the language model itself."""
    while True:
        yield model
        if isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return


def innermost(model: Any) -> Any:
    """The language model inside its wrappers, whose signature is the one that counts."""
    *_, inner = wrappers(model)
    return inner


@contextmanager
def _outputs_as_computed(model: nn.Module) -> Iterator[None]:
    """Without accelerate's cast of half-precision outputs to float32; its autocast stays."""
    with ExitStack() as stack:
        for module in wrappers(model):
            forward = vars(module).get("forward")
            convert = getattr(forward, "__wrapped__", None)
            if not isinstance(convert, ConvertOutputsToFp32):
                continue
            plain = convert.model_forward
            module.forward = MethodType(plain, module) if isinstance(forward, MethodType) else plain
            stack.callback(setattr, module, "forward", forward)
        yield


def check_temperature(temperature: float) -> None:
    """Raises ValueError unless it is positive."""
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def _scored(
    model: nn.Module, rollouts: TokenRollouts, temperature: float, layout: Layout, *, entropy: bool
) -> Statistics:
    check_temperature(temperature)
    with _outputs_as_computed(model):
        logits_NTV = layout.predicting(model(**layout.inputs).logits)
    num_steps = logits_NTV.shape[1]
    values = _SelectedLogprob.apply(
        logits_NTV,
        rollouts.token_NT[:, :num_steps],
        rollouts.mask_NT[:, :num_steps],
        temperature,
        entropy,
    )
    rest = rollouts.mask_NT.shape[1] - num_steps
    return Statistics(*(nn.functional.pad(value_NT, (0, rest)) for value_NT in values))


class _SelectedLogprob(torch.autograd.Function):
    """log softmax(logits / temperature) at the tokens of the mask, a chunk of positions at a time.

    Autograd of log_softmax would keep a float32 copy of all logits until the backward pass. Here
    only the logits are kept, and the gradient is written in their dtype:

        d logprob_t / d logits_tv = (1[v = token_t] - softmax_tv) / temperature

    Gives the log-probabilities and the entropies, which are 0 and have no gradient if not asked for.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_NTV: Tensor,
        token_NT: Tensor,
        mask_NT: Tensor,
        temperature: float,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(logits_NTV.dtype, torch.float32)
        logprob_NT = torch.zeros(mask_NT.shape, dtype=dtype, device=logits_NTV.device)
        normaliser_NT, entropy_NT = torch.zeros_like(logprob_NT), torch.zeros_like(logprob_NT)
        for at in _chunks(mask_NT, logits_NTV.shape[-1]):
            logprob_NT[at], normaliser_NT[at], entropy_L = selected(
                logits_NTV[at].to(dtype).div_(temperature), token_NT[at], entropy=entropy
            )
            if entropy_L is not None:
                entropy_NT[at] = entropy_L
        ctx.save_for_backward(logits_NTV, token_NT, mask_NT, normaliser_NT, entropy_NT)
        ctx.temperature = temperature
        if not entropy:
            ctx.mark_non_differentiable(entropy_NT)
        return logprob_NT, entropy_NT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits_NTV, token_NT, mask_NT, normaliser_NT, entropy_NT = ctx.saved_tensors
        grad_NT, of_entropy_NT = grads
        grad_NTV = torch.zeros_like(logits_NTV)
        for at in _chunks(mask_NT & ((grad_NT != 0) | (of_entropy_NT != 0)), logits_NTV.shape[-1]):
            z_LV = logits_NTV[at].to(grad_NT.dtype).div_(ctx.temperature)
            grad_L = grad_NT[at] / ctx.temperature
            entropy = (entropy_NT[at], of_entropy_NT[at] / ctx.temperature)
            grad_NTV[at] = logit_gradient(
                z_LV, normaliser_NT[at], token_NT[at], grad_L, *entropy
            ).to(grad_NTV.dtype)
        return grad_NTV, None, None, None, None


def selected(
    z_LV: Tensor, token_L: Tensor, *, entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probability of `token_L`, normaliser and entropy of softmax(z); overwrites `z_LV`.

    normaliser = logsumexp_v z_v,    entropy = -sum_v p_v log p_v
    """
    top_L1 = z_LV.amax(dim=-1, keepdim=True)
    below_LV = z_LV.sub_(top_L1)
    share_LV = below_LV.exp()
    total_L = share_LV.sum(dim=-1)
    log_total_L = total_L.log()
    logprob_L = below_LV.gather(1, token_L[:, None])[:, 0] - log_total_L
    entropy_L = None
    if entropy:
        # 0 * -inf, of a logit that leaves its token out, has to be 0.
        below_LV.clamp_(min=torch.finfo(z_LV.dtype).min)
        entropy_L = log_total_L - share_LV.mul_(below_LV).sum(dim=-1) / total_L
    return logprob_L, log_total_L + top_L1[:, 0], entropy_L


def logit_gradient(
    z_LV: Tensor,
    normaliser_L: Tensor,
    token_L: Tensor,
    grad_L: Tensor,
    entropy_L: Tensor,
    of_entropy_L: Tensor,
) -> Tensor:
    """Of the log-probability and the entropy, with these gradients; written over `z_LV`.

    grad_l (1[v = token_l] - p_v) - of_entropy_l p_v (log p_v + entropy_l),    p = softmax(z_l)
    """
    log_share_LV = z_LV.sub_(normaliser_L[:, None])
    factor_LV = -grad_L[:, None]
    if of_entropy_L.any():
        # 0 * -inf, of a logit that leaves its token out, has to be 0.
        least = torch.finfo(z_LV.dtype).min
        surprise_LV = log_share_LV.clamp(min=least).add_(entropy_L[:, None])
        factor_LV = surprise_LV.mul_(-of_entropy_L[:, None]).sub_(grad_L[:, None])
    grad_LV = log_share_LV.exp_().mul_(factor_LV)
    return grad_LV.scatter_add_(1, token_L[:, None], grad_L[:, None])


def chunk_size(vocabulary: int, device: torch.device, *, least: int = 1) -> int:
    """Positions whose logits are worked on at a time."""
    chunk = CHUNK if device.type == "cpu" else CHUNK_OF_ACCELERATOR
    return max(least, chunk // vocabulary)


def _chunks(mask_NT: Tensor, vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The positions of the mask, a chunk at a time: rows and columns (L,)."""
    row_M, step_M = mask_NT.nonzero(as_tuple=True)
    size = chunk_size(vocabulary, mask_NT.device)
    yield from zip(row_M.split(size), step_M.split(size), strict=True)
