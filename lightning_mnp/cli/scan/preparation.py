"""How images are prepared: size and normalization, as asked for, as the file says, or as usual."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_mnp.cli.scan.architecture import Architecture
from lightning_mnp.cli.scan.options import ScanOptions
from lightning_mnp.cli.scan.source import Source

__all__ = ["Preparation", "find_preparation"]

_IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_USUAL_SIZE = 224
_MOST = 1e6  # what a mean or a standard deviation of pixels can be, and no overflow
_MOST_OF_UNIT = 2  # what a mean or a standard deviation can be on the scale [0, 1], with room
_MOST_SIDE = 1024  # that a file may ask for: larger ones could take all memory
_SIZES = ("img_size", "image_size", "input_size", "val_crop_size")  # names in training scripts


@dataclass(frozen=True)
class Preparation:
    """How images become what the network takes.

    Attributes:
        size: Side of the square in pixels; None for that of the images, if they are all alike.
        usual_size: The side if they are not.
        mean: Mean of each channel, on the scale [0, 1].
        std: Standard deviation of each channel, on the scale [0, 1].
        origins: Where size and normalization come from, in words.
        assumed: Whether the normalization is only the usual one.
        divided: Whether it was given on the scale [0, 255].
    """

    size: int | None
    usual_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    origins: Mapping[str, str]
    assumed: bool = False
    divided: bool = False

    def normalize(self, images: Tensor) -> Tensor:
        """Scale images to [0, 1] and normalize them.

        Args:
            images: Shape (N, C, H, W), uint8.

        Returns:
            The same shape, float32.

        Example:
            >>> preparation = Preparation(8, 8, (0.5,), (0.5,), {})
            >>> preparation.normalize(torch.full((1, 1, 8, 8), 255, dtype=torch.uint8)).unique()
            tensor([1.])
        """
        mean, std = (torch.tensor(part)[:, None, None] for part in (self.mean, self.std))
        return (images.float() / 255 - mean) / std


def find_preparation(
    options: ScanOptions,
    facts: Mapping[str, Any],
    source: Source,
    architecture: Architecture,
    channels: int,
) -> Preparation:
    """Find out how images have to be prepared.

    Options come first, then what the file says, then what stands beside it, then what the library
    of the architecture takes for usual. A normalization on the scale [0, 255] is divided by 255.

    Args:
        options: What was asked for.
        facts: What stands beside the weights in the file.
        source: What stands beside the file.
        architecture: The network.
        channels: Number of channels that it takes.

    Raises:
        ValueError: If a number of channels does not fit, or the normalization is not known or not
            finite.
    """
    beside = _of_timm(source.config) | _of_transformers(source.preparation)
    told = [
        ("the options", {name: getattr(options, name) for name in ("mean", "std", "size")}),
        ("the file", _of_facts(facts)),
        ("the configuration beside the file", beside),
    ]
    usual = architecture.preparation or (_IMAGENET if channels == 3 else {})
    normal = next(((place, each) for place, each in told if each.get("mean")), None)
    size = next(((place, each["size"]) for place, each in told if each.get("size")), None)
    if normal is None and not usual.get("mean"):
        raise ValueError(
            f"Expected the normalization of the images to be known, but the file does not say it, "
            f"and there is no usual one for {channels} channels. Give it as in training, by "
            "--mean and --std (0 and 1 for images in [0, 1])."
        )
    place, values = normal or ("what is usual for ImageNet", usual)
    mean, std = tuple(map(float, values["mean"])), tuple(map(float, values["std"]))
    fits = len(mean) == len(std) == channels and _are_numbers((*mean, *std))
    if not fits or min(std) <= 0:
        raise ValueError(
            f"Expected mean and std to hold one finite number for each of {channels} channels, the "
            f"std above 0, but {place} said {mean} and {std}. Give --mean and --std as in training."
        )
    divided = max(map(abs, (*mean, *std))) > _MOST_OF_UNIT
    if divided:
        mean, std = (tuple(each / 255 for each in part) for part in (mean, std))
    origins = {"normalization": place, "size": size[0] if size else "the images"}
    usual_size = int(usual.get("size", _USUAL_SIZE))
    side = size[1] if size else None
    return Preparation(side, usual_size, mean, std, origins, normal is None, divided)


def _of_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if _are_numbers(facts.get("mean")) and _are_numbers(facts.get("std")):
        found = {"mean": facts["mean"], "std": facts["std"]}
    for name in _SIZES:
        if size := _side(facts.get(name)):
            return found | {"size": size}
    return found


def _of_timm(config: Mapping[str, Any]) -> dict[str, Any]:
    settings = config.get("pretrained_cfg")
    if not isinstance(settings, dict):
        return {}
    return _of_facts({name: settings.get(name) for name in ("mean", "std", "input_size")})


def _of_transformers(settings: Mapping[str, Any]) -> dict[str, Any]:
    told = {"mean": settings.get("image_mean"), "std": settings.get("image_std")}
    found: dict[str, Any] = told if all(map(_are_numbers, told.values())) else {}
    if settings.get("do_normalize") is False:
        found |= {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    for name in ("crop_size", "size"):
        size = settings.get(name)
        values = list(size.values()) if isinstance(size, dict) else size
        if side := _side(values):
            found["size"] = side
            break
    return {name: value for name, value in found.items() if value}


def _side(value: Any) -> int | None:
    """Return the side of an image whose shape is given in any order."""
    sides = value if isinstance(value, (list, tuple)) else [value]
    whole = [side for side in sides if type(side) is int and 0 < side <= _MOST_SIDE]
    return max(whole, default=None)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(
        isinstance(each, (int, float)) and abs(each) < _MOST for each in value
    )
