"""Quantisation-aware training: a network that rounds as its int8 file will, with gradients straight through.

Jacob et al., arXiv:1712.05877, section 3; the norms are folded already.
"""

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from flyweight.compress.step import Context
from flyweight.export.int8 import LAYERS, Grid, Scheme, grids, quantised_weights
from flyweight.graph import INPUT, Graph, Node, trace
from flyweight.train.loop import Clock, Trained, Training, train
from flyweight.train.recipe import Recipe

# Towards the float network's answers; no decay: it would move what is good already.
RECIPE = Recipe(batch_size=64, warm_up=0.1, weight_decay=0.0, label_smoothing=0.0, distil=1.0, temperature=2.0)


class _Rounded(Function):
    """scale · (clamp(round(x / scale) + zero_point) − zero_point), whose gradient is 1 where nothing was clamped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Grid) -> Tensor:
        whole = torch.round(x / grid.scale).add_(grid.zero_point)
        ctx.save_for_backward((whole >= grid.low) & (whole <= grid.high))
        return whole.clamp_(grid.low, grid.high).sub_(grid.zero_point).mul_(grid.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return dy * ctx.saved_tensors[0], None


def rounded(x: Tensor, grid: Grid) -> Tensor:
    """The values of a tensor on a grid, as QuantizeLinear and DequantizeLinear make them, ties to even."""
    out = _Rounded.apply(x, grid)
    assert isinstance(out, Tensor)
    return out


def rounded_weight(weight: Tensor, scheme: Scheme) -> Tensor:
    """A kernel [out, …] on its symmetric grid, one for each row or one for all."""
    most = weight.detach().flatten(1).abs().amax(1, keepdim=True).double()
    scale = ((most if scheme.per_channel else most.amax()) / scheme.weight_levels).to(weight.dtype)
    scale = torch.where(scale == 0, 1, scale).view(-1, *[1] * (weight.ndim - 1))
    return weight + (torch.round(weight.detach() / scale) * scale - weight.detach())


class FakeQuantised(nn.Module):
    """A network whose norms are folded, run node by node, with values on the grids that its int8 file has.

    `net` holds the float weights that are trained; it always runs as when deployed. Biases, which int8 files hold in 32
    bits, are not rounded.
    """

    def __init__(self, net: nn.Module, graph: Graph, grids: Mapping[str, Grid], layers: Mapping[str, Scheme]) -> None:
        """`grids` by the name of a node or INPUT; `layers`, how its weights are rounded, by that of a layer."""
        super().__init__()
        self.net, self.graph = net, graph
        self.grids, self.layers = dict(grids), dict(layers)
        last = {name: node.name for node in graph.nodes for name in node.inputs}
        self.forgotten: defaultdict[str, list[str]] = defaultdict(list)
        for name, reader in last.items():
            self.forgotten[reader].append(name)

    def train(self, mode: bool = True) -> "FakeQuantised":
        super().train(mode)
        self.net.eval()
        return self

    def computed(self, node: Node, inputs: Sequence[Tensor]) -> Tensor:
        """A node's output before it is rounded."""
        if node.name not in self.layers:
            return node.leaf(*inputs)
        weight = node.leaf.weight
        assert isinstance(weight, Tensor)
        return functional_call(node.leaf, {"weight": rounded_weight(weight, self.layers[node.name])}, tuple(inputs))

    def rounded(self, name: str, value: Tensor) -> Tensor:
        """The output of a node, or the INPUT, on its grid, where it has one."""
        return rounded(value, self.grids[name]) if name in self.grids else value

    def forward(self, x: Tensor) -> Tensor:
        values = {INPUT: self.rounded(INPUT, x)}
        for node in self.graph.nodes:
            y = self.computed(node, [values[name] for name in node.inputs])
            values[node.name] = self.rounded(node.name, y)
            for name in self.forgotten[node.name]:
                del values[name]
        return values[self.graph.outputs[0]]


def fake_quantised(
    net: nn.Module, model: onnx.ModelProto, placed: onnx.ModelProto, names: Mapping[str, str], scheme: Scheme
) -> FakeQuantised:
    """A copy of a network with folded norms that rounds where, and as, its `placed` int8 model does.

    `model` and `names` are what `onnx.export_named` makes of the network.
    """
    image = next(each for each in model.graph.input if each.name == "image").type.tensor_type.shape.dim
    _, height, width, channels = (each.dim_value for each in image)
    own = copy.deepcopy(net)
    graph = trace(own, (channels, height, width))
    kernels = {node.output[0]: node.input[1] for node in model.graph.node if node.op_type in LAYERS}
    rounding, weights = grids(placed), quantised_weights(placed)
    first: dict[str, str] = {}
    for name in (INPUT, *(node.name for node in graph.nodes)):
        first.setdefault(names[name], name)  # an identity's output is its input: rounded once
    at = {first[value]: grid for value, grid in rounding.items() if value in first}
    layers = {first[value]: scheme for value, kernel in kernels.items() if kernel in weights}
    return FakeQuantised(own, graph, at, layers)


def fine_tune(fake: FakeQuantised, teacher: nn.Module, context: Context, clock: Clock, rate: float) -> Trained:
    """Trains the weights under a fake-quantised network, towards the teacher's answers. Raises Diverged."""
    batch = min(RECIPE.batch_size, len(context.train))
    job = Training(
        net=fake,
        data=context.train,
        validation=context.validation,
        preprocess=context.preprocess,
        recipe=replace(RECIPE, learning_rate=rate, batch_size=batch, flip=context.recipe.flip),
        clock=clock,
        seed=context.seed,
        mode="float32",  # bfloat16 has fewer values than the grids
        emit=lambda values: context.write("epoch", stage="int8", name="quantisation-aware", **values),
        note=context.say,
        threads=context.threads,
        teacher=teacher,
    )
    return train(job)
