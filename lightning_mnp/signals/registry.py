"""All signals, in the order in which they are searched for. A new one is a module and a line here.

from lightning_mnp.signals import register

register(MySearch)  # a SignalSearch
"""

from __future__ import annotations

from lightning_mnp.signals.base import SignalSearch
from lightning_mnp.signals.margin import MarginSearch
from lightning_mnp.signals.overlay import OverlaySearch
from lightning_mnp.signals.patch import PatchSearch
from lightning_mnp.signals.permutation import PermutationSearch
from lightning_mnp.signals.pile_up import PileUp
from lightning_mnp.signals.reach import ReachSearch
from lightning_mnp.signals.warp import WarpSearch

__all__ = ["register", "registered", "unregister"]

# What the engine's other phases are called.
_RESERVED = frozenset(
    {
        *("reference", "suppression", "saliency", "masks", "verdict"),
        *("pruning", "soft_masks", "check", "reaudit", "finished"),
    }
)

_SIGNALS: dict[str, type[SignalSearch]] = {
    search.name: search
    for search in (
        PileUp,
        ReachSearch,
        MarginSearch,
        PatchSearch,
        OverlaySearch,
        WarpSearch,
        PermutationSearch,
    )
}


def register(search: type[SignalSearch]) -> type[SignalSearch]:
    """Add a signal, which all audits from now on search for; usable as a decorator.

    Args:
        search: The class of the search.

    Raises:
        ValueError: If there is a signal of that name.
        TypeError: If it is no such class.

    Example:
        >>> register(ReachSearch)
        Traceback (most recent call last):
        ...
        ValueError: Expected a new name for a signal, but there is a signal 'reach' already. Choose
        another `name`.
    """
    if not (isinstance(search, type) and issubclass(search, SignalSearch)):
        raise TypeError(f"Expected a subclass of SignalSearch, but got {search!r}.")
    if search.name in _RESERVED:
        raise ValueError(
            f"Expected a name for a signal that no phase of the engine has, but got "
            f"{search.name!r}. Choose another `name`."
        )
    if search.name in _SIGNALS:
        raise ValueError(
            f"Expected a new name for a signal, but there is a signal {search.name!r} already. "
            "Choose another `name`."
        )
    _SIGNALS[search.name] = search
    return search


def unregister(name: str) -> None:
    """Take a signal out again.

    Args:
        name: Its name.

    Raises:
        KeyError: If there is none of that name.
    """
    del _SIGNALS[name]


def registered() -> dict[str, type[SignalSearch]]:
    """Return the signals by name, in the order in which they are searched for.

    Example:
        >>> list(registered())[:3]
        ['pile-up', 'reach', 'margin']
    """
    return dict(_SIGNALS)
