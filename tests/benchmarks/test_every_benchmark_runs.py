"""Every benchmark runs through at its smallest size and leaves the recorded results alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks"

COMMANDS = {
    "allocation_arms": ["benchmarks/allocation_arms.py", "--quick"],
    "diffusion": ["benchmarks/diffusion.py", "--quick", "--output", "{folder}/diffusion.json"],
    "engine": ["benchmarks/engine.py", "--quick"],
    "image_arms": ["benchmarks/image_arms.py", "--quick"],
    "processes": ["-m", "benchmarks.processes", "--quick", "--rounds", "1"],
    "recipe_arms": ["benchmarks/recipe_arms.py", "--quick"],
    "samplers": ["benchmarks/samplers.py", "--quick", "--rounds", "1"],
    "search": ["benchmarks/search.py", "--quick"],
    "to_level": ["-m", "benchmarks.to_level", "quick"],
    "trace": ["benchmarks/trace.py", "--quick"],
    "update": ["benchmarks/update.py", "--quick", "--rounds", "1"],
}


def results():
    return {path.name: path.read_bytes() for path in (FOLDER / "results").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark_runs_through(name, tmp_path):
    before = results()
    command = [word.format(folder=tmp_path) for word in COMMANDS[name]]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()
    assert results() == before


def test_no_benchmark_is_left_out():
    scripts = {
        path.stem
        for path in FOLDER.glob("*.py")
        if 'if __name__ == "__main__":' in path.read_text()
    }
    assert scripts == set(COMMANDS)
