"""The schema: every key of a config with its type, its default and what it means."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from distpro.config.searching import RetrainConfig, SearchConfig
from distpro.config.section import Params, ProcessSpec, Section, check_process
from distpro.data.statistics import check_statistics
from distpro.process import learned_of
from distpro.schedule_file import START
from pathways.registry import UserError
from pathways.space import Spec


class DataConfig(Section):
    """Where the samples come from and how a batch is made."""

    name: str = Field("digits", description="`distpro list datasets`, or package.module:name of your own")
    root: str | None = Field(
        None, description="folder or file; a relative path is looked for here, then in $DISTPRO_DATA"
    )
    samples: int | None = Field(None, gt=0, description="training images kept, stratified and seeded")
    seed: int | None = Field(None, ge=0, lt=2**63, description="draws the samples; null: the run's seed")
    classes: int | list[str] | None = Field(
        None, description="those kept: the first so many, or a list of names; null: all"
    )
    augment: list[Any] = Field(
        [], description="in order: names (`distpro list augmentations`), or {name: {parameter: value}}"
    )
    augment_epochs: int | None = Field(
        None, gt=0, description="epochs after which the same augmentations come again; null: never"
    )
    repeats: int = Field(
        1,
        gt=0,
        le=1000,
        description="copies of a training sample one after the other, each augmented in its own way; an epoch is as long as before",
    )
    sampler: Literal["balanced"] | list[float] | None = Field(
        None,
        description="draw an epoch's training samples with replacement, each class as often, or by a weight per class",
    )
    mean: list[float] | None = Field(
        None, description="per channel, for images in 0-1; null: the data set's own, or that of the training part"
    )
    std: list[float] | None = Field(None, description="likewise")
    workers: int = Field(0, ge=0, description="processes that load a streamed set; 0: none")
    params: Params = Field({}, description="options of the data set, or of a function of your own")
    num_classes: int | None = Field(
        None,
        gt=0,
        description="for a dry run where the data are not there, and of data of one's own that do not say it",
    )
    image_shape: tuple[int, int, int] | None = Field(None, description="likewise, (C, H, W)")


class InputConfig(Section):
    """How a teacher wants its images, where that is not how the student gets them."""

    mean: list[float] = Field(description="per channel, for images in 0-1")
    std: list[float] = Field(description="per channel, for images in 0-1")
    size: int | tuple[int, int] | None = Field(None, description="height and width")

    @model_validator(mode="after")
    def _of_images_in_0_to_1(self) -> InputConfig:
        check_statistics(self.mean, self.std)
        if min(self.std, default=0) <= 0 or len(self.mean) != len(self.std):
            raise UserError(f"mean and std must be one number a channel, std above 0, got {self.mean} and {self.std}")
        return self


class ModelConfig(Section):
    """A model and where its features are read."""

    model: str = Field(
        description="`distpro list models`, torchvision:, timm:, smp:, hf:NAME, or package.module:callable"
    )
    params: Params = Field({}, description="arguments of the model")
    checkpoint: str | None = Field(None, description="file of its weights; null: those that the model begins with")
    weights: Literal["model", "ema"] | None = Field(
        None, description="of a checkpoint that holds both: those trained, or their moving average; null: the former"
    )
    part_checkpoints: dict[str, str] = Field(
        {},
        description="of a student: files of weights that modules of it begin with, by their names, {encoder: resnet18.pth}: a classifier's "
        "in a segmenter; what such a file has beside them is left out",
    )
    input: InputConfig | None = Field(None, description="of a teacher: its own normalisation and image size")
    weight: float = Field(1.0, ge=0, description="of one of several teachers: its share in their common output")
    replace: dict[str, Spec] = Field(
        {},
        description="modules of the model, by their names, that other models take the place of, {layer1: {ghnd_bottleneck: {}}}: new "
        "ones, behind what `checkpoint` gives the model",
    )
    taps: list[str] | None = Field(None, description="default: the model's stages, before their last ReLU in a teacher")


class PathwayConfig(Section):
    """The search space of pathways."""

    connect: str | list[list[str]] = Field(
        "all", description="all, same, matched, review, or a list of [teacher tap, student tap]"
    )
    transforms: list[Spec] = Field(
        ["conv1x1", "conv3x3", "attention"], description="of a student's feature; one pathway for each"
    )
    distance: Spec = Field("hcl", description="between the transformed feature and the teacher's")
    weight: float | None = Field(None, description="constant weight of every pathway")
    teacher: str | None = Field(None, description="which of several teachers is read")


class TermConfig(Section):
    """A distillation loss as a term of the objective."""

    loss: str = Field(description="`distpro list losses`, or package.module:name of your own")
    key: str | None = Field(None, description="the term's name in logs and schedules; null: the loss's")
    params: Params = Field(
        {},
        description="of the loss; its scalars also as processes, and as learned, or {learned: {initial: 4}}: by a search over a "
        "horizon, replayed in retrain",
    )
    weight: float | Literal["learned", "schedule"] | dict[str, Any] = Field(
        "learned",
        description="a number; a process such as {linear: {initial: 1, final: 0}}; 'learned' (by search, replayed in "
        "retrain); or {schedule: reduction}",
    )
    pretrain: bool = Field(False, description="the loss of the recipe's first stage in place of the loss")
    teacher: str | None = Field(None, description="which of several teachers is read")
    student_taps: list[str] | None = Field(None, description="what it reads of the student; null: the loss's default")
    teacher_taps: list[str] | None = Field(None, description="likewise, of the teacher")
    connect: str | list[list[str]] | None = Field(None, description="one term per connection of the taps")

    @field_validator("weight")
    @classmethod
    def _known_process(cls, weight: Any) -> Any:
        return check_process(weight)


class OptimizerConfig(Section):
    """Optimiser of the student and the terms."""

    name: str = Field(
        "sgd",
        description="sgd, adam, adamw; another of torch.optim or timm.optim (distpro list optimizers), which gets lr, weight_decay and "
        "params; or package.module:name, which gets lr and params. A search needs one of the first three",
    )
    params: Params = Field({}, description="of any but the first three")
    lr: float = Field(0.1, gt=0, description="the learning rate at its largest")
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd")
    nesterov: bool = Field(True, description="of sgd")
    dampening: float = Field(0.0, ge=0, lt=1, description="of sgd")
    weight_decay: float = Field(5e-4, ge=0, description="of all parameters; decoupled in adamw")
    betas: tuple[float, float] = Field((0.9, 0.999), description="of adam and adamw")
    eps: float = Field(1e-8, gt=0, description="of adam and adamw")
    no_decay: Literal["none", "norms_and_biases"] = Field(
        "none", description="norms_and_biases: no weight decay for them, nor for what the model itself excepts"
    )
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="factor on the learning rate for each of the student's layers behind a layer"
    )


class LearningRateConfig(Section):
    """How the learning rate moves, see `distpro.train.rates.LearningRate`."""

    name: Literal["constant", "cosine", "step", "poly", "linear"] = Field("step", description="its shape")
    milestones: list[float] = Field(
        [0.625, 0.75, 0.875], description="of step: fractions of the training if all are below 1, else epochs"
    )
    gamma: float = Field(0.1, gt=0, description="of step: the factor at each milestone")
    warmup_epochs: float = Field(0.0, ge=0, description="epochs over which it grows from near 0, whatever the shape")
    power: float = Field(0.9, gt=0, description="of poly: (1 - progress)^power")
    final: float = Field(
        0.0, ge=0, lt=1, description="of cosine, linear and poly: where they end, as a share of the rate"
    )
    cooldown_epochs: float = Field(0.0, ge=0, description="of them: epochs at the end that stay at `final`")

    @model_validator(mode="after")
    def _of_a_schedule_that_falls(self) -> LearningRateConfig:
        if self.name in ("constant", "step") and (self.final or self.cooldown_epochs):
            raise UserError(f"final and cooldown_epochs are of cosine, linear and poly, not of {self.name}")
        return self


class EmaConfig(Section):
    """A moving average of the student's weights, see `distpro.train.keeping`."""

    decay: float = Field(0.9999, ge=0, lt=1, description="share of the average that a step keeps")
    warmup: bool = Field(True, description="the decay of update n is min(decay, (1 + n) / (10 + n))")


class TrainingConfig(Section):
    """The training itself."""

    epochs: int = Field(240, gt=0, description="passes over the training part")
    max_steps: int | None = Field(None, gt=0, description="the training ends after so many steps, if that is earlier")
    batch_size: int = Field(128, gt=0, description="samples of a batch, of all processes together")
    accumulate: int = Field(
        1, gt=0, description="batches whose mean gradient makes one step; an epoch's last step takes those left"
    )
    drop_last: bool = Field(False, description="leave out an epoch's last batch if it is smaller")
    optimizer: OptimizerConfig = OptimizerConfig()
    learning_rate: LearningRateConfig = LearningRateConfig()
    clip_norm: float | None = Field(None, gt=0, description="largest norm of the gradient")
    clip_by: Literal["all", "module"] = Field(
        "all", description="one norm of all gradients, or the student's and every term's own parameters' apart"
    )
    distill_weight: float = Field(1.0, ge=0, description="λ, a factor on all weights that are not constants")
    distill_warmup: float | None = Field(
        0.0,
        ge=0,
        description="epochs over which λ grows, min(epoch / this, 1); null: those of the schedule, stretched with it",
    )
    ema: EmaConfig | None = Field(
        None,
        description="evaluate, and with `keep: last` keep, an exponential moving average of the student; {}: with its defaults",
    )
    keep: Literal["last", "best", "average"] = Field(
        "last",
        description="the student that is left at the end: that of the last step, of the best evaluation on the validation part, or "
        "the mean of the weights of the `average_of` best",
    )
    average_of: int = Field(10, ge=2, description="evaluations whose students `keep: average` takes")
    patience: int | None = Field(
        None, gt=0, description="end the training after so many evaluations without a better one on the validation part"
    )
    validation_fraction: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="of the training samples, held out for `keep` and `patience` where the data have no validation part",
    )

    @model_validator(mode="after")
    def _cools_down_within_its_epochs(self) -> TrainingConfig:
        if self.learning_rate.cooldown_epochs >= self.epochs:
            raise UserError(
                f"learning_rate.cooldown_epochs is {self.learning_rate.cooldown_epochs:g}, of {self.epochs} epochs in all"
            )
        return self

    @property
    def chooses(self) -> bool:
        """Whether the training looks at a validation part."""
        return self.keep != "last" or self.patience is not None


class TuneConfig(Section):
    """Candidates against each other under one budget (`distpro tune`, docs/recipes.md). A candidate is one of `methods` alone,
    the search space at equal weights, the search space with a constant weight per term, or a schedule and its controls."""

    families: list[Literal["single", "equal", "static", "learned"]] = Field(
        ["single", "equal", "static", "learned"], min_length=1, description="learned: only where there is a `schedule`"
    )
    methods: list[str | TermConfig] = Field(
        ["kd", "dkd", "at", "review", "logit_std"],
        description="of single: losses, each around its usual weight (`distpro.losses.usual`), or terms as in `terms`, around "
        "theirs",
    )
    schedule: str | None = Field(None, description="an alpha.pt, if the command line gives none")
    controls: list[Literal["searched", "final", "mean", "equal"]] = Field(
        ["searched", "final", "mean", "equal"], description="of learned: see `retrain.weights`"
    )
    span: tuple[float, float] = Field(
        (0.03, 30.0), description="the range of a weight, log-uniform, in units of where it begins"
    )
    trials: int = Field(24, gt=0, description="the budget, in whole trainings; one that is pruned counts in part")
    epochs: int | None = Field(None, gt=0, description="of a trial; null: those of the training")
    by: Literal["loss", "headline"] = Field(
        "loss",
        description="what a trial is judged by on the validation part: as a search's (`search.criterion`), or the main metric",
    )
    pruner: Literal["hyperband", "none"] = Field(
        "hyperband", description="ends trainings that fall behind others at a ninth or a third of their epochs"
    )

    @field_validator("span")
    @classmethod
    def _around_one(cls, span: tuple[float, float]) -> tuple[float, float]:
        if not 0 < span[0] <= 1 <= span[1] or span[0] == span[1]:
            raise ValueError(f"is [{span[0]:g}, {span[1]:g}]: a factor from 0 to 1, and one of 1 and more")
        return span


class CacheConfig(Section):
    """The teacher's outputs, kept on disk."""

    folder: str = Field(description="where they are kept, and read by later runs")


class TrackingConfig(Section):
    """Logs and checkpoints."""

    tensorboard: bool = Field(True, description="write logs for TensorBoard into the run's folder")
    sinks: list[Spec] = Field(
        [], description="others: wandb, mlflow, or {wandb: {project: mine}} with parameters, see distpro.train.sinks"
    )
    log_every: int = Field(50, gt=0, description="steps between two log entries")
    evaluate_every: int = Field(1, gt=0, description="epochs between two evaluations")
    checkpoint_every: int = Field(1, gt=0, description="epochs between two checkpoints")


class Config(Section):
    """A whole run."""

    name: str | None = Field(None, description="of the run, in its logs")
    seed: int = Field(0, ge=0, lt=2**63, description="of weights, data order, augmentation and splits")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N; auto: a GPU if there is one")
    precision: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        "auto", description="auto: the fastest that the device has, see distpro.build.device.fastest_precision"
    )
    channels_last: bool = Field(True, description="memory format of images and convolutions; the numbers mean the same")
    sync_batch_norm: bool = Field(False, description="with several processes: the student's batch statistics over all")
    compile: Literal["inductor", "reduce-overhead", "aot_eager", "eager", "cudagraphs"] | None = Field(
        None,
        description="torch.compile's backend for teacher, student and pathways; reduce-overhead: inductor with CUDA graphs",
    )
    threads: int | None = Field(None, gt=0, le=1024, description="CPU threads of PyTorch; null: as PyTorch has it")
    task: Spec = Field("classification", description="`distpro list tasks`, or package.module:name of your own")
    metrics: list[Spec] = Field([], description="beside those of the task: names, or package.module:name")
    data: DataConfig = DataConfig()
    teacher: ModelConfig | None = None
    teachers: dict[str, ModelConfig] = Field(
        {}, description="several, in place of one; NAME: null takes one away that a base has"
    )
    combine: Literal["logits", "probabilities", "log_probabilities"] = Field(
        "logits", description="what of several teachers is averaged to their common output"
    )
    student: ModelConfig
    freeze: list[str] = Field([], description="modules of the student that do not train")
    task_weight: ProcessSpec | Literal["learned"] = Field(
        1.0,
        description="of the task loss, a number or a process; 0: not computed; learned, or {learned: {initial: 1}}: by a search "
        "over a horizon, replayed in retrain",
    )
    prune: bool = Field(True, description="run only the parts of the models that a loss depends on")
    cache: CacheConfig | None = None
    teacher_training: bool = Field(False, description="run the teacher in training mode (a fault of ReviewKD's code)")
    pathways: PathwayConfig | None = None
    terms: list[TermConfig] = Field([], description="losses beside the pathways, each with its weight")
    training: TrainingConfig = TrainingConfig()
    search: SearchConfig = SearchConfig()
    retrain: RetrainConfig = RetrainConfig()
    tune: TuneConfig = TuneConfig()
    tracking: TrackingConfig = TrackingConfig()
    stages: list[dict[str, Any]] = Field([], description="trainings one after the other, see distpro.config.stages")

    @field_validator("teachers", mode="before")
    @classmethod
    def _without_those_taken_away(cls, teachers: Any) -> Any:
        return {k: v for k, v in teachers.items() if v is not None} if isinstance(teachers, dict) else teachers

    @field_validator("task_weight")
    @classmethod
    def _known_process(cls, weight: Any) -> Any:
        learned = learned_of(weight)
        if learned is not None and isinstance(learned.initial, list):
            raise UserError(f"task_weight: learned: initial: expected one number, found {learned.initial}")
        return check_process(weight) if learned is None else weight

    @model_validator(mode="after")
    def _one_or_several_teachers(self) -> Config:
        if self.teacher is not None and self.teachers:
            raise UserError("teacher and teachers exclude each other: name all of them under teachers")
        for key in ("input", "weight"):
            if getattr(self.student, key) != ModelConfig.model_fields[key].default:
                raise UserError(f"student.{key}: only a teacher has one")
        for teacher in filter(None, (self.teacher, *self.teachers.values())):
            if teacher.replace:
                raise UserError(
                    "teacher.replace: only a student has one, for what is replaced is new and teaches nothing"
                )
            if teacher.part_checkpoints:
                raise UserError(
                    "teacher.part_checkpoints: only a student has some, for a teacher needs all of its weights"
                )
        return self

    @model_validator(mode="after")
    def _start_by_horizon(self) -> Config:
        if self.retrain.start is None:
            self.retrain.start = 0.0 if self.search.rounds else START if self.search.horizon == 1 else 1.0
            self.retrain.model_fields_set.discard("start")  # nobody has stated it
        return self

    @property
    def has_teacher(self) -> bool:
        """Whether there is any teacher."""
        return self.teacher is not None or bool(self.teachers)
