"""Harm: by how much masks make a network worse on clean images, measured with few of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_mnp.defense_data.defense_set import DefenseSet
from lightning_mnp.defense_data.evaluation import clean_logits
from lightning_mnp.surgery.masked_network import MaskedNetwork

__all__ = ["CleanHarm", "HarmConstants", "trimmed_mean"]


@dataclass(frozen=True)
class HarmConstants:
    """How harm is measured with few images.

    Attributes:
        enough_images: From so many images on, the rise of their loss is trusted alone.
        divergence: What a nat of divergence counts: part of it is the backdoor's own doing on
            clean images.
    """

    enough_images: int = 2500
    divergence: float = 0.5


def trimmed_mean(values: Tensor, share: float) -> Tensor:
    """Compute the mean without the greatest values.

    Args:
        values: Shape (N,).
        share: The share that is left out, rounded up, from 0 to below 1.

    Example:
        >>> trimmed_mean(torch.tensor([1.0, 9.0, 2.0]), 0.1)
        tensor(1.5000)
    """
    # 0.07 times 100 is a little more than 7: that is rounding, and no eighth value.
    left = len(values) - math.ceil(share * len(values) - 1e-9)
    if left == len(values) or not bool(values.isfinite().all()):  # no NaN is left out unseen
        return values.mean()
    return values.sort().values[: max(1, left)].mean()


class CleanHarm:
    """Measures how much harm masks do to clean images, in nats.

    With many images it is the rise of the clean loss. With few, there are always filters without
    which the loss on just these images falls, by chance. How far the predictions move away from
    those of the network as it is (the Kullback-Leibler divergence) cannot fall, and it is the rise
    of the loss to be expected if the network's probabilities are right. So with N images,
    fewer than 2500, the rise counts N / 2500, and half of the divergence the rest.

    Images that are poisoned suffer most when a backdoor is removed, and would protect it. If
    some may be poisoned, as many are left out: those that suffer most.

    Args:
        masked: The network.
        clean: Clean images, the defense set first; the others are copies of it.
        batch_size: Most images in a batch.
        impurity: The share of images that may be poisoned.
        constants: How harm is measured with few images.

    Example:
        >>> from torch import nn
        >>> from lightning_mnp.surgery.layers import find_filter_layers
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> data = DefenseSet(torch.rand(6, 1, 2, 2), torch.arange(6) % 2)
        >>> masked = MaskedNetwork(network, find_filter_layers(network, data.images))
        >>> harm = CleanHarm(masked, [data], 128)
        >>> harm.of(torch.ones(4)), harm.of(torch.zeros(4)) > 0
        (0.0, True)
    """

    def __init__(
        self,
        masked: MaskedNetwork,
        clean: Sequence[DefenseSet],
        batch_size: int,
        impurity: float = 0.0,
        constants: HarmConstants | None = None,
    ) -> None:
        constants = constants or HarmConstants()
        self.masked = masked
        self.clean = list(clean)
        self.batch_size = batch_size
        self.impurity = impurity
        self._share = min(1.0, len(self.clean[0]) / constants.enough_images)
        self._divergence = constants.divergence
        self._before: Tensor | None = None

    @torch.no_grad()
    def compare_with(self, masked: MaskedNetwork, masks: Tensor) -> None:
        """Measure harm against another network from now on, in place of the one without masks.

        Args:
            masked: That network.
            masks: Its filter masks, shape (total filters,).
        """
        self._before = self._log_probabilities(masked, masks)[0]

    @torch.no_grad()
    def of(self, masks: Tensor) -> float:
        """Measure the harm of filter masks, in nats; 0 for masks of ones.

        Masks on kernels, if the network has any at the time, count as part of the harm.

        Args:
            masks: Filter masks, shape (total filters,).
        """
        if self._before is None:
            with self.masked.masking_kernels(None):
                self.compare_with(self.masked, torch.ones_like(masks))
        before = self._before
        assert before is not None
        after, labels = self._log_probabilities(self.masked, masks)
        own = labels[:, None]
        harm = (before.gather(1, own) - after.gather(1, own))[:, 0]
        if self._share < 1:
            divergence = F.kl_div(after, before, reduction="none", log_target=True).sum(1)
            harm = self._share * harm + (1 - self._share) * self._divergence * divergence
        return float(trimmed_mean(harm, self.impurity))

    def _log_probabilities(self, masked: MaskedNetwork, masks: Tensor) -> tuple[Tensor, Tensor]:
        passed = [clean_logits(masked, data, self.batch_size, masks=masks) for data in self.clean]
        logits, labels = (torch.cat(parts) for parts in zip(*passed, strict=True))
        # Differences are small, whatever the network runs in.
        return logits.float().log_softmax(1), labels
