from __future__ import annotations

import math

from PIL import Image, ImageColor
from reports import SIGNALS, full_report, hostile_report

from lightning_mnp.report import DefenseReport, PruningReport
from lightning_mnp.reporting.pictures import mask_values, pictures
from lightning_mnp.reporting.style import LIGHT


def test_bars_end_where_the_strength_is() -> None:
    found = pictures(full_report())
    assert list(found) == ["signals", "masks", "trigger-patch"]
    picture = found["signals"]
    assert picture.size[1] > 22 * len(SIGNALS)
    colors = [picture.getpixel((215, 8 + 22 * row + 10)) for row in range(len(SIGNALS))]
    counts, quiet, page = (
        ImageColor.getrgb(LIGHT[name]) for name in ("backdoored", "quiet", "page")
    )
    assert colors == [counts, quiet, page, quiet]  # the exchange has no strength at all
    middle = picture.getpixel((360, 12))
    assert middle == ImageColor.getrgb(LIGHT["text"])


def test_soft_masks_come_before_the_sums_that_filters_are_ranked_by() -> None:
    assert mask_values(full_report()) == [1.0, 1.0, 0.5, 0.0, 1.0]
    pruning = PruningReport(sums={"conv1": [1.25, math.nan], "conv2": [2.0]})
    assert mask_values(full_report(pruning=pruning)) == [1.25, 2.0]
    assert mask_values(DefenseReport("clean")) == []


def test_a_histogram_has_a_bar_where_masks_are() -> None:
    masks = {"conv": [0.0, *[1.0] * 4]}
    picture = pictures(DefenseReport("clean", pruning=PruningReport(masks=masks)))["masks"]
    bar, page = (ImageColor.getrgb(LIGHT[name]) for name in ("first", "page"))
    foot, top = 8 + 22 + 120, 8 + 22
    first, middle, last = (8 + 20 * number + 5 for number in (0, 10, 19))
    shown = [picture.getpixel((column, foot - 10)) for column in (first, middle, last)]
    assert shown == [bar, page, bar]
    shown = [picture.getpixel((column, top + 10)) for column in (first, middle, last)]
    assert shown == [page, page, bar]  # one mask is a quarter of the tallest bar
    one = pictures(DefenseReport("clean", pruning=PruningReport(sums={"conv": [2.0] * 3})))
    assert one["masks"].size == picture.size


def test_a_trigger_is_drawn_beside_its_examples() -> None:
    picture = pictures(full_report())["trigger-patch"]
    assert picture.size == (3 * (96 + 8) + 8, 96 + 16)
    assert picture.getpixel((20, 20)) == (0, 0, 0)


def test_what_is_no_picture_is_left_out() -> None:
    found = pictures(hostile_report())
    assert list(found) == ["signals"]
    assert isinstance(found["signals"], Image.Image)
    assert pictures(DefenseReport("clean")) == {}
