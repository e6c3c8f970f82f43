"""The package must load in milliseconds inside any worker: NumPy and the standard library only."""

import pkgutil
import subprocess
import sys

import samplers

MODULES = sorted(module.name for module in pkgutil.iter_modules(samplers.__path__))


def test_no_module_imports_anything_heavy():
    names = ["samplers", *(f"samplers.{name}" for name in MODULES)]
    program = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
packages = {{name.partition(".")[0] for name in sys.modules}}
known = {{"samplers", "__main__", "cython_runtime"}}  # the last is part of NumPy
third_party = packages - sys.stdlib_module_names - known
print(" ".join(sorted(name for name in third_party if not name.startswith("_"))))
"""
    # -S leaves out what site hooks import; the paths are handed over instead.
    paths = [str(path) for path in sys.path if path]
    run = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {paths!r}\n{program}"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert run.stdout.split() == ["numpy"]


def test_importing_the_package_alone_imports_not_even_numpy():
    program = "import sys, samplers; print('numpy' in sys.modules)"
    paths = [str(path) for path in sys.path if path]
    run = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {paths!r}\n{program}"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert run.stdout == "False\n"
