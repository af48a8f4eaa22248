"""Flyweight: from labelled pictures and a budget to the smallest, fastest image classifier that meets it."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# onnxruntime (1.32 on Linux) reports its use to its makers unless this stands before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from flyweight.costs import cost as cost
    from flyweight.create import create_model as create_model
    from flyweight.fitting import fit as fit
    from flyweight.fitting import resume as resume
    from flyweight.packed import open_packed as open_packed
    from flyweight.run import Run as Run
    from flyweight.run import load as load
    from flyweight.zoo import list_models as list_models

# Where each public name lives; imported on first use, since torch alone takes seconds. No module has the name of a
# function here: importing it would put the module in the function's place.
_HOMES = {
    "cost": "costs",
    "create_model": "create",
    "list_models": "zoo",
    "fit": "fitting",
    "resume": "fitting",
    "Run": "run",
    "load": "run",
    "open_packed": "packed",
}

__all__ = ["Run", "__version__", "cost", "create_model", "fit", "list_models", "load", "open_packed", "resume"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'flyweight' has no attribute {name!r}")
    return getattr(import_module(f"flyweight.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
