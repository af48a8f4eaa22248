"""Batch normalisation folded into a convolution, in numpy: once for export and for packed files, which have no torch.

γ (Wx + b − μ) / √(σ² + ε) + β is the convolution sW with bias s (b − μ) + β, where s = γ / √(σ² + ε). Additions,
multiplications, divisions and square roots alone, which IEEE 754 rounds correctly: every machine finds the same bits.
(torch's square root of float32 may be one unit in the last place off.)
"""

import numpy as np
from numpy.typing import NDArray


def norm_scale(weight: NDArray, variance: NDArray, epsilon: float) -> NDArray:
    """s [O] of γ, σ² and ε."""
    with np.errstate(all="ignore"):
        return weight / np.sqrt(variance + variance.dtype.type(epsilon))


def fold_kernel(kernel: NDArray, scale: NDArray) -> NDArray:
    """sW [O, …] of W and s."""
    with np.errstate(all="ignore"):
        return kernel * scale.reshape(-1, *(1,) * (kernel.ndim - 1))


def fold_bias(bias: NDArray, mean: NDArray, scale: NDArray, shift: NDArray) -> NDArray:
    """s (b − μ) + β [O] of b, μ, s and β."""
    with np.errstate(all="ignore"):
        return (bias - mean) * scale + shift
