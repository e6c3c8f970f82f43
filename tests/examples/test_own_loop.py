"""The loop that README points to runs and learns."""

import subprocess
import sys
from pathlib import Path

import pytest

from examples import own_loop

pytestmark = pytest.mark.slow  # whole runs


def test_it_learns():
    pass_rates = own_loop.main(steps=30)
    assert len(pass_rates) == 31
    # Seeded: .508 at the start and .636 after 30 steps. Hopeless prompts bound it at 10 / 11.
    assert pass_rates[-1] > pass_rates[0] + 0.1


def test_it_runs_as_a_file_from_anywhere_without_being_installed(tmp_path):
    path = Path(own_loop.__file__)
    # -P: neither the folder of the script nor the one it is started in is on the path.
    command = [sys.executable, "-P", str(path)]
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("step 59")
