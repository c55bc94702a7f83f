"""Markup: elements of a page, in which all foreign text is escaped."""

from __future__ import annotations

from html import escape

from lightning_mnp.checkpoints.printable import printable

__all__ = ["Markup", "join", "tag"]

_MOST_LETTERS = 10_000  # of one piece of text
_VOID = frozenset({"img", "meta"})


class Markup(str):
    """Text that is markup already; any other text is escaped where it is put into an element."""

    __slots__ = ()


def _escaped(text: str) -> str:
    return text if isinstance(text, Markup) else escape(printable(text, _MOST_LETTERS))


def tag(name: str, /, *children: str | None, **attributes: str | float | None) -> Markup:
    """Return an element.

    Args:
        name: Its name.
        children: What is in it: markup as it is, other text escaped, nothing for None.
        attributes: Its attributes, escaped; those that are None are left out. An underscore at the
            end of a name is dropped, others become hyphens.

    Example:
        >>> tag("p", "a < b", tag("b", "c"), class_="note", aria_label='"')
        '<p class="note" aria-label="&quot;">a &lt; b<b>c</b></p>'
    """
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_escaped(_text(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{shown}>")
    inside = "".join(_escaped(child) for child in children if child is not None)
    return Markup(f"<{name}{shown}>{inside}</{name}>")


def _text(value: str | float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def join(*parts: str | None) -> Markup:
    """Return elements one after the other, with other text among them escaped.

    Args:
        parts: The parts; None for nothing.

    Example:
        >>> join(tag("b", "a"), " & b")
        '<b>a</b> &amp; b'
    """
    return Markup("".join(_escaped(part) for part in parts if part is not None))
