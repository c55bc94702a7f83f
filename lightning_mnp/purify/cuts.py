"""Cuts: kernels of the backdoor become zero.

Soft masks leave a backdoor weak, but in place, and training on brings it back. What is zero has to
be learned anew. Cuts cost more clean accuracy than pruning may; tuning wins it back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lightning_mnp.purify.allowance import most_harmless

__all__ = ["CutConstants", "choose_cuts"]


@dataclass(frozen=True)
class CutConstants:
    """Which kernels are cut, and how many.

    Attributes:
        below: Kernels with a lower soft mask may be cut.
        harm: Harm that cuts may do beside that of pruning, before weights are tuned, in units of
            what pruning may.
        far: Mean margin of the class that a patch pushes to after soft masks, in logits, up to
            which the patch stands in badly for the trigger. Tuning against it then does little, and
            cuts have to do more.
        far_below: The same as `below` in that case.
        far_harm: The same as `harm` in that case.
    """

    below: float = 0.8
    harm: int = 13
    far: float = -1.0
    far_below: float = 0.85
    far_harm: int = 20


def choose_cuts(
    masks: Tensor, harm: Callable[[Tensor], float], below: float, most: float
) -> Tensor:
    """Choose the kernels to cut: the lowest ones, as many as harm allows.

    Args:
        masks: Soft masks, shape (total kernels,).
        harm: The harm of cutting the kernels at some positions; NaN is too much.
        below: Only kernels with a lower mask are cut.
        most: The most harm allowed.

    Returns:
        Their positions, lowest first.

    Example:
        >>> import torch
        >>> masks = torch.tensor([0.5, 1.0, 0.2, 0.7])
        >>> choose_cuts(masks, lambda positions: float(len(positions)), below=0.8, most=2.0)
        tensor([2, 0])
    """
    low = (masks < below).nonzero().flatten()
    low = low[masks[low].argsort(stable=True)]
    return low[: most_harmless(lambda count: harm(low[:count]), len(low), most)]
