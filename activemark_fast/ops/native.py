"""The compiled module (csrc/bindings.cpp)."""

from __future__ import annotations

import importlib
from types import ModuleType


def load_native() -> ModuleType:
    """Import the compiled module, on first use and not with the package.

    Raises:
        ImportError: the module was not built, or cannot be loaded by this Python.
    """
    try:
        return importlib.import_module("activemark_fast._native")
    except ImportError as error:
        raise ImportError(
            f"the compiled module activemark_fast._native cannot be loaded ({error}); build it with "
            "`pip install -e .` (or `pip install .`) in the source folder, which needs a C++17 compiler"
        ) from error
