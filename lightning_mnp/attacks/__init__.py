"""Backdoor attacks, one file each."""

from lightning_mnp.attacks.adaptive import AdaptiveTraining
from lightning_mnp.attacks.attack import Attack, CleanLabelAttack, TrainingAttack
from lightning_mnp.attacks.badnets import BadNets
from lightning_mnp.attacks.blend import Blend
from lightning_mnp.attacks.callback import TriggerCheckpoint
from lightning_mnp.attacks.clean_label import CL
from lightning_mnp.attacks.dfst import DFST, DFSTModule
from lightning_mnp.attacks.feature_collision import FeatureCollision
from lightning_mnp.attacks.iab import InputAware, InputAwareModule
from lightning_mnp.attacks.lira import LIRA, LIRAModule
from lightning_mnp.attacks.reference import ReferenceNetwork
from lightning_mnp.attacks.registry import register, registered_attacks
from lightning_mnp.attacks.sig import SIG
from lightning_mnp.attacks.training import AttackModule
from lightning_mnp.attacks.trigger import SavedTrigger, load_trigger, save_trigger
from lightning_mnp.attacks.trojan import Trojan
from lightning_mnp.attacks.wanet import WaNet, WaNetModule

__all__ = [
    "CL",
    "DFST",
    "LIRA",
    "SIG",
    "AdaptiveTraining",
    "Attack",
    "AttackModule",
    "BadNets",
    "Blend",
    "CleanLabelAttack",
    "DFSTModule",
    "FeatureCollision",
    "InputAware",
    "InputAwareModule",
    "LIRAModule",
    "ReferenceNetwork",
    "SavedTrigger",
    "TrainingAttack",
    "TriggerCheckpoint",
    "Trojan",
    "WaNet",
    "WaNetModule",
    "load_trigger",
    "register",
    "registered_attacks",
    "save_trigger",
]
