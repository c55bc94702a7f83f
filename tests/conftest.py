"""What all tests share: few torch threads, isolated global state, the real networks."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

from lightning_mnp.config import Constants
from lightning_mnp.signals.margin import MarginConstants
from lightning_mnp.signals.overlay import OverlayConstants
from lightning_mnp.signals.patch import PatchConstants
from lightning_mnp.signals.permutation import PermutationConstants
from lightning_mnp.signals.reach import ReachConstants
from lightning_mnp.signals.warp import WarpConstants

REPOSITORY = Path(__file__).parents[1]
THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))


def pytest_configure() -> None:
    torch.set_num_threads(THREADS)
    hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, database=None)
    hypothesis.settings.load_profile("tests")


@pytest.fixture(autouse=True)
def isolated() -> Iterator[None]:
    """Start from seed 0, restore what is global, fail a test that leaves a mode behind."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    environment, folder = dict(os.environ), Path.cwd()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    left = {
        "gradients off": not torch.is_grad_enabled(),
        "inference mode on": torch.is_inference_mode_enabled(),
        "another default dtype": torch.get_default_dtype() != torch.float32,
        "deterministic algorithms on": torch.are_deterministic_algorithms_enabled(),
        # `lightning-mnp demo` runs on one thread, whatever was set before.
        "another number of threads": torch.get_num_threads() not in (1, THREADS),
        "a process group": torch.distributed.is_available() and torch.distributed.is_initialized(),
    }
    torch.set_num_threads(THREADS)
    found = [what for what, is_left in left.items() if is_left]
    if found:
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
    assert not found, f"the test left behind: {found}"


@pytest.fixture
def short_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make searches for triggers short, where what they find is of no account."""
    short = {
        MarginConstants: {"steps": 4, "first_steps": 4, "next_steps": 2},
        OverlayConstants: {"steps": 2},
        PatchConstants: {"far_steps": 2, "near_steps": 1},
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
