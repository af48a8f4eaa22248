"""Numbers for people: three significant digits, a space, a unit. KB = 1000 bytes; what was not measured is a dash."""

import math
from collections.abc import Sequence
from typing import TypeGuard

DASH = "\u2013"  # for what is not known
MINUS, TIMES = "\u2212", "\u00d7"

# (one of the unit, its name, the value from which the next unit is used), ascending
_Steps = Sequence[tuple[float, str, float]]
_BYTES: _Steps = ((1, " B", 1000), (1e3, " KB", 1000), (1e6, " MB", 1000), (1e9, " GB", math.inf))
_COUNT: _Steps = ((1, "", 1000), (1e3, " k", 1000), (1e6, " M", 1000), (1e9, " G", math.inf))
_MS: _Steps = ((1e-3, " µs", 100), (1, " ms", 1000), (1e3, " s", math.inf))


def human_bytes(value: float | None, digits: int = 3) -> str:
    """Bytes in powers of 1000: 182_400 is `182 KB`."""
    return _scaled(value, _BYTES, digits)


def human_count(value: float | None, digits: int = 3) -> str:
    """A count of parameters or MACs: 272_474 is `272 k`."""
    return _scaled(value, _COUNT, digits)


def human_ms(value: float | None, digits: int = 3) -> str:
    """A duration given in milliseconds: 0.31 is `0.31 ms`, below 0.1 it is in µs, from 1000 on in s."""
    return _scaled(value, _MS, digits)


def human_seconds(value: float | None) -> str:
    """A duration given in seconds: 4.21 is `4.2 s`, 125 is `2 min 5 s`, 3_725 is `1 h 2 min`."""
    if not _known(value):
        return DASH
    if value < 9.95:
        return f"{_significant(value, 2)} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes == 0:
        return f"{seconds} s"
    if minutes < 60:
        return f"{minutes} min {seconds} s" if seconds else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def percent(fraction: float | None, digits: int = 1) -> str:
    """A fraction in percent. Rounding never says all or nothing where it was not: 0.9999 is `>99.9 %`."""
    if not _known(fraction):
        return DASH
    step = 10.0**-digits
    if 0 < fraction < 1:
        if round(fraction * 100, digits) >= 100:
            return f">{100 - step:.{digits}f} %"
        if round(fraction * 100, digits) <= 0:
            return f"<{step:.{digits}f} %"
    return f"{fraction * 100:.{digits}f} %"


def points(difference: float | None, digits: int = 1) -> str:
    """A signed difference of two accuracies: 0.034 is `+3.4 points`."""
    if not _known(difference):
        return DASH
    size = f"{abs(difference) * 100:.{digits}f}"
    sign = "" if float(size) == 0 else "+" if difference > 0 else MINUS
    return f"{sign}{size} points"


def _known(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _scaled(value: float | None, steps: _Steps, digits: int) -> str:
    if not _known(value):
        return DASH
    for unit, name, ceiling in steps:
        text = _significant(value / unit, digits)
        if abs(float(text)) < ceiling:
            return text + name
    raise AssertionError("the last step has no ceiling")


def _significant(value: float, digits: int) -> str:
    """`digits` significant digits, no exponent, no trailing zeros; digits before the point are never rounded off."""
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def budget_value(name: str, value: float | None) -> str:
    """A value under the name of a budget limit, in that limit's unit."""
    shown = {"latency": human_ms, "size": human_bytes, "memory": human_bytes, "accuracy": percent}
    return shown.get(name, human_count)(value)
