from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_mnp import calibrate_threshold
from lightning_mnp.calibration.file import CalibrationFile, NetworkScore
from lightning_mnp.checkpoints.atomic_write import OutputError

SETTINGS = {"seed": 0, "include": ["*"], "stop_accuracy": None}
FIRST = NetworkScore("a.ckpt", "12ef", 0.5, "clean", 3.0)


def kept(path: Path) -> Any:
    return json.loads(path.read_text())


def test_scores_are_there_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "calibration.json"
    file = CalibrationFile(path, SETTINGS)
    assert file.networks == []
    file.add(FIRST)
    second = NetworkScore("b\n.ckpt", "34", 0.25, "undecided", 4.5)
    file.add(second)
    assert kept(path)["calibration"] is None
    again = CalibrationFile(path, SETTINGS)
    assert again.networks == [FIRST, second]
    assert again.find("a.ckpt", "12ef") == FIRST
    assert again.find("c.ckpt", "56") is None
    assert [each.name for each in path.parent.iterdir()] == ["calibration.json"]


def test_outcome_stands_with_the_files_it_rests_on(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    file = CalibrationFile(path, SETTINGS)
    file.add(FIRST)
    found = calibrate_threshold([0.5], 0.5)
    file.finish(found, ["a.ckpt"])
    assert kept(path)["calibration"] == {"files": ["a.ckpt"], **found.to_dict()}
    assert CalibrationFile(path, SETTINGS).networks == [FIRST]


def test_other_weights_under_the_same_name(tmp_path: Path) -> None:
    file = CalibrationFile(tmp_path / "calibration.json", SETTINGS)
    file.add(FIRST)
    with pytest.raises(ValueError, match=r"Expected a.ckpt to hold the weights .*, but they diff"):
        file.find("a.ckpt", "34")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**SETTINGS, "seed": 1}, "Expected `seed` to be 0, as for the scores that .*, but got 1"),
        ({**SETTINGS, "mu": 0.1}, r"Expected `mu` to be None, .*, but got 0\.1"),
        ({"seed": 0, "include": ["*"]}, None),
        ({"seed": 0, "stop_accuracy": None}, "Expected `include` to be .*, but got None"),
    ],
)
def test_other_settings(settings: dict[str, Any], message: str | None, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    CalibrationFile(path, SETTINGS).add(FIRST)
    before = path.read_bytes()
    if message is None:  # an option that is not set is not a difference
        assert CalibrationFile(path, settings).networks == [FIRST]
        return
    with pytest.raises(ValueError, match=message):
        CalibrationFile(path, settings)
    assert path.read_bytes() == before


def test_settings_in_groups_are_compared_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    grouped = {"seed": 0, "suppression": {"runs": 3, "lr": 0.01}}
    CalibrationFile(path, grouped).add(FIRST)
    assert kept(path)["settings"] == {"seed": 0, "suppression.runs": 3, "suppression.lr": 0.01}
    assert CalibrationFile(path, grouped).networks == [FIRST]
    other = {"seed": 0, "suppression": {"runs": 7, "lr": 0.01}}
    with pytest.raises(ValueError, match=r"Expected `suppression\.runs` to be 3, .*, but got 7"):
        CalibrationFile(path, other)


GOOD = {"format": "lightning-mnp calibration 2", "settings": SETTINGS, "networks": []}
ENTRY = {"file": "a", "weights": "b", "score": 1, "verdict": "clean", "seconds": 1}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x02weights",
        b"[]",
        b"[" * 100_000,
        {},
        {**GOOD, "format": "another"},
        {**GOOD, "settings": 3},
        {**GOOD, "networks": [{"file": "a"}]},
        {**GOOD, "networks": [{**ENTRY, "more": 1}]},
        {**GOOD, "networks": [{**ENTRY, "score": None}]},
        {**GOOD, "networks": [{**ENTRY, "score": -1.0}]},
        {**GOOD, "networks": [{**ENTRY, "score": float("nan")}]},
        {**GOOD, "networks": [{**ENTRY, "score": 10**400}]},
        {**GOOD, "networks": [{**ENTRY, "verdict": 3}]},
    ],
)
def test_something_else_is_not_overwritten(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    before = path.read_bytes()
    match = r"`output` not to exist or to hold scores of a .* something else\. Nothing"
    with pytest.raises(ValueError, match=match):
        CalibrationFile(path, SETTINGS)
    assert path.read_bytes() == before


def test_the_smallest_good_content_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({**GOOD, "networks": [ENTRY]}))
    assert CalibrationFile(path, SETTINGS).networks[0].score == 1


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="Expected argument `output` to be a file"):
        CalibrationFile(tmp_path, SETTINGS)


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "calibration.json"
    CalibrationFile(path, SETTINGS).add(FIRST)

    def refuse(path: Path, encoding: str) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(OutputError, match=r"`output` .*calibration\.json: Permission denied"):
        CalibrationFile(path, SETTINGS)


def test_a_full_disk_does_not_end_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "calibration.json"
    file = CalibrationFile(path, SETTINGS)
    file.add(FIRST)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", _full)
        with pytest.warns(UserWarning, match="No space left .* The calibration goes on, but"):
            file.add(NetworkScore("b.ckpt", "34", 0.25, "clean", 4.5))
        with pytest.raises(OutputError, match="No space left"):
            file.finish(calibrate_threshold([0.5], 0.5), ["a.ckpt"])
    assert path.read_bytes() == before
    file.finish(calibrate_threshold([0.5, 0.25], 0.5), ["a.ckpt", "b.ckpt"])
    assert [each["score"] for each in kept(path)["networks"]] == [0.5, 0.25]


def _full(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_network_is_known_under_another_spelling_of_its_name(tmp_path: Path) -> None:
    file = CalibrationFile(tmp_path / "calibration.json", SETTINGS)
    file.add(FIRST)
    assert file.find("./a.ckpt", "12ef") == FIRST
    file.add(NetworkScore("b.ckpt", "34", 0.25, "clean", 4.5))
    assert file.find("b.ckpt", "12ef") == FIRST  # the files were renamed
