"""Published defenses to compare with: one file each, one registry, one kind of result."""

from lightning_mnp.baselines.anp import ANPConfig, anp
from lightning_mnp.baselines.clp import CLPConfig, clp
from lightning_mnp.baselines.fp import FPConfig, fp
from lightning_mnp.baselines.ft import FTConfig, ft
from lightning_mnp.baselines.ft_sam import FTSAMConfig, ft_sam
from lightning_mnp.baselines.ibau import IBAUConfig, ibau
from lightning_mnp.baselines.nad import NADConfig, nad
from lightning_mnp.baselines.nft import NFTConfig, nft
from lightning_mnp.baselines.registry import Defense, find, names, register, unregister
from lightning_mnp.baselines.result import BaselineResult
from lightning_mnp.baselines.rnp import RNPConfig, rnp
from lightning_mnp.baselines.tuning import TuningConfig

__all__ = [
    "ANPConfig",
    "BaselineResult",
    "CLPConfig",
    "Defense",
    "FPConfig",
    "FTConfig",
    "FTSAMConfig",
    "IBAUConfig",
    "NADConfig",
    "NFTConfig",
    "RNPConfig",
    "TuningConfig",
    "anp",
    "clp",
    "find",
    "fp",
    "ft",
    "ft_sam",
    "ibau",
    "nad",
    "names",
    "nft",
    "register",
    "rnp",
    "unregister",
]
