"""Draw one token per rollout from its logits, by a uniform number that its seed determines.

Axes: N rollouts, V vocabulary.
"""

import torch
from torch import Tensor

from rollouts.engines.contract import SamplingParams


def mix64(value_N: Tensor) -> Tensor:
    """Scramble int64 numbers: the output function of SplitMix64 (Steele et al., 2014).

    A bijection, so different seeds never meet. Products wrap around modulo 2^64.
    """
    z = value_N
    z = (z ^ _shift_right(z, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9 as a signed number
    z = (z ^ _shift_right(z, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return z ^ _shift_right(z, 31)


def uniform(key_N: Tensor, step: int) -> Tensor:
    """The number in [0, 1) that decides token `step` of each rollout: SplitMix64, by counter.

        u = mix64(key + (step + 1) * 0x9E3779B97F4A7C15) / 2^64, cut to 53 bits

    Args:
        key_N: (N,) int64, `mix64` of the rollouts' seeds. Unmixed, the streams of two seeds that
            differ by a multiple of the constant would be one stream, shifted.
        step: position in the completion, from 0.

    Returns:
        (N,) float64.
    """
    # 0x9E3779B97F4A7C15 as a signed number, and the product modulo 2^64, signed.
    advance = ((step + 1) * 0x9E3779B97F4A7C15 + 2**63) % 2**64 - 2**63
    return _shift_right(mix64(key_N + advance), 11).double() * 2.0**-53


def _shift_right(value_N: Tensor, bits: int) -> Tensor:
    """Shift in zeros; `>>` on int64 shifts in the sign."""
    return (value_N >> bits) & (2 ** (64 - bits) - 1)


def draw(
    logits_NV: Tensor,
    uniform_N: Tensor,
    params: SamplingParams,
    seen_NV: Tensor | None = None,
    known_V: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token per row, by inverse CDF, and its log-probability.

        token = min { v : sum_{w <= v} q_w > u * sum_w q_w },   q = p where kept, else 0
        p = softmax(logits / T),   T = temperature, or T_t of `adaptive_temperature`

    The CDF is summed in float64. A token of probability 0 is never drawn. With `seen_NV`, (N, V) bool,
    q is of the logits after `repetition_penalty`. The log-probability is log p, in float32, before
    anything is penalised or filtered out. Temperature 0 takes the largest (penalised) logit and reports
    log p at temperature 1.

    Args:
        logits_NV: (N, V).
        uniform_N: (N,) float64 in [0, 1).
        params: temperature and filters.
        seen_NV: (N, V) bool, tokens that `repetition_penalty` is for. None: it is for none.
        known_V: (V,) bool, tokens that may be drawn: a filter before all others. None: all.

    Returns:
        (N,) int64 tokens and (N,) float32 log-probabilities. Where logits are NaN, so is the
        log-probability, and the token means nothing.
    """
    score_NV = at_temperature(logits_NV, params)
    factor: Tensor | float = 1.0
    if params.adaptive_temperature is not None and params.temperature > 0:
        factor = params.adaptive_temperature.factor(score_NV)
        score_NV = score_NV / factor
    logprob_NV = score_NV.log_softmax(dim=-1)
    drawn_NV = logprob_NV
    if seen_NV is not None:
        drawn_NV = penalised(logits_NV.float(), seen_NV, params.repetition_penalty)
        drawn_NV = (at_temperature(drawn_NV, params) / factor).log_softmax(dim=-1)
    if known_V is not None:
        drawn_NV = drawn_NV.masked_fill(~known_V, -torch.inf)
    best_N = drawn_NV.argmax(dim=-1)
    if params.temperature == 0:
        token_N = best_N
    else:
        weight_NV = truncate(drawn_NV, params).double().exp()
        cdf_NV = weight_NV.cumsum(dim=-1)
        # u is at most 1 - 2^-53, and so u * total is below the total, rounded too.
        target_N = uniform_N * cdf_NV[:, -1]
        token_N = torch.searchsorted(cdf_NV, target_N[:, None], right=True).squeeze(1)
        # Only NaN gets past the end.
        token_N = token_N.clamp(max=logits_NV.shape[1] - 1)
        # A parallel sum may round so that its total rises at a token of weight 0.
        weight_N = weight_NV.gather(1, token_N[:, None]).squeeze(1)
        token_N = token_N.where(weight_N > 0, best_N)
    return token_N, logprob_NV.gather(1, token_N[:, None]).squeeze(1)


def penalised(logits_NV: Tensor, seen_NV: Tensor, penalty: float) -> Tensor:
    """Logits of what was seen, over the penalty where positive and times it where negative."""
    worse_NV = torch.where(logits_NV > 0, logits_NV / penalty, logits_NV * penalty)
    return torch.where(seen_NV, worse_NV, logits_NV)


def at_temperature(logits_NV: Tensor, params: SamplingParams) -> Tensor:
    """Logits in float32 over the temperature; as they are at temperature 0."""
    score_NV = logits_NV.float()
    return score_NV / params.temperature if params.temperature > 0 else score_NV


def truncate(score_NV: Tensor, params: SamplingParams) -> Tensor:
    """Scores with -inf at the tokens that top_k, then top_p, then min_p leave out.

    Each works on what the one before left, and the most likely token always stays; the definitions
    are those of transformers' TopKLogitsWarper, TopPLogitsWarper and MinPLogitsWarper.
    """
    if 0 < params.top_k < score_NV.shape[1]:
        threshold_N1 = score_NV.topk(params.top_k, dim=-1).values[:, -1:]
        score_NV = score_NV.masked_fill(score_NV < threshold_N1, -torch.inf)
    if params.top_p < 1:
        rising_NV, order_NV = score_NV.sort(dim=-1)
        dropped_NV = rising_NV.softmax(dim=-1).cumsum(dim=-1) <= 1 - params.top_p
        dropped_NV[:, -1] = False
        score_NV = score_NV.masked_fill(
            torch.empty_like(dropped_NV).scatter_(1, order_NV, dropped_NV), -torch.inf
        )
    if params.min_p > 0:
        probability_NV = score_NV.softmax(dim=-1)
        floor_N1 = params.min_p * probability_NV.amax(dim=-1, keepdim=True)
        score_NV = score_NV.masked_fill(probability_NV < floor_N1, -torch.inf)
    return score_NV
