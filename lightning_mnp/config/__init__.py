"""The options of the method in groups, their ranges, and its constants."""

from lightning_mnp.config.constants import Constants
from lightning_mnp.config.groups import (
    FilterOptions,
    MaskOptions,
    PruningOptions,
    PruningRule,
    Removal,
    Saliency,
    SuppressionOptions,
    VerdictOptions,
    VerdictRule,
)
from lightning_mnp.config.options import MNPConfig, grouped_message, require_config
from lightning_mnp.config.ranges import check_options, option, require

__all__ = [
    "Constants",
    "FilterOptions",
    "MNPConfig",
    "MaskOptions",
    "PruningOptions",
    "PruningRule",
    "Removal",
    "Saliency",
    "SuppressionOptions",
    "VerdictOptions",
    "VerdictRule",
    "check_options",
    "grouped_message",
    "option",
    "require",
    "require_config",
]
