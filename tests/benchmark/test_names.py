from __future__ import annotations

import pytest

from lightning_mnp.benchmark.names import find_class, nearest


@pytest.mark.parametrize("path", ["lightning_mnp.attacks.Nothing", "no_such.Thing", "Thing"])
def test_unknown_classes(path: str) -> None:
    with pytest.raises(ValueError, match="Expected a `class_path` of a known class, but got"):
        find_class(path)


def test_what_is_no_class() -> None:
    with pytest.raises(ValueError, match=r"of a class, but 'json\.dumps' is a function"):
        find_class("json.dumps")


def test_no_suggestion_if_nothing_is_near() -> None:
    assert nearest("xyz", ["badnets"]) == ""
