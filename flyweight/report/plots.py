"""Figures as inline SVG: small, themed by the page's CSS variables, and free of any text that a user chose.

Names reach a figure only as tooltips, which are escaped here; everything else that is written into one is a number.
"""

import html
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flyweight.units import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours stand for CSS variables: the figure is drawn with the first and shown with the second.
INK, SOFT, LINE, PAPER = "#010101", "#020202", "#030303", "#040404"
ACCENT, WRONG, STAR = "#050505", "#060606", "#070707"
_VARIABLES = {
    INK: "var(--ink)",
    SOFT: "var(--soft)",
    LINE: "var(--line)",
    PAPER: "var(--paper)",
    ACCENT: "var(--accent)",
    WRONG: "var(--bad)",
    STAR: "var(--star)",
}
_RIGHT_RGB, _WRONG_RGB = (59, 107, 219), (217, 95, 30)  # the confusion matrix: mid tones, seen on light and on dark
_FONT = 11.5  # px at the natural width, which is near the width the page gives a figure

Box = tuple[float, float, float, float]  # left, bottom, right, top


@dataclass(frozen=True)
class Point:
    """A trained candidate in a plot: its number in the table, where it is, and what its tooltip says."""

    number: int
    x: float
    y: float
    winner: bool
    tip: str


@dataclass(frozen=True)
class Axis:
    """The horizontal axis of a race: its title, how its numbers are written, and the budget's limit on it."""

    title: str
    write: Callable[[float], str]
    limit: float | None


@dataclass(frozen=True)
class Series:
    """One line of a chart. `style` is `main`, `second` or `thin`."""

    style: str
    x: Sequence[float]
    y: Sequence[float]
    tip: str


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both cost (x, less is better) and accuracy (y), by ascending cost."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, -point.y)):
        if not front or point.y > front[-1].y:
            front.append(point)
    return front


def place_labels(
    anchors: Sequence[tuple[float, float]], size: tuple[float, float], taken: Sequence[Box]
) -> list[Box | None]:
    """A box of `size` beside each anchor that meets no other box and none of `taken`; None where there is no room."""
    width, height = size
    boxes: list[Box] = list(taken)
    placed: list[Box | None] = []
    for x, y in anchors:
        found = None
        for dx, dy in ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1)):
            left, bottom = x + dx * (width / 2 + 6) - width / 2, y + dy * (height / 2 + 6) - height / 2
            box = (left, bottom, left + width, bottom + height)
            if not any(_meet(box, other) for other in boxes):
                found = box
                boxes.append(box)
                break
        placed.append(found)
    return placed


def race(name: str, points: Sequence[Point], untrained: Sequence[float], shipped: Point | None, axis: Axis) -> str:
    """Accuracy against one cost: trained candidates with their Pareto front, the others as ticks, the shipped file."""
    figure, axes = _figure(460, 330)
    shown = [*points, *([shipped] if shipped else [])]
    marked = [axis.limit] if axis.limit is not None else []
    _cost_axis(axes, [*(point.x for point in shown), *untrained, *marked], axis)
    _accuracy_axis(axes, [point.y for point in shown])
    if axis.limit is not None:
        _draw_limit(axes, axis.limit, f"limit {axis.write(axis.limit)}")
    if untrained:
        _draw_untrained(axes, untrained)
    front = pareto_front(points)
    xs, ys = [point.x for point in front], [point.y for point in front]
    axes.plot(xs, ys, color=ACCENT, linewidth=1.4, alpha=0.6, drawstyle="steps-post")
    best = {point.number for point in front}
    for point in points:
        _draw_candidate(axes, point, ACCENT if point.number in best or point.winner else SOFT)
    if shipped:
        _draw_shipped(axes, shipped, [point for point in points if point.winner])
    _label(figure, axes, points, best, shipped)
    return _svg(figure, name, f"Accuracy against {axis.title}", {_gid(point): point.tip for point in shown})


def lines(name: str, title: str, series: Sequence[Series], write: Callable[[float], str]) -> str:
    """Curves over the epochs."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(340, 240)
    styles: Mapping[str, dict[str, Any]] = {
        "main": {"color": ACCENT, "linewidth": 2.0, "zorder": 3},
        "second": {"color": STAR, "linewidth": 2.0, "zorder": 3},
        "thin": {"color": SOFT, "linewidth": 0.9, "alpha": 0.55, "zorder": 2},
    }
    tips: dict[str, str] = {}
    for index, line in enumerate(series):
        marker = "o" if len(line.x) == 1 else ""
        axes.plot(line.x, line.y, marker=marker, markersize=4, gid=f"tip-{index}", **styles[line.style])
        tips[f"tip-{index}"] = line.tip
    axes.yaxis.set_major_formatter(lambda value, _: write(value))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("epoch")
    return _svg(figure, name, title, tips)


def confusion(name: str, counts: Sequence[Sequence[int]]) -> str:
    """A confusion matrix of many classes as a picture: each cell's share of its row, classes by number from 1."""
    import numpy as np

    figure, axes = _figure(560, 540)
    table = np.asarray(counts, dtype=np.float64)
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    pixels = np.zeros((*share.shape, 4), dtype=np.uint8)
    diagonal = np.eye(len(share), dtype=bool)
    pixels[..., :3] = np.where(diagonal[..., None], np.array(_RIGHT_RGB), np.array(_WRONG_RGB))
    # the cube root lets a few confusions in a hundred be seen
    pixels[..., 3] = np.round(np.where(diagonal, share, np.cbrt(share)) * 255)
    edge = len(share) + 0.5
    axes.imshow(pixels, interpolation="none", extent=(0.5, edge, edge, 0.5), aspect="auto")
    axes.grid(False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(True)
    for ruler in (axes.xaxis, axes.yaxis):
        ruler.set_major_locator(_whole_numbers(len(share)))
    axes.set_xlabel("answered (class number)")
    axes.set_ylabel("true (class number)")
    return _svg(figure, name, "Confusion matrix", {})


def _figure(width: int, height: int) -> "tuple[Figure, Axes]":
    """An empty figure with quiet axes; width and height in px."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.subplots()
    axes.patch.set_visible(False)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set(color=SOFT, linewidth=0.8)
    axes.tick_params(colors=SOFT, labelcolor=SOFT, labelsize=_FONT, width=0.8, length=3)
    axes.grid(color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    for ruler in (axes.xaxis, axes.yaxis):
        ruler.label.set(color=SOFT, size=_FONT)
    return figure, axes


def _cost_axis(axes: "Axes", values: Sequence[float], axis: Axis) -> None:
    """Logarithmic where the values span more than a factor of 5, else from zero."""
    from matplotlib.ticker import MaxNLocator

    low, high = min(values, default=0.0), max(values, default=1.0)
    if low > 0 and high > 5 * low:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.15, high * 1.15)
        axes.set_xticks(_log_ticks(*axes.get_xlim()))
        axes.minorticks_off()
    else:
        axes.set_xlim(0, (high or 1.0) * 1.12)
        axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(lambda value, _: axis.write(value))
    axes.set_xlabel(axis.title)


def _accuracy_axis(axes: "Axes", values: Sequence[float]) -> None:
    from matplotlib.ticker import MaxNLocator

    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = max(0.08 * (high - low), 0.01)
    axes.set_ylim(max(0.0, low - 1.5 * margin), min(1.02, high + margin))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    digits = 0 if high - low > 0.05 else 1
    axes.yaxis.set_major_formatter(lambda value, _: percent(value, digits))
    axes.set_ylabel("validation accuracy")


def _log_ticks(low: float, high: float) -> list[float]:
    """At most seven round numbers between low and high: 1-2-5, 1-3 or the powers of ten."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= 7:
            break
    return ticks


def _whole_numbers(count: int) -> Any:
    """Ticks at 1 and then at round steps, at most a dozen."""
    from matplotlib.ticker import FixedLocator

    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, count) if count / step <= 12)
    return FixedLocator([1, *range(step, count + 1, step)] if step > 1 else range(1, count + 1))


def _gid(point: Point) -> str:
    return f"tip-{point.number}"


def _draw_limit(axes: "Axes", limit: float, text: str) -> None:
    """A dashed line with its text above the plot; what lies beyond is shaded."""
    axes.axvspan(limit, axes.get_xlim()[1], color=WRONG, alpha=0.07, linewidth=0)
    axes.axvline(limit, color=WRONG, linewidth=1.2, dashes=(4, 3))
    place = axes.transAxes.inverted().transform(axes.transData.transform((limit, 0)))[0]
    side = "right" if place > 0.75 else "left" if place < 0.25 else "center"
    axes.annotate(text, (limit, 1.02), xycoords=axes.get_xaxis_transform(), ha=side, color=WRONG, size=_FONT)


def _draw_untrained(axes: "Axes", costs: Sequence[float]) -> None:
    """Ticks along the lower edge, for what has a cost but no accuracy."""
    (ticks,) = axes.plot(costs, [0.0] * len(costs), "|", color=SOFT, markersize=9, alpha=0.55, clip_on=False)
    ticks.set_transform(axes.get_xaxis_transform())


def _draw_candidate(axes: "Axes", point: Point, colour: str) -> None:
    size, edge, width = (10, STAR, 2.2) if point.winner else (7, PAPER, 1.0)
    (dot,) = axes.plot(point.x, point.y, "o", color=colour, markersize=size, gid=_gid(point))
    dot.set(markeredgecolor=edge, markeredgewidth=width)


def _draw_shipped(axes: "Axes", shipped: Point, winners: Sequence[Point]) -> None:
    """The star, and a dotted line from the winner's dot: what the whole training and the compression made of it."""
    for point in winners:
        axes.plot([point.x, shipped.x], [point.y, shipped.y], ":", color=STAR, linewidth=1.4, zorder=1.5)
    axes.plot(shipped.x, shipped.y, "*", color=STAR, markersize=17, markeredgecolor=PAPER, gid=_gid(shipped))


def _label(figure: "Figure", axes: "Axes", points: Sequence[Point], best: set[int], shipped: Point | None) -> None:
    """Write the table's number beside the winner and the points of the front, wherever there is room."""
    figure.draw_without_rendering()  # settles the layout,
    figure.set_layout_engine("none")  # which must not move under the labels: they are placed in its coordinates
    named = [point for point in points if point.winner or point.number in best]
    named.sort(key=lambda point: (not point.winner, point.x))
    where = {point: _pixel(axes, point) for point in points}
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in where.values()]
    if shipped:
        x, y = _pixel(axes, shipped)
        taken.append((x - 8, y - 8, x + 8, y + 8))
    size = (9.0 + 7.0 * (len(str(max((point.number for point in named), default=0))) - 1), _FONT + 1)
    for point, box in zip(named, place_labels([where[point] for point in named], size, taken), strict=True):
        if box is not None:
            middle = ((box[0] + box[2]) / 2, box[1] + 2)
            text = axes.annotate(str(point.number), middle, xycoords="figure pixels", ha="center", va="baseline")
            text.set(color=INK, size=_FONT, weight="bold")


def _pixel(axes: "Axes", point: Point) -> tuple[float, float]:
    x, y = axes.transData.transform((point.x, point.y))
    return float(x), float(y)


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _svg(figure: "Figure", name: str, title: str, tips: Mapping[str, str]) -> str:
    """The figure as an `<svg>` element: ids prefixed by `name`, colours as CSS variables, tooltips as `<title>`."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    width, height = figure.get_size_inches() * 72
    body = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r' transform="rotate\(-0 [^"]*"', "", body)
    body = re.sub(r' (?:d|x|y)="[^"]*"', lambda hit: re.sub(r"(\.\d\d)\d+", r"\1", hit[0]).replace("\n", ""), body)
    body = re.sub(r'<g id="(tip-[^"]*)">', lambda hit: f"<g><title>{html.escape(tips[hit[1]])}</title>", body)
    body = re.sub(r'<g id="[^"]*">', "<g>", body)
    body = body.replace("xlink:href=", "href=").replace('id="', f'id="{name}-')
    body = body.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    body = re.sub(r" ?font-family: [^;\"]*;?", "", body)  # the page's own
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, variable)
    body = re.sub(r">\s+<", "><", body).strip()
    label = html.escape(title)
    return f'<svg class="plot" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{label}">{body}</svg>'
