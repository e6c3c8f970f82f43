"""Compute gradient norms at the LM head in closed form, without the V x C gradient.

For one rollout with head inputs h_t, head weight W, bias b, logits z_t = (W h_t + b) / tau and
log p = sum_t log softmax(z_t)[y_t],

    d log p / d W = Delta^T H,    delta_t = (onehot(y_t) - softmax(z_t)) / tau

and its squared Frobenius norm is  sum((Delta Delta^T) * (H H^T)),  two T x T Gram matrices. With a
bias the norm is that of W and b jointly, which is the same with a column of ones appended to H.

Where input and output embeddings are tied, this is the head's part of the shared matrix's
gradient, not the whole. Input embeddings have no such form: their gradient needs a backward pass.

GVM-RAFT weighs prompts by such norms (Yao et al., 2025, arXiv:2505.02391, Algorithm 2); the paper
reports that head and input embedding serve it alike. The closed form is this project's.

Axes: N rollouts, K prompts with an accepted rollout, T decision steps, V vocabulary, B a block of
it, C width of the head's input.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

REDUCTIONS = ("sum", "mean")
"""`sum`: the norm of grad log p, the published choice. `mean`: that divided by the row's length."""


def head_gradient_norm(
    hidden_NTC: Tensor,
    token_NT: Tensor,
    mask_NT: Tensor,
    weight_VC: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "sum",
    block: int = 1024,
) -> Tensor:
    """Norm of each rollout's gradient of log p at the head, by the cheaper of two exact ways.

        norm_n = | sum_t d log softmax(z_nt)[y_nt] / d (W, b) |_F = |Delta_n^T H_n|_F

    Beside the logits, `gram_norm` takes 2 T^2 (V + C) operations per row and `block_norm` 2 T V C,
    so the first is taken while  T (V + C) < V C,  which for a large vocabulary is T < C.

    The norm of the sum over tokens grows with length; `mean` divides it by the length. The paper
    compares both and chooses the sum, which tilts budgets towards prompts of low pass rate.

    Args:
        hidden_NTC: (N, T, C) head inputs at the positions that predict `token_NT`, as
            `logprobs.head_inputs` gives them.
        token_NT: (N, T) int64 tokens.
        mask_NT: (N, T) bool; positions where it is False contribute nothing, whatever they hold.
        weight_VC: (V, C) weight of the head, whole (gathered, where a launcher has cut it up).
        bias_V: (V,) bias of the head, or None.
        temperature: tau, the sampling temperature; positive.
        reduction: `sum` or `mean`.
        block: vocabulary entries worked on at a time; it changes memory, never the result.

    Returns:
        (N,) norms without gradient, float32 (float64 if an input is float64). A row without
        decisions has 0.

    Raises:
        ValueError: if shapes do not match or a setting is out of range.
    """
    num_steps, (vocabulary, width) = mask_NT.shape[1], weight_VC.shape
    use_gram = num_steps * (vocabulary + width) < vocabulary * width
    return (gram_norm if use_gram else block_norm)(
        hidden_NTC,
        token_NT,
        mask_NT,
        weight_VC,
        bias_V=bias_V,
        temperature=temperature,
        reduction=reduction,
        block=block,
    )


@torch.no_grad()
def gram_norm(
    hidden_NTC: Tensor,
    token_NT: Tensor,
    mask_NT: Tensor,
    weight_VC: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "sum",
    block: int = 1024,
) -> Tensor:
    """`head_gradient_norm` by Gram matrices, for short rows.

        norm^2 = sum_{s,t} (delta_s . delta_t) (h_s . h_t) = sum((Delta Delta^T) * (H H^T))

    Delta Delta^T is added up over vocabulary blocks. Memory: N T (T + block).

    Args, Returns and Raises: as `head_gradient_norm`.
    """
    head = _head(hidden_NTC, token_NT, mask_NT, weight_VC, bias_V, temperature, reduction, block)
    gram_NTT = head.hidden_NTC.new_zeros(*mask_NT.shape, mask_NT.shape[1])
    for delta_NTB in head.residuals():
        gram_NTT += delta_NTB @ delta_NTB.mT
    square_N = (gram_NTT * (head.hidden_NTC @ head.hidden_NTC.mT)).sum((1, 2))
    # A sum of cross terms that is 0 but for rounding may lie below it.
    return _reduced(square_N.clamp(min=0), mask_NT, reduction)


@torch.no_grad()
def block_norm(
    hidden_NTC: Tensor,
    token_NT: Tensor,
    mask_NT: Tensor,
    weight_VC: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "sum",
    block: int = 1024,
) -> Tensor:
    """`head_gradient_norm` by vocabulary blocks of the gradient itself, for long rows.

        norm^2 = sum_B |Delta_B^T H|_F^2

    Blocks over T would not add up: tokens have cross terms. Memory: N block (T + C).

    Args, Returns and Raises: as `head_gradient_norm`.
    """
    head = _head(hidden_NTC, token_NT, mask_NT, weight_VC, bias_V, temperature, reduction, block)
    square_N = head.hidden_NTC.new_zeros(len(mask_NT))
    for delta_NTB in head.residuals():
        square_N += (delta_NTB.mT @ head.hidden_NTC).square().sum((1, 2))
    return _reduced(square_N, mask_NT, reduction)


def mean_norm(norm_N: Tensor, prompt_N: Tensor, accepted_N: Tensor) -> tuple[Tensor, Tensor]:
    """G of each prompt: the mean norm over its accepted rollouts.

        G_p = (1 / R_p) sum_{accepted i of p} norm_i

    This is the estimate of GVM-RAFT's Algorithm 2 (arXiv:2505.02391). The quantity that its
    variance bound calls for is `rms_norm`, which is never smaller.

    Args:
        norm_N: (N,) norms of `head_gradient_norm`.
        prompt_N: (N,) integers, the prompt of each rollout.
        accepted_N: (N,) bool; the other rows are left out, whatever their norm.

    Returns:
        (K,) the prompts with an accepted rollout, increasing, and (K,) their G in float64. A prompt
        with none is absent: it has not been measured.

    Raises:
        ValueError: if shapes differ or `accepted_N` is not bool.
    """
    return _accepted_mean(norm_N, prompt_N, accepted_N)


def rms_norm(norm_N: Tensor, prompt_N: Tensor, accepted_N: Tensor) -> tuple[Tensor, Tensor]:
    """G of each prompt: the root mean square norm over its accepted rollouts.

        G_p = sqrt((1 / R_p) sum_{accepted i of p} norm_i^2)

    The definition in the variance bound of GVM-RAFT (arXiv:2505.02391): G^2 = E[|s|^2 | accepted].

    Args, Returns and Raises: as `mean_norm`.
    """
    prompt_K, square_K = _accepted_mean(norm_N.double().square(), prompt_N, accepted_N)
    return prompt_K, square_K.sqrt()


def _accepted_mean(value_N: Tensor, prompt_N: Tensor, accepted_N: Tensor) -> tuple[Tensor, Tensor]:
    if not value_N.shape == prompt_N.shape == accepted_N.shape or value_N.ndim != 1:
        raise ValueError(
            f"norm_N, prompt_N and accepted_N must be 1-d and equally long, got "
            f"{tuple(value_N.shape)}, {tuple(prompt_N.shape)} and {tuple(accepted_N.shape)}"
        )
    if accepted_N.dtype != torch.bool:
        raise ValueError(f"accepted_N must be bool, got {accepted_N.dtype}")
    prompt_K, group_M, size_K = prompt_N[accepted_N].unique(return_inverse=True, return_counts=True)
    value_M = value_N[accepted_N].double()
    return prompt_K, value_M.new_zeros(len(prompt_K)).index_add(0, group_M, value_M) / size_K


@dataclass(frozen=True)
class _Head:
    """Checked inputs in one dtype; a bias is one more column of the weight, met by ones in H.

    Hidden states, that column included, are 0 off the mask, so such positions fall out of every
    product with H.
    """

    hidden_NTC: Tensor
    token_NT: Tensor
    mask_NT: Tensor
    weight: Callable[[slice], Tensor]
    vocabulary: int
    temperature: float
    block: int

    def residuals(self) -> Iterator[Tensor]:
        """Delta, one vocabulary block (N, T, B) after the other; off the mask it means nothing.

        The sampled token's entry 1 - pi is not formed by subtraction: with confident tokens nothing
        would be left of it in float32. It is the other tokens' share, summed in the first pass.
        """
        log_rest_NT1 = self.hidden_NTC.new_full((*self.mask_NT.shape, 1), -torch.inf)
        chosen_NT1 = torch.zeros_like(log_rest_NT1)
        for logit_NTB, inside_NT1, column_NT1 in self._logits():
            value_NT1 = logit_NTB.gather(-1, column_NT1)
            chosen_NT1 = torch.where(inside_NT1, value_NT1, chosen_NT1)
            value_NT1 = torch.where(inside_NT1, -torch.inf, value_NT1)
            rest_NT1 = logit_NTB.scatter(-1, column_NT1, value_NT1).logsumexp(-1, keepdim=True)
            log_rest_NT1 = torch.logaddexp(log_rest_NT1, rest_NT1)
        normaliser_NT1 = torch.logaddexp(log_rest_NT1, chosen_NT1)
        missed_NT1 = (log_rest_NT1 - chosen_NT1).sigmoid()
        for logit_NTB, inside_NT1, column_NT1 in self._logits():
            delta_NTB = -(logit_NTB - normaliser_NT1).exp()
            value_NT1 = torch.where(inside_NT1, missed_NT1, delta_NTB.gather(-1, column_NT1))
            delta_NTB = delta_NTB.scatter(-1, column_NT1, value_NT1)
            yield delta_NTB / self.temperature

    def _logits(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Logits of a block, whether it holds the sampled token, and the token's column in it."""
        for start in range(0, self.vocabulary, self.block):
            weight_BC = self.weight(slice(start, start + self.block))
            column_NT1 = self.token_NT[..., None] - start
            inside_NT1 = (column_NT1 >= 0) & (column_NT1 < len(weight_BC))
            logit_NTB = self.hidden_NTC @ weight_BC.T / self.temperature
            yield logit_NTB, inside_NT1, column_NT1.clamp(0, len(weight_BC) - 1)


def _head(
    hidden_NTC: Tensor,
    token_NT: Tensor,
    mask_NT: Tensor,
    weight_VC: Tensor,
    bias_V: Tensor | None,
    temperature: float,
    reduction: str,
    block: int,
) -> _Head:
    vocabulary, width = weight_VC.shape
    if (
        mask_NT.ndim != 2
        or mask_NT.dtype != torch.bool
        or token_NT.shape != mask_NT.shape
        or tuple(hidden_NTC.shape) != (*mask_NT.shape, width)
    ):
        raise ValueError(
            f"mask_NT must be bool (N, T), token_NT (N, T) and hidden_NTC (N, T, {width}), got "
            f"{mask_NT.dtype} {tuple(mask_NT.shape)}, {tuple(token_NT.shape)} and "
            f"{tuple(hidden_NTC.shape)}"
        )
    if bias_V is not None and tuple(bias_V.shape) != (vocabulary,):
        raise ValueError(f"bias_V must have shape ({vocabulary},), got {tuple(bias_V.shape)}")
    if (mask_NT & ((token_NT < 0) | (token_NT >= vocabulary))).any():
        raise ValueError(f"token_NT must lie in 0 .. {vocabulary - 1} where mask_NT is True")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")

    dtype = torch.promote_types(hidden_NTC.dtype, weight_VC.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    hidden_NTC = hidden_NTC.to(dtype)
    if bias_V is not None:
        hidden_NTC = torch.cat([hidden_NTC, torch.ones_like(hidden_NTC[..., :1])], dim=-1)

    def weight(part: slice) -> Tensor:
        weight_BC = weight_VC[part].to(dtype)
        if bias_V is None:
            return weight_BC
        return torch.cat([weight_BC, bias_V[part, None].to(dtype)], dim=1)

    return _Head(
        hidden_NTC=torch.where(mask_NT[..., None], hidden_NTC, 0.0),
        token_NT=token_NT,
        mask_NT=mask_NT,
        weight=weight,
        vocabulary=vocabulary,
        temperature=temperature,
        block=block,
    )


def _reduced(square_N: Tensor, mask_NT: Tensor, reduction: str) -> Tensor:
    if reduction == "mean":
        return square_N.sqrt() / mask_NT.sum(1).clamp(min=1)
    return square_N.sqrt()
