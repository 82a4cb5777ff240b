"""The config: its schema, how it is read, what is wrong with it, its stages.

Imports process, schedule and pathways' registry; never models, data or training.
"""

from distpro.config.reading import check, for_retrain, merge, presets, read_config
from distpro.config.schema import Config, ModelConfig, TermConfig
from distpro.config.stages import Stage, stages_of

__all__ = [
    "Config",
    "ModelConfig",
    "Stage",
    "TermConfig",
    "check",
    "for_retrain",
    "merge",
    "presets",
    "read_config",
    "stages_of",
]
