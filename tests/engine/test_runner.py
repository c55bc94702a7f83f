"""The bar of a run moves, also within another live display."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any

import pytest
import rich
from rich.live import Live

from lightning_mnp.engine.runner import run_defense


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What a terminal gets to see."""
    monkeypatch.setenv("TERM", "xterm")
    seen = io.StringIO()
    rich.reconfigure(file=seen, force_terminal=True, color_system=None, width=120)
    if not hasattr(rich.get_console(), "_live_stack"):
        pytest.skip("rich shows one live display at a time before 14.1")
    yield seen
    rich.reconfigure()


class ThreePhases:
    """A defense of three phases with one step each."""

    run = position = 0

    @property
    def finished(self) -> bool:
        return self.position == 3

    @property
    def phase(self) -> str:
        return f"phase {self.position}"

    def most_steps(self) -> int:
        return 3 - self.position

    def step(self) -> dict[str, float]:
        self.position += 1
        return {}


@pytest.mark.parametrize("outer", [True, False])
def test_the_bar_moves_with_every_phase(terminal: io.StringIO, outer: bool) -> None:
    if outer:  # draws itself when it is told to, as Lightning's RichProgressBar does
        with Live("outer", auto_refresh=False):
            run_defense(ThreePhases(), progress=True)  # type: ignore[arg-type]
    else:
        run_defense(ThreePhases(), progress=True)  # type: ignore[arg-type]
    shown: list[Any] = re.findall(r"(phase \d), run 1 .*? (\d)/(\d)", terminal.getvalue())
    assert set(shown) >= {(f"phase {done}", str(done), "3") for done in range(3)}


def test_no_bar_is_drawn_unasked(terminal: io.StringIO) -> None:
    run_defense(ThreePhases())  # type: ignore[arg-type]
    assert terminal.getvalue() == ""


def test_nothing_is_written_to_what_is_no_terminal() -> None:
    seen = io.StringIO()
    rich.reconfigure(file=seen, force_terminal=False)
    try:
        run_defense(ThreePhases(), progress=True)  # type: ignore[arg-type]
    finally:
        rich.reconfigure()
    assert seen.getvalue() == ""
