"""Published defenses and detectors to compare with: one file each, and a registry of both."""

from lightning_mnp.baselines.ac import ACConfig, detect_ac
from lightning_mnp.baselines.anp import ANPConfig, anp
from lightning_mnp.baselines.clp import CLPConfig, clp
from lightning_mnp.baselines.detection import DetectionResult
from lightning_mnp.baselines.fp import FPConfig, fp
from lightning_mnp.baselines.ft import FTConfig, ft
from lightning_mnp.baselines.ft_sam import FTSAMConfig, ft_sam
from lightning_mnp.baselines.ibau import IBAUConfig, ibau
from lightning_mnp.baselines.inversion import NCConfig
from lightning_mnp.baselines.mm_bd import MMBDConfig, detect_mm_bd
from lightning_mnp.baselines.nad import NADConfig, nad
from lightning_mnp.baselines.nc import detect_nc
from lightning_mnp.baselines.nc_unlearning import NCUnlearningConfig, nc
from lightning_mnp.baselines.nft import NFTConfig, nft
from lightning_mnp.baselines.registry import (
    Defense,
    Detector,
    detector_names,
    find,
    find_detector,
    names,
    register,
    register_detector,
    unregister,
    unregister_detector,
)
from lightning_mnp.baselines.result import BaselineResult
from lightning_mnp.baselines.rnp import RNPConfig, rnp
from lightning_mnp.baselines.sc import SCConfig, detect_sc
from lightning_mnp.baselines.strip import STRIPConfig, detect_strip
from lightning_mnp.baselines.suspects import Suspects
from lightning_mnp.baselines.tuning import TuningConfig

__all__ = [
    "ACConfig",
    "ANPConfig",
    "BaselineResult",
    "CLPConfig",
    "Defense",
    "DetectionResult",
    "Detector",
    "FPConfig",
    "FTConfig",
    "FTSAMConfig",
    "IBAUConfig",
    "MMBDConfig",
    "NADConfig",
    "NCConfig",
    "NCUnlearningConfig",
    "NFTConfig",
    "RNPConfig",
    "SCConfig",
    "STRIPConfig",
    "Suspects",
    "TuningConfig",
    "anp",
    "clp",
    "detect_ac",
    "detect_mm_bd",
    "detect_nc",
    "detect_sc",
    "detect_strip",
    "detector_names",
    "find",
    "find_detector",
    "fp",
    "ft",
    "ft_sam",
    "ibau",
    "nad",
    "names",
    "nc",
    "nft",
    "register",
    "register_detector",
    "rnp",
    "unregister",
    "unregister_detector",
]
