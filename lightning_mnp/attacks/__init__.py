"""Backdoor attacks, one file each."""

from lightning_mnp.attacks.attack import Attack
from lightning_mnp.attacks.badnets import BadNets
from lightning_mnp.attacks.blend import Blend

__all__ = ["Attack", "BadNets", "Blend"]
