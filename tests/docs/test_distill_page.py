"""docs/distill.md, executed on a few photographs."""

from __future__ import annotations

import re
import shlex

import pytest

from distpro.cli import main
from tests.conftest import ROOT
from tests.photographs import write_photographs

pytestmark = pytest.mark.slow

PAGE = (ROOT / "docs" / "distill.md").read_text(encoding="utf-8")


def test_the_page_runs(data_folder, tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    write_photographs(data_folder, tmp_path / "photos", {"train": 8, "test": 4}, classes=2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISTPRO_DATA", str(tmp_path))
    for kind, text in re.findall(r"```(sh|python|yaml)\n(.*?)```", PAGE, re.DOTALL):
        if kind == "yaml":
            (tmp_path / "study.yaml").write_text(text)
            continue
        if kind == "python":
            exec(text, {})
            continue
        for line in text.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "distpro" and main(arguments) in (None, 0), line
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"photos", "other", "seeds", "python"}
    written = set(re.findall(r"`([\w.]+\.(?:pt|safetensors|yaml|json|jsonl|txt))`", PAGE.partition("## The page")[0]))
    assert {path.name for path in (tmp_path / "runs" / "photos").iterdir()} >= written
