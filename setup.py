"""Packages by folder; `recipes` is installed as `apportion_recipes`. Everything else: pyproject.toml.

Other distributions install a top-level `recipes` too (torchtune does), and would overwrite ours.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["samplers", "samplers.*", "rollouts", "rollouts.*", "rl", "rl.*"]),
        *(f"apportion_{name}" for name in find_packages(include=["recipes", "recipes.*"])),
    ],
    package_dir={"apportion_recipes": "recipes"},
)
