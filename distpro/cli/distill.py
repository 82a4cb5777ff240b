"""The command line from a folder of images to a page: distpro distill | report | compare. What a command needs is imported when it runs."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distpro.runs.distill_parts import Part

Add = Callable[[str, Any, str], argparse.ArgumentParser]


def add_commands(add: Add, add_run_options: Callable[[argparse.ArgumentParser], None]) -> None:
    """Add the commands by ``add(name, run, summary)``."""
    distill = add("distill", _distill, "from two models and a folder of images to a student, in one call")
    model = "timm:NAME, torchvision:NAME, hf:NAME, package.module:callable, or of 'distpro list models'"
    distill.add_argument("--teacher", metavar="MODEL", required=True, help=model)
    distill.add_argument("--student", metavar="MODEL", required=True, help="likewise")
    distill.add_argument(
        "--data", metavar="DIR", required=True, help="train/CLASS/ and test/CLASS/ (or val/), or CLASS/"
    )
    distill.add_argument("--epochs", type=int, metavar="N", help="of the student (default: 60)")
    distill.add_argument("--teacher-weights", metavar="FILE", help="the teacher's state dict, .pt or .safetensors")
    distill.add_argument(
        "--teacher-pretrained", action="store_true", help="begin with the library's weights (downloads)"
    )
    distill.add_argument(
        "--teacher-epochs",
        type=int,
        metavar="N",
        help="train the teacher on the data first (default: as the student, or 0 with --teacher-weights)",
    )
    distill.add_argument("--student-pretrained", action="store_true", help="likewise, for the student")
    distill.add_argument("--image-size", type=int, metavar="N", help="side of the square images")
    distill.add_argument("--loss", action="append", metavar="NAME", help="a distillation loss; default: kd")
    distill.add_argument("--search", action="store_true", help="learn the weights of the default losses first")
    distill.add_argument("--baseline", action="store_true", help="train the student without its teacher as well")
    add_run_options(distill)
    report = add("report", _report, "write one self-contained HTML page about runs, or a study's rows")
    report.add_argument("runs", metavar="RUN", nargs="+", help="a run's folder, or a study's rows (.jsonl)")
    report.add_argument(
        "--out", metavar="FILE", help="default: report.html in the first run's folder, or beside the rows"
    )
    report.add_argument(
        "--baseline", metavar="LABEL", help="what the others are compared with (default: the first run)"
    )
    report.add_argument("--title", metavar="TEXT", help="default: the runs' names")
    compare = add(
        "compare", _compare, "run a study: searches, runs and their seeds, side by side, and a page about them"
    )
    compare.add_argument("config", metavar="STUDY", help="a study's YAML file, such as studies/quickstart.yaml")
    compare.add_argument("--out", metavar="DIR", help="of rows and page (default: runs/STUDY)")
    compare.add_argument("--jobs", type=int, default=1, metavar="N", help="runs side by side")
    compare.add_argument("--only", nargs="+", metavar="LABEL", help="these runs, with their searches")
    compare.add_argument("--dry-run", action="store_true", help="say what would be run, and its cost")


def _distill(options: argparse.Namespace) -> None:
    from distpro.console import table
    from distpro.runs.composing import EPOCHS, Wish, compose
    from distpro.runs.distill_parts import check_parts, parts_of
    from distpro.runs.distilling import distill
    from pathways.registry import UserError

    if options.search and options.loss:
        raise UserError("--loss: a search learns the weights of the default losses; say --search or --loss, not both")
    given = {
        "epochs": EPOCHS if options.epochs is None else options.epochs,
        "teacher_weights": options.teacher_weights,
        "teacher_pretrained": options.teacher_pretrained,
        "teacher_epochs": options.teacher_epochs,
        "student_pretrained": options.student_pretrained,
        "image_size": options.image_size,
    }
    folder = Path(options.out or "runs/distilled")
    if options.dry_run:
        wish = Wish(
            options.teacher, options.student, options.data, folder, **given, losses=tuple(options.loss or ["kd"])
        )
        plan = compose(wish, options.overrides)
        parts = parts_of(plan, folder, options.overrides, options.search, options.baseline)
        check_parts(parts, wish, options.resume)
        for part in parts.values():
            _show(part)
        return
    result = distill(
        options.teacher,
        options.student,
        options.data,
        folder,
        options.overrides,
        options.resume,
        search=options.search,
        baseline=options.baseline,
        losses=options.loss,
        **given,
    )
    table(str(folder), ["metric", "value"], [[name, f"{value:.6g}"] for name, value in result.metrics.items()])
    where = shlex.quote(str(folder))
    print(
        f"student: {folder / 'student.pt'}\nlook:    distpro report {where}\nexport:  distpro export {where} --format onnx"
    )


def _show(part: Part) -> None:
    import yaml

    from distpro.report.cost import as_text, describe

    print(f"# {part.what}\n{yaml.safe_dump(dict(part.config), sort_keys=False)}")
    checked = part.checked()
    for member in filter(None, (checked.teacher, checked.student)):
        member.params = {
            k: v for k, v in member.params.items() if k not in ("pretrained", "weights")
        }  # nothing is fetched
    if checked.data.num_classes is not None:
        print(as_text(describe(checked, part.searching)), "\n")


def _report(options: argparse.Namespace) -> None:
    from distpro.report.page import write_page

    print(write_page(options.runs, options.out, options.title, options.baseline))


def _compare(options: argparse.Namespace) -> None:
    from distpro.runs.comparing import compare, missing, open_study, plan

    if options.dry_run:
        study = open_study(options.config, options.out)
        plan(study, missing(study, options.only))
        return
    print(compare(options.config, options.out, options.jobs, options.only))
