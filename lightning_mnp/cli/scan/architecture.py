"""The network that weights belong to: as asked for, as the file says, or as its shapes tell."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_mnp.checkpoints.inspection import CheckpointError
from lightning_mnp.checkpoints.load import check_fit, fits
from lightning_mnp.checkpoints.printable import printable
from lightning_mnp.checkpoints.read import Weights
from lightning_mnp.cli.paths import expanded
from lightning_mnp.cli.scan.source import Source, read_json
from lightning_mnp.models.build import build_network

__all__ = ["Architecture", "find_architecture"]

_FORMS = "torchvision/NAME, timm/NAME, hf/FOLDER or module:function"
# Where training scripts write the name of the architecture.
_NAMES = ("arch", "model_name", "architecture", "model", "network", "backbone")
# What is tried if the file gives no name, by a weight that tells the family. All names and shapes
# have to fit.
_FAMILIES = {
    "layer1.0.conv1.weight": (
        *("cifar_resnet18", "cifar_resnet34", "resnet18", "resnet34", "resnet50", "resnet101"),
        *("resnet152", "wide_resnet50_2", "resnext50_32x4d"),
    ),
    "features.0.0.weight": (
        *("mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_b0"),
        "convnext_tiny",
    ),
    "features.0.weight": (
        *("squeezenet1_0", "squeezenet1_1", "alexnet", "vgg11", "vgg13", "vgg16", "vgg19"),
        *("vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn"),
    ),
    "features.conv0.weight": ("densenet121", "densenet169"),
    "stage2.0.branch1.0.weight": ("shufflenet_v2_x0_5", "shufflenet_v2_x1_0"),
}


@dataclass(frozen=True)
class Architecture:
    """A network with fresh weights, and what is known of its images.

    Attributes:
        network: The network.
        name: Its name, for the report.
        how: How it was found, in words; empty if it was asked for.
        preparation: ``mean``, ``std`` and ``size`` of the images, as far as the library knows them.
        class_names: Names of the classes; empty if they are not known.
    """

    network: nn.Module
    name: str
    how: str = ""
    preparation: dict[str, Any] = field(default_factory=dict)
    class_names: list[str] = field(default_factory=list)


def find_architecture(
    arch: str | None, weights: Weights, source: Source, classes: int | None = None
) -> Architecture:
    """Build the network that weights belong to.

    Args:
        arch: Its name; None to find it. ``torchvision/NAME`` and ``timm/NAME`` name a network of
            these libraries, ``hf/FOLDER`` one of transformers by the ``config.json`` in a folder,
            and ``module:function`` a function of yours that returns the network. A name alone is
            one of torchvision.
        weights: The weights.
        source: What stands beside them.
        classes: Number of classes; None for as many as the last weights have outputs.

    Returns:
        The network; its weights are not loaded yet.

    Raises:
        ValueError: If there is no such network, or it cannot be found.
        CheckpointError: If the weights do not fit it; a network of yours is not checked here.
        ImportError: If its library is not installed.

    Example:
        >>> source = Source(Path("model.pt"))
        >>> built = build_network("squeezenet1_1", num_classes=7)
        >>> find_architecture(None, Weights(built.state_dict()), source).name
        'torchvision/squeezenet1_1'
    """
    classes = classes or _outputs(weights.tensors)
    if arch is not None:
        return _build_fitting(arch, weights.tensors, classes)
    told = _told_by(source, weights)
    if told and told[0][0].startswith("hf/"):
        return _build_fitting(told[0][0], weights.tensors, classes, told[0][1])
    ordinary = [(name, "the fit of all names and shapes") for name in _ordinary(weights.tensors)]
    missing: ImportError | None = None
    for name, how in (*told, *ordinary):
        try:
            if _would_fit(name, weights.tensors, classes):
                return _build(name, weights.tensors, classes, how)
        except ImportError as error:
            missing = error
        except ValueError:  # the file tells a name that the library does not know
            continue
    if missing is not None:
        raise missing
    names = ", ".join(printable(name) for name, _ in told)
    said = f"the file names {names}, which is none that fits" if told else "the file names none"
    raise ValueError(
        f"Expected the architecture to be found from the file, but {said}. Give it as `--arch`: "
        f"{_FORMS}."
    )


def _told_by(source: Source, weights: Weights) -> list[tuple[str, str]]:
    """Return the architectures that the file or its configuration names, and where they stand."""
    beside = "config.json beside the file"
    if "architectures" in source.config:
        return [(f"hf/{source.path.parent}", beside)]
    if _is_name(name := source.config.get("architecture")):
        return [(f"timm/{name}", beside)]
    names = [weights.facts[key] for key in _NAMES if _is_name(weights.facts.get(key))]
    return [
        (f"{library}/{name}", "the file")
        for name in dict.fromkeys(names)
        for library in ("torchvision", "timm")
    ]


def _is_name(told: Any) -> bool:
    """Return whether an untrusted file tells a plain name: no path, and no function to call."""
    return isinstance(told, str) and re.fullmatch(r"[A-Za-z][\w.-]{0,99}", told) is not None


def _ordinary(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield ordinary architectures of the family that the weights' names tell."""
    for mark, names in _FAMILIES.items():
        if any(f".{name}".endswith(f".{mark}") for name in tensors):
            yield from names


def _would_fit(name: str, tensors: Mapping[str, Tensor], classes: int) -> bool:
    """Return whether all names and shapes of a network are those of the weights."""
    try:
        return fits(_without_numbers(name, tensors, classes), tensors)
    except RuntimeError:
        return False


def _build_fitting(
    arch: str, tensors: Mapping[str, Tensor], classes: int, how: str = ""
) -> Architecture:
    """Build a network if the weights fit it.

    The file tells how wide it is. That is checked before memory is taken, since a few bytes can
    tell of any width.
    """
    if not _is_function(arch):  # which is run once only: nobody knows what it does beside that
        try:
            network = _without_numbers(arch, tensors, classes)
        except RuntimeError as error:
            raise ValueError(
                f"Expected argument `--arch` to name a network that can be built without its "
                f"numbers first, to check its size, but {printable(arch)} failed: "
                f"{printable(str(error), 300)}. Give a function of yours as `--arch` "
                "module:function."
            ) from error
        check_fit(network, tensors)
    return _build(arch, tensors, classes, how)


class _NoParameters(TorchFunctionMode):
    """Puts on `meta` what layers are made of, but not what a network computes with when built."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func in (torch.empty, torch.zeros, torch.ones) and options.get("device") is None:
            options["device"] = "meta"
        return func(*args, **options)


def _without_numbers(arch: str, tensors: Mapping[str, Tensor], classes: int) -> nn.Module:
    """Build a network that takes no memory."""
    try:
        with torch.device("meta"):
            return _build(arch, tensors, classes).network
    except (RuntimeError, ValueError):  # some networks compute with numbers when built
        with _NoParameters():
            return _build(arch, tensors, classes).network


def _is_function(arch: str) -> bool:
    return ":" in arch and "/" not in arch


def _build(arch: str, tensors: Mapping[str, Tensor], classes: int, how: str = "") -> Architecture:
    if arch.startswith("hf/"):
        return _from_folder(Path(expanded(arch.removeprefix("hf/"))), how)
    if _is_function(arch):
        return Architecture(_from_function(arch, classes), arch, how)
    first = next((tensor for tensor in _filled(tensors) if tensor.ndim == 4), None)
    channels = 3 if first is None else first.shape[1]
    if arch.startswith("timm/"):
        name = arch.partition(".")[0]  # without the tag of pretrained weights
        network = build_network(name, classes, in_channels=channels)
        return Architecture(network, name, how, _of_timm(getattr(network, "pretrained_cfg", {})))
    name = arch.removeprefix("torchvision/")
    if name.startswith("cifar_"):
        width = 64 if first is None else len(first)
        return Architecture(build_network(name, classes, width, channels), name, how)
    return Architecture(build_network(name, classes), f"torchvision/{name}", how)


def _of_timm(config: Any) -> dict[str, Any]:
    """Return how timm prepares the images of a network."""
    found = {name: tuple(config[name]) for name in ("mean", "std") if config.get(name)}
    size = config.get("input_size")
    return found | ({"size": size[-1]} if size else {})


def _from_function(arch: str, classes: int) -> nn.Module:
    """Call a function of the user, which is trusted as all code on the command line."""
    module_name, _, name = arch.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module_name), name)
        takes = inspect.signature(function).parameters
        network = function(**({"num_classes": classes} if "num_classes" in takes else {}))
    except Exception as error:
        raise ValueError(
            f"Expected argument `--arch` to name a function that returns the network, but "
            f"{arch} failed: {type(error).__name__}: {error}. Run it in Python to see where."
        ) from error
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"Expected argument `--arch` to name a function that returns a torch.nn.Module, but "
            f"{arch} returned {type(network).__name__}."
        )
    return network


def _from_folder(folder: Path, how: str) -> Architecture:
    """Build the network of transformers that a folder's config.json describes."""
    shown = printable(str(folder))
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"Expected argument `--arch` to name a folder with config.json after hf/, but {shown} "
            "holds none."
        )
    if "auto_map" in read_json(folder / "config.json"):
        raise CheckpointError(
            f"{shown} is refused: its config.json asks for code of its own (auto_map), which is "
            "not run. Give a function of yours as `--arch` module:function."
        )
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"Argument `--arch` = hf/{shown} needs the package transformers, which is not "
            "installed: pip install 'lightning-mnp[hf]'"
        ) from error
    transformers.logging.set_verbosity_error()
    try:
        settings = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        network = transformers.AutoModelForImageClassification.from_config(
            settings,
            trust_remote_code=False,
            attn_implementation="eager",  # a configuration can name others, which are fetched
        )
    except Exception as error:
        raise ValueError(
            f"Expected {shown}/config.json to describe an image classifier of transformers "
            f"{transformers.__version__}, but: {printable(str(error), 300)}."
        ) from error
    names = [str(name) for _, name in sorted(settings.id2label.items())]
    return Architecture(network, f"hf/{folder}", how, class_names=names)


def _outputs(tensors: Mapping[str, Tensor]) -> int:
    """Return the number of outputs of the last layer."""
    wide = [tensor for tensor in _filled(tensors) if tensor.ndim >= 2]
    if not wide:
        raise CheckpointError("Expected weights of layers, but the file holds only short rows.")
    return len(wide[-1])


def _filled(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the tensors that hold numbers: others can have any length at no cost."""
    return [tensor for tensor in tensors.values() if tensor.numel()]
