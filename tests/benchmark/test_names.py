from __future__ import annotations

import pytest

from lightning_mnp.benchmark.names import file_words, find_class, nearest


@pytest.mark.parametrize("path", ["lightning_mnp.attacks.Nothing", "no_such.Thing", "Thing"])
def test_unknown_classes(path: str) -> None:
    with pytest.raises(ValueError, match="Expected a `class_path` of a known class, but got"):
        find_class(path)


def test_what_is_no_class() -> None:
    with pytest.raises(ValueError, match=r"of a class, but 'json\.dumps' is a function"):
        find_class("json.dumps")


def test_no_suggestion_if_nothing_is_near() -> None:
    assert nearest("xyz", ["badnets"]) == ""


def test_long_words_are_cut_and_stay_different() -> None:
    whole = "a" * 150
    assert file_words(whole) == whole
    long = [file_words(whole + "b"), file_words(whole + "c")]
    assert [len(each) for each in long] == [150, 150]
    assert long[0] != long[1]
