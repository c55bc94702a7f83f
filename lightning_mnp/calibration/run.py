"""The run of a calibration: check the networks, audit each of them, print a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from lightning_mnp.calibration.file import CalibrationFile, NetworkScore
from lightning_mnp.calibration.threshold import Calibration, check_count
from lightning_mnp.checkpoints.printable import printable
from lightning_mnp.config import MNPConfig
from lightning_mnp.report import DefenseReport

__all__ = ["TimedReport", "check_networks", "collect_scores", "digest_networks", "score_table"]


def check_networks(paths: Sequence[Path], rate: float, config: MNPConfig) -> list[str]:
    """Check the arguments of a calibration, before any file is read.

    Args:
        paths: The checkpoints.
        rate: The false positive rate that the user asks for, between 0 and 1.
        config: Options of the audits.

    Returns:
        Names of the files.

    Raises:
        ValueError: If a file is named twice, there are too few files for the rate, or the verdict
            is by a rule without a score.

    Example:
        >>> check_networks([Path("a.ckpt"), Path("b.ckpt")], 0.5, MNPConfig())
        ['a.ckpt', 'b.ckpt']
    """
    files = [str(path) for path in paths]
    places = [path.absolute() for path in paths]
    for index, place in enumerate(places):
        if place in places[:index]:
            raise ValueError(
                f"Expected argument `ckpt_paths` to name every file once, but got "
                f"{printable(files[index])} again. Leave the repetition out."
            )
    check_count(len(files), rate)
    if config.verdict.rule != "signals":
        raise ValueError(
            f"Expected option `verdict.rule` to be 'signals', whose score is calibrated, but got "
            f"{config.verdict.rule!r}. Leave `--mnp.verdict.rule` out."
        )
    return files


def digest_networks(files: Sequence[str], digest: Callable[[str], str]) -> dict[str, str]:
    """Compute a digest of the weights in each file.

    Args:
        files: Names of the checkpoints.
        digest: A function that reads a file and returns a digest of its weights.

    Returns:
        The digests by the names of the files.

    Raises:
        ValueError: If two files hold the same weights.

    Example:
        >>> digest_networks(["a.ckpt", "b.ckpt"], str.upper)
        {'a.ckpt': 'A.CKPT', 'b.ckpt': 'B.CKPT'}
    """
    owners: dict[str, str] = {}
    for file in files:
        owner = owners.setdefault(digest(file), file)
        if owner != file:
            raise ValueError(
                f"Expected argument `ckpt_paths` to name different networks, but "
                f"{printable(owner)} and {printable(file)} hold the same weights. A copy says "
                "nothing new: leave one out."
            )
    return {file: weights for weights, file in owners.items()}


@dataclass(frozen=True)
class TimedReport:
    """The report of an audit.

    Attributes:
        report: The report.
        seconds: How long the audit took.
    """

    report: DefenseReport
    seconds: float


def collect_scores(
    digests: dict[str, str],
    kept: CalibrationFile,
    audits: Callable[[Sequence[str]], Iterable[tuple[str, TimedReport | Exception]]],
    say: Callable[[str], None],
) -> list[NetworkScore]:
    """Collect the scores of all networks, and audit those that have none yet.

    An audit that fails ends none of the others.

    Args:
        digests: Digests of the weights by the names of the files.
        kept: The scores so far; each new one is added to it at once.
        audits: A function that audits the networks in files, in any order, and gives each file
            with its report or with the error that ended the audit.
        say: A function that prints a line; it is called once for each network.

    Returns:
        The scores in the order of the files.

    Raises:
        ValueError: If the known score of a file belongs to other weights, or an audit returns no
            score.

    Example:
        >>> import tempfile
        >>> kept = CalibrationFile(Path(tempfile.mkdtemp(), "calibration.json"), {"seed": 0})
        >>> kept.add(NetworkScore("a.ckpt", "12ef", 0.4, "clean", 61.6))
        >>> scores = collect_scores({"a.ckpt": "12ef"}, kept, lambda files: [], say=print)
        1 of 1: a.ckpt: score 0.4 (from the file)
    """
    found = {file: kept.find(file, weights) for file, weights in digests.items()}
    scores = {file: score for file, score in found.items() if score is not None}
    for number, (file, score) in enumerate(scores.items(), 1):
        say(f"{number} of {len(digests)}: {file}: score {score.score:.4g} (from the file)")
    errors: list[Exception] = []
    for file, result in audits([file for file in digests if file not in scores]):
        number = len(scores) + len(errors) + 1
        try:
            scores[file] = score = _score_of(file, digests[file], result)
        except Exception as error:
            errors.append(error)
            say(f"{number} of {len(digests)}: {file}: no score: {error}")
        else:
            kept.add(score)
            say(f"{number} of {len(digests)}: {file}: score {score.score:.4g}")
    if errors:
        raise errors[0]
    return [scores[file] for file in digests]


def _score_of(file: str, weights: str, result: TimedReport | Exception) -> NetworkScore:
    if isinstance(result, Exception):
        raise result
    report = result.report
    _check_score(file, report)
    return NetworkScore(
        file, weights, float(report.score), report.verdict, round(result.seconds, 3)
    )


def _check_score(file: str, report: DefenseReport) -> None:
    """Raise if an audit returned no score that means something."""
    if not (math.isfinite(report.score) and report.judged):
        found = f"{report.score:.4g}" if report.judged else "of no meaning"
        raise ValueError(
            f"Expected every network to have a score, but that of {printable(file)} is {found} "
            f"(verdict: {report.verdict}; {'; '.join(reversed(report.reasons))}). Leave the "
            "network out; the scores of the others are kept."
        )


def score_table(scores: Sequence[NetworkScore], calibration: Calibration) -> Table:
    """Make the table that the command prints.

    Args:
        scores: The scores, one for each row.
        calibration: The result, whose threshold is shown in the title.

    Returns:
        A table with the columns network, score, verdict and seconds.

    Example:
        >>> from lightning_mnp.calibration.threshold import calibrate_threshold
        >>> score = NetworkScore("a.ckpt", "12ef", 0.4, "clean", 61.6)
        >>> score_table([score], calibrate_threshold([0.4], 0.5)).row_count
        1
    """
    table = Table(title=f"{len(scores)} clean networks, threshold {calibration.threshold:.4g}")
    table.add_column("network", overflow="fold")
    table.add_column("score", justify="right")
    table.add_column("verdict")
    table.add_column("seconds", justify="right")
    for each in scores:
        name = Text(printable(each.file, 1000))
        table.add_row(name, f"{each.score:.4g}", Text(each.verdict), f"{each.seconds:.0f}")
    return table
