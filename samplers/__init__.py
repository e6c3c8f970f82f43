"""Samplers of work: which prompts are rolled out, how many times each, and where it all went.

Nothing here generates text or images, and nothing here imports anything but NumPy and the standard
library, so the package loads in milliseconds inside any worker. Everything is float64, on the host.
"""

from typing import Any

__all__ = ["load_state", "save_state"]


def __getattr__(name: str) -> Any:
    # NumPy is imported when something needs it, and not by the name of the package.
    if name not in __all__:
        raise AttributeError(f"module 'samplers' has no attribute {name!r}")
    from samplers import saving

    return getattr(saving, name)
