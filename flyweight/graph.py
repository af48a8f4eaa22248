"""The only walker: a network as a list of leaf modules with their inputs and shapes, traced on the meta device."""

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from flyweight.errors import FlyweightError

Shape = tuple[int, ...]
INPUT = "input"
# Leaves whose output has the shape of their input: not worth a call, which for a norm on the meta device is slow.
SAME_SHAPE = (nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.Identity, nn.Dropout)


@dataclass(frozen=True)
class Node:
    """One call of a leaf module: `shape` is its output's without the batch, `inputs` the names of nodes or "input"."""

    name: str
    path: str
    leaf: nn.Module
    inputs: tuple[str, ...]
    shape: Shape


@dataclass(frozen=True)
class Graph:
    """The leaves of a network in the order of execution."""

    input_shape: Shape
    nodes: tuple[Node, ...]
    output: str

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Node name → output shape, the input included."""
        return {INPUT: self.input_shape} | {node.name: node.shape for node in self.nodes}

    @cached_property
    def users(self) -> dict[str, list[Node]]:
        """Node name → the nodes that read its output."""
        found: dict[str, list[Node]] = {name: [] for name in self.shapes}
        for node in self.nodes:
            for name in node.inputs:
                found[name].append(node)
        return found


class GraphError(FlyweightError):
    """The network does something outside a leaf module, so nothing exact can be said of it."""


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return next(m.children(), None) is None


def _on_meta(net: nn.Module) -> nn.Module:
    """The network, or a copy of it, whose tensors hold no data: nothing is duplicated in memory."""
    if all(parameter.is_meta for parameter in net.parameters()):
        return net
    tensors: dict[int, Any] = {}
    for parameter in net.parameters():
        tensors[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in net.buffers():
        tensors[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(net, tensors)


def trace(net: nn.Module, input_shape: Shape) -> Graph:
    """The graph of `net` for one picture of `input_shape` (C, H, W).

    Raises GraphError where a forward computes outside a leaf module, or the shapes do not fit together.
    """
    meta = _on_meta(net)
    values: dict[str, Tensor] = {}
    nodes: list[Node] = []
    output = INPUT
    names: dict[fx.Node, str] = {}
    for step in _Tracer().trace(meta).nodes:
        if step.op == "placeholder":
            names[step] = INPUT
            values[INPUT] = torch.empty(1, *input_shape, device="meta")
        elif step.op == "output":
            output = names[step.args[0]]
        elif step.op == "call_module":
            path = str(step.target)
            inputs = tuple(names[argument] for argument in step.args)
            value = _call(meta.get_submodule(path), path, [values[name] for name in inputs])
            names[step], values[step.name] = step.name, value
            nodes.append(Node(step.name, path, net.get_submodule(path), inputs, tuple(value.shape[1:])))
        else:
            raise GraphError(
                f"{type(net).__name__} calls {step.target} outside a leaf module; put it into one in ops.py"
            )
    return Graph(input_shape, tuple(nodes), output)


def _call(leaf: nn.Module, path: str, inputs: list[Tensor]) -> Tensor:
    if isinstance(leaf, SAME_SHAPE):
        return inputs[0]
    try:
        return leaf(*inputs)
    except RuntimeError as error:
        shapes = ", ".join(str(tuple(x.shape[1:])) for x in inputs)
        raise GraphError(f"{path} ({type(leaf).__name__}) cannot take an input of {shapes}: {error}") from error
