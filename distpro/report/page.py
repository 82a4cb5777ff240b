"""`distpro report`: one HTML page about runs, which opens without a server and fetches nothing."""

from __future__ import annotations

import base64
import statistics
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distpro.config.flat import setting_text
from distpro.console import number_text
from distpro.files import write_atomically
from distpro.report.gather import Group, Run, differing, finite, gather, groups_of
from distpro.report.intervals import difference_text
from distpro.report.plots import heatmap_figure, scalars_figure, schedule_figure
from distpro.report.result_plots import Curve, as_svg, curves_figure, dots_figure, learned_figure, mean_text
from distpro.report.tuning import board
from distpro.report.words import explain_schedule
from distpro.schedule import Schedule
from pathways.registry import UserError, nearest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS = {"miou": "mIoU, %", "rmse": "RMSE in m, smaller is better"}
PERCENT = ("accuracy", "top5", "map", "map50", "map75")
DIGITS = {"rmse": 3}
LONG = 400  # characters of a setting
ACROSS = 4  # runs that stand side by side in a table of settings
SHOWN = 12  # schedules, and trials of a tuning
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; font-size: .9rem; } th, td { padding: .25rem .7rem; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #999; } tr + tr td { border-top: 1px solid #eee; } td.n { text-align: right; white-space: nowrap; }
.wide { overflow-x: auto; } figure { margin: 1rem 0; } figure img { max-width: 100%; height: auto; } figcaption { color: #555; font-size: .9rem; }
pre { background: #f6f6f6; padding: .7rem; overflow-x: auto; font-size: .82rem; } .note { background: #fff3cd; padding: .5rem .8rem; }
.small { color: #555; font-size: .9rem; } details > summary { cursor: pointer; }
"""


def write_page(
    paths: Sequence[str | Path], out: str | Path | None = None, title: str | None = None, baseline: str | None = None
) -> Path:
    """Write a page about runs and return its path.

    Args:
        paths: folders of runs (those right inside them come along), schedules (.pt), a study's rows (.jsonl).
        out: the file; default: ``report.html`` in the first folder, or beside a first file under its name.
        title: default: names of the paths.
        baseline: label that the others are compared with, seed by seed; default: the first.

    Raises UserError where there is no run, or one that cannot be read.
    """
    runs = gather(paths)
    first = Path(paths[0])
    target = Path(out) if out is not None else first / "report.html" if first.is_dir() else first.with_suffix(".html")
    if target.is_dir():
        raise UserError(f"{target}: is a folder; the page is one file")
    write_atomically(page(runs, title or ", ".join(str(path) for path in paths), baseline), target)
    return target


def page(runs: Sequence[Run], title: str, baseline: str | None = None) -> str:
    """The HTML document."""
    groups = groups_of(runs)
    metric = _headline(runs)
    parts = [_notes(runs), _results(groups, metric, baseline), _curves(groups, metric), _differences(groups)]
    parts += [_schedules(groups), _tunings(runs), _setting(groups), _commands(runs), _versions(runs)]
    body = "\n".join(filter(None, parts))
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n'
        f"<body>\n<h1>{escape(title)}</h1>\n<p class=small>{escape(_lead(runs, groups))}</p>\n{body}\n</body></html>\n"
    )


def title_of(metric: str) -> str:
    """A metric with its unit."""
    return METRICS.get(metric, f"{metric}, %" if metric in PERCENT else metric)


# HTML


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    lines = [f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows]
    return f'<div class="wide"><table><tr>{head}</tr>\n' + "\n".join(lines) + "\n</table></div>"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f'<td class="n">{escape(number_text(value))}</td>'
    number = isinstance(value, int) and not isinstance(value, bool)
    return f'<td class="n">{value}</td>' if number else f"<td>{escape('' if value is None else str(value))}</td>"


def _picture(figure: Figure, caption: str) -> str:
    """As an image, in which nothing is a link and no name meets another's."""
    data = base64.b64encode(as_svg(figure).encode()).decode()
    return (
        f'<figure><img alt="{escape(caption, quote=True)}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _section(title: str, *parts: str) -> str:
    return f"<h2>{escape(title)}</h2>\n" + "\n".join(filter(None, parts))


# Parts of the page


def _lead(runs: Sequence[Run], groups: Sequence[Group]) -> str:
    names = {
        "row": "rows",
        "search": "searches",
        "tuning": "tunings",
        "retrain": "retrains",
        "training": "plain trainings",
    }
    kinds = {kind: sum(run.kind == kind for run in runs) for kind in dict.fromkeys(run.kind for run in runs)}
    said = ", ".join(f"{n} {names[kind] if n > 1 else f'{kind} run'}" for kind, n in kinds.items())
    return f"{said}; {len(groups)} groups, of which each differs in the seed alone" if len(groups) < len(runs) else said


def _headline(runs: Sequence[Run]) -> str | None:
    trained = [run.headline for run in runs if run.headline and f"best_{run.headline}" in run.metrics]
    return next(iter(trained), next((run.headline for run in runs if run.headline), None))


def _notes(runs: Sequence[Run]) -> str:
    notes = list(dict.fromkeys(note for run in runs for note in run.notes))
    sets: dict[int | None, set[str]] = {}  # a seed may draw samples of its own
    for run in runs:
        sets.setdefault(run.seed, set()).update([str(run.facts["sha256"])] if run.facts.get("sha256") else [])
    if any(len(found) > 1 for found in sets.values()):
        notes.append("not all of these runs saw the same data: their numbers are not comparable as they stand")
    return "\n".join(f'<p class="note">{escape(note)}</p>' for note in notes)


def _is_search(group: Group) -> bool:
    run = group.runs[0]
    of_row = run.learned is not None or any(c.startswith(("distpro search", "distpro tune")) for c in run.commands)
    return run.kind in ("search", "tuning") or (run.kind == "row" and of_row)


def _results(groups: Sequence[Group], metric: str | None, baseline: str | None) -> str:
    measured = [g for g in groups if metric is not None and (g.values(metric) or g.runs[0].tunes)]
    if metric is None or not measured:
        return _section("Results", "<p>No run has been tested yet.</p>")
    compared = [g for g in measured if not _is_search(g)]
    labels = [g.label for g in compared]
    if baseline is not None and baseline not in labels:
        raise UserError(f"no run is called '{baseline}'{nearest(baseline, labels)} (there are: {', '.join(labels)})")
    base = next((g for g in compared if g.label == baseline), compared[0] if compared else None)
    digits = DIGITS.get(metric, 2 if any(abs(v) >= 10 for g in measured for v in g.values(metric).values()) else 4)
    against = f"difference to {base.label}" if base is not None and len(compared) > 1 else None
    keeping = any(_kept(g) for g in measured)
    columns = ["run", f"test {title_of(metric)}", *([against] if against else [])]
    columns += [*(["of the student", "last epoch's"] if keeping else []), "best epoch's", "seconds"]
    rows = []
    for group in measured:
        values = group.values(metric)
        searching = _is_search(group)
        row: list[Any] = [f"({group.label})" if searching else group.label]
        row.append(mean_text(list(values.values()), digits) if values else "")
        if against and base is not None:
            row.append("" if searching or group is base else _difference(values, base.values(metric), digits))
        best = list(group.values(f"best_{metric}").values())
        seconds = list(group.values("seconds").values())
        if keeping:
            last = list((group.values(f"last_{metric}") or ({} if _kept(group) else values)).values())
            row += [_kept(group) or "of the last epoch", f"{statistics.mean(last):.{digits}f}" if last else ""]
        row += [f"{statistics.mean(best):.{digits}f}" if best else "", statistics.mean(seconds) if seconds else ""]
        rows.append(row)
    of = "the student that a run leaves, which the table names" if keeping else "the last epoch"
    said = f"Values are of {of}, on the test part; ±: half of the mean's 95 % interval (Student's t). "
    said += "The best epoch's value is chosen by the test part itself, and too good"
    said += "; it is of the student in training, not of a moving average or a mean." if keeping else "."
    said += " Seconds are of a run alone; its search has a row of its own."
    if any(_is_search(g) for g in measured):
        said += " In parentheses: searches, whose student has seen only a part of the training data"
        said += ", and tunings, which are judged on validation data." if any(g.runs[0].tunes for g in measured) else "."
    found = {g.label: list(g.values(metric).values()) for g in compared}
    dots = (
        _picture(dots_figure(found, f"test {title_of(metric)}"), "One dot for each run.") if len(compared) > 1 else ""
    )
    if len(found) < len(compared):
        dots = ""  # two groups of one name cannot be told apart in a figure
    return _section("Results", dots, _table(columns, rows), f'<p class="small">{escape(said)}</p>')


def _kept(group: Group) -> str:
    """The student that runs leave where it need not be that of the last step, as `training.keep` and `training.ema` say; else ""."""
    run = group.runs[0]
    left = [run for run in group.runs if any(name.startswith("last_") for name in run.metrics)]
    if not left:  # nothing is kept, or the run has not ended: its numbers are of the student in training
        return ""
    epochs = group.values("kept_epoch")
    if epochs:
        averaged = group.values("kept_ema")
        said = [f"{epoch:g}{' (moving average)' if averaged.get(n) else ''}" for n, epoch in epochs.items()]
        return f"best on validation data: epoch {', '.join(dict.fromkeys(said))}"
    keep = run.settings.get("training.keep")
    if keep == "average":
        return f"mean of the {run.settings.get('training.average_of', 10)} best on validation data"
    return "moving average of the last step" if keep == "last" else "another than the last epoch's"


def _difference(values: Mapping[int, float], base: Mapping[int, float], digits: int) -> str:
    """Paired by seed, with a 95 % interval where there are several."""
    pairs = [values[seed] - base[seed] for seed in values if seed in base]
    return difference_text(pairs, digits) or "no common seed"


def _curves(groups: Sequence[Group], metric: str | None) -> str:
    panels: dict[str, dict[str, list[Curve]]] = {}
    wanted = {f"test/{metric}": f"test {title_of(metric)}"} if metric is not None else {}
    wanted |= {"train/task_loss": "task loss of the training (log)", "lr": "learning rate"}
    for tag, title in wanted.items():
        curves = {group.label: [c for run in group.runs if (c := _curve(run, tag)) is not None] for group in groups}
        if any(curves.values()):
            panels[title] = {label: lines for label, lines in curves.items() if lines}
    shown = _picture(curves_figure(panels), "One line for each run.") if panels else ""
    terms = {key for g in groups for run in g.runs for row in run.rows for key in row if key.startswith("term/")}
    if len(groups) == 1 or len({g.label for g in groups if _terms(g)}) == 1:
        group = next((g for g in groups if _terms(g)), groups[0])
        lines = {key.removeprefix("term/"): _found(group, key) for key in _terms(group)}
        if terms and any(lines.values()):
            caption = f"The terms' losses in {group.label}, before their weights."
            shown += _picture(curves_figure({"loss of each term (log)": lines}), caption)
    return _section("Curves", shown) if shown else ""


def _terms(group: Group) -> list[str]:
    return list(dict.fromkeys(key for run in group.runs for row in run.rows for key in row if key.startswith("term/")))


def _found(group: Group, tag: str) -> list[Curve]:
    return [c for run in group.runs if (c := _curve(run, tag)) is not None]


def _curve(run: Run, tag: str) -> Curve | None:
    points = [(row["epoch"], row[tag]) for row in run.rows if finite(row.get(tag))]
    return ([x for x, _ in points], [y for _, y in points]) if points else None


def _differences(groups: Sequence[Group]) -> str:
    found = differing([group for group in groups if group.runs[0].settings])
    if not found:
        return ""
    labels = [group.label for group in groups if group.runs[0].settings]
    rows = [[key, *(_setting_text(value) for value in values)] for key, values in found.items()]
    return _section("What differs in the settings", _table(["key", *labels], rows))


def _setting_text(value: Any) -> str:
    text = "" if value is None else str(setting_text(value))
    return text if len(text) <= LONG else f"{text[: LONG - 3]}..."


def _schedules(groups: Sequence[Group]) -> str:
    parts: list[str] = []
    seen: set[str | None] = set()
    for group in sorted(groups, key=lambda group: group.runs[0].kind != "search"):
        for run in group.runs:
            if run.schedule is not None and run.schedule.path not in seen and len(seen) < SHOWN:
                seen.add(run.schedule.path)
                parts += _schedule(run, run.schedule)
        first = group.runs[0]
        weights = first.settings.get("retrain.weights")
        if first.learned is not None:
            figure = learned_figure(first.learned, f"weights in {first.label}, seed {first.seed}")
            parts.append(_picture(figure, "Weights over the search."))
        elif first.kind == "retrain" and weights == "constant" and (constants := _constant(first)):
            parts.append(f"<p>{escape(group.label)}: constant weights, {escape(constants)}.</p>")
        elif first.kind == "retrain" and weights != "searched" and first.schedule is not None:
            parts.append(
                f"<p>{escape(group.label)}: the control “{escape(str(weights))}” of {escape(str(first.schedule.path))}.</p>"
            )
    return _section("Weights over time", *parts) if parts else ""


def _schedule(run: Run, schedule: Schedule) -> list[str]:
    start = schedule.start
    played = (
        "; a replay takes its end" if start == 1 else f"; a replay leaves out the first {start:.0%}" if start else ""
    )
    parts = [f"<h3>{'learned' if run.kind == 'search' else 'replayed'} in {escape(run.label)}</h3>"]
    parts.append(_picture(schedule_figure(schedule), f"Weights over the search's epochs{played}."))
    if len(schedule.keys) > 1:
        parts.append(_picture(heatmap_figure(schedule), "The same, a row for each term."))
    if schedule.scalars:
        parts.append(_picture(scalars_figure(schedule), "Numbers learned beside the weights."))
    words = escape(explain_schedule(schedule))
    return [*parts, f"<details><summary>In words</summary><pre>{words}</pre></details>"]


def _constant(run: Run) -> str:
    """The terms with their weights, of a config that states them."""
    terms = run.settings.get("terms") or []
    named = [f"{t.get('key') or t.get('loss')} {t.get('weight')}" for t in terms if isinstance(t, Mapping)]
    if isinstance(run.settings.get("pathways.weight"), (int, float)):
        named.append(f"each pathway {run.settings['pathways.weight']}")
    return ", ".join(named)


def _tunings(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        if run.trials and run.headline is not None:
            columns, cells = board(run.trials, run.headline)
            parts += [f"<h3>{escape(run.label)}</h3>", _table(columns, cells[:SHOWN])]
            parts += [f"<p class=small>{len(cells)} trials in all.</p>"] if len(cells) > SHOWN else []
    return _section("Tuning: trials, the best first", *parts) if parts else ""


def _setting(groups: Sequence[Group]) -> str:
    keys = {"teacher.model": "teacher", "student.model": "student", "data.name": "data", "data.root": "from"}
    keys |= {"training.epochs": "epochs", "training.batch_size": "batch", "precision": "precision"}
    rows = []
    for group in groups:
        run = group.runs[0]
        if not run.settings:
            continue
        facts = [f"{run.facts[part]} {part}" for part in ("train", "validation", "test") if part in run.facts]
        speeds = [
            row["images_per_second"] for r in group.runs for row in r.rows if finite(row.get("images_per_second"))
        ]
        settings = dict(run.settings)
        if run.kind == "training":
            settings["teacher.model"] = None
        own = [settings.get(key) for key in keys]
        steps, seconds = run.metrics.get("step"), list(group.values("seconds").values())
        cost = [int(steps) if steps is not None else None, statistics.median(speeds) if speeds else None]
        cost += [sum(seconds) if seconds else None, run.search_seconds]
        rows.append([group.label, *own, ", ".join(facts), *cost, run.environment.get("device")])
    columns = ["run", *keys.values(), "samples", "steps", "images/s", "seconds, all seeds"]
    columns += ["its search's seconds", "device"]
    if 0 < len(rows) <= ACROSS:  # few runs side by side
        columns, *rows = ([*line] for line in zip(columns, *rows, strict=True))
    return _section("Setting and cost", _table(columns, rows)) if rows else ""


def _commands(runs: Sequence[Run]) -> str:
    said = list(dict.fromkeys(command for run in runs for command in run.commands))
    if not said:
        return ""
    text = f"<pre>{escape(chr(10).join(said))}</pre>"
    return _section(
        "Commands", text if len(said) <= SHOWN else f"<details><summary>{len(said)} of them</summary>{text}</details>"
    )


def _versions(runs: Sequence[Run]) -> str:
    found = []
    for run in runs:
        e = run.environment
        packages = [f"{name} {version}" for name, version in (e.get("packages") or {}).items()]
        rest = [f"{name} {e[name]}" for name in ("python", "system", "device", "threads", "revision") if e.get(name)]
        found.append(", ".join([*packages, *rest]))
    lines = [f"<p>{escape(line)}</p>" for line in dict.fromkeys(filter(None, found))]
    return _section("Versions", *lines) if lines else ""
