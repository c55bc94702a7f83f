"""Refuse links that lead nowhere, in the pages outside `docs/`: Sphinx checks those inside.

A link leads to a file or a folder of the repository, or to a heading, as GitHub names headings.
Links to other sites are not looked at.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

from markdown_it import MarkdownIt
from markdown_it.token import Token

REPOSITORY = Path(__file__).parents[1]
FOLDERS = (".github", "benchmarks", "examples", "research", "tests")
_MARKDOWN = MarkdownIt("commonmark").enable("table")


def inline_tokens(text: str) -> Iterator[tuple[Token, Token]]:
    """Iterate over a page's runs of text, each with the token that opens it."""
    for opening, token in pairwise(_MARKDOWN.parse(text)):
        if token.type == "inline":
            yield opening, token


def targets(text: str) -> Iterator[tuple[int, str]]:
    """Find the targets of links and images in a page: (line, target)."""
    for _, token in inline_tokens(text):
        first = token.map[0] + 1 if token.map else 1
        for child in token.children or []:
            target = child.attrGet("href") or child.attrGet("src")
            if target is not None:
                yield first, str(target)


@cache
def anchors(text: str) -> set[str]:
    """List the anchors that GitHub makes of a page's headings."""
    found: set[str] = set()
    for opening, token in inline_tokens(text):
        if opening.type != "heading_open":
            continue
        words = "".join(child.content for child in token.children or [])
        name = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        number, anchor = 0, name
        while anchor in found:
            number += 1
            anchor = f"{name}-{number}"
        found.add(anchor)
    return found


def faults(path: Path) -> Iterator[str]:
    """Describe every link of a page that leads nowhere."""
    text = path.read_text("utf-8")
    for line, target in targets(text):
        parts = urlsplit(target)
        if parts.scheme or parts.netloc:
            continue
        file = path.parent / unquote(parts.path) if parts.path else path
        if not file.exists():
            yield f"{path}:{line}: {target} leads to no file"
        elif parts.fragment and parts.fragment not in anchors(file.read_text("utf-8")):
            yield f"{path}:{line}: {target} leads to no heading"


def checked_files() -> list[Path]:
    """List the pages outside `docs/`."""
    below = [path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.md")]
    return sorted([*REPOSITORY.glob("*.md"), *below])


if __name__ == "__main__":
    sys.exit("\n".join(fault for path in checked_files() for fault in faults(path)) or None)
