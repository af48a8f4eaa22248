"""The figures of a study: accuracy along each varied value, and against what it costs, as SVG files."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flyweight.units import human_bytes, human_count, human_ms, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

# Told apart by the colour-blind too (Okabe and Ito, Color Universal Design, 2008), and by their markers.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#333333")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
PANEL = (4.3, 3.3)  # inches
COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "macs": ("multiply-accumulates", human_count),
    "params": ("parameters", human_count),
    "latency_ms": ("latency of one picture", human_ms),
    "file_bytes": ("bytes of the exported file", human_bytes),
}


def draw(folder: Path, result: Mapping[str, Any]) -> None:
    """Writes accuracy.svg, a panel for each varied name, and cost.svg, a panel for each kind of cost."""
    rows = [row for row in result["points"] if row["val_top1"] is not None]
    if not rows:
        return
    names = list(result["vary"])
    title = f"{result['model']}, {result['planned']:.3g} epochs; {trainings(rows)}"
    figure, panels = _figure(len(names), title)
    for axes, name in zip(panels, names, strict=True):
        _along(axes, rows, name)
    _save(figure, folder / "accuracy.svg")
    figure, panels = _figure(len(COSTS), title, columns=2)
    for axes, cost in zip(panels, COSTS, strict=True):
        _against(axes, rows, names, cost)
    if len(names) > 1:
        panels[0].legend(frameon=False, fontsize=8)
    _save(figure, folder / "cost.svg")


def trainings(rows: Sequence[Row]) -> str:
    """How many trainings the points have, and what their bars are."""
    count = max(row["n"] for row in rows)
    return "one training each" if count == 1 else f"bars from the lowest to the highest of {count} trainings"


def lines(rows: Sequence[Row], name: str) -> dict[str, list[Row]]:
    """The points that differ in `name` alone, together: the other values in words → points by ascending value."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        others = ", ".join(f"{key} {_short(value)}" for key, value in row["settings"].items() if key != name)
        found.setdefault(others, []).append(row)
    return found


def _along(axes: "Axes", rows: Sequence[Row], name: str) -> None:
    """Accuracy along one varied value: numbers at their place, anything else side by side."""
    values = list(dict.fromkeys(row["settings"][name] for row in rows))
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    place: dict[Any, float] = {value: float(value) if numeric else i for i, value in enumerate(values)}
    together = lines(rows, name)
    for i, (others, line) in enumerate(together.items()):
        xs = [place[row["settings"][name]] for row in line]
        _spread(axes, xs, line, i, joined=numeric)
        if len(together) > 1:
            last = max(line, key=lambda row: place[row["settings"][name]])
            _label(axes, others, place[last["settings"][name]], last["val_top1"], COLOURS[i % len(COLOURS)])
    axes.set_xticks([place[value] for value in values], [_short(value) for value in values])
    axes.margins(x=0.12 if len(together) == 1 else 0.3, y=0.12)
    axes.set_xlabel(name)
    _accuracy(axes)


def _against(axes: "Axes", rows: Sequence[Row], names: Sequence[str], cost: str) -> None:
    """Accuracy against a cost; a colour for each value of the other varied names where there are several."""
    title, write = COSTS[cost]
    by = lines(rows, names[-1]) if len(names) > 1 else {"": list(rows)}
    for i, (others, line) in enumerate(by.items()):
        ordered = sorted(line, key=lambda row: row[cost])
        _spread(axes, [row[cost] for row in ordered], ordered, i, joined=len(by) > 1, name=others)
        for row in ordered:
            _label(axes, _short(row["settings"][names[-1]]), row[cost], row["val_top1"], COLOURS[i % len(COLOURS)])
    low, high = min(row[cost] for row in rows), max(row[cost] for row in rows)
    if high > 3 * low:
        axes.set_xscale("log")
        axes.minorticks_off()
        ticks = [step * 10.0**power for power in range(-4, 12) for step in (1, 2, 5)]
        axes.set_xticks([tick for tick in ticks if low / 1.5 <= tick <= high * 1.5])
    else:
        axes.locator_params(axis="x", nbins=5)
    axes.margins(x=0.14, y=0.12)
    axes.xaxis.set_major_formatter(lambda value, _: write(value))
    axes.set_xlabel(f"{title}; labels: {names[-1]}")
    _accuracy(axes)


def _spread(axes: "Axes", xs: Sequence[float], line: Sequence[Row], number: int, joined: bool, name: str = "") -> None:
    """Means with bars from the lowest to the highest accuracy, and a faint mark for each training."""
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    means = [row["val_top1"] for row in line]
    below = [row["val_top1"] - row["lowest"] for row in line]
    above = [row["highest"] - row["val_top1"] for row in line]
    style = {"color": colour, "marker": marker, "linestyle": "-" if joined else "", "markersize": 6}
    axes.errorbar(xs, means, yerr=[below, above], capsize=3, label=name, **style)
    for x, row in zip(xs, line, strict=True):
        axes.plot([x] * len(row["each"]), row["each"], marker, color=colour, alpha=0.35, markersize=3)


def _label(axes: "Axes", text: str, x: float, y: float, colour: str) -> None:
    axes.annotate(text, (x, y), xytext=(7, 3), textcoords="offset points", color=colour, fontsize=8)


def _accuracy(axes: "Axes") -> None:
    axes.set_ylabel("validation accuracy")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_formatter(lambda value, _: percent(value, 0 if high - low > 0.05 else 1))


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _figure(count: int, title: str, columns: int = 3) -> "tuple[Figure, list[Axes]]":
    """A figure of `count` panels on white."""
    from matplotlib.figure import Figure

    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows + 0.3), layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=11)
    panels: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[:count]:
        axes.grid(color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    for axes in panels[count:]:
        axes.remove()
    return figure, panels[:count]


def _save(figure: "Figure", path: Path) -> None:
    """The same bytes for the same figures: no date, no random ids."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
