"""Reads changed schedule files, the changes guided by which lines of the reader they come to (atheris, libFuzzer).

    python tools/torture/guided.py alpha.pt FOLDER SECONDS SEED

An input is a byte that says what the rest is, a whole file or the pickle inside one whose checksums are right. Writes
FOLDER/said.json: the numbers of inputs, of those that were refused or read, and what was neither.
"""

from __future__ import annotations

import io
import json
import sys
import traceback
import zipfile
from pathlib import Path
from typing import Any

import atheris
from torch._weights_only_unpickler import Unpickler

from pathways.registry import UserError

with atheris.instrument_imports(include=["distpro.schedule", "distpro.schedule_file", "distpro.files"]):
    for name in [name for name in sys.modules if name.startswith(("distpro.schedule", "distpro.files"))]:
        del sys.modules[name]  # imported by the above, and wanted with the marks
    from distpro.schedule import Schedule

Unpickler.load = atheris.instrument_func(Unpickler.load)  # type: ignore[method-assign]


def main() -> None:
    whole, folder, seconds, seed = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
    corpus, victim = folder / "corpus", folder / "victim.pt"
    corpus.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        members = {entry: archive.read(entry) for entry in archive.infolist()}
    pickled = next(entry for entry in members if entry.filename.endswith("data.pkl"))
    (corpus / "whole").write_bytes(b"\0" + whole)
    (corpus / "pickle").write_bytes(b"\1" + members[pickled])
    counts = {"inputs": 0, "refused": 0, "read": 0}
    found: dict[str, str] = {}

    def say() -> None:
        (folder / "said.json").write_text(json.dumps({**counts, "found": list(found.values())}))

    def attack(data: bytes) -> None:
        counts["inputs"] += 1
        content = data[1:]
        if data[:1] > b"\0":
            out = io.BytesIO()
            with zipfile.ZipFile(out, "w") as archive:
                for entry, own in members.items():
                    archive.writestr(entry.filename, content if entry is pickled else own)
            content = out.getvalue()
        victim.write_bytes(content)
        try:
            Schedule.load(victim).played(7)
            counts["read"] += 1
        except UserError as error:
            counts["refused"] += 1
            if len(str(error)) > 6000 or len(str(error).splitlines()) > 5:
                _keep("a long message", str(error)[:300], data)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(where.filename).name}:{where.lineno}"
            _keep(f"{type(error).__name__} {place}", f"{type(error).__name__}: {str(error)[:200]} in {place}", data)
        if counts["inputs"] % 200 == 0:
            say()

    def _keep(kind: str, what: str, data: bytes) -> None:
        if kind not in found:
            found[kind] = what
            (folder / f"found_{len(found)}").write_bytes(data)
            say()

    limits = {"max_total_time": seconds, "seed": seed, "timeout": 20, "rss_limit_mb": 3000, "max_len": 2 * len(whole)}
    options: list[Any] = [sys.argv[0], str(corpus), *(f"-{key}={value}" for key, value in limits.items())]
    atheris.Setup([*options, f"-artifact_prefix={folder}/"], attack)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
