"""The families, one file each, and the registry: a file here with `build` and `VARIANTS` is in every list and test."""

from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any


@cache
def families() -> dict[str, ModuleType]:
    """Family name → its module, discovered from this directory, sorted by name."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__")
    return {name: import_module(f"{__name__}.{name}") for name in names}


@cache
def variants() -> dict[str, tuple[str, dict[str, Any]]]:
    """Model name → (family, the arguments that make it); raises when two families claim one name."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for family, module in families().items():
        for name, args in module.VARIANTS.items():
            if name in found:
                raise ValueError(f"the model name {name} is claimed by {found[name][0]} and by {family}")
            found[name] = (family, args)
    return found
