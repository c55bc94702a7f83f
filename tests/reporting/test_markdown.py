from __future__ import annotations

import pytest
from reports import HOSTILE, full_report, hostile_report

from lightning_mnp.report import DefenseReport
from lightning_mnp.reporting import markdown
from lightning_mnp.reporting.markdown import escape


def test_a_comment_for_a_pull_request() -> None:
    assert markdown(full_report()).splitlines() == [
        "### ❌ BACKDOORED: This network seems to carry a backdoor: with a trigger, images are "
        "taken for class 1 (dog).",
        "",
        "Score 4.60, far above 1 (the threshold). What counts: patch points to class 1 (dog).",
        "",
        "**Next:** Do not use this network. Train it anew if you can. No backdoor was found in the "
        "purified copy, but part of one may be left: use the copy only where a wrong answer does "
        "little harm, once you have measured its accuracy on images of your own.",
        "",
        "| signal | points to class | measured | counts from | strength | |",
        "| --- | --- | ---: | ---: | ---: | --- |",
        "| patch | 1 (dog) | 6.90 | 1.50 | 4.60 | **counts** |",
        "| margin | 2 | 0.50 | 0.80 | 0.40 | does not count |",
        "| permutation | - | 14% | 46% | 0.00 | does not count |",
        "| pile-up | 1 (dog) | 1.20 | 1.00 | 1.20 | only confirms |",
        "",
        "- Of 40 clean networks, 1 looked as suspicious: 2.5% (95% interval 0.1% to 13.2%).",
        "- Accuracy on the 500 clean images: 85.0%, purified 84.0%.",
        "- Purified: 1 of 5 filters pruned, 1 turned down.",
        "- The purified copy was audited again: clean.",
        "- Note: M1 of run 1 stopped early",
        "",
        "<sub>models/suspicious.pt · weights efefefefefefefef · lightning-mnp 0.1.0 · "
        "2026-11-28T10:00:00+00:00</sub>",
    ]


@pytest.mark.parametrize("verdict", ["clean", "undecided"])
def test_other_verdicts(verdict: str) -> None:
    told = markdown(DefenseReport(verdict, score=0.95))  # type: ignore[arg-type]
    assert verdict.upper() in told.splitlines()[0]
    assert "|" not in told


def test_hostile_names_show_as_text() -> None:
    told = markdown(hostile_report(), class_names=[HOSTILE, HOSTILE])
    plain = markdown(full_report())
    for letters in ("<script", "[x]", "](", "://", "@all", " #1", "\x1b", "\u202e"):
        assert letters not in told
    rows = [line for line in told.splitlines() if line.startswith("| ")]
    assert {row.count("|") for row in rows} == {plain.splitlines()[6].count("|")}
    assert told.count("`") == plain.count("`")


@pytest.mark.parametrize(
    ("foreign", "told"),
    [
        ("layer1.conv_2", "layer1.conv&#95;2"),
        ("a@b.c", "a&#64;\u2060b.c"),
        ("GH-1 #12", "GH-1 &#35;\u206012"),
        ("https://a.b", "https:/\u2060/a.b"),
        ("WWW.a.b", "WWW\u2060.a.b"),
        ("a\nb", r"a&#92;nb"),
    ],
)
def test_escape(foreign: str, told: str) -> None:
    assert escape(foreign) == told
