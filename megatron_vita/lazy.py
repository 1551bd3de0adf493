"""Names of a package that are imported at their first use."""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def imported_lazily(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package's `__init__`.

    Args:
        package: name of the package.
        modules: module of each name, relative to the package.
    """

    def find(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{modules[name]}"), name)
        # Python calls `__getattr__` only for names that the module lacks.
        setattr(sys.modules[package], name, value)
        return value

    return find
