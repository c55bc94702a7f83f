"""A network that is what it was after work on it was interrupted, wherever that happened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["unchanged_on_error"]

# What is swapped, added or switched for the length of a run of the network.
_DICTS = (
    "_parameters",
    "_buffers",
    "_modules",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


@contextmanager
def unchanged_on_error(network: nn.Module) -> Iterator[None]:
    """Put a network back together where an exception leaves the context.

    Weights are swapped, hooks attached and modes switched by contexts that undo it. An interrupt
    (Ctrl-C) can hit those contexts themselves, half done. This one remembers which objects were
    in place before. It costs no copy of a tensor, and does nothing where all goes well.

    Args:
        network: The network; values of its tensors are not looked after.

    Example:
        >>> network = nn.Sequential(nn.Linear(1, 1))
        >>> try:
        ...     with unchanged_on_error(network):
        ...         network.eval()[0].weight = nn.Parameter(network[0].weight * 2)
        ...         raise KeyboardInterrupt
        ... except KeyboardInterrupt:
        ...     network.training
        True
    """
    before = [
        (module, module.training, {name: dict(vars(module)[name]) for name in _DICTS})
        for module in network.modules()
    ]
    required = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    try:
        yield
    except BaseException:
        for module, training, contents in before:
            module.training = training
            for name, content in contents.items():
                vars(module)[name].clear()
                vars(module)[name].update(content)
        for parameter, flag in required:
            parameter.requires_grad_(flag)
        raise
