"""The network inside a model: which submodule classifies, and what is checked before any work."""

from __future__ import annotations

import copy
import hashlib
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from lightning_mnp.checkpoints.state_dict import all_tensors
from lightning_mnp.surgery.forward import (
    Forward,
    NoLogitsError,
    call_network,
    call_on_copies,
    evaluating,
    probe_network,
)
from lightning_mnp.surgery.guards import refuse_lazy_modules

__all__ = ["check_copy", "check_network", "copy_network", "network_forward", "weights_digest"]


def copy_network(network: nn.Module) -> nn.Module:
    """Copy a network, even if its modules keep results of earlier computations.

    PyTorch refuses to copy a tensor with a computation graph, such as a loss that a module keeps in
    an attribute. Such tensors are copied without their graph.

    Args:
        network: The network.

    Returns:
        The copy.

    Example:
        >>> network = nn.Linear(2, 1)
        >>> network.losses = [network(torch.zeros(1, 2)).sum()]
        >>> copy_network(network).losses[0].grad_fn is None
        True
    """
    kept = all_tensors([vars(module) for module in network.modules()])
    memo: dict[int, Any] = {
        id(tensor): tensor.detach().clone() for tensor in kept if tensor.grad_fn is not None
    }
    return copy.deepcopy(network, memo)


def check_copy(model: nn.Module) -> None:
    """Check that a model can be copied, before work whose result goes into a copy.

    Args:
        model: The model.

    Raises:
        ValueError: If it holds something that cannot be copied, such as an open file, or a
            ``forward`` whose copy would still use the weights of the original.

    Example:
        >>> check_copy(nn.Linear(2, 1))
    """
    for name, module in model.named_modules():
        own = vars(module).get("forward")  # a method would be copied with its module
        if isinstance(own, FunctionType) and type(module).__name__ != "OptimizedModule":
            found = f"{name!r}" if name else f"the {type(module).__name__}"
            raise ValueError(
                f"Expected a `forward` that a copy of the model can run, but that of {found} was "
                "replaced by a function, which would still use the weights of the original. "
                "Define it in the class, pass it as the argument `forward`, or compile the network "
                "within a LightningModule and not the module itself."
            )
    try:
        copy_network(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # anything that a model's attributes may raise
        raise ValueError(
            "Expected a model that can be copied, because filters are pruned in a copy, but "
            f"copying failed: {_first_line(error)}. Pass the network within it, or remove the "
            "attribute (open files, locks and generators cannot be copied)."
        ) from error


def weights_digest(model: nn.Module) -> str:
    """Compute a SHA-256 of all parameters and buffers, to recognize the same weights again.

    Args:
        model: The model, on any device.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> weights_digest(nn.Linear(1, 1)) == weights_digest(nn.Linear(1, 1))
        False
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, Tensor):
            continue  # an extra state may be any object
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def network_forward(
    model: nn.Module, network: str | None = None, forward: Forward | None = None
) -> Forward:
    """Return a function that runs the network inside a model on images.

    Args:
        model: The model, such as a user's LightningModule.
        network: Dotted name of the submodule that classifies. If None, it is the model itself if
            the model has a ``forward``, otherwise its only submodule with parameters.
        forward: A function (network, images) that calls the network; if None, the images are its
            only argument.

    Returns:
        A function (model, images).

    Raises:
        ValueError: If the submodule does not exist, or no name is passed and there are several.

    Example:
        >>> model = nn.ModuleDict({"net": nn.Flatten()})
        >>> network_forward(model, "net")(model, torch.zeros(2, 3, 4)).shape
        torch.Size([2, 12])
    """
    call = forward or _default_call
    path = _find_path(model) if network is None else network
    names = dict(model.named_modules(remove_duplicate=False))
    if path not in names:
        children = ", ".join(repr(name) for name, _ in model.named_children())
        raise ValueError(
            f"Expected argument `network` to name a submodule of {type(model).__name__}, but got "
            f"{path!r}. Its submodules are {children or 'none'}."
        )
    return lambda module, images: call(module.get_submodule(path), images)


def _default_call(network: nn.Module, images: Tensor) -> Tensor:
    return call_network(network, images)


def _find_path(model: nn.Module) -> str:
    """Return the name of the submodule that classifies, "" for the model itself."""
    owner = next(cls for cls in type(model).__mro__ if "forward" in vars(cls))
    package = owner.__module__.split(".")[0]
    # The base classes of PyTorch and Lightning have a forward that only raises.
    lightning = owner.__name__ == "LightningModule" and "lightning" in package
    own = owner is not nn.Module and not lightning
    # Under DDP, Lightning leaves the class's method on the object.
    replaced = getattr(vars(model).get("forward"), "__func__", None) is not vars(owner)["forward"]
    if own or ("forward" in vars(model) and replaced):
        return ""
    candidates = [
        name for name, child in model.named_children() if next(child.parameters(), None) is not None
    ]
    if len(candidates) == 1:
        return candidates[0]
    raise ValueError(
        f"Expected {type(model).__name__} to have a `forward` or exactly one submodule with "
        f"parameters, but it has {candidates or 'none'}. Name one with the argument `network`."
    )


def check_network(model: nn.Module, images: Tensor, labels: Tensor, forward: Forward) -> int:
    """Check that a model fits a defense set, before any work.

    Args:
        model: The model.
        images: A few images on the model's device, shape (N, C, ...).
        labels: All labels of the defense set, shape (M,).
        forward: A function (model, images) that calls it.

    Returns:
        The model's number of classes.

    Raises:
        ValueError: If the model has no parameters, its weights or logits are not finite, it returns
            probabilities, there are no gradients, or the images or labels do not fit it.
        NoLogitsError: If its output holds no logits; this error is a TypeError.

    Example:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> check_network(network, torch.rand(2, 1, 2, 2), torch.tensor([0, 2]), call_network)
        3
    """
    if next(model.parameters(), None) is None:
        raise ValueError(
            f"Expected the model to have parameters, but {type(model).__name__} has none."
        )
    refuse_lazy_modules(model)
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"Expected the model's weights to be finite, but {name!r} holds NaN or infinity. "
                "Training may have diverged, or the file is damaged."
            )
    try:
        logits = probe_network(model, images, forward)
    except NoLogitsError:
        raise
    except (RuntimeError, IndexError, TypeError, ValueError, AssertionError) as error:
        raise ValueError(
            f"Expected the model to take images of shape {tuple(images.shape[1:])} and "
            f"{images.dtype}, as the defense set has them, but it failed: {_first_line(error)}. "
            f"{_converted(model, images)}"
            "Transform the images as in training, or pass as argument `forward` a function that "
            "calls the model."
        ) from error
    classes = logits.shape[1]
    if len(logits) != len(images):
        raise ValueError(
            f"Expected one row of logits for each of {len(images)} images, but got {len(logits)}."
        )
    if classes < 2:
        raise ValueError(f"Expected the model to have at least two classes, but got {classes}.")
    if int(labels.max()) >= classes:
        raise ValueError(
            f"Expected the defense set's labels to be below {classes}, the model's number of "
            f"classes, but got {int(labels.max())}."
        )
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(
            "Expected the model's outputs on the defense set to be finite, but some are NaN or "
            "infinity. Its normalization statistics may be damaged."
        )
    sums = logits.float().sum(1)
    if bool((logits >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-2):
        raise ValueError(
            "Expected the model to return logits, but its outputs look like probabilities: none is "
            "below 0, and each row sums to 1. Searches fail on these. Name the part before the "
            "softmax with the argument `network`, or return their logarithm by `forward`."
        )
    _check_gradients(model, images, forward)
    return classes


def _check_gradients(model: nn.Module, images: Tensor, forward: Forward) -> None:
    """Check that gradients lead from the logits to the images, without another forward pass."""
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "Expected to be called outside of torch.inference_mode(), which allows no gradients. "
            "Lightning's Trainer tests and validates in it, unless `inference_mode` is False."
        )
    devices = [images.device] if images.device.type == "cuda" else []
    rerun: list[str] = []
    with evaluating(model), torch.enable_grad(), torch.random.fork_rng(devices):
        sample = images.detach().clone().requires_grad_()
        logits = call_on_copies(model, sample, forward)
        if not logits.requires_grad:
            raise ValueError(
                "Expected gradients to lead from the model's outputs to its images, but there are "
                "none: it may run under torch.no_grad(), or be quantized. Name the network within "
                "with the argument `network`, or pass as `forward` a function that calls it."
            )
        hook = register_module_forward_pre_hook(
            lambda module, _: rerun.append(type(module).__name__)
        )
        try:
            torch.autograd.grad(logits.float().sum(), sample, allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(
                "Expected gradients of the model's outputs, but computing them failed: "
                f"{_first_line(error)}. If the model uses gradient checkpointing, turn it off for "
                "the audit."
            ) from error
        finally:
            hook.remove()
    if rerun:  # a search has swapped the weights back by then, so the gradients would be wrong
        raise ValueError(
            f"Expected the model not to run again while gradients are computed, but {rerun[0]} "
            "did. Turn gradient checkpointing off for the audit."
        )


def _converted(model: nn.Module, images: Tensor) -> str:
    """Return what to do about weights of another kind than the images; empty if they are alike."""
    kind = next(model.parameters()).dtype
    if kind == images.dtype or not kind.is_floating_point:
        return ""
    return f"The model's weights are {kind}: make it `model.to({images.dtype})`. "


def _first_line(error: Exception) -> str:
    """Return the first line of an error's text without a full stop, or else its class."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
