"""What is done to configs and files, at random."""

from __future__ import annotations

import contextlib
import copy
import io
import random
import zipfile
from collections.abc import Iterator
from typing import Any

WORDS = (
    "null", "true", "no", "on", "~", "-1", "0", "1e400", ".nan", "-.inf", "010", "1:30", "1e-3", "99999999999999999999",
    "2001-01-01", "!!python/object/apply:os.system [touch canary]", "!!binary aGVsbG8=", "!!set {a, b}", "*a", "&a [*a]",
    "<<: 1", "? [a, b] : 1", "{}", "[]", "[[[[]]]]", "{a: {b: {c: 1}}}", "'", '"', "|", ">", "%YAML 1.3", "---", "...",
    "\t", "\x00", "\x85", "\u2028", "é", "\U0001f600", "x" * 5000, "os:system", "builtins:exec", "../../etc/passwd", "@object",
    "kd", "conv1x1", "learned", "schedule", "auto", "resnet8", "hf:x", "timm:x", "torchvision:resnet18", "smp:x",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3.5, -0.0, 1e308, 10**30, "", " ", "x", "0", "nan", "x" * 3000, "a.b.c", "a:b", "os:system",
    [], [None], [[]], [1, "a"], {}, {"a": 1}, {1: 2}, {None: None}, {"name": "kd"}, {"kd": None}, {"name": 3}, [{}], [{"loss": 3}],
    "learned", {"learned": {}}, {"linear": {}}, {"schedule": {"file": "x"}}, ["all"], "all", "none", b"bytes", {"a", "b"},
    [0.1] * 50, float("1e-300"), {"x": {"y": {"z": []}}}, "\x1b[31m", "é",
)  # fmt: skip


def change(content: Any, draw: random.Random) -> None:
    """Change one place in nested mappings and lists: another value, another key, none, or a part of somewhere else."""
    places = list(_places(content))
    if not places:
        return
    owner, key = draw.choice(places)
    how = draw.choice(("value", "value", "value", "delete", "rename", "copy"))
    if how == "value":
        owner[key] = copy.deepcopy(draw.choice(VALUES))
    elif how == "delete":
        del owner[key]
    elif how == "rename" and isinstance(owner, dict):
        owner[draw.choice((1, None, "", "x", f"{key}s", str(key)[1:], "name", "base", "preset", "loss"))] = owner.pop(
            key
        )
    else:
        other, theirs = draw.choice(places)
        with contextlib.suppress(LookupError):  # already gone
            owner[key] = copy.deepcopy(other[theirs])


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield content, key
        yield from _places(value)


def mutate_bytes(data: bytes, draw: random.Random) -> bytes:
    """Some bytes flipped, overwritten, cut out, doubled, or swapped for a number at the limit of its kind."""
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(len(data) + 1)
        length = draw.choice((1, 1, 2, 4, 8, 64, 1024))
        how = draw.choice(("flip", "flip", "write", "cut", "double", "limit", "end", "empty"))
        if how == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]
        elif how == "write":
            data = data[:at] + draw.randbytes(length) + data[at + length :]
        elif how == "cut":
            data = data[:at] + data[at + length :]
        elif how == "double":
            data = data[: at + length] + data[at:]
        elif how == "limit":
            word = draw.choice((b"\xff" * 4, b"\x00" * 8, b"\xff\xff\xff\x7f", b"\x00\xca\x9a\x3b", b"\xff" * 8))
            data = data[:at] + word + data[at + len(word) :]
        elif how == "end":
            data = data[:at]
        elif how == "empty" and draw.random() < 0.1:
            data = b""
    return data


def mutate_zip(data: bytes, draw: random.Random) -> bytes:
    """A zip file with a changed member and right checksums, so that what is wrong reaches the reader."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(out, "w") as changed:
        entries = archive.infolist()
        chosen = draw.choice([e for e in entries if e.filename.endswith("data.pkl")] or entries)
        chosen = chosen if draw.random() < 0.7 else draw.choice(entries)
        for entry in entries:
            content = archive.read(entry)
            if entry is chosen:
                if draw.random() < 0.1:
                    continue
                content = mutate_bytes(content, draw)
            changed.writestr(entry.filename, content, compress_type=entry.compress_type)
            if draw.random() < 0.02:
                changed.writestr(f"{entry.filename}x", content)
    return out.getvalue()
