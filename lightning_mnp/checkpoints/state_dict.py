"""State dicts: found in the content of a file, and checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from lightning_mnp.checkpoints.inert import Foreign, StoredTensor
from lightning_mnp.checkpoints.inspection import CheckpointError
from lightning_mnp.checkpoints.printable import first_names, printable

__all__ = ["all_tensors", "check_finite", "find_state_dict", "strip_wrappers"]

NESTING_KEYS = ("state_dict", "model_state_dict", "model", "net", "sd")


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
