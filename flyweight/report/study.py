"""What a study leaves for people: a page, its table as CSV, and its figures."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flyweight.report.curves import draw
from flyweight.units import human_bytes, human_count, human_ms, human_seconds, percent

Row = Mapping[str, Any]
LEFT_OUT = ("name", "settings", "each")


def write_study(folder: Path, result: Mapping[str, Any]) -> None:
    """Writes results.md, results.csv, accuracy.svg and cost.svg from what stands in results.json."""
    (folder / "results.csv").write_text(_csv(result["points"]), encoding="utf-8")
    (folder / "results.md").write_text(_page(result), encoding="utf-8")
    draw(folder, result)


def spread(row: Row) -> str:
    """A point's accuracy with the lowest and the highest of its trainings."""
    if row["val_top1"] is None:
        return "diverged" if row["diverged"] else "not trained"
    among = f" ({percent(row['lowest'])} … {percent(row['highest'])}, n = {row['n']})" if row["n"] > 1 else ""
    return percent(row["val_top1"]) + among


def cells(row: Row) -> dict[str, str]:
    """A point as a row of a table: title → text."""
    return {
        **{name: str(value) for name, value in row["settings"].items()},
        "validation": spread(row),
        "parameters": human_count(row["params"]),
        "MACs": human_count(row["macs"]),
        "float32 weights": human_bytes(row["weight_bytes"]),
        "file": human_bytes(row["file_bytes"]),
        "latency": human_ms(row["latency_ms"]),
    }


def _csv(rows: Sequence[Row]) -> str:
    """A column for each varied value and each figure."""
    text = io.StringIO()
    keys = [key for key in rows[0] if key not in LEFT_OUT]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*rows[0]["settings"], *keys])
    for row in rows:
        writer.writerow([*row["settings"].values(), *(row[key] for key in keys)])
    return text.getvalue()


def _cores(count: int) -> str:
    return "1 core" if count == 1 else f"{count} cores"


def _page(result: Mapping[str, Any]) -> str:
    rows = [cells(row) for row in result["points"]]
    table = ["|".join(["", *each, ""]) for each in (rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows))]
    return f"""# {result["model"]}: {", ".join(result["vary"])}

    {result["command"]}

Each training: {result["planned"]:.3g} epochs of {result["train"]} pictures, computed in {result["precision"]}.
One seed sees the same pictures in the same order at every point. Accuracy: the mean on {result["validation"]}
validation pictures that no training saw; in brackets the lowest and the highest of n trainings. File and latency (of
one picture, on {_cores(result["threads"])}): the network as exported, in float32 or int8, whichever is smaller or
faster. It took {human_seconds(result["seconds"])} on {_cores(result["cores"])} ({result["processor"]}).

{chr(10).join(table)}

![Accuracy along each varied value](accuracy.svg)

![Accuracy against what it costs](cost.svg)
"""
