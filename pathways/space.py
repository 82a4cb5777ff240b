"""The search space: connections × transforms → pathways, each one scalar term with parameters of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pathways.call import Call
from pathways.connections import connect as connect_taps
from pathways.distances import DISTANCES, over_tokens
from pathways.layouts import Layout, channels_first, probe_layouts
from pathways.registry import UserError
from pathways.taps import parse_tap
from pathways.transforms import TRANSFORMS, MapTransform, Tokens

Spec = str | Mapping[str, Any]


def parse_spec(spec: Spec, what: str) -> tuple[str, dict[str, Any]]:
    """``'hcl'`` or ``{'name': 'hcl', 'levels': [4]}`` or ``{'hcl': {'levels': [4]}}`` → name and parameters."""
    if isinstance(spec, str):
        return spec, {}
    if isinstance(spec, Mapping) and "name" in spec:
        return spec["name"], {key: value for key, value in spec.items() if key != "name"}
    if isinstance(spec, Mapping) and len(spec) == 1:
        ((name, inner),) = spec.items()
        if isinstance(inner, Mapping):
            return name, dict(inner)
    raise UserError(f"{what}: expected a name or {{name: ..., parameters}}, got {spec!r}")


class Pathway(nn.Module):
    """Loss ℓ_(i,j,k) = δ(M_k(F_j^student), F_i^teacher) (Section 3.1).

    Attributes:
        key: stable name, ``<teacher tap><-<student tap>@<transform>``.
        level: (i, j, k), counted from 1: teacher level, student level, transform.
        transform_name: name of M_k, by which a schedule is matched on another pair.
        student_taps, teacher_taps: the one tap read on each side.
        channels_last: whether the student's and the teacher's feature are maps (N, H, W, C); transform and distance are
            given (N, C, H, W).
        weight: constant weight, a process ``step → weight``, or None where a schedule or a search decides.
        masked: whether both features are tokens that are compared position by position: it then takes a ``mask`` of them.
        per_level, reduction, rows, scalars: what other terms of an objective may ask for and a pathway does not.
    """

    weight: Any = None
    per_level = False
    reduction: str | None = None
    rows = "first"

    def __init__(
        self,
        teacher_tap: str,
        student_tap: str,
        level: tuple[int, int, int],
        transform_name: str,
        transform: nn.Module,
        distance: nn.Module,
        channels_last: tuple[bool, bool] = (False, False),
    ):
        super().__init__()
        self.key = f"{teacher_tap}<-{student_tap}@{transform_name}"
        self.level = level
        self.transform_name = transform_name
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)
        self.transform, self.distance = transform, distance
        self.channels_last = channels_last
        self.scalars: dict[str, Any] = {}
        self.masked = bool(getattr(transform, "by_position", False))

    def at(self, step: int) -> None:
        """Nothing: a pathway has no scalars that follow the training step."""

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Tensor | None = None,
        index: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Scalar loss of a batch of student and teacher features. ``target`` and ``index`` are not used. ``mask``: bool (N, L),
        the tokens that count; of the others nothing is seen."""
        student, teacher = map(channels_first, (student, teacher), self.channels_last)
        sized = isinstance(self.transform, MapTransform) and teacher.dim() == 4
        ours = self.transform(student, tuple(teacher.shape[2:])) if sized else self.transform(student)
        return self.distance(ours, teacher) if mask is None else over_tokens(self.distance, ours, teacher, mask)

    def extra_repr(self) -> str:
        return f"{self.key}, level={self.level}"


def build_pathways(
    teacher: nn.Module,
    student: nn.Module,
    example_input: Any,
    teacher_taps: Sequence[str],
    student_taps: Sequence[str],
    connect: str | Sequence[Sequence[str]] = "all",
    transforms: Sequence[Spec] = ("conv1x1", "conv3x3", "attention"),
    distance: Spec = "hcl",
    teacher_shapes: Mapping[str, Sequence[int] | Layout] | None = None,
    student_shapes: Mapping[str, Sequence[int] | Layout] | None = None,
) -> list[Pathway]:
    """The pathways of a search space, teacher-major, then student level, then transform.

    Shapes, and whether a map has its channels last, are probed with ``example_input``, anything that `Call.of` takes,
    which leaves no trace. Where ``teacher_shapes`` or ``student_shapes`` give them, tap → shape of one sample, of maps
    (C, H, W), or its `Layout`, that model does not run. The new parameters are on the student's device, and of the dtype of the
    parameters in the module that is read (of the student's first where that has none).

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3))
    >>> import torch
    >>> [p.key for p in build_pathways(net, net, torch.zeros(1, 3, 9, 9), ["1"], ["0", "1"], transforms=["conv1x1"])]
    ['1<-0@conv1x1', '1<-1@conv1x1']

    Raises UserError for unknown taps, rules, transforms, distances or parameters, and for shapes that do not fit.
    """
    teacher_layouts = _layouts(teacher, teacher_taps, example_input, teacher_shapes, "teacher")
    student_layouts = _layouts(student, student_taps, example_input, student_shapes, "student")
    chosen = [parse_spec(t, "transforms") for t in transforms]
    distance_name, distance_params = parse_spec(distance, "distance")
    names = [name for name, _ in chosen]
    if len(set(names)) != len(names):
        names = [f"{name}.{k}" for k, name in enumerate(names, 1)]
    parameter = next(student.parameters(), None)
    device = Call.of(example_input).device if parameter is None else parameter.device
    space = []
    for i, j in connect_taps(connect, teacher_taps, student_taps):
        for k, (name, params) in enumerate(chosen):
            ours, theirs = student_layouts[student_taps[j]], teacher_layouts[teacher_taps[i]]
            try:
                transform = TRANSFORMS.build(
                    name, ours.shape, theirs.shape, **params, **_grids(name, params, ours, theirs)
                )
            except UserError as error:
                raise UserError(f"pathway {teacher_taps[i]} <- {student_taps[j]}: {error}") from None
            pathway = Pathway(
                teacher_taps[i],
                student_taps[j],
                (i + 1, j + 1, k + 1),
                names[k],
                transform,
                DISTANCES.build(distance_name, **distance_params),
                (ours.channels_last, theirs.channels_last),
            )
            precision = _precision(student, student_taps[j])
            made = torch.get_default_dtype()  # a part of somebody else's own may hold other types beside
            space.append(pathway.to(device) if precision == made else pathway.to(device, precision))
    if not space:
        raise UserError("the search space is empty: no connections or no transforms")
    return space


def _precision(student: nn.Module, tap: str) -> torch.dtype:
    """The dtype of the layers that compute a tap, without which a transform of it cannot run outside of autocast."""
    module = dict(student.named_modules()).get(parse_tap(tap).module)
    modules = (student,) if module is None else (module, student)
    computing = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # and not what weights may be stored in
    found = (p.dtype for m in modules for p in m.parameters() if p.dtype in computing)
    return next(found, torch.float32)


def _grids(name: str, params: Mapping[str, Any], ours: Layout, theirs: Layout) -> dict[str, Any]:
    """What is known of the grids that tokens stand for, for a transform that asks and is not told."""
    kind: Any = TRANSFORMS[name]
    asks = isinstance(kind, type) and issubclass(kind, Tokens) and not {"prefix", "grid"} & params.keys()
    return {"grid": (ours.grid, theirs.grid)} if asks else {}


def _layouts(
    model: nn.Module,
    taps: Sequence[str],
    example_input: Any,
    known: Mapping[str, Sequence[int] | Layout] | None,
    side: str,
) -> dict[str, Layout]:
    if known is None:
        return probe_layouts(model, taps, example_input)
    for name in taps:
        if name not in known:
            raise UserError(f"no shape is given for {side} tap '{name}' (given: {', '.join(known) or 'none'})")
    return {name: k if isinstance(k := known[name], Layout) else Layout(tuple(k)) for name in taps}
