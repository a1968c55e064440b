"""What the site needs beyond Markdown: pages that lie outside of docs/, and docstrings in Markdown's words.

mkdocs.yml names this file twice: the functions are hooks of MkDocs, the class is an extension of Griffe, which reads
the docstrings for mkdocstrings.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "bench/results/*.md", "results/*.md", "results/*/*.*")
"""Pages, pictures and tables that belong elsewhere in the repository; on the site they have the same paths."""

LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`~?([\w.]+)`")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what lies outside of docs/."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            level = InclusionLevel.INCLUDED if name == "CHANGELOG.md" else InclusionLevel.NOT_IN_NAV
            files.append(File.generated(config, name, abs_src_path=str(path), inclusion=level))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links are written as the repository has the files; on the site the pages of docs/ lie at the top."""
    here = page.file.src_uri
    inside = (ROOT / "docs" / here).exists()

    def on_the_site(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs" if inside else "", posixpath.dirname(here), link[1]))
        target = target.removeprefix("docs/")
        return posixpath.relpath(target, posixpath.dirname(here)) if files.get_file_from_path(target) else link[1]

    return LINK.sub(on_the_site, markdown)


class Docstrings(griffe.Extension):
    """Roles of reStructuredText become code, and an example a section of its own."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrites the object's docstring."""
        if obj.docstring is not None:
            text = ROLE.sub(lambda match: f"`{match[1]}`", obj.docstring.value)
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
