"""Writes docs/models.md from the registry and docs/data/latency.json, and the published tables into docs/cost.md.

python -m scripts.models_page
"""

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from flyweight import zoo
from flyweight.costs import cost
from flyweight.tables import Row, rows
from flyweight.units import DASH, human_bytes, human_count, human_ms

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "models.md"
COST_PAGE = DOCS / "cost.md"
LATENCY = DOCS / "data" / "latency.json"
TABLES = "<!-- tables: written by `python -m scripts.models_page` -->\n"
TABLES_END = "<!-- end of tables -->\n"
SMALL = 32

HEAD = """\
# Models

<!-- Written by `python -m scripts.models_page`; changes here are lost. -->

{count} networks of {families} families. `flyweight.create_model(name)` builds one, `flyweight cost NAME --per-layer`
counts one layer by layer; [cost.md](cost.md) says what is counted.

- **params**: trainable parameters, batch normalisation included, for 1000 classes; for 10 where the usual input has 32
  pixels.
- **MACs**: multiply-accumulates for one picture of **px** × **px** pixels, the usual input. FLOPs = 2 × MACs. Auxiliary
  heads, which are not deployed, count nowhere.
- **least px**: the smallest square input that leaves the last feature map a position.
- **float32**, **int8**: bytes of the deployed weights, batch normalisation folded; in int8 a bias keeps four bytes.
- **latency**: one picture in float32 on {threads} thread of {processor},
  {engine}: the median of {rounds} rounds, and their range. Another machine ranks them differently.
"""
COLUMNS = ("name", "params", "MACs", "px", "least px", "float32", "int8", "latency")


def row(name: str, latency: Mapping[str, Any] | None) -> str:
    """One model's line of the table."""
    spec = zoo.usual_spec(name)
    counted = cost(spec)
    measured = DASH
    if latency:
        low, high = human_ms(latency["low_ms"]), human_ms(latency["high_ms"])
        measured = f"{human_ms(latency['p50_ms'])} ({low} to {high})"
    cells = (
        f"`{name}`",
        f"{counted.params:,}",
        human_count(counted.macs),
        str(spec.input[1]),
        str(zoo.smallest_input(spec)),
        human_bytes(counted.weight_bytes("float32")),
        human_bytes(counted.weight_bytes("int8")),
        measured,
    )
    return f"| {' | '.join(cells)} |"


def section(family: str, module: ModuleType, latencies: Mapping[str, Mapping[str, Any]]) -> str:
    """A family: what its file says of the paper, its reference, and its models."""
    about = "\n\n".join((inspect.getdoc(module) or "").split("\n\n")[:2])
    about = re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", about)
    lines = [f"| {' | '.join(COLUMNS)} |", "|---|" + "---:|" * (len(COLUMNS) - 1)]
    lines += [row(name, latencies.get(name)) for name in module.VARIANTS]
    return f"## {family}\n{about}\n\nReference: {module.REFERENCE}.\n\n" + "\n".join(lines) + "\n"


def page(measured: Mapping[str, Any]) -> str:
    """The whole page; `measured` is what docs/data/latency.json holds."""
    environment = measured["environment"]
    head = HEAD.format(
        count=len(zoo.variants()),
        families=len(zoo.families()),
        threads=environment["threads"],
        processor=environment["processor"],
        engine=f"onnxruntime {environment['versions']['onnxruntime']}",
        rounds=measured["rounds"],
    )
    sections = [section(family, module, measured["models"]) for family, module in zoo.families().items()]
    return "\n".join([head, *sections])


def tables(found: Sequence[Row]) -> str:
    """How many figures of each source agree, and every one that does not, with its reason."""
    lines = ["| source | figures | agree |", "|---|---:|---:|"]
    for source in dict.fromkeys(each.source for each in found):
        own = [each for each in found if each.source == source]
        lines.append(f"| {source} | {len(own)} | {sum(each.agrees for each in own)} |")
    lines += ["", "| source | figure | published | ours | counted so | why |", "|---|---|---:|---:|---:|---|"]
    for each in found:
        if not each.agrees:
            recount = DASH if each.recount is None else f"{each.recount:.6g}"
            figures = f"{each.figure} | {each.ours:.6g} | {recount}"
            lines.append(f"| {each.source} | {each.what} | {figures} | {each.why} |")
    return "\n".join(lines) + "\n"


def with_tables(text: str, found: Sequence[Row]) -> str:
    """docs/cost.md with what stands between its two marks replaced."""
    head, _, rest = text.partition(TABLES)
    return head + TABLES + tables(found) + TABLES_END + rest.partition(TABLES_END)[2]


def main() -> None:
    """Writes both pages."""
    measured = json.loads(LATENCY.read_text(encoding="utf-8"))
    cost_page = COST_PAGE.read_text(encoding="utf-8")
    for path, text in ((PAGE, page(measured)), (COST_PAGE, with_tables(cost_page, rows()))):
        path.write_text(text, encoding="utf-8", newline="\n")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
