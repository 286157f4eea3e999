"""Sphinx: the pages of this folder, and the reference from the docstrings."""

import re
from typing import Any

from sphinx.util.inspect import signature, stringify_signature

import jaxbn

project = "jaxbn"
release = jaxbn.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
exclude_patterns = ["_build"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]

# Signatures as people write them: defaults as in the source, names without modules, short aliases.
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
ALIASES = {
    "Mapping[str, str | None] | Callable[[str], str | None]": "Rename",
    "str | Sequence[str] | Callable[[str], bool]": "Where",
    "str | type[Any] | dtype | SupportsDType | Any": "Dtype",
    "str | PathLike[str]": "Path | str",
    "ndarray": "np.ndarray",
    "Array": "jax.Array",
}


def shortened(
    app: Any, what: str, name: str, obj: Any, options: Any, sig: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    if sig == "(*args, **kwargs)" or sig == "(*args: Any, **kwargs: Any)":
        sig = stringify_signature(signature(obj.__init__, bound_method=True))
    return _short(sig), _short(returns)


def _short(text: str | None) -> str | None:
    if text is None:
        return None
    text = re.sub(r"~?\b(?:[A-Za-z_]\w*\.)+(?=\w)", "", text).replace("~", "")
    text = re.sub(r"<(?:class|function) '?(\w+)'?>", r"\1", text)
    text = text.replace("<_Sentinel object>", "...").replace("mappingproxy({})", "{}")
    for long, short in ALIASES.items():
        text = re.sub(rf"(?<![\w.]){re.escape(long)}(?!\w)", short, text)
    return text


def setup(app: Any) -> None:
    app.connect("autodoc-process-signature", shortened)
