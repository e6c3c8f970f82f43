"""Every topology under recipes/accelerate is what its name says, and the CPU one really starts two."""

import re

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType

from tests.launched import CONFIGS, ON_CPU, ROOT, errors_of, launch

TOPOLOGIES = {
    # file: kind, processes, machines, stage of ZeRO or version of FSDP
    "cpu-2.yaml": (DistributedType.MULTI_GPU, 2, 1, None),
    "gpu-8.yaml": (DistributedType.MULTI_GPU, 8, 1, None),
    "zero2.yaml": (DistributedType.DEEPSPEED, 8, 1, 2),
    "zero3.yaml": (DistributedType.DEEPSPEED, 8, 1, 3),
    "fsdp2.yaml": (DistributedType.FSDP, 8, 1, 2),
    "multi-node.yaml": (DistributedType.DEEPSPEED, 16, 2, 3),
}


def test_every_file_is_listed():
    assert {path.name for path in CONFIGS.glob("*.yaml")} == set(TOPOLOGIES)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_accelerate_reads_what_the_name_says(name):
    config = load_config_from_file(str(CONFIGS / name))  # refuses unknown keys
    kind, processes, machines, level = TOPOLOGIES[name]
    assert config.distributed_type == kind
    assert (config.num_processes, config.num_machines) == (processes, machines)
    assert config.mixed_precision == ("no" if name == "cpu-2.yaml" else "bf16")
    assert not config.use_cpu  # would start a single process
    if kind == DistributedType.DEEPSPEED:
        assert config.deepspeed_config["zero_stage"] == level
        assert config.deepspeed_config["gradient_accumulation_steps"] == 1
        assert config.deepspeed_config.get("zero3_save_16bit_model", False) == (level == 3)
    if kind == DistributedType.FSDP:
        assert config.fsdp_config["fsdp_version"] == level
        assert config.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_sections_hold_arguments_of_accelerate_launch(name):
    """accelerate takes any key inside a section, also a misspelt one."""
    known = {action.dest for action in launch_command_parser()._actions}
    config = load_config_from_file(str(CONFIGS / name))
    for section in (config.deepspeed_config, config.fsdp_config, config.dynamo_config):
        assert set(section) <= known


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_each_file_begins_with_its_launch_line_and_the_readme_has_it(name):
    """The line names the file itself and files that exist."""
    comment = re.match(r"(#.*\n)+", (CONFIGS / name).read_text())[0]
    line = re.search(r"accelerate launch.*?(?=\n# \w|\Z)", comment, re.DOTALL)[0]
    line = re.sub(r"\\?\n#?\s*", "", line)
    assert f"--config_file recipes/accelerate/{name}" in line
    paths = set(re.findall(r"recipes/\S+", line))
    assert "recipes/train.py" in paths
    assert all((ROOT / path).is_file() for path in paths)
    assert f"--config_file recipes/accelerate/{name}" in (CONFIGS / "README.md").read_text()


@pytest.mark.slow
def test_the_cpu_topology_starts_two_processes(tmp_path):
    done = launch(
        (tmp_path, ON_CPU | {"max_steps": 1}), flags=("--config_file", str(CONFIGS / "cpu-2.yaml"))
    )
    assert done.returncode == 0, errors_of(done)
    assert done.stdout.count("world size 2") == 2
