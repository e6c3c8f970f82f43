"""Put the rollouts of one prompt behind one copy of it, so that the model reads it once.

    [left padding | prompt | rollout 1 | rollout 2 | ... | right padding]

A rollout's tokens attend to the prompt and to their own rollout, not to siblings, and their positions
continue the prompt's. Each log-probability and gradient is therefore that of a row of its own, up to
rounding. Packed rows also need no padding between short and long siblings; their price is attention over
longer rows (`cost`).

Axes: N rollouts, T decision steps, G packed rows (one for each prompt), S columns of a packed row.
"""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rl.logprobs.from_logits import Layout, completion_logprobs, ends, innermost, layout_of
from rollouts.batch import TokenRollouts

EXACT, ROUNDED = 1e-4, 0.05
"""Largest difference of log-probabilities between packed and separate rows, in nats, on which packing
is used: of a model that computes in float32 or float64, and of others. Project defaults."""


def packed_layout(model: nn.Module, rollouts: TokenRollouts, pad_id: int) -> Layout:
    """The rows as one input of `model`, each prompt once.

    Args:
        model: one for which `refusal` gives None.
        rollouts: at least one row; rows of one prompt need not stand together.
        pad_id: any valid token id; what the padding holds never matters.

    Raises:
        ValueError: as `layout_of`, without rows or for an empty prompt.
    """
    if len(rollouts) == 0 or not all(rollouts.prompt_ids[p] for p in rollouts.prompt_N.tolist()):
        return layout_of(model, rollouts, pad_id)  # which raises
    device = rollouts.token_NT.device
    lengths = ends(rollouts.mask_NT).tolist()
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(rollouts.prompt_N.tolist()):
        rows_of.setdefault(rollouts.prompt_ids[prompt], []).append(row)
    width = max(map(len, rows_of))
    num_columns = width + max(sum(lengths[row] for row in rows) for rows in rows_of.values())

    shape, num_steps = (len(rows_of), num_columns), max(lengths)
    ids_GS = torch.full(shape, pad_id)
    position_GS = torch.zeros(shape, dtype=torch.int64)
    segment_GS = torch.full(shape, -1)  # 0: the prompt; 1, 2, ...: its rollouts; -1: padding
    line_N = torch.zeros(len(rollouts), dtype=torch.int64)
    column_NT = torch.full((len(rollouts), num_steps), width - 1)
    for line, (prompt_ids, rows) in enumerate(rows_of.items()):
        size = len(prompt_ids)
        ids_GS[line, width - size : width] = torch.tensor(prompt_ids)
        position_GS[line, width - size : width] = torch.arange(size)
        segment_GS[line, width - size : width] = 0
        start = width
        for segment, row in enumerate(rows, start=1):
            end = start + lengths[row]
            ids_GS[line, start:end] = rollouts.token_NT[row, : lengths[row]].cpu()
            position_GS[line, start:end] = torch.arange(size, size + lengths[row])
            segment_GS[line, start:end] = segment
            line_N[row] = line
            # The prompt's last column predicts the first token, each token the one after it.
            column_NT[row, 1 : lengths[row]] = torch.arange(start, max(start, end - 1))
            start = end

    earlier_SS = torch.ones(num_columns, num_columns, dtype=torch.bool).tril()
    from_GS1, to_G1S = segment_GS[:, :, None], segment_GS[:, None, :]
    seen_GSS = earlier_SS & ((from_GS1 == to_G1S) | ((to_G1S == 0) & (from_GS1 > 0)))
    mask_G1SS = seen_GSS[:, None].to(device)
    language_model = innermost(model)
    if language_model.config._attn_implementation == "eager":  # which adds the mask
        dtype = next(language_model.parameters()).dtype
        hidden = torch.zeros(mask_G1SS.shape, dtype=dtype, device=device)
        mask_G1SS = hidden.masked_fill(~mask_G1SS, torch.finfo(dtype).min)
    inputs: dict[str, Any] = {
        "input_ids": ids_GS.to(device),
        "attention_mask": mask_G1SS,
        "position_ids": position_GS.to(device),
    }
    taken = inspect.signature(type(language_model).forward).parameters
    if "logits_to_keep" in taken:
        inputs["logits_to_keep"] = num_columns - width + 1
    if "use_cache" in taken:
        inputs["use_cache"] = False
    # Counted from the right, as only the last logits may be there.
    from_right_NT = column_NT - num_columns
    return Layout(inputs, num_steps, at=(line_N[:, None].to(device), from_right_NT.to(device)))


class Cost(NamedTuple):
    """Cost of one micro-batch, in tokens (their attention counts as more of them), and its tokens."""

    packed: float
    separate: float
    packed_tokens: int
    separate_tokens: int


def cost(rollouts: TokenRollouts, width: int) -> Cost:
    """What packed rows and separate rows cost, padding included.

        cost = rows (S + S^2 / (6 C))

    A layer of width C takes some 24 C^2 operations for each token, and 4 S C for its attention to S
    columns. The prompt saved must outweigh the attention between siblings, which is computed and
    masked. Project default.

    Args:
        rollouts: the rows of a micro-batch, at least one.
        width: C, the model's hidden size.
    """
    lengths: dict[tuple[int, ...], list[int]] = {}
    pairs = zip(rollouts.prompt_N.tolist(), ends(rollouts.mask_NT).tolist(), strict=True)
    for prompt, length in pairs:
        lengths.setdefault(rollouts.prompt_ids[prompt], []).append(length)
    longest = max(map(len, lengths))
    packed = len(lengths), longest + max(map(sum, lengths.values()))
    separate = len(rollouts), longest + max(map(max, lengths.values()))

    def with_attention(num_rows: int, columns: int) -> float:
        return num_rows * columns * (1 + columns / (6 * width))

    return Cost(
        packed=with_attention(*packed),
        separate=with_attention(*separate),
        packed_tokens=packed[0] * packed[1],
        separate_tokens=separate[0] * separate[1],
    )


def refusal(model: nn.Module, *, in_eval: bool = False, rounds: bool = False) -> str | None:
    """Why rows of this model cannot be packed; None if they can.

    Runs the model on a few random tokens, packed and in separate rows. Every process of a run must
    ask together, and gets the same answer.

    Args:
        in_eval: the model is scored in evaluation mode, without dropout.
        rounds: the model computes in half precision, also under autocast.
    """
    language_model = innermost(model)
    config = language_model.config
    if not isinstance(getattr(config, "hidden_size", None), int):
        return "the model does not say how wide it is"
    attention = getattr(config, "_attn_implementation", None)
    if attention not in ("sdpa", "eager"):
        return f"attention {attention!r} takes no mask of rollouts; sdpa and eager do"
    if "position_ids" not in inspect.signature(type(language_model).forward).parameters:
        return "the model takes no position_ids"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        return f"the model has layers of kind {', '.join(sorted(kinds))}"
    if getattr(config, "sliding_window", None) is not None:
        return "the model attends to a sliding window"
    if getattr(config, "output_router_logits", False):
        return "the loss of the model's router depends on how rows are laid out"
    if not in_eval and any(_drops(module) for module in model.modules()):
        return "the model has dropout, which siblings would share on their prompt"
    return _probe(model, ROUNDED if rounds else EXACT)


def _drops(module: nn.Module) -> bool:
    rate: Any = (
        module.p if isinstance(module, nn.Dropout) else vars(module).get("attention_dropout")
    )
    return isinstance(rate, float) and rate > 0


@torch.no_grad()
def _probe(model: nn.Module, limit: float) -> str | None:
    """Compare both layouts on two prompts with three and two rollouts."""
    language_model = innermost(model)
    num_ids = int(language_model.config.vocab_size)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randint(num_ids, shape, generator=generator)

    mask_NT = torch.arange(6) < torch.tensor([6, 2, 4, 1, 5])[:, None]
    rollouts = TokenRollouts(
        prompt_N=torch.tensor([0, 1, 0, 1, 0]),
        mask_NT=mask_NT,
        logprob_NT=torch.zeros(mask_NT.shape),
        version=0,
        token_NT=draw(5, 6),
        truncated_N=torch.zeros(5, dtype=torch.bool),
        seed_N=torch.arange(5),
        prompt_ids=(tuple(draw(7).tolist()), tuple(draw(3).tolist())),
    ).to(device)
    try:
        packed_NT = completion_logprobs(
            model, rollouts, pad_id=0, layout=packed_layout(model, rollouts, 0)
        )
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        return f"packed rows do not go through the model: {error}"
    off = (packed_NT - completion_logprobs(model, rollouts, pad_id=0)).abs().max().item()
    if off <= limit:
        return None
    return f"log-probabilities of packed rows are {off:.2g} nats from those of separate ones"
