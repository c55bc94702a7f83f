"""The style of a report's page: its colors, and how it is laid out."""

from __future__ import annotations

from pathlib import Path

__all__ = ["DARK", "LIGHT", "TEXT_PAIRS", "stylesheet"]

LIGHT = {
    "page": "#ffffff",
    "panel": "#f4f6f8",
    "text": "#1b1f24",
    "muted": "#545d68",
    "line": "#c9d1d9",
    "link": "#0b5cad",
    "clean": "#17652f",
    "backdoored": "#b3261e",
    "undecided": "#7d4e00",
    "quiet": "#737d89",
    "first": "#0b5cad",
    "second": "#b3261e",
    "third": "#17652f",
    "fourth": "#7b3fa0",
}
DARK = {
    "page": "#14171c",
    "panel": "#1e232a",
    "text": "#e6e9ed",
    "muted": "#a9b2bd",
    "line": "#3d4550",
    "link": "#7ab7ff",
    "clean": "#74d391",
    "backdoored": "#ff8d84",
    "undecided": "#f0b94d",
    "quiet": "#8b95a1",
    "first": "#7ab7ff",
    "second": "#ff8d84",
    "third": "#74d391",
    "fourth": "#d3a4f0",
}
# Which colors carry text, and on what.
TEXT_PAIRS = tuple(
    (name, ground)
    for name in ("text", "muted", "link", "clean", "backdoored", "undecided")
    for ground in ("page", "panel")
)
_LAYOUT = Path(__file__).with_name("page.css")


def _variables(colors: dict[str, str]) -> str:
    return " ".join(f"--{name}: {color};" for name, color in colors.items())


def stylesheet() -> str:
    """Return the style sheet: light, dark if the reader's system is, and light on paper.

    Example:
        >>> "prefers-color-scheme: dark" in stylesheet()
        True
    """
    return (
        f":root {{ color-scheme: light dark; {_variables(LIGHT)} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}\n"
        f"{_LAYOUT.read_text('utf-8')}"
    )
