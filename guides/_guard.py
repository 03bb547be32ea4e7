"""Is ``inference`` ours? Another distribution, or a folder in the working directory, may bear the same name.

Imported before all else by ``guides`` and ``zoo``: the reason then stands where the import fails.
"""

from __future__ import annotations

from types import ModuleType

import inference


def check_inference(module: ModuleType) -> None:
    """Refuse a package that is not elbozoo's.

    Raises:
        ImportError: With the place that it was found in, and the remedy.
    """
    if getattr(module, "__distribution__", None) == "elbozoo":
        return
    found = getattr(module, "__file__", None) or list(getattr(module, "__path__", [])) or "an unknown place"
    raise ImportError(
        f"expected the package inference of elbozoo, got that in {found}: rename a folder of that name in the working "
        "directory, or install elbozoo into an environment without the other package"
    )


check_inference(inference)
