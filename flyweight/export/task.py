"""What is to be exported, the same for every target."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import onnx as onnx_format
from torch import nn

from flyweight.export import onnx
from flyweight.export.calibration import Range, limits
from flyweight.export.int8 import Scheme
from flyweight.exported import FLOAT, Exported, stem
from flyweight.fold import fold_batchnorm
from flyweight.graph import Graph, Shape, trace
from flyweight.preprocess import Preprocess


@dataclass(frozen=True)
class Int8:
    """How a network becomes int8: `ranges` of the values of its float32 ONNX file, by their names there.

    `pictures`, uint8 [n, H, W, C], are what they were found with, for converters that look for themselves. Layers that
    compute a value in `kept` stay float32. `name` says all that was done, for people.
    """

    scheme: Scheme
    ranges: Mapping[str, Range] = field(repr=False)
    pictures: np.ndarray = field(repr=False)
    kept: tuple[str, ...] = ()
    name: str = ""


@dataclass(frozen=True)
class Task:
    """A network and what surrounds it in a file: normalisation before it, softmax(logits / temperature) behind it."""

    net: nn.Module
    preprocess: Preprocess
    classes: tuple[str, ...]
    temperature: float = 1.0
    int8: Int8 | None = None

    @property
    def format(self) -> str:
        """As records and reports name it."""
        return FLOAT if self.int8 is None else self.int8.name or self.int8.scheme.name

    @property
    def shape(self) -> Shape:
        """Of one picture, as the network takes it: (C, H, W)."""
        return (self.preprocess.channels, *self.preprocess.size)

    @cached_property
    def graph(self) -> Graph:
        """The network with folded norms, traced."""
        return trace(fold_batchnorm(self.net, self.shape), self.shape)

    @cached_property
    def onnx(self) -> tuple[onnx_format.ModelProto, dict[str, str]]:
        """The float32 ONNX model, and what the value of each node of `graph` is called in it."""
        return onnx.export_named(self.net, self.preprocess, self.classes, self.temperature)

    def range(self, node: str) -> Range:
        """What the value of a node of `graph` is expected to lie in, by the int8 ranges."""
        assert self.int8 is not None
        return self.int8.ranges[self.onnx[1][node]]

    def exported(self, target: str, files: Mapping[str, bytes]) -> Exported:
        """Files by their suffixes, under the names that a folder holds them by."""
        named = {stem(self.format) + suffix: data for suffix, data in files.items()}
        return Exported(target, self.format, named, self.preprocess, self.classes)

    def quantised(self, scheme: Scheme, pictures: np.ndarray) -> "Task":
        """The same in int8, by the smallest and largest values on some pictures, uint8 [n, H, W, C]."""
        made = replace(self, int8=Int8(scheme, limits(self.onnx[0], pictures), pictures))
        vars(made)["onnx"] = self.onnx  # the float model is the same
        return made
