"""A run's student in formats that other programs read."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distpro import build
from distpro.batch import Batch
from distpro.build.given import OBJECT
from distpro.build.models import build_network
from distpro.config.reading import read_config
from distpro.config.stages import stages_of
from distpro.console import note, pip_install, warn
from distpro.data.statistics import DATA, stored_facts
from distpro.files import load_safely, naming, write_atomically
from distpro.losses import LOSSES
from distpro.models import load_checkpoint
from distpro.runs.detector import onnx_of, program_of
from distpro.runs.folder import student_of
from distpro.task import Task
from pathways.call import map_tensors
from pathways.containers import entries
from pathways.registry import UserError, nearest

RESPONSES = {"classes": "logits", "maps": "logits", "depths": "depth"}
"""What an ONNX file calls the response, by the kind of the task's targets."""
ONE_FILE = 1_800_000_000
"""Bytes of weights from which on an ONNX file, which can have 2 GB, has them beside it, in ``student.onnx.data``."""


FORMATS = ("safetensors", "pt2", "onnx", "transformers")


def export(folder: str | Path, format: str | None = None, out: str | Path | None = None) -> Path:
    """Write the trained student of a run.

    Args:
        folder: the run's folder.
        format: ``safetensors`` (weights), ``pt2`` (torch.export program) or ``onnx``, which take batches of any size, of
            texts with any number of tokens (of a detector one image: ONNX of any size, pt2 of one size), or ``transformers``: a folder that its ``from_pretrained`` reads, with the
            tokenizer. What the data were (mean and std among it) is in the file: safetensors' and ONNX' metadata
            ``distpro``, pt2's extra file ``data.json``. ONNX' outputs are called ``logits`` (``depth``), others by their keys.
            By default what the suffix of ``out`` says, else safetensors.
        out: file or folder to write; by default ``student.<format>`` in the folder.

    Returns the file's path. Raises UserError if the run has no student, a package is missing, or the format cannot hold
    the student.
    """
    folder = Path(folder)
    format = _format(format, out)
    path = Path(out) if out else folder / f"student.{format}"
    weights = student_of(folder)
    config = stages_of(read_config(folder / "config.yaml"))[-1].config
    through = [term.loss for term in config.terms if LOSSES[term.loss].deploys]  # type: ignore[attr-defined]
    if through:
        raise UserError(f"{folder}: the student answers through its term '{through[0]}', which cannot be exported yet")
    facts = json.dumps(stored_facts(folder))
    if format == "safetensors":
        return _write_safetensors(load_safely(weights), path, facts)
    for name in (config.student.model, config.data.name, str(config.task)):
        if name.startswith(OBJECT):
            raise UserError(
                f"{folder}: '{name}' was handed over as an object, which {format} needs: export safetensors"
            )
    data = build.build_data(build.as_stored(config, folder))
    task = build.build_task(config)
    model = build_network(config.student, task.model_arguments(data), load=False).eval()
    load_checkpoint(model, weights)
    if format == "transformers":
        return _write_folder(model, data, path)
    args, kwargs = task.call(_seen(task, data.example(2)), False)
    listed = any(isinstance(value, list) for value in [*args, *kwargs.values()])
    if listed and getattr(task, "targets", None) != "boxes":
        raise UserError(f"{folder}: the student takes a list, which no {format} file can stand for: export safetensors")
    dynamic: Any = tuple(map_tensors(_any_size, list(args)))
    if kwargs:
        dynamic = map_tensors(_any_size, dict(kwargs))
    try:
        content = None
        if listed and format == "onnx":
            content = onnx_of(model, args[0][0], facts)
        elif format == "pt2":
            program = (
                program_of(model, args[0][0])
                if listed
                else torch.export.export(model, args, dict(kwargs), dynamic_shapes=dynamic)
            )
            buffer = io.BytesIO()
            torch.export.save(program, buffer, extra_files={DATA: facts})
            content = buffer.getvalue()
        else:
            onnx = {"dynamo": True, "dynamic_shapes": dynamic, "verbose": False}
            written: Any = torch.onnx.export(model, args, kwargs=dict(kwargs), **onnx)  # type: ignore[arg-type]
            written.model.metadata_props["distpro"] = facts
            _name_outputs(written.model.graph, model, task, args, kwargs)
    except ImportError as error:
        raise _package_missing(format, error) from None
    except Exception as error:  # a model may do what cannot be written down
        reason = re.sub("\x1b\\[[0-9;]*m", "", str(error)).strip().splitlines()[:1] or [""]
        raise UserError(
            f"{folder}: '{config.student.model}' cannot be exported to {format}: {type(error).__name__}: {reason[0]}"
        ) from error
    if listed and format == "pt2":
        height, width = args[0][0].shape[1:]
        note(f"{path}: takes one image of {height}×{width} alone; an ONNX file takes any")
    if content is not None:
        write_atomically(content, path)
    elif sum(t.nbytes for t in (*model.parameters(), *model.buffers())) < ONE_FILE:
        write_atomically(written.model_proto.SerializeToString(), path)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        with naming(path):
            written.save(str(path), external_data=True)
    return path


def _seen(task: Any, example: Batch) -> Batch:
    """The example as the model gets it in an evaluation: a window of it, where that is how the task evaluates."""
    window = getattr(getattr(task, "views", None), "window", None)
    if window is None:
        return example
    return replace(example, inputs=example.inputs[..., : window[0], : window[1]])


def _format(format: str | None, out: str | Path | None) -> str:
    """The format that is asked for, by its name, by the file's suffix, or by both. Raises UserError where they disagree."""
    suffix = Path(out).suffix.lower() if out else ""
    known = ", ".join(f".{name}" for name in FORMATS[:3])
    if format is None:
        if suffix and suffix[1:] not in FORMATS[:3]:
            raise UserError(f"{out}: no format ends in '{suffix}' (allowed: {known}, or --format {', '.join(FORMATS)})")
        return suffix[1:] or "safetensors"
    if format not in FORMATS:
        raise UserError(f"unknown format '{format}'{nearest(format, FORMATS)} (allowed: {', '.join(FORMATS)})")
    if suffix[1:] in {*FORMATS[:3], "pt", "pth"} - {format}:
        raise UserError(f"{out}: '{suffix}' is not the suffix of {format} (allowed: {known}; or leave out --format)")
    return format


def _any_size(tensor: Tensor) -> dict[int, Any]:
    """Which sizes of an input may change: the number of samples, and of tokens (N, L) that too."""
    tokens = tensor.dim() == 2 and not tensor.is_floating_point()
    return dict.fromkeys((0, 1) if tokens else (0,), torch.export.Dim.DYNAMIC)


def _name_outputs(graph: Any, model: nn.Module, task: Task, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Call the response what it is, every other output by its key in what the model gives, a position ``output_0``. A name
    that the graph has for something else already is not given."""
    with torch.no_grad():
        output = model(*args, **kwargs)
    found, response = entries(output), task.response(output)
    said = RESPONSES.get(getattr(task, "targets", "classes"), "output")
    names = [said if len(found) == 1 or x is response else key for key, x in found.items()]
    taken = {value.name for node in graph for value in node.outputs} | {value.name for value in graph.inputs}
    for value, name in zip(graph.outputs, names, strict=True):
        name = f"output_{name}" if name[0].isdigit() else name
        value.name = value.name if name in taken else name


def _write_folder(model: Any, data: Any, path: Path) -> Path:
    if not hasattr(model, "save_pretrained"):
        raise UserError(f"{type(model).__name__} is not a model of transformers: export safetensors")
    names = getattr(data, "names", None)
    if names and getattr(model.config, "num_labels", None) == len(names):
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: number for number, name in enumerate(names)}
    model.save_pretrained(path)
    _as_umask_says(path)
    tokenizer = getattr(data, "tokenizer", None)
    if tokenizer is not None:
        tokenizer.fast.save_pretrained(path)
    return path


def _write_safetensors(state: Mapping[str, Tensor], path: Path, facts: str) -> Path:
    """Weights by name; what is shared is written once for each name, for the format has no other way, and said."""
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise _package_missing("safetensors", error) from None
    for names in _tied(state):
        warn(
            f"{path}: {' and '.join(names)} are one tensor in the student, and two in the file: tie them when you load it"
        )
    whole = {name: tensor.contiguous().clone() for name, tensor in state.items()}
    write_atomically(save(whole, metadata={"format": "pt", "distpro": facts}), path)
    return path


def _as_umask_says(folder: Path) -> None:
    """Weights of safetensors' own making can be read by nobody else."""
    probe = folder / ".umask"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)


def _tied(state: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of each tensor that has several."""
    found: dict[Any, list[str]] = {}
    for name, tensor in state.items():
        if tensor.numel():
            found.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype), []).append(name)
    return [names for names in found.values() if len(names) > 1]


def _package_missing(format: str, error: ImportError) -> UserError:
    return UserError(f"export to {format} needs a package more: {pip_install('export')} ({error})")
