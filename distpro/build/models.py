"""From a config to teacher and student, and to where each of them may be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from distpro.build.device import device_of
from distpro.build.reading import Reading, reading_of
from distpro.config.schema import Config, ModelConfig
from distpro.data.datasets import locate
from distpro.models import build_model, load_checkpoint
from distpro.models.ensemble import Ensemble, InputAdapter
from distpro.train import distributed
from pathways.registry import UserError


@dataclass
class Pair:
    """Teacher and student, and where the config's terms may read them.

    Attributes:
        teacher: None where no term needs one; several teachers are one `Ensemble`.
        teachers: the places of each teacher by its name; a single one has the name "".
        student_reading: the student's places; None where no term needs them.
        example_input: (2, C, H, W).
    """

    teacher: nn.Module | None
    student: nn.Module
    example_input: Tensor
    teachers: Mapping[str, Reading] = field(default_factory=dict)
    student_reading: Reading | None = None

    def teacher_reading(self, name: str | None) -> Reading:
        """The places of a teacher by its name, which only one of several needs. Raises UserError for a wrong one."""
        if name is None and len(self.teachers) > 1:
            raise UserError(f"there are several teachers: say which with teacher (allowed: {', '.join(self.teachers)})")
        if name is not None and name not in self.teachers:
            raise UserError(f"no teacher '{name}' (allowed: {', '.join(filter(None, self.teachers)) or 'none'})")
        return next(iter(self.teachers.values())) if name is None else self.teachers[name]

    @property
    def teacher_taps(self) -> list[str]:
        """Where pathways read the teachers: their stages before the last ReLU."""
        return [tap for reading in self.teachers.values() for tap in reading.before_relu]

    @property
    def student_taps(self) -> list[str]:
        """Where pathways read the student: its stages."""
        return list(self.student_reading.stages) if self.student_reading is not None else []


def build_network(model: ModelConfig, num_classes: int, load: bool = True) -> nn.Module:
    """A model with its checkpoint, if the config names one."""
    classes = {} if "num_classes" in model.params else {"num_classes": num_classes}
    network = build_model(model.model, **classes, **model.params)
    if model.checkpoint and load:
        load_checkpoint(network, locate("checkpoint", model.checkpoint))
    return network


def place(network: nn.Module, config: Config) -> nn.Module:
    """The network on the config's device, in its memory layout."""
    network = network.to(device_of(config))
    return network.to(memory_format=torch.channels_last) if config.channels_last else network


def needs_teacher(config: Config) -> bool:
    """Whether the config has any distillation term."""
    return config.retrain.weights != "none" and bool(config.pathways or config.terms)


def build_pair(
    config: Config,
    num_classes: int,
    image_shape: tuple[int, ...],
    load: bool = True,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    student_state: Mapping[str, Tensor] | None = None,
    teacher_state: Mapping[str, Tensor] | None = None,
) -> Pair:
    """Teachers (if any term needs one) and student, on the device, the student initialised from the seed.

    Args:
        load: read the checkpoints.
        mean, std: of the student's images, for teachers with an ``input`` of their own.
        student_state, teacher_state: weights that are known already, in place of a checkpoint.

    Raises UserError if a teacher has no weights.
    """
    torch.manual_seed(config.seed)
    student = build_network(config.student, num_classes, load)
    if student_state is not None:
        student.load_state_dict(student_state)
    if config.sync_batch_norm and distributed.world_size() > 1:
        distributed.synchronise_batch_norm(student)
    student = place(student, config)
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    x = torch.zeros(2, *image_shape, device=device_of(config)).contiguous(memory_format=memory_format)
    pair = Pair(None, student, x)
    if not needs_teacher(config):
        return pair
    pair.student_reading = reading_of(config.student, student, x)
    models, readings = {}, {}
    for name, member in ({"": config.teacher} if config.teacher else config.teachers).items():
        assert member is not None
        if load and teacher_state is None and member.checkpoint is None and not member.params.get("weights"):
            path = f"teachers.{name}" if name else "teacher"
            raise UserError(f"{path}.checkpoint is missing: a teacher with random weights teaches nothing")
        network = build_network(member, num_classes, load and teacher_state is None)
        if teacher_state is not None:
            network.load_state_dict(teacher_state)
        network = place(network, config).eval()
        readings[name] = reading_of(member, network, _resized(x, member))
        if member.input is not None:
            plain = mean or [0.0] * image_shape[0], std or [1.0] * image_shape[0]
            size = member.input.size
            network = InputAdapter(network, *plain, member.input.mean, member.input.std, size)
            readings[name] = readings[name].within("model")
        models[name] = network
    if config.teachers:
        shares = {name: member.weight for name, member in config.teachers.items()}
        pair.teacher = Ensemble(models, shares, config.combine)
        readings = {name: reading.within(name) for name, reading in readings.items()}
    else:
        (pair.teacher,) = models.values() or (None,)
    if pair.teacher is not None:
        pair.teacher = place(pair.teacher, config).eval()
    pair.teachers = readings
    return pair


def _resized(x: Tensor, member: ModelConfig) -> Tensor:
    if member.input is None or member.input.size is None:
        return x
    size = member.input.size
    height, width = (size, size) if isinstance(size, int) else size
    return x.new_zeros(*x.shape[:2], height, width)
