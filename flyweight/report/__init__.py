"""The report of a finished run: what was recorded, as one page. Reads files only, and never imports torch."""

import os
from pathlib import Path

from flyweight.errors import FlyweightError

__all__ = ["write_report"]


def write_report(folder: Path) -> Path:
    """Write `report.html` into a finished run folder and return its path.

    The page is made from `result.json`, `records.jsonl` and `environment.json` alone and loads nothing from elsewhere;
    an older `report.html` is replaced in one step. Raises UsageError where one of the three is missing or damaged,
    and FlyweightError where the page cannot be written.
    """
    from flyweight.report.page import render  # jinja2, numpy and matplotlib load with it: only when a page is made
    from flyweight.report.records import load

    page = render(load(folder))
    target = folder / "report.html"
    partial = folder / f".report.html.{os.getpid()}"
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        raise FlyweightError(f"{target} could not be written: {error.strerror}.") from error
    finally:
        partial.unlink(missing_ok=True)
    return target
