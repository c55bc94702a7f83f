"""MNPModule for a Trainer of ``pytorch_lightning``, which takes no modules of ``lightning``."""

from __future__ import annotations

from pytorch_lightning import LightningModule

from lightning_mnp.module import MNPSteps

__all__ = ["MNPModule"]


class MNPModule(MNPSteps, LightningModule):  # type: ignore[misc]  # two names, one code
    """Wraps a network so that ``pytorch_lightning.Trainer.fit`` audits and defends it.

    See :class:`lightning_mnp.MNPModule`, which has the same arguments and does the same.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> MNPModule(network, when="never")(torch.zeros(3, 1, 2, 2)).shape
        torch.Size([3, 2])
    """
