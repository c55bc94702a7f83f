"""The attacks that a trigger file may name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lightning_mnp.attacks.attack import Attack

__all__ = ["declared_options", "hint_members", "is_plain", "register", "registered_attacks"]

_REGISTERED: dict[str, type[Attack]] = {}

_AttackType = TypeVar("_AttackType", bound=type[Attack])


def register(attack: _AttackType) -> _AttackType:
    """Register an attack, so that its trigger files can be read.

    Call it with the class, or write it as a decorator above the class. A trigger file names its
    attack by the name of the class, and only registered attacks are built from files.

    A file can set each argument of the constructor that is annotated with plain types: ``bool``,
    ``int``, ``float``, ``str``, ``Literal`` and None. The constructor must be safe with any such
    value, because the file may come from an attacker. Annotate the name of a file as ``Path``:
    a trigger file cannot set that.

    Args:
        attack: The class, a subclass of :class:`~lightning_mnp.attacks.attack.Attack`.

    Returns:
        The class itself.

    Raises:
        TypeError: If it is no such class, or an abstract one.
        ValueError: If another attack has this name, or its constructor cannot be called from a
            trigger file: each argument needs a name and an annotation, and a default unless its
            annotation is plain.

    Example:
        >>> class Negative(Attack):
        ...     def _trigger(self, images):
        ...         return 1.0 - images
        >>> register(Negative).__name__ in registered_attacks()
        True
    """
    if not (isinstance(attack, type) and issubclass(attack, Attack)):
        raise TypeError(f"Expected argument `attack` to be a subclass of Attack, but got {attack}.")
    missing = sorted(getattr(attack, "__abstractmethods__", ()))
    if missing:
        raise TypeError(
            f"Expected argument `attack` to be a class that can be built, but {attack.__name__} "
            f"lacks the methods {missing}."
        )
    _check_constructor(attack)
    other = _REGISTERED.get(attack.__name__, attack)
    # The same class may be defined again, as when a cell of a notebook is run twice.
    if (other.__module__, other.__qualname__) != (attack.__module__, attack.__qualname__):
        raise ValueError(
            f"Expected argument `attack` to have a name of its own, but {attack.__name__!r} is "
            f"taken by {other.__module__}.{other.__qualname__}. Rename the class."
        )
    _REGISTERED[attack.__name__] = attack
    return attack


def registered_attacks() -> Mapping[str, type[Attack]]:
    """Return all registered attacks by name, read-only.

    Example:
        >>> registered_attacks()["BadNets"]
        <class 'lightning_mnp.attacks.badnets.BadNets'>
    """
    return MappingProxyType(_REGISTERED)


def declared_options(attack: type[Attack]) -> dict[str, Any]:
    """Return the arguments of an attack's constructor and their annotations.

    Args:
        attack: The class.

    Example:
        >>> declared_options(Attack)["poison_rate"]
        <class 'float'>
    """
    hints = get_type_hints(attack.__init__)
    return {name: hints.get(name) for name in inspect.signature(attack).parameters}


def is_plain(hint: Any) -> bool:
    """Return whether an annotation allows numbers, strings, booleans and None only.

    Args:
        hint: The annotation, evaluated.

    Example:
        >>> is_plain(float | None), is_plain(list[int])
        (True, False)
    """
    plain = (bool, int, float, str, NoneType)
    return all(each in plain or get_origin(each) is Literal for each in hint_members(hint))


def hint_members(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the annotation alone if it is none.

    Args:
        hint: The annotation, evaluated.

    Example:
        >>> hint_members(int | None)
        (<class 'int'>, <class 'NoneType'>)
    """
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _check_constructor(attack: type[Attack]) -> None:
    hints = declared_options(attack)
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for name, parameter in inspect.signature(attack).parameters.items():
        if parameter.kind in variadic or hints[name] is None:
            raise ValueError(
                f"Expected argument `attack` to have a constructor with a name and an annotation "
                f"for each argument, but got {parameter} of {attack.__name__}. Name and annotate "
                "it, so that a trigger file can set it."
            )
        if parameter.default is parameter.empty and not is_plain(hints[name]):
            raise ValueError(
                f"Expected argument `attack` to have a default for each argument that is no plain "
                f"number or string, but got {parameter} of {attack.__name__}. A trigger file "
                "cannot set it."
            )
