"""A network on its own: run as it is written, and not together with other processes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

__all__ = ["refuse_scripts", "refuse_wrappers", "running_alone", "unchanged_on_error"]

# By name, so that nothing is imported which the model does not use.
_WRAPPERS = {
    "DataParallel": "Give its `module`",
    "DistributedDataParallel": "Give its `module`",
    "FullyShardedDataParallel": "Save the full weights, and load them into a network of one piece",
    "FSDPModule": "Save the full weights, and load them into a network of one piece",
    "DeepSpeedEngine": "Save the full weights, and load them into a network of one piece",
}


def refuse_wrappers(model: nn.Module) -> None:
    """Raise where a model spreads its work over devices or processes.

    Raises:
        ValueError: If it is, or has in it, one of PyTorch's or DeepSpeed's parallel wrappers.

    Example:
        >>> refuse_wrappers(nn.DataParallel(nn.Linear(1, 1)))
        Traceback (most recent call last):
        ...
        ValueError: Expected the model not to be spread over devices or processes, but it is a
        DataParallel. Give its `module`.
    """
    for name, module in model.named_modules():
        for cls in type(module).__mro__:
            if cls.__name__ in _WRAPPERS and cls.__module__.split(".")[0] in ("torch", "deepspeed"):
                found = f"{name!r} in it is" if name else "it is"
                raise ValueError(
                    f"Expected the model not to be spread over devices or processes, but {found} "
                    f"a {cls.__name__}. {_WRAPPERS[cls.__name__]}."
                )


def refuse_scripts(model: nn.Module) -> None:
    """Raise where a part of a model is TorchScript, whose layers cannot be masked.

    Raises:
        ValueError: If it is, or has in it, a scripted or traced module.

    Example:
        >>> refuse_scripts(nn.Sequential(nn.ReLU()))
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            found = f"{name!r} in it is" if name else "it is"
            raise ValueError(
                f"Expected the model to be made of Python modules, but {found} TorchScript. Give "
                "the network that it was made from."
            )


@contextmanager
def running_alone(network: nn.Module) -> Iterator[None]:
    """Run what was compiled as it is written, and normalize by this process's own batches.

    Code that ``torch.compile`` has made expects the network's own weights; here it runs with
    others. And ``SyncBatchNorm`` waits for all processes, of which some may not take part.

    Args:
        network: The network; it is not changed in any other way.

    Example:
        >>> network = nn.SyncBatchNorm(2)
        >>> with running_alone(network):
        ...     maps = network(torch.rand(4, 2))
        >>> "forward" in vars(network)
        False
    """
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing has been compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in network.modules():
            if isinstance(module, nn.SyncBatchNorm) and "forward" not in vars(module):
                stack.callback(vars(module).pop, "forward", None)
                vars(module)["forward"] = partial(_normalize_alone, module)
        yield


def _normalize_alone(module: nn.SyncBatchNorm, maps: Any) -> Any:
    return nn.modules.batchnorm._BatchNorm.forward(module, maps)


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
