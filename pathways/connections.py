"""Connection rules: which teacher tap may teach which student tap."""

from __future__ import annotations

from collections.abc import Sequence

from pathways.registry import UserError, nearest

RULES = ("all", "same", "matched", "review")


def connect(
    rule: str | Sequence[Sequence[str]], teacher_taps: Sequence[str], student_taps: Sequence[str]
) -> list[tuple[int, int]]:
    """(i, j) positions, from 0, of the connected teacher and student taps, teacher-major.

    Args:
        rule: ``all``; ``same`` (i = j); ``matched`` (each student tap with the teacher tap at the same
            part of the depth, the deepest with the deepest; ``same`` where there are as many); ``review`` (teacher level ≤ student level, Chen et al. 2021); or an explicit
            list of [teacher tap, student tap].

    Raises UserError for an unknown rule or tap, and for ``same`` with lists of different lengths.
    """
    n, m = len(teacher_taps), len(student_taps)
    if rule == "all":
        return [(i, j) for i in range(n) for j in range(m)]
    if rule == "review":
        return [(i, j) for i in range(n) for j in range(m) if i <= j]
    if rule == "matched":
        return sorted((n - 1 - round((m - 1 - j) * (n - 1) / max(m - 1, 1)), j) for j in range(m))
    if rule == "same":
        if n != m:
            raise UserError(f"connect 'same' needs as many teacher as student taps, got {n} and {m}")
        return [(i, i) for i in range(n)]
    if isinstance(rule, str):
        raise UserError(
            f"unknown connection rule '{rule}'{nearest(rule, RULES)} (allowed: {', '.join(RULES)}, or a list)"
        )
    pairs = []
    for entry in rule:
        if isinstance(entry, str) or not isinstance(entry, Sequence) or len(entry) != 2:
            raise UserError(f"connect: each entry is [teacher tap, student tap], got {entry!r}")
        pairs.append((_position(entry[0], teacher_taps, "teacher"), _position(entry[1], student_taps, "student")))
    if len(set(pairs)) != len(pairs):
        raise UserError("connect: a connection is listed twice")
    return sorted(pairs)


def _position(tap: str, taps: Sequence[str], side: str) -> int:
    if tap not in taps:
        raise UserError(f"connect: '{tap}' is not a {side} tap{nearest(tap, taps)} (allowed: {', '.join(taps)})")
    return list(taps).index(tap)
