"""The documentation site: `pip install -e '.[docs]'`, then `sphinx-build -W docs build/site`. Needs no PyTorch.

$DISTPRO_REPOSITORY is the address below which the repository's files can be read: links that leave docs/ go there. Without it
they are plain text.
"""

import os
import re
from pathlib import Path

project = "distpro"
author = "The distpro developers"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = "distpro"
html_copy_source = False
html_show_copyright = False
myst_heading_anchors = 4  # links to headings, as on GitHub
suppress_warnings = ["toc.no_title"]  # the tables in results/ are rendered without one

_REPOSITORY = os.environ.get("DISTPRO_REPOSITORY", "").rstrip("/")


def setup(app):
    app.connect("source-read", _leave_docs)


def _leave_docs(app, name, source):
    here, docs = Path(app.srcdir, name).parent, Path(app.srcdir)

    def outside(link):
        path = Path(os.path.normpath(here / link["target"]))
        if path.is_relative_to(docs):
            return link[0]
        return (
            f"[{link['text']}]({_REPOSITORY}/{path.relative_to(docs.parent).as_posix()})"
            if _REPOSITORY
            else link["text"]
        )

    source[0] = re.sub(r"\[(?P<text>[^\]]*)\]\((?P<target>\.\./[^)\s]*)\)", outside, source[0])
