"""The notice: what a user must read of an outcome, and what to do next."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_mnp.checkpoints.printable import printable
from lightning_mnp.report.report import DefenseReport
from lightning_mnp.report.words import Words

__all__ = ["notice"]

_MOST_LETTERS = 10_000  # of a line: a reason may list many classes


def notice(
    report: DefenseReport,
    *,
    in_place: bool,
    searched: bool,
    written: Path | None = None,
    purified: Path | None = None,
    earlier: Sequence[str] = (),
    unwritten: str = "",
) -> str:
    """Return the verdict, what was changed, what was written, and how to go on.

    Args:
        report: The outcome.
        in_place: Whether the network in memory was changed as the report says.
        searched: Whether filters to prune were looked for if the network is backdoored.
        written: The file of the report; None if nothing was written.
        purified: The checkpoint of the purified network; None if there is none.
        earlier: Files of checkpoints that were saved before the network was changed.
        unwritten: Why files are missing, as a sentence; empty if none is.

    Returns:
        One line for each of these, without control characters.

    Example:
        >>> report = DefenseReport("backdoored", target_class=3)
        >>> for line in notice(report, in_place=False, searched=False).splitlines():
        ...     print(line)
        MNPCallback: verdict BACKDOORED, target class 3
        - NOT changed: the network in memory and the checkpoints of this training.
        - To get a purified network, call `lightning_mnp.defend` on the network.
    """
    lines = [_verdict_line(report, written)]
    if report.changes and in_place:
        lines.append(f"- CHANGED: the network in memory ({_filters(report)}).")
        files = ", ".join(earlier) or "none"
        lines.append(f"- Checkpoints of this training that were saved before that: {files}.")
    elif report.changes or report.verdict == "backdoored":
        lines.append("- NOT changed: the network in memory and the checkpoints of this training.")
    if purified is not None:
        lines.append(f"- Purified network ({_filters(report)}): {purified}")
        if report.reaudit is not None and report.reaudit.verdict != "clean":
            lines.append(f"- Audited again, the purified network is {report.reaudit.verdict}.")
    if written is not None and len(lines) > 1:
        lines.append(f"- Report: {written}")
    if unwritten:
        lines.append(f"- {unwritten}")
    else:
        lines += _next_steps(report, in_place, searched, purified)
    return "\n".join(printable(line, _MOST_LETTERS) for line in lines)


def _verdict_line(report: DefenseReport, written: Path | None) -> str:
    """Return the verdict with its target or its reason; for undecided, that is all there is."""
    head = f"MNPCallback: verdict {report.verdict.upper()}"
    if report.verdict == "backdoored":
        if report.target_class is not None:
            return f"{head}, target class {Words(report).name(report.target_class)}"
        return f"{head}, all-to-all: each class is taken to another one"
    if report.verdict == "undecided":
        seen = "" if written is None or report.changes else f" (report: {written})"
        reason = Words(report).named(_reason(report))
        return f"{head}, neither clean nor backdoored{seen}: {reason}"
    return head


def _reason(report: DefenseReport) -> str:
    """Return why a verdict is undecided: what no signal says, or else the strongest signal."""
    signals = {signal.reason for signal in report.signals}
    causes = [reason for reason in report.reasons if reason not in signals]
    if report.judged or not causes:
        return (report.reasons or ["no reason is known"])[0]
    return "; ".join(causes)


def _filters(report: DefenseReport) -> str:
    told = f"filters pruned: {len(report.pruned)}, turned down: {report.turned_down}"
    tuned, cut = report.pruning.tuned, report.pruning.cut
    told = f"{told}, kernels cut: {cut}" if cut else told
    return f"{told}, weights tuned by {tuned:.1%}" if tuned else told


def _next_steps(
    report: DefenseReport, in_place: bool, searched: bool, purified: Path | None
) -> list[str]:
    if purified is not None and not in_place:
        return [
            "- To use the purified network: `lightning_mnp.load_into(module, "
            f"lightning_mnp.read_state_dict({str(purified)!r}))`. "
            "`MNPCallback(in_place=True)` changes the network in memory."
        ]
    if report.verdict != "backdoored" or report.changes:
        return []
    if searched:
        return ["- There is no purified network: no filter was found that could be pruned."]
    return ["- To get a purified network, call `lightning_mnp.defend` on the network."]
