"""Runs a page of the documentation, block by block, in the working directory.

``yaml`` and ``python`` whose first line is a comment with a file's name are written to that file, other ``python`` is
executed, the blocks of a page in one namespace. ``sh`` is commands of distpro, which must succeed. ``console`` is for a
person's terminal: the programs of `CONSOLE`; a command of distpro in it is only described. ``text`` is no code.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from distpro.cli import main

BLOCK = re.compile(r"^```(\S*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"# ([\w/]+\.(?:yaml|py))\n")
TRAINS = ("search", "retrain", "train", "tune")
SHORT = ["threads=1", "precision=float32", "tracking.tensorboard=false"]
CONSOLE = ("pip", "git", "cd", "torchrun", "tensorboard", "sphinx-build", "python")


def blocks_of(path):
    """(language, text) of each fenced block."""
    return BLOCK.findall(Path(path).read_text(encoding="utf-8"))


def run_page(path, overrides=SHORT, optional=(), trials=()):
    """Run a page where the working directory is. ``overrides`` follow each command that trains; blocks that import one of
    the ``optional`` packages, and commands that name one, are left out where it is not installed. ``trials``: configs whose searches make one trial only. Returns the number of commands and of blocks of
    Python that ran."""
    names, ran = {}, 0
    for language, text in blocks_of(path):
        named = FILE.match(text)
        if language in ("yaml", "python") and named:
            file = Path(named[1])
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        elif language == "python":
            if any(f"import {name}" in text and not installed(name) for name in optional):
                continue
            exec(compile(text, str(path), "exec"), names)
            ran += 1
        elif language == "sh":
            for line in text.splitlines():
                program, *arguments = shlex.split(line)
                assert program == "distpro", line
                if any(name in arguments and not installed(name) for name in optional):
                    continue
                added = list(overrides) if arguments[0] in TRAINS else []
                if arguments[0] == "search" and arguments[1] in trials and "--dry-run" not in arguments:
                    added += ["search.trials=1"]
                assert main([*arguments, *added]) == 0, line
                ran += 1
        elif language == "console":
            for line in text.replace("\\\n", " ").splitlines():
                program, *arguments = shlex.split(line)
                assert program in CONSOLE, line
                if "-m" in arguments and program == "torchrun":
                    assert main([*arguments[arguments.index("-m") + 2 :], "--dry-run"]) == 0, line
        else:
            assert language in ("text", "yaml"), f"{path}: what is a block of '{language}'?"
    return ran


def installed(name):
    try:
        __import__(name)
    except ImportError:
        return False
    return True


@pytest.fixture
def at(tmp_path, monkeypatch):
    """An empty folder as the working directory, from which code of one's own is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISTPRO_DATA", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [n for n in sys.modules if n.partition(".")[0] == "mylab"]:
        del sys.modules[name]
