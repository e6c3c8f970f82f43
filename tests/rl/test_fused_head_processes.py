"""The fused head through the wrappers of several processes: the gradients of one process.

Run as a script, `python tests/rl/test_fused_head_processes.py RANK FILE PART`, this is one of two
processes that compute them.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rl.logprobs.from_hidden import fused_logprobs, refusal
from rl.logprobs.from_logits import completion_logprobs
from rollouts.batch import TokenRollouts
from tests.tiny_lm import PAD, VOCABULARY, tiny_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]

WRAPPINGS = {
    "plain": {},
    "find_unused": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
}


def rollouts():
    mask = ((1, 1, 1, 1), (1, 1, 0, 0), (1, 0, 0, 1), (1, 0, 0, 0))
    mask_NT = torch.tensor(mask, dtype=torch.bool)
    generator = torch.Generator().manual_seed(1)
    return TokenRollouts(
        prompt_N=torch.tensor([0, 2, 1, 0]),
        mask_NT=mask_NT,
        logprob_NT=torch.zeros(mask_NT.shape),
        version=0,
        token_NT=torch.randint(2, VOCABULARY, mask_NT.shape, generator=generator),
        truncated_N=torch.zeros(len(mask_NT), dtype=torch.bool),
        seed_N=torch.arange(len(mask_NT)),
        prompt_ids=((4, 8, 6), (3,), (5, 5, 2, 9, 7)),
    )


def tied():
    """In float64, with one matrix for input embeddings and head."""
    model = tiny_model("qwen3").double()
    model.lm_head.weight = model.get_input_embeddings().weight
    return model


def untied():
    model = tiny_model("qwen3").double()
    model.lm_head = nn.Linear(32, VOCABULARY, bias=False).double()
    return model


def rows_of(rank):
    return torch.tensor(((0, 3), (1, 2))[rank])


def backward_of_half(model, rank):
    """The loss of half the rows; wrappers average gradients over two processes."""
    batch = rollouts().take(rows_of(rank))
    (fused_logprobs(model, batch, temperature=0.7, pad_id=PAD).sum() * 2).backward()


def data_parallel(rank):
    from torch.nn.parallel import DistributedDataParallel

    found = {}
    for name, settings in WRAPPINGS.items():
        model = DistributedDataParallel(tied(), **settings)
        assert refusal(model) is None
        batch = rollouts()
        rows = rows_of(rank).split(1)
        if name == "static_graph":  # which does not allow for a micro-batch without reduction
            rows = rows_of(rank).split(2)
        for i, row in enumerate(rows):
            model.require_backward_grad_sync = i == len(rows) - 1
            values = fused_logprobs(model, batch.take(row), temperature=0.7, pad_id=PAD)
            (values.sum() * 2).backward()
        found[name] = {n: p.grad for n, p in model.module.named_parameters()}
    return found


def fully_sharded(rank):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    model = tied()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert refusal(model) is None
    backward_of_half(model, rank)
    found = {"fsdp2": {n: p.grad.full_tensor() for n, p in model.named_parameters()}}

    model = untied()
    fully_shard(model.lm_head)  # which gathers and lets go of the head by itself
    fully_shard(model)
    assert refusal(model) is None
    backward_of_half(model, rank)
    found["head"] = model.lm_head.weight.grad.full_tensor()

    inner = tied()
    model = FullyShardedDataParallel(inner, device_id=torch.device("cpu"), use_orig_params=True)
    assert refusal(model) is None
    backward_of_half(model, rank)
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        found["fsdp1"] = {n: p.grad.clone() for n, p in inner.named_parameters()}
    return found


def mixed_precision():
    from accelerate import Accelerator

    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare(tied().float())
    with torch.no_grad():
        fused = fused_logprobs(prepared, rollouts(), pad_id=PAD)
        plain = completion_logprobs(prepared, rollouts(), pad_id=PAD)
    return {"bf16": (fused, plain), "wrapper": type(prepared).__name__}


def zero3(rank):
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    model = tied().float()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=config
    )
    assert model.lm_head.weight.numel() == 0  # the weight is away
    assert refusal(engine) is None
    batch = rollouts().take(rows_of(rank))
    engine.backward(fused_logprobs(engine, batch, temperature=0.7, pad_id=PAD).sum() * 2)
    return {"zero3": {n: safe_get_full_grad(p) for n, p in model.named_parameters()}}


def worker(rank, file, part):
    import torch.distributed as dist

    dist.init_process_group("gloo", rank=rank, world_size=2)
    if part == "zero3":
        found = zero3(rank)
    else:
        found = data_parallel(rank) | fully_sharded(rank) | mixed_precision()
    if rank == 0:
        torch.save(found, file)
    dist.barrier()
    dist.destroy_process_group()


def on_two_processes(folder, part):
    """What process 0 found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"}
    environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    file = str(folder / "found.pt")
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), file, part],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)[-3000:]
    return torch.load(file)


def gradients_of_one_process(model):
    completion_logprobs(model, rollouts(), temperature=0.7, pad_id=PAD).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_two_processes_give_the_gradients_of_one(tmp_path):
    found = on_two_processes(tmp_path, "torch")
    expected = gradients_of_one_process(tied())
    for name in (*WRAPPINGS, "fsdp2", "fsdp1"):
        assert found[name].keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[name][key], value, atol=1e-10, rtol=0)
    head = gradients_of_one_process(untied())["lm_head.weight"]
    torch.testing.assert_close(found["head"], head, atol=1e-10, rtol=0)
    assert found["wrapper"] == "DistributedDataParallel"
    torch.testing.assert_close(*found["bf16"], atol=1e-4, rtol=0)


def test_zero_3_gives_the_gradients_of_one_process(tmp_path):
    pytest.importorskip("deepspeed")
    found = on_two_processes(tmp_path, "zero3")["zero3"]
    expected = gradients_of_one_process(tied().float())
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-4, rtol=0)


if __name__ == "__main__":
    worker(int(sys.argv[1]), *sys.argv[2:])
