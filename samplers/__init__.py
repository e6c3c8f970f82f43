"""Samplers of work: which prompts are rolled out, how many times each, and where it all went.

    from samplers import Planner, BetaPosterior, allocation, selection

Nothing here generates text or images, and nothing here imports anything but NumPy and the standard
library, so the package loads in milliseconds inside any worker. Everything is float64, on the host.
NumPy is imported when something needs it, and not by the name of the package.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from samplers.ours import check_ours

if TYPE_CHECKING:  # the same names for editors and type checkers
    from samplers import allocation, downsampling, selection, stopping
    from samplers.check import check_sampler
    from samplers.ledger import Ledger
    from samplers.planner import Planner
    from samplers.posterior import BetaPosterior
    from samplers.saving import load_state, save_state

__distribution__ = "apportion"
__all__ = [
    "BetaPosterior",
    "Ledger",
    "Planner",
    "allocation",
    "check_sampler",
    "downsampling",
    "load_state",
    "save_state",
    "selection",
    "stopping",
]

_MODULE_OF = {
    "BetaPosterior": "posterior",
    "Ledger": "ledger",
    "Planner": "planner",
    "check_sampler": "check",
    "load_state": "saving",
    "save_state": "saving",
}
_MODULES = ("allocation", "downsampling", "selection", "stopping")

check_ours("rollouts", "prompts.py")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"samplers.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'samplers' has no attribute {name!r}")
    return getattr(import_module(f"samplers.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
