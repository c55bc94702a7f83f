"""Audit a trained CNN for a backdoor, and remove it."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_mnp.api import audit, defend
    from lightning_mnp.calibration.threshold import Calibration, calibrate_threshold
    from lightning_mnp.callback import MNPCallback
    from lightning_mnp.checkpoints.inspection import CheckpointError
    from lightning_mnp.checkpoints.load import load_into
    from lightning_mnp.checkpoints.read import read_state_dict
    from lightning_mnp.checkpoints.write import write_state_dict
    from lightning_mnp.config import (
        Constants,
        FilterOptions,
        MaskOptions,
        MNPConfig,
        PruningOptions,
        SuppressionOptions,
        VerdictOptions,
    )
    from lightning_mnp.defense_data.defense_set import DefenseSet
    from lightning_mnp.engine.defense import MNPDefense
    from lightning_mnp.module import MNPModule
    from lightning_mnp.report import (
        DefenseReport,
        DefenseSetSummary,
        PruningReport,
        ReferenceRate,
        ReportError,
        RunResult,
        SecondAudit,
        Signal,
        SurrogateTrigger,
        TriggerExample,
        WeightsFile,
    )
    from lightning_mnp.surgery.layers import FilterLayer, FilterLayers, find_filter_layers
    from lightning_mnp.surgery.masks import FilterMasks
    from lightning_mnp.surgery.prune import prune

# Names are imported when they are first used, so that the core does not import Lightning.
_HOMES = {
    "Calibration": "calibration.threshold",
    "CheckpointError": "checkpoints.inspection",
    "Constants": "config",
    "DefenseReport": "report",
    "DefenseSet": "defense_data.defense_set",
    "DefenseSetSummary": "report",
    "FilterLayer": "surgery.layers",
    "FilterLayers": "surgery.layers",
    "FilterMasks": "surgery.masks",
    "FilterOptions": "config",
    "MNPCallback": "callback",
    "MNPConfig": "config",
    "MNPDefense": "engine.defense",
    "MNPModule": "module",
    "MaskOptions": "config",
    "PruningOptions": "config",
    "PruningReport": "report",
    "ReferenceRate": "report",
    "ReportError": "report",
    "RunResult": "report",
    "SecondAudit": "report",
    "Signal": "report",
    "SuppressionOptions": "config",
    "SurrogateTrigger": "report",
    "TriggerExample": "report",
    "VerdictOptions": "config",
    "WeightsFile": "report",
    "audit": "api",
    "calibrate_threshold": "calibration.threshold",
    "defend": "api",
    "find_filter_layers": "surgery.layers",
    "load_into": "checkpoints.load",
    "prune": "surgery.prune",
    "read_state_dict": "checkpoints.read",
    "write_state_dict": "checkpoints.write",
}

__version__ = version("lightning-mnp")
__all__ = [
    "Calibration",
    "CheckpointError",
    "Constants",
    "DefenseReport",
    "DefenseSet",
    "DefenseSetSummary",
    "FilterLayer",
    "FilterLayers",
    "FilterMasks",
    "FilterOptions",
    "MNPCallback",
    "MNPConfig",
    "MNPDefense",
    "MNPModule",
    "MaskOptions",
    "PruningOptions",
    "PruningReport",
    "ReferenceRate",
    "ReportError",
    "RunResult",
    "SecondAudit",
    "Signal",
    "SuppressionOptions",
    "SurrogateTrigger",
    "TriggerExample",
    "VerdictOptions",
    "WeightsFile",
    "audit",
    "calibrate_threshold",
    "defend",
    "find_filter_layers",
    "load_into",
    "prune",
    "read_state_dict",
    "write_state_dict",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
