"""The documentation as a site: pip install .[docs], then sphinx-build -W docs runs/docs."""

import importlib.metadata

project = "vidssl"
author = copyright = "The vidssl authors"
release = version = importlib.metadata.version("vidssl")

extensions = ["myst_parser"]
# headings are link targets, as they are on a code host
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]

html_theme = "furo"
html_title = f"vidssl {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
