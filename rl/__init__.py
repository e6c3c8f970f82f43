"""How the policy learns: advantages, weights, losses and the trainer around them.

from rl import RolloutTrainer, RolloutConfig
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from samplers.ours import check_ours

if TYPE_CHECKING:  # the same names for editors and type checkers
    from rl.config.diffusion import DenoisingConfig
    from rl.config.language import RolloutConfig
    from rl.denoising_trainer import DenoisingTrainer
    from rl.objective.check import check_advantage, check_loss
    from rl.trainer import RolloutTrainer

__distribution__ = "apportion"
__all__ = [
    "DenoisingConfig",
    "DenoisingTrainer",
    "RolloutConfig",
    "RolloutTrainer",
    "check_advantage",
    "check_loss",
]

_MODULE_OF = {
    "DenoisingConfig": "config.diffusion",
    "DenoisingTrainer": "denoising_trainer",
    "RolloutConfig": "config.language",
    "RolloutTrainer": "trainer",
    "check_advantage": "objective.check",
    "check_loss": "objective.check",
}

check_ours("rollouts", "prompts.py")
if find_spec("torch") is None:
    raise ImportError("rl needs torch: pip install 'apportion[train]'")


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'rl' has no attribute {name!r}")
    try:
        module = import_module(f"rl.{_MODULE_OF[name]}")
    except ModuleNotFoundError as error:
        extra = "diffusion" if name.startswith("Denoising") else "train"
        raise ImportError(
            f"rl.{name} needs {error.name}: pip install 'apportion[{extra}]'"
        ) from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
