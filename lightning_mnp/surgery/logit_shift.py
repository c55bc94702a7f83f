"""Constants on the logits: the ones that fit clean images best."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from lightning_mnp.surgery.forward import Forward, call_apart, evaluating

__all__ = ["LogitShift", "best_shift", "find_logit_bias", "fit_shift"]

_MOST_STEPS = 50


def best_shift(logits: Tensor, labels: Tensor, free: Tensor, cost: float) -> Tensor:
    """Find the constants that, added to the logits, leave the least clean loss.

    Args:
        logits: Of clean images, shape (N, K).
        labels: Their classes, shape (N,).
        free: Which classes get one, boolean, shape (K,).
        cost: What the sum of the squares counts against the mean cross-entropy, above 0.

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


# What a squared shift costs in nats, for one image: as much as if a few images of each class
# were known to need none. Keeps classes apart that the images cannot tell.
_COST = 10.0


@dataclass(frozen=True)
class LogitShift:
    """A change of the bias in front of the logits.

    Attributes:
        name: Dotted name of the bias in the network.
        values: What is added to it, shape (K,).
    """

    name: str
    values: Tensor


def fit_shift(logits: Tensor, labels: Tensor, target: int | None) -> Tensor:
    """Find what to add to the logits of all classes but one, for the least clean loss.

    Filters of a backdoor also speak for or against classes on clean images. Without them some
    classes are predicted too often, others too seldom; a constant for each class mends most of
    that. The target class gets none, so that its logit on triggered images does not rise; nor
    does a class without an image, of which nothing is known.

    Args:
        logits: Of clean images, shape (N, K).
        labels: Their classes, shape (N,).
        target: The class that keeps its logit, if there is one.

    Returns:
        Shape (K,), 0 for these classes: the least mean cross-entropy plus 10 / N times the sum of
        the squares.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [2.0, 1.5], [2.0, 1.5]])
        >>> fit_shift(logits, torch.tensor([0, 1, 1]), target=0)[1] > 0
        tensor(True)
    """
    free = torch.bincount(labels.cpu(), minlength=logits.shape[1]) > 0
    if target is not None:
        free[target] = False
    return best_shift(logits, labels, free, _COST / len(labels)).float()


@torch.no_grad()
def find_logit_bias(network: nn.Module, images: Tensor, forward: Forward) -> str | None:
    """Find the bias that is added to the logits, by trying.

    Args:
        network: The network, which stays as it is.
        images: A few images on its device, shape (N, C, ...).
        forward: How the network is called.

    Returns:
        The bias's dotted name; None where there is none that shifts the logits and nothing else.

    Example:
        >>> from lightning_mnp.surgery.forward import call_network
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> find_logit_bias(network, torch.rand(2, 1, 2, 2), call_network)
        '1.bias'
    """
    weights = {name: parameter.detach() for name, parameter in network.named_parameters()}
    with evaluating(network), torch.random.fork_rng(devices=[]):
        logits = call_apart(network, images, forward, weights)
        shift = torch.linspace(0.5, 1.5, logits.shape[1]).to(logits)
        close = max(1e-3, 4 * torch.finfo(logits.dtype).eps)
        modules = list(network.named_modules())
        for prefix, layer in reversed(modules):  # heads come last
            name = f"{prefix}.bias" if prefix else "bias"
            if not isinstance(layer, nn.Linear) or is_parametrized(layer) or name not in weights:
                continue
            if layer.out_features != logits.shape[1]:
                continue
            changed = {**weights, name: weights[name] + shift.to(weights[name])}
            found = call_apart(network, images, forward, changed)
            if torch.allclose(found, logits + shift, rtol=close, atol=close):
                return name
    return None
