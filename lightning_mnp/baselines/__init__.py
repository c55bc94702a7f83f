"""Published defenses to compare with: one file each, one registry, one kind of result."""

from lightning_mnp.baselines.registry import Defense, find, names, register, unregister
from lightning_mnp.baselines.result import BaselineResult
from lightning_mnp.baselines.rnp import RNPConfig, rnp

__all__ = [
    "BaselineResult",
    "Defense",
    "RNPConfig",
    "find",
    "names",
    "register",
    "rnp",
    "unregister",
]
