"""The registry of baseline defenses: every defense has a name, and all are called alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from lightning_mnp.baselines.anp import default_anp
from lightning_mnp.baselines.clp import default_clp
from lightning_mnp.baselines.fp import default_fp
from lightning_mnp.baselines.ft import default_ft
from lightning_mnp.baselines.ft_sam import default_ft_sam
from lightning_mnp.baselines.ibau import default_ibau
from lightning_mnp.baselines.nad import default_nad
from lightning_mnp.baselines.nft import default_nft
from lightning_mnp.baselines.result import BaselineResult
from lightning_mnp.baselines.rnp import default_rnp
from lightning_mnp.defense_data.defense_set import DefenseSet

__all__ = ["Defense", "find", "names", "register", "unregister"]

# Called with a network, clean labeled images (a loader or a defense set) and a seed. It returns a
# defended copy and leaves the network as it is.
Defense = Callable[[nn.Module, Iterable[Any] | DefenseSet, int], BaselineResult]

_DEFENSES: dict[str, Defense] = {}


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
    if not callable(defense):
        raise TypeError(
            f"Expected argument `defense` to be a function (network, images, seed), but got "
            f"{type(defense).__name__}."
        )
    if not name:
        raise ValueError("Expected argument `name` to be the defense's name, but it is empty.")
    if name in _DEFENSES:
        raise ValueError(
            f"Expected argument `name` not to be taken, but there is a defense {name!r}. Choose "
            "another name, or call `unregister` first."
        )
    _DEFENSES[name] = defense


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
    find(name)
    del _DEFENSES[name]


def names() -> list[str]:
    """Return the names of all defenses, in the order in which they were added.

    Example:
        >>> "rnp" in names()
        True
    """
    return list(_DEFENSES)


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
    if name not in _DEFENSES:
        raise ValueError(
            f"Expected argument `name` to be one of {names()}, but got {name!r}. Add a defense of "
            "your own with `lightning_mnp.baselines.register`."
        )
    return _DEFENSES[name]


register("rnp", default_rnp)
register("ft", default_ft)
register("fp", default_fp)
register("clp", default_clp)
register("nft", default_nft)
register("anp", default_anp)
register("ft-sam", default_ft_sam)
register("i-bau", default_ibau)
register("nad", default_nad)
