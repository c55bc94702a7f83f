"""A report as one HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from lightning_mnp.report import DefenseReport, TriggerExample
from lightning_mnp.report.text import text

__all__ = ["html"]


def html(
    report: DefenseReport,
    *,
    class_names: Sequence[str] | None = None,
    images: Sequence[TriggerExample] | None = None,
) -> str:
    """Return a report as a page that asks for no other file.

    Args:
        report: The outcome.
        class_names: Names of the classes, in their order; those of the report if None.
        images: Examples of triggered images to show; those of the report if None. With ``()`` the
            page shows no image of the defense set.

    Returns:
        The page.

    Example:
        >>> html(DefenseReport("clean")).startswith("<!DOCTYPE html>")
        True
    """
    told = escape(text(report, class_names=class_names))
    return f"<!DOCTYPE html>\n<html lang='en'><meta charset='utf-8'><pre>{told}</pre></html>\n"
