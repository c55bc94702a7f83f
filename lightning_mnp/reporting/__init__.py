"""A report for people and for other tools: as text, as a page, for pull requests, as SARIF."""

from lightning_mnp.report.text import text
from lightning_mnp.reporting.markdown import markdown
from lightning_mnp.reporting.page import html
from lightning_mnp.reporting.sarif import sarif

__all__ = ["html", "markdown", "sarif", "text"]
