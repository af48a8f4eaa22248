"""What a person at a terminal sees: progress, plans, results, tables. Plain lines where the output is no terminal."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from flyweight.units import budget_value, human_bytes, human_ms, human_seconds, percent

if TYPE_CHECKING:
    from flyweight.bench.profile import Table as LatencyTable
    from flyweight.costs import LayerCost, NetCost
    from flyweight.fitting import Outlook
    from flyweight.net import Spec
    from flyweight.profiling import Checked
    from flyweight.run import Run
    from flyweight.tables import Row

PLAIN_LINE_SECONDS = 30.0
SHOWN = 12
MOST_CONFUSED = 12  # classes up to which a confusion is printed


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
        case "teacher" if record["val_top1"] is not None:
            return f"it also learns from {record['name']}: {percent(record['val_top1'])} on validation"
        case "restart":
            return f"{record['name']} begins again at half the learning rate: {record['why']}"
        case "epoch" if record["stage"] == "final":
            return f"epoch {record['epoch']:.1f}: {percent(record['val_top1'])} on validation"
        case "variant":
            mark = "ships" if record["chosen"] else record["why"]
            engine = "" if record["engine"] == "onnxruntime" else f" in {record['engine']}"
            shown = human_bytes(record["size_bytes"]), human_ms(record["latency_ms"]), percent(record["val_top1"])
            return f"{record['format']}{engine}: {', '.join(shown)} ({mark})"
        case "compression":
            return f"{record['step']}: {record['note']}"
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


def show_sweep(result: Mapping[str, Any], as_json: bool) -> None:
    """A study on stdout: a line for each point, in the order of the varied values."""
    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return
    from flyweight.report.study import cells

    print(f"{result['model']}, {result['planned']:.3g} epochs each, {human_seconds(result['seconds'])} in all")
    print_table([cells(row) for row in result["points"]])
    print(f"results and figures: {result['folder']}/results.md")


def show_training(result: Mapping[str, Any], as_json: bool) -> None:
    """The outcome of one training on stdout."""
    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return
    network, seconds = result["network"], result["seconds"]["training"]
    print(f"\n{network['name']}: {result['epochs']:.3g} epochs, {result['steps']} steps, {human_seconds(seconds)}")
    for split in ("train", "validation", "test"):
        print(f"  {split:<11}{percent(result[split]['top1'])} of {result[split]['n']}")
    if clean := result.get("test_clean"):
        repeated = f"without {clean['duplicates']} that repeat training pictures"
        print(f"  test, {repeated}: {percent(clean['top1'])} of {clean['n']}")
    print(f"network: {result['folder']}/model.safetensors")


def show_compression(result: Mapping[str, Any], as_json: bool) -> None:
    """The outcome of a compression on stdout."""
    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return
    size, validation = result["shipped"]["size_bytes"], result["validation"]
    smaller = result["float_bytes"] / size
    print(f"\n{human_bytes(size)} ({size:,} bytes), {smaller:.1f} times smaller than the network's float32 weights")
    lost = 100 * (validation["top1"] - validation["before"])
    print(f"  validation {percent(validation['top1'])} of {validation['n']} ({lost:+.2f} points)")
    print(f"  test       {percent(result['test']['top1'])} of {result['test']['n']}")
    print(f"  latency    {human_ms(result['latency_ms']['p50'])}")
    print(f"model: {result['folder']}/model.fly")


def show_outlook(outlook: "Outlook", as_json: bool) -> None:
    """A dry run on stdout: what falls and why, what would be tried, the plan for the time."""
    rungs = [{"candidates": rung.candidates, "seconds": round(rung.seconds, 1)} for rung in outlook.rungs]
    if as_json:
        value = {
            "candidates": [candidate.to_json() for candidate in outlook.pool],
            "order": [candidate.name for candidate in outlook.order],
            "rungs": rungs,
            "seconds": outlook.seconds,
            "notes": list(outlook.notes),
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
    for note in outlook.notes:
        print(note)


def show_cost(name: str, spec: "Spec", counted: "NetCost", per_layer: bool, as_json: bool) -> None:
    """An exact count on stdout."""
    precisions = ("float32", "float16", "int8")
    totals = {
        "name": name,
        "input": list(spec.input),
        "classes": spec.args.get("num_classes"),
        "params": counted.params,
        "macs": counted.macs,
        "flops": counted.flops,
        "weight_bytes": {each: counted.weight_bytes(each) for each in precisions},
        "activation_bytes": {each: counted.activation_bytes(each) for each in precisions},
        "peak_activation_bytes": {each: counted.peak_bytes(each) for each in precisions},
        "memory_bytes": {"float32": counted.memory_bytes(4), "int8": counted.memory_bytes(1)},
        "receptive_field": list(counted.receptive_field),
        "arithmetic_intensity": round(counted.intensity, 3),
    }
    if as_json:
        layers = [_layer_row(each) for each in counted.layers]
        print(json.dumps(totals | ({"layers": layers} if per_layer else {}), indent=2))
        return
    if per_layer:
        print_table([_layer_row(each) for each in counted.layers])
        print()
    shown = {each: f"{counted.weight_bytes(each):,}" for each in precisions}
    print(f"{name}: input {'x'.join(map(str, spec.input))}, {totals['classes']} classes")
    print(f"  parameters              {counted.params:>15,}  as papers count them, batch normalisation included")
    print(f"  multiply-accumulates    {counted.macs:>15,}  (FLOPs = 2 x MACs = {counted.flops:,})")
    other = f"{shown['float16']} float16, {shown['int8']} int8"
    print(f"  weight bytes            {shown['float32']:>15}  in float32, {other}")
    print(f"  activation bytes        {counted.activation_bytes():>15,}  in float32, all that one picture writes")
    print(f"  peak activation bytes   {counted.peak_bytes():>15,}  in float32, alive at once")
    field = "x".join(map(str, counted.receptive_field))
    print(f"  receptive field         {field:>15}  pixels, of the last feature map")
    print(f"  arithmetic intensity    {counted.intensity:>15.1f}  FLOPs for each byte moved in float32")
    print("  Counted as deployed: batch normalisation folded into convolutions, no auxiliary heads.")


def _layer_row(layer: "LayerCost") -> dict[str, Any]:
    return {
        "layer": layer.path,
        "kind": layer.leaf,
        "shape": "x".join(map(str, layer.shape)),
        "params": layer.params,
        "macs": layer.macs,
        "weights": layer.weights + layer.biases,
        "activations": layer.values,
        "field": "x".join(map(str, layer.field)),
        "flops/byte": round(layer.intensity, 1),
    }


def show_tables(rows: Sequence["Row"], as_json: bool) -> None:
    """Published figures beside ours on stdout."""
    if as_json:
        print(json.dumps([row.to_json() for row in rows], indent=2))
        return
    shown = [
        {
            "source": row.source,
            "figure": row.what,
            "published": row.figure,
            "ours": f"{row.ours:.7g}",
            "difference": "" if row.agrees else f"{row.difference:+.3g}",
            "counted so": "" if row.recount is None else f"{row.recount:.7g}",
            "why": row.why,
        }
        for row in rows
    ]
    print_table(shown)
    agree, explained = sum(row.agrees for row in rows), sum(bool(row.why) for row in rows)
    print(f"\n{agree} of {len(rows)} figures agree as printed, {explained} differ for the reason given")


def show_features(files: Sequence[Path], model: str, size: int, judged: Mapping[str, float], as_json: bool) -> None:
    """Where the features are, whose they are, and how far they carry."""
    if as_json:
        told = {"folder": str(files[0].parent), "files": [each.name for each in files], "model": model}
        print(json.dumps({**told, "features": size, **judged}, indent=2))
        return
    n = int(judged["n"])
    print(f"{', '.join(map(str, files))}: {size} values for each picture, by {model}")
    print(f"  linear probe       {percent(judged['linear_probe_top1'])} of {n} test pictures that repeat no other")
    print(f"  nearest neighbour  {percent(judged['nearest_neighbour_top1'])}")


def show_evaluation(scored: Mapping[str, Any], as_json: bool) -> None:
    """A classifier's scores on stdout; the confusion as a table where there are few classes."""
    if as_json:
        print(json.dumps(scored, indent=2, ensure_ascii=False))
        return
    low, high = scored["ci95"]
    print(f"{scored['model']} on the {scored['n']} {scored['split']} pictures of {scored['data']}")
    print(f"  top-1              {percent(scored['top1'])}  (95 % interval {percent(low)} to {percent(high)})")
    if clean := scored.get("clean"):
        repeated = f"of the {clean['n']} that repeat no training picture"
        print(f"  top-1              {percent(clean['top1'])}  {repeated}")
    print(f"  top-5              {percent(scored['top5'])}")
    print(f"  calibration error  {percent(scored['ece'])}")
    speed, setting = scored["throughput"]["images_per_second"], scored["throughput"]
    spread = f"{speed['min']:.0f} to {speed['max']:.0f} in {speed['n']} rounds"
    how = f"batches of {setting['batch']}, {setting['threads']} thread(s)"
    print(f"  images a second    {speed['median']:.0f}  ({spread}; {how})\n")
    print_table([_class_row(each) for each in scored["classes"]])
    if len(scored["classes"]) <= MOST_CONFUSED:
        names = [each["name"] for each in scored["classes"]]
        print("\nA row for each class, a column for each answer:")
        rows = zip(names, scored["confusion"], strict=True)
        print_table([{"class": name, **dict(zip(names, row, strict=True))} for name, row in rows])


def _class_row(score: Mapping[str, Any]) -> dict[str, Any]:
    shares = {key: "" if score[key] is None else percent(score[key]) for key in ("recall", "precision")}
    return {"class": score["name"], "pictures": score["n"], **shares}


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of equal keys as aligned columns: ruled on a terminal, plain and whole elsewhere."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=10_000)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for key, value in rows[0].items():
        table.add_column(key, justify="right" if isinstance(value, int | float) else "left", overflow="fold")
    for row in rows:
        table.add_row(*(f"{cell:,}" if isinstance(cell, int | float) else escape(str(cell)) for cell in row.values()))
    console.print(table)
    sys.stdout.flush()


def show_profile(path: Path, table: "LatencyTable", checked: Sequence["Checked"], as_json: bool) -> None:
    """A latency table's parts, and its error on networks that it was made without."""
    from flyweight.profiling import summary

    parts = [
        {"engine": each.engine, "version": each.version, "format": each.format, "threads": each.threads}
        | {"kernels": len(each.timings)}
        for each in table.parts
    ]
    errors = summary(checked)
    if as_json:
        rows = [asdict(each) for each in checked]
        print(json.dumps({"file": str(path), "parts": parts, "check": {"summary": errors, "nets": rows}}, indent=2))
        return
    print_table(parts)
    if checked:
        print()
        print_table([_checked_row(each) for each in checked])
        print("\nOf |predicted / measured - 1|:")
        shown = [each | {"median": percent(each["median"]), "p90": percent(each["p90"])} for each in errors]
        print_table(shown)
    print(f"\n{path}")


def _checked_row(each: "Checked") -> dict[str, Any]:
    told = {"network": each.name, "engine": each.engine, "format": each.format, "threads": each.threads}
    times = {"predicted": human_ms(each.predicted), "measured": human_ms(each.measured)}
    return {**told, **times, "error": f"{100 * each.error:+.1f} %"}


def show_exports(summary: Mapping[str, Any], as_json: bool) -> None:
    """What was exported, and how near its answers are."""
    if as_json:
        print(json.dumps(summary, indent=2, ensure_ascii=False))
        return
    rows = []
    for each in summary["exports"]:
        parity = each["parity"]
        lost = 100 * (parity["exported_top1"] - parity["pytorch_top1"])
        row = {"folder": each["place"], "precision": each["format"], "size": human_bytes(sum(each["files"].values()))}
        row |= {"proven in": each["engine"], "same answers": percent(parity["agreement"]), "points": f"{lost:+.2f}"}
        rows.append(row | {"largest difference": f"{parity['worst']['difference']:.2g}"})
    print_table(rows)
    print(f"\n{summary['folder']}: each answered the {summary['n']} validation pictures in its own runtime")


def show_bench(card: Mapping[str, Any]) -> None:
    """Everything that was measured of a network or a file, the fastest first."""
    print(f"{card['model']}  ({card['environment']['processor']}, {card['environment']['cores']} cores)")
    if "macs" in card:
        print(f"{card['macs']:,} multiply-accumulates ({card['flops']:,} FLOPs), {card['params']:,} parameters")
        for threads, rates in card["peak_macs_per_second"].items():
            told = ", ".join(f"{name} {rate / 1e9:.0f} G" for name, rate in rates.items())
            print(f"multiply-accumulates a second on {threads} core{'s' * (threads != '1')}, at most: {told}")
    rows = sorted((row for row in card["engines"] if not row["failed"]), key=lambda row: (row["threads"], row["p50"]))
    print_table([_timing_row(row) for row in rows])
    for row in card["engines"]:
        if row["failed"]:
            print(f"not measured: {row['failed']}")
    print()


def _timing_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """One engine's, as a row for people."""
    low, high = min(row["rounds"]), max(row["rounds"])
    told = {"engine": row["engine"], "precision": row["format"], "threads": row["threads"]}
    told |= {"p50": human_ms(row["p50"]), "rounds": f"{human_ms(low)} to {human_ms(high)}"}
    told |= {"p95": human_ms(row["p95"]), "p99": human_ms(row["p99"]), "cold": human_ms(row["cold_ms"])}
    told |= {"memory": human_bytes(row["peak_bytes"]), "files": human_bytes(row["file_bytes"])}
    told |= {f"/s by {batch}": f"{rate:.0f}" for batch, rate in row["throughput"].items()}
    if row.get("agreement") is not None:
        told["same answers"] = percent(row["agreement"])
    if row.get("of_peak") is not None:
        told["of the peak"] = percent(row["of_peak"])
    return told
