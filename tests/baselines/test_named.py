from __future__ import annotations

import pytest

from lightning_mnp.baselines.named import NamedFunctions


def test_functions_are_found_by_name_in_the_order_of_adding() -> None:
    colors = NamedFunctions("color", "(shade)")
    colors.add("red", abs)
    colors.add("blue", round)
    assert colors.names() == ["red", "blue"]
    assert colors.find("blue") is round
    colors.remove("red")
    assert colors.names() == ["blue"]


def test_messages_name_the_kind_and_its_public_functions() -> None:
    colors = NamedFunctions("color", "(shade)", suffix="_color")
    colors.add("red", abs)
    with pytest.raises(ValueError, match=r"a color 'red'. Choose .* call `unregister_color` first"):
        colors.add("red", abs)
    with pytest.raises(ValueError, match=r"Add a color of your own with .*\.register_color`"):
        colors.find("blue")
    with pytest.raises(ValueError, match=r"one of \['red'\], but got 'blue'"):
        colors.remove("blue")
