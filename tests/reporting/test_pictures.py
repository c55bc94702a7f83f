from __future__ import annotations

import base64
import math
import warnings
import zlib

import pytest
from PIL import Image, ImageColor
from reports import SIGNALS, full_report, hostile_report

from lightning_mnp.report import DefenseReport, PruningReport, SurrogateTrigger
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


@pytest.mark.parametrize(
    "values", [[1.0, math.nextafter(1.0, 2.0)], [1e20] * 3, [1e308, -1e308], [0.0, -1e308, 1e308]]
)
def test_a_histogram_of_values_too_near_or_too_far(values: list[float]) -> None:
    pruning = PruningReport(sums={"conv": values})
    picture = pictures(DefenseReport("clean", pruning=pruning))["masks"]
    bar = ImageColor.getrgb(LIGHT["first"])
    colors = [picture.getpixel((8 + 20 * number + 5, 8 + 22 + 118)) for number in range(20)]
    assert bar in colors


def test_a_trigger_is_drawn_beside_its_examples() -> None:
    picture = pictures(full_report())["trigger-patch"]
    assert picture.size == (3 * (96 + 8) + 8, 96 + 16)
    assert picture.getpixel((20, 20)) == (0, 0, 0)


def test_what_is_no_picture_is_left_out() -> None:
    found = pictures(hostile_report())
    assert list(found) == ["signals"]
    assert isinstance(found["signals"], Image.Image)
    assert pictures(DefenseReport("clean")) == {}


def chunk(name: bytes, content: bytes) -> bytes:
    check = zlib.crc32(name + content).to_bytes(4, "big")
    return len(content).to_bytes(4, "big") + name + content + check


def header(width: int, height: int) -> bytes:
    """The start of a PNG of gray pixels."""
    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + bytes([8, 0, 0, 0, 0]))


PIXELS = chunk(b"IDAT", zlib.compress(bytes(5000))) + chunk(b"IEND", b"")
TORN = header(2, 2) + b"\0\0\0\5IDAT"


@pytest.mark.parametrize(
    "content",
    [
        header(60_000, 60_000) + PIXELS,
        header(12_000, 12_000) + PIXELS,  # of which Pillow only warns
        header(4097, 1) + PIXELS,
        TORN,
        header(2, 2)[:-1] + b"\0" + PIXELS,  # a wrong check sum
        header(2, 2) + b"\0\0\0\0I\0AT" + PIXELS,
    ],
)
def test_huge_or_broken_pictures_are_left_out(content: bytes) -> None:
    trigger = SurrogateTrigger("patch", 1, 0.97, 64, base64.b64encode(content).decode())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pictures(DefenseReport("clean", triggers=[trigger])) == {}


def test_a_large_picture_is_none_too_many() -> None:
    content = base64.b64encode(header(4096, 1) + PIXELS).decode()
    trigger = SurrogateTrigger("patch", 1, 0.97, 64, content)
    assert list(pictures(DefenseReport("clean", triggers=[trigger]))) == ["trigger-patch"]
