"""What a training imports, for processes that are forked from one that has; see `tests.ranks`."""

import torch.distributed  # noqa: F401

import distpro.build
import distpro.runs.commands
import distpro.search  # noqa: F401
