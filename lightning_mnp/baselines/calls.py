"""In which order a network calls its layers."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack

from lightning_mnp.baselines.workbench import Workbench
from lightning_mnp.surgery.forward import probe_network

__all__ = ["calls_of"]


def calls_of(bench: Workbench, names: Iterable[str]) -> list[str]:
    """Run the copy on a workbench once, and record the calls of some layers.

    Args:
        bench: The workbench, whose copy does not change.
        names: Dotted names of the layers.

    Returns:
        The names in the order of the calls. A layer that is called twice comes twice, one that is
        never called does not come.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> bench = Workbench(network, [(torch.rand(8, 1, 2, 2), torch.arange(8) % 2)])
        >>> calls_of(bench, ["2", "0"])
        ['0', '2']
    """
    called: list[str] = []
    with ExitStack() as stack:
        for name in names:
            module = bench.copy.get_submodule(name)
            hook = module.register_forward_pre_hook(lambda _, args, n=name: called.append(n))
            stack.callback(hook.remove)
        probe_network(bench.copy, bench.sample, bench.call)
    return called
