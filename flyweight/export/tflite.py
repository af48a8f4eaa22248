"""TensorFlow Lite's operations on tensors [N, H, W, C], and the bytes of the .tflite file that holds them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flyweight.graph import Shape

IDENTIFIER = b"TFL3"
ALIGNMENT = 16  # bytes, of constants: what runtimes load vectors by
SAME, VALID = 0, 1  # the schema's Padding
ACTIVATIONS = {"RELU": 1, "RELU6": 3}  # what an operation can do to its own result: the schema's numbers
FUSED = "fusedActivationFunction"
FUSING = {"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "ADD", "MUL"}
# Operation → the schema's class of its options; others have none.
OPTIONS = {
    "CONV_2D": "Conv2DOptions",
    "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions",
    "FULLY_CONNECTED": "FullyConnectedOptions",
    "MAX_POOL_2D": "Pool2DOptions",
    "AVERAGE_POOL_2D": "Pool2DOptions",
    "ADD": "AddOptions",
    "MUL": "MulOptions",
    "SUB": "SubOptions",
    "BATCH_MATMUL": "BatchMatMulOptions",
    "CONCATENATION": "ConcatenationOptions",
    "MEAN": "ReducerOptions",
    "REDUCE_MAX": "ReducerOptions",
    "RESHAPE": "ReshapeOptions",
    "RESIZE_BILINEAR": "ResizeBilinearOptions",
    "SOFTMAX": "SoftmaxOptions",
    "STRIDED_SLICE": "StridedSliceOptions",
}


@dataclass(frozen=True)
class Grid:
    """What whole numbers stand for: scale · (whole − zero_point), one scale, or one for each index of `axis`."""

    scale: np.ndarray
    zero_point: int = 0
    axis: int = 0


@dataclass(eq=False)
class Value:
    """A tensor: `shape` is for one picture, `data` what a constant holds, `grid` what its whole numbers stand for."""

    shape: Shape
    dtype: np.dtype = field(default_factory=lambda: np.dtype(np.float32))
    data: np.ndarray | None = None
    grid: Grid | None = None


@dataclass(eq=False)
class Op:
    """An operation of the schema's BuiltinOperator; `node` is the leaf that it belongs to."""

    code: str
    inputs: list[Value]
    output: Value
    options: dict[str, Any]
    node: str = ""


def constant(data: np.ndarray, grid: Grid | None = None) -> Value:
    """A tensor that the file holds."""
    return Value(data.shape, data.dtype, np.ascontiguousarray(data), grid)


def whole(*numbers: int) -> Value:
    """A constant of int32 [n], as axes and shapes are given."""
    return constant(np.array(numbers, np.int32))


def fused(ops: Sequence[Op]) -> list[Op]:
    """The same with each ReLU done by the operation before it, where it alone reads that one's result."""
    makers = {op.output: op for op in ops}
    readers = Counter(value for op in ops for value in op.inputs)
    left: list[Op] = []
    for op in ops:
        before = makers.get(op.inputs[0]) if op.code in ACTIVATIONS else None
        if before is None or before.code not in FUSING or FUSED in before.options or readers[before.output] > 1:
            left.append(op)
            continue
        before.options[FUSED] = ACTIVATIONS[op.code]
        before.output = op.output
        makers[op.output] = before
    return left


def packed(ops: Sequence[Op], inputs: dict[str, Value], outputs: dict[str, Value]) -> bytes:
    """The .tflite file with the signature serving_default; inputs and outputs by their names, the batch size free."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    everything = [*inputs.values(), *(value for op in ops for value in (*op.inputs, op.output))]
    values = {value: i for i, value in enumerate(dict.fromkeys(everything))}
    codes = {code: i for i, code in enumerate(dict.fromkeys(op.code for op in ops))}
    buffers = [_Buffer(None)]  # the empty one, of all that is no constant
    tensors = [_tensor(value, buffers) for value in values]
    for name, value in (inputs | outputs).items():
        tensors[values[value]].name = name
        tensors[values[value]].shapeSignature = [-1, *value.shape[1:]]
    graph = schema.SubGraphT(
        tensors=tensors,
        inputs=[values[each] for each in inputs.values()],
        outputs=[values[each] for each in outputs.values()],
        operators=[_operator(op, codes, values) for op in ops],
        name="main",
    )
    maps = [[schema.TensorMapT(name, values[each]) for name, each in ends.items()] for ends in (inputs, outputs)]
    model = schema.ModelT(
        version=3,
        operatorCodes=[_code(code) for code in codes],
        subgraphs=[graph],
        description="flyweight",
        buffers=buffers,
        signatureDefs=[schema.SignatureDefT(*maps, signatureKey="serving_default")],
    )
    builder = flatbuffers.Builder(sum(buffer.size + 64 for buffer in buffers))
    builder.Finish(model.Pack(builder), IDENTIFIER)
    return bytes(builder.Output())


class _Buffer:
    """The schema's Buffer, its bytes aligned, which the generated class leaves to chance."""

    def __init__(self, data: np.ndarray | None) -> None:
        self.data = b"" if data is None else data.tobytes()
        self.size = len(self.data)

    def Pack(self, builder: Any) -> int:
        """As the generated classes are packed: writes itself and says where."""
        from ai_edge_litert import schema_py_generated as schema

        vector = None
        if self.data:
            builder.StartVector(1, self.size, ALIGNMENT)
            builder.head -= self.size
            builder.Bytes[builder.head : builder.head + self.size] = self.data
            vector = builder.EndVector()
        schema.BufferStart(builder)
        if vector is not None:
            schema.BufferAddData(builder, vector)
        return schema.BufferEnd(builder)


def _tensor(value: Value, buffers: list[_Buffer]) -> Any:
    """The schema's Tensor; what a constant holds is added to `buffers`."""
    from ai_edge_litert import schema_py_generated as schema

    tensor = schema.TensorT(shape=list(value.shape), type=getattr(schema.TensorType, value.dtype.name.upper()))
    tensor.hasRank = True
    if value.data is not None:
        tensor.buffer = len(buffers)
        buffers.append(_Buffer(value.data))
    if value.grid is not None:
        scale = np.atleast_1d(value.grid.scale).astype(np.float32)
        zeros = np.full(len(scale), value.grid.zero_point, np.int64)
        tensor.quantization = schema.QuantizationParametersT(
            scale=scale, zeroPoint=zeros, quantizedDimension=value.grid.axis
        )
    return tensor


def _operator(op: Op, codes: dict[str, int], values: dict[Value, int]) -> Any:
    from ai_edge_litert import schema_py_generated as schema

    operator = schema.OperatorT(codes[op.code], [values[each] for each in op.inputs], [values[op.output]])
    if kind := OPTIONS.get(op.code):
        operator.builtinOptionsType = getattr(schema.BuiltinOptions, kind)
        operator.builtinOptions = getattr(schema, f"{kind}T")(**op.options)
    return operator


def _code(code: str) -> Any:
    """The schema's OperatorCode; old readers know the first 127 only, by another field."""
    from ai_edge_litert import schema_py_generated as schema

    number = getattr(schema.BuiltinOperator, code)
    return schema.OperatorCodeT(deprecatedBuiltinCode=min(number, 127), builtinCode=number)
