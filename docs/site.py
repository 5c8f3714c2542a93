"""Hooks of MkDocs: pages that lie elsewhere in the repository become pages of the site, and links between files links between pages."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent

# Pages of the site by where they lie in the repository. Files in docs/ are pages under their own names.
ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "adapters/README.md": "write_an_adapter.md",
    "benchmarks/README.md": "measuring.md",
    "benchmarks/kernels.md": "measured_kernels.md",
    "benchmarks/quality.md": "measured_quality.md",
    "examples/README.md": "examples.md",
    "examples/custom_adapter/README.md": "examples_custom_adapter.md",
    "examples/lightglue/README.md": "examples_lightglue.md",
}
PICTURE = re.compile(r"!\[([^\]]+)\]\(([^)\s:]+)\)")
LINK = re.compile(r"(?<!!)\[((?:!\[[^\]]+\]\([^)]+\)|[^\]])+)\]\(([^)\s:]+)\)")  # of words, or of a picture


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages that lie elsewhere."""
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Let links point to pages. What is no page, such as a program, is named and not linked: it is in the repository."""
    sources = {page: source for source, page in ELSEWHERE.items()}
    folder = posixpath.dirname(sources.get(page.file.src_uri, f"docs/{page.file.src_uri}"))

    def link(match: re.Match[str]) -> str:
        words, target = match.groups()
        path, _, anchor = target.partition("#")
        if not path:
            return match[0]
        source = posixpath.normpath(posixpath.join(folder, path))
        if source in ELSEWHERE or source.startswith("docs/"):
            to = ELSEWHERE.get(source, source.removeprefix("docs/"))
            return f"[{words}]({posixpath.relpath(to, posixpath.dirname(page.file.src_uri) or '.')}{'#' * bool(anchor)}{anchor})"
        if not (ROOT / source).exists():
            return match[0]  # MkDocs says what is wrong with it
        return words if words.strip("`") == source else f"{words} (`{source}`)"

    def picture(match: re.Match[str]) -> str:
        words, target = match.groups()
        source = posixpath.normpath(posixpath.join(folder, target))
        return f"![{words}]({posixpath.relpath(source.removeprefix('docs/'), posixpath.dirname(page.file.src_uri) or '.')})"

    return PICTURE.sub(picture, LINK.sub(link, markdown))
