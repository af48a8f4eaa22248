"""What a person at a terminal sees: progress, plans, results, tables. Plain lines where the output is no terminal."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from flyweight.units import budget_value, human_bytes, human_ms, percent

if TYPE_CHECKING:
    from flyweight.costs import NetCost
    from flyweight.fitting import Outlook
    from flyweight.net import Spec
    from flyweight.run import Run

PLAIN_LINE_SECONDS = 30.0
SHOWN = 12


class Progress:
    """Follows a job's records on stderr: a bar on a terminal, else a line now and then."""

    def __init__(self, quiet: bool) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.quiet = quiet
        self.bar: Bar | None = None
        self.task: Any = None
        self.stage = ""
        self.said = 0.0

    def __enter__(self) -> "Progress":
        if self.console.is_terminal and not self.quiet:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f} %"),
                TimeElapsedColumn(),
            )
            self.bar = Bar(*columns, console=self.console, transient=True)
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()

    def listen(self, record: Mapping[str, Any]) -> None:
        """Shows one record."""
        if self.quiet:
            return
        if record["kind"] == "progress":
            self._progress(record["stage"], record["share"])
        elif line := _line(record):
            self.console.print(escape(line))

    def _progress(self, stage: str, share: float) -> None:
        if self.bar:
            if stage != self.stage:
                if self.task is not None:
                    self.bar.remove_task(self.task)
                self.task = self.bar.add_task(escape(stage), total=1.0)
            self.bar.update(self.task, completed=min(1.0, share))
        elif stage != self.stage or time.monotonic() - self.said > PLAIN_LINE_SECONDS:
            self.said = time.monotonic()
            if share > 0 and stage == self.stage:
                self.console.print(escape(f"{stage}: {100 * min(1.0, share):.0f} %"))
        self.stage = stage


def _line(record: Mapping[str, Any]) -> str:
    """A record as a line for people, or nothing where it says too little."""
    match record["kind"]:
        case "data":
            parts = f"{record['train']} to train, {record['validation']} to choose, {record['test']} to test"
            notes = "".join(f"\n  note: {note}" for note in record["notes"])
            return f"data: {len(record['classes'])} classes; pictures: {parts}{notes}"
        case "candidate" if record["latency_ms"] is not None:
            fate = f"dropped: {record['why']}" if record["status"] == "dropped" else "fits"
            return f"{record['name']}: {human_ms(record['latency_ms'])}, {human_bytes(record['size_bytes'])}, {fate}"
        case "trial" if record["val_top1"] is not None:
            score = f"{percent(record['val_top1'])} after {record['epochs']:.2f} epochs"
            return f"trial {record['rung'] + 1}: {record['name']} {score}"
        case "winner":
            return f"chosen: {record['name']}, to be trained for {record['seconds']:.0f} s"
        case "restart":
            return f"{record['name']} begins again at half the learning rate: {record['why']}"
        case "epoch" if record["stage"] == "final":
            return f"epoch {record['epoch']:.1f}: {percent(record['val_top1'])} on validation"
        case "variant":
            mark = "ships" if record["chosen"] else record["why"]
            shown = human_bytes(record["size_bytes"]), human_ms(record["latency_ms"]), percent(record["val_top1"])
            return f"{record['format']}: {', '.join(shown)} ({mark})"
        case "parity":
            verdict = "passed" if record["passed"] else "failed"
            return f"parity {verdict}: {percent(record['agreement'])} same answers on {record['n']} validation pictures"
        case "log":
            return record["message"]
        case _:
            return ""


def show_result(run: "Run", as_json: bool) -> None:
    """The outcome of a run on stdout."""
    result = run.result
    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return
    console = Console(highlight=False, soft_wrap=True)
    test, clean = result["test"], result.get("test_clean")
    low, high = test["ci95"]
    console.print(f"\n{escape(result['winner']['name'])}, {result['shipped']['format']}: budget {result['status']}")
    for line in result["budget"]:
        mark = "met" if line["met"] else "NOT MET"
        limit, measured = (budget_value(line["name"], line[key]) for key in ("limit", "measured"))
        console.print(f"  {line['name']} {line['op']} {limit}: {measured} ({mark})")
    console.print(f"  test: {percent(test['top1'])} of {test['n']} ({percent(low)} to {percent(high)})")
    if clean:
        repeated = f"without {clean['duplicates']} that repeat training pictures"
        console.print(f"  test, {repeated}: {percent(clean['top1'])} of {clean['n']}")
    console.print(f"  {escape(result['with_more_time'])}")
    console.print(f"model:  {escape(str(run.folder / result['shipped']['file']))}")
    console.print(f"report: {escape(str(run.folder / 'report.html'))}")


def show_outlook(outlook: "Outlook", as_json: bool) -> None:
    """A dry run on stdout: what falls and why, what would be tried, the plan for the time."""
    rungs = [{"candidates": rung.candidates, "seconds": round(rung.seconds, 1)} for rung in outlook.rungs]
    if as_json:
        value = {
            "candidates": [candidate.to_json() for candidate in outlook.pool],
            "order": [candidate.name for candidate in outlook.order],
            "rungs": rungs,
            "seconds": outlook.seconds,
        }
        print(json.dumps(value, indent=2))
        return
    rows = [
        {
            "candidate": candidate.name,
            "params": candidate.cost.params if candidate.cost else None,
            "macs": candidate.macs,
            "fate": f"dropped: {candidate.why}" if candidate.status == "dropped" else "to be measured",
        }
        for candidate in outlook.pool
    ]
    print_table(rows)
    if outlook.order:
        more = f", … ({len(outlook.order) - SHOWN} more)" if len(outlook.order) > SHOWN else ""
        print(f"\n{len(outlook.order)} of {len(outlook.pool)} candidates would be measured, the likeliest first:")
        print("  " + ", ".join(candidate.name for candidate in outlook.order[:SHOWN]) + more)
    else:
        print(
            f"\nnone of {len(outlook.pool)} candidates can meet the budget: the nearest would be trained (exit code 3)"
        )
    for i, rung in enumerate(rungs, start=1):
        print(f"trial {i}: {rung['candidates']} candidates, {rung['seconds']} s each")
    print("time: " + ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in outlook.seconds.items()))


def show_cost(name: str, spec: "Spec", counted: "NetCost", per_layer: bool, as_json: bool) -> None:
    """An exact count on stdout."""
    totals = {
        "name": name,
        "input": list(spec.input),
        "classes": spec.args.get("num_classes"),
        "params": counted.params,
        "macs": counted.macs,
        "flops": counted.flops,
        "weight_bytes": {"float32": 4 * counted.weight_values, "int8": counted.weight_values},
        "peak_activation_bytes": {"float32": 4 * counted.peak_values, "int8": counted.peak_values},
        "memory_bytes": {"float32": counted.memory_bytes(4), "int8": counted.memory_bytes(1)},
    }
    layers = [
        {
            "layer": each.path,
            "kind": each.leaf,
            "shape": "x".join(map(str, each.shape)),
            "params": each.params,
            "macs": each.macs,
        }
        for each in counted.layers
    ]
    if as_json:
        print(json.dumps(totals | ({"layers": layers} if per_layer else {}), indent=2))
        return
    if per_layer:
        print_table(layers)
        print()
    print(f"{name}: input {'x'.join(map(str, spec.input))}, {totals['classes']} classes")
    print(f"  parameters              {counted.params:>15,}")
    print(f"  multiply-accumulates    {counted.macs:>15,}  (FLOPs = 2 x MACs = {counted.flops:,})")
    print(f"  weights, deployed       {4 * counted.weight_values:>15,}  bytes in float32 (batch normalisation folded)")
    print(f"  peak activations        {4 * counted.peak_values:>15,}  bytes in float32, by liveness, for one picture")


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of equal keys as aligned columns: ruled on a terminal, plain and whole elsewhere."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=10_000)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for key, value in rows[0].items():
        table.add_column(key, justify="right" if isinstance(value, int) else "left", overflow="fold")
    for row in rows:
        table.add_row(*(f"{value:,}" if isinstance(value, int) else escape(str(value)) for value in row.values()))
    console.print(table)
    sys.stdout.flush()
