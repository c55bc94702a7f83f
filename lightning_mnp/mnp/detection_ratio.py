"""The detection ratio: how much of the magnitude-saliency correlation survives (Eq. 8, 12, 13)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from scipy.stats import ConstantInputWarning, spearmanr
from torch import Tensor
from torch.nn import functional as F

from lightning_mnp.config import Saliency
from lightning_mnp.surgery.layers import FilterLayers

__all__ = [
    "LEAST_FILTERS",
    "LITERAL_WARNING",
    "detection_ratio",
    "layer_normalized",
    "mean_rank_correlation",
    "rank_correlation",
    "saliency_correlation",
]

# Ranks of fewer filters take too few orders to say anything.
LEAST_FILTERS = 4

LITERAL_WARNING = (
    "the detection ratio follows the paper's equations to the letter: in front of batch "
    "normalization its saliency is mostly rounding noise, and its correlation tells narrow layers "
    "from wide ones; set `verdict.saliency` to 'map' for a ratio that compares filters"
)


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


def mean_rank_correlation(first: Tensor, second: Tensor, sizes: Sequence[int]) -> float:
    """Compute Spearman's rank correlation within each layer, averaged over the layers.

    A layer counts by its number of filters: the fewer, the more of its correlation is chance.
    Layers of fewer than four filters, and those with constant values, do not count.

    Args:
        first: One number for each filter, shape (total filters,).
        second: Same shape.
        sizes: Number of filters of each layer.

    Returns:
        From -1 to 1; NaN if a value is not finite or no layer counts.

    Example:
        >>> first = torch.tensor([1.0, 2.0, 3.0, 4.0, 80.0, 70.0, 60.0, 50.0])
        >>> second = torch.tensor([1.0, 2.0, 3.0, 4.0, 10.0, 20.0, 30.0, 40.0])
        >>> mean_rank_correlation(first, second, [4, 4])
        0.0
    """
    if not bool(first.isfinite().all() and second.isfinite().all()):
        return math.nan
    total, count = 0.0, 0
    parts = zip(first.split(list(sizes)), second.split(list(sizes)), strict=True)
    for one, other in parts:
        found = rank_correlation(one, other) if len(one) >= LEAST_FILTERS else math.nan
        if not math.isnan(found):
            total, count = total + found * len(one), count + len(one)
    return total / count if count else math.nan


def saliency_correlation(
    magnitudes: Tensor, changes: Tensor, layers: FilterLayers, form: Saliency = "map"
) -> float:
    """Compute rho, the rank correlation of magnitude and saliency (Sec. 4.3, A.3).

    For the form ``"map"`` it is :func:`mean_rank_correlation`. For ``"weight"`` it is that of all
    filters together, with both divided by their layer's norm (Eq. 12, 13). That mostly compares
    layers with each other: in a narrow layer, each filter has a larger share of the norm.

    Args:
        magnitudes: Norms of the filters, shape (total filters,).
        changes: Clean loss changes, shape (total filters,); their absolute values are taken.
        layers: The layers.
        form: The saliency, see :func:`~lightning_mnp.mnp.saliency.batch_clc`.

    Returns:
        Spearman's coefficient from -1 to 1; NaN if it is not defined.
    """
    sizes, saliency = layers.sizes, changes.abs()
    if form == "map":
        return mean_rank_correlation(magnitudes, saliency, sizes)
    return rank_correlation(layer_normalized(magnitudes, sizes), layer_normalized(saliency, sizes))


def detection_ratio(suppressed: float, original: float) -> float:
    """Compute the detection ratio (Eq. 8): rho after clean suppression over rho before.

    Args:
        suppressed: Correlation of the suppressed network.
        original: Correlation of the network as it is.

    Returns:
        The ratio; NaN if the network as it is has no correlation.

    Example:
        >>> detection_ratio(0.25, 0.5)
        0.5
    """
    return suppressed / original if original else math.nan
