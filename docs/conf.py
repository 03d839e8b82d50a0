"""How docs/ becomes one book: `python -m sphinx -W -b html docs docs/_build`."""

from importlib.metadata import version as version_of

project = "fsdp_dp"
author = "the fsdp_dp authors"
release = version_of("fsdp-dp")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "fsdp_dp"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_use_ivar = True
default_role = "code"  # docstrings put names into single backticks
