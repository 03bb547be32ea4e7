"""Old names of a package that keep working for one version."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any


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
