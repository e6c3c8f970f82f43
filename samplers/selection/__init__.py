"""Selection: which prompts are rolled out next. Axes: D prompts of the data set, P chosen."""

from samplers.selection.bands import OnlineBandSelector, StaticBandSelector
from samplers.selection.diverse import DiverseSelector
from samplers.selection.retirement import RetiringSelector
from samplers.selection.selectors import (
    PosteriorMeanSelector,
    Selector,
    ThompsonSelector,
    UniformSelector,
    mopps,
)

__all__ = [
    "DiverseSelector",
    "OnlineBandSelector",
    "PosteriorMeanSelector",
    "RetiringSelector",
    "Selector",
    "StaticBandSelector",
    "ThompsonSelector",
    "UniformSelector",
    "mopps",
]
