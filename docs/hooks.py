"""What the site has and GitHub has not: the README as its first page, links that leave docs/, docstrings' roles.

A hook of mkdocs and an extension of griffe, which reads the docstrings; mkdocs.yml names it as both.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

DOCS = Path(__file__).parent
README = DOCS.parent / "README.md"
LINK = re.compile(r"!?\[(?P<text>[^\[\]]*)\]\((?!https?:|#)(?P<path>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Makes the README the first page."""
    files.append(File.generated(config, "index.md", content=README.read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Has relative links lead where they lead on GitHub."""
    here = (DOCS / page.file.src_uri).parent
    source = README.parent if page.file.src_uri == "index.md" else here

    def on_the_site(link: re.Match[str]) -> str:
        target = Path(os.path.normpath(source / link["path"]))
        if not target.exists():
            raise PluginError(f"{page.file.src_uri}: there is no {link['path']}")
        if target == README:
            target = DOCS / "index.md"
        if target.is_relative_to(DOCS) and target.suffix != ".py":
            path = Path(os.path.relpath(target, here)).as_posix()
        elif config.repo_url:
            path = f"{config.repo_url.rstrip('/')}/blob/main/{target.relative_to(README.parent).as_posix()}"
        else:
            return link["text"]
        return link[0].replace(f"]({link['path']}", f"]({path}")

    return LINK.sub(on_the_site, markdown)


class PlainRoles(griffe.Extension):
    """Writes docstrings' reStructuredText, roles and ``::``, as Markdown."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring:
            text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", obj.docstring.value)
            obj.docstring.value = re.sub(r"::\n\n", ":\n\n", text)
