"""Published defenses to compare with: one file each, one registry, one kind of result."""

from lightning_mnp.baselines.anp import ANPConfig, anp
from lightning_mnp.baselines.ft_sam import FTSAMConfig, ft_sam
from lightning_mnp.baselines.ibau import IBAUConfig, ibau
from lightning_mnp.baselines.nad import NADConfig, nad
from lightning_mnp.baselines.registry import Defense, find, names, register, unregister
from lightning_mnp.baselines.result import BaselineResult
from lightning_mnp.baselines.rnp import RNPConfig, rnp

__all__ = [
    "ANPConfig",
    "BaselineResult",
    "Defense",
    "FTSAMConfig",
    "IBAUConfig",
    "NADConfig",
    "RNPConfig",
    "anp",
    "find",
    "ft_sam",
    "ibau",
    "nad",
    "names",
    "register",
    "rnp",
    "unregister",
]
