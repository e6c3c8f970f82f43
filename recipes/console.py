"""What a command prints beside its own lines: messages of libraries, warnings."""

from __future__ import annotations

import logging
import warnings
from typing import Any

NOISE = {
    # The device is printed anyway.
    "DeepSpeed": ("Setting accelerator", "Setting ds_accelerator"),
    # Nothing here uses these classes; diffusers asks for them by name.
    "transformers.utils.import_utils": ("requires torchvision (not installed); falling back",),
    # A pipeline without a VAE or text encoder is saved and read as one.
    "diffusers.pipelines.pipeline_utils": ("=None of type <class 'NoneType'> cannot be saved",),
    # An empty list of modules.
    "diffusers.models.modeling_utils": ("should be kept in float32: []",),
}
"""Logger -> parts of its messages that ask nothing of the user and are not shown."""


def quiet() -> None:
    """Leave out messages of libraries that ask nothing of the user; call it before they are imported."""
    for name, parts in NOISE.items():
        logging.getLogger(name).addFilter(_Without(parts))


class _Without(logging.Filter):
    def __init__(self, parts: tuple[str, ...]) -> None:
        super().__init__()
        self.parts = parts

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(part in message for part in self.parts)


def plain_warnings() -> None:
    """Show a warning as one line; one that is not about use keeps its place in the code."""
    warnings.formatwarning = _plain  # type: ignore[assignment]


def _plain(message: Warning | str, category: type[Warning], *where: Any) -> str:
    if issubclass(category, UserWarning):
        return f"warning: {message}\n"
    return f"{where[0]}:{where[1]}: {category.__name__}: {message}\n"
