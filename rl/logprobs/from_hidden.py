"""Compute log-probs and entropies from hidden states, without any (N, T, V) tensor.

The logits of a step are usually its largest tensor: 8 rows of 2048 tokens over a vocabulary of
152k are 5 GB in bfloat16, and as much again for their gradient. Here the model's head multiplies a
few positions at a time, keeps a log-probability of each, forgets the logits, and multiplies them
again in the backward pass. Only decisions of the mask are multiplied at all, and in the backward
pass only those whose gradient is not 0 (a clipped token costs nothing). Price: one more product
with the head's weight, a third of the head's work.

How: for the time of one call of the model, wrappers and all, the head's `forward` computes the
log-probabilities itself and returns them in the place of logits. The head's weight is therefore
used inside its own forward, and what the wrappers see depends on every parameter.

When: `refusal` says whether and why not. The functions of `rl.logprobs.from_logits` serve every model.

Axes: N rollouts, T decision steps, S columns of the model's input, V vocabulary, C width of the
head's input, M decisions of the mask, L decisions of a chunk.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from rl.logprobs.from_logits import (
    Layout,
    Statistics,
    check_temperature,
    chunk_size,
    innermost,
    layout_of,
    logit_gradient,
    selected,
    wrappers,
)
from rollouts.batch import TokenRollouts

LEAST = 128
"""Positions of a chunk, at least: each chunk reads the whole weight and its gradient once. With a
vocabulary of 152k their logits are 74 MiB in float32."""


def fused_logprobs(
    model: nn.Module,
    rollouts: TokenRollouts,
    *,
    temperature: float = 1.0,
    pad_id: int,
    right_padded: bool = False,
    layout: Layout | None = None,
) -> Tensor:
    """`logprobs.completion_logprobs`, from the hidden states.

        logprob_nt = z_nt[token_nt] - logsumexp_v z_nt[v],    z_nt = (W h_nt + b) / temperature

    Logits are rounded to the type the head computes in, that of its weight or of autocast, as
    they are there; log-softmax and its gradient are float32, and the weight's gradient is added up
    in float32 (float64 for a float64 model). Chunking a matrix product over vocabulary tokens is
    folklore, with kernels in liger-kernel and TRL; this is written in plain torch.

    Args:
        model: one for which `refusal` gives None. Gradients reach its parameters, the input
            embeddings too where they share the head's weight.
        rollouts, temperature, pad_id, right_padded, layout: as `completion_logprobs`.

    Returns:
        As `completion_logprobs`.

    Raises:
        ValueError: as `completion_logprobs`; or with the reason, if the head does not allow it or
            the model changes its logits after the head.
    """
    layout = layout or layout_of(model, rollouts, pad_id, right_padded=right_padded)
    return _scored(model, rollouts, temperature, layout, entropy=False).logprob_NT


def fused_statistics(
    model: nn.Module,
    rollouts: TokenRollouts,
    *,
    temperature: float = 1.0,
    pad_id: int,
    right_padded: bool = False,
    differentiable: bool = False,
    layout: Layout | None = None,
) -> Statistics:
    """`logprobs.completion_statistics`, from the hidden states.

    Args, Returns and Raises: as `fused_logprobs` and `completion_statistics`.
    """
    layout = layout or layout_of(model, rollouts, pad_id, right_padded=right_padded)
    found = _scored(model, rollouts, temperature, layout, entropy=True)
    return found if differentiable else found._replace(entropy_NT=found.entropy_NT.detach())


@torch.no_grad()
def refusal(model: nn.Module) -> str | None:
    """Why this model's head cannot be fused; None if it can.

    Runs the model once on a few tokens to see whether it changes its logits after the head (a
    scale, a soft-cap, a mask of tokens); the fused functions look again in every call. Every
    process of a run must ask together, and gets the same answer.

    Refused are: a head that is not a plain `nn.Linear` (an adapter or `modules_to_save` of PEFT
    on it, a quantised one), one whose weight is not whole even inside its forward (tensor
    parallelism), one whose forward somebody else has replaced, a compiled model, `nn.DataParallel`,
    and a model that changes its logits. FSDP and ZeRO-3 gather the weight for the forward and the
    backward pass of the head, and are served.
    """
    reason = _obstacle(model)
    if reason is not None:
        return reason
    head = innermost(model).get_output_embeddings()
    whole: list[bool] = []
    of_head: list[Tensor] = []
    # Before the forward of the head, where a weight that is gathered for it is there already.
    hooks = [
        head.register_forward_pre_hook(lambda *_: whole.append(_is_whole(head))),
        head.register_forward_hook(lambda _, __, logits: of_head.append(logits.clone())),
    ]
    try:
        # Several, because the embedding of a padding token may be 0, and a scaled 0 looks the same.
        device = next(model.parameters()).device
        token_NS = torch.arange(min(8, head.out_features), device=device)[None]
        logits = model(input_ids=token_NS, attention_mask=torch.ones_like(token_NS)).logits
    finally:
        for hook in hooks:
            hook.remove()
    if len(of_head) != 1:
        return f"the model uses its head {len(of_head)} times in a call"
    if not whole[0]:
        return SHARDED
    return None if _same(logits, of_head[0]) else CHANGES


CHANGES = "the model changes its logits after the head (a scale, a soft-cap or a mask of tokens)"
INSTEAD = "use the functions of rl.logprobs.from_logits"
SHARDED = "the head's weight is sharded or quantised even inside the head's forward"


def _obstacle(model: nn.Module) -> str | None:
    """The reasons that can be seen without running the model."""
    for module in wrappers(model):
        if isinstance(module, nn.DataParallel):
            return "nn.DataParallel copies the model in every call; launch one process per device"
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            return "the model is compiled, with the head's own forward in it"
    head = innermost(model).get_output_embeddings()
    # A subclass with the forward of nn.Linear is what `fully_shard` makes of one.
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        kind = type(head)
        return f"the head is not a plain nn.Linear but {kind.__module__}.{kind.__qualname__}"
    if "forward" in vars(head):
        return "the head's forward has been replaced already"
    return None


def _is_whole(head: nn.Linear) -> bool:
    """Whether the weight is an ordinary matrix at this moment."""
    weight, shape = head.weight, (head.out_features, head.in_features)
    return tuple(weight.shape) == shape and type(weight.data) is Tensor


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal but for the type, NaN in the same places."""
    if one.shape != other.shape:
        return False
    dtype = torch.promote_types(one.dtype, other.dtype)
    one, other = one.detach().to(dtype), other.detach().to(dtype)
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def _scored(
    model: nn.Module, rollouts: TokenRollouts, temperature: float, layout: Layout, *, entropy: bool
) -> Statistics:
    check_temperature(temperature)
    reason = _obstacle(model)
    if reason is not None:
        raise ValueError(f"{reason}; {INSTEAD}")
    head = cast(nn.Linear, innermost(model).get_output_embeddings())
    scoring = _Scoring(head, layout, rollouts, temperature, entropy)
    head.forward = scoring  # type: ignore[assignment, method-assign]
    try:
        output_1RV = model(**layout.inputs).logits
    finally:
        del head.forward
    logprob_M, entropy_M = scoring.unpacked(output_1RV)
    mask_NT = rollouts.mask_NT
    zero_NT = logprob_M.new_zeros(mask_NT.shape)
    return Statistics(
        zero_NT.masked_scatter(mask_NT, logprob_M),
        zero_NT.masked_scatter(mask_NT, entropy_M),
    )


class _Scoring:
    """The head's forward for one call: hidden states in, log-probabilities out.

    They leave the model in the place of its logits: as rows of V numbers, behind one row of true
    logits by which it shows whether the model does anything to them afterwards.
    """

    def __init__(
        self,
        head: nn.Linear,
        layout: Layout,
        rollouts: TokenRollouts,
        temperature: float,
        entropy: bool,
    ) -> None:
        self.head, self.layout = head, layout
        self.mask_NT = rollouts.mask_NT[:, : layout.num_steps]
        self.token_M = rollouts.token_NT[:, : layout.num_steps][self.mask_NT]
        self.temperature, self.entropy = temperature, entropy
        self.logits_V: Tensor | None = None

    def __call__(self, hidden_NSC: Tensor) -> Tensor:
        if self.logits_V is not None or not _is_whole(self.head):
            reason = "the model uses its head more than once in a call"
            raise ValueError(f"{SHARDED if self.logits_V is None else reason}; {INSTEAD}")
        hidden_MC = self.layout.predicting(hidden_NSC)[self.mask_NT]
        head = self.head
        *values, self.logits_V = _FusedHead.apply(
            hidden_MC, head.weight, head.bias, self.token_M, self.temperature, self.entropy
        )
        flat = torch.cat(values)
        flat = nn.functional.pad(flat, (0, -len(flat) % len(self.logits_V)))
        rows_1RV = flat.view(1, -1, len(self.logits_V))
        return torch.cat([self.logits_V.expand(1, 1, -1), rows_1RV], dim=1)

    def unpacked(self, output_1RV: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies (M,) of what came out of the model."""
        if self.logits_V is None or not _same(output_1RV[0, 0], self.logits_V):
            raise ValueError(f"{CHANGES}; {INSTEAD}")
        num = len(self.token_M)
        logprob_M, entropy_M = output_1RV[0, 1:].flatten()[: 2 * num].view(2, num)
        return logprob_M, entropy_M


class _FusedHead(torch.autograd.Function):
    """log softmax((W h + b) / temperature) at each token; the entropy of each decision, 0 and without
    gradient if not asked for; and without gradient the logits of the first, (V,), before the
    temperature, 0 if there is none.

    Kept for the backward pass: hidden states, one normaliser and one entropy per decision. There

        delta_m = grad_m (onehot(token_m) - softmax(z_m)) / temperature, and the entropy's own
        dh_m = W^T delta_m,    dW = sum_m delta_m h_m^T,    db = sum_m delta_m
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MC: Tensor,
        weight_VC: Tensor,
        bias_V: Tensor | None,
        token_M: Tensor,
        temperature: float,
        entropy: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = hidden_MC.device.type
        ctx.dtype = weight_VC.dtype
        if torch.is_autocast_enabled(device) and ctx.dtype != torch.float64:
            ctx.dtype = torch.get_autocast_dtype(device)
        ctx.hidden_dtype, ctx.temperature = hidden_MC.dtype, temperature
        exact = torch.promote_types(ctx.dtype, torch.float32)
        with torch.autocast(device, enabled=False):
            hidden_MC = hidden_MC.to(ctx.dtype)
            logprob_M = hidden_MC.new_zeros(len(hidden_MC), dtype=exact)
            normaliser_M, entropy_M = torch.zeros_like(logprob_M), torch.zeros_like(logprob_M)
            first_V = logprob_M.new_zeros(len(weight_VC))
            weight, bias = weight_VC.to(ctx.dtype), None if bias_V is None else bias_V.to(ctx.dtype)
            for at in _slices(len(hidden_MC), _chunk_of(weight)):
                logits_LV = nn.functional.linear(hidden_MC[at], weight, bias)
                if at.start == 0:
                    first_V.copy_(logits_LV[0])
                logprob_M[at], normaliser_M[at], entropy_L = selected(
                    logits_LV.to(exact).div_(temperature), token_M[at], entropy=entropy
                )
                if entropy_L is not None:
                    entropy_M[at] = entropy_L
        ctx.save_for_backward(hidden_MC, weight_VC, bias_V, token_M, normaliser_M, entropy_M)
        ctx.mark_non_differentiable(*(() if entropy else (entropy_M,)), first_V)
        return logprob_M, entropy_M, first_V

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_MC, weight_VC, bias_V, token_M, normaliser_M, entropy_M = ctx.saved_tensors
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        index_A = ((grads[0] != 0) | (grads[1] != 0)).nonzero()[:, 0]
        exact = normaliser_M.dtype
        with torch.autocast(hidden_MC.device.type, enabled=False):
            weight = weight_VC.to(ctx.dtype)
            bias = None if bias_V is None else bias_V.to(ctx.dtype)
            grad_hidden_MC = torch.zeros_like(hidden_MC) if for_hidden else None
            grad_weight_VC = torch.zeros_like(weight, dtype=exact) if for_weight else None
            grad_bias_V = weight.new_zeros(len(weight), dtype=exact) if for_bias else None
            for at in index_A.split(_chunk_of(weight)):
                hidden_LC = hidden_MC[at]
                z_LV = nn.functional.linear(hidden_LC, weight, bias).to(exact)
                delta_LV = logit_gradient(
                    z_LV.div_(ctx.temperature),
                    normaliser_M[at],
                    token_M[at],
                    grads[0][at] / ctx.temperature,
                    entropy_M[at],
                    grads[1][at] / ctx.temperature,
                )
                if grad_bias_V is not None:
                    grad_bias_V += delta_LV.sum(dim=0)
                delta_LV = delta_LV.to(ctx.dtype)
                if grad_hidden_MC is not None:
                    grad_hidden_MC[at] = delta_LV @ weight
                if grad_weight_VC is not None:
                    _add_product(grad_weight_VC, delta_LV.T, hidden_LC)
        return (
            None if grad_hidden_MC is None else grad_hidden_MC.to(ctx.hidden_dtype),
            None if grad_weight_VC is None else grad_weight_VC.to(weight_VC.dtype),
            None if grad_bias_V is None else grad_bias_V.to(bias_V.dtype),
            *(None, None, None),
        )


def _add_product(total: Tensor, one: Tensor, other: Tensor) -> None:
    """total += one @ other, without rounding the product to the type of its factors."""
    if one.dtype == total.dtype:
        total.addmm_(one, other)
    elif total.device.type == "cuda":
        torch.addmm(total, one, other, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(one.to(total.dtype), other.to(total.dtype))


def _chunk_of(weight_VC: Tensor) -> int:
    return chunk_size(len(weight_VC), weight_VC.device, least=LEAST)


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, length, size)]
