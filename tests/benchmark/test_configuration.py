from __future__ import annotations

from pathlib import Path

import pytest

from lightning_mnp.benchmark.configuration import merged, read_configuration, read_yaml, set_option


def test_layers_share_nothing_with_what_they_are_made_of() -> None:
    below, above = {"data": {"a": [1]}, "same": 1}, {"data": {"b": [2]}}
    found = merged(below, above)
    assert found == {"data": {"a": [1], "b": [2]}, "same": 1}
    found["data"]["a"].append(3)
    found["data"]["b"].append(3)
    assert (below["data"], above["data"]) == ({"a": [1]}, {"b": [2]})
    assert merged({"data": {"a": 1}}, {"data": None}) == {"data": None}


def test_options_that_are_not_known_may_be_left_alone() -> None:
    content = {"model": {"class_path": "M", "init_args": {"checkpoint": "a"}}}
    set_option(content, "model.checkpoint", None, only_known=True)
    set_option(content, "model.other", 1, only_known=True)
    set_option(content, "data.attack.checkpoint", 1, only_known=True)
    assert content == {"model": {"class_path": "M", "init_args": {"checkpoint": None}}}


def test_words_that_look_like_numbers_stay_words(tmp_path: Path) -> None:
    path = tmp_path / "words.yaml"
    path.write_text("[e5, 1e, '5e-2', 0x1e, 3e2x]")
    assert read_yaml(path) == ["e5", "1e", "5e-2", 30, "3e2x"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a: [\n  b: c", r"base\.yaml to hold YAML, but in line 2 it does not: .*\. Correct"),
        (b"a: \xff", r"base\.yaml to hold YAML, but it does not: .*\. Correct the file"),
    ],
)
def test_a_file_that_is_no_yaml(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "base.yaml").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        read_configuration(tmp_path / "base.yaml")


def test_a_file_without_options(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("3")
    with pytest.raises(ValueError, match=r"to hold options of `fit`, .* but got 3"):
        read_configuration(tmp_path / "base.yaml")
