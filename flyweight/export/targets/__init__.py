"""The forms in which a classifier can leave, one file each: the directory is the registry.

A target's file says `NAME`; `ENGINE`, the runtime that is to answer as the network does; `INT8`, whether it has int8;
`QUICK`, whether it takes milliseconds; `NEEDS` and `EXTRA` as an engine's; and `export(task)`, which gives the files
and raises GraphError for what they cannot hold.
"""

import importlib
import pkgutil
from functools import cache
from typing import Protocol, cast

from flyweight.errors import UsageError
from flyweight.export.task import Task
from flyweight.exported import Exported


class Target(Protocol):
    """A form in which a classifier can leave."""

    NAME: str
    ENGINE: str
    INT8: bool
    QUICK: bool
    NEEDS: tuple[str, ...]
    EXTRA: str

    @staticmethod
    def export(task: Task) -> Exported:
        """The files."""
        ...


@cache
def targets() -> dict[str, Target]:
    """All targets that are known, their converters installed or not, by name."""
    files = [importlib.import_module(f"{__name__}.{each.name}") for each in pkgutil.iter_modules(__path__)]
    return {each.NAME: each for each in cast("list[Target]", files)}


def target(name: str) -> Target:
    """The target of a name. Raises UsageError where there is none such."""
    if name not in targets():
        raise UsageError(f"there is no target {name!r}; there are {', '.join(targets())}")
    return targets()[name]
