"""The detection ratio: how much of the magnitude-saliency correlation survives (Eq. 8, 12, 13)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from scipy.stats import ConstantInputWarning, spearmanr
from torch import Tensor
from torch.nn import functional as F

from lightning_mnp.surgery.layers import FilterLayers

__all__ = ["layer_normalized", "saliency_correlation"]


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


def saliency_correlation(magnitudes: Tensor, changes: Tensor, layers: FilterLayers) -> float:
    """Rank correlation of magnitude and saliency over all filters (Sec. 4.3, A.3).

    Args:
        magnitudes: Norms of the filters, shape (total filters,).
        changes: Clean loss changes, shape (total filters,); their absolute values are taken.
        layers: The layers, within which both are normalized.

    Returns:
        Spearman's coefficient from -1 to 1, NaN where either is constant.
    """
    first = layer_normalized(magnitudes, layers.sizes).cpu().numpy()
    second = layer_normalized(changes.abs(), layers.sizes).cpu().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        return float(spearmanr(first, second).statistic)
