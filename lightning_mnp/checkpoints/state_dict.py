"""Fitting a state dict to a module: names, prefixes, shapes, finite values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_mnp.checkpoints.inspection import CheckpointError
from lightning_mnp.checkpoints.printable import printable

__all__ = ["PrefixMatch", "all_tensors", "check_finite", "first_names", "load_into"]

SHOWN_NAMES = 5


@dataclass(frozen=True)
class PrefixMatch:
    """How the names in a file and in a module differ.

    Attributes:
        file: What names in the file start with and names in the module lack.
        module: What names in the module start with and names in the file lack.
    """

    file: str = ""
    module: str = ""

    def to_file(self, name: str) -> str:
        """Give the name in the file for a name in the module.

        Example:
            >>> PrefixMatch(file="network.").to_file("conv1.weight")
            'network.conv1.weight'
        """
        return self.file + name.removeprefix(self.module)


def all_tensors(content: object) -> Iterator[Tensor]:
    """Find the tensors in nested containers, each container once, however often it is in there.

    Args:
        content: Tensors in dicts, lists and tuples.

    Example:
        >>> len(list(all_tensors({"a": torch.zeros(1), "b": [torch.ones(1), "text"]})))
        2
    """
    seen: set[int] = set()
    waiting = [content]
    while waiting:
        found = waiting.pop()
        if isinstance(found, Tensor):
            yield found
        elif isinstance(found, (dict, list, tuple)) and id(found) not in seen:
            seen.add(id(found))
            waiting.extend(found.values() if isinstance(found, dict) else found)


def check_finite(state_dict: Mapping[str, Tensor]) -> None:
    """Check that weights hold no NaN and no infinity.

    Args:
        state_dict: Tensors by name.

    Raises:
        CheckpointError: If a value is not finite; the message lists the first such tensors.

    Example:
        >>> check_finite({"weight": torch.tensor([1.0, float("nan")])})
        Traceback (most recent call last):
        ...
        lightning_mnp.checkpoints.inspection.CheckpointError: Expected all weights to be finite, but
        1 of 1 tensors hold NaN or infinity: weight. The network cannot be used.
    """
    bad = [name for name, tensor in state_dict.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise CheckpointError(
            f"Expected all weights to be finite, but {len(bad)} of {len(state_dict)} tensors hold "
            f"NaN or infinity: {first_names(bad)}. The network cannot be used."
        )


def load_into(
    module: nn.Module, state_dict: Mapping[str, Tensor], *, prefix: str | None = None
) -> PrefixMatch:
    """Load weights into a module, all of them or none.

    Names have to be the module's own, except for one prefix that all names of the file have
    (``network.conv1.weight`` for ``conv1.weight``) or that all names of the module have. The
    counters ``num_batches_tracked``, which old checkpoints lack, may be missing.

    Args:
        module: Gets the weights in place; its device and dtypes stay.
        state_dict: Tensors by name.
        prefix: Use only the tensors whose names start with this, for example ``"model."``, and
            ignore the others; ``None`` finds out.

    Returns:
        The prefixes by which names differ, so that weights can be written back under the names
        of the file.

    Raises:
        CheckpointError: If a name is missing or left over, or a shape or kind of number differs;
            the module is then unchanged.

    Example:
        >>> weights = {"net.weight": torch.ones(1, 2), "net.bias": torch.zeros(1)}
        >>> load_into(nn.Linear(2, 1), weights)
        PrefixMatch(file='net.', module='')
    """
    own = {name: value for name, value in module.state_dict().items() if torch.is_tensor(value)}
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
    incoming = {
        match.module + name.removeprefix(match.file): value for name, value in state_dict.items()
    }
    _check_fit(own, incoming)
    before = {name: value.clone() for name, value in own.items()}
    try:
        complete = module.state_dict()  # also says in which version its modules write weights
        complete.update(incoming)
        module.load_state_dict(complete, strict=True)
    except BaseException as error:  # hooks of the module may raise anything; Ctrl-C may come
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(before[name])
        if not isinstance(error, Exception):
            raise
        raise CheckpointError(
            f"{type(module).__name__} refused the weights: {printable(str(error), 300)}"
        ) from error
    return match


def _essential(tensors: Mapping[str, Tensor]) -> list[str]:
    """List the names that every checkpoint of a module has."""
    return [name for name in tensors if not name.endswith("num_batches_tracked")]


def _match_prefixes(own: list[str], given: list[str]) -> PrefixMatch:
    """Find the prefix that makes the names equal; none if there is no such prefix."""
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


def _check_fit(own: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    """Compare names, shapes and kinds of numbers."""
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


def first_names(names: Iterable[object]) -> str:
    """List the first few names of an untrusted file, made safe to print.

    Example:
        >>> first_names("abcdefg")
        'a, b, c, d, e, …'
    """
    shown = list(names)
    listed = ", ".join(printable(name) for name in shown[:SHOWN_NAMES])
    return listed + (", …" if len(shown) > SHOWN_NAMES else "")
