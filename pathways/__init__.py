"""The search space of distillation pathways, usable with any nn.Module and without distpro."""

from pathways.call import Call
from pathways.connections import connect
from pathways.distances import DISTANCES
from pathways.layouts import Layout, channels_first, probe_layouts
from pathways.probing import probe_features, probe_shapes
from pathways.registry import Registry, UserError
from pathways.space import Pathway, build_pathways
from pathways.stages import find_stages
from pathways.tapped import Tapped
from pathways.taps import Taps, response_of, tap
from pathways.transforms import TRANSFORMS

__all__ = [
    "DISTANCES",
    "TRANSFORMS",
    "Call",
    "Layout",
    "Pathway",
    "Registry",
    "Tapped",
    "Taps",
    "UserError",
    "build_pathways",
    "channels_first",
    "connect",
    "find_stages",
    "probe_features",
    "probe_layouts",
    "probe_shapes",
    "response_of",
    "tap",
]
