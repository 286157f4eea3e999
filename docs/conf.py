"""Sphinx: the pages of this folder, and the reference from the docstrings."""

import jaxbn

project = "jaxbn"
release = jaxbn.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
exclude_patterns = ["_build"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]
# Types as people write them: `Array`, not `jaxlib._jax.Array`.
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
