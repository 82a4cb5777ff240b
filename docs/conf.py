"""The documentation site: `sphinx-build -W --keep-going docs build/site`. Needs `pip install -e '.[docs]'`, and not PyTorch."""

project = "distpro"
author = "The distpro developers"
extensions = ["myst_parser"]
exclude_patterns = ["results/*.jsonl"]
html_theme = "furo"
html_title = "distpro"
html_copy_source = False
myst_heading_anchors = 4
