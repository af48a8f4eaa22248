"""TensorFlow Lite's operations in int8: one grid per tensor, symmetric weights, biases of int32 (arXiv:1712.05877).

What has no int8 form, no known range, or is to stay float32, is computed so between a DEQUANTIZE and a QUANTIZE.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from flyweight.export.calibration import LEVELS, Range
from flyweight.export.int8 import Scheme
from flyweight.export.tflite import ACTIVATIONS, FUSED, Grid, Op, Value, constant

LOW, HIGH = -128, 127
# Layer → the axis of its weights that the output channels lie along.
LAYERS = {"CONV_2D": 0, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 0}
# What passes numbers on as they are: its inputs and its output must be on one grid.
PASSING = {"CONCATENATION", "MAX_POOL_2D", "AVERAGE_POOL_2D", "RESHAPE", "TRANSPOSE", "PAD", "PADV2"}
PASSING |= {"STRIDED_SLICE", "RESIZE_BILINEAR", "REDUCE_MAX"}
OTHERS = {"ADD", "MUL", "MEAN", "RELU", "RELU6", "HARD_SWISH", "LOGISTIC"}
SIGMOID = (0.0, (LEVELS - 1) / LEVELS)  # the range that LOGISTIC's kernels insist on
LEAST = 2.0**-22  # of an output's step: the finest product of an input's and a weight's step, which kernels can hold


def quantised(ops: Sequence[Op], ranges: Mapping[Value, Range], scheme: Scheme, kept: Collection[str] = ()) -> list[Op]:
    """The operations in int8, by the ranges of as many values as are known; those of leaves in `kept` stay float32."""
    free = [op for op in ops if op.node not in kept]
    grids = _grids(free, _inferred(ops, ranges))
    integer = _Integer(grids, scheme)
    for op in ops:
        if op.node not in kept and integer.fits(op):
            integer.add(op)
        else:
            integer.leave(op)
    return integer.ops


def _inferred(ops: Sequence[Op], known: Mapping[Value, Range]) -> dict[Value, Range]:
    """The known ranges, and those of values inside a leaf that follow from them."""
    ranges = dict(known)
    for op in ops:
        if op.code == "LOGISTIC":
            ranges[op.output] = SIGMOID
        elif op.code == "ADD" and op.output not in ranges:
            terms = [_range(value, ranges) for value in op.inputs]
            if None not in terms:
                low, high = (sum(end) for end in zip(*(term for term in terms if term), strict=True))
                six = op.options.get(FUSED) == ACTIVATIONS["RELU6"]
                ranges[op.output] = (0.0, 6.0) if six else (low, high)
    return ranges


def _range(value: Value, ranges: Mapping[Value, Range]) -> Range | None:
    if value.data is None:
        return ranges.get(value)
    return float(value.data.min()), float(value.data.max())


def _grids(ops: Sequence[Op], ranges: Mapping[Value, Range]) -> dict[Value, Grid]:
    """A grid for each value that has a range or passes numbers from or to one that has; these share it."""
    group = {value: {value} for op in ops for value in (*op.inputs, op.output) if value.data is None}
    for op in ops:
        for value in op.inputs if op.code in PASSING else []:
            if value.data is None and group[value] is not group[op.output]:
                group[op.output] |= group[value]
                group.update(dict.fromkeys(group[op.output], group[op.output]))
    found: dict[Value, Grid] = {}
    for value, members in group.items():
        ends = [ranges[each] for each in members if each in ranges]
        if ends:
            lows, highs = zip(*ends, strict=True)
            found[value] = _grid(min(lows), max(highs))
    return found


def _grid(low: float, high: float) -> Grid:
    """The int8 grid that covers a range and holds zero exactly."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (LEVELS - 1) or 1.0
    return Grid(np.array(scale, np.float32), int(np.clip(np.rint(LOW - low / scale), LOW, HIGH)))


def _on(data: np.ndarray, grid: Grid) -> Value:
    """A constant of int8."""
    return constant(
        np.clip(np.rint(data.astype(np.float64) / grid.scale) + grid.zero_point, LOW, HIGH).astype(np.int8), grid
    )


def _weights(op: Op, step: float, out: float, scheme: Scheme) -> tuple[Value, Value]:
    """A layer's weights in int8 and its biases in int32, whose step is that of the input times that of the weights."""
    axis, (weight, bias) = LAYERS[op.code], op.inputs[1:]
    assert weight.data is not None
    assert bias.data is not None
    largest = np.abs(np.moveaxis(weight.data, axis, 0).reshape(weight.shape[axis], -1)).max(axis=1)
    if not scheme.per_channel:
        largest = np.full_like(largest, largest.max())
    steps = np.maximum(largest.astype(np.float64) / scheme.weight_levels, out / step * LEAST).astype(np.float32)
    along = [-1 if i == axis else 1 for i in range(weight.data.ndim)]
    whole = np.rint(weight.data / steps.reshape(along)).astype(np.int8)
    ends = np.iinfo(np.int32)
    shift = np.clip(np.rint(bias.data / (steps.astype(np.float64) * step)), ends.min, ends.max).astype(np.int32)
    shared = steps if scheme.per_channel else steps[:1]
    return constant(whole, Grid(shared, axis=axis)), constant(shift, Grid(shared * np.float32(step)))


@dataclass
class _Integer:
    """A network in int8 under construction: `whole` are its values' int8 forms, `real` those that exist in float32."""

    grids: Mapping[Value, Grid]
    scheme: Scheme
    ops: list[Op] = field(default_factory=list)
    whole: dict[Value, Value] = field(default_factory=dict)
    real: set[Value] = field(default_factory=set)

    def fits(self, op: Op) -> bool:
        """Whether an operation has an int8 form: a grid for all that it reads and computes, for LOGISTIC its own."""
        values = [each for each in (*op.inputs, op.output) if each.data is None and each.dtype == np.float32]
        if op.code not in LAYERS.keys() | PASSING | OTHERS or not all(value in self.grids for value in values):
            return False
        return op.code != "LOGISTIC" or self.grids[op.output] == _grid(*SIGMOID)

    def add(self, op: Op) -> None:
        """Appends an operation in int8."""
        output = self.whole[op.output] = self._empty(op.output)
        self.ops.append(replace(op, inputs=self._inputs(op), output=output))

    def leave(self, op: Op) -> None:
        """Appends an operation in float32."""
        inputs = [self._float(each) for each in op.inputs]
        self.real.add(op.output)
        self.ops.append(replace(op, inputs=inputs))

    def _inputs(self, op: Op) -> list[Value]:
        inputs = [self._int8(each) if each.data is None else each for each in op.inputs]
        grid = self.grids[op.output]
        if op.code in LAYERS:
            step, out = float(self.grids[op.inputs[0]].scale), float(grid.scale)
            return [inputs[0], *_weights(op, step, out, self.scheme)]
        for i, each in enumerate(inputs):
            if each.data is not None and each.dtype == np.float32:
                own = grid if op.code in PASSING else _grid(float(each.data.min()), float(each.data.max()))
                inputs[i] = _on(each.data, own)
        return inputs

    def _empty(self, value: Value) -> Value:
        return Value(value.shape, np.dtype(np.int8), grid=self.grids[value])

    def _int8(self, value: Value) -> Value:
        if value not in self.whole:
            self.whole[value] = self._empty(value)
            self.ops.append(Op("QUANTIZE", [value], self.whole[value], {}))
        return self.whole[value]

    def _float(self, value: Value) -> Value:
        if value in self.whole and value not in self.real:
            self.real.add(value)
            self.ops.append(Op("DEQUANTIZE", [self.whole[value]], value, {}))
        return value
