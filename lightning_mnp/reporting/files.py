"""A report as a file, in the form that the ending of its name says."""

from __future__ import annotations

import json
from pathlib import Path

from lightning_mnp.checkpoints.atomic_write import write_atomically
from lightning_mnp.report import DefenseReport
from lightning_mnp.reporting.markdown import markdown
from lightning_mnp.reporting.page import html
from lightning_mnp.reporting.sarif import sarif

__all__ = ["save_report"]


def save_report(report: DefenseReport, path: Path | str, *, argument: str = "path") -> None:
    """Write a report, whole or not at all, replacing what was there.

    Args:
        report: The outcome.
        path: The file: a page if it ends in ``.html``, Markdown for ``.md``, SARIF for ``.sarif``,
            else JSON, as :meth:`~lightning_mnp.DefenseReport.load` reads it. Its folder is made if
            it is missing.
        argument: Name of the argument, for messages.

    Raises:
        OutputError: If it cannot be written; what was there is unharmed.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "report.html")
        >>> save_report(DefenseReport("clean"), path)
        >>> path.read_text("utf-8").splitlines()[0]
        '<!DOCTYPE html>'
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in (".html", ".md", ".sarif"):
        report.save(path, argument=argument)
        return

    def write(partial: Path) -> None:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(_content(report, ending), encoding="utf-8")

    write_atomically(path, write, argument=argument, replace=True)


def _content(report: DefenseReport, ending: str) -> str:
    if ending == ".html":
        return html(report)
    if ending == ".md":
        return markdown(report)
    file = report.weights_file
    artifact = "network" if file is None else file.name
    return json.dumps(sarif(report, artifact=artifact), indent=2) + "\n"
