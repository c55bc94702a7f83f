"""All searches, in the order in which they are made. A new one is a module and a line here.

from lightning_mnp.signals import register

register(MySearch)  # a SignalSearch, or a Search that is made for pruning only
"""

from __future__ import annotations

from collections.abc import Set

from lightning_mnp.signals.base import Search, SignalSearch
from lightning_mnp.signals.margin import MarginSearch
from lightning_mnp.signals.overlay import OverlaySearch
from lightning_mnp.signals.patch import PatchSearch
from lightning_mnp.signals.permutation import PermutationSearch
from lightning_mnp.signals.pile_up import PileUp
from lightning_mnp.signals.reach import ReachSearch
from lightning_mnp.signals.verdict import CONFIRMED
from lightning_mnp.signals.warp import WarpSearch

__all__ = ["complete_signals", "register", "registered", "unregister"]

# What the engine's other phases are called.
_RESERVED = frozenset(
    {
        *("reference", "suppression", "saliency", "masks", "screening", "verdict"),
        *("pruning", "soft_masks", "tuning", "check", "reaudit", "finished"),
    }
)

_SEARCHES: dict[str, type[Search]] = {
    search.name: search
    for search in (
        PileUp,
        MarginSearch,
        PatchSearch,
        WarpSearch,
        PermutationSearch,
        ReachSearch,
        # For pruning only.
        OverlaySearch,
    )
}


def register(search: type[Search]) -> type[Search]:
    """Add a search, which is made from now on; usable as a decorator.

    A :class:`~lightning_mnp.signals.base.SignalSearch` becomes part of every audit. Another
    search is made only if filters are to be pruned, for the traces that it adds.

    Args:
        search: The class of the search.

    Raises:
        ValueError: If there is a search of that name.
        TypeError: If it is no such class.

    Example:
        >>> register(ReachSearch)
        Traceback (most recent call last):
        ...
        ValueError: Expected a new name for a search, but there is a search 'reach' already. Choose
        another `name`.
    """
    if not (isinstance(search, type) and issubclass(search, Search)):
        raise TypeError(f"Expected a subclass of Search, but got {search!r}.")
    if search.name in _RESERVED:
        raise ValueError(
            f"Expected a name for a search that no phase of the engine has, but got "
            f"{search.name!r}. Choose another `name`."
        )
    if search.name in _SEARCHES:
        raise ValueError(
            f"Expected a new name for a search, but there is a search {search.name!r} already. "
            "Choose another `name`."
        )
    _SEARCHES[search.name] = search
    return search


def unregister(name: str) -> None:
    """Take a search out again.

    Args:
        name: Its name.

    Raises:
        KeyError: If there is none of that name.
    """
    del _SEARCHES[name]


def registered() -> dict[str, type[Search]]:
    """Return the searches by name, in the order in which they are made.

    Example:
        >>> list(registered())[:3]
        ['pile-up', 'margin', 'patch']
    """
    return dict(_SEARCHES)


def complete_signals(names: Set[str]) -> frozenset[str]:
    """Check names of signals, and add the pile-up if one of them counts only together with it.

    Args:
        names: The names.

    Raises:
        ValueError: If there is none, or one that no signal has.

    Example:
        >>> sorted(complete_signals({"margin", "patch"}))
        ['margin', 'patch', 'pile-up']
    """
    known = [name for name, kind in _SEARCHES.items() if issubclass(kind, SignalSearch)]
    unknown = sorted(set(names) - set(known))
    if unknown or not names:
        found = f"{unknown[0]!r}" if unknown else "none"
        raise ValueError(
            f"Expected argument `signals` to name signals, but got {found}. Choose some of "
            f"{', '.join(map(repr, known))}, or None for all."
        )
    return frozenset({*names, PileUp.name} if CONFIRMED & names else names)
