"""What an audit or a defense found."""

from lightning_mnp.report.parts import (
    DefenseSetSummary,
    PruningReport,
    ReferenceRate,
    RunResult,
    SecondAudit,
    Signal,
    SurrogateTrigger,
    TriggerExample,
    Verdict,
    WeightsFile,
)
from lightning_mnp.report.report import EXIT_CODES, DefenseReport, ReportError

__all__ = [
    "EXIT_CODES",
    "DefenseReport",
    "DefenseSetSummary",
    "PruningReport",
    "ReferenceRate",
    "ReportError",
    "RunResult",
    "SecondAudit",
    "Signal",
    "SurrogateTrigger",
    "TriggerExample",
    "Verdict",
    "WeightsFile",
]
