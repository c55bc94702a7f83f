from __future__ import annotations

from lightning_mnp.checkpoints.printable import first_names, printable


def test_printable() -> None:
    assert printable("conv1.weight") == "conv1.weight"
    assert printable("größe") == "größe"
    assert printable("a\nb\u202e\x9b") == "a\\nb\\u202e\\x9b"
    assert printable(3) == "3"
    assert printable(10**9999) == "<int too long to print>"
    assert printable("x" * 500, 10) == "xxxxxxxxx…"
    assert printable("\x1b" * 500).isprintable()
    assert len(printable("\x1b" * 500)) == 120


def test_first_names() -> None:
    assert first_names(["a", "b"]) == "a, b"
    assert first_names("abcdef") == "a, b, c, d, e, …"
