"""The detection ratio: how much of the magnitude-saliency correlation survives (Eq. 8, 12, 13)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from scipy.stats import ConstantInputWarning, spearmanr
from torch import Tensor
from torch.nn import functional as F

from lightning_mnp.surgery.layers import FilterLayers

__all__ = ["detection_ratio", "layer_normalized", "rank_correlation", "saliency_correlation"]


def layer_normalized(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Divide each layer's values by their l2 norm (Eq. 12 and the denominator of Eq. 13).

    Args:
        values: One number for each filter, shape (total filters,).
        sizes: Number of filters of each layer.

    Returns:
        Shape (total filters,); a layer of zeros stays zero.

    Example:
        >>> layer_normalized(torch.tensor([3.0, 4.0, 2.0]), [2, 1])
        tensor([0.6000, 0.8000, 1.0000])
    """
    # Squares of tiny float32 numbers would be 0; not every device has more.
    parts = values.cpu().double().split(list(sizes))
    normalized = torch.cat([F.normalize(part, dim=0, eps=1e-300) for part in parts])
    return normalized.to(values)


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Compute Spearman's rank correlation; tied values share the mean of their ranks.

    Args:
        first: Shape (N,).
        second: Shape (N,).

    Returns:
        From -1 to 1; NaN if either is constant.

    Example:
        >>> rank_correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 9.0, 5.0]))
        0.5
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        return float(spearmanr(first.cpu().numpy(), second.cpu().numpy()).statistic)


def saliency_correlation(magnitudes: Tensor, changes: Tensor, layers: FilterLayers) -> float:
    """Compute rho, the rank correlation of magnitude and saliency over all filters (Sec. 4.3, A.3).

    Args:
        magnitudes: Norms of the filters, shape (total filters,).
        changes: Clean loss changes, shape (total filters,); their absolute values are taken.
        layers: The layers, within which both are normalized.

    Returns:
        Spearman's coefficient from -1 to 1, NaN if either is constant.
    """
    sizes = layers.sizes
    return rank_correlation(
        layer_normalized(magnitudes, sizes), layer_normalized(changes.abs(), sizes)
    )


def detection_ratio(suppressed: float, original: float) -> float:
    """Compute the detection ratio (Eq. 8): rho after clean suppression over rho before.

    Args:
        suppressed: Rank correlation of the suppressed network.
        original: Rank correlation of the network as it is.

    Returns:
        The ratio; NaN if the network as it is has no correlation.

    Example:
        >>> detection_ratio(0.25, 0.5)
        0.5
    """
    return suppressed / original if original else math.nan
