"""Where a run's numbers go beside its folder: TensorBoard, Weights & Biases, MLflow. Each is imported when it is used."""

from __future__ import annotations

import importlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distpro.console import pip_install
from distpro.files import write_atomically
from pathways.registry import Registry, UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SINKS = Registry("sink")

IDENTITIES = "sinks.json"
"""In a run's folder: what the services call the run, so that a resumed run goes on there."""

Setting = bool | int | float | str


class Sink:
    """What may be told of a run; a sink overrides what it has a use for.

    Args:
        folder: of the run.
        first_step: of a resumed run, the first step that will be run again; 0 of a new one.
    """

    def __init__(self, folder: Path, first_step: int):
        self.folder, self.first_step = folder, first_step

    def scalars(self, numbers: Mapping[str, float], step: int) -> None:
        """Numbers by tag at a step."""

    def alpha_layout(self, charts: Mapping[str, Sequence[str]]) -> None:
        """Which tags belong into one chart, by its title."""

    def text(self, tag: str, markdown: str) -> None:
        """A text."""

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        """A picture of matplotlib's."""

    def images(self, tag: str, pictures: Tensor, step: int) -> None:
        """Pictures, uint8 (K, 3, H, W)."""

    def summary(self, settings: Mapping[str, Setting], metrics: Mapping[str, float], step: int) -> None:
        """Once, at the end: the settings that matter, and the final metrics."""

    def flush(self) -> None:
        """Hand on what was recorded: a checkpoint is about to be written."""

    def close(self, failed: bool) -> None:
        """The run has ended, or has stopped with an error."""

    def _identity(self, name: str) -> str | None:
        """What a service called the run that is resumed."""
        path = self.folder / IDENTITIES
        known = json.loads(path.read_text(encoding="utf-8")) if self.first_step and path.is_file() else {}
        return known.get(name)

    def _remember(self, name: str, identity: str) -> None:
        path = self.folder / IDENTITIES
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        write_atomically(json.dumps({**known, name: identity}) + "\n", path)


@SINKS.register("tensorboard")
class TensorBoard(Sink):
    """Event files in the run's folder."""

    def __init__(self, folder: Path, first_step: int):
        super().__init__(folder, first_step)
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

        _wait_for_a_later_name(folder)
        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def scalars(self, numbers: Mapping[str, float], step: int) -> None:
        for tag, value in numbers.items():
            self._writer.add_scalar(tag, value, step)

    def alpha_layout(self, charts: Mapping[str, Sequence[str]]) -> None:
        # TensorBoard reads each tag of a layout as a regular expression that matches the beginning of a tag.
        layout = {title: ["Multiline", [f"{re.escape(tag)}$" for tag in tags]] for title, tags in charts.items()}
        self._writer.add_custom_scalars({"alpha": layout})

    def text(self, tag: str, markdown: str) -> None:
        self._writer.add_text(tag, markdown)

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        self._writer.add_figure(tag, figure, step)

    def images(self, tag: str, pictures: Tensor, step: int) -> None:
        self._writer.add_images(tag, pictures.cpu(), step)

    def summary(self, settings: Mapping[str, Setting], metrics: Mapping[str, float], step: int) -> None:
        """The table of runs. The metrics get tags ``final/<name>``, apart from the curves of the same names."""
        from torch.utils.tensorboard.summary import hparams

        final = {f"final/{name}": value for name, value in metrics.items()}
        # SummaryWriter.add_hparams would open a second event file, and TensorBoard stops following the first one.
        file_writer: Any = self._writer.file_writer
        for entry in hparams(dict(settings), final):
            file_writer.add_summary(entry)
        self.scalars(final, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


def _wait_for_a_later_name(folder: Path) -> None:
    """TensorBoard reads a folder's event files in the order of their names. These begin with the second of their making and
    end in a count without leading zeros, so that of two files of one second the later may come first, and what it hides
    would be shown and what it adds would not."""
    seconds = [
        int(found[1]) for path in folder.glob("*") if (found := re.match(r"events\.out\.tfevents\.(\d+)\.", path.name))
    ]
    remaining = max(seconds, default=0) + 1 - time.time()
    if 0 < remaining <= 1:
        time.sleep(remaining)


@SINKS.register("wandb")
class WeightsAndBiases(Sink):
    """A run of Weights & Biases. ``params``: of ``wandb.init``, such as project, entity, mode (offline). A resumed run goes on
    in the same one; what had been logged after the checkpoint stays there."""

    def __init__(self, folder: Path, first_step: int, **params: Any):
        super().__init__(folder, first_step)
        wandb = _imported("wandb")
        known = self._identity("wandb")
        again = {"id": known, "resume": "allow"} if known else {}
        self._run = wandb.init(**{"dir": str(folder), "name": folder.name, "project": "distpro", **again, **params})
        self._image = wandb.Image
        self._remember("wandb", str(self._run.id))

    def scalars(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        self._run.log({tag: self._image(figure)}, step=step)

    def images(self, tag: str, pictures: Tensor, step: int) -> None:
        shown = [self._image(picture) for picture in pictures.cpu().permute(0, 2, 3, 1).numpy()]
        self._run.log({tag: shown}, step=step)

    def summary(self, settings: Mapping[str, Setting], metrics: Mapping[str, float], step: int) -> None:
        self._run.config.update(dict(settings), allow_val_change=True)
        self._run.summary.update({f"final/{name}": value for name, value in metrics.items()})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


@SINKS.register("mlflow")
class MLflow(Sink):
    """A run of MLflow. uri: of the tracking server or folder (default: MLflow's own); experiment: its name. A resumed run goes
    on in the same one; what had been logged after the checkpoint stays there."""

    LONGEST = 500  # characters of a parameter

    def __init__(self, folder: Path, first_step: int, uri: str | None = None, experiment: str = "distpro"):
        super().__init__(folder, first_step)
        mlflow = _imported("mlflow")
        if uri is not None:
            mlflow.set_tracking_uri(uri)
        mlflow.set_experiment(experiment)
        known = self._identity("mlflow")
        self._mlflow = mlflow
        run = mlflow.start_run(**({"run_id": known} if known else {"run_name": folder.name}))
        self._remember("mlflow", str(run.info.run_id))
        self._names: dict[str, str] = {}

    def scalars(self, numbers: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics({self._name(tag): value for tag, value in numbers.items()}, step=step)

    def text(self, tag: str, markdown: str) -> None:
        self._mlflow.log_text(markdown, f"{self._name(tag)}.md")

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        self._mlflow.log_figure(figure, f"{self._name(tag)}.png")

    def summary(self, settings: Mapping[str, Setting], metrics: Mapping[str, float], step: int) -> None:
        self._mlflow.log_params({key: str(value)[: self.LONGEST] for key, value in settings.items()})
        self.scalars({f"final/{name}": value for name, value in metrics.items()}, step)

    def close(self, failed: bool) -> None:
        self._mlflow.end_run("FAILED" if failed else "FINISHED")

    def _name(self, tag: str) -> str:
        """MLflow takes letters, digits, and ``_-. /``; two tags stay two."""
        if tag not in self._names:
            name = plain = re.sub(r"[^\w. /-]", "_", tag)
            count = 1
            while name in self._names.values():
                count += 1
                name = f"{plain}_{count}"
            self._names[tag] = name
        return self._names[tag]


def check_sink(name: str) -> None:
    """Raise UserError for an unknown sink, or one whose package is missing."""
    SINKS[name]
    if name != "tensorboard":
        _imported(name)


def _imported(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"tracking.sinks: {package} needs a package more: {pip_install(package)}") from None


def floats(values: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Plain numbers; a device is waited for once, not once per tensor."""
    tensors: dict[torch.device, dict[str, Tensor]] = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            tensors.setdefault(value.device, {})[name] = value.detach().reshape(())
    fetched: dict[str, float] = {}
    for group in tensors.values():
        fetched |= zip(group, torch.stack(list(group.values())).tolist(), strict=True)
    return {name: float(fetched.get(name, value)) for name, value in values.items()}
