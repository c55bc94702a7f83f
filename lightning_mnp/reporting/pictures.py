"""Pictures of a report for loggers, which take images and no pages."""

from __future__ import annotations

import base64
import binascii
import io
import math
import warnings
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from lightning_mnp.report import DefenseReport
from lightning_mnp.report.words import Words
from lightning_mnp.reporting.style import LIGHT

__all__ = ["mask_values", "pictures"]

_SIDE, _GAP = 96, 8  # of the pictures of a trigger, in pixels
_ROW, _NAME, _BAR = 22, 210, 300  # of a signal's line
_MOST_PIXELS = 4096  # of a side; a report's pictures have those of the images of a defense set
_FAR = 1e100  # no mask is, but in a report that was tampered with
_BINS, _BIN, _TALL = 20, 20, 120  # of a histogram: their number, and the size of one in pixels


def pictures(
    report: DefenseReport, *, class_names: Sequence[str] | None = None
) -> dict[str, Image.Image]:
    """Return pictures by name: ``signals``, ``masks``, and one for each trigger that was found.

    Args:
        report: The outcome.
        class_names: Names of the classes, in their order; those of the report if None.

    Returns:
        RGB pictures: the strengths of the signals as bars, with a line where they count, if there
        are signals; the histogram of the masks, if there are masks; and for each surrogate trigger
        what it changes, then images without and with it.

    Example:
        >>> pictures(DefenseReport("clean"))
        {}
    """
    found = {}
    if report.signals:
        found["signals"] = _signals(Words(report, class_names))
    if values := mask_values(report):
        name = "what is left" if report.pruning.masks else "M1 + M2"
        found["masks"] = _histogram(values, f"{name} of {len(values):,} filters")
    for trigger in report.triggers:
        shown = [part for each in trigger.examples for part in (each.clean, each.triggered)]
        parts = [picture for data in (trigger.pattern, *shown) if (picture := _read(data))]
        if parts:
            found[f"trigger-{trigger.signal}"] = _row(parts)
    return found


def mask_values(report: DefenseReport) -> list[float]:
    """Return how much is left of every filter; M1 + M2 if no kernel was turned down, else nothing.

    Args:
        report: The outcome.
    """
    by_layer = report.pruning.masks or report.pruning.sums
    return [value for part in by_layer.values() for value in part if math.isfinite(value)]


def _histogram(values: Sequence[float], title: str) -> Image.Image:
    counts, edges = np.histogram(np.clip(values, -_FAR, _FAR), _BINS, _range(values))
    size = _BINS * _BIN + 2 * _GAP, _TALL + 2 * _ROW + 2 * _GAP
    picture = Image.new("RGB", size, LIGHT["page"])
    draw = ImageDraw.Draw(picture)
    draw.text((_GAP, _GAP), f"{title}; tallest bar: {counts.max():,}", fill=LIGHT["text"])
    foot = _GAP + _ROW + _TALL
    for number, count in enumerate(counts):
        left, height = _GAP + number * _BIN, math.ceil(_TALL * count / counts.max())
        if height:
            box = left, foot - height, left + _BIN - 2, foot
            draw.rectangle(box, fill=LIGHT["first"])
    draw.text((_GAP, foot + 4), f"from {edges[0]:.3g} to {edges[-1]:.3g}", fill=LIGHT["text"])
    return picture


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of a histogram, far enough from each other to have bins between them."""
    low, high = max(min(values), -_FAR), min(max(values), _FAR)
    least = 1e-6 * max(1.0, abs(low), abs(high))
    return (low, high) if high - low >= least else (low - least, high + least)


def _signals(words: Words) -> Image.Image:
    signals = words.report.signals
    size = _NAME + _BAR + 3 * _GAP, _ROW * len(signals) + 2 * _GAP
    picture = Image.new("RGB", size, LIGHT["page"])
    draw = ImageDraw.Draw(picture)
    for number, signal in enumerate(signals):
        top = _GAP + number * _ROW
        share = min(1.0, max(0.0, signal.strength / (2 * words.flagged_from)))
        counts = words.standing(signal) == "counts"
        label = f"{signal.name}, class {words.name(signal.target_class)}: {signal.strength:.2f}"
        # The font that comes with Pillow may lack letters.
        shown = label.encode("ascii", "replace").decode("ascii")[:34]
        draw.text((_GAP, top + 4), shown, fill=LIGHT["text"])
        box = _NAME, top + 4, _NAME + round(share * _BAR), top + _ROW - 5
        draw.rectangle(box, fill=LIGHT[words.report.verdict if counts else "quiet"])
    middle = _NAME + _BAR // 2
    draw.line((middle, 2, middle, size[1] - 2), fill=LIGHT["text"], width=2)
    return picture


def _read(data: str) -> Image.Image | None:
    """Read a picture of a report; None if it is none, or larger than any of a report."""
    try:
        content = base64.b64decode(data, validate=True)
        with warnings.catch_warnings():  # of sizes, which are checked below
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture: Image.Image = Image.open(io.BytesIO(content), formats=["PNG"])
        if max(picture.size) > _MOST_PIXELS:
            return None
        return picture.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
    # Pillow raises SyntaxError for a PNG whose parts are broken.
    except (binascii.Error, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def _row(parts: Sequence[Image.Image]) -> Image.Image:
    width = len(parts) * (_SIDE + _GAP) + _GAP
    picture = Image.new("RGB", (width, _SIDE + 2 * _GAP), LIGHT["page"])
    for number, part in enumerate(parts):
        picture.paste(part, (_GAP + number * (_SIDE + _GAP), _GAP))
    return picture
