"""A finished run as a page: every table and figure is shaped here, the template only lays them out."""

import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from flyweight.report import plots
from flyweight.report.records import Candidate, Epoch, FinishedRun, Record, picture_size
from flyweight.units import DASH, TIMES, human_bytes, human_count, human_ms, human_seconds, percent, points

_LIMITS = {  # as they stand within a sentence
    "latency": "latency",
    "size": "file size",
    "memory": "peak memory",
    "macs": "MACs",
    "params": "parameters",
    "accuracy": "validation accuracy",
}
_STAGES = {
    "data": "Reading the data",
    "search": "Searching",
    "train": "Final training",
    "compress": "Compressing",
    "verify": "Verifying",
}
_MOST_NUMBERS = 15  # classes up to which the confusion matrix is a table of numbers
_MOST_PIXELS = 112  # pictures up to this side are enlarged without smoothing
PACKED = "packed"  # what a format ends in whose file is packed
_LONG = {"tried": 10, "untried": 8, "layers": 24, "classes": 20, "mistakes": 24}  # longer lists are folded or cut


@dataclass(frozen=True)
class Verdict:
    """One limit of the budget. `fill` and `mark` are the measured value's and the limit's share of the bar's length."""

    name: str
    limit: str
    measured: str
    met: bool
    margin: str
    fill: float
    mark: float


def render(run: FinishedRun) -> str:
    """The report as one HTML document."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    written = {
        "bytes": human_bytes,
        "count": human_count,
        "ms": human_ms,
        "seconds": human_seconds,
        "percent": percent,
        "points": points,
    }
    environment.filters.update({name: _unbroken(write) for name, write in written.items()})
    environment.filters["exact"] = lambda value: DASH if value is None else f"{value:,}"
    return environment.get_template("template.html.jinja").render(_context(run))


def _unbroken(write: Callable[..., str]) -> Callable[..., str]:
    """A number and its unit stay on one line."""
    return lambda *arguments: _solid(write(*arguments))


def _solid(text: str) -> str:
    """The text without a place to break the line."""
    return text.replace(" ", "\u00a0")


def _context(run: FinishedRun) -> dict[str, Any]:
    result = run.result
    return {
        "result": result,
        "data": result["data"],
        "latency": result["latency_ms"] or dict.fromkeys(("p50", "p95", "p99", "engine", "threads", "n")),
        "headline": headline(result),
        "verdicts": [verdict(limit) for limit in result["budget"]],
        "shortfall": shortfall(result["budget"]),
        "races": _races(run),
        "tried": [one for one in run.candidates if one.status not in ("dropped", "not tried")],
        "untried": [one for one in run.candidates if one.status in ("dropped", "not tried")],
        "reasons": _reasons(run.candidates),
        "rungs": _rungs(run.rungs),
        "curves": _curves(run.final, run.trials),
        "final": run.final[-1] if run.final else None,
        "teacher": result["winner"]["teacher"],
        "variants": _variants(run.variants),
        "engines": len({one["engine"] for one in run.variants}),
        "card": run.card,
        "runtimes": _runtimes(run.card, result),
        "compressions": run.compressions,
        "parity": run.parity,
        "matrix": _matrix(run),
        "recalls": _recalls(run),
        "confused": _confused(run),
        "mistakes": [_mistake(one) for one in run.mistakes[: _LONG["mistakes"]]],
        "layers": _layers(run.layers),
        "long": _LONG,
        "stages": _stages(result["seconds"]),
        "facts": _facts(run.environment),
        "input": _input(result),
        "command": run.command,
        "folder": shlex.quote(run.folder.resolve().name),
    }


def headline(result: Record) -> str:
    """The winner in one line: what it is, how accurate, how fast, how large."""
    latency = (result["latency_ms"] or {}).get("p50")
    parts = [
        f"{_solid(percent(result['test']['top1']))} on {result['test']['n']:,} test images",
        *([_solid(human_ms(latency))] if latency is not None else []),
        _solid(human_bytes(result["shipped"]["size_bytes"])),
    ]
    return f"{result['winner']['name']}, {result['shipped']['format']}: {', '.join(parts)}"


def verdict(limit: Record) -> Verdict:
    """A limit of the budget beside what was measured, written with enough digits to tell the two apart."""
    asked, found, upper = limit["limit"], limit["measured"], limit["op"].startswith("<")
    name = limit["name"]
    asked_text, found_text = _apart(name, asked, found)
    full = 1.0 if name == "accuracy" else max(asked, 0 if found is None else found, 1e-12) * (1.0 if upper else 1.15)
    return Verdict(
        name=_LIMITS.get(name, name),
        limit=f"{'≤' if upper else '≥'} {asked_text}",
        measured=found_text if found is not None else "not measured",
        met=limit["met"],
        margin=_margin(name, asked, found, upper),
        fill=0.0 if found is None else found / full,
        mark=asked / full,
    )


def shortfall(budget: Sequence[Record]) -> str:
    """The limits that were not met, each with how far it fell short; empty where all were met."""
    missed = [verdict(limit) for limit in budget if not limit["met"]]
    return "; ".join(
        f"{one.name}, {_solid(one.measured)} against {_solid(one.limit)} ({_solid(one.margin)})" for one in missed
    )


def _write(name: str, value: float, digits: int) -> str:
    """A value of the budget; accuracies count digits after the point, the others significant ones."""
    writers = {"latency": human_ms, "size": human_bytes, "memory": human_bytes}
    return percent(value, digits - 2) if name == "accuracy" else writers.get(name, human_count)(value, digits)


def _apart(name: str, limit: float, measured: float | None) -> tuple[str, str]:
    if measured is None:
        return _write(name, limit, 3), DASH
    digits = 3
    while measured != limit and digits < 9 and _write(name, limit, digits) == _write(name, measured, digits):
        digits += 1
    return _write(name, limit, digits), _write(name, measured, digits)


def _margin(name: str, limit: float, measured: float | None, upper: bool) -> str:
    """How far the measured value is on the right or on the wrong side of its limit."""
    if measured is None:
        return DASH
    if measured == limit:
        return "exactly at the limit"
    if name == "accuracy":
        return f"{points(abs(measured - limit)).lstrip('+')} {'above' if measured > limit else 'below'}"
    if limit == 0:
        return f"{_write(name, measured, 3)} over"
    share = percent(abs(measured - limit) / abs(limit))
    if upper:
        return f"{share} to spare" if measured < limit else f"{share} over"
    return f"{share} above" if measured > limit else f"{share} below"


def _races(run: FinishedRun) -> list[dict[str, Any]]:
    """The plots of accuracy against latency and size; one without anything to show is left out."""
    result = run.result
    latency = (result["latency_ms"] or {}).get("p50")
    size = result["shipped"]["size_bytes"]
    costs = {
        "latency": ("latency of one image", human_ms, lambda one: one.latency_ms, latency),
        "size": ("file size", human_bytes, lambda one: one.size_bytes, size),
    }
    trials = {trial["name"]: trial for trial in run.rungs if trial["val_top1"] is not None}
    races: list[dict[str, Any]] = []
    for name, (title, write, cost, final) in costs.items():
        trained = [one for one in run.candidates if one.val_top1 is not None and cost(one) is not None]
        limit = next((one["limit"] for one in result["budget"] if one["name"] == name), None)
        shipped = _shipped_point(result, final, write)
        if not trained and (shipped is None or not run.candidates):
            continue
        axis = plots.Axis(title, write, limit)
        marks = [_point(one, cost(one), write, trials.get(one.name)) for one in trained]
        rest = [cost(one) for one in run.candidates if one.val_top1 is None and cost(one) is not None]
        races.append({"title": f"Accuracy against {name}", "svg": Markup(plots.race(name, marks, rest, shipped, axis))})
    return races


def _point(one: Candidate, cost: float, write: Callable[[float], str], trial: Record | None) -> plots.Point:
    """A candidate by its last trial: the winner's own accuracy is that of its whole training, which no other had."""
    top1, epochs = (trial["val_top1"], trial["epochs"]) if trial else (one.val_top1 or 0.0, one.epochs)
    length = "" if epochs is None else f" after {epochs:.3g} epochs"
    tip = f"{one.number}. {one.name}: {percent(top1)}{length}, {write(cost)}"
    return plots.Point(one.number, cost, top1, one.status == "winner", tip)


def _shipped_point(result: Record, cost: float | None, write: Callable[[float], str]) -> plots.Point | None:
    if cost is None:
        return None
    top1 = result["validation"]["top1"]
    tip = f"shipped: {result['winner']['name']}, {result['shipped']['format']}: {percent(top1)}, {write(cost)}"
    return plots.Point(0, cost, top1, True, tip)


def _reasons(candidates: Sequence[Candidate]) -> str:
    """How many candidates there were and what became of them, as one sentence."""
    dropped, waiting = (sum(one.status == status for one in candidates) for status in ("dropped", "not tried"))
    parts = [
        f"{count} {'was' if count == 1 else 'were'} {fate}"
        for count, fate in (
            (len(candidates) - dropped - waiting, "trained"),
            (dropped, "dropped before any training"),
            (waiting, "left untried"),
        )
        if count
    ]
    text = ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else "".join(parts) or "none was trained"
    return f"Of {_plural(len(candidates), 'candidate')}, {text}."


def _rungs(trials: Sequence[Record]) -> list[dict[str, Any]]:
    """One row per rung of the successive halving."""
    rows: list[dict[str, Any]] = []
    for rung in sorted({trial["rung"] for trial in trials}):
        mine = [trial for trial in trials if trial["rung"] == rung]
        epochs = sorted({trial["epochs"] for trial in mine if trial["epochs"] is not None})
        scores = [trial for trial in mine if trial["val_top1"] is not None]
        best = max(scores, key=lambda trial: trial["val_top1"], default=None)
        rows.append(
            {
                "rung": rung,
                "trials": len(mine),
                "epochs": DASH.join(f"{end:.2g}" for end in sorted({*epochs[:1], *epochs[-1:]})) or DASH,
                "seconds": sum(trial["seconds"] or 0.0 for trial in mine),
                "best": best,
            }
        )
    return rows


def _curves(final: Sequence[Epoch], trials: Sequence[Sequence[Epoch]]) -> list[dict[str, Any]]:
    """Loss, accuracy and learning rate over the epochs; a chart without a value is left out."""
    thin = [_series("thin", curve, "val_top1", "a trial") for curve in trials]
    charts = {
        "loss": ("Loss", [("train_loss", "main", "training"), ("val_loss", "second", "validation")], [], _plain),
        "accuracy": ("Validation accuracy", [("val_top1", "main", "final training")], thin, _whole_percent),
        "rate": ("Learning rate", [("lr", "main", "learning rate")], [], _plain),
    }
    curves: list[dict[str, Any]] = []
    for name, (title, keys, others, write) in charts.items():
        main = [_series(style, final, key, tip) for key, style, tip in keys]
        series = [line for line in [*others, *main] if line.x]
        if series:
            legend = [(line.style, line.tip) for line in main if line.x]
            legend += [("thin", "trials")] if any(line.x for line in others) else []
            svg = Markup(plots.lines(f"curve-{name}", title, series, write))
            curves.append({"title": title, "svg": svg, "legend": legend})
    return curves


def _series(style: str, epochs: Sequence[Epoch], key: str, tip: str) -> plots.Series:
    pairs = [(one.epoch, getattr(one, key)) for one in epochs if getattr(one, key) is not None]
    return plots.Series(style, [x for x, _ in pairs], [y for _, y in pairs], tip)


def _plain(value: float) -> str:
    return f"{value:.3g}"


def _whole_percent(value: float) -> str:
    return f"{value * 100:.3g} %"


def _variants(variants: Sequence[Record]) -> list[Record]:
    """The precisions, each with its change of accuracy against float32 where that was measured."""
    float_top1 = next((one["val_top1"] for one in variants if one["format"] == "float32"), None)

    def change(one: Record) -> float | None:
        if float_top1 is None or one["val_top1"] is None or one["format"] == "float32":
            return None
        return one["val_top1"] - float_top1

    return [{**one, "change": change(one)} for one in variants]


def _runtimes(card: Record | None, result: Record) -> list[Record]:
    """What was measured in each runtime, the fastest first; `share` of the slowest's time, `ships` where it does."""
    if card is None:
        return []
    measured = sorted((row for row in card["engines"] if row["p50"] is not None), key=lambda row: row["p50"])
    latency, shipped = result["latency_ms"] or {}, result["shipped"]

    def ships(row: Record) -> bool:
        return (row["engine"], row["format"]) == (latency.get("engine"), shipped["format"].partition(f", {PACKED}")[0])

    def spread(row: Record) -> tuple[float, float] | None:
        return (min(row["rounds"]), max(row["rounds"])) if row["rounds"] else None

    slowest = max((row["p50"] for row in measured), default=1.0)
    return [{**row, "share": row["p50"] / slowest, "ships": ships(row), "spread": spread(row)} for row in measured]


def _matrix(run: FinishedRun) -> dict[str, Any] | None:
    """The confusion matrix: rows of cells for a few classes, a figure for many."""
    counts = run.confusion
    if counts is None:
        return None
    if len(counts) > _MOST_NUMBERS:
        return {"svg": Markup(plots.confusion("confusion", counts)), "rows": []}
    rows: list[dict[str, Any]] = []
    for truth, row in enumerate(counts):
        total = sum(row) or 1
        cells = [_cell(count / total, count, truth == answer) for answer, count in enumerate(row)]
        rows.append({"name": run.classes[truth], "cells": cells})
    return {"svg": None, "rows": rows}


def _cell(share: float, count: int, right: bool) -> dict[str, Any]:
    """A cell's count and how strongly it is coloured; the cube root lets a few confusions in a hundred be seen."""
    strength = round(0.92 * (share if right else math.cbrt(share)), 3)
    return {"count": count, "right": right, "strength": strength, "dark": strength > 0.5}


def _recalls(run: FinishedRun) -> list[dict[str, Any]]:
    """Each class's share of right answers, in class order up to `long`, the worst first beyond."""
    rows = [
        {"number": index + 1, "name": name, "n": sum(row), "recall": row[index] / sum(row) if sum(row) else None}
        for index, (name, row) in enumerate(zip(run.classes, run.confusion or [], strict=False))
    ]
    if len(rows) > _LONG["classes"]:
        rows.sort(key=lambda row: math.inf if row["recall"] is None else row["recall"])
    return rows


def _confused(run: FinishedRun) -> list[dict[str, Any]]:
    """The ten pairs of classes that are confused most often."""
    names = run.classes
    pairs = [
        {"truth": names[truth], "answer": names[answer], "count": count, "share": count / sum(row)}
        for truth, row in enumerate(run.confusion or [])
        for answer, count in enumerate(row)
        if count and truth != answer
    ]
    return sorted(pairs, key=lambda pair: -pair["count"])[:10] if len(names) > 2 else []


def _mistake(record: Record) -> Record:
    size = picture_size(record["png"]) or (0, 0)
    return {**record, "pixelated": max(size) <= _MOST_PIXELS, "wide": size[0] >= size[1]}


def _layers(layers: Sequence[Record]) -> dict[str, Any]:
    """The layers with each one's share of the whole, and the sums of the columns."""
    totals = {key: sum(layer[key] for layer in layers) for key in ("params", "macs")}
    largest = {key: max((layer[key] for layer in layers), default=0) or 1 for key in totals}
    rows = [
        {
            **layer,
            "output": f" {TIMES} ".join(str(side) for side in layer["shape"] or []) or DASH,
            "bars": {key: layer[key] / largest[key] for key in totals},
        }
        for layer in layers
    ]
    return {"rows": rows, "totals": totals}


def _stages(seconds: Record) -> list[dict[str, Any]]:
    """The stages that took time with their shares of the whole; what no stage accounts for is `other`."""
    known = {title: seconds[key] for key, title in _STAGES.items() if seconds.get(key)}
    total = max(seconds.get("total") or 0.0, sum(known.values()))
    rest = total - sum(known.values())
    if total and rest > 0.005 * total:
        known["Other"] = rest
    return [{"title": title, "seconds": value, "share": value / total} for title, value in known.items()]


def _facts(environment: Record, prefix: str = "") -> list[tuple[str, str]]:
    """What environment.json says, flattened to lines of name and value."""
    lines: list[tuple[str, str]] = []
    for key, value in environment.items():
        name = f"{prefix}{key.replace('_', ' ')}"
        if isinstance(value, dict):
            lines += _facts(value, "" if key == "versions" else f"{name}: ")
        elif isinstance(value, list):
            lines.append((name, ", ".join(str(item) for item in value)))
        elif key.endswith("_bytes") and isinstance(value, int):
            lines.append((name.removesuffix(" bytes"), human_bytes(value)))
        elif value is not None:
            lines.append((name, {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)))
    return lines


def _input(result: Record) -> str:
    """The shape of the shipped file's input, with its height and width where the winner's spec tells them."""
    channels = result["data"]["channels"] or 3
    shape = (result["winner"]["spec"] or {}).get("input")
    sides = ["H", "W"]
    if isinstance(shape, list) and len(shape) == 3 and channels in (shape[0], shape[2]):
        sides = shape[1:] if shape[0] == channels else shape[:2]
    return f"[N, {sides[0]}, {sides[1]}, {channels}]"


def _plural(count: float, noun: str) -> str:
    return f"{count:,g} {noun}{'' if count == 1 else 's'}"
