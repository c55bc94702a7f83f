"""Which options of a training a grid may change."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import Trainer

from lightning_mnp.benchmark.names import find_class, nearest

__all__ = ["SHAPE", "check_fine_tuning", "check_option"]

# The options of a model by which its network is built.
SHAPE = ("architecture", "width", "num_classes", "in_channels")


def check_option(content: Mapping[str, Any], name: str, part_of: str) -> None:
    """Check that an option names an argument of the trainer, the model or the data.

    Args:
        content: The configuration that it changes.
        name: Its dotted name.
        part_of: Where it was given: ``"options"`` or ``"fine_tuning"``.

    Raises:
        ValueError: If it names none, or the weights to start from.
    """
    part, _, rest = name.partition(".")
    parts = ("trainer", "model", "data")
    if part not in parts or not rest:
        raise ValueError(
            f"Expected an option of the training in `{part_of}` to begin with trainer., model. or "
            f"data., but got {name!r}.{nearest(part, parts)}"
        )
    if name == "model.checkpoint":
        raise ValueError(
            f"Expected an option of the training in `{part_of}`, but got 'model.checkpoint': a "
            "benchmark names the network to start from by itself. Give `fine_tuning` to start from "
            "the clean one."
        )
    kind = Trainer if part == "trainer" else find_class(content[part]["class_path"])
    known = [each for each in inspect.signature(kind).parameters if each != "self"]
    if rest.partition(".")[0] not in known:
        raise ValueError(
            f"Expected an option of the training in `{part_of}` that {kind.__name__} takes, but "
            f"got {name!r}.{nearest(rest, known)}"
        )


def check_fine_tuning(content: Mapping[str, Any], names: Iterable[str]) -> None:
    """Check that a network can start from the clean one with some options.

    Args:
        content: The configuration that they change.
        names: Their dotted names.

    Raises:
        ValueError: If one of them shapes the network, or the model takes no weights to start from.
    """
    shaping = [name for name in names if name.removeprefix("model.") in (*SHAPE, "network")]
    if shaping:
        raise ValueError(
            f"Expected `fine_tuning` to leave the shape of the clean network as it is, but got "
            f"{shaping[0]!r}. Give it in `options`, or as an axis of the grid."
        )
    kind = find_class(content["model"]["class_path"])
    if "checkpoint" not in inspect.signature(kind).parameters:
        raise ValueError(
            "Expected the model of a grid with `fine_tuning` to take an argument `checkpoint`, the "
            f"weights to start from, but {kind.__name__} takes none. Leave `fine_tuning` out."
        )
