"""Backdoor attacks, one file each."""

from lightning_mnp.attacks.attack import Attack, CleanLabelAttack, TrainingAttack
from lightning_mnp.attacks.badnets import BadNets
from lightning_mnp.attacks.blend import Blend
from lightning_mnp.attacks.callback import TriggerCheckpoint
from lightning_mnp.attacks.iab import InputAware, InputAwareModule
from lightning_mnp.attacks.lira import LIRA, LIRAModule
from lightning_mnp.attacks.reference import ReferenceNetwork
from lightning_mnp.attacks.training import AttackModule
from lightning_mnp.attacks.trigger import SavedTrigger, load_trigger, save_trigger
from lightning_mnp.attacks.wanet import WaNet, WaNetModule

__all__ = [
    "Attack",
    "AttackModule",
    "BadNets",
    "Blend",
    "CleanLabelAttack",
    "InputAware",
    "InputAwareModule",
    "LIRA",
    "LIRAModule",
    "ReferenceNetwork",
    "SavedTrigger",
    "TrainingAttack",
    "TriggerCheckpoint",
    "WaNet",
    "WaNetModule",
    "load_trigger",
    "save_trigger",
]
