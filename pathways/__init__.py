"""The search space of distillation pathways, usable with any nn.Module and without distpro."""

from pathways.connections import connect
from pathways.distances import DISTANCES
from pathways.probing import find_stages, probe_shapes
from pathways.registry import Registry, UserError
from pathways.space import Pathway, build_pathways
from pathways.tapped import Tapped
from pathways.taps import Taps, tap
from pathways.transforms import TRANSFORMS

__all__ = [
    "DISTANCES",
    "TRANSFORMS",
    "Pathway",
    "Registry",
    "Tapped",
    "Taps",
    "UserError",
    "build_pathways",
    "connect",
    "find_stages",
    "probe_shapes",
    "tap",
]
