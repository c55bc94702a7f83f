"""Published defenses and detectors to compare with: one file each, two registries."""

from lightning_mnp.baselines.ac import ACConfig, detect_ac
from lightning_mnp.baselines.detection import DetectionResult
from lightning_mnp.baselines.inversion import NCConfig
from lightning_mnp.baselines.mm_bd import MMBDConfig, detect_mm_bd
from lightning_mnp.baselines.nc import detect_nc
from lightning_mnp.baselines.nc_unlearning import NCUnlearningConfig, nc
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

__all__ = [
    "ACConfig",
    "BaselineResult",
    "Defense",
    "DetectionResult",
    "Detector",
    "MMBDConfig",
    "NCConfig",
    "NCUnlearningConfig",
    "RNPConfig",
    "SCConfig",
    "STRIPConfig",
    "Suspects",
    "detect_ac",
    "detect_mm_bd",
    "detect_nc",
    "detect_sc",
    "detect_strip",
    "detector_names",
    "find",
    "find_detector",
    "names",
    "nc",
    "register",
    "register_detector",
    "rnp",
    "unregister",
    "unregister_detector",
]
