"""Training with fused layers: activations stay in bfloat16, channels-last; norm, activation and sum are one pass.

What lies between the matrix products runs in the kernels of kernels.cpp. Weights, their gradients, statistics and sums
stay float32. A layer that has no fused form computes as it always does, on bfloat16 or float32 as it comes.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from itertools import pairwise
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from flyweight import ops
from flyweight.blocks import Residual, ShuffleUnit
from flyweight.graph import SHAPES
from flyweight.train import kernels

# The activations that the kernels know, in the order of their `Act`.
ACTS: dict[type[nn.Module], int] = {nn.Identity: 0, nn.ReLU: 1, nn.ReLU6: 2, nn.Hardswish: 3}
NONE, RELU = 0, 1
LAST = torch.channels_last
# oneDNN is slow on groups of fewer channels; several are then computed as one, with zeros between them.
FEWEST_CHANNELS, ENOUGH_CHANNELS = 8, 16


def _last(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """In channels-last memory, positions by channels without gaps."""
    x = x if dtype is None else x.to(dtype)
    _, c, h, w = x.shape
    wanted = (h * w * c, 1, w * c, c)
    if x.stride() == wanted:
        return x
    # Not `contiguous`: it takes many a stride for channels-last where a size is 1.
    return torch.empty_strided(x.shape, wanted, dtype=x.dtype).copy_(x)


def _empty(n: int, c: int, h: int, w: int, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided((n, c, h, w), (h * w * c, 1, w * c, c), dtype=dtype)


def _rows(x: Tensor) -> Tensor:
    """[N, C, H, W] in channels-last memory → [N · H · W, C], the same memory."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _pictures(rows: Tensor, n: int, h: int, w: int) -> Tensor:
    """The inverse of `_rows`."""
    return rows.view(n, h, w, rows.shape[1]).permute(0, 3, 1, 2)


def _prepared(norm: nn.BatchNorm2d, gamma: Tensor, beta: Tensor) -> tuple[kernels.Norm, Tensor]:
    """The kernels' view of a norm, and the tensor that keeps what its backward pass needs."""
    mean, var, momentum = norm.running_mean, norm.running_var, norm.momentum
    assert mean is not None
    assert var is not None
    assert momentum is not None
    kept = torch.empty(4 * len(mean))
    places = (each.data_ptr() for each in (gamma, beta, mean, var, kept))
    return kernels.Norm(*places, norm.eps, momentum, norm.training), kept


class _Norm(Function):
    """act(BatchNorm(y) + side), one pass for the statistics and one for the rest."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, side: Tensor | None, gamma: Tensor, beta: Tensor, norm: nn.BatchNorm2d, act: int
    ) -> Tensor:
        y = _last(y)
        side = side if side is None else _last(side, y.dtype)
        n, c, h, w = y.shape
        own, kept = _prepared(norm, gamma, beta)
        z = torch.empty_like(y)
        kernels.call("norm_forward", y.dtype, y, side, z, n * h * w, c, own, act)
        ctx.act, ctx.training, ctx.sided = act, norm.training, side is not None
        ctx.save_for_backward(y, kept, z if ctx.sided and act else None)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        y, kept, z = ctx.saved_tensors
        dz = _last(dz, y.dtype)
        n, c, h, w = y.shape
        dy, dgamma, dbeta = torch.empty_like(y), torch.empty(c), torch.empty(c)
        dside = torch.empty_like(y) if z is not None else None
        kernels.call(
            "norm_backward", y.dtype, dz, y, z, dy, dside, n * h * w, c, kept, dgamma, dbeta, ctx.training, ctx.act
        )
        return dy, (dside if ctx.act else dz) if ctx.sided else None, dgamma, dbeta, None, None


class _NormDepthwise(Function):
    """A depthwise convolution of act(BatchNorm(y)), which exists for one picture at a time."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, norm: nn.BatchNorm2d, act: int,
        shape: kernels.Shape,
    ) -> Tensor:  # fmt: skip
        y, weight = _last(y), weight.contiguous()
        own, kept = _prepared(norm, gamma, beta)
        out = _empty(shape.n, shape.channels, shape.out_height, shape.out_width, y.dtype)
        kernels.call("norm_depthwise_forward", y.dtype, y, weight, out, own, act, shape)
        ctx.act, ctx.training, ctx.shape = act, norm.training, shape
        ctx.save_for_backward(y, kept, weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        y, kept, weight = ctx.saved_tensors
        dout = _last(dout, y.dtype)
        c = y.shape[1]
        dy, dw, dgamma, dbeta = torch.empty_like(y), torch.empty(weight.shape), torch.empty(c), torch.empty(c)
        kernels.call(
            "norm_depthwise_backward", y.dtype, dout, y, weight, dy, dw, kept, dgamma, dbeta,
            ctx.training, ctx.act, ctx.shape,
        )  # fmt: skip
        return dy, dgamma, dbeta, dw, None, None, None


class _Depthwise(Function):
    """A depthwise convolution."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, shape: kernels.Shape) -> Tensor:
        x, weight = _last(x), weight.contiguous()
        ctx.shape = shape
        y = _empty(shape.n, shape.channels, shape.out_height, shape.out_width, x.dtype)
        kernels.call("depthwise_forward", x.dtype, x, weight, y, shape)
        ctx.save_for_backward(x, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        dy = _last(dy, x.dtype)
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dw = torch.empty(weight.shape) if ctx.needs_input_grad[1] else None
        kernels.call("depthwise_backward", x.dtype, x, dy, weight, dx, dw, ctx.shape)
        return dx, dw, None


class _Pointwise(Function):
    """A 1 × 1 convolution as a product of matrices."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x = _last(x)
        n, _, h, w = x.shape
        matrix = weight.detach().flatten(1).to(x.dtype)
        ctx.save_for_backward(x, matrix)
        ctx.kernel = weight.shape
        return _pictures(torch.mm(_rows(x), matrix.t()), n, h, w)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, matrix = ctx.saved_tensors
        n, _, h, w = dy.shape
        rows = _rows(_last(dy, x.dtype))
        dx = _pictures(torch.mm(rows, matrix), n, h, w) if ctx.needs_input_grad[0] else None
        return dx, torch.mm(rows.t(), _rows(x)).float().view(ctx.kernel)


class _GroupedPointwise(Function):
    """A 1 × 1 convolution in groups, of an even number of channels each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        x, weight = _last(x), weight.detach().contiguous()
        n, c, h, w = x.shape
        o = len(weight)
        y = _empty(n, o, h, w, x.dtype)
        ctx.sizes = n * h * w, groups, c // groups, o // groups
        kernels.call("pointwise", x.dtype, x, weight, y, *ctx.sizes, 0)
        ctx.save_for_backward(x, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        dy, dw, dx = _last(dy, x.dtype), torch.empty(weight.shape), None
        rows, groups, own, out = ctx.sizes
        kernels.call("pointwise_weights", x.dtype, dy, x, dw, rows, groups, own, out)
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            kernels.call("pointwise", x.dtype, dy, weight, dx, rows, groups, out, own, 1)
        return dx, dw, None


def _geometry(window: ops.Window, x: Tensor) -> kernels.Shape:
    """kernels.cpp's Shape of a depthwise convolution or average pool on x."""
    n, c, height, width = x.shape
    kernel, stride, gap = ops.pair(window.kernel_size), ops.pair(window.stride), ops.dilation(window)
    _, out_height, out_width = SHAPES[type(window)](window, (c, height, width))
    top, _, left, _ = ops.edges(window, height, width)
    return kernels.Shape(n, c, height, width, out_height, out_width, *kernel, stride[0], gap[0], top, left)


def _together(weight: Tensor, groups: int, factor: int) -> Tensor:
    """The weight of a grouped convolution with `factor` groups as one, zeros between them."""
    out, own, kh, kw = weight.shape
    parts = weight.view(groups // factor, factor, out // groups, own, kh, kw)
    whole = torch.zeros(groups // factor, factor, out // groups, factor, own, kh, kw, dtype=weight.dtype)
    whole.diagonal(0, 1, 3).copy_(parts.permute(0, 2, 3, 4, 5, 1))
    return whole.view(out, factor * own, kh, kw)


def _shuffle(shuffle: ops.ChannelShuffle, x: Tensor) -> Tensor:
    """Without leaving channels-last memory."""
    n, c, h, w = x.shape
    rows = _rows(_last(x)).view(-1, shuffle.groups, c // shuffle.groups)
    return _pictures(rows.transpose(1, 2).reshape(-1, c), n, h, w)


def _drop(drop: nn.Dropout, x: Tensor) -> Tensor:
    """Four values share one random number of 64 bits: torch draws one for each."""
    if not drop.training or drop.p == 0:
        return x
    x = _last(x) if x.ndim == 4 else x.contiguous()
    count = x.numel()
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    keep = bits.view(torch.int16)[:count] >= round(drop.p * 2**16) - 2**15
    scale = keep.to(x.dtype).mul_(1 / (1 - drop.p))
    return x * scale.as_strided(x.shape, x.stride())


def _counts_all(pool: nn.AvgPool2d) -> bool:
    """Every window divides by its whole size."""
    padded = pool.count_include_pad or not any(ops.pair(pool.padding))
    return padded and not pool.ceil_mode and pool.divisor_override is None


def _avg_pool(pool: nn.AvgPool2d, x: Tensor) -> Tensor:
    """As a depthwise convolution with equal weights."""
    kh, kw = ops.pair(pool.kernel_size)
    y = _Depthwise.apply(x, torch.full((x.shape[1], 1, kh, kw), 1 / (kh * kw)), _geometry(pool, x))
    assert isinstance(y, Tensor)
    return y


def _factor(conv: nn.Conv2d) -> int:
    """How many groups of a convolution to take as one."""
    factor, own = 1, conv.in_channels // conv.groups
    if conv.groups == 1 or own >= FEWEST_CHANNELS:
        return 1
    while own * factor < ENOUGH_CHANNELS and conv.groups % (2 * factor) == 0:
        factor *= 2
    return factor


def _plain(window: ops.Window) -> bool:
    """Zero padding, one stride and one dilation: what a kernel of ours takes."""
    if type(window) not in SHAPES or getattr(window, "padding_mode", "zeros") != "zeros":
        return False
    (vertical, horizontal), gaps = ops.pair(window.stride), ops.dilation(window)
    return vertical == horizontal and gaps[0] == gaps[1]


def _depthwise(leaf: nn.Module) -> bool:
    """A convolution of one filter for each channel, as the kernels compute it."""
    if not isinstance(leaf, nn.Conv2d) or not _plain(leaf):
        return False
    return leaf.groups == leaf.in_channels == leaf.out_channels and leaf.groups > 1


def _convolve(conv: nn.Conv2d, x: Tensor, dtype: torch.dtype) -> Tensor:
    x, weight, groups = x.to(dtype), conv.weight, conv.groups
    own, out = conv.in_channels // groups, conv.out_channels // groups
    pointwise = conv.kernel_size == (1, 1) and not any(ops.edges(conv, *x.shape[2:]))
    read = x[:, :, :: conv.stride[0], :: conv.stride[1]]  # by a pointwise one; oneDNN's own backward pass can crash
    if _depthwise(conv):
        y = _Depthwise.apply(x, weight, _geometry(conv, x))
    elif pointwise and groups == 1:
        y = _Pointwise.apply(read, weight)
    elif pointwise and own % 2 == out % 2 == 0:
        y = _GroupedPointwise.apply(read, weight, groups)
    else:
        y = _dense(conv, x.contiguous(memory_format=LAST), weight.to(dtype))
    assert isinstance(y, Tensor)
    return y if conv.bias is None else y + conv.bias.to(dtype)[:, None, None]


def _dense(conv: nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    """By oneDNN, with enough channels in a group where the class is known."""
    factor = _factor(conv) if type(conv) is nn.Conv2d and conv.padding_mode == "zeros" else 1
    if factor == 1:
        return conv._conv_forward(x, weight.contiguous(memory_format=LAST), None)
    weight = _together(weight, conv.groups, factor).contiguous(memory_format=LAST)
    return F.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups // factor)


def _normalise(norm: nn.BatchNorm2d, y: Tensor, side: Tensor | None, act: int, dtype: torch.dtype) -> Tensor:
    _count(norm, y)
    z = _Norm.apply(y.to(dtype), side, norm.weight, norm.bias, norm, act)
    assert isinstance(z, Tensor)
    return z


def _norm_depthwise(norm: nn.BatchNorm2d, act: int, conv: nn.Conv2d, y: Tensor, dtype: torch.dtype) -> Tensor:
    _count(norm, y)
    shape = _geometry(conv, y)
    z = _NormDepthwise.apply(y.to(dtype), norm.weight, norm.bias, conv.weight, norm, act, shape)
    assert isinstance(z, Tensor)
    return z


def _count(norm: nn.BatchNorm2d, y: Tensor) -> None:
    """Counts the batch, and refuses one without statistics as torch does."""
    if not norm.training:
        return
    if y.numel() == y.shape[1]:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {y.size()}")
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)


def _fits(module: nn.Module) -> bool:
    """Its own parameters, if any, are as the kernels take them."""
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return all(p.device.type == "cpu" and p.dtype == torch.float32 for p in own if p.is_floating_point())


def _known(norm: nn.Module) -> bool:
    """A BatchNorm as the kernels compute it, and no class that is derived from it."""
    if type(norm) is not nn.BatchNorm2d or not _fits(norm):
        return False
    return norm.affine and norm.track_running_stats and norm.momentum is not None


class _Install:
    """Gives leaves and blocks of a network their fused forwards; `undo` takes them away."""

    def __init__(self, net: nn.Module, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.changed: list[nn.Module] = []
        self.uses = Counter(id(m) for _, m in net.named_modules(remove_duplicate=False))
        self.folded: dict[int, int] = {}  # norm → its activation
        modules = [module for module in net.modules() if _fits(module)]
        for module in modules:
            self._fold(module)
        for module in modules:
            self._change(module)
        for module in modules:
            if type(module).forward is nn.Sequential.forward:
                self._chain(module)

    def _set(self, module: nn.Module, forward: Callable[..., Tensor]) -> None:
        module.forward = MethodType(forward, module)
        self.changed.append(module)

    def undo(self) -> None:
        for module in self.changed:
            module.__dict__.pop("forward", None)

    def _fold(self, module: nn.Module) -> None:
        """An activation that follows a norm is computed with it."""
        if type(module).forward is not nn.Sequential.forward:
            return
        for norm, act in pairwise(module.children()):
            alone = self.uses[id(norm)] == self.uses[id(act)] == 1 and not _heard(norm) and not _heard(act)
            if alone and _known(norm) and type(act) in ACTS:
                self.folded[id(norm)] = ACTS[type(act)]
                self._set(act, lambda self, x: x)

    def _change(self, module: nn.Module) -> None:
        dtype, act = self.dtype, self.folded.get(id(module), NONE)
        if isinstance(module, nn.Conv2d):
            self._set(module, lambda self, x: _convolve(self, x, dtype))
        elif _known(module):
            self._set(module, lambda self, y: _normalise(self, y, None, act, dtype))
        elif type(module) is nn.Dropout:
            self._set(module, _drop)
        elif isinstance(module, nn.Linear):
            self._set(module, lambda self, x: F.linear(x.float(), self.weight, self.bias))
        elif isinstance(module, ops.ChannelShuffle):
            self._set(module, _shuffle)
        elif type(module) is nn.AvgPool2d and _plain(module) and _counts_all(module):
            self._set(module, _avg_pool)
        elif isinstance(module, Residual) and isinstance(module.scale, nn.Identity):
            self._end_together(module, True)
        elif isinstance(module, ShuffleUnit):
            self._end_together(module, isinstance(module.join, ops.Add))

    def _chain(self, sequence: nn.Module) -> None:
        """Runs a sequence and those within it as one; members keep their own forwards, for who calls them singly."""
        leaves = self._leaves(sequence)
        steps = self._steps(leaves)
        if len(steps) < len(leaves):
            self._set(sequence, lambda self, x: reduce(lambda value, step: step(value), steps, x))

    def _leaves(self, sequence: nn.Module) -> list[nn.Module]:
        """The modules of nested sequences in order; where somebody listens to one, it stays whole."""
        if type(sequence).forward is not nn.Sequential.forward or _heard(sequence):
            return [sequence]
        return [leaf for child in sequence.children() for leaf in self._leaves(child)]

    def _steps(self, leaves: list[nn.Module]) -> list[Callable[[Tensor], Tensor]]:
        """Leaves to call in turn: a norm, its activation and the depthwise convolution after it become one."""
        steps: list[Callable[[Tensor], Tensor]] = []
        i = 0
        while i < len(leaves):
            end = i + 2 if id(leaves[i]) in self.folded else i + 1
            taken = leaves[i : end + 1]
            if self._pair(taken):
                steps.append(self._paired(taken[0], taken[-1]))
                i = end + 1
            else:
                steps.append(leaves[i])
                i += 1
        return steps

    def _pair(self, leaves: list[nn.Module]) -> bool:
        if len(leaves) < 2 or not _known(leaves[0]) or any(_heard(leaf) for leaf in leaves):
            return False
        return _depthwise(leaves[-1]) and _fits(leaves[-1]) and leaves[-1].bias is None

    def _paired(self, norm: nn.Module, conv: nn.Module) -> Callable[[Tensor], Tensor]:
        dtype, act = self.dtype, self.folded.get(id(norm), NONE)
        return lambda y: _norm_depthwise(norm, act, conv, y, dtype)  # type: ignore[arg-type]

    def _end_together(self, module: nn.Module, adds: bool) -> None:
        """The last norm of a residual's body adds the shortcut, if it is added, and applies the activation."""
        leaves, act = self._leaves(module.body), ACTS.get(type(module.act))  # type: ignore[arg-type]
        last = leaves[-1]
        alone = self.uses[id(last)] == 1 and not _heard(last) and id(last) not in self.folded
        if act is None or act > RELU or not _known(last) or not alone:
            return
        steps, dtype = self._steps(leaves[:-1]), self.dtype

        def forward(self: nn.Module, x: Tensor) -> Tensor:
            y, side = reduce(lambda value, step: step(value), steps, x), self.shortcut(x)  # type: ignore[operator]
            if adds:
                return _normalise(last, y, side, act, dtype)  # type: ignore[arg-type]
            return self.join(self.act(side), _normalise(last, y, None, act, dtype))  # type: ignore[arg-type, operator]

        self._set(module, forward)


def _heard(module: nn.Module) -> bool:
    """Somebody wants to be called with the module."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


@contextmanager
def fused(net: nn.Module, dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    """Within it the network computes in fused layers, activations in `dtype`: float32 is what tests compare with.

    Raises NoKernels where the machine cannot build them.
    """
    kernels.library(dtype)
    installed = _Install(net, dtype)
    try:
        yield
    finally:
        installed.undo()
