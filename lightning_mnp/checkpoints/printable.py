"""Names from untrusted files, made safe to print."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["first_names", "printable"]

SHOWN_NAMES = 5


def printable(name: object, limit: int = 120) -> str:
    r"""Make a name from an untrusted file safe to print: no control characters, no endless line.

    Args:
        name: The name, of any type; if it is no ``str``, its ``repr`` is used.
        limit: Most characters of the result, at least 1.

    Returns:
        The name with unprintable characters escaped, cut to ``limit`` characters.

    Example:
        >>> print(printable("conv1\x1b[2J.weight"))
        conv1\x1b[2J.weight
    """
    try:
        text = name if isinstance(name, str) else repr(name)
    except ValueError:  # Python does not write out integers of thousands of digits
        text = f"<{type(name).__name__} too long to print>"
    escaped = "".join(
        letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text[: limit + 1]
    )
    return escaped if len(escaped) <= limit else escaped[: limit - 1] + "…"


def first_names(names: Iterable[object]) -> str:
    """Return the first few names of an untrusted file as text that is safe to print.

    Args:
        names: The names.

    Example:
        >>> first_names("abcdefg")
        'a, b, c, d, e, …'
    """
    shown = list(names)
    listed = ", ".join(printable(name) for name in shown[:SHOWN_NAMES])
    return listed + (", …" if len(shown) > SHOWN_NAMES else "")
