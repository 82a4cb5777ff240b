"""The command line: distpro search | retrain | tune | train | evaluate | inspect | plot | export | list | doctor | init, and
what distpro.cli.distill adds.

What a command needs is imported when it runs, so that --help and --version answer at once.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import distpro
from distpro.cli.distill import add_commands

KINDS = (
    *("losses", "transforms", "distances", "models", "datasets", "tasks", "metrics", "weightings", "processes"),
    *("estimators", "augmentations", "optimizers", "presets"),
)

LONG = ("search", "retrain", "tune", "train", "distill", "compare")
"""Commands that train: they go on when nobody reads what they print."""

BOARD = 20  # trials of a leaderboard that are printed


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _wrong(f"{message} (see '{self.prog} --help')")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            name = "/".join(action.option_strings) or action.dest
            raise _wrong(f"argument {name}: invalid choice: '{value}'", str(value), list(action.choices))


def _wrong(message: str, name: str = "", allowed: Sequence[str] = ()) -> Exception:
    """A UserError; where something else is allowed, with all of it and what is nearest to ``name``."""
    from pathways.registry import UserError, nearest

    return UserError(f"{message}{nearest(name, allowed)} (allowed: {', '.join(allowed)})" if allowed else message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0; 2 after bad input, or a file that cannot be read or written; 128 + n
    after signal n, checkpoint written."""
    warnings.filterwarnings("ignore", module="PIL")  # of damaged images, which get a message
    try:
        options = _parse(list(sys.argv[1:] if arguments is None else arguments))
        if options.command not in LONG:
            return options.run(options) or 0
        from distpro.console import unread_streams_ignored

        with unread_streams_ignored():
            return options.run(options) or 0
    except KeyboardInterrupt:
        return _failed("stopped; everything up to the last checkpoint is kept", 130)
    except BrokenPipeError:
        return 0
    except OSError as error:
        return _failed(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except Exception as error:
        from pathways.registry import UserError

        if isinstance(error, UserError):
            return _failed(str(error), getattr(error, "status", 2))
        from distpro.train.trainer import Interrupted

        if isinstance(error, Interrupted):
            return _failed(str(error), 128 + error.signal_number)
        from distpro.console import is_own_code, raised

        if any(is_own_code(frame.filename) for frame in traceback.extract_tb(error.__traceback__)[1:]):
            return _failed(f"code of your own failed: {raised(error)}")
        raise


def _failed(message: str, status: int = 2) -> int:
    from distpro.console import fail

    fail(message)
    return status


def build_parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The parser of the command line, and those of its commands by name. Needs no package but this one."""
    parser = _Parser(
        prog="distpro",
        description="Learn when a student should listen to which part of its teacher.",
        epilog="A config's keys may follow as key=value: training.epochs=10 student.model=resnet8 preset=paper",
    )
    parser.add_argument("--version", action="version", version=f"distpro {distpro.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def add(name: str, run: Any, summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary)
        command.set_defaults(run=run)
        return command

    def add_run_options(command: argparse.ArgumentParser) -> None:
        command.add_argument("--out", metavar="DIR", help="the run's folder (default: runs/<config>)")
        command.add_argument("--resume", action="store_true", help="go on from the folder's checkpoint")
        command.add_argument("--device", metavar="D", help="auto, cpu, cuda, cuda:N")
        command.add_argument("--dry-run", action="store_true", help="say what would be run, and its cost")

    def add_seeds(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--seeds", type=int, metavar="N", help="N runs, from the config's seed on, and their spread"
        )

    search = add("search", _search, "learn a distillation schedule and write alpha.pt")
    search.add_argument("config", metavar="CFG")
    add_run_options(search)
    add_seeds(search)
    retrain = add("retrain", _retrain, "train a student with a schedule or one of its controls")
    retrain.add_argument("config", metavar="CFG", nargs="?")
    retrain.add_argument("--schedule", metavar="alpha.pt")
    add_run_options(retrain)
    add_seeds(retrain)
    tune = add("tune", _tune, "let methods, constant weights and a schedule compete on validation data, by Optuna")
    tune.add_argument("config", metavar="CFG")
    tune.add_argument("--schedule", metavar="alpha.pt", help="takes part, with its controls")
    tune.add_argument("--trials", type=int, metavar="N", help="the budget in whole trainings (tune.trials)")
    tune.add_argument("--workers", type=int, default=1, metavar="N", help="processes on this machine")
    add_run_options(tune)
    train = add("train", _train, "plain training: a teacher, or the baseline without one")
    train.add_argument("config", metavar="CFG")
    add_run_options(train)
    add_seeds(train)
    evaluate = add("evaluate", _evaluate, "test metrics of a run, of a config's teacher, or of a checkpoint")
    evaluate.add_argument("target", metavar="RUN_OR_CHECKPOINT")
    evaluate.add_argument("--config", metavar="CFG", help="model (as student) and data of a bare checkpoint")
    evaluate.add_argument("--device", metavar="D")
    inspect = add("inspect", _inspect, "explain a schedule, or what a config amounts to")
    inspect.add_argument("target", metavar="alpha.pt|CFG")
    plot = add("plot", _plot, "draw a schedule")
    plot.add_argument("schedule", metavar="alpha.pt")
    plot.add_argument(
        "--out", metavar="PATH", help="a folder, or a picture by its suffix; default: beside the schedule"
    )
    plot.add_argument("--format", action="append", choices=("png", "svg", "pdf"), help="default: png")
    export = add("export", _export, "write a run's student for use elsewhere")
    export.add_argument("folder", metavar="RUN")
    formats, said = ("safetensors", "pt2", "onnx", "transformers"), "default: by the suffix of --out, else safetensors"
    export.add_argument("--format", choices=formats, help=said)
    export.add_argument("--out", metavar="FILE")
    listing = add("list", _list, "what there is: " + ", ".join(KINDS))
    listing.add_argument("kind", metavar="KIND")
    add("doctor", _doctor, "versions, device, data folder and extras of this machine")
    add_commands(add, add_run_options)
    init = add("init", _init, "write a config to begin with, and its teacher's")
    init.add_argument("name", metavar="EXAMPLE", help="digits")
    init.add_argument("--out", metavar="FILE", help="default: EXAMPLE.yaml here; the teacher's goes beside it")
    return parser, commands.choices


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser, commands = build_parser()
    if "_ARGCOMPLETE" in os.environ:  # the shell asks what may follow
        import argcomplete

        argcomplete.autocomplete(parser)
    if arguments and not arguments[0].startswith("-") and arguments[0] not in commands:
        raise _wrong(f"unknown command '{arguments[0]}'", arguments[0], list(commands))
    options, rest = parser.parse_known_args(arguments)
    takes_overrides = options.command in ("search", "retrain", "tune", "train", "evaluate", "inspect", "distill")
    unknown = [r for r in rest if not takes_overrides or r.startswith("-") or "=" not in r]
    if getattr(options, "config", None) and "=" in str(options.config) and not Path(options.config).exists():
        rest, options.config = [options.config, *rest], None  # `retrain --schedule a.pt key=value`: no CFG
        if options.command in ("search", "tune", "train"):
            raise _wrong(f"{options.command}: the config file is missing")
    if unknown:
        near = _meant(unknown[0], commands[options.command])
        raise _wrong(
            f"{options.command}: unknown argument '{unknown[0]}'{near} (overrides are key=value, for instance seed=1)"
        )
    options.overrides = rest
    if getattr(options, "device", None):
        options.overrides.append(f"device={options.device}")
    return options


def _meant(word: str, command: argparse.ArgumentParser) -> str:
    """An option of the command, or a config's key, that an unknown word may have been meant for."""
    from distpro.config.errors import keys_called
    from pathways.registry import nearest

    name = word.partition("=")[0]
    near = nearest(name, command._option_string_actions) if name.startswith("-") else ""
    keys = [f"{key}=" for key in keys_called(name.strip("-").replace("-", "_"))[:2]]
    return near or (f"; did you mean {' or '.join(keys)}?" if keys else "")


def _out(options: argparse.Namespace, name: str) -> Path:
    return Path(options.out) if options.out else Path("runs") / name


def _finish(metrics: dict[str, float], folder: Path) -> None:
    from distpro.console import table

    table(str(folder), ["metric", "value"], [[name, f"{value:.6g}"] for name, value in metrics.items()])


def _run(options: argparse.Namespace, run: Any, folder: Path, first: int) -> None:
    """One training, or one for each seed."""
    from distpro.runs.seeds import run_seeds

    if options.seeds is None:
        _finish(run(folder, options.overrides, options.resume).metrics, folder)
        return
    run_seeds(
        lambda *given: run(*given).metrics, folder, options.overrides, options.resume, first, options.seeds, "metric"
    )


def _dry_run(config: Any, searching: bool) -> None:
    from distpro.config.stages import stages_of
    from distpro.report.cost import as_text, describe

    for stage in stages_of(config):
        print(*([f"stage    {stage.name}"] if stage.name else []), as_text(describe(stage.config, searching)), sep="\n")


def _search(options: argparse.Namespace) -> None:
    from distpro.config.reading import default_space, read_config
    from distpro.report.words import explain_schedule
    from distpro.runs.commands import search
    from distpro.runs.seeds import last_weights, run_seeds

    if options.dry_run:
        _dry_run(read_config(options.config, options.overrides, space=default_space), searching=True)
        return
    folder = _out(options, Path(options.config).stem)
    if options.seeds is not None:
        first = read_config(options.config, options.overrides, space=default_space).seed

        def run(*given: Any) -> dict[str, float]:
            return last_weights(search(options.config, *given))

        run_seeds(run, folder, options.overrides, options.resume, first, options.seeds, "last weight")
        return
    schedule = search(options.config, folder, options.overrides, options.resume)
    print(explain_schedule(schedule))
    path = folder / "alpha.pt"
    print(f"\nschedule: {path}\nretrain:  distpro retrain --schedule {shlex.quote(str(path))}")


def _retrain(options: argparse.Namespace) -> None:
    from distpro.runs.commands import retrain, retrain_config
    from distpro.schedule import Schedule

    schedule = Schedule.load(options.schedule) if options.schedule else None
    config = retrain_config(options.config, schedule, options.overrides)
    if options.dry_run:
        _dry_run(config, searching=False)
        return
    name = Path(options.config).stem if options.config else f"retrain_{config.retrain.weights}"
    run = partial(retrain, options.config, schedule)
    _run(options, run, _out(options, name), config.seed)


def _tune(options: argparse.Namespace) -> None:
    from distpro.build.given import Given
    from distpro.console import table
    from distpro.report.tuning import board
    from distpro.runs.commands import tune, tune_request

    if options.trials is not None:
        options.overrides.append(f"tune.trials={options.trials}")
    if options.dry_run:
        from distpro.runs.plan import plan_of

        columns, rows, cost = plan_of(tune_request(options.config, options.overrides, options.schedule, Given()))
        table(options.config, columns, rows)
        print(cost)
        return
    folder = _out(options, f"{Path(options.config).stem}_tuned")
    tuned = tune(
        options.config, folder, options.overrides, options.resume, schedule=options.schedule, workers=options.workers
    )
    columns, cells = board(tuned.rows, tuned.headline)
    table(str(folder), columns, cells[:BOARD])
    print(
        f"all of them: {folder / 'leaderboard.md'}\nretrain:     distpro retrain {shlex.quote(str(folder / 'best.yaml'))}"
    )


def _train(options: argparse.Namespace) -> None:
    from distpro.config.reading import read_config
    from distpro.runs.commands import train

    if options.dry_run:
        _dry_run(read_config(options.config, [*options.overrides, "retrain.weights=none"]), searching=False)
        return
    folder = _out(options, f"{Path(options.config).stem}_alone")
    _run(options, partial(train, options.config), folder, read_config(options.config, options.overrides).seed)


def _evaluate(options: argparse.Namespace) -> None:
    from distpro.runs.commands import evaluate

    print(json.dumps(evaluate(options.target, options.overrides, options.config), indent=1))


def _inspect(options: argparse.Namespace) -> None:
    from distpro.config.reading import read_config
    from distpro.report.words import explain_schedule
    from distpro.schedule import Schedule

    if Path(options.target).suffix in (".yaml", ".yml"):
        config = read_config(options.target, options.overrides)
        learns = config.has_teacher and not config.stages and config.retrain.schedule is None
        _dry_run(config, searching=learns and config.retrain.weights not in ("constant", "none"))
    elif options.overrides:
        raise _wrong(
            f"inspect: {options.target} is a schedule, not a config: '{options.overrides[0]}' would change nothing"
        )
    else:
        print(explain_schedule(Schedule.load(options.target)))


def _plot(options: argparse.Namespace) -> None:
    from distpro.report.plots import FORMATS, save_figures
    from distpro.schedule import Schedule

    suffix = Path(options.out or "").suffix.lower().removeprefix(".")
    if options.format and suffix in FORMATS and options.format != [suffix]:
        raise _wrong(
            f"plot: --out {options.out} is one {suffix} file, which --format {' '.join(options.format)} is not"
        )
    schedule = Schedule.load(options.schedule)
    for path in save_figures(schedule, options.out or Path(options.schedule).parent, tuple(options.format or ["png"])):
        print(path)


def _export(options: argparse.Namespace) -> None:
    from distpro.runs.export import export

    print(export(options.folder, options.format, options.out))


def _list(options: argparse.Namespace) -> None:
    from distpro.build.optimizer import OPTIMIZERS, libraries
    from distpro.config.reading import presets
    from distpro.data import AUGMENTATIONS, DATASETS
    from distpro.losses import LOSSES
    from distpro.models import MODELS
    from distpro.process import PROCESSES
    from distpro.search.estimators.base import ESTIMATORS
    from distpro.search.weighting import WEIGHTINGS
    from distpro.tasks import METRICS, TASKS
    from pathways import DISTANCES, TRANSFORMS

    entries = (LOSSES, TRANSFORMS, DISTANCES, MODELS, DATASETS, TASKS, METRICS, WEIGHTINGS, PROCESSES, ESTIMATORS)
    found: dict[str, Any] = dict(zip(KINDS, (*entries, AUGMENTATIONS, OPTIMIZERS, presets()), strict=True))
    if options.kind not in found:
        raise _wrong(f"unknown kind '{options.kind}'", options.kind, KINDS)
    if options.kind == "losses":
        from distpro.console import table

        rows = [[n, c.year, c.family, c.reads, c.stages, c.title] for n, c in LOSSES.items()]  # type: ignore[attr-defined]
        width = shutil.get_terminal_size((120, 0)).columns  # of $COLUMNS, or of the terminal
        table("losses", ["name", "year", "family", "reads", "stages", "method"], rows, width)
    elif options.kind == "optimizers":
        print("\n".join(f"{name:<14}also in a search" for name in OPTIMIZERS))
        print("\n".join(f"{name:<14}{library}" for name, library in libraries().items()))
    else:
        print("\n".join(found[options.kind]))


def _doctor(options: argparse.Namespace) -> None:
    from distpro.runs.doctor import findings

    for what, found in findings():
        print(f"{what:<14}{found}")


def _init(options: argparse.Namespace) -> None:
    from distpro.config.starters import write_starter

    search, teacher = write_starter(options.name, options.out)
    print(f"wrote {search} and {teacher}; next:")
    print(f"  distpro train {teacher} --out runs/quickstart/teacher")
    print(f"  distpro search {search} --out runs/{search.stem}")
    print(f"  distpro retrain --schedule runs/{search.stem}/alpha.pt")
