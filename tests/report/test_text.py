from __future__ import annotations

import io

import pytest

from lightning_mnp.report import DefenseReport, DefenseSetSummary, Signal
from lightning_mnp.report.text import text, wants_color

SIGNALS = [
    Signal("patch", 4.6, 1, 6.9, 1.5, "a patch reaches class 1"),
    Signal("permutation", 0.0, None, 0.143, 0.46, "one patch"),
    Signal("pile-up", 12.0, 0, 12.0, 1.0, "a pile-up", decides=False),
]
REPORT = DefenseReport(
    "backdoored",
    target_class=1,
    score=4.6,
    signals=SIGNALS,
    reasons=[signal.reason for signal in SIGNALS],
    warnings=["class 1 was searched"],
    defense_set=DefenseSetSummary(500, [3, 32, 32], {0: 5}, "ab"),
    accuracy_before=0.851,
)


def test_three_lines_a_table_and_what_else_there_is() -> None:
    told = text(REPORT, class_names=["cat", "dog"])
    assert told.splitlines() == [
        "BACKDOORED. This network seems to carry a backdoor: with a trigger, images are taken for "
        "class 1 (dog).",
        "Score 4.60, far above 1 (the threshold). What counts: patch points to class 1 (dog).",
        "Next: Do not use this network. Train it anew on data that you trust, or have a copy "
        "purified (`lightning-mnp defend`, `lightning_mnp.defend`).",
        "",
        "signal       points to class  measured  counts from  strength",
        "patch        1 (dog)              6.90         1.50      4.60  counts",
        "permutation  -                     14%          46%      0.00  does not count",
        "pile-up      0 (cat)             12.00         1.00     12.00  only confirms",
        "",
        "Accuracy on the 500 clean images: 85.1%.",
        "Note: class 1 (dog) was searched",
    ]
    assert str(REPORT) == text(REPORT)


@pytest.mark.parametrize(
    ("verdict", "color"), [("clean", 32), ("backdoored", 31), ("undecided", 33)]
)
def test_only_the_verdict_is_colored(verdict: str, color: int) -> None:
    report = DefenseReport(verdict, score=0.95)  # type: ignore[arg-type]
    plain, colored = text(report), text(report, color=True)
    assert "\x1b" not in plain
    assert colored.startswith(f"\x1b[1;{color}m{verdict.upper()}\x1b[0m. ")
    assert colored.replace(f"\x1b[1;{color}m", "").replace("\x1b[0m", "") == plain


def test_names_cannot_steer_a_terminal() -> None:
    hostile = ["a\x1b[2Jb", "c\nd\u202e"]
    told = text(REPORT, class_names=hostile)
    assert all(line.isprintable() for line in told.splitlines())
    assert r"1 (c\nd\u202e)" in told


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
)
def test_only_a_terminal_is_colored(
    variables: dict[str, str], wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert wants_color(Terminal()) is wanted
    assert not wants_color(io.StringIO())
