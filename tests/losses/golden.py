"""Compare losses with the golden files: one declarative ``Case`` per file, one ``check`` for all.

Everything that is compared comes out of the file, so the same cases hold for other files of the same form.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distpro.losses import DistillationLoss, build_loss

GOLDEN = Path(os.environ.get("DISTPRO_GOLDEN", Path(__file__).resolve().parents[3] / "shared" / "golden"))
FLOOR = 1e-5  # smallest tolerance: float32 sums in another order differ by less
ROUNDING = 8 * torch.finfo(torch.float32).eps  # what a few float32 sums leave of what cancels, relative to its parts
MOMENTUM = 0.1  # of BatchNorm's running statistics, in all files
FLOAT64 = 1e-7  # tolerance of the float64 run, where only the formula can differ (one reference accumulates in float32)

Arrays = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """How one golden file is reproduced.

    ``student``, ``teacher``: names of the input arrays in the order in which the loss reads them; one name is passed
    as a tensor, several as a list. ``target``, ``index``: names of those arrays.
    ``params``: keyword arguments of ``build_loss``, or a function of the arrays that gives them.
    ``student_shapes``, ``teacher_shapes``: given where they are not the shapes of the inputs without the batch.
    ``prefixes``: start of a golden parameter name -> start of the loss's own name (longest match wins; ``""`` is the
    loss itself; None leaves the array to ``call``). A parameter that nothing maps is an error.
    ``call``: replaces ``loss(student, teacher, target, index)``; takes the loss and the arrays, and returns a scalar,
    or the vector that the file calls ``loss_levels``.
    """

    loss: str
    student: tuple[str, ...]
    teacher: tuple[str, ...] = ()
    params: Mapping[str, Any] | Callable[[Arrays], Mapping[str, Any]] = field(default_factory=dict)
    target: str | None = None
    index: str | None = None
    student_shapes: list[tuple[int, ...]] | None = None
    teacher_shapes: list[tuple[int, ...]] | None = None
    prefixes: Mapping[str, str | None] = field(default_factory=dict)
    call: Callable[[Any, Arrays], Tensor] | None = None
    training: bool = True


def load(file: str, dtype: torch.dtype = torch.float32) -> Arrays:
    """The arrays of a golden file, floating point ones in ``dtype``."""
    with np.load(GOLDEN / f"{file}.npz", allow_pickle=False) as npz:
        arrays = {name: torch.from_numpy(npz[name].copy()) for name in npz.files}
    return {k: a.to(dtype) if a.is_floating_point() and k != "loss_f64" else a for k, a in arrays.items()}


def tolerances(file: str) -> tuple[float, float]:
    """Relative tolerances of (loss, gradients): ten times the reference's own float32 error, at least ``FLOOR``."""
    text = (GOLDEN / "README.md").read_text() if (GOLDEN / "README.md").is_file() else ""
    found = re.search(rf"### {re.escape(file)}\.npz\n.*?f32 error: loss (\S+), gradient (\S+)", text, re.DOTALL)
    errors = (float(found[1]), float(found[2])) if found else (0.0, 0.0)
    return max(FLOOR, 10 * errors[0]), max(FLOOR, 10 * errors[1])


def check(file: str, case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
    """Assert that the loss of ``case`` gives the values, gradients and buffers stored in ``file``.

    In float64 only the value is compared (``loss_f64``): the files' gradients are float32.
    """
    arrays = {name: array.to(device) for name, array in load(file, dtype).items()}
    leaves = _inputs_with_gradient(case, arrays)
    loss = _build(case, arrays).to(device, dtype).train(case.training)
    _load_parameters(loss, case, arrays)

    value = _value(loss, case, arrays)
    if dtype == torch.float64:
        return _assert_close("loss_f64", value.sum(), arrays["loss_f64"], FLOAT64)
    value.sum().backward()

    tol_loss, tol_grad = tolerances(file)
    _assert_close("loss", value.sum(), arrays["loss"], tol_loss)
    if value.ndim:
        _assert_close("loss_levels", value, arrays["loss_levels"], tol_loss)
    noise = _rounding_of_gradients(arrays, [f"grad_{name}" for name in leaves])
    for name in leaves:
        assert arrays[name].grad is not None, f"no gradient reaches {name}"
        _assert_close(f"grad_{name}", arrays[name].grad, arrays[f"grad_{name}"], tol_grad, noise)
    for name in case.teacher:
        assert arrays[name].grad is None, f"a gradient reaches the teacher's {name}"
    own_parameters, own_state = dict(loss.named_parameters()), loss.state_dict()
    mapped = _mapped("pgrad.", case, arrays)
    noise = _rounding_of_gradients(arrays, [f"pgrad.{name}" for name, _ in mapped])
    for name, own in mapped:
        _assert_close(f"pgrad.{name}", own_parameters[own].grad, arrays[f"pgrad.{name}"], tol_grad, noise)
    for name, own in _mapped("after.", case, arrays):
        noise = _rounding_of_state(arrays, name)
        _assert_close(f"after.{name}", own_state[own], arrays[f"after.{name}"], tol_loss, noise)


def _rounding_of_gradients(arrays: Arrays, names: list[str]) -> float:
    """Absolute tolerance of gradients some of which cancel, such as a bias before BatchNorm: of the largest's size."""
    return ROUNDING * max((arrays[name].abs().max().item() for name in names), default=0.0)


def _rounding_of_state(arrays: Arrays, name: str) -> float:
    """Absolute tolerance of a running mean, which may be zero but for rounding: of the size of the values averaged,
    the batch's deviation, which the running variance before and after says."""
    if not name.endswith("running_mean"):
        return 0.0
    before, after = (arrays[f"{kind}.{name.removesuffix('mean')}var"].double() for kind in ("param", "after"))
    deviation = ((after - (1 - MOMENTUM) * before) / MOMENTUM).clamp(min=0).sqrt()
    return ROUNDING * MOMENTUM * deviation.max().item()


def _build(case: Case, arrays: Arrays) -> DistillationLoss:
    def shapes(names: tuple[str, ...]) -> list[tuple[int, ...]]:
        return [tuple(arrays[name].shape[1:]) for name in names]

    return build_loss(
        case.loss,
        student_shapes=shapes(case.student) if case.student_shapes is None else case.student_shapes,
        teacher_shapes=shapes(case.teacher) if case.teacher_shapes is None else case.teacher_shapes,
        **(case.params(arrays) if callable(case.params) else case.params),
    )


def _inputs_with_gradient(case: Case, arrays: Arrays) -> list[str]:
    """Names of the inputs whose gradient the file stores; the teacher's are tracked too, to see that none arrives."""
    for name in case.teacher:
        arrays[name].requires_grad_()
    names = [k[len("grad_") :] for k in arrays if k.startswith("grad_")]
    leaves = [name for name in names if name not in case.teacher]
    assert leaves, "the file stores no gradient to compare"
    for name in leaves:
        arrays[name].requires_grad_()
    return leaves


def _value(loss: DistillationLoss, case: Case, arrays: Arrays) -> Tensor:
    if case.call is not None:
        return case.call(loss, arrays)

    def inputs(names: tuple[str, ...]) -> Tensor | list[Tensor]:
        tensors = [arrays[name] for name in names]
        return tensors[0] if len(tensors) == 1 else tensors

    run = loss.levels if "loss_levels" in arrays else loss
    target, index = (arrays[name] if name else None for name in (case.target, case.index))
    return run(inputs(case.student), inputs(case.teacher), target=target, index=index)


def _load_parameters(loss: DistillationLoss, case: Case, arrays: Arrays) -> None:
    state = loss.state_dict()
    for name, own in _mapped("param.", case, arrays):
        assert own in state, f"{name} maps to {own}, which the loss does not have (it has {', '.join(state)})"
        value = arrays[f"param.{name}"]
        assert value.numel() == state[own].numel(), f"{own}: shape {tuple(state[own].shape)}, golden {value.shape}"
        state[own].copy_(value.view_as(state[own]))  # a 1x1 convolution and a linear layer hold the same numbers


def _mapped(kind: str, case: Case, arrays: Arrays) -> list[tuple[str, str]]:
    """(golden name, own name) of all arrays of one kind that ``prefixes`` does not leave out."""
    pairs = []
    for name in (k[len(kind) :] for k in arrays if k.startswith(kind)):
        matches = [p for p in case.prefixes if name == p or name.startswith(f"{p}.")]
        assert matches, f"no prefix maps {name}"
        prefix = max(matches, key=len)
        own = case.prefixes[prefix]
        if own is not None:
            pairs.append((name, (own + name[len(prefix) :]).lstrip(".")))
    return pairs


def _assert_close(what: str, value: Tensor | None, golden: Tensor, tolerance: float, noise: float = 0.0) -> None:
    """Largest difference at most ``tolerance`` times the largest golden entry, or ``noise``."""
    assert value is not None, f"{what}: nothing to compare"
    value, golden = value.detach().double().reshape(golden.shape), golden.detach().double()
    error, scale = (value - golden).abs().max().item(), golden.abs().max().item()
    assert error <= max(tolerance * scale, noise), f"{what}: largest difference {error:.2e} of {scale:.2e}"
