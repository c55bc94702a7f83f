"""Algorithm 1 of the paper, Magnitude-based Pruning for Backdoor Defense, from top to bottom.

The comments count the lines of the paper's listing. The engine does the same in small steps, so
that a run can be interrupted and watched; a test holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_mnp.config import MNPConfig
from lightning_mnp.defense_data.defense_set import DefenseSet
from lightning_mnp.mnp.detection_ratio import detection_ratio, saliency_correlation
from lightning_mnp.mnp.dual_masks import DualMask
from lightning_mnp.mnp.saliency import approximate_clc, filter_magnitudes
from lightning_mnp.mnp.suppression import CleanSuppression, RunImages
from lightning_mnp.mnp.thresholds import choose_filters
from lightning_mnp.mnp.updates import PlainUpdates
from lightning_mnp.surgery.masked_network import MaskedNetwork, Weights

__all__ = ["Algorithm1Result", "algorithm_1"]


@dataclass(frozen=True)
class Algorithm1Result:
    """What Algorithm 1 gives.

    Attributes:
        m1: The mask M1 on the suppressed weights, from 0 to 1, shape (total filters,).
        m2: The mask M2 on the original weights, from 1 to 2, same shape.
        pruned: Positions of the filters to prune, lowest M1 + M2 first; each layer keeps one.
        ratio: The detection ratio.
        backdoored: Whether the ratio is at most delta, as Eq. 8 has it. The listing's output has
            the opposite sign.
    """

    m1: Tensor
    m2: Tensor
    pruned: Tensor
    ratio: float
    backdoored: bool


def algorithm_1(masked: MaskedNetwork, data: DefenseSet, config: MNPConfig) -> Algorithm1Result:
    """Find the filters that carry a backdoor, and tell whether there is one.

    Args:
        masked: The network F; it is not changed.
        data: The defense set D_d.
        config: Options, such as ``MNPConfig.paper()``; the first of its runs is made.

    Returns:
        Masks, filters and the detection ratio.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_mnp.surgery.layers import find_filter_layers
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> data = DefenseSet(torch.rand(8, 1, 2, 2), torch.arange(8) % 2)
        >>> masked = MaskedNetwork(network, find_filter_layers(network, data.images))
        >>> len(algorithm_1(masked, data, MNPConfig.paper()).pruned)  # no share is less than one
        1
    """
    size, device, updates = config.batch_size, masked.device, PlainUpdates()
    form = config.verdict.saliency

    def rho(weights: Weights, suppressed: bool) -> float:
        images, norms = data.batches(size, device), filter_magnitudes(masked, weights)
        changes = approximate_clc(masked, weights, images, form, suppressed=suppressed)
        return saliency_correlation(norms, changes, masked.layers, form)

    theta = masked.weights()
    suppression = CleanSuppression(masked, config)  # 1: theta_s = theta
    images = RunImages(data, config, run=0)
    for step in range(images.most_steps):  # 2: for t = 0, ..., T - 1
        batch = images.batch(step, device)  # 3: a mini-batch of the defense set
        suppression.step(*batch, images.size, updates)  # 4: theta_s climbs the clean loss (Eq. 6)
        if suppression.stopped:  # earlier only with `stop_accuracy`, or if the loss overflows
            break  # 5: end for
    suppression.finish("all passes were made")
    theta_s = {name: weight.detach() for name, weight in suppression.weights.items()}
    ratio = detection_ratio(rho(theta_s, True), rho(theta, False))  # 6: rank correlations
    m1 = DualMask(masked, theta_s, config, preserving=False)  # 1: M_1 of ones
    m2 = DualMask(masked, theta, config, preserving=True)  # 1: M_2 of ones
    for epoch in range(config.masks.epochs):  # 7: repeat
        for index in range(data.passes(size)):
            key = (config.seed, "masks", 0, epoch)
            batch = data.batch(index, size, device, config.augment, key)  # 8: a mini-batch
            m1.step(*batch, updates)  # 9 and 11: a step of M_1 (Eq. 5), kept from 0 to 1
            m2.step(*batch, updates)  # 10 and 12: a step of M_2 (Eq. 7), kept from 1 to 2
    scores = (m1.values + m2.values).detach()  # 13: until training converged
    # 14: filters with M_1 + M_2 <= epsilon go; the listing would take the last of a layer, too
    choice = choose_filters(scores, masked.layers.sizes, config.pruning.rule, config.pruning.amount)
    backdoored = ratio <= config.verdict.delta
    return Algorithm1Result(
        m1.values.detach(), m2.values.detach(), choice.pruned, ratio, backdoored
    )
