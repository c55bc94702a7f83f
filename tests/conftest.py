"""What tests share: short searches, the real networks."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import REPOSITORY

from lightning_mnp.config import Constants
from lightning_mnp.signals.margin import MarginConstants
from lightning_mnp.signals.overlay import OverlayConstants
from lightning_mnp.signals.patch import PatchConstants
from lightning_mnp.signals.permutation import PermutationConstants
from lightning_mnp.signals.reach import ReachConstants
from lightning_mnp.signals.warp import WarpConstants


@pytest.fixture
def short_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make searches for triggers short, where what they find is of no account."""
    short = {
        MarginConstants: {"steps": 4, "first_steps": 4, "next_steps": 2},
        OverlayConstants: {"steps": 2},
        # In so few steps no patch gets images anywhere, and yet it is to count.
        PatchConstants: {"far_steps": 2, "near_steps": 1, "arrives_from": -9.0},
        PermutationConstants: {"away_steps": 2, "far_steps": 2, "near_steps": 3},
        ReachConstants: {"most_steps": 3},
        WarpConstants: {"steps": 2},
    }
    of = Constants.of

    def shortened(self: Constants, kind: type[Any]) -> Any:
        found = of(self, kind)
        return replace(found, **short[kind]) if kind in short and found == kind() else found

    monkeypatch.setattr(Constants, "of", shortened)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder with real networks and images, or skip."""
    folder = Path(os.environ.get("LIGHTNING_MNP_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "zoo").is_dir():
        pytest.skip(
            f"needs the real networks in {folder}/zoo; set LIGHTNING_MNP_SHARED to their folder"
        )
    return folder
