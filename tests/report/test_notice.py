from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_mnp.report import DefenseReport, PruningReport, SecondAudit, Signal
from lightning_mnp.report.notice import notice

FILES = {"written": Path("runs/mnp-report.html"), "purified": Path("runs/mnp.ckpt")}
SIGNAL = Signal("patch", 0.95, 1, 0.8, 0.85, "a patch reaches class 1")
PRUNED: dict[str, Any] = {
    "pruned": [("conv1", 0), ("conv1", 2)],
    "pruning": PruningReport(masks={"conv1": [0.0, 0.5, 0.0, 0.7, 0.995, 1.0]}),
}


def lines(report: DefenseReport, **options: Any) -> list[str]:
    return notice(report, **{"in_place": False, "searched": True, **options}).splitlines()


def test_a_flagged_network_stays_and_a_file_is_written() -> None:
    report = DefenseReport("backdoored", target_class=3, **PRUNED)
    assert lines(report, **FILES, earlier=["last.ckpt"]) == [
        "MNPCallback: verdict BACKDOORED, target class 3",
        "- NOT changed: the network in memory and the checkpoints of this training.",
        "- Purified network (filters pruned: 2, turned down: 2): runs/mnp.ckpt",
        "- Report: runs/mnp-report.html",
        "- To use the purified network: `lightning_mnp.load_into(module, "
        "lightning_mnp.read_state_dict('runs/mnp.ckpt'))`. "
        "`MNPCallback(in_place=True)` changes the network in memory.",
    ]


def test_tuned_weights_are_told() -> None:
    report = DefenseReport("backdoored", pruning=PruningReport(tuned=0.0213))
    told = lines(report, **FILES)
    assert (
        "- Purified network (filters pruned: 0, turned down: 0, weights tuned by 2.1%)" in told[2]
    )
    report.pruning = PruningReport(tuned=0.0213, cut=17)
    assert "turned down: 0, kernels cut: 17, weights tuned by 2.1%)" in lines(report, **FILES)[2]


@pytest.mark.parametrize(
    ("earlier", "told"),
    [([], "none"), (["a/best.ckpt", "a/last.ckpt"], "a/best.ckpt, a/last.ckpt")],
)
def test_in_place_says_what_was_changed(earlier: list[str], told: str) -> None:
    report = DefenseReport("backdoored", target_class=3, **PRUNED)
    assert lines(report, in_place=True, **FILES, earlier=earlier) == [
        "MNPCallback: verdict BACKDOORED, target class 3",
        "- CHANGED: the network in memory (filters pruned: 2, turned down: 2).",
        f"- Checkpoints of this training that were saved before that: {told}.",
        "- Purified network (filters pruned: 2, turned down: 2): runs/mnp.ckpt",
        "- Report: runs/mnp-report.html",
    ]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    ("searched", "step"),
    [
        (True, "- There is no purified network: no filter was found that could be pruned."),
        (False, "- To get a purified network, call `lightning_mnp.defend` on the network."),
    ],
)
def test_without_a_purified_network(in_place: bool, searched: bool, step: str) -> None:
    report = DefenseReport("backdoored", all_to_all=True)
    told = lines(report, in_place=in_place, searched=searched, written=FILES["written"])
    assert told == [
        "MNPCallback: verdict BACKDOORED, all-to-all: each class is taken to another one",
        "- NOT changed: the network in memory and the checkpoints of this training.",
        "- Report: runs/mnp-report.html",
        step,
    ]


def test_nothing_was_written() -> None:
    report = DefenseReport("backdoored", target_class=0, **PRUNED)
    assert lines(report, unwritten="Nothing was written: the disk is full.") == [
        "MNPCallback: verdict BACKDOORED, target class 0",
        "- NOT changed: the network in memory and the checkpoints of this training.",
        "- Nothing was written: the disk is full.",
    ]


def test_the_second_audit_is_told_unless_it_says_clean() -> None:
    for verdict, count in (("clean", 0), ("undecided", 1)):
        again = SecondAudit(verdict, 0.95, 3, False, 0.5, 0.5, [])  # type: ignore[arg-type]
        report = DefenseReport("backdoored", target_class=3, reaudit=again, **PRUNED)
        told = "- Audited again, the purified network is undecided."
        assert lines(report, **FILES).count(told) == count


@pytest.mark.parametrize(
    ("judged", "reasons", "told"),
    [
        (True, [SIGNAL.reason, "class 2 is rare"], SIGNAL.reason),
        (False, [SIGNAL.reason, "too few images"], "too few images"),
        (
            False,
            ["no correlation", SIGNAL.reason, "class 2 is rare"],
            "no correlation; class 2 is rare",
        ),
        (False, [SIGNAL.reason], SIGNAL.reason),
        (False, [], "no reason is known"),
    ],
)
def test_undecided_is_one_line_with_its_reason(judged: bool, reasons: list[str], told: str) -> None:
    report = DefenseReport("undecided", judged=judged, reasons=reasons, signals=[SIGNAL])
    head = "MNPCallback: verdict UNDECIDED, neither clean nor backdoored"
    assert lines(report) == [f"{head}: {told}"]
    seen = lines(report, written=FILES["written"])
    assert seen == [f"{head} (report: runs/mnp-report.html): {told}"]


def test_classes_have_their_names_in_a_reason() -> None:
    report = DefenseReport("undecided", reasons=["class 1 is odd"], class_names=["cat", "dog"])
    [told] = lines(report)
    assert told.endswith(": class 1 (dog) is odd")


def test_an_undecided_network_that_is_pruned_all_the_same() -> None:
    report = DefenseReport("undecided", reasons=["weak"], **PRUNED)
    told = lines(report, **FILES)
    assert told[0] == "MNPCallback: verdict UNDECIDED, neither clean nor backdoored: weak"
    assert told[1].startswith("- NOT changed: ")
    assert told[2].endswith("runs/mnp.ckpt")


def test_classes_are_called_by_their_names() -> None:
    report = DefenseReport("backdoored", target_class=1, class_names=["cat", "dog"])
    assert lines(report)[0] == "MNPCallback: verdict BACKDOORED, target class 1 (dog)"


def test_a_clean_network_is_told_shortly() -> None:
    assert lines(DefenseReport("clean"), written=FILES["written"]) == ["MNPCallback: verdict CLEAN"]


def test_no_control_characters() -> None:
    report = DefenseReport("undecided", reasons=["a\x1b[2Jb\nc"])
    assert notice(report, in_place=False, searched=True).endswith(r"a\x1b[2Jb\nc")
