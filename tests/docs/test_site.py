"""The site builds without a warning, and every page with code has a test that runs it."""

from __future__ import annotations

import re
import shutil

import pytest

from tests.conftest import ROOT
from tests.docs.pages import blocks_of

DOCS = ROOT / "docs"
PAGES = [path for path in sorted(DOCS.rglob("*.md")) if path.parent.name != "results"]


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Builds a folder of pages with warnings as errors; gives its exit status and the built folder."""
    sphinx = pytest.importorskip("sphinx.cmd.build", reason="the site needs pip install -e '.[docs]'")
    for needed in ("myst_parser", "furo"):
        pytest.importorskip(needed, reason="the site needs pip install -e '.[docs]'")
    monkeypatch.delenv("DISTPRO_REPOSITORY", raising=False)

    def built(pages):
        return sphinx.main(["-W", "--keep-going", "-q", "-E", str(pages), str(tmp_path / "site")]), tmp_path / "site"

    return built


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*myst_parser")
def test_the_site_builds_without_a_warning(build, capsys):
    status, site = build(DOCS)
    assert status == 0, capsys.readouterr().err
    for path in PAGES:
        assert (site / path.relative_to(DOCS)).with_suffix(".html").is_file(), path
    page = (site / "architecture.html").read_text(encoding="utf-8")
    assert "objective.py" in page and 'href="../distpro' not in page  # what is not a page is no link


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*myst_parser")
def test_a_link_to_nowhere_is_an_error(build, tmp_path, capsys):
    (tmp_path / "pages").mkdir()
    shutil.copy(DOCS / "conf.py", tmp_path / "pages")
    (tmp_path / "pages" / "index.md").write_text("# A page\n\n[There](nowhere.md#at-all).\n")
    status, _ = build(tmp_path / "pages")
    assert status == 1 and "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_a_page_with_code_has_a_test_that_runs_it(path):
    tests = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    if {language for language, _ in blocks_of(path)} & {"python", "yaml", "sh"}:
        assert re.search(rf'["/]{re.escape(path.name)}"', tests), f"no test names {path.name}"
