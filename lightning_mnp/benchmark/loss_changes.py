"""CLC and BLC of every filter, as in the paper's Figure 1."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from lightning_mnp.mnp.saliency import exact_clc, filter_magnitudes
from lightning_mnp.surgery.forward import Forward, call_network
from lightning_mnp.surgery.layers import Site, find_filter_layers
from lightning_mnp.surgery.masked_network import MaskedNetwork

__all__ = ["FilterKind", "LossChanges", "loss_changes"]

FilterKind = Literal["backdoor", "clean", "hybrid", "redundant"]


@dataclass(frozen=True)
class LossChanges:
    """What the removal of each filter costs, for clean and for triggered images.

    Attributes:
        names: Pairs (layer name, filter index), in the order of the network's modules.
        clc: Clean loss change of each filter in nats (Eq. 2), shape (filters,), float64.
        blc: Backdoor loss change of each filter in nats (Eq. 3), shape (filters,), float64.
        magnitude: The l2 norm of each filter's weights, shape (filters,), float32.
    """

    names: list[tuple[str, int]]
    clc: Tensor
    blc: Tensor
    magnitude: Tensor

    def kinds(self, tau: float = 0.0, eps: float = 0.0) -> list[FilterKind]:
        """Return what each filter is for, in the words of Sec. 3.3.

        A backdoor filter has a BLC above ``tau``, a clean filter a CLC above ``eps``, a hybrid
        filter both and a redundant filter neither. The paper names two thresholds and does not
        say which is which.

        Args:
            tau: Threshold of BLC, at least 0.
            eps: Threshold of CLC, at least 0.

        Raises:
            ValueError: If a threshold is below 0.

        Example:
            >>> import torch
            >>> changes = LossChanges([("conv", 0)], torch.ones(1), torch.zeros(1), torch.ones(1))
            >>> changes.kinds()
            ['clean']
        """
        for name, value in (("tau", tau), ("eps", eps)):
            if not value >= 0:
                raise ValueError(f"Expected argument `{name}` to be at least 0, but got {value}.")
        kinds: dict[tuple[bool, bool], FilterKind] = {
            (True, True): "hybrid",
            (True, False): "backdoor",
            (False, True): "clean",
            (False, False): "redundant",
        }
        pairs = zip((self.blc > tau).tolist(), (self.clc > eps).tolist(), strict=True)
        return [kinds[pair] for pair in pairs]

    def layers(self) -> list[str]:
        """Return the names of the layers, in the order of the network's modules."""
        return list(dict.fromkeys(layer for layer, _ in self.names))


def loss_changes(
    network: nn.Module,
    clean: Iterable[Sequence[Any]],
    triggered: Iterable[Sequence[Any]],
    *,
    forward: Forward = call_network,
    site: Site = "filter",
    include: Sequence[str] = ("*",),
    progress: Callable[[int, int], None] | None = None,
) -> LossChanges:
    """Measure the loss changes of every filter's removal, one filter at a time (Eq. 2 and 3).

    This is for the study of a known attack: a defender has no triggered images. It takes a pass
    over both kinds of images for every filter.

    Args:
        network: The network, in evaluation mode or not; it stays as it is.
        clean: Batches that begin with images and their labels.
        triggered: Batches that begin with triggered images and the attacker's labels.
        forward: A function (network, images) that calls the network.
        site: ``"filter"`` sets a filter's weights to zero, as the paper writes it; ``"norm"``
            removes its output map behind the normalization layer, as this package prunes.
        include: Name patterns of the convolutions to take.
        progress: Called after every filter with the number done and the number of all; a filter
            counts twice, once for each kind of images.

    Returns:
        The changes.

    Raises:
        ValueError: If there are no images, or no such layers.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Flatten(), nn.Linear(3, 2))
        >>> images, labels = torch.rand(8, 1, 2, 2), torch.arange(8) % 2
        >>> changes = loss_changes(network, [(images, labels)], [(images, 0 * labels)])
        >>> changes.names
        [('0', 0), ('0', 1), ('0', 2)]
    """
    parameter = next(network.parameters(), None)
    device = None if parameter is None else parameter.device
    sets = [
        [(batch[0].to(device), batch[1].to(device)) for batch in batches]
        for batches in (clean, triggered)
    ]
    for name, batches in zip(("clean", "triggered"), sets, strict=True):
        if not batches:
            raise ValueError(
                f"Expected argument `{name}` to hold at least one batch, but it is empty."
            )
    layers = find_filter_layers(
        network, sets[0][0][0][:2], forward=forward, site=site, include=include
    )
    masked = MaskedNetwork(network, layers, forward, "running")
    told = progress or (lambda done, total: None)
    clc = exact_clc(masked, sets[0], lambda done, total: told(done, 2 * total))
    blc = exact_clc(masked, sets[1], lambda done, total: told(total + done, 2 * total))
    names = [(layer.name, index) for layer in layers for index in range(layer.filters)]
    magnitude = filter_magnitudes(masked, masked.weights()).cpu()
    return LossChanges(names, clc, blc, magnitude)
