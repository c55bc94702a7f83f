"""Constants added to the logits: which ones fit clean images best, and where to add them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from lightning_mnp.surgery.forward import Forward, call_on_copies, evaluating

__all__ = ["LogitShift", "best_shift", "find_logit_bias", "repair_shift"]

_MOST_STEPS = 50
# Weight of the squared constants, in nats, divided by the number of images. It keeps the constants
# small for classes that have only a few images.
_REPAIR_COST = 10.0


def best_shift(logits: Tensor, labels: Tensor, free: Tensor, cost: float) -> Tensor:
    """Find the constants that minimize the loss of clean images when they are added to the logits.

    They minimize the mean cross-entropy plus ``cost`` times the sum of their squares.

    Args:
        logits: Logits of clean images, shape (N, K).
        labels: Their classes, shape (N,).
        free: Which classes get a constant, boolean, shape (K,).
        cost: Factor of the sum of the squares, above 0.

    Returns:
        Shape (K,), in double precision on the CPU; 0 for the classes that are not free.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [2.0, 1.5], [2.0, 1.5]])
        >>> shift = best_shift(logits, torch.tensor([0, 1, 1]), torch.tensor([False, True]), 0.01)
        >>> bool(shift[1] > 0), float(shift[0])
        (True, 0.0)
    """
    logits, labels = logits.detach().cpu().double(), labels.cpu()
    taking = free.cpu().to(logits)
    values = torch.zeros_like(taking).requires_grad_()
    optimizer = torch.optim.LBFGS([values], max_iter=_MOST_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        shift = values * taking
        total = F.cross_entropy(logits + shift, labels) + cost * shift.square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)
    return values.detach() * taking


@dataclass(frozen=True)
class LogitShift:
    """A change of the bias that is added to the logits.

    Attributes:
        name: Dotted name of the bias in the network.
        values: What is added to it, shape (K,).

    Example:
        >>> LogitShift("fc.bias", torch.tensor([0.0, 0.5])).name
        'fc.bias'
    """

    name: str
    values: Tensor


def repair_shift(logits: Tensor, labels: Tensor, target: int | None) -> Tensor:
    """Find the constants that repair the logits of a pruned network.

    The filters of a backdoor also raise and lower logits of clean images. Without these filters
    some classes are predicted too often and others too rarely; a constant for each class makes up
    for most of that. The target class gets no constant, so that its logit on triggered images does
    not rise. A class without images gets none either, because nothing is known about it.

    Args:
        logits: Logits of clean images by the pruned network, shape (N, K).
        labels: Their classes, shape (N,).
        target: The class that keeps its logit, or None.

    Returns:
        Shape (K,), 0 for the classes without a constant. The others minimize the mean
        cross-entropy plus 10 / N times the sum of their squares.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [2.0, 1.5], [2.0, 1.5]])
        >>> repair_shift(logits, torch.tensor([0, 1, 1]), target=0)[1] > 0
        tensor(True)
    """
    free = torch.bincount(labels.cpu(), minlength=logits.shape[1]) > 0
    if target is not None:
        free[target] = False
    return best_shift(logits, labels, free, _REPAIR_COST / len(labels)).float()


@torch.no_grad()
def find_logit_bias(network: nn.Module, images: Tensor, forward: Forward) -> str | None:
    """Find the bias of a network that is added to its logits.

    Each bias that could be it is changed in turn, and the network is run: the logits have to
    change by the same amount.

    Args:
        network: The network, which does not change.
        images: A few images on its device, shape (N, C, ...).
        forward: A function (network, images) that calls it.

    Returns:
        The dotted name of the bias; None if no bias shifts the logits and nothing else.

    Example:
        >>> from lightning_mnp.surgery.forward import call_network
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> find_logit_bias(network, torch.rand(2, 1, 2, 2), call_network)
        '1.bias'
    """
    weights = {name: parameter.detach() for name, parameter in network.named_parameters()}
    with evaluating(network), torch.random.fork_rng(devices=[]):
        logits = call_on_copies(network, images, forward, weights)
        shift = torch.linspace(0.5, 1.5, logits.shape[1]).to(logits)
        close = max(1e-3, 4 * torch.finfo(logits.dtype).eps)
        modules = list(network.named_modules())
        for prefix, layer in reversed(modules):  # the classifier head comes last
            name = f"{prefix}.bias" if prefix else "bias"
            if not isinstance(layer, nn.Linear) or is_parametrized(layer) or name not in weights:
                continue
            if layer.out_features != logits.shape[1]:
                continue
            changed = {**weights, name: weights[name] + shift.to(weights[name])}
            found = call_on_copies(network, images, forward, changed)
            if torch.allclose(found, logits + shift, rtol=close, atol=close):
                return name
    return None
