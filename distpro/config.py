"""The YAML schema: what may be said in a config, checked before anything is loaded.

A file may name a ``preset`` (a YAML file in distpro/presets) and a ``base`` (another file, relative to it); what it
says itself wins over its base, the base over the preset, and ``key=value`` on the command line over all of them.
"""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from distpro.process import parse_process, reduction_of
from distpro.schedule import REDUCTIONS
from pathways.registry import UserError, nearest

Spec = str | dict[str, Any]
"""A name, or {name: ..., parameters}, or {name: {parameters}}."""
Moving = float | dict[str, Any]
"""A number, or a process {name: {parameters}}, see `distpro.process`."""
Params = Annotated[dict[str, Any], BeforeValidator(lambda value: {} if value is None else value)]
"""Parameters of what is named beside them. null: none, whatever a base has for another name."""


class Section(BaseModel):
    """Part of a config. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class DataConfig(Section):
    """Where the samples come from and how a batch is made."""

    name: str = "digits"
    root: str | None = None
    samples: int | None = Field(None, gt=0, description="training images kept, stratified and seeded")
    seed: int | None = Field(None, ge=0, description="draws the samples; null: the run's seed")
    classes: int | list[str] | None = None
    augment: list[Any] = []
    augment_epochs: int | None = Field(
        None, gt=0, description="epochs after which the same augmentations come again; null: never"
    )
    mean: list[float] | None = None
    std: list[float] | None = None
    workers: int = Field(0, ge=0)
    params: Params = {}
    num_classes: int | None = Field(None, gt=0, description="for a dry run where the data are not there")
    image_shape: tuple[int, int, int] | None = Field(None, description="likewise, (C, H, W)")


class InputConfig(Section):
    """How a teacher wants its images, where that is not how the student gets them."""

    mean: list[float] = Field(description="per channel, for images in 0-1")
    std: list[float]
    size: int | tuple[int, int] | None = Field(None, description="height and width")


class ModelConfig(Section):
    """A model and where its features are read."""

    model: str
    params: Params = {}
    checkpoint: str | None = None
    input: InputConfig | None = Field(None, description="of a teacher: its own normalisation and image size")
    weight: float = Field(1.0, ge=0, description="of one of several teachers: its share in their common output")
    taps: list[str] | None = Field(None, description="default: the model's stages, before their last ReLU in a teacher")


class PathwayConfig(Section):
    """The search space of pathways."""

    connect: str | list[list[str]] = "all"
    transforms: list[Spec] = ["conv1x1", "conv3x3", "attention"]
    distance: Spec = "hcl"
    weight: float | None = Field(None, description="constant weight of every pathway")
    teacher: str | None = Field(None, description="which of several teachers is read")


class TermConfig(Section):
    """A distillation loss as a term of the objective."""

    loss: str
    key: str | None = None
    params: Params = {}
    weight: float | Literal["learned", "schedule"] | dict[str, Any] = Field(
        "learned",
        description="a number; a process such as {linear: {initial: 1, final: 0}}; 'learned' (by search, replayed in "
        "retrain); or {schedule: reduction}",
    )
    pretrain: bool = Field(False, description="the loss of the recipe's first stage in place of the loss")
    teacher: str | None = Field(None, description="which of several teachers is read")
    student_taps: list[str] | None = None
    teacher_taps: list[str] | None = None
    connect: str | list[list[str]] | None = Field(None, description="one term per connection of the taps")

    @field_validator("weight")
    @classmethod
    def _known_process(cls, weight: Any) -> Any:
        return _check_process(weight)


class OptimizerConfig(Section):
    """Optimiser of the student and the terms."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = Field(0.1, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = True
    dampening: float = Field(0.0, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)


class LearningRateConfig(Section):
    """How the learning rate moves, see `distpro.trainer.LearningRate`."""

    name: Literal["constant", "cosine", "step"] = "step"
    milestones: list[float] = [0.625, 0.75, 0.875]
    gamma: float = Field(0.1, gt=0)
    warmup_epochs: float = Field(0.0, ge=0)


class TrainingConfig(Section):
    """The training itself."""

    epochs: int = Field(240, gt=0)
    max_steps: int | None = Field(None, gt=0)
    batch_size: int = Field(128, gt=0)
    drop_last: bool = False
    optimizer: OptimizerConfig = OptimizerConfig()
    learning_rate: LearningRateConfig = LearningRateConfig()
    clip_norm: float | None = Field(None, gt=0, description="largest norm of the gradient")
    clip_by: Literal["all", "module"] = Field(
        "all", description="one norm of all gradients, or the student's and every term's own parameters' apart"
    )
    distill_weight: float = Field(1.0, ge=0, description="λ, a factor on all weights that are not constants")
    distill_warmup: float = Field(0.0, ge=0, description="epochs over which λ grows, min(epoch / this, 1)")


class SearchConfig(Section):
    """How α is learned (Section 3.2 and 3.3)."""

    estimator: Spec = "forward_mode"
    weighting: Spec = "biased_softmax"
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: float = Field(0.05, gt=0, description="γ")
    betas: tuple[float, float] = (0.5, 0.999)
    momentum: float = Field(0.0, ge=0, lt=1)
    per_rate: bool = Field(False, description="divide h by the learning rate's factor, to which it is proportional")
    every: int = Field(1, ge=1, description="steps between two updates of α")
    validation_fraction: float = Field(0.2, gt=0, lt=1)
    normalise: Literal["none", "loss", "gradient"] | None = Field(
        None, description="make terms alike in size, see distpro.normalise; null: by gradient, unless all are pathways"
    )
    normalise_batches: int = Field(4, gt=0, description="training batches to measure the terms' size on")
    validation_batch_size: int | None = Field(None, gt=0)
    threshold: float | None = Field(None, description="τ during the search; null drops nothing")
    revive_every: int = Field(0, ge=0, description="with a threshold: compute all terms in every so many updates")
    repeats: bool = Field(False, description="take each step again with the weights that it has led to")


class RetrainConfig(Section):
    """How a schedule is replayed (Section 3.4)."""

    weights: Literal["searched", "final", "mean", "shuffled", "permuted", "random", "equal", "constant", "none"] = (
        Field("searched", description="the schedule, or a control, see distpro.retrainer.replay")
    )
    start: float = Field(
        1 / 3,
        ge=0,
        lt=1,
        description="fraction of the search that a replay leaves out at its beginning, where the weights are still on "
        "their way from where they all start (docs/results.md); the paper replays all of it, 0",
    )
    schedule: str | None = Field(None, description="an alpha.pt, if the command line gives none")
    threshold: float | None = Field(0.5, description="τ; null drops nothing")
    mapping: dict[str, str] = {}
    training: dict[str, Any] = Field({}, description="what of `training` is different in a retrain")


class CacheConfig(Section):
    """The teacher's outputs, kept on disk."""

    folder: str


class TrackingConfig(Section):
    """Logs and checkpoints."""

    tensorboard: bool = True
    log_every: int = Field(50, gt=0, description="steps")
    evaluate_every: int = Field(1, gt=0, description="epochs")
    checkpoint_every: int = Field(1, gt=0, description="epochs")


class Config(Section):
    """A whole run."""

    name: str | None = None
    seed: int = Field(0, ge=0)
    device: str = "auto"
    precision: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        "float32", description="auto: the fastest that the device has, see distpro.pair.fastest_precision"
    )
    channels_last: bool = True
    sync_batch_norm: bool = Field(False, description="with several processes: the student's batch statistics over all")
    compile: Literal["inductor", "aot_eager", "eager", "cudagraphs"] | None = Field(
        None, description="torch.compile's backend for teacher, student and pathways"
    )
    threads: int | None = Field(None, gt=0)
    task: Spec = "classification"
    data: DataConfig = DataConfig()
    teacher: ModelConfig | None = None
    teachers: dict[str, ModelConfig] = Field({}, description="several, in place of one")
    combine: Literal["logits", "probabilities", "log_probabilities"] = Field(
        "logits", description="what of several teachers is averaged to their common output"
    )
    student: ModelConfig
    freeze: list[str] = Field([], description="modules of the student that do not train")
    task_weight: Moving = Field(1.0, description="of the task loss, a number or a process; 0: not computed")
    prune: bool = Field(True, description="run only the parts of the models that a loss depends on")
    cache: CacheConfig | None = None
    teacher_training: bool = Field(False, description="run the teacher in training mode (a fault of ReviewKD's code)")
    pathways: PathwayConfig | None = None
    terms: list[TermConfig] = []
    training: TrainingConfig = TrainingConfig()
    search: SearchConfig = SearchConfig()
    retrain: RetrainConfig = RetrainConfig()
    tracking: TrackingConfig = TrackingConfig()
    stages: list[dict[str, Any]] = Field([], description="trainings one after the other, see distpro.stages")

    @field_validator("task_weight")
    @classmethod
    def _known_process(cls, weight: Any) -> Any:
        return _check_process(weight)

    @model_validator(mode="after")
    def _one_or_several_teachers(self) -> Config:
        if self.teacher is not None and self.teachers:
            raise UserError("teacher and teachers exclude each other: name all of them under teachers")
        for key in ("input", "weight"):
            if getattr(self.student, key) != ModelConfig.model_fields[key].default:
                raise UserError(f"student.{key}: only a teacher has one")
        return self

    @property
    def has_teacher(self) -> bool:
        """Whether there is any teacher."""
        return self.teacher is not None or bool(self.teachers)

    def for_retrain(self, where: str = "config") -> Config:
        """The config with `retrain.training` merged into `training`."""
        merged = self.model_dump()
        merged["training"] = merge(merged["training"], merged["retrain"]["training"])
        merged["retrain"]["training"] = {}
        return check(merged, f"{where}, with retrain.training as training")


def _check_process(value: Any) -> Any:
    """A weight as it is. Raises UserError if it is a mapping that is no process."""
    if isinstance(value, dict) and reduction_of(value) not in REDUCTIONS:
        parse_process(value)
    return value


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Deep merge of mappings; where they disagree, ``above`` wins. Lists are replaced whole."""
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merge(result[key], value) if both else value
    return result


def presets() -> list[str]:
    """Names that ``preset:`` takes."""
    folder = importlib.resources.files("distpro") / "presets"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def read_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """A checked config from a YAML file or a mapping, with ``key=value`` overrides (dotted keys, YAML values).

    Raises UserError naming file, key, what was found, what is allowed and the nearest allowed name.
    """
    path = Path("config") if isinstance(source, Mapping) else Path(source)
    content = dict(source) if isinstance(source, Mapping) else _read_yaml(path)
    content = _with_bases(content, path)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UserError(f"override '{override}': expected key=value, for instance training.epochs=10")
        content = merge(content, _nest(key.split("."), _yaml(value, f"override '{override}'")))
    config = check(content, str(path))
    config.for_retrain(str(path))  # or its mistakes would show only when the search is over
    return config


def check(content: Mapping[str, Any], where: str) -> Config:
    """Validate a mapping. Raises UserError as `read_config` does."""
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        raise UserError("\n".join(_explain(error.errors(), content, where)[:5])) from None


def _with_bases(content: dict[str, Any], path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The content of ``path`` over that of its base, and that over its preset. ``above``: the files on the way here."""
    base, preset = content.pop("base", None), content.pop("preset", None)
    below: dict[str, Any] = {}
    if preset is not None:
        if preset not in presets():
            near = nearest(str(preset), presets())
            raise UserError(f"{path}: unknown preset '{preset}'{near} (allowed: {', '.join(presets())})")
        text = (importlib.resources.files("distpro") / "presets" / f"{preset}.yaml").read_text(encoding="utf-8")
        below = _yaml(text, f"preset {preset}")
    if base is not None:
        if not isinstance(base, str):
            raise UserError(f"{path}: base is {base!r}: expected the path of one YAML file")
        file = path.parent / base
        if file.resolve() in (path.resolve(), *above):
            raise UserError(f"{path}: base '{base}' leads back to itself")
        below = merge(below, _with_bases(_read_yaml(file), file, (path.resolve(), *above)))
    return merge(below, content)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        near = nearest(path.name, [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else [])
        raise UserError(f"{path}: no such config file{near}")
    try:
        content = _yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a config is a mapping of keys to values, found {type(content).__name__}")
    return content


def _yaml(text: str, where: str) -> Any:
    try:
        _refuse_repeated_keys(yaml.compose(text, Loader=yaml.SafeLoader), where)
        return _numbers(yaml.safe_load(text))
    except RecursionError:
        raise UserError(f"{where}: not valid YAML (an alias leads back to itself)") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: not valid YAML ({getattr(error, 'problem', None) or error})") from None


def _refuse_repeated_keys(root: yaml.Node | None, where: str) -> None:
    """YAML's parser would silently keep the last one. Merge keys (``<<``) are meant to repeat others."""
    pending, visited = [root], set()
    while pending:
        node = pending.pop()
        if node is None or id(node) in visited or isinstance(node, yaml.ScalarNode):
            continue
        visited.add(id(node))  # an alias leads to a node that has been met
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    if key.value in seen:
                        raise UserError(f"{where}, line {key.start_mark.line + 1}: '{key.value}' is said twice")
                    seen.add(key.value)
            pending += [value for _, value in node.value]
        else:
            pending += node.value


def _numbers(value: Any) -> Any:
    """YAML 1.1 takes 1e-3 for text, because it has no point: nobody means that."""
    if isinstance(value, dict):
        return {key: _numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_numbers(inner) for inner in value]
    return float(value) if isinstance(value, str) and re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", value) else value


def _nest(keys: Sequence[str], value: Any) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    return value


def _explain(errors: Sequence[Any], content: Mapping[str, Any], where: str) -> list[str]:
    """One line for each wrong key of pydantic's errors, which come one for each type that a value might have had."""
    lines: dict[str, str] = {}
    for error in errors:
        path, value = _follow(error["loc"], content)
        key = ".".join(path) if error["type"] not in ("missing", "invalid_key") else ".".join(map(str, error["loc"]))
        expected = error["msg"].partition(" or instance of")[0].replace("dictionary", "mapping")
        named = re.findall(r"'(.*?)'", expected) if error["type"] == "literal_error" else []
        if error["type"] == "extra_forbidden" or error["loc"][-1:] == ("[key]",):
            allowed = named or _keys_of(path[:-1])
            near = nearest(path[-1], allowed)
            lines[key] = f"{where}: unknown key '{key}'{near} (allowed here: {', '.join(allowed)})"
        elif error["type"] == "value_error":
            at = f"'{key}': " if key else ""
            lines[key] = f"{where}: {at}{error['msg'].removeprefix('Value error, ')}"
        elif error["type"] == "missing":
            lines[key] = f"{where}: '{key}' is missing"
        elif key in lines:
            lines[key] += f", or {expected.removeprefix('Input should be ')}"
        else:
            lines[key] = f"{where}: '{key}' is {value!r}: {expected[0].lower()}{expected[1:]}{nearest(value, named)}"
    return [line for key, line in lines.items() if not any(deeper.startswith(f"{key}.") for deeper in lines)]


def _follow(loc: Sequence[str | int], content: Any) -> tuple[list[str], Any]:
    """The keys of ``loc`` that lead somewhere, and where: pydantic adds the names of the types that it has tried."""
    path = []
    for part in loc:
        inside = range(len(content)) if isinstance(content, (list, tuple)) else content
        if isinstance(inside, (Mapping, range)) and part in inside:
            content = content[part]
            path.append(str(part))
    return path, content


def _keys_of(path: Sequence[str]) -> list[str]:
    section: Any = Config
    for part in path:
        field = getattr(section, "model_fields", {}).get(part)
        if field is None:
            continue  # an index in a list
        section = next((a for a in _arguments(field.annotation) if hasattr(a, "model_fields")), section)
    return list(section.model_fields)


def _arguments(annotation: Any) -> list[Any]:
    found = [annotation]
    for argument in getattr(annotation, "__args__", ()):
        found += _arguments(argument)
    return found
