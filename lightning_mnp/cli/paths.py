"""Paths as a user writes them."""

from __future__ import annotations

import os

__all__ = ["expanded"]


def expanded(path: str) -> str:
    """Return a path with the home folder in place of a leading ``~``, as a shell puts it.

    A shell leaves it alone in quotes and in ``--report=~/page.html``, and nobody expands it in a
    YAML file. As for a shell, ``~name`` stays as it is if there is no such user: files may be
    named so, and `Path.expanduser` would raise.

    Args:
        path: The path, or another word that may be one.

    Example:
        >>> expanded("reports/page.html"), expanded("~no-user/page.html")
        ('reports/page.html', '~no-user/page.html')
    """
    return os.path.expanduser(path)
