"""The only file that knows ranks: deal work, gather rows, balance by tokens.

Decisions are made from gathered columns, identically on every rank, so that one process, several
processes and any micro-batch size give the same update. Axes: N rollouts, R requests.
"""

from __future__ import annotations

import heapq
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from transformers import PreTrainedModel
from trl.models.utils import unwrap_model_for_generation


def deal(cost_R: Sequence[float], num_ranks: int) -> np.ndarray:
    """Rank of each request: longest first, each to the rank with the least work so far.

    The largest load is at most 4/3 - 1/(3 num_ranks) of the best possible (Graham, 1969). Ties go to
    the earlier request and the lower rank, so every rank computes the same answer.

    Args:
        cost_R: (R,) expected cost of each request, finite and non-negative.
        num_ranks: ranks to deal to, at least 1.

    Returns:
        (R,) int64 ranks in [0, num_ranks).
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks must be at least 1, got {num_ranks}")
    work_R = np.asarray(cost_R, dtype=np.float64)
    if not np.isfinite(work_R).all() or (work_R < 0).any():
        raise ValueError(f"cost_R must be finite and non-negative, got {work_R.tolist()}")
    rank_R = np.zeros(len(work_R), dtype=np.int64)
    load = [(0.0, rank) for rank in range(num_ranks)]
    for request in np.argsort(-work_R, kind="stable"):
        lightest, rank = load[0]
        rank_R[request] = rank
        heapq.heapreplace(load, (lightest + work_R[request], rank))
    return rank_R


def chunks_of_budgets(budget_P: np.ndarray, num_ranks: int) -> list[np.ndarray]:
    """Rows of a proposal, cut into the requests that are dealt to ranks.

    A request is one prompt's rollouts (they share a prefill), cut where a single prompt would
    outweigh a quarter of a rank's fair share.
    """
    most = (
        max(1, -(-int(budget_P.sum()) // (4 * num_ranks))) if num_ranks > 1 else int(budget_P.sum())
    )
    first_P = np.cumsum(budget_P) - budget_P
    return [
        np.arange(first + start, first + min(start + most, budget))
        for first, budget in zip(first_P.tolist(), budget_P.tolist(), strict=True)
        for start in range(0, budget, max(most, 1))
    ]


class Ranks:
    """What the rest of the project may ask of the processes it runs on."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.num = accelerator.num_processes
        self.rank = accelerator.process_index

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, item: Any) -> list[Any]:
        """`item` of every rank, in rank order, on every rank."""
        return gather_object([item]) if self.num > 1 else [item]

    def from_main(self, make: Callable[[], Any]) -> Any:
        """`make()` of the main process, on every rank; all raise if it raises."""
        with self.together():
            item = make() if self.is_main else None
        return self.gather(item)[0]

    def share_of(self, budget_P: np.ndarray) -> np.ndarray:
        """Rows of a proposal that this rank generates, increasing."""
        requests = chunks_of_budgets(budget_P, self.num)
        rank_R = deal([len(rows) for rows in requests], self.num)
        mine = [r for r, rank in zip(requests, rank_R, strict=True) if rank == self.rank]
        return np.sort(np.concatenate(mine)) if mine else np.zeros(0, dtype=np.int64)

    def rows_to_train(self, length_N: torch.Tensor) -> torch.Tensor:
        """Rows this rank trains on: as many tokens as on any other rank, longest rows first."""
        rank_N = torch.from_numpy(deal(length_N.tolist(), self.num))
        mine = (rank_N == self.rank).nonzero().flatten()
        return mine[length_N[mine].argsort(descending=True, stable=True)]

    def most(self, count: int) -> int:
        """The largest `count` of any rank: micro-batches every rank must run."""
        return max(self.gather(count))

    def sums(self, statistics: dict[str, float]) -> dict[str, float]:
        """Each statistic summed over ranks."""
        rows = self.gather(statistics)
        names = {name for row in rows for name in row}
        return {name: sum(row.get(name, 0.0) for row in rows) for name in sorted(names)}

    def backward(self, model: torch.nn.Module, loss_sum: torch.Tensor, *, is_last: bool) -> None:
        """Add the gradient of `loss_sum` over all ranks; reduce on the last micro-batch only.

        Wrappers average gradients over ranks, so a sum is multiplied by their number first.
        DeepSpeed reduces by itself and steps its optimizer on the last micro-batch.
        """
        accelerator = self._accelerator
        accelerator.gradient_state._set_sync_gradients(is_last)
        accelerator.backward(loss_sum * self.num)

    def micro_batch(self, model: torch.nn.Module, *, is_last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch: no reduction before the last one."""
        deepspeed = self._accelerator.distributed_type == DistributedType.DEEPSPEED
        if is_last or deepspeed or self.num == 1:
            return nullcontext()
        return self._accelerator.no_sync(model)

    @contextmanager
    def unwrapped(
        self, model: torch.nn.Module, *, checkpointing: dict[str, Any] | None = None
    ) -> Iterator[PreTrainedModel]:
        """The model to generate with: no wrapper, sharded weights gathered, activations not saved.

        Args:
            model: as it is trained.
            checkpointing: settings of activation checkpointing to go back to, if it is on.
        """
        with ExitStack() as stack:
            with warnings.catch_warnings():  # TRL 1.16 asks transformers 5 by the old name
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
                policy = stack.enter_context(
                    unwrap_model_for_generation(
                        model, self._accelerator, gradient_checkpointing_kwargs=checkpointing
                    )
                )
            yield policy

    def fail_together(self, error: BaseException | None) -> None:
        """Raise `error` here and its text everywhere, so that no rank waits for a failed one."""
        texts = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, text in enumerate(texts):
            if text is not None:
                raise RuntimeError(f"rank {rank} failed, all stop: {text}")

    @contextmanager
    def together(self) -> Iterator[None]:
        """All ranks leave this block together, or all raise."""
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        self.fail_together(error)
