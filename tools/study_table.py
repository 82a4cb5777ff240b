"""A study's table in Markdown, and its place in the pages of docs/."""

from __future__ import annotations

import statistics
from pathlib import Path

from study_figures import FIGURES

from distpro.files import write_atomically
from distpro.report.intervals import difference_text
from distpro.report.page import DIGITS, title_of
from distpro.report.study import Search, StudyFile

ROOT = Path(__file__).resolve().parent.parent


def render(study: StudyFile) -> str:
    """Markdown: mean ± standard deviation, and paired differences to the baseline with a 95 % interval."""
    rows, found, digits = study.rows(), study.found(), DIGITS.get(study.metric, 2)
    baseline = study.content.get("baseline", [])
    baselines = [baseline] if isinstance(baseline, str) else baseline
    compared = "".join(f"paired difference to {label} | " for label in baselines)
    lines = [
        f"| weights | last-epoch test {title_of(study.metric)} | n | {compared}seconds a run | with its search |",
        "|---|---|---|---|---|" + "---|" * len(baselines),
    ]
    for label in [*study.runs, *study.searches]:
        if label not in found:
            continue
        mine = found[label]
        searching = label in study.searches
        tunes = searching and Search(study, label).tunes
        against = [{} if searching or label == b else found.get(b, {}) for b in baselines]
        values = [
            f"({label})" if searching else label,
            "" if tunes else _spread([r[study.metric] for r in mine.values()], digits),  # of validation data
            str(len(mine)),
            *(
                difference_text([r[study.metric] - b[s][study.metric] for s, r in mine.items() if s in b], digits)
                for b in against
            ),
            f"{statistics.mean(r['seconds'] for r in mine.values()):.0f}",
            f"{study.seconds(label):.0f}" if study.search_of(label) else "",
        ]
        lines.append(f"| {' | '.join(values)} |")
    if targets := [t for t in study.content.get("reach", []) if t in found]:
        lines += ["", *reached(study, targets)]
    lines += ["", "<details><summary>The commands of the first seed, and the versions</summary>", ""]
    lines += ["The other seeds' differ in `seed=` and paths only.", "", "```"]
    lines += [r["command"] for r in rows if r["seed"] == study.seeds[0]]
    versions = rows[0]["packages"]
    lines += ["```", "", ", ".join(f"{k} {v}" for k, v in versions.items())]
    lines[-1] += f"; device {rows[0]['device']}; {rows[0]['threads']} threads a run; revisions "
    lines[-1] += ", ".join(sorted({f"`{r['revision']}`" for r in rows})) + "."
    lines += ["", "</details>", ""]
    for kind in study.content.get("figures", []):
        path = ROOT / "docs" / "figures" / f"{study.name}_{kind}.png"
        FIGURES[kind](study, path)
        lines += [f"![{study.name}: {kind}](figures/{path.name})", ""]
    return "\n".join(lines)


def reached(study: StudyFile, targets: list[str]) -> list[str]:
    """Markdown: the epochs that each run needs for the mean accuracy of the target rows.

    Between two budgets the accuracy is taken to be linear in the logarithm of the epochs.
    """
    found = study.found()
    goals = [statistics.mean(r[study.metric] for r in found[t].values()) for t in targets]
    titles = [f"epochs to {goal:.2f} % ({target})" for goal, target in zip(goals, targets, strict=True)]
    lines = [f"| weights | {' | '.join(titles)} |", "|---|" + "---|" * len(goals)]
    for base in study.content["runs"]:
        if curve := {n: statistics.mean(accuracies) for n, accuracies in study.budgets(base).items()}:
            lines.append(f"| {base} | {' | '.join(epochs_to(goal, curve) for goal in goals)} |")
    return lines


def epochs_to(goal: float, curve: dict[int, float]) -> str:
    """Where accuracy by epochs first comes to ``goal``."""
    before: tuple[int, float] | None = None
    for epochs, accuracy in curve.items():
        if accuracy >= goal:
            if before is None or accuracy == goal:
                return f"{'at most ' if accuracy > goal else ''}{epochs}"
            share = (goal - before[1]) / (accuracy - before[1])
            return f"{before[0] * (epochs / before[0]) ** share:.1f}"
        before = epochs, accuracy
    return f"more than {max(curve)}"


def _spread(values: list[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def seen_from(page: Path, table: str) -> str:
    """The table with its figures where a page finds them."""
    inside = page.is_relative_to(ROOT / "docs")
    up = "../" * (len(page.relative_to(ROOT / "docs").parts) - 1) if inside else ""
    return table.replace("](figures/", f"]({up}figures/")


def splice(page: Path, name: str, table: str) -> None:
    """Put the table between the page's ``<!-- study: NAME -->`` and ``<!-- end -->``, if it has such a place."""
    text = page.read_text() if page.exists() else ""
    begin, _, rest = text.partition(f"<!-- study: {name} -->\n")
    if rest:
        _, end, after = rest.partition("<!-- end -->")
        write_atomically(f"{begin}<!-- study: {name} -->\n{seen_from(page, table)}{end}{after}", page)
