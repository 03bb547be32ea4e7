"""Old names of exports and of keyword arguments that keep working for one version."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def renamed(package: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's ``__getattr__``, which answers an old name by the new one, with a DeprecationWarning.

    Args:
        package: Its ``__name__``.
        names: New names by old ones; the new ones are attributes of the package.

    Returns:
        A function that raises AttributeError for all other names.

    Example:
        >>> __getattr__ = renamed(__name__, {"old_name": "new_name"})
    """

    def lookup(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        warnings.warn(
            f"{package}.{name} is called {package}.{names[name]} now; the old name goes in the next version",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(sys.modules[package], names[name])

    return lookup


def renamed_keywords(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator that takes keyword arguments by their old names, too, with a DeprecationWarning.

    Args:
        **names: New names by old ones.

    Example:
        >>> @renamed_keywords(batch_size="block")
        ... def count(*, block):
        ...     return block
        >>> count(block=3)
        3
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            for old, new in names.items():
                if old in kwargs and new not in kwargs:
                    warnings.warn(
                        f"{function.__name__}({old}=) is called {new} now; the old name goes in the next version",
                        DeprecationWarning,
                        stacklevel=2,
                    )
                    kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return wrapper

    return decorate
