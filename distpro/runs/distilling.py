"""One call from two names and a folder of images to a student.

Each training is an ordinary run with a config of its own in its folder, so that it can be looked at, repeated and resumed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from distpro.build.given import Given
from distpro.console import note
from distpro.models import load_checkpoint
from distpro.runs import commands
from distpro.runs.composing import EPOCHS, Wish, compose
from distpro.runs.distill_parts import Part, check_parts, parts_of
from distpro.runs.export import export
from distpro.runs.training import Result
from pathways.registry import UserError


def distill(
    teacher: str | nn.Module,
    student: str | nn.Module,
    data: Any,
    out: str | Path = "runs/distilled",
    overrides: Sequence[str] = (),
    resume: bool = False,
    *,
    epochs: int = EPOCHS,
    teacher_weights: str | Path | None = None,
    teacher_pretrained: bool = False,
    teacher_epochs: int | None = None,
    student_pretrained: bool = False,
    image_size: int | None = None,
    losses: Sequence[str] | None = None,
    search: bool = False,
    baseline: bool = False,
) -> Result:
    """Train a student with a teacher, from names and a folder of images to weights in the student's own format.

    Args:
        teacher, student: names (``timm:NAME``, ``torchvision:NAME``, ``hf:NAME``, ``package.module:callable``, or one of
            `distpro.models.MODELS`), or modules; a student that is a module is trained in place.
        data: a folder (or .zip, .tar) of images with ``train/<class>/`` and ``test/<class>/`` or ``val/<class>/``, or with
            ``<class>/`` alone, of which a fifth becomes the test part; an .npz file; the name of a data set; or objects, as of
            `distpro.search`.
        out: folder of the student's run: ``student.pt`` and ``student.safetensors``, whose metadata have the normalisation, and
            ``config.yaml``, which ``distpro retrain`` repeats. The teacher's training, the search and the baseline are in
            folders inside it.
        overrides: ``key=value`` of the student's config; those of data, device, seed and the like hold for the teacher's too.
        resume: go on where an earlier call with the same arguments was stopped.
        epochs: of the student's training.
        teacher_weights: file of the teacher's state dict (``torch.save`` or safetensors).
        teacher_pretrained, student_pretrained: begin with the library's weights, which it downloads where it has not got them.
        teacher_epochs: of the teacher's own training on the data; default: none for a module or with ``teacher_weights``, else as
            many as the student's.
        image_size: side of the images; default: as they are, if they are of one size and not above 224, else what pretrained
            weights want, or 224.
        losses: distillation losses by name, at their usual weights; default: KD at 1.
        search: learn the weights of the default losses first, in the place of ``losses``; costs a dozen trainings.
        baseline: train the student without its teacher as well, for comparison.

    A teacher that is a module is not trained, nor changed otherwise: a copy of it is, where ``teacher_epochs`` says so.

    Returns the student's final metrics and the folder. Raises UserError for bad input, `distpro.train.trainer.Interrupted` after
    SIGINT or SIGTERM.
    """
    if search and losses is not None:
        raise UserError("losses: a search learns the weights of the default losses; say search or losses, not both")
    folder = Path(out)
    wish = Wish(
        teacher,
        student,
        data,
        folder,
        epochs,
        teacher_weights,
        teacher_pretrained,
        teacher_epochs,
        student_pretrained,
        image_size,
        ("kd",) if losses is None else losses,
    )
    plan = compose(wish, overrides)
    parts = parts_of(plan, folder, overrides, search, baseline)
    check_parts(parts, wish, resume)
    with _as_it_was(teacher):
        return _distill(wish, parts, resume)


@contextmanager
def _as_it_was(teacher: str | nn.Module) -> Iterator[None]:
    """A module's parameters ask for gradients, and its parts are in training, afterwards as before."""
    if not isinstance(teacher, nn.Module):
        yield
        return
    asks = [(p, p.requires_grad) for p in teacher.parameters()]
    modes = [(module, module.training) for module in teacher.modules()]
    try:
        yield
    finally:
        for parameter, asked in asks:
            parameter.requires_grad_(asked)
        for module, training in modes:
            module.training = training


def _distill(wish: Wish, parts: Mapping[str, Part], resume: bool) -> Result:
    teacher, student, data = wish.teacher, wish.student, wish.data
    given: dict[str, Any] = {"data": None if isinstance(data, (str, Path)) else data}
    pair: dict[str, Any] = {
        name: model for name, model in (("teacher", teacher), ("student", student)) if isinstance(model, nn.Module)
    }
    if part := parts.get("teacher"):
        pair |= _taught(part, resume, pair.get("teacher"), given)
    if part := parts.get("alone"):
        first = Given(student=pair.get("student")).copied().student
        note(f"the student without its teacher: {part.folder}")
        commands.train(part.config, part.folder, part.overrides, _begun(part.folder, resume), student=first, **given)
    schedule = None
    if part := parts.get("search"):
        schedule = part.folder / "alpha.pt"
        note(f"the search: {part.folder}")
        commands.search(part.config, part.folder, part.overrides, _begun(part.folder, resume), **given, **pair)
    part = parts["student"]
    note(f"the student: {part.folder}")
    result = commands.retrain(
        part.config, schedule, part.folder, part.overrides, _begun(part.folder, resume), **given, **pair
    )
    if find_spec("safetensors") and (part.folder / "student.pt").is_file():
        export(part.folder, "safetensors")
    return result


def _taught(part: Part, resume: bool, teacher: nn.Module | None, given: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Train the teacher; what takes its place where it is a module."""
    note(f"the teacher: {part.folder}")
    own = Given(student=teacher).copied().student
    commands.train(part.config, part.folder, part.overrides, _begun(part.folder, resume), student=own, **given)
    if own is None:
        return {}
    load_checkpoint(own, part.folder / "student.pt")
    return {"teacher": own}


def _begun(folder: Path, resume: bool) -> bool:
    """Whether a training has something to go on from. What it wrote before its first checkpoint is no such thing, and goes."""
    begun = resume and ((folder / "checkpoint.pt").is_file() or (folder / "trials").is_dir())
    if resume and not begun:
        (folder / "config.yaml").unlink(missing_ok=True)
    return begun
