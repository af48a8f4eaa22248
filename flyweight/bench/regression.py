"""Times of kernels from those of others: additive work as the mean of a Gaussian process over logarithms."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from flyweight.bench.kernels import ACTIVATIONS, Kernel

Array = NDArray[np.floating]
LEAST = 1e-4  # ms: below this a kernel's time is lost in the clock
LENGTHS, FLAG_LENGTHS, NOISES = (1.0, 2.0, 4.0), (1.0, 3.0), (0.03, 0.1)
SIZE_TREND, FLAG_TREND = 0.1, 0.4  # by which the logarithm may rise with that of a size, and for a flag
BLOCKS = (4, 8, 16)  # channels that vector units and blocked layouts take at once


def work(kernel: Kernel) -> Array:
    """What takes time in proportion: being called, multiply-accumulates, values read and written, weights."""
    read = sum(math.prod(shape) for shape in kernel.inputs)
    return np.array([1.0, kernel.macs, read, math.prod(kernel.output), kernel.weights])


def features(kernel: Kernel) -> tuple[Array, Array]:
    """Logarithms of the sizes, and flags: channels that fill no whole block, the activation, the dilation."""
    channels, out = sum(shape[0] for shape in kernel.inputs), kernel.output[0]
    positions = [math.prod(shape[1:]) for shape in (kernel.inputs[0], kernel.output)]
    sizes = [channels, out, *positions, math.prod(kernel.window), kernel.groups, len(kernel.inputs)]
    sides = kernel.inputs, (kernel.output,)
    ragged = [any(shape[0] % block for shape in side) for side in sides for block in BLOCKS]
    flags = [*ragged, *(kernel.activation == name for name in ACTIVATIONS), kernel.dilation != (1, 1)]
    flags += [kernel.window[0] > kernel.window[1], kernel.window[0] < kernel.window[1]]
    return np.log(sizes), np.array(flags, float)


def nonnegative(a: Array, b: Array, sweeps: int = 300) -> Array:
    """The x ≥ 0 with the least ‖a x − b‖, one coordinate after the other."""
    gram, right = a.T @ a, a.T @ b
    x = np.zeros(len(right))
    for _ in range(sweeps):
        for i in np.flatnonzero(gram.diagonal()):
            x[i] = max(0.0, x[i] + (right[i] - gram[i] @ x) / gram[i, i])
    return x


def squared_distances(a: Array, b: Array) -> Array:
    """[n, d] and [m, d] → [n, m]."""
    return np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T, 0)


class Regression:
    """log t(kernel) = log(work · rates) + a Gaussian process, for kernels of one kind.

    `errors` are the standard errors of the times `ms`; where they are large, a measurement says little.
    """

    def __init__(self, kernels: Sequence[Kernel], ms: Array, errors: Array) -> None:
        ms = np.maximum(ms, LEAST)
        table = np.array([work(kernel) for kernel in kernels])
        self.scale = np.maximum(table.max(0), 1)
        weight = 1 / (ms + errors)
        self.rates = nonnegative(table / self.scale * weight[:, None], ms * weight)
        self.sizes, self.flags = (np.array(each) for each in zip(*map(features, kernels), strict=True))
        left = np.log(ms) - self._base(table)
        self.spread = max(float(np.median(np.abs(left - np.median(left)))) * 1.5, 0.05) ** 2
        own = np.minimum(errors / ms, 1.0) ** 2
        tried = itertools.product(LENGTHS, FLAG_LENGTHS, NOISES)
        self.lengths, self.weights = max((self._fitted(left, own, *each) for each in tried), key=lambda fit: fit[0])[1:]

    def _base(self, table: Array) -> Array:
        return np.log(np.maximum(table / self.scale @ self.rates, LEAST))

    def _fitted(self, left: Array, own: Array, length: float, flag: float, noise: float) -> tuple[float, Array, Array]:
        """The log marginal likelihood of what the base leaves, the lengths, and the weights of the measured kernels."""
        lengths = np.array([length, flag])
        covariance = self._covariance(self.sizes, self.flags, lengths) + np.diag(own + noise**2)
        root = np.linalg.cholesky(covariance)
        weights = np.linalg.solve(root.T, np.linalg.solve(root, left))
        return float(-0.5 * left @ weights - np.log(root.diagonal()).sum()), lengths, weights

    def _covariance(self, sizes: Array, flags: Array, lengths: Array) -> Array:
        """Matérn 3/2 between given kernels and the measured ones."""
        of_sizes, of_flags = squared_distances(sizes, self.sizes), squared_distances(flags, self.flags)
        distance = np.sqrt(3 * (of_sizes / lengths[0] ** 2 + of_flags / lengths[1] ** 2))
        centre = self.sizes.mean(0)
        trend = SIZE_TREND**2 * (sizes - centre) @ (self.sizes - centre).T + FLAG_TREND**2 * (1 + flags @ self.flags.T)
        return trend + self.spread * (1 + distance) * np.exp(-distance)

    def predict(self, kernels: Sequence[Kernel]) -> Array:
        """Milliseconds of each."""
        sizes, flags = (np.array(each) for each in zip(*map(features, kernels), strict=True))
        table = np.array([work(kernel) for kernel in kernels])
        return np.exp(self._base(table) + self._covariance(sizes, flags, self.lengths) @ self.weights)
