"""What a caller hands over as objects, in place of what a config would name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from distpro.build.copying import copied_apart
from distpro.data.foreign import adopt, from_objects
from distpro.task import TASK_PARTS, Task, check_parts
from pathways.registry import UserError

OBJECT = "object:"
"""What a recorded config's ``model`` begins with where the model was handed over as an object."""


@dataclass(frozen=True)
class Given:
    """Objects of the caller's own.

    Attributes:
        data: a loaded data set, see `Given.of`.
        teacher, student: any modules; a student is trained from the weights that it has.
        task: what the models do.
    """

    data: Any = None
    teacher: nn.Module | None = None
    student: nn.Module | None = None
    task: Task | None = None

    @classmethod
    def of(
        cls, data: Any = None, teacher: nn.Module | None = None, student: nn.Module | None = None, task: Any = None
    ) -> Given:
        """Check what was handed over. ``data``: (train, test) or (train, validation, test) of Datasets or DataLoaders, a
        mapping of such parts, or a set that `distpro.data` has loaded. Raises UserError for anything else."""
        for name, model in (("teacher", teacher), ("student", student)):
            if model is not None and not isinstance(model, nn.Module):
                raise UserError(f"{name} is {type(model).__name__}, not a torch.nn.Module")
        if task is not None:
            check_parts(task, "task", TASK_PARTS)
        if isinstance(data, Mapping):
            data = adopt(data)
        if isinstance(data, (tuple, list)):
            if len(data) not in (2, 3):
                raise UserError(f"data holds {len(data)} parts: expected (train, test) or (train, validation, test)")
            data = from_objects(data[0], data[1] if len(data) == 3 else None, data[-1])
        elif data is not None and not hasattr(data, "example"):
            raise UserError(f"data is {type(data).__name__}: expected (train, test) or (train, validation, test)")
        return cls(data, teacher, student, task)

    def copied(self) -> Given:
        """With a copy of the student, which may be trained. Raises UserError for one that cannot be copied."""
        return self if self.student is None else replace(self, student=copied_apart(self.student))

    def overrides(self) -> list[str]:
        """What a config says in place of the names of what was handed over: ``key=object:Type``."""
        keys = {"data.name": self.data, "teacher.model": self.teacher, "student.model": self.student, "task": self.task}
        return [f"{key}={OBJECT}{type(thing).__name__}" for key, thing in keys.items() if thing is not None]


def refuse_object(what: str, name: str) -> None:
    """Raise UserError for a recorded name of something that was handed over as an object, and now is not."""
    if name.startswith(OBJECT):
        raise UserError(f"{what} '{name}' was handed over as an object: hand it over again ({what}=...)")
