"""From a config to teacher and student, and to where each of them may be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from distpro import distributed
from distpro.config import Config, ModelConfig
from distpro.data.datasets import locate
from distpro.models import build_model, load_checkpoint, stage_taps
from distpro.models.ensemble import Ensemble, InputAdapter
from pathways import find_stages, probe_shapes
from pathways.registry import UserError
from pathways.taps import LOGITS, check_taps


@dataclass(frozen=True)
class Reading:
    """Where one model may be read.

    Attributes:
        stages: taps after its stages, shallow to deep.
        before_relu: the same before their last ReLU, where they end in one.
        embedding: tap of what enters the classifier, if it was found.
        classifier: the last linear layer, if there is one.
        logits: tap of the model's own output.
        path: where the model is a child of another, its path there.
    """

    stages: Sequence[str]
    before_relu: Sequence[str]
    embedding: str | None = None
    classifier: nn.Linear | None = None
    logits: str = LOGITS
    path: str = ""

    def within(self, path: str) -> Reading:
        """The same places of a model that is the child ``path`` of another."""
        return replace(
            self,
            stages=[f"{path}.{tap}" for tap in self.stages],
            before_relu=[f"{path}.{tap}" for tap in self.before_relu],
            embedding=None if self.embedding is None else f"{path}.{self.embedding}",
            logits=path if self.logits == LOGITS else f"{path}.{self.logits}",
            path=f"{path}.{self.path}" if self.path else path,
        )

    def own(self, taps: Sequence[str]) -> list[str]:
        """Taps that are named within this model."""
        return [self.logits if tap == LOGITS else f"{self.path}.{tap}" if self.path else tap for tap in taps]

    def taps(self, kinds: Sequence[str], before_relu: bool) -> list[str]:
        """Taps of the kinds that a loss reads: of ``stages``, ``last``, ``embedding``, ``logits``.
        Raises UserError where the model has no such place that is known."""
        stages = list(self.before_relu if before_relu else self.stages)
        found: list[str] = []
        for kind in kinds:
            if kind == "embedding" and self.embedding is None:
                raise UserError("reads an embedding: name student_taps and teacher_taps (for instance fc:input)")
            places: dict[str, list[str | None]] = {
                "stages": [*stages],
                "last": [*stages[-1:]],
                "embedding": [self.embedding],
                "logits": [self.logits],
            }
            found += [tap for tap in places[kind] if tap is not None]
        return found


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


def device_of(config: Config) -> torch.device:
    """The config's device; ``auto`` is CUDA if there is one. Raises UserError for one that is not there."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    name = f"cuda:{distributed.local_rank()}" if name == "cuda" and distributed.world_size() > 1 else name
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device: '{name}' is no device (allowed: auto, cpu, cuda, cuda:N)") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device: '{name}' asked for, but CUDA is not available here")
    return device


def fastest_precision(device: torch.device, searching: bool = False) -> str:
    """bfloat16 where the device computes in it; else float16 on a GPU, but float32 for a search, which loss scaling would
    disturb; else float32."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16"
        return "float32" if searching else "float16"
    native = any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile"))
    return "bfloat16" if device.type == "cpu" and native else "float32"


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


def reading_of(config: ModelConfig, model: nn.Module, x: Tensor) -> Reading:
    """The places that the config names; else those that the model states; else its stages as found by a probe."""
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    stated = stage_taps(model)
    last, classifier = linear[-1] if linear else (None, None)
    embedding = stated.embedding if stated is not None else f"{last}:input" if last else None
    if config.taps is not None:
        check_taps(model, config.taps, config.model)
        return Reading(config.taps, config.taps, embedding, classifier)
    if stated is not None:
        return Reading(stated.post, stated.pre, embedding, classifier)
    stages = find_stages(model, x)
    return Reading(stages, [_before_relu(model, tap, x) for tap in stages], embedding, classifier)


def _before_relu(model: nn.Module, tap: str, x: Tensor) -> str:
    try:
        probe_shapes(model, [f"{tap}:pre_relu"], x)
        return f"{tap}:pre_relu"
    except UserError:
        return tap


def norm_before(model: nn.Module, tap: str, x: Tensor) -> nn.BatchNorm2d | None:
    """The BatchNorm whose output a tap before a ReLU is, or is the sum of with a shortcut: the tapped module itself, or
    the last one of the tapped module that runs."""
    path = tap.partition(":")[0]
    module = model.get_submodule(path)
    ran: list[nn.BatchNorm2d] = []
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]

    def note(norm: nn.BatchNorm2d, *_: Any) -> None:
        ran.append(norm)

    handles = [m.register_forward_hook(note) for m in norms]
    try:
        probe_shapes(model, [tap], x)
    finally:
        for handle in handles:
            handle.remove()
    return ran[-1] if ran else None
