"""Deal work to ranks, gather rows, balance by tokens: the only file that knows ranks.

Decisions are made from gathered columns, identically on every rank, so that one process, several
processes and any micro-batch size give the same update. A rank that fails says so at the next gather,
and all stop there. Axes: P prompts, N rollouts, R requests.
"""

from __future__ import annotations

import heapq
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from trl.models.utils import unwrap_model_for_generation


def leave() -> None:
    """Leave the other processes at the end of a script; nothing to do where there are none.

    Gloo's threads outlive `destroy_process_group` and let go of the last collective's tensors in their
    own time. One that does so while Python shuts down aborts a process whose work is done, which was
    seen on a busy machine (pytorch/pytorch#179291); a second is far longer than they need.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        time.sleep(1.0)


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


def chunks_of_budgets(
    budget_P: np.ndarray,
    num_ranks: int,
    length_P: np.ndarray | None = None,
    together: int = 1,
) -> list[np.ndarray]:
    """Rows of a proposal, cut into the requests that are dealt to ranks.

    A request is one prompt's rollouts (they share a prefill), cut where a single prompt would
    outweigh a quarter of a rank's fair share.

    Args:
        budget_P: (P,) rollouts of each prompt.
        num_ranks: ranks to deal to. One rank gets whole prompts.
        length_P: (P,) expected tokens of one rollout of each prompt, positive. Default: all equal.
        together: rows that must not be parted: a request's are a multiple of it, as budgets are.
    """
    length_P = np.ones(len(budget_P)) if length_P is None else length_P
    share = float(budget_P @ length_P) / (4 * num_ranks)
    requests = []
    first = 0
    for budget, length in zip(budget_P.tolist(), length_P.tolist(), strict=True):
        most = max(1, math.ceil(share / length) if num_ranks > 1 else budget)
        most = -(-most // together) * together
        rows = np.arange(first, first + budget)
        requests += [rows[start : start + most] for start in range(0, budget, most)]
        first += budget
    return requests


class Ranks:
    """What the rest of the project may ask of the processes it runs on.

    Args:
        accelerator: of the processes.
        by_hand: reduce gradients here and not by a wrapper, because the forward pass does not go
            through it: a diffusers pipeline runs the module itself.

    Raises:
        ValueError: for a set-up whose model could not be saved or generated with.
    """

    def __init__(self, accelerator: Accelerator, *, by_hand: bool = False) -> None:
        self._accelerator = accelerator
        self._by_hand = by_hand and accelerator.num_processes > 1
        self._held: Exception | None = None
        # Apart from the work, so that a question after an error meets no collective of it.
        apart = accelerator.num_processes > 1 and torch.distributed.is_initialized()
        self._apart = torch.distributed.new_group(backend="gloo") if apart else None
        self.num = accelerator.num_processes
        self.rank = accelerator.process_index
        refuse_unusable(accelerator)
        plain = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
        if by_hand and accelerator.distributed_type not in plain:
            raise ValueError(
                f"a diffusion model trains on several processes with DDP, not with "
                f"{accelerator.distributed_type.value}: choose another configuration of accelerate"
            )

    @property
    def _zero_stage(self) -> int:
        """Of DeepSpeed; 0 without it."""
        deepspeed = _is_deepspeed(self._accelerator)
        return self._accelerator.state.deepspeed_plugin.zero_stage if deepspeed else 0

    @property
    def is_sharded(self) -> bool:
        """Whether no process has the whole model."""
        return self._zero_stage == 3 or (self._accelerator.distributed_type == DistributedType.FSDP)

    @property
    def computes_in_half(self) -> bool:
        """Whether the model computes in bfloat16 or float16, whatever its weights are."""
        return self._accelerator.mixed_precision != "no"

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, item: Any, *, error: Exception | None = None) -> list[Any]:
        """`item` of every rank, in rank order, on every rank; all raise if one brings an error.

        Args:
            item: anything that can be pickled.
            error: why this rank has no item. It is raised here; the others raise its text.

        Raises:
            RuntimeError: on the other ranks, naming the rank that failed and its error.
        """
        error, self._held = self._held or error, None
        text = None if error is None else f"{type(error).__name__}: {error}"
        rows = gather_object([(text, item)]) if self.num > 1 else [(text, item)]
        if error is not None:
            raise error
        for rank, (text, _) in enumerate(rows):
            if text is not None:
                raise RuntimeError(f"rank {rank} failed, all stop: {text}")
        return [item for _, item in rows]

    def from_main(self, make: Callable[[], Any]) -> Any:
        """`make()` of the main process, on every rank; all raise if it raises."""
        item, error = None, None
        try:
            item = make() if self.is_main else None
        except Exception as caught:
            error = caught
        return self.gather(item, error=error)[0]

    def share_of(
        self, budget_P: np.ndarray, length_P: np.ndarray | None = None, *, together: int = 1
    ) -> np.ndarray:
        """Rows of a proposal that this rank generates, increasing; the longest expected are dealt first.

        Args:
            budget_P: (P,) rollouts of each prompt.
            length_P: (P,) expected tokens of one rollout of each prompt. Default: all equal.
            together: rows that must not be parted, such as the leaves of a branch.
        """
        length_P = np.ones(len(budget_P)) if length_P is None else np.maximum(length_P, 1.0)
        requests = chunks_of_budgets(budget_P, self.num, length_P, together)
        length_N = np.repeat(length_P, budget_P)
        rank_R = deal([float(length_N[rows].sum()) for rows in requests], self.num)
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
        if loss_sum.requires_grad or not self._by_hand:  # rows of weight 0 are not even replayed
            accelerator.backward(loss_sum * self.num)
        if is_last and self._by_hand:
            for weight in model.parameters():
                if weight.requires_grad:
                    if weight.grad is None:
                        weight.grad = torch.zeros_like(weight)
                    torch.distributed.all_reduce(weight.grad)
                    weight.grad /= self.num

    def micro_batch(self, model: torch.nn.Module, *, is_last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch: no reduction before the last one."""
        if is_last or self.num == 1 or _is_deepspeed(self._accelerator):
            return nullcontext()
        return self._accelerator.no_sync(model)

    @contextmanager
    def unwrapped(self, model: torch.nn.Module) -> Iterator[PreTrainedModel]:
        """The model to generate with: no wrapper, sharded weights gathered, activations not saved.

        Every rank enters and leaves; inside, each may run the model as often as it likes.

        Args:
            model: as it is trained.
        """
        with ExitStack() as stack:
            # Before TRL sees it, who would turn it on again for all layers, not every n-th.
            stack.enter_context(_activations_not_saved(model))
            if self._zero_stage == 3 and hasattr(model, "optimizer"):  # not before training
                stack.enter_context(_without_step_hook(model))
            with warnings.catch_warnings():  # TRL 1.16 asks transformers 5 by the old name
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
                policy = stack.enter_context(unwrap_model_for_generation(model, self._accelerator))
            if self._accelerator.distributed_type == DistributedType.FSDP:
                plugin = self._accelerator.state.fsdp_plugin
                stack.enter_context(whole(policy, reshard=bool(plugin.reshard_after_forward)))
            yield policy

    def fail_together(self, error: Exception | None) -> None:
        """Raise `error` here and its text everywhere, so that no rank waits for a failed one."""
        self.gather(None, error=error)

    @contextmanager
    def together(self) -> Iterator[None]:
        """All ranks leave this block together, or all raise."""
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        self.fail_together(error)

    def all_say(self, answer: bool, *, seconds: float = 20.0) -> bool:
        """Whether every rank comes here in time and says yes; to be asked while an error is handled.

        A rank that failed alone finds the others elsewhere: it waits so long, and the answer is no.
        """
        if self.num == 1 or self._apart is None:
            return answer and self.num == 1
        answers: list[Any] = [None] * self.num
        try:
            wait = timedelta(seconds=seconds)
            torch.distributed.monitored_barrier(self._apart, timeout=wait)
            torch.distributed.all_gather_object(answers, answer, group=self._apart)
        except RuntimeError:
            return False
        return all(answers)

    @contextmanager
    def until_gather(self) -> Iterator[None]:
        """An error in this block is raised at the next gather, on all ranks; by one process, at once.

        For checks between collectives that nothing may skip, such as the reduction of gradients: what
        lies between the check and the gather goes on with values that are not to be used.
        """
        try:
            yield
        except Exception as error:
            if self.num == 1:
                raise
            self._held = self._held or error


@contextmanager
def _activations_not_saved(model: torch.nn.Module) -> Iterator[None]:
    """Activation checkpointing off, after which each module has it as before."""
    modules: Any = model.modules()  # any of them may have the attribute
    saving = [module for module in modules if getattr(module, "gradient_checkpointing", False)]
    for module in saving:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in saving:
            module.gradient_checkpointing = True


@contextmanager
def _without_step_hook(engine: Any) -> Iterator[None]:
    """No collective at the beginning of a forward pass of a ZeRO-3 model, as ranks may differ in them.

    DeepSpeed compares the order of modules over ranks there until it knows it. TRL 1.16 takes the
    other hooks of ZeRO-3 off for generation, not this one.
    """
    offload = engine.optimizer.parameter_offload
    offload.fwd_pre_hook.remove()
    try:
        yield
    finally:
        offload.fwd_pre_hook = offload.module.register_forward_pre_hook(
            lambda *_: offload.get_param_coordinator().reset_step(), prepend=True
        )


@contextmanager
def whole(model: torch.nn.Module, *, reshard: bool) -> Iterator[None]:
    """The weights of an FSDP2 model whole on every rank, so that ranks may differ in what they run.

    Args:
        model: the outermost module.
        reshard: whether inner modules give their weights up after a forward pass again afterwards.
    """
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(reshard and module is not model, recurse=False)
            module.reshard()


def refuse_unusable(accelerator: Accelerator) -> None:
    """Raise for a set-up that would train for hours and could then not be saved or resumed.

    Raises:
        ValueError: saying what to write in the configuration of accelerate.
    """
    if _is_deepspeed(accelerator):
        plugin = accelerator.state.deepspeed_plugin
        zero = plugin.deepspeed_config["zero_optimization"]
        if plugin.zero_stage == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
            raise ValueError(
                "ZeRO-3 writes the trained model only with zero3_save_16bit_model: true "
                "(stage3_gather_16bit_weights_on_model_save in a configuration of DeepSpeed's own)"
            )
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ValueError(
                f"FSDP {plugin.fsdp_version} cannot generate rollouts; write fsdp_version: 2"
            )
        if "FULL" not in str(plugin.state_dict_type):
            raise ValueError(
                f"checkpoints of {plugin.state_dict_type} are indexed by a pickle, and nothing that "
                "can execute is ever loaded; write fsdp_state_dict_type: FULL_STATE_DICT"
            )


def _is_deepspeed(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.DEEPSPEED
