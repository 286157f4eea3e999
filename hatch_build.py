"""Package metadata that depends on the project's public address, one line in `pyproject.toml`.

While `[tool.jaxbn] address` is empty, the long description keeps the README's relative links, and
the package names no address. Once the line is filled, the links become absolute, so that they work
on a package index, and the package names its source, documentation and changelog.
"""

import re
import tomllib
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#|mailto:)([^)\s]+)\)")


def long_description(readme: str, address: str) -> str:
    """The README with absolute links: pages under `address`/blob/main, pictures under /raw/main."""
    if not address:
        return readme

    def absolute(link: re.Match[str]) -> str:
        picture, text, target = link.groups()
        return f"{picture}[{text}]({address}/{'raw' if picture else 'blob'}/main/{target})"

    return LINK.sub(absolute, readme)


def urls(address: str) -> dict[str, str]:
    """The addresses that the package names: none while the project has none."""
    if not address:
        return {}
    return {
        "Source": address,
        "Documentation": f"{address}/blob/main/docs/index.md",
        "Changelog": f"{address}/blob/main/CHANGELOG.md",
        "Issues": f"{address}/issues",
    }


def address(root: Path) -> str:
    """The project's public address without a slash at its end, or ""."""
    project = tomllib.loads((root / "pyproject.toml").read_text())
    return str(project["tool"]["jaxbn"]["address"]).rstrip("/")


class Metadata(MetadataHookInterface):
    """Fills `readme` and `urls`, which `pyproject.toml` declares as dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Called by hatchling when it builds or installs the package."""
        root = Path(self.root)
        text = long_description((root / "README.md").read_text(), address(root))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        metadata["urls"] = urls(address(root))
