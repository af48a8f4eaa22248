"""The files of a finished run, read and checked: what docs/run-folder.md promises, as typed values.

A job that was resumed may have written the same thing twice; the later record stands.
"""

import base64
import json
import math
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flyweight.errors import UsageError

Record = dict[str, Any]

_REMEDY = "copy the run folder again or repeat the run"
_PNG = b"\x89PNG\r\n\x1a\n"
_NUMBER = (int, float)
_MAYBE = (int, float, type(None))
_TEXT = (str, type(None))

# The keys that the report reads, by record, and the types they may have. A key whose types admit None may be absent.
_RESULT = {
    "version": (str,),
    "status": (str,),
    "data": (dict,),
    "winner": (dict,),
    "budget": (list,),
    "test": (dict,),
    "test_clean": (dict, type(None)),
    "validation": (dict,),
    "latency_ms": (dict, type(None)),
    "shipped": (dict,),
    "candidates": (list,),
    "seconds": (dict,),
    "time_limit": _MAYBE,
    "with_more_time": _TEXT,
    "seed": _MAYBE,
    "threads": _MAYBE,
}
_DATA = {
    "source": _TEXT,
    "name": (str,),
    "classes": (list,),
    "channels": _MAYBE,
    "train": _MAYBE,
    "validation": _MAYBE,
    "test": _MAYBE,
    "licence": _TEXT,
    "notes": (list, type(None)),
}
_WINNER = {
    "name": (str,),
    "spec": (dict, type(None)),
    "params": _MAYBE,
    "macs": _MAYBE,
    "teacher": (dict, type(None)),
}
_TEACHER = {"name": (str,), "val_top1": _NUMBER, "seconds": _NUMBER}
_LIMIT = {"name": (str,), "op": (str,), "limit": _NUMBER, "measured": _MAYBE, "met": (bool,)}
_SCORE = {"top1": _NUMBER, "n": (int,), "ci95": (list, type(None)), "duplicates": _MAYBE}
_LATENCY = {"p50": _MAYBE, "p95": _MAYBE, "p99": _MAYBE, "engine": _TEXT, "threads": _MAYBE, "n": _MAYBE}
_CARD = {"macs": (int,), "flops": (int,), "params": (int,), "engines": (list,), "peak_macs_per_second": (dict,)}
_ENGINE = {
    "engine": (str,),
    "format": (str,),
    "threads": (int,),
    "p50": _MAYBE,
    "p95": _MAYBE,
    "rounds": (list, type(None)),
    "cold_ms": _MAYBE,
    "peak_bytes": _MAYBE,
    "file_bytes": _MAYBE,
    "of_peak": _MAYBE,
}
_SHIPPED = {"file": (str,), "format": (str,), "size_bytes": _NUMBER}
_CANDIDATE = {
    "name": (str,),
    "params": _MAYBE,
    "macs": _MAYBE,
    "memory_bytes": _MAYBE,
    "size_bytes": _MAYBE,
    "latency_ms": _MAYBE,
    "status": (str,),
    "why": _TEXT,
    "val_top1": _MAYBE,
    "epochs": _MAYBE,
}
_KINDS = {
    "job": {"command": (str, list, type(None))},
    "trial": {"name": (str,), "rung": _NUMBER, "seconds": _MAYBE, "epochs": _MAYBE, "val_top1": _MAYBE},
    "epoch": {
        "stage": (str,),
        "name": (str,),
        "epoch": _NUMBER,
        "lr": _MAYBE,
        "train_loss": _MAYBE,
        "val_loss": _MAYBE,
        "val_top1": _MAYBE,
    },
    "variant": {
        "format": (str,),
        "size_bytes": _MAYBE,
        "latency_ms": _MAYBE,
        "val_top1": _MAYBE,
        "engine": _TEXT,
        "chosen": (bool,),
        "why": _TEXT,
    },
    "compression": {"step": (str,), "before": (dict,), "after": (dict,), "seconds": _NUMBER, "note": _TEXT},
    "parity": {
        "n": (int,),
        "agreement": _MAYBE,
        "pytorch_top1": _MAYBE,
        "exported_top1": _MAYBE,
        "interval": (list, type(None)),
        "tolerance": _MAYBE,
        "passed": (bool,),
    },
    "layer": {
        "path": (str,),
        "leaf": _TEXT,
        "shape": (list, type(None)),
        "params": (int,),
        "macs": (int,),
        "activation_bytes": _MAYBE,
    },
    "test": {"classes": (list, type(None)), "confusion": (list,)},
    "mistake": {"truth": (str, int), "predicted": (str, int), "probability": _MAYBE, "name": _TEXT, "png": (str,)},
}


@dataclass(frozen=True)
class Candidate:
    """One network of the race. `number` is its place in the table and its label in the plots."""

    number: int
    name: str
    status: str
    why: str
    params: int | None
    macs: int | None
    memory_bytes: int | None
    size_bytes: int | None
    latency_ms: float | None
    val_top1: float | None
    epochs: float | None


@dataclass(frozen=True)
class Epoch:
    """One epoch of training; what was not measured, or is not finite, is None."""

    epoch: float
    lr: float | None
    train_loss: float | None
    val_loss: float | None
    val_top1: float | None


@dataclass(frozen=True)
class FinishedRun:
    """All that the page is made from; `confusion` has a row per true class, `trials` a curve per trial."""

    folder: Path
    result: Record
    environment: Record
    command: str | None
    candidates: list[Candidate]
    rungs: list[Record]
    final: list[Epoch]
    trials: list[list[Epoch]]
    variants: list[Record]
    card: Record | None
    compressions: list[Record]
    parity: Record | None
    layers: list[Record]
    confusion: list[list[int]] | None
    mistakes: list[Record]

    @property
    def classes(self) -> list[str]:
        """The class names in output order."""
        return [str(name) for name in self.result["data"]["classes"]]


def load(folder: Path) -> FinishedRun:
    """Read a finished run's `result.json`, `records.jsonl` and `environment.json`.

    Raises UsageError where one of them is missing, is not what it should be, or lacks a key.
    """
    result = _read_result(folder)
    path = folder / "records.jsonl"
    records = list(_read_records(path))
    jobs = _of(records, "job")
    parities = _of(records, "parity")
    return FinishedRun(
        folder=folder,
        result=result,
        environment=_read_object(folder / "environment.json"),
        command=_command(jobs[-1]) if jobs else None,
        candidates=_candidates(result["candidates"]),
        rungs=_last_by(_of(records, "trial"), "rung", "name"),
        final=_final(records),
        trials=_trials(records),
        variants=_last_by(_of(records, "variant"), "format", "engine"),
        card=_card(folder / "card.json"),
        compressions=_last_by(_of(records, "compression"), "step"),
        parity=parities[-1] if parities else None,
        layers=_last_by(_of(records, "layer"), "path"),
        confusion=_confusion(_of(records, "test"), len(result["data"]["classes"]), path),
        mistakes=_mistakes(_last_by(_of(records, "mistake"), "name", "truth", "predicted"), result, path),
    )


def picture_size(png: str) -> tuple[int, int] | None:
    """Width and height in pixels of a PNG in base64; None where it is no PNG."""
    try:
        head = base64.b64decode(png, validate=True)[:24]
    except ValueError:
        return None
    if len(head) < 24 or not head.startswith(_PNG):
        return None
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def _read_result(folder: Path) -> Record:
    """result.json with every part the report reads checked."""
    path = folder / "result.json"
    if not path.is_file():
        if (folder / "run.json").is_file():
            advice = f"`flyweight fit --resume {folder}` goes on with it"
        else:
            advice = "name a folder that `flyweight fit` wrote"
        raise UsageError(f"{folder} is not a finished run: it has no result.json; {advice}.")
    result = _read_object(path)
    _check(result, _RESULT, str(path))
    parts = {
        "data": _DATA,
        "winner": _WINNER,
        "test": _SCORE,
        "test_clean": _SCORE,
        "validation": _SCORE,
        "latency_ms": _LATENCY,
        "shipped": _SHIPPED,
    }
    for key, fields in parts.items():
        if result[key] is not None:
            _check(result[key], fields, f"{path}, `{key}`")
    if result["winner"]["teacher"] is not None:
        _check(result["winner"]["teacher"], _TEACHER, f"{path}, `winner.teacher`")
    for key, fields in {"budget": _LIMIT, "candidates": _CANDIDATE}.items():
        for index, item in enumerate(result[key]):
            _check(item, fields, f"{path}, `{key}[{index}]`")
    return result


def _card(path: Path) -> Record | None:
    """The cost card, where there is one."""
    if not path.is_file():
        return None
    card = _read_object(path)
    _check(card, _CARD, str(path))
    for index, row in enumerate(card["engines"]):
        _check(row, _ENGINE, f"{path}, `engines[{index}]`")
    return card


def _read_object(path: Path) -> Record:
    value = _parse(_read_text(path), str(path))
    if not isinstance(value, dict):
        raise UsageError(f"{path} is damaged: it holds no JSON object; copy the run folder again or repeat the run.")
    return value


def _read_records(path: Path) -> Iterator[Record]:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number},"
        record = _parse(line, where)
        if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
            raise UsageError(f"{where} is damaged: it is no JSON object with a `kind`; {_REMEDY}.")
        _check(record, _KINDS.get(record["kind"], {}), where)
        yield record


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path} is missing, and the report is made from it; {_REMEDY}.") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is damaged: it is not UTF-8 text; {_REMEDY}.") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error


def _parse(text: str, where: str) -> Any:
    try:
        # NaN and Infinity, which Python writes for a diverged loss, are read as null
        return json.loads(text, parse_constant=lambda _: None)
    except (json.JSONDecodeError, RecursionError):
        raise UsageError(f"{where} is damaged: it is not valid JSON; {_REMEDY}.") from None


def _check(record: Any, fields: dict[str, tuple[type, ...]], where: str) -> None:
    """Refuse a record that lacks a key or has the wrong type in one; an absent optional key becomes None."""
    if not isinstance(record, dict):
        raise UsageError(f"{where} is damaged: it is no JSON object; {_REMEDY}.")
    for key, types in fields.items():
        value = record.setdefault(key, None)
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
            raise UsageError(f"{where} is damaged: `{key}` is {value!r:.40}, not {names}; {_REMEDY}.")


def _of(records: Iterable[Record], kind: str) -> list[Record]:
    return [record for record in records if record["kind"] == kind]


def _last_by(records: list[Record], *keys: str) -> list[Record]:
    """The records in order, of those that agree in all `keys` only the last."""
    return list({tuple(record[key] for key in keys): record for record in records}.values())


def _command(job: Record) -> str | None:
    command = job["command"]
    return shlex.join(str(word) for word in command) if isinstance(command, list) else command


def _candidates(items: list[Record]) -> list[Candidate]:
    """Numbered in the order of the table: the winner, the others by accuracy, what was not tried, what was dropped."""

    def place(item: Record) -> tuple[int, float, float]:
        rank = {"winner": 0, "not tried": 2, "dropped": 3}.get(item["status"], 1)
        return rank, -(item["val_top1"] or 0.0), math.inf if item["latency_ms"] is None else item["latency_ms"]

    fields = [key for key in _CANDIDATE if key != "why"]
    return [
        Candidate(number=number, why=item["why"] or "", **{key: item[key] for key in fields})
        for number, item in enumerate(sorted(items, key=place), start=1)
    ]


def _epoch(record: Record) -> Epoch:
    return Epoch(**{key: record[key] for key in ("epoch", "lr", "train_loss", "val_loss", "val_top1")})


def _final(records: list[Record]) -> list[Epoch]:
    """The final training. Where a resumed or restarted one goes back, what it had recorded beyond is dropped."""
    curve: list[Epoch] = []
    for record in records:
        if record["kind"] == "epoch" and record["stage"] == "final":
            curve = [one for one in curve if one.epoch < record["epoch"]] + [_epoch(record)]
    return curve


def _trials(records: list[Record]) -> list[list[Epoch]]:
    """The curve of each finished trial. A `trial` record ends one; a trial that was cut short is made again."""
    finished: list[list[Epoch]] = []
    running: dict[str, list[Epoch]] = {}
    for record in records:
        if record["kind"] == "trial":
            finished.append(running.pop(record["name"], []))
        elif record["kind"] == "epoch" and record["stage"] == "trial":
            curve = running.setdefault(record["name"], [])
            curve[:] = [one for one in curve if one.epoch < record["epoch"]] + [_epoch(record)]
    return [curve for curve in finished if curve]


def _confusion(tests: list[Record], classes: int, path: Path) -> list[list[int]] | None:
    if not tests:
        return None
    rows = tests[-1]["confusion"]
    square = len(rows) == classes and all(isinstance(row, list) and len(row) == classes for row in rows)
    if not square or not all(isinstance(count, int) and count >= 0 for row in rows for count in row):
        raise UsageError(f"{path} is damaged: `confusion` is no {classes} x {classes} table of counts; {_REMEDY}.")
    return rows


def _mistakes(records: list[Record], result: Record, path: Path) -> list[Record]:
    """The mistakes, most confident first, with class names for class indices and pictures that are pictures."""
    classes = result["data"]["classes"]
    for record in records:
        if picture_size(record["png"]) is None:
            raise UsageError(f"{path} is damaged: the picture of {record['name']} is no PNG in base64; {_REMEDY}.")
        for key in ("truth", "predicted"):
            if isinstance(record[key], int):
                if not 0 <= record[key] < len(classes):
                    raise UsageError(
                        f"{path} is damaged: there is no class {record[key]} to be mistaken for; {_REMEDY}."
                    )
                record[key] = classes[record[key]]
    return sorted(records, key=lambda record: -(record["probability"] or 0.0))
