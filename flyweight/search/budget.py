"""The budget: what a classifier may cost, as people write it."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flyweight.errors import UsageError
from flyweight.units import budget_value

GRAMMAR = """a budget is a list of limits such as "latency<=2ms, size<=500KB":
  latency<=2ms      one picture, median, in ONNX Runtime on this machine (us, ms, s)
  size<=500KB       the file that ships (B, KB, KiB, MB, MiB; KB = 1000 bytes)
  memory<=1MB       peak activations and weights (the same units)
  macs<=50M         multiply-accumulates for one picture (k, M, G)
  params<=300k      parameters (k, M, G)
  accuracy>=90%     on the validation pictures (90% is 0.9)"""

_BYTES = {"": 1.0, "B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 1024.0, "MiB": 1024.0**2, "GiB": 1024.0**3}
_COUNTS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}
_TIMES = {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3}
_SHARES = {"": 1.0, "%": 0.01}
# Name → the units it takes, as factors to what results state: ms, bytes, counts, fractions.
UNITS: dict[str, dict[str, float]] = {
    "latency": _TIMES,
    "size": _BYTES,
    "memory": _BYTES,
    "macs": _COUNTS,
    "params": _COUNTS,
    "accuracy": _SHARES,
}
_LIMIT = re.compile(r"\s*([A-Za-z]+)\s*(<=|>=|[<>=≤≥]+)\s*([0-9.]+(?:e[+-]?\d+)?)\s*([A-Za-zµ%]*)\s*")


@dataclass(frozen=True)
class Limit:
    """`name op value`, with the value in ms, bytes, counts or a fraction."""

    name: str
    op: str
    value: float

    def met(self, measured: float) -> bool:
        """Whether the measured value keeps the limit."""
        return measured <= self.value if self.op == "<=" else measured >= self.value

    def excess(self, measured: float) -> float:
        """By what share of the limit it is missed; 0 where it is met."""
        over = measured - self.value if self.op == "<=" else self.value - measured
        return max(0.0, over / self.value)

    def __str__(self) -> str:
        return f"{self.name}{self.op}{budget_value(self.name, self.value)}"


@dataclass(frozen=True)
class Budget:
    """The limits that a classifier must keep, at most one for each name and direction."""

    limits: tuple[Limit, ...]

    @classmethod
    def parse(cls, texts: str | Iterable[str]) -> "Budget":
        """Reads one string or several of comma-separated limits. Raises UsageError, which shows the grammar."""
        joined = texts if isinstance(texts, str) else ",".join(texts)
        limits = [_parse_limit(text) for text in joined.split(",") if text.strip()]
        if not limits:
            raise UsageError(f"the budget is empty; {GRAMMAR}")
        names = [limit.name for limit in limits]
        for name in names:
            if names.count(name) > 1:
                raise UsageError(f"the budget limits {name} twice; give each limit once")
        return cls(tuple(limits))

    def limit(self, name: str) -> Limit | None:
        """The limit on `name`, if there is one."""
        return next((limit for limit in self.limits if limit.name == name), None)

    def check(self, measured: Mapping[str, float]) -> list[dict[str, Any]]:
        """A verdict for each limit whose name is measured: `{name, op, limit, measured, met}`."""
        return [
            {
                "name": li.name,
                "op": li.op,
                "limit": li.value,
                "measured": measured[li.name],
                "met": li.met(measured[li.name]),
            }
            for li in self.limits
            if li.name in measured
        ]

    def excess(self, measured: Mapping[str, float]) -> float:
        """The largest relative excess over the limits whose names are measured; 0 where all are met."""
        return max((li.excess(measured[li.name]) for li in self.limits if li.name in measured), default=0.0)

    def broken(self, measured: Mapping[str, float]) -> list[Limit]:
        """The limits that the measured values do not keep."""
        return [li for li in self.limits if li.name in measured and not li.met(measured[li.name])]

    def __str__(self) -> str:
        return ", ".join(str(limit) for limit in self.limits)


def _parse_limit(text: str) -> Limit:
    match = _LIMIT.fullmatch(text)
    if match is None:
        raise UsageError(f"{text.strip()!r} is no limit; {GRAMMAR}")
    name, op, number, unit = match.groups()
    name = name.lower()
    if name not in UNITS:
        raise UsageError(f"{name!r} cannot be limited; {GRAMMAR}")
    op = {"≤": "<=", "≥": ">="}.get(op, op)
    wanted = ">=" if name == "accuracy" else "<="
    if op != wanted:
        raise UsageError(f"{text.strip()!r}: {name} takes {wanted}, not {op}; {GRAMMAR}")
    factor = _factor(name, unit, text)
    try:
        value = float(number) * factor
    except ValueError:
        raise UsageError(f"{text.strip()!r}: {number!r} is no number; {GRAMMAR}") from None
    if not math.isfinite(value) or value <= 0:
        raise UsageError(f"{text.strip()!r}: a limit must be above zero; {GRAMMAR}")
    if name == "accuracy" and value > 1:
        raise UsageError(f"{text.strip()!r}: an accuracy is at most 1, which is 100%; {GRAMMAR}")
    return Limit(name, op, value)


def _factor(name: str, unit: str, text: str) -> float:
    """The unit's factor; case matters only where it makes a difference (k and K are both a thousand)."""
    units = UNITS[name]
    for known, factor in units.items():
        if unit == known or unit.lower() == known.lower():
            return factor
    known = ", ".join(u for u in units if u)
    raise UsageError(f"{text.strip()!r}: {name} has no unit {unit!r} (it has {known}); {GRAMMAR}")


_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def parse_time(text: str | float) -> float:
    """Seconds from "90s", "10m", "1.5h" or a number of seconds. Raises UsageError."""
    if not isinstance(text, str):
        return _positive(float(text), str(text))
    match = re.fullmatch(r"\s*([0-9.]+)\s*([a-z]*)\s*", text)
    if match is None or match[2] not in _SECONDS or match[1].count(".") > 1 or match[1] == ".":
        raise UsageError(f"{text!r} is no time; write 90s, 10m or 1.5h")
    return _positive(float(match[1]) * _SECONDS[match[2]], text)


def _positive(seconds: float, text: str) -> float:
    if not (math.isfinite(seconds) and seconds > 0):
        raise UsageError(f"{text!r} is no time; it must be above zero")
    return seconds
