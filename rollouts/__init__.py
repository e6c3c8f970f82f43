"""What the policy did: batches of rollouts, the engines that generate them, their rewards.

from rollouts import Prompt, TokenRollouts, TransformersEngine, check_engine
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names for editors and type checkers
    from rollouts.batch import DenoisingRollouts, Rollouts, TokenRollouts
    from rollouts.diffusion.engine import DiffusersEngine
    from rollouts.engines.check import check_engine
    from rollouts.engines.contract import Engine, SamplingParams
    from rollouts.engines.transformers import TransformersEngine
    from rollouts.prompts import Prompt
    from rollouts.rewards.verdicts import check_verdicts

__distribution__ = "apportion"
__all__ = [
    "DenoisingRollouts",
    "DiffusersEngine",
    "Engine",
    "Prompt",
    "Rollouts",
    "SamplingParams",
    "TokenRollouts",
    "TransformersEngine",
    "check_engine",
    "check_verdicts",
]

_MODULE_OF = {
    "DenoisingRollouts": "batch",
    "DiffusersEngine": "diffusion.engine",
    "Engine": "engines.contract",
    "Prompt": "prompts",
    "Rollouts": "batch",
    "SamplingParams": "engines.contract",
    "TokenRollouts": "batch",
    "TransformersEngine": "engines.transformers",
    "check_engine": "engines.check",
    "check_verdicts": "rewards.verdicts",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'rollouts' has no attribute {name!r}")
    try:
        module = import_module(f"rollouts.{_MODULE_OF[name]}")
    except ModuleNotFoundError as error:
        extra = "diffusion" if "diffusion" in _MODULE_OF[name] else "train"
        raise ImportError(
            f"rollouts.{name} needs {error.name}: pip install 'apportion[{extra}]'"
        ) from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
