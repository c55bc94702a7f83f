"""What tests and the examples in docstrings share: few torch threads, isolated global state."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the tests of a file in one process, so that what they share is made once."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log) if config.getoption("dist") == "load" else None


def pytest_configure() -> None:
    """Compute on few threads, and draw the same examples each time."""
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
    # `torch.manual_seed` formats the call stack for a CUDA that may come, 4,000 times.
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)
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
