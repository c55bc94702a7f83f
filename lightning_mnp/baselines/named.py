"""Functions of one kind, found by their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

__all__ = ["NamedFunctions"]

Function = TypeVar("Function", bound=Callable[..., Any])


class NamedFunctions(Generic[Function]):
    """Functions of one kind, each under a name that no other has.

    Args:
        noun: What one of them is called, such as ``"defense"``; for messages.
        arguments: What they are called with; for messages.
        suffix: What the public functions that add and remove one have at the end of their names;
            for messages.

    Example:
        >>> colors = NamedFunctions("color", "(shade)")
        >>> colors.add("red", lambda shade: 3 * shade)
        >>> colors.names(), colors.find("red")(2)
        (['red'], 6)
    """

    def __init__(self, noun: str, arguments: str, suffix: str = "") -> None:
        self.noun, self.arguments, self.suffix = noun, arguments, suffix
        self._functions: dict[str, Function] = {}

    def add(self, name: str, function: Function) -> None:
        """Add a function.

        Args:
            name: A name that is not taken.
            function: The function.

        Raises:
            TypeError: If it cannot be called.
            ValueError: If the name is empty or taken.
        """
        if not callable(function):
            raise TypeError(
                f"Expected argument `{self.noun}` to be a function {self.arguments}, but got "
                f"{type(function).__name__}."
            )
        if not name:
            raise ValueError(
                f"Expected argument `name` to be the {self.noun}'s name, but it is empty."
            )
        if name in self._functions:
            raise ValueError(
                f"Expected argument `name` not to be taken, but there is a {self.noun} {name!r}. "
                f"Choose another name, or call `unregister{self.suffix}` first."
            )
        self._functions[name] = function

    def remove(self, name: str) -> None:
        """Remove a function.

        Args:
            name: Its name.

        Raises:
            ValueError: If there is none of this name.
        """
        self.find(name)
        del self._functions[name]

    def names(self) -> list[str]:
        """Return all names, in the order in which the functions were added."""
        return list(self._functions)

    def find(self, name: str) -> Function:
        """Return the function of a name.

        Args:
            name: One of :meth:`names`.

        Raises:
            ValueError: If there is none of this name.
        """
        if name not in self._functions:
            raise ValueError(
                f"Expected argument `name` to be one of {self.names()}, but got {name!r}. Add a "
                f"{self.noun} of your own with `lightning_mnp.baselines.register{self.suffix}`."
            )
        return self._functions[name]
