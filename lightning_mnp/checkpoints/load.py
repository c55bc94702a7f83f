"""Weights loaded into a module: all of them or none, whatever prefix their names have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_mnp.checkpoints.inspection import CheckpointError
from lightning_mnp.checkpoints.printable import first_names, printable

__all__ = ["PrefixMatch", "check_fit", "fits", "load_into"]


@dataclass(frozen=True)
class PrefixMatch:
    """The prefixes by which names in a file and in a module differ.

    Attributes:
        file: Prefix of the names in the file that the names in the module do not have.
        module: Prefix of the names in the module that the names in the file do not have.

    Example:
        >>> PrefixMatch(module="network.").to_file("network.conv1.weight")
        'conv1.weight'
    """

    file: str = ""
    module: str = ""

    def to_file(self, name: str) -> str:
        """Return the name in the file of a tensor of the module.

        Args:
            name: Its name in the module.

        Example:
            >>> PrefixMatch(file="network.").to_file("conv1.weight")
            'network.conv1.weight'
        """
        return self.file + name.removeprefix(self.module)


def load_into(
    module: nn.Module, state_dict: Mapping[str, Tensor], *, prefix: str | None = None
) -> PrefixMatch:
    """Load weights into a module, all of them or none.

    The names must be those of the module, except for one prefix that all names in the file have
    (``network.conv1.weight`` for ``conv1.weight``) or that all names of the module have. The
    counters ``num_batches_tracked`` may be missing, as they are in old checkpoints.

    Args:
        module: The module, which is changed in place; its device and dtypes stay.
        state_dict: Tensors by name.
        prefix: Only the tensors whose names start with this are used, for example ``"model."``;
            if None, the prefix is found.

    Returns:
        The prefixes by which names differ. With them, weights can be written back under the names
        of the file.

    Raises:
        CheckpointError: If a name is missing or left over, or a shape or kind of number differs;
            the module is then unchanged.

    Example:
        >>> weights = {"net.weight": torch.ones(1, 2), "net.bias": torch.zeros(1)}
        >>> load_into(nn.Linear(2, 1), weights)
        PrefixMatch(file='net.', module='')
    """
    own = _own_tensors(module)
    if prefix is None:
        match = _match_prefixes(_essential(own), _essential(state_dict))
    else:
        state_dict = {name: t for name, t in state_dict.items() if name.startswith(prefix)}
        if not state_dict:
            raise CheckpointError(
                f"Expected argument `prefix` to start names in the state dict, but none starts "
                f"with {prefix!r}."
            )
        match = PrefixMatch(file=prefix)
    incoming = _renamed(state_dict, match)
    _check_named(own, incoming)
    before = {name: value.clone() for name, value in own.items()}
    try:
        complete = module.state_dict()  # it also holds the versions of the module's classes
        complete.update(incoming)
        module.load_state_dict(complete, strict=True)
    except BaseException as error:  # hooks of the module may raise anything; so may Ctrl-C
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(before[name])
        if not isinstance(error, Exception):
            raise
        raise CheckpointError(
            f"{type(module).__name__} refused the weights: {printable(str(error), 300)}"
        ) from error
    return match


def fits(module: nn.Module, state_dict: Mapping[str, Tensor]) -> bool:
    """Return whether weights could be loaded into a module, by their names and shapes.

    Args:
        module: The module, which may be without values (on the device ``meta``).
        state_dict: Tensors by name.

    Example:
        >>> fits(nn.Linear(2, 1), {"net.weight": torch.ones(1, 2), "net.bias": torch.zeros(1)})
        True
    """
    try:
        check_fit(module, state_dict)
    except CheckpointError:
        return False
    return True


def check_fit(module: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Check that weights could be loaded into a module, by their names and shapes.

    Args:
        module: The module, which may be without values (on the device ``meta``).
        state_dict: Tensors by name.

    Raises:
        CheckpointError: As :func:`load_into` would raise it.

    Example:
        >>> check_fit(nn.Linear(2, 1, bias=False, device="meta"), {"weight": torch.ones(2, 2)})
        Traceback (most recent call last):
        ...
        lightning_mnp.checkpoints.inspection.CheckpointError: Expected argument `state_dict` to fit
        the module of 1 tensors, but got 1 of another shape: weight (2, 2) for (1, 2). Check the
        architecture, its options and the prefix.
    """
    own = _own_tensors(module)
    match = _match_prefixes(_essential(own), _essential(state_dict))
    _check_named(own, _renamed(state_dict, match))


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in module.state_dict().items() if torch.is_tensor(value)}


def _renamed(state_dict: Mapping[str, Tensor], match: PrefixMatch) -> dict[str, Tensor]:
    """Return tensors under the names that the module has for them."""
    return {
        match.module + name.removeprefix(match.file): value for name, value in state_dict.items()
    }


def _essential(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names that every checkpoint of a module has."""
    return [name for name in tensors if not name.endswith("num_batches_tracked")]


def _match_prefixes(own: list[str], given: list[str]) -> PrefixMatch:
    """Find the prefix by which all names differ; no prefixes if there is no such prefix."""
    for longer, shorter, side in ((given, own, "file"), (own, given, "module")):
        if not shorter or len(longer) != len(shorter):
            continue
        wanted = set(longer)
        for name in longer:
            if name.endswith(f".{shorter[0]}"):
                prefix = name.removesuffix(shorter[0])
                if {prefix + other for other in shorter} == wanted:
                    return PrefixMatch(**{side: prefix})
    return PrefixMatch()


def _check_named(own: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    """Check that names, shapes and kinds of numbers agree."""
    missing = [name for name in _essential(own) if name not in given]
    unexpected = [name for name in given if name not in own]
    shared = [name for name in own if name in given]
    shapes = [
        f"{printable(name)} {tuple(given[name].shape)} for {tuple(own[name].shape)}"
        for name in shared
        if given[name].shape != own[name].shape
    ]
    kinds = [
        f"{printable(name)} {given[name].dtype} for {own[name].dtype}"
        for name in shared
        if given[name].is_floating_point() != own[name].is_floating_point()
        or given[name].is_complex() != own[name].is_complex()
    ]
    faults = [
        f"{len(found)} {kind}: {first_names(found)}"
        for kind, found in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", shapes),
            ("of another kind", kinds),
        )
        if found
    ]
    if faults:
        raise CheckpointError(
            f"Expected argument `state_dict` to fit the module of {len(own)} tensors, but got "
            f"{'; '.join(faults)}. Check the architecture, its options and the prefix."
        )
