"""The registries of baseline defenses and detectors: each has a name, all are called alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import nn

from lightning_mnp.baselines.ac import default_ac
from lightning_mnp.baselines.anp import default_anp
from lightning_mnp.baselines.clp import default_clp
from lightning_mnp.baselines.detection import DetectionResult
from lightning_mnp.baselines.fp import default_fp
from lightning_mnp.baselines.ft import default_ft
from lightning_mnp.baselines.ft_sam import default_ft_sam
from lightning_mnp.baselines.ibau import default_ibau
from lightning_mnp.baselines.mm_bd import default_mm_bd
from lightning_mnp.baselines.nad import default_nad
from lightning_mnp.baselines.named import NamedFunctions
from lightning_mnp.baselines.nc import default_detect_nc
from lightning_mnp.baselines.nc_unlearning import default_nc
from lightning_mnp.baselines.nft import default_nft
from lightning_mnp.baselines.result import BaselineResult
from lightning_mnp.baselines.rnp import default_rnp
from lightning_mnp.baselines.sc import default_sc
from lightning_mnp.baselines.strip import default_strip
from lightning_mnp.baselines.suspects import Suspects
from lightning_mnp.defense_data.defense_set import DefenseSet

__all__ = [
    "Defense",
    "Detector",
    "detector_names",
    "find",
    "find_detector",
    "names",
    "register",
    "register_detector",
    "unregister",
    "unregister_detector",
]

# Called with a network, clean labeled images (a loader or a defense set) and a seed. It returns a
# defended copy and leaves the network as it is.
Defense = Callable[[nn.Module, Iterable[Any] | DefenseSet, int], BaselineResult]


class Detector(Protocol):
    """What a detector is called with; see :func:`register_detector`."""

    def __call__(
        self,
        network: nn.Module,
        images: Iterable[Any] | DefenseSet,
        seed: int,
        suspects: Iterable[Any] | Suspects | None = None,
    ) -> DetectionResult:
        """Judge a network, and leave it as it is."""
        ...


_DEFENSES = NamedFunctions[Defense]("defense", "(network, images, seed)")
_DETECTORS = NamedFunctions[Detector](
    "detector", "(network, images, seed, suspects)", suffix="_detector"
)


def register(name: str, defense: Defense) -> None:
    """Add a defense, so that it can be found and compared by its name.

    Args:
        name: A name that is not taken.
        defense: A function (network, images, seed) that returns a
            :class:`~lightning_mnp.baselines.result.BaselineResult`. The images are a loader of
            clean, labeled batches or a
            :class:`~lightning_mnp.defense_data.defense_set.DefenseSet`. The function must not
            change the network, and the same seed must give the same result.

    Raises:
        TypeError: If the defense cannot be called.
        ValueError: If the name is empty or taken.

    Example:
        >>> def nothing(network, images, seed):
        ...     return BaselineResult(network, [], [], 0.9, 0.9)
        >>> register("nothing", nothing)
        >>> find("nothing") is nothing
        True
        >>> unregister("nothing")
    """
    _DEFENSES.add(name, defense)


def unregister(name: str) -> None:
    """Remove a defense.

    Args:
        name: Its name.

    Raises:
        ValueError: If there is no defense of this name.

    Example:
        >>> register("short-lived", find("rnp"))
        >>> unregister("short-lived")
        >>> "short-lived" in names()
        False
    """
    _DEFENSES.remove(name)


def names() -> list[str]:
    """Return the names of all defenses, in the order in which they were added.

    Example:
        >>> "rnp" in names()
        True
    """
    return _DEFENSES.names()


def find(name: str) -> Defense:
    """Return the defense of a name.

    Args:
        name: One of :func:`names`.

    Returns:
        A function (network, images, seed), see :func:`register`.

    Raises:
        ValueError: If there is no defense of this name.

    Example:
        >>> find("rnp").__name__
        'default_rnp'
    """
    return _DEFENSES.find(name)


def register_detector(name: str, detector: Detector) -> None:
    """Add a detector, so that it can be found and compared by its name.

    Args:
        name: A name that no other detector has.
        detector: A function (network, images, seed, suspects) that returns a
            :class:`~lightning_mnp.baselines.detection.DetectionResult`. Network, images and seed
            are those of :func:`register`. The suspects are labeled images that may be poisoned, or
            None. A detector that needs them raises ``ValueError`` if they are None; others leave
            them alone.

    Raises:
        TypeError: If the detector cannot be called.
        ValueError: If the name is empty or taken.

    Example:
        >>> def trusting(network, images, seed, suspects=None):
        ...     return DetectionResult(0.0, 1.0, None, {})
        >>> register_detector("trusting", trusting)
        >>> find_detector("trusting")(None, [], 0).verdict
        'clean'
        >>> unregister_detector("trusting")
    """
    _DETECTORS.add(name, detector)


def unregister_detector(name: str) -> None:
    """Remove a detector.

    Args:
        name: Its name.

    Raises:
        ValueError: If there is no detector of this name.

    Example:
        >>> register_detector("short-lived", find_detector("nc"))
        >>> unregister_detector("short-lived")
        >>> "short-lived" in detector_names()
        False
    """
    _DETECTORS.remove(name)


def detector_names() -> list[str]:
    """Return the names of all detectors, in the order in which they were added.

    Example:
        >>> "strip" in detector_names()
        True
    """
    return _DETECTORS.names()


def find_detector(name: str) -> Detector:
    """Return the detector of a name.

    Args:
        name: One of :func:`detector_names`.

    Returns:
        A function (network, images, seed, suspects), see :func:`register_detector`.

    Raises:
        ValueError: If there is no detector of this name.

    Example:
        >>> find_detector("mm-bd").__name__
        'default_mm_bd'
    """
    return _DETECTORS.find(name)


register_detector("nc", default_detect_nc)
register_detector("mm-bd", default_mm_bd)
register_detector("ac", default_ac)
register_detector("sc", default_sc)
register_detector("strip", default_strip)
register("rnp", default_rnp)
register("ft", default_ft)
register("fp", default_fp)
register("clp", default_clp)
register("nft", default_nft)
register("anp", default_anp)
register("ft-sam", default_ft_sam)
register("i-bau", default_ibau)
register("nad", default_nad)
register("nc", default_nc)
