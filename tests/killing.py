"""Runs that end themselves by SIGKILL; a module of its own, for processes to import."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from helpers import images_and_labels, quick_config
from torch import nn

from lightning_mnp import DefenseSet, MNPDefense
from lightning_mnp.engine.runner import run_defense


def die(*args: Any) -> None:
    """End this process as `kill -9` does: nothing is tidied up."""
    os.kill(os.getpid(), signal.SIGKILL)


def small_network() -> nn.Module:
    """Batch normalization, dropout, a frozen parameter, a hook, modules in both modes."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3),
            nn.Dropout(0.1),
            nn.Flatten(),
            nn.Linear(64, 4),
        )
    network[0].bias.requires_grad_(False)
    network[1].eval()
    network[2].register_forward_hook(_look)
    return network


def _look(*args: Any) -> None:
    """A hook of the user's own, which does nothing."""


def new_defense(changes: dict[str, Any]) -> MNPDefense:
    data = DefenseSet(*images_and_labels())
    return MNPDefense(small_network(), data, quick_config(**changes), when="always")


def defend_until(changes: dict[str, Any], state_file: Path, phase: str, moment: str) -> None:
    """Defend, and die in a phase: after its first step, or while its end is written to the file."""
    torch.set_num_threads(1)
    defense = new_defense(changes)

    def observe(defense: MNPDefense, observed: str, numbers: dict[str, float]) -> None:
        if observed != phase:
            return
        if moment == "step":
            die()
        elif moment == "half":
            torch.save = _save_half
        elif moment == "whole":
            Path.replace = die  # type: ignore[method-assign, assignment]
        else:
            os.fsync = die  # type: ignore[assignment]

    run_defense(defense, state_file=state_file, observe=observe)


def _save_half(content: Any, path: Path) -> None:
    path.write_bytes(b"PK\x03\x04" + bytes(1000))
    die()
