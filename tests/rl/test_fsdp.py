"""FSDP2 on two CPU processes does what one process does, stops together and resumes.

accelerate shards with FSDP2 on accelerators only, so the launched script tells it that its CPU
processes are such (`launched.sharded_without_gpu`); everything after that is its own code and torch's,
with gloo. What a CPU cannot show: overlap of communication, bf16 sharding, offload to the host.
"""

import pytest
import torch

from tests import tiny
from tests.launched import (
    CONFIGS,
    RUNS,
    SHARDED,
    SHARDED_ON_CPU,
    assert_same,
    errors_of,
    launch,
    on_one_process,
    weights,
)

pytestmark = pytest.mark.slow


def test_fsdp2_does_what_one_process_does_and_resumes(tmp_path):
    runs = {name: SHARDED_ON_CPU | RUNS[name] for name in SHARDED}
    small, broken = runs["small"], tmp_path / "broken"
    done = launch(
        *[(tmp_path / name, settings) for name, settings in runs.items()],
        (broken, small | {"fault": "generation@3"}),
        (broken, small | {"resume_from_checkpoint": "true"}),
        flags=("--config_file", str(CONFIGS / "fsdp2.yaml"), "--mixed_precision", "no"),
    )
    assert done.returncode == 0, errors_of(done)
    assert done.stdout.count("world size 2") == 2 * (len(runs) + 1)
    assert done.stdout.count("trained as FSDP FSDPQwen3ForCausalLM") == 2 * (len(runs) + 1)
    for name in SHARDED:
        on_one_process(tmp_path / "one" / name, name)
        assert_same(tmp_path / name, tmp_path / "one" / name)

    assert "rank 1 failed, all stop: MemoryError: no memory for generation" in done.stdout
    assert tiny.lines(broken) == tiny.lines(tmp_path / "small")
    for name, value in weights(tmp_path / "small").items():
        assert torch.equal(value, weights(broken)[name])
