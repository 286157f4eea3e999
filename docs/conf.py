"""Sphinx: the pages of this folder, and the reference from the docstrings."""

import inspect
import re
from typing import Any

from docutils import nodes
from sphinx.util.inspect import signature, stringify_signature

import jaxbn

project = "jaxbn"
release = jaxbn.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
html_theme = "furo"
html_show_copyright = False
html_title = f"jaxbn {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
pygments_style = "default"  # which has colours for added and removed lines
default_role = "py:obj"  # of `names` in docstrings: code, and a link where the reference has it
exclude_patterns = ["_build"]
myst_heading_anchors = 3
napoleon_use_ivar = True  # attributes as a list; their types stand in the signature
napoleon_attr_annotations = False
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

# Signatures as people write them: defaults as in the source, names without modules, short aliases.
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
ALIASES = {
    "Mapping[str, str | None] | Callable[[str], str | None]": "Rename",
    "str | Sequence[str] | Callable[[str], bool]": "Where",
    "str | type[Any] | dtype | SupportsDType | Any": "Dtype",
    "str | PathLike[str]": "Path | str",
    "Initializer | Callable[..., Any]": "Initializer",
    "Module | Scope | _Sentinel | None": "Module | Scope | None",
    "ndarray": "np.ndarray",
    "Array": "jax.Array",
    "S": "State | Moments | None",  # the kind that came in
    "= float32": "= jnp.float32",
}


def shortened(
    app: Any, what: str, name: str, obj: Any, options: Any, sig: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    if sig == "(*args, **kwargs)" or sig == "(*args: Any, **kwargs: Any)":
        sig = stringify_signature(signature(obj.__init__, bound_method=True))
    if returns and inspect.unwrap(obj) is not obj:  # @contextmanager: for `with`, not for `for`
        returns = returns.replace("Iterator[", "AbstractContextManager[", 1)
    return _short(sig), _short(returns)


def _short(text: str | None) -> str | None:
    if text is None:
        return None
    text = re.sub(r"~?\b(?:[A-Za-z_]\w*\.)+(?=\w)", "", text).replace("~", "")
    text = re.sub(r"<(?:class|function) '?(\w+)'?>", r"\1", text)
    text = text.replace("<_Sentinel object>", "...").replace("mappingproxy({})", "{}")
    text = text.replace("[[...], ", "[..., ")
    text = re.sub(r"(\d)e-0(\d)", r"\1e-\2", text)
    for long, short in ALIASES.items():
        text = re.sub(rf"(?<![\w.]){re.escape(long)}(?!\w)", short, text)
    return text


def as_cards(app: Any, doctree: Any, page: str) -> None:
    """The sections of these pages are cards in `_static/site.css`."""
    if page in ("index", "gallery"):
        next(iter(doctree.findall(nodes.section)))["classes"].append("cards")


def setup(app: Any) -> None:
    app.connect("autodoc-process-signature", shortened)
    app.connect("doctree-resolved", as_cards)
