"""Guards around work on a network: what is refused, and what is put back if the work fails."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

__all__ = [
    "refuse_lazy_modules",
    "refuse_quantized",
    "refuse_scripts",
    "refuse_wrappers",
    "require_module",
    "running_alone",
    "unchanged_on_error",
]

_UNWRAP = "Pass its attribute `module`"
_GATHER = "Save the full weights, and load them into a network without the wrapper"
# By name, so that no package is imported that the model does not use itself.
_WRAPPERS = {
    "DataParallel": _UNWRAP,
    "DistributedDataParallel": _UNWRAP,
    "FullyShardedDataParallel": _GATHER,
    "FSDPModule": _GATHER,
    "DeepSpeedEngine": _GATHER,
}


def require_module(model: object, loader: object = None) -> None:
    """Raise if what should be the model is something else.

    Args:
        model: What was given as the model.
        loader: What was given as the loader, in case the two were swapped.

    Raises:
        TypeError: If the model is no ``torch.nn.Module``.

    Example:
        >>> require_module("model.pt")
        Traceback (most recent call last):
        ...
        TypeError: Expected argument `model` to be a torch.nn.Module, but got the path 'model.pt'.
        Build the network and load the weights: `load_into(network, read_state_dict(path))`. For a
        file alone there is the command `lightning-mnp scan`.
    """
    if isinstance(model, nn.Module):
        return
    found, remedy = f"an object of class {type(model).__name__}", "Pass the network."
    if isinstance(loader, nn.Module):
        remedy = "The model comes first and the loader second: swap them."
    elif isinstance(model, (str, os.PathLike)):
        found = f"the path {os.fspath(model)!r}"
        remedy = (
            "Build the network and load the weights: `load_into(network, read_state_dict(path))`. "
            "For a file alone there is the command `lightning-mnp scan`."
        )
    elif isinstance(model, Mapping):
        found = f"a state dict, or another dict, of {len(model)} entries"
        remedy = "Build the network and load the weights: `load_into(network, state_dict)`."
    raise TypeError(f"Expected argument `model` to be a torch.nn.Module, but got {found}. {remedy}")


def refuse_quantized(model: nn.Module) -> None:
    """Raise if layers of a model hold quantized weights, which cannot be trained or masked.

    Args:
        model: The model.

    Raises:
        ValueError: If a layer of it is one of PyTorch's quantized ones.

    Example:
        >>> refuse_quantized(nn.Sequential(nn.Linear(2, 3)))
    """
    for name, module in model.named_modules():
        if ".quantized" in type(module).__module__ and type(module).__module__[:6] == "torch.":
            raise ValueError(
                f"Expected the model to have weights as floating-point numbers, but {name!r} in it "
                f"is quantized ({type(module).__name__}). Pass the network from before its "
                "quantization."
            )


def refuse_wrappers(model: nn.Module) -> None:
    """Raise if a model is spread over devices or processes by a wrapper.

    Args:
        model: The model.

    Raises:
        ValueError: If it is one of PyTorch's or DeepSpeed's parallel wrappers, or holds one.

    Example:
        >>> refuse_wrappers(nn.DataParallel(nn.Linear(1, 1)))
        Traceback (most recent call last):
        ...
        ValueError: Expected the model not to be spread over devices or processes, but it is a
        DataParallel. Pass its attribute `module`.
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
    """Raise if a part of a model is TorchScript, whose layers cannot be masked.

    Args:
        model: The model.

    Raises:
        ValueError: If it is a scripted or traced module, or holds one.

    Example:
        >>> refuse_scripts(nn.Sequential(nn.ReLU()))
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            found = f"{name!r} in it is" if name else "it is"
            raise ValueError(
                f"Expected the model to be made of Python modules, but {found} TorchScript. Pass "
                "the network that it was made from."
            )


def refuse_lazy_modules(network: nn.Module) -> None:
    """Raise if a layer has no weights yet, because it has not seen data.

    Args:
        network: The network.

    Raises:
        ValueError: If a module of it is lazy and not initialized.

    Example:
        >>> refuse_lazy_modules(nn.Sequential(nn.Linear(2, 3)))
    """
    for name, module in network.named_modules():
        if isinstance(module, LazyModuleMixin):
            raise ValueError(
                f"Expected every layer of the network to have its weights, but {name!r} is a lazy "
                "module that has not seen data. Run one batch through the network first."
            )


@contextmanager
def running_alone(network: nn.Module) -> Iterator[None]:
    """Run a network without compiled code and without other processes, until the context ends.

    Code that ``torch.compile`` has made expects the network's own weights, but here the network
    runs with others: its Python code is run instead. ``SyncBatchNorm`` waits for all processes,
    but some of them may not run the network: it normalizes by the batch of this process.

    Args:
        network: The network; nothing else of it changes.

    Example:
        >>> network = nn.SyncBatchNorm(2)
        >>> with running_alone(network):
        ...     maps = network(torch.rand(4, 2))
        >>> "forward" in vars(network)
        False
    """
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # otherwise nothing has been compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in network.modules():
            if isinstance(module, nn.SyncBatchNorm) and "forward" not in vars(module):
                stack.callback(vars(module).pop, "forward", None)
                vars(module)["forward"] = partial(_normalize_alone, module)
        yield


def _normalize_alone(module: nn.SyncBatchNorm, maps: Any) -> Any:
    return nn.modules.batchnorm._BatchNorm.forward(module, maps)


# What is swapped or added while the network runs.
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
    """Restore a network's weights, hooks and modes if the context ends with an exception.

    Other contexts swap weights, attach hooks and switch modes, and undo it at their end. An
    interrupt (Ctrl-C) can hit them while they do so, and leave the work half done. This context
    remembers which objects were in place before. It copies no tensor, and does nothing if there is
    no exception.

    Args:
        network: The network. Values written into its tensors are not restored.

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
