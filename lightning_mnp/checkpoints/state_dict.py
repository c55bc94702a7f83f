"""State dicts: found in the content of a file, checked, and loaded into a module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_mnp.checkpoints.inert import Foreign, StoredTensor
from lightning_mnp.checkpoints.inspection import CheckpointError
from lightning_mnp.checkpoints.printable import printable

__all__ = [
    "PrefixMatch",
    "all_tensors",
    "check_finite",
    "check_fit",
    "find_state_dict",
    "first_names",
    "fits",
    "load_into",
    "strip_wrappers",
]

NESTING_KEYS = ("state_dict", "model_state_dict", "model", "net", "sd")
SHOWN_NAMES = 5


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


def all_tensors(content: object) -> Iterator[Tensor]:
    """Yield the tensors in nested containers, in their order.

    A container that occurs more than once is searched only the first time.

    Args:
        content: A tensor, or tensors in dicts, lists and tuples.

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
            items = found.values() if isinstance(found, dict) else found
            waiting.extend(reversed(list(items)))


def find_state_dict(
    content: object, key: str | None, shown: str
) -> dict[str, Tensor | StoredTensor]:
    """Find the state dict in the content of a file.

    Args:
        content: What the file holds.
        key: Where the state dict is, for example ``"ema"`` or ``"nets.student"``; if None, it is
            looked for at the top and under the usual keys (``state_dict``, ``model`` and others).
        shown: Name of the file, for messages.

    Returns:
        Tensors by name; other entries are left out.

    Raises:
        CheckpointError: If there is none, it is not clear which of several is meant, or weights
            hang on an object that was not read.

    Example:
        >>> find_state_dict({"epoch": 3, "model": {"weight": torch.ones(1)}}, None, "last.pt")
        {'weight': tensor([1.])}
    """
    if key is not None:
        found: object = content
        for part in [key] if isinstance(content, dict) and key in content else key.split("."):
            if not isinstance(found, dict) or part not in found:
                names = list(found) if isinstance(found, dict) else []
                raise CheckpointError(
                    f"Expected argument `key` to lead to a state dict in {shown}, but {key!r} does "
                    f"not. There is: {first_names(names)}."
                )
            found = found[part]
        content = found
    for _ in NESTING_KEYS:
        if not isinstance(content, dict):
            break
        nested = _nested(content, Tensor, StoredTensor)
        if not nested and not _named_tensors(content):
            nested = _nested(content, Foreign)  # to tell what the weights hang on
        if len(nested) > 1:
            raise CheckpointError(
                f"{shown} holds several state dicts. Choose one with the option `key`: "
                f"{first_names(nested)}."
            )
        if not nested:
            break
        content = content[nested[0]]
    tensors = _named_tensors(content)
    parts = content if isinstance(content, dict) else {"": content}
    candidates = [name for name, value in parts.items() if _named_tensors(value)]
    if candidates and not tensors:
        raise CheckpointError(
            f"{shown} holds no state dict under a usual key. Choose one with the option `key`: "
            f"{first_names(candidates)}."
        )
    _refuse_foreign(parts, shown)
    if tensors:
        return tensors
    raise CheckpointError(
        f"{shown} holds no weights by name. Expected a state dict, also under one of "
        f"{NESTING_KEYS}; save `model.state_dict()`."
    )


def _nested(content: dict[object, object], *kinds: type) -> list[str]:
    """Return the usual keys that lead to values of some kinds by name, also by further such keys.

    Under such a key there may be something else: the options of a model, say.
    """
    return [name for name in NESTING_KEYS if _leads_to(content.get(name), kinds)]


def _leads_to(content: object, kinds: tuple[type, ...]) -> bool:
    seen: set[int] = set()
    waiting = [content]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict) and id(found) not in seen:
            seen.add(id(found))
            if any(isinstance(k, str) and isinstance(v, kinds) for k, v in found.items()):
                return True
            waiting.extend(found.get(name) for name in NESTING_KEYS)
    return False


def _refuse_foreign(parts: Mapping[str, object], shown: str) -> None:
    """Raise if one of the weights, or all of them, are objects that were not made."""
    for name, value in parts.items():
        if isinstance(value, Foreign):
            where = f"{printable(name)} in it is" if name else "it is"
            raise CheckpointError(
                f"{shown} is refused and nothing in it was run: {where} an object of "
                f"{printable(value.name)}, on which its weights hang, and which only that class "
                "could read. Ask for a file with the state dict alone (`model.state_dict()`), or "
                ".safetensors."
            )


def _named_tensors(content: object) -> dict[str, Tensor | StoredTensor]:
    """Return the tensors of a dict that have names; nothing for any other content."""
    if not isinstance(content, dict):
        return {}
    return {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, (Tensor, StoredTensor))
    }


AnyTensor = TypeVar("AnyTensor", Tensor, Tensor | StoredTensor)


def strip_wrappers(tensors: dict[str, AnyTensor], shown: str) -> dict[str, AnyTensor]:
    """Remove what ``torch.compile``, ``DataParallel`` and ``AveragedModel`` add to names.

    Args:
        tensors: Tensors by name.
        shown: Name of the file, for messages.

    Returns:
        The tensors by their names without ``_orig_mod.`` and ``module.``.

    Raises:
        CheckpointError: If two tensors have the same name then.

    Example:
        >>> list(strip_wrappers({"module.fc.weight": torch.ones(1)}, "last.pt"))
        ['fc.weight']
    """
    names = list(tensors)
    plain = [
        ".".join(part for part in name.split(".") if part != "_orig_mod") or name for name in names
    ]
    if all(name.startswith("module.") or name == "n_averaged" for name in plain):
        plain = [name.removeprefix("module.") for name in plain]
    if len(set(plain)) < len(plain):
        raise CheckpointError(
            f"{shown} is refused: without the prefixes `module.` and `_orig_mod.`, names occur "
            "twice."
        )
    return {new: tensors[old] for new, old in zip(plain, names, strict=True) if new != "n_averaged"}


def check_finite(state_dict: Mapping[str, Tensor]) -> None:
    """Check that weights hold neither NaN nor infinity.

    Args:
        state_dict: Tensors by name.

    Raises:
        CheckpointError: If a value is not finite, or a tensor is of 8-bit floating-point numbers;
            the message lists the first such tensors.

    Example:
        >>> check_finite({"weight": torch.tensor([1.0, float("nan")])})
        Traceback (most recent call last):
        ...
        lightning_mnp.checkpoints.inspection.CheckpointError: Expected all weights to be finite, but
        1 of 1 tensors hold NaN or infinity: weight. The network cannot be used.
    """
    small = [n for n, t in state_dict.items() if t.is_floating_point() and t.element_size() < 2]
    if small:
        raise CheckpointError(
            f"Expected weights of two bytes or more each, but {len(small)} of {len(state_dict)} "
            f"tensors are of {str(state_dict[small[0]].dtype).removeprefix('torch.')}: "
            f"{first_names(small)}. Save them as float32 or float16."
        )
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


def first_names(names: Iterable[object]) -> str:
    """Return the first few names of an untrusted file as text that is safe to print.

    Args:
        names: The names.

    Example:
        >>> first_names("abcdefg")
        'a, b, c, d, e, …'
    """
    shown = list(names)
    listed = ", ".join(printable(name) for name in shown[:SHOWN_NAMES])
    return listed + (", …" if len(shown) > SHOWN_NAMES else "")
