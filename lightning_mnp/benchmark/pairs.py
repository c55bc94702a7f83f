"""CA and ASR of results, and how a pair of them is written."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from lightning_mnp.benchmark.results import MISSING, Result

__all__ = ["Pair", "cell_of", "mean_drop", "mean_pair", "pairs_of", "shown"]

Pair = tuple[float, float | None]


def mean_pair(pairs: Sequence[Pair]) -> Pair:
    """Return the means of CA and ASR; None for ASR if it is None everywhere.

    Args:
        pairs: At least one pair.

    Example:
        >>> mean_pair([(90.0, 2.0), (80.0, 4.0)])
        (85.0, 3.0)
    """
    rates = [rate for _, rate in pairs if rate is not None]
    return statistics.mean(ca for ca, _ in pairs), statistics.mean(rates) if rates else None


def pairs_of(results: Sequence[Result], when: str) -> list[Pair]:
    """Return CA and ASR in percent of those results that have figures.

    Args:
        results: The results.
        when: ``"after"`` the defense, or ``"before"``, where each network comes once.
    """
    done = [each for each in results if each.is_done]
    if when == "before":
        return list({r.network_key: r.percent(when) for r in done}.values())
    return [each.percent(when) for each in done]


def mean_drop(results: Sequence[Result]) -> float | None:
    """Return by how much CA falls, in points: the mean over networks of the mean over their cells.

    Args:
        results: The results; None is returned if none of them has figures.
    """
    drops: dict[str, list[float]] = {}
    for each in results:
        if each.is_done and each.content["after"] is not None:
            fall = each.percent("before")[0] - each.percent("after")[0]
            drops.setdefault(each.network_key, []).append(fall)
    if not drops:
        return None
    return statistics.mean(statistics.mean(falls) for falls in drops.values())


def shown(pair: Pair | None, count: int = 1, digits: int = 2) -> str:
    """Write CA and ASR, with the number of results behind them if these are several.

    Args:
        pair: CA and ASR in percent, CA alone if there is no ASR; None if there are none.
        count: Number of results.
        digits: Digits behind the point.

    Example:
        >>> shown((92.11, 0.47)), shown((91.0, 2.5), 3, digits=1), shown((90.0, None)), shown(None)
        ('92.11 / 0.47', '91.0 / 2.5 (3)', '90.00', 'missing')
    """
    if pair is None:
        return MISSING
    rate = "" if pair[1] is None else f" / {pair[1]:.{digits}f}"
    return f"{pair[0]:.{digits}f}{rate}" + (f" ({count})" if count > 1 else "")


def cell_of(group: Sequence[Result], when: str = "after", digits: int = 2) -> str:
    """Write the mean CA and ASR of results, and how many failed.

    Args:
        group: The results.
        when: ``"before"`` or ``"after"`` the defense.
        digits: Digits behind the point.

    Returns:
        The mean, with the number of results behind it; ``"error"`` if all have failed,
        ``"missing"`` if there are none.
    """
    pairs = pairs_of(group, when)
    if group and not pairs:
        return "error"
    failed = sum(not each.is_done for each in group) if when == "after" else 0
    without = f", {failed} failed" if failed else ""
    return shown(mean_pair(pairs) if pairs else None, len(pairs), digits) + without
