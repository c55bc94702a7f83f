"""Trigger files: an attack's trigger, kept beside the network that obeys it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch
from safetensors import safe_open
from torch import Tensor

from lightning_mnp.attacks.attack import Attack, Images
from lightning_mnp.attacks.registry import (
    declared_options,
    hint_members,
    is_plain,
    registered_attacks,
)
from lightning_mnp.checkpoints.inspection import CheckpointError
from lightning_mnp.checkpoints.read import read_state_dict
from lightning_mnp.checkpoints.write import write_state_dict

__all__ = ["SavedTrigger", "load_trigger", "read_poisoned_indices", "save_trigger"]

FORMAT = "lightning-mnp trigger 1"
MAX_BYTES = 512 * 2**20
_INDICES = "poisoned_indices"


def save_trigger(
    path: str | os.PathLike[str], attack: Attack, poisoned_indices: Tensor | None = None
) -> None:
    """Write an attack's trigger to a new safetensors file.

    Args:
        path: The file, ending in ``.safetensors``, in an existing folder; must not exist.
        attack: The attack, prepared or trained.
        poisoned_indices: Indices of the training images that were poisoned, shape (P,), to be
            kept in the file.

    Raises:
        CheckpointError: If the path is wrong or cannot be written to.

    Example:
        >>> import tempfile
        >>> from lightning_mnp.attacks import BadNets
        >>> path = Path(tempfile.mkdtemp(), "trigger.safetensors")
        >>> save_trigger(path, BadNets(patch_size=2, target_class=4))
        >>> load_trigger(path).target_class
        4
    """
    if Path(path).suffix != ".safetensors":
        raise CheckpointError(
            f"Expected argument `path` to end in '.safetensors', but got {str(path)!r}."
        )
    tensors = {f"trigger.{name}": value for name, value in attack.tensors().items()}
    # safetensors keeps no file without tensors, and an attack may be all options.
    tensors[_INDICES] = torch.zeros(0, dtype=torch.long)
    if poisoned_indices is not None:
        tensors[_INDICES] = poisoned_indices.long()
    attack = attack.attack if isinstance(attack, SavedTrigger) else attack
    metadata = {
        "format": FORMAT,
        "attack": type(attack).__name__,
        "options": json.dumps(attack.options()),
    }
    write_state_dict(path, tensors, metadata)


def load_trigger(path: str | os.PathLike[str]) -> Attack:
    """Read a trigger file, which may come from an attacker.

    The file names an attack and its options. Only registered attacks are built, see
    :func:`~lightning_mnp.attacks.registry.register`, and only with options that their constructors
    declare as plain numbers or strings. Nothing in the file is run.

    Args:
        path: The file.

    Returns:
        The attack, ready to be applied.

    Raises:
        CheckpointError: If the file is missing, too large, damaged or no trigger file, or if it
            names an attack, an option or a tensor that is not known.
    """
    shown = repr(str(path))
    tensors = read_state_dict(path, max_bytes=MAX_BYTES)
    metadata = _metadata(path, shown)
    known = registered_attacks()
    name = metadata.get("attack", "")
    if name not in known:
        raise CheckpointError(
            f"Expected the attack in {shown} to be one of {sorted(known)}, but got {name[:80]!r}. "
            "For an attack of your own, call `lightning_mnp.attacks.register` with its class first."
        )
    try:
        attack = known[name](**_plain_options(known[name], metadata.get("options", "")))
        attack.load_tensors(
            {
                key.removeprefix("trigger."): value
                for key, value in tensors.items()
                if key != _INDICES
            }
        )
    except (TypeError, ValueError, OverflowError, RecursionError, RuntimeError) as error:
        raise CheckpointError(f"{shown} does not describe a {name} trigger: {error}") from error
    return attack


def read_poisoned_indices(path: str | os.PathLike[str]) -> Tensor:
    """Read the indices of the poisoned training images from a trigger file.

    Args:
        path: The file.

    Returns:
        Sorted indices, shape (P,); empty if the file has none.

    Raises:
        CheckpointError: If the file is missing, damaged or no trigger file.
    """
    tensors = read_state_dict(path, max_bytes=MAX_BYTES)
    shown = repr(str(path))
    _metadata(path, shown)
    indices = tensors.get(_INDICES, torch.zeros(0, dtype=torch.long))
    rising = indices.ndim == 1 and not (indices.diff() <= 0).any() and not (indices < 0).any()
    if indices.dtype != torch.long or not rising:
        raise CheckpointError(
            f"Expected the tensor {_INDICES!r} in {shown} to be int64 indices in rising order, "
            f"but got {indices.dtype} of shape {tuple(indices.shape)}."
        )
    return indices


class SavedTrigger(Attack):
    """The trigger from a file, to measure attack success without the attack's own options.

    A training with it poisons as the attack in the file does, if that poisons stored images.

    Args:
        path: A file by :func:`save_trigger`. Training with an attack leaves one beside the network.

    Attributes:
        attack: The attack in the file.

    Raises:
        CheckpointError: If the file is missing, damaged or no trigger file.
    """

    def __init__(self, path: Path | str) -> None:
        path = Path(path).expanduser()
        attack = load_trigger(path)
        super().__init__(attack.target_class, attack.mode, 0.0, attack.seed)
        self.path = path
        self.attack = attack
        self.poison_rate = attack.poison_rate
        self.storable = attack.storable

    def prepare(self, test: Images, num_classes: int) -> None:
        """Prepare the attack in the file.

        Args:
            test: See :meth:`Attack.prepare`.
            num_classes: See :meth:`Attack.prepare`.
        """
        self.attack.prepare(test, num_classes)

    def poison(self, images: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        """Poison training images as the attack in the file does.

        Args:
            images: See :meth:`Attack.poison`.
            labels: See :meth:`Attack.poison`.
            indices: See :meth:`Attack.poison`.
        """
        return self.attack.poison(images, labels, indices)

    def target_labels(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return the labels that the attack in the file wants.

        Args:
            labels: See :meth:`Attack.target_labels`.
            num_classes: See :meth:`Attack.target_labels`.
        """
        return self.attack.target_labels(labels, num_classes)

    def poison_labels(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return the labels that the attack in the file gives poisoned images.

        Args:
            labels: See :meth:`Attack.poison_labels`.
            num_classes: See :meth:`Attack.poison_labels`.
        """
        return self.attack.poison_labels(labels, num_classes)

    def poison_indices(self, labels: Tensor, num_classes: int) -> Tensor:
        """Draw images to poison as the attack in the file does.

        Args:
            labels: See :meth:`Attack.poison_indices`.
            num_classes: See :meth:`Attack.poison_indices`.
        """
        return self.attack.poison_indices(labels, num_classes)

    def triggered_indices(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return the indices of the test images that count for the attack in the file.

        Args:
            labels: See :meth:`Attack.triggered_indices`.
            num_classes: See :meth:`Attack.triggered_indices`.
        """
        return self.attack.triggered_indices(labels, num_classes)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the attack in the file."""
        return self.attack.tensors()

    def _trigger(self, images: Tensor) -> Tensor:
        return self.attack.apply(images)

    def __repr__(self) -> str:
        return f"SavedTrigger({str(self.path)!r}, {self.attack!r})"


def _metadata(path: str | os.PathLike[str], shown: str) -> dict[str, str]:
    try:
        with safe_open(path, "pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except Exception as error:  # a damaged file can break its reader at any point
        raise CheckpointError(f"{shown} is damaged or no trigger file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"Expected {shown} to be a trigger file of the format {FORMAT!r}, but got "
            f"{metadata.get('format', 'none')[:80]!r}. Training with an attack writes one."
        )
    return metadata


def _plain_options(attack: type[Attack], text: str) -> dict[str, Any]:
    """Read an attack's options and check them before any code of the attack sees them.

    An argument that takes a path or a network cannot be set: a file must not name another file.
    """
    options = json.loads(text)
    if not isinstance(options, dict):
        raise ValueError(f"expected options by name, but got {type(options).__name__}")
    hints = declared_options(attack)
    refused = [
        name
        for name, value in options.items()
        if name not in hints or (value is not None and not is_plain(hints[name]))
    ]
    if refused:
        raise ValueError(f"options that a trigger file may not set: {refused!r:.200}")
    for name, value in options.items():
        if not _fits(value, hints[name]):
            raise ValueError(f"expected option `{name}` to be {hints[name]}, but got {value!r:.80}")
        if isinstance(value, int) and float in hint_members(hints[name]):
            options[name] = float(value)  # a whole number may be larger than any of these
    return options


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value from JSON is of an annotated type."""
    for each in hint_members(hint):
        if get_origin(each) is Literal:
            fits = value in get_args(each)
        elif each is float:
            fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        else:
            fits = type(value) is each
        if fits:
            return True
    return value is None and not is_plain(hint)
