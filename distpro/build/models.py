"""From a config to teacher and student, and to where each of them may be read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from distpro.batch import Batch
from distpro.build.data import crops, example_of
from distpro.build.device import device_of
from distpro.build.given import Given, refuse_object
from distpro.build.reading import Reading, reading_of
from distpro.build.task import build_task
from distpro.config.schema import Config, ModelConfig
from distpro.console import raised, warn
from distpro.data.datasets import locate
from distpro.data.statistics import Statistics, stated_by, stored_facts
from distpro.models import accepted, build_model, load_checkpoint
from distpro.models.ensemble import Ensemble, InputAdapter
from distpro.task import Task, ask
from distpro.train import distributed
from distpro.train.state import seed_random
from pathways.call import Call
from pathways.layouts import Layout, probe_layouts
from pathways.probing import untouched
from pathways.registry import UserError
from pathways.space import parse_spec
from pathways.taps import LOGITS, check_taps


@dataclass
class Pair:
    """Teacher and student, and where the config's terms may read them.

    Attributes:
        teacher: None where no term needs one; several teachers are one `Ensemble`.
        example: a batch of two samples on the device.
        call: how it meets a model.
        teachers: the places of each teacher by its name; a single one has the name "".
        student_reading: the student's places; None where no term needs them.
        task: says what the response is, whose shape is that of ``logits``; None: as `response_of` finds it.
    """

    teacher: nn.Module | None
    student: nn.Module
    example: Batch
    call: Call
    teachers: Mapping[str, Reading] = field(default_factory=dict)
    student_reading: Reading | None = None
    task: Task | None = None
    _layouts: dict[tuple[str, str], Layout] = field(default_factory=dict)

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
        return [tap for reading in self.teachers.values() for tap in reading.taps(["stages"], before_relu=True)]

    @property
    def student_taps(self) -> list[str]:
        """Where pathways read the student: its stages."""
        return self.student_reading.taps(["stages"], before_relu=False) if self.student_reading is not None else []

    def layouts(self, side: str, taps: Sequence[str]) -> dict[str, Layout]:
        """What each tap of ``teacher`` or ``student`` gives of a sample. What has been probed once is known."""
        model = self.teacher if side == "teacher" else self.student
        unknown = [tap for tap in dict.fromkeys(taps) if (side, tap) not in self._layouts]
        if LOGITS in unknown and model is not None and self.task is not None:
            unknown.remove(LOGITS)
            self._layouts[side, LOGITS] = Layout(self._response_shape(model, self.task))
        if unknown and model is not None:
            found = probe_layouts(model, unknown, self.call)
            self._layouts |= {(side, tap): layout for tap, layout in found.items()}
        return {tap: self._layouts[side, tap] for tap in taps}

    def _response_shape(self, model: nn.Module, task: Task) -> tuple[int, ...]:
        with untouched(model):
            response = task.response(self.call.run(model.eval()))
        if response is None:
            raise UserError("reads logits, but the task gives none of the model's output")
        return tuple(response.shape[1:])


def build_network(model: ModelConfig, facts: Mapping[str, Any], load: bool = True) -> nn.Module:
    """A model with its checkpoint, if the config names one. ``facts``: what the task says that a model needs to fit the
    data, for instance its number of classes; a model of the user's own is given what it takes of them."""
    refuse_object("student", model.model)
    wanted = {name: value for name, value in facts.items() if name not in model.params}
    network = build_model(model.model, **accepted(model.model, wanted), **model.params)
    if model.checkpoint and load:
        load_checkpoint(network, locate("checkpoint", model.checkpoint), weights=model.weights)
    for path, file in model.part_checkpoints.items():
        check_taps(network, [path], model.model)
        if load:
            load_checkpoint(network.get_submodule(path), locate("part_checkpoints", file), part=path)
    for path, spec in model.replace.items():
        check_taps(network, [path], model.model)
        name, params = parse_spec(spec, f"replace: {path}")
        network.set_submodule(path, build_model(name, **params))
    return network


def place(network: nn.Module, config: Config) -> nn.Module:
    """The network on the config's device, in its memory layout; a lazy one has none before its first pass."""
    network = network.to(device_of(config))
    lazy = any(map(is_lazy, (*network.parameters(), *network.buffers())))
    return network.to(memory_format=torch.channels_last) if config.channels_last and not lazy else network


def needs_teacher(config: Config) -> bool:
    """Whether the config has any distillation term."""
    return config.retrain.weights != "none" and bool(config.pathways or config.terms)


def build_pair(
    config: Config,
    data: Any,
    task: Task | None = None,
    load: bool = True,
    student_state: Mapping[str, Tensor] | None = None,
    teacher_state: Mapping[str, Tensor] | None = None,
    given: Given | None = None,
) -> Pair:
    """Teachers (if any term needs one) and student, on the device, the student initialised from the seed.

    Args:
        data: a data set, or a stand-in with its shapes.
        task: the config's task by default.
        load: read the checkpoints.
        student_state, teacher_state: weights that are known already, in place of a checkpoint.
        given: models that were handed over.

    Raises UserError if a teacher has no weights.
    """
    task, given = task or build_task(config), given or Given()
    seed_random(config.seed)
    student = given.student
    if student is None:  # not by its truth: a model may have a length
        student = build_network(config.student, task.model_arguments(data), load)
    if student_state is not None:
        student.load_state_dict(student_state)
    if config.sync_batch_norm and distributed.world_size() > 1:
        distributed.synchronise_batch_norm(student)
    student = place(student, config)
    example = example_of(config, data)
    _check_task(example, task)
    pair = Pair(None, student, example, task.call(example, False), task=task)
    _check_runs("student", student, lambda: pair.call.run(student))
    place(student, config)  # again: a lazy one has weights now
    for count in [2] * bool(crops(config)) + [1] * _last_is_alone(config, data):
        batch = data.example(count, device_of(config), config.channels_last)
        what = "student, at evaluation" + " (the last batch of the test part has one sample)" * (count == 1)
        _check_runs(what, student, partial(ask, task, student, batch), count)
    if not needs_teacher(config):
        return pair
    pair.student_reading = reading_of(config.student, student, pair.call, task.response)
    models, readings = {}, {}
    for name, member in ({"": config.teacher} if config.teacher else config.teachers).items():
        assert member is not None
        network = given.teacher if given.teacher is not None and not name else None
        if network is None:
            refuse_object("teacher", member.model)
            _check_weights(name, member, load and teacher_state is None)
            if member.checkpoint and load:
                _compare_tokens(name, member, data)
                _compare_task(name, member, config)
            network = build_network(member, task.model_arguments(data), load and teacher_state is None)
        if teacher_state is not None:
            network.load_state_dict(teacher_state)
        network = place(network, config).eval()
        own = _resized(pair.call, member)
        _check_runs("teacher", network, partial(own.run, network))
        readings[name] = reading_of(member, network, own, task.response)
        if member.input is None and member.checkpoint and load:
            _compare_statistics(name, member, data)
        if member.input is not None:
            network = adapted(network, member, data)
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


def _check_task(example: Batch, task: Task) -> None:
    """Raise UserError where the data have boxes around objects and a task of distpro's cannot learn from them."""
    target = example.target
    boxes = isinstance(target, list) and all(isinstance(t, Mapping) and "boxes" in t for t in target)
    own = type(task).__module__.partition(".")[0] == "distpro"
    if boxes and own and getattr(task, "targets", "classes") != "boxes":
        raise UserError(
            f"task: the data have boxes around objects, of which {type(task).__name__} knows nothing: task: detection"
        )


def _last_is_alone(config: Config, data: Any) -> bool:
    """Whether an evaluation ends with a batch of one sample, which not every layer takes."""
    try:
        return len(data.test) % distributed.share(config.training.batch_size) == 1
    except (AttributeError, TypeError):  # of a stand-in, or an iterable set
        return False


def _check_runs(what: str, network: nn.Module, run: Callable[[], Any], samples: int = 2) -> None:
    """Raise UserError in one line where samples of the data do not pass through a model."""
    try:
        with untouched(network):
            network.eval()
            run()
    except UserError:
        raise
    except Exception as error:  # whatever a model does with inputs that are not its own
        said = "two samples of the data do not pass through it"
        said = "one sample of the data does not pass through it" if samples == 1 else said
        raise UserError(f"{what}: {said} ({raised(error)})") from error


def _check_weights(name: str, member: ModelConfig, load: bool) -> None:
    if load and member.checkpoint is None and not (member.params.get("weights") or member.params.get("pretrained")):
        path = f"teachers.{name}" if name else "teacher"
        raise UserError(f"{path}.checkpoint is missing: a teacher with random weights teaches nothing")


def adapted(network: nn.Module, member: ModelConfig, data: Any) -> InputAdapter:
    """The network on images as the student gets them."""
    assert member.input is not None
    if data.image_shape is None:
        raise UserError("teacher.input: for images, whose normalisation the data state")
    mean, std = data.mean or [0.0] * data.image_shape[0], data.std or [1.0] * data.image_shape[0]
    return InputAdapter(network, mean, std, member.input.mean, member.input.std, member.input.size)


def _compare_statistics(name: str, member: ModelConfig, data: Any) -> None:
    """Say it where a teacher was trained, by a run whose folder says so, on images of another normalisation."""
    assert member.checkpoint is not None
    own = stated_by(stored_facts(locate("checkpoint", member.checkpoint).parent))
    if own is None or not data.mean or own.close_to(Statistics(data.mean, data.std)):
        return
    path = f"teachers.{name}" if name else "teacher"
    here, theirs = (f"mean {_short(mean)}, std {_short(std)}" for mean, std in ((data.mean, data.std), own))
    warn(
        f"{path}: its run normalised images with {theirs}, this one does with {here}; "
        f"{path}.input with its mean and std gives it what it knows"
    )


def _compare_task(name: str, member: ModelConfig, config: Config) -> None:
    """Say it where a teacher was trained, by a run whose folder says so, for another task."""
    assert member.checkpoint is not None
    file = locate("checkpoint", member.checkpoint).with_name("config.yaml")
    try:
        stored = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
        theirs = parse_spec(stored["task"], "task")[0] if isinstance(stored, Mapping) and "task" in stored else None
    except (yaml.YAMLError, UnicodeDecodeError, UserError):
        return  # a file of something else
    ours = parse_spec(config.task, "task")[0]
    if theirs not in (None, ours) and not any(":" in str(task) for task in (theirs, ours)):  # of code nothing is known
        warn(f"{f'teachers.{name}' if name else 'teacher'}: its run's task was {theirs}, this one's is {ours}")


def _compare_tokens(name: str, member: ModelConfig, data: Any) -> None:
    """Raise UserError where a teacher was trained, by a run whose folder says so, on texts of another tokenizer."""
    assert member.checkpoint is not None
    folder = locate("checkpoint", member.checkpoint).parent
    own, vocabulary = stored_facts(folder).get("tokenizer"), getattr(data, "vocabulary", None)
    if isinstance(own, Mapping) and vocabulary is not None and own.get("sha256") != vocabulary.digest:
        path = f"teachers.{name}" if name else "teacher"
        raise UserError(
            f"{path}: its run had another tokenizer ({own.get('size')} tokens) than these data ({vocabulary.size}): "
            f"data.params.tokenizer={own.get('folder', folder)}"
        )


def _short(numbers: Sequence[float]) -> str:
    return f"[{', '.join(f'{x:.3g}' for x in numbers)}]"


def _resized(call: Call, member: ModelConfig) -> Call:
    if member.input is None or member.input.size is None:
        return call
    if call.sole is None or call.sole.dim() != 4:
        raise UserError("teacher.input.size: for images, one tensor (N, C, H, W)")
    return Call((F.interpolate(call.sole, member.input.size, mode="bilinear", align_corners=False),))
