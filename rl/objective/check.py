"""Contract tests for an advantage or a loss of your own. Run them once, in a test.

A run makes them by itself before its first rollout, of every function that is not one of ours.
Axes: N rollouts (flat rows), T tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

TOKENS = 4
"""T of the made-up rollouts."""


def check_advantage(
    advantage: Callable[..., Tensor], *, any_order: bool = True, **settings: Any
) -> None:
    """Test that an advantage keeps the contract that a run relies on.

    `advantage(reward_N, prompt_N, ...)` gives one finite number per rollout, (N,), or per token,
    (N, T), in a floating dtype and on the device of the rewards; takes groups of any sizes, in any
    order of rows, a lone rollout, equal and negative rewards; follows its rows when these are reordered;
    and leaves its arguments as they are.

    Example::

        check_advantage(my_advantage)
        check_advantage(my_advantage, temperature=0.5)

    Args:
        advantage: the function. Further parameters with the names of columns of rollouts are given
            these.
        any_order: whether rows may come in any order. Samples of a diffusion model that share a branch
            are neighbours, on which an advantage may rely.
        settings: arguments of it that are settings.

    Raises:
        AssertionError: saying what it did, and of which groups.
    """
    name = _name(advantage)
    for groups, prompt_N, reward_N in _batches():
        columns = _columns(advantage, prompt_N, reward_N, settings)
        call = partial(advantage, **settings)
        given = (reward_N.clone(), prompt_N.clone())
        before = {key: value.clone() for key, value in columns.items()}
        found = call(*given, **columns)
        num_rows, num_tokens = columns_shape = (len(reward_N), TOKENS)
        where = f"advantage {name}, {groups}"
        _require(isinstance(found, Tensor), f"{where}: gave {type(found).__name__}, not a tensor")
        _require(
            tuple(found.shape) in [(num_rows,), columns_shape],
            f"{where}: gave shape {tuple(found.shape)} for {num_rows} rollouts of {num_tokens} tokens, "
            f"expected ({num_rows},) or {columns_shape}",
        )
        _require(found.dtype.is_floating_point, f"{where}: gave {found.dtype}, not floats")
        _require(found.device == reward_N.device, f"{where}: gave a tensor on {found.device}")
        _require(bool(found.isfinite().all()), f"{where}: is not finite: {found.tolist()}")
        same = torch.equal(given[0], reward_N) and torch.equal(given[1], prompt_N)
        same &= all(torch.equal(columns[key], before[key]) for key in before)
        _require(same, f"{where}: changed its arguments")
        if not any_order:
            continue
        order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(1))
        moved = call(reward_N[order], prompt_N[order], **{k: v[order] for k, v in columns.items()})
        _require(
            torch.allclose(moved, found[order], rtol=1e-6, atol=1e-9),
            f"{where}: depends on the order of rows; look rows up by prompt_N, as groups differ in size "
            "and their rows lie anywhere",
        )


def check_loss(loss: Callable[..., Any], **settings: Any) -> None:
    """Test that a loss keeps the contract that a run relies on.

    `loss(logprob_NT, old_logprob_NT, advantage_N, weight_NT, *, denominator, ...)` gives a finite
    scalar and a dict of sums of statistics (scalars; it may be empty). Micro-batches add up: the losses
    of parts with the denominator of the whole sum to the loss of the whole, and so do the statistics;
    so the denominator divides, and no loss counts its own rows. The gradient is finite, and 0 where
    the weight is 0. The order of rows changes nothing, and arguments stay as they are.

    Example::

        check_loss(my_loss)
        check_loss(my_loss, epsilon_high=0.28)

    Args:
        loss: the function. Further parameters with the names of columns of rollouts are given these.
        settings: arguments of it that are settings.

    Raises:
        AssertionError: saying what it did.
    """
    name, call = _name(loss), partial(loss, **settings)
    if "elements" in inspect.signature(call).parameters and "elements" not in settings:
        call = partial(call, elements=3)  # of a latent
    for dtype in (torch.float64, torch.float32):
        given, columns = _decisions(loss, settings, dtype)
        where = f"loss {name} in {str(dtype).removeprefix('torch.')}"
        before = [value.detach().clone() for value in given]
        whole, sums = _both(call, given, columns, 8.0, where)
        (gradient_NT,) = torch.autograd.grad(whole, given[0], allow_unused=True)
        _require(gradient_NT is not None, f"{where}: has no gradient with respect to logprob_NT")
        _require(bool(gradient_NT.isfinite().all()), f"{where}: its gradient is not finite")
        _require(bool((gradient_NT != 0).any()), f"{where}: its gradient is 0 everywhere")
        _require(
            bool((gradient_NT[given[3] == 0] == 0).all()),
            f"{where}: has a gradient where weight_NT is 0, which are tokens that do not train",
        )
        same = all(torch.equal(old, new.detach()) for old, new in zip(before, given, strict=True))
        _require(same, f"{where}: changed its arguments")
        near: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12}
        if dtype is torch.float32:
            near = {"rtol": 1e-4, "atol": 1e-6}
        parts, part_sums = torch.zeros_like(whole), dict[str, Tensor]()
        for rows in (slice(0, 1), slice(1, 4), slice(4, None)):
            part, of_part = _both(
                call,
                tuple(value[rows] for value in given),
                {key: value[rows] for key, value in columns.items()},
                8.0,
                where,
            )
            parts = parts + part
            part_sums = {key: part_sums.get(key, 0) + value for key, value in of_part.items()}
        _require(
            torch.allclose(parts, whole, **near),
            f"{where}: micro-batches do not add up: {float(parts.detach()):g} in parts of the same "
            f"denominator, {float(whole.detach()):g} as a whole; divide by denominator, and by nothing "
            "that the rows count",
        )
        for key, value in sums.items():
            _require(
                key in part_sums and torch.allclose(part_sums[key].to(value), value, **near),
                f"{where}: statistic {key!r} of micro-batches does not add up; give sums, no means",
            )
        halved, _ = _both(call, given, columns, 16.0, where)
        _require(
            torch.allclose(2 * halved, whole, **near),
            f"{where}: twice the denominator does not give half the loss",
        )
        order = torch.randperm(len(given[0]), generator=torch.Generator().manual_seed(1))
        moved, _ = _both(
            call,
            tuple(value[order] for value in given),
            {key: value[order] for key, value in columns.items()},
            8.0,
            where,
        )
        _require(torch.allclose(moved, whole, **near), f"{where}: depends on the order of rows")


def _batches() -> list[tuple[str, Tensor, Tensor]]:
    """What the groups are like, prompts and rewards."""
    ragged = torch.tensor([7, 3, 7, 7, 3, 9, 7, 9, 3, 3])
    random_N = torch.rand(
        len(ragged), dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    return [
        ("groups of 4, 4 and 2 whose rows are mixed", ragged, (random_N > 0.5).double()),
        ("rewards of any size, below 0 too", ragged, 100 * random_N - 70),
        ("groups of 1, 1 and 3", torch.tensor([5, 2, 2, 8, 2]), random_N[:5]),
        ("one rollout", torch.tensor([4]), random_N[:1]),
        ("all rewards equal", ragged, torch.full_like(random_N, 0.7)),
        ("all rewards 0", ragged, torch.zeros_like(random_N)),
    ]


def _columns(
    function: Callable[..., Any], prompt_N: Tensor, reward_N: Tensor, settings: dict[str, Any]
) -> dict[str, Tensor]:
    """Those columns that the function names, made up."""
    generator = torch.Generator().manual_seed(len(prompt_N))
    num_rows = len(prompt_N)
    length_N = torch.randint(1, TOKENS + 1, (num_rows,), generator=generator)
    mask_NT = torch.arange(TOKENS) < length_N[:, None]
    made_up = {
        "reward_N": reward_N,
        "reward_NF": torch.stack([reward_N, 1 - reward_N], dim=1),
        "success_N": (reward_N > 0.5).double(),
        "prompt_N": prompt_N,
        "length_N": length_N,
        "truncated_N": length_N == TOKENS,
        "stratum_N": torch.arange(num_rows) % 2,
        "seed_N": torch.arange(num_rows),
        "mask_NT": mask_NT,
        "token_NT": torch.randint(0, 9, (num_rows, TOKENS), generator=generator),
        "logprob_NT": torch.where(
            mask_NT, -torch.rand(num_rows, TOKENS, generator=generator).double(), 0.0
        ),
    }
    first = [*inspect.signature(function).parameters][:2]
    made_up["reference_logprob_NT"] = 1.1 * made_up["logprob_NT"]
    made_up["entropy_NT"] = -0.5 * made_up["logprob_NT"]
    made_up["heterogeneity_NT"] = made_up["entropy_NT"] - made_up["entropy_NT"].mean()
    names = inspect.signature(function).parameters
    return {n: v for n, v in made_up.items() if n in names and n not in (*first, *settings)}


def _decisions(
    loss: Callable[..., Any], settings: dict[str, Any], dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """What a loss is given in its first places, and the columns that it names."""
    generator = torch.Generator().manual_seed(3)
    prompt_N = torch.tensor([7, 3, 7, 7, 3, 9])
    old_NT = -2 * torch.rand(6, TOKENS, generator=generator).to(dtype)
    logprob_NT = old_NT + 0.4 * torch.randn(6, TOKENS, generator=generator).to(dtype)
    columns = _columns(loss, prompt_N, (torch.arange(6) % 2).double(), settings)
    first = [*inspect.signature(loss).parameters][:4]
    columns = {name: value for name, value in columns.items() if name not in first}
    length_N = torch.tensor([4, 2, 3, 1, 4, 2])
    mask_NT = torch.arange(TOKENS) < length_N[:, None]
    if "mask_NT" in columns:
        columns["mask_NT"] = mask_NT
    if "length_N" in columns:
        columns["length_N"] = length_N
    weight_NT = torch.where(mask_NT, 1 / length_N[:, None], 0.0).to(dtype)
    advantage_N = torch.tensor([1.0, -0.5, 0.25, 2.0, -1.0, 0.75], dtype=dtype)
    zero = torch.zeros((), dtype=dtype)
    logprob_NT, old_NT = (torch.where(mask_NT, value, zero) for value in (logprob_NT, old_NT))
    return (logprob_NT.requires_grad_(), old_NT, advantage_N, weight_NT), columns


def _both(
    call: Callable[..., Any],
    given: tuple[Tensor, ...],
    columns: dict[str, Tensor],
    denominator: float,
    where: str,
) -> tuple[Tensor, dict[str, Tensor]]:
    found = call(*given, denominator=denominator, **columns)
    _require(
        isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], dict),
        f"{where}: must return the loss and a dict of sums of statistics, which may be empty",
    )
    loss, sums = found
    _require(
        isinstance(loss, Tensor) and loss.ndim == 0 and loss.dtype.is_floating_point,
        f"{where}: the loss must be a scalar of floats",
    )
    _require(bool(loss.isfinite()), f"{where}: is not finite: {float(loss.detach())}")
    for key, value in sums.items():
        scalar = isinstance(value, Tensor) and value.ndim == 0
        _require(scalar, f"{where}: statistic {key!r} must be a tensor of one number")
    return loss, {key: value.detach() for key, value in sums.items()}


def _name(function: Callable[..., Any]) -> str:
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def _require(holds: bool, message: str) -> None:
    """An assertion that `python -O` keeps."""
    if not holds:
        raise AssertionError(message)
