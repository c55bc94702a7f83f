from __future__ import annotations

from PIL import Image, ImageColor
from reports import SIGNALS, full_report, hostile_report

from lightning_mnp.report import DefenseReport
from lightning_mnp.reporting.pictures import pictures
from lightning_mnp.reporting.style import LIGHT


def test_bars_end_where_the_strength_is() -> None:
    found = pictures(full_report())
    assert list(found) == ["signals", "trigger-patch"]
    picture = found["signals"]
    assert picture.size[1] > 22 * len(SIGNALS)
    colors = [picture.getpixel((215, 8 + 22 * row + 10)) for row in range(len(SIGNALS))]
    counts, quiet, page = (
        ImageColor.getrgb(LIGHT[name]) for name in ("backdoored", "quiet", "page")
    )
    assert colors == [counts, quiet, page, quiet]  # the exchange has no strength at all
    middle = picture.getpixel((360, 12))
    assert middle == ImageColor.getrgb(LIGHT["text"])


def test_a_trigger_is_drawn_beside_its_examples() -> None:
    picture = pictures(full_report())["trigger-patch"]
    assert picture.size == (3 * (96 + 8) + 8, 96 + 16)
    assert picture.getpixel((20, 20)) == (0, 0, 0)


def test_what_is_no_picture_is_left_out() -> None:
    found = pictures(hostile_report())
    assert list(found) == ["signals"]
    assert isinstance(found["signals"], Image.Image)
    assert pictures(DefenseReport("clean")) == {}
