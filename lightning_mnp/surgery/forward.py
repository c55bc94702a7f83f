"""Calling a network: find the logits in its output, and leave the network unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = [
    "Forward",
    "NoLogitsError",
    "call_network",
    "call_on_copies",
    "evaluating",
    "find_logits",
    "holding_statistics",
    "probe_network",
]

Forward = Callable[[nn.Module, Tensor], Any]


class NoLogitsError(TypeError):
    """No logits can be found in what a network returned."""


def call_network(network: nn.Module, images: Tensor) -> Tensor:
    """Run a network and find the logits in what it returns.

    Args:
        network: Any classifier that takes the images as its only argument.
        images: Shape (N, C, ...).

    Returns:
        Logits, shape (N, K): the output itself, the first of a tuple, or the entry or attribute
        ``logits`` (or ``out``) of a dict or an object.

    Raises:
        NoLogitsError: If no logits are found in the output.

    Example:
        >>> call_network(nn.Linear(2, 3), torch.zeros(5, 2)).shape
        torch.Size([5, 3])
    """
    return find_logits(network(images))


def find_logits(output: Any) -> Tensor:
    """Find the logits in what a network returned.

    Args:
        output: A tensor, a tuple or list that starts with one, or a dict or an object with an
            entry or attribute ``logits`` (of a dict also ``out``).

    Returns:
        Logits, shape (N, K).

    Raises:
        NoLogitsError: If there are none, or they have another number of dimensions.

    Example:
        >>> find_logits({"loss": torch.zeros(1), "logits": torch.zeros(5, 3)}).shape
        torch.Size([5, 3])
    """
    found = output
    if isinstance(found, dict):
        found = next((found[key] for key in ("logits", "out") if key in found), None)
    elif not isinstance(found, Tensor) and hasattr(found, "logits"):
        found = found.logits
    elif isinstance(found, (tuple, list)) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        keys = f" with the keys {sorted(map(str, output))}" if isinstance(output, dict) else ""
        raise NoLogitsError(
            "Expected the network to return logits (a tensor, a tuple that starts with one, or "
            f"something with `logits`), but got {type(output).__name__}{keys}. Pass as "
            "argument `forward` a function that calls the network and returns its logits."
        )
    if found.ndim != 2:
        raise NoLogitsError(
            f"Expected the network's logits to have the shape (N, classes), but got "
            f"{tuple(found.shape)}. Pass as argument `forward` a function that calls the network "
            "and returns its logits."
        )
    logits: Tensor = found
    return logits


@contextmanager
def evaluating(network: nn.Module, training: tuple[type[nn.Module], ...] = ()) -> Iterator[None]:
    """Put a network into evaluation mode until the context ends.

    Args:
        network: The network; afterwards each of its modules is back in the mode it had before.
        training: Classes of modules that are put into training mode instead.

    Example:
        >>> network = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
        >>> with evaluating(network, (nn.BatchNorm1d,)):
        ...     [module.training for module in network.modules()]
        [False, True, False]
        >>> network.training
        True
    """
    modes = [(module, module.training) for module in network.modules()]
    try:
        for module, _ in modes:
            module.training = isinstance(module, training)
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def holding_statistics(network: nn.Module) -> Iterator[None]:
    """Let batch normalization in evaluation mode store the statistics of each batch and use them.

    So a network whose stored statistics belong to other weights runs as it would with its own: the
    outputs are those of training mode, but no gradient flows through mean and variance.

    Args:
        network: The network, run on copies of its buffers: those that are stored are replaced.

    Example:
        >>> network, images = nn.BatchNorm1d(2), torch.rand(9, 2)
        >>> trained = network(images)
        >>> with evaluating(network), holding_statistics(network):
        ...     torch.testing.assert_close(call_on_copies(network, images), trained)
    """

    def hold(module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        maps, *_ = [*args, *named.values()]
        dims = [0, *range(2, maps.ndim)]
        stored: Any = module.running_mean
        module.running_mean = maps.detach().mean(dims).to(stored)
        module.running_var = maps.detach().var(dims, correction=0).to(stored)

    norms = [m for m in network.modules() if isinstance(m, _BatchNorm)]
    handles = [
        m.register_forward_pre_hook(hold, with_kwargs=True)
        for m in norms
        if m.running_mean is not None  # or those of the batch are used anyway
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Caller(nn.Module):
    """Calls a network by a `forward` function, as a module that `functional_call` can run."""

    def __init__(self, network: nn.Module, call: Forward) -> None:
        super().__init__()
        self.network = network
        self.call = call

    def forward(self, images: Tensor) -> Any:
        return self.call(self.network, images)


def call_on_copies(
    network: nn.Module,
    images: Tensor,
    forward: Forward = call_network,
    weights: dict[str, Tensor] | None = None,
) -> Tensor:
    """Run a network on copies of its buffers and of the images, so that its own do not change.

    Args:
        network: The network.
        images: Shape (N, C, ...).
        forward: A function (network, images) that calls it.
        weights: Parameters to run with, by name; its own if None.

    Returns:
        Logits, shape (N, K).

    Raises:
        NoLogitsError: If no logits are found in the output.

    Example:
        >>> network = nn.BatchNorm1d(2).train()
        >>> _ = call_on_copies(network, torch.rand(3, 2))
        >>> int(network.num_batches_tracked)
        0
    """
    caller = _Caller(network, forward)
    state = {name: buffer.clone() for name, buffer in caller.named_buffers()}
    state.update({f"network.{name}": weight for name, weight in (weights or {}).items()})
    # A copy of the images, too: some networks normalize them in place.
    return find_logits(functional_call(caller, state, (images.clone(),)))


def probe_network(network: nn.Module, images: Tensor, forward: Forward = call_network) -> Tensor:
    """Run a network once in evaluation mode and change nothing.

    Parameters, buffers, modes, the images and the random state stay as they are, even if the call
    fails.

    Args:
        network: The network.
        images: Shape (N, C, ...), on the network's device.
        forward: A function (network, images) that calls it.

    Returns:
        Logits without gradients, shape (N, K).

    Raises:
        NoLogitsError: If no logits are found in the output.

    Example:
        >>> probe_network(nn.Linear(2, 3), torch.zeros(5, 2)).requires_grad
        False
    """
    devices = [images.device] if images.device.type == "cuda" else []
    with evaluating(network), torch.no_grad(), torch.random.fork_rng(devices):
        return call_on_copies(network, images, forward)
