"""Weight clustering: in each layer the weights take few values, by what these cost in the file and do to the answers.

Each weight is given the value that minimises damage + price · bits (rate–distortion optimisation, as in DeepCABAC,
arXiv:1907.11900), the damage in nats by the layer's curvature. A layer's weights are rounded in turn, and those that
follow make good what they can of the error so far (arXiv:2210.17323). As all layers pay one price, bits are spent where
the answers need them. Distillation from the network as it was then moves the values that weights share.
"""

import copy
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flyweight.compress.curvature import Curvature, curvatures
from flyweight.compress.norms import with_merged_norms
from flyweight.compress.sparsify import after_each_step, calibration
from flyweight.compress.step import Context
from flyweight.errors import FlyweightError, UsageError
from flyweight.net import Net
from flyweight.packed.tensors import step_of
from flyweight.train.loop import logits
from flyweight.train.losses import distance
from flyweight.units import human_bytes

Floats = NDArray[np.float32]
Places = NDArray[np.int32]
Tried = tuple[float, float]  # a price and the bytes that it gave, in logarithms

DAMPING = 0.01  # of the mean moment: what keeps the factors of few pictures from being believed too much
FLOOR = 0.3  # of the mean power: an error too large for second moments counts where no picture's answer hangs on it
OVERRATED = 2  # times the measured damage of coarse rounding, what second moments predict
PASSES = 3  # of rounding and counting what its values cost, which is then what they cost in the next
PRIOR = 4  # weights that an input channel's share of zeros is believed to be the layer's before it is seen
FINER = 0.5  # times the step at which rounding to the nearest is best: here rounding weighs bits itself
BOOK_BITS, GRID_BITS = 20, 2  # that one more value takes in the file, in a book of any values and in a grid
TRIALS = 12  # prices tried at most to meet a size: the first, those a factor apart on the way to it, those between
FIRST_PRICE, STRIDE = 1e-7, math.log(20)
# Of a size: what a price is to give, what is near enough, and near enough where the time is over.
AIM, ENOUGH, ROUGHLY = 0.997, 0.992, 0.9
BATCH = 16
TRAINED_STEP = 4  # of a grid's step, to multiples of whose quarter training moves the values
TRAINED_BITS = 4  # that a value may then take more


@dataclass(frozen=True, eq=False)
class Layer:
    """The weights of a layer and what an error in them does.

    `rows` [groups, n, outputs], the last of them the bias where there is one; `factor` [groups, n, n], upper
    triangular, whose FᵀF is the inverse of the moments of what the rows are multiplied with; `power` [groups, outputs].
    """

    path: str
    shape: tuple[int, ...]
    rows: Floats
    factor: Floats
    power: Floats

    @classmethod
    def of(cls, path: str, leaf: nn.Module, curvature: Curvature) -> "Layer":
        """That of a convolution or a linear layer."""
        weight, bias = leaf.get_parameter("weight").detach(), getattr(leaf, "bias", None)
        groups = len(curvature.inputs)
        rows = weight.reshape(groups, weight.shape[0] // groups, -1)
        if bias is not None:
            rows = torch.cat([rows, bias.detach().reshape(groups, -1, 1)], 2)
        moments = curvature.inputs.clone()
        diagonal = moments.diagonal(dim1=1, dim2=2)
        diagonal += DAMPING * diagonal.mean() + torch.finfo(torch.float32).tiny
        factor = torch.linalg.cholesky(torch.linalg.inv(moments), upper=True)
        power = curvature.outputs.reshape(groups, -1)
        power = power.clamp(min=FLOOR * float(power.mean()))
        found = (each.float().contiguous().numpy() for each in (rows.transpose(1, 2), factor, power))
        return cls(path, tuple(weight.shape), *found)

    @property
    def count(self) -> int:
        """The weights of an output."""
        return math.prod(self.shape[1:])

    @property
    def weights(self) -> Floats:
        """[groups, count, outputs], without the bias."""
        return self.rows[:, : self.count]

    def bias_of(self, rows: Floats) -> Floats | None:
        """The bias [groups, outputs] among rows such as the layer's, where it has one."""
        return rows[:, self.count] if rows.shape[1] > self.count else None

    @cached_property
    def channels(self) -> Places:
        """The input channel of each weight of an output."""
        return np.arange(self.count, dtype=np.int32) // math.prod(self.shape[2:])

    def kernel(self, rows: Floats) -> Tensor:
        """Rows [groups, count, outputs] as the layer's weight."""
        return torch.from_numpy(rows.transpose(0, 2, 1).reshape(self.shape))

    def importance(self, row: int) -> Floats:
        """[groups, outputs]: damage by the square of a weight's error, once the rows after it have made good for it."""
        return np.divide(self.power, 2 * self.factor[:, row, row, None] ** 2, dtype=np.float32)


@dataclass(frozen=True, eq=False)
class Rates:
    """Bits that a weight takes: by input channel for a zero and for another, then for which value.

    What a value's place in the book takes is shared among the weights that have it.
    """

    zero: Floats
    other: Floats
    values: Floats

    @classmethod
    def of(cls, places: Places, book: Floats, channels: Places) -> "Rates":
        """What coding [groups, n, outputs] places in a book takes, once their frequencies are known."""
        zero = zero_of(book)
        there = places != zero
        own = places.size / (channels[-1] + 1)
        share = (np.bincount(channels, there.sum((0, 2))) + PRIOR * there.mean()) / (own + PRIOR)
        share = np.clip(share, 1e-4, 1 - 1e-4)[channels]
        counts = np.bincount(places[there], minlength=len(book))
        own = counts + 0.05  # no value is out of reach
        values = np.log2(own.sum() / own) + entry_bits(book) / np.maximum(counts, 1)
        values[zero] = 0.0
        return cls(*(each.astype(np.float32) for each in (-np.log2(1 - share), -np.log2(share), values)))

    def bits(self, places: Places, zero: int) -> float:
        """What the places take."""
        there = places != zero
        flags = np.where(there, self.other[:, None], self.zero[:, None]).sum(dtype=np.float64)
        return float(flags + self.values[places].sum(dtype=np.float64))


@dataclass(frozen=True, eq=False)
class Code:
    """A layer in few values: the ascending `book`, which holds a zero, and each weight's place in it.

    `damage` in nats; `bits` estimates what the layer takes in the file.
    """

    book: Floats
    places: Places
    bias: Floats | None
    damage: float
    bits: float

    @classmethod
    def of(cls, layer: Layer, book: Floats, places: Places, bias: Floats | None, damage: float) -> "Code":
        """With its bits."""
        bits = Rates.of(places, book, layer.channels).bits(places, zero_of(book))
        if bias is not None:
            values = np.unique(bias)
            bits += entropy(bias) + entry_bits(values) * len(values)
        return cls(book, places, bias, damage, bits)


def zero_of(book: Floats) -> int:
    """The place of zero in an ascending book."""
    return int(book.searchsorted(0.0))


def entry_bits(book: Floats) -> float:
    """What a value takes in the file beside the weights that have it."""
    return BOOK_BITS if step_of(book) is None else GRID_BITS


def entropy(values: NDArray) -> float:
    """Bits of all values, each by its frequency."""
    counts = np.unique(values, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def grid(values: Floats, importance: float, price: float, most: int) -> Floats:
    """Multiples of one step over the range of values, at most so many.

    A step s costs importance · s² / 12 a weight and saves log₂ s bits, whose sum is least where
    s² = 6 price / (importance · ln 2).
    """
    largest = float(np.abs(values).max(initial=0.0))
    step = math.sqrt(6 * price / (math.log(2) * importance)) if importance else largest
    step = np.float32(max(step, 2 * largest / (most - 1), 1e-12))
    reach = min(math.ceil(largest / float(step)), (most - 1) // 2)
    return np.arange(-reach, reach + 1, dtype=np.float32) * step


def rounded(layer: Layer, book: Floats, rates: Rates, price: float) -> tuple[Places, Floats, float]:
    """Each weight's place in the book; what was rounded to it, changed to make good for those before; the damage."""
    rows, zero, last = layer.rows.copy(), zero_of(book), len(book) - 1
    places = np.empty(layer.weights.shape, np.int32)
    damage = 0.0
    for j in range(layer.count):
        wanted = rows[:, j]
        low = (book.searchsorted(wanted, "right") - 1).clip(0, last)
        high = np.minimum(low + 1, last)
        inner = np.where(low >= zero, np.maximum(low - 1, zero), np.minimum(high + 1, zero))
        choices = np.stack([low, high, inner, np.full_like(low, zero)])
        bits = rates.values[choices] + np.where(choices == zero, rates.zero[j], rates.other[j])
        importance = layer.importance(j)
        costs = importance * (book[choices] - wanted) ** 2 + price * bits
        places[:, j] = np.take_along_axis(choices, costs.argmin(0)[None], 0)[0]
        error = wanted - book[places[:, j]]
        damage += float((importance * error**2).sum(dtype=np.float64))
        rows[:, j + 1 :] -= layer.factor[:, j, j + 1 :, None] * (error / layer.factor[:, j, j, None])[:, None]
    return places, rows, damage


def coded(layer: Layer, price: float, most: int) -> Code:
    """The layer in at most so many values of a grid, for which damage + price · bits is least.

    A layer that has few values stays as it is where changing them does not pay.
    """
    mean = float(np.mean([layer.importance(j).mean(dtype=np.float64) for j in range(layer.count)]))
    found = _coded_in(grid(layer.weights, mean, FINER**2 * price, most), layer, price, most)
    own = np.unique(np.append(layer.weights, np.float32(0.0)))
    if len(own) > most:
        return found
    exact = Code.of(layer, own, nearest(own, layer.weights), layer.bias_of(layer.rows), 0.0)
    return exact if price * exact.bits <= found.damage / OVERRATED + price * found.bits else found


def _coded_in(book: Floats, layer: Layer, price: float, most: int) -> Code:
    """The layer in values of a book."""
    places, wanted, damage = nearest(book, layer.weights), layer.rows, 0.0
    for _ in range(PASSES):
        rates = Rates.of(places, book, layer.channels)
        places, wanted, damage = rounded(layer, book, rates, price)
    bias = layer.bias_of(wanted)
    if bias is not None:
        importance = layer.importance(layer.count)
        steps = grid(bias, float(importance.mean(dtype=np.float64)), price, most)
        kept = steps[nearest(steps, bias)]
        damage, bias = damage + float((importance * np.square(bias - kept)).sum(dtype=np.float64)), kept
    return Code.of(layer, book, places, bias, damage)


def nearest(book: Floats, values: Floats) -> Places:
    """The place of the nearest value in an ascending book."""
    return ((book[1:] + book[:-1]) / 2).searchsorted(values).astype(np.int32)


@torch.no_grad()
def put(net: nn.Module, layers: Iterable[Layer], codes: Mapping[str, Code]) -> None:
    """Gives layers of a network their coded weights."""
    for layer in layers:
        leaf, code = net.get_submodule(layer.path), codes[layer.path]
        leaf.get_parameter("weight").copy_(layer.kernel(code.book[code.places]))
        if code.bias is not None:
            leaf.get_parameter("bias").copy_(torch.from_numpy(code.bias.reshape(-1)))


def all_coded(layers: Sequence[Layer], price: float, most: int) -> dict[str, Code]:
    """The layers at one price, in nats a bit."""
    return {layer.path: coded(layer, price, most) for layer in layers}


class Tied:
    """Weights that share a value go on sharing it while a network learns; zeros stay zero.

    A value moves as its weights would in the mean (arXiv:1510.00149, section 3): places, and what they take in the
    file, stay as they are. Values of a grid become those of a finer one.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # shares the memory of what is trained
        values, places = self.tensor.unique(return_inverse=True)
        self.places, self.counts, self.moves = places.flatten(), places.flatten().bincount(), values != 0
        step = step_of(values.numpy())
        self.step = None if step is None else float(step[0]) / TRAINED_STEP

    @torch.no_grad()
    def follow(self) -> None:
        """Takes over what a training step has changed."""
        sums = torch.zeros(len(self.counts), dtype=torch.float64)
        sums.index_add_(0, self.places, self.tensor.double().flatten())
        values = torch.where(self.moves, sums / self.counts, 0.0).to(self.tensor.dtype)
        self.tensor.copy_(values[self.places].view(self.tensor.shape))

    @torch.no_grad()
    def settle(self) -> None:
        """Brings the values to the finer grid."""
        if self.step is not None:
            self.tensor.copy_((self.tensor / self.step).round() * self.step + 0.0)  # no −0, which is another value


def away(net: Net, before: Net, context: Context) -> float:
    """How far a network's answers are from another's on the validation pictures: KL(before ‖ now) in nats."""
    now, then = (logits(each, context.validation, context.preprocess) for each in (net, before))
    return float(distance(now, then, 1.0))


def _between(low: Tried | None, high: Tried | None, wanted: float) -> float:
    """The price to try next, where the one leaves too much and the other little enough; all in logarithms."""
    if low is None or high is None:
        return high[0] - STRIDE if high else low[0] + STRIDE if low else 0.0
    share = (low[1] - wanted) / (low[1] - high[1]) if low[1] > high[1] else 0.5
    return low[0] + min(max(share, 0.1), 0.9) * (high[0] - low[0])


def size_of(net: Net, context: Context) -> int:
    """The bytes of the network's packed file, once its norms are merged."""
    return context.packed_bytes(with_merged_norms(net))


@dataclass(frozen=True)
class Cluster:
    """Gives each layer few values: at a `price` in nats a bit, or at that which packs the network into `size` bytes.

    A layer has at most `levels` values. What an error does to the answers is learnt from so many training `pictures`,
    without their labels. Where the context has time for it, the values are then trained towards the answers that the
    network gave before, with Adam at `rate`; this is undone where it does not help.
    """

    size: int | None = None
    price: float | None = None
    levels: int = 1024
    pictures: int = 256
    rate: float = 1e-4

    name: ClassVar[str] = "cluster"

    def __post_init__(self) -> None:
        if (self.size is None) == (self.price is None):
            raise UsageError("clustering needs either the size of the packed file or a price in nats a bit")
        if self.levels < 3 or self.pictures < 1 or (self.price is not None and self.price <= 0):
            raise UsageError("clustering needs three levels and a picture at least, and a price above 0")

    def __call__(self, net: Net, context: Context) -> Net:
        """Raises FlyweightError where the size is out of reach."""
        start = time.perf_counter()
        before, net = net, copy.deepcopy(net).eval()
        found = curvatures(net, calibration(context, self.pictures, BATCH), context.seed)
        layers = [Layer.of(path, net.get_submodule(path), each) for path, each in found.items()]
        price, codes = self._coded(net, layers, context, start)
        put(net, layers, codes)
        lost = [away(net, before, context)]
        if context.seconds is not None:
            context = replace(context, seconds=max(0.0, start + context.seconds - time.perf_counter()))
        if context.seconds or context.epochs:
            rounded = copy.deepcopy(net.state_dict())
            self._train(net, before, layers, context)
            lost.append(away(net, before, context))
            if lost[1] > lost[0] or (self.size is not None and size_of(net, context) > self.size):
                context.say("training the values towards the answers before did not help, so it is undone")
                net.load_state_dict(rounded)
        context.write(
            "clustered",
            price=price,
            packed_bytes=size_of(net, context),
            damage=sum(code.damage for code in codes.values()),
            lost=lost,
            layers={path: [len(np.unique(each.places)), round(each.bits / 8)] for path, each in codes.items()},
        )
        return with_merged_norms(net)

    def _coded(
        self, net: Net, layers: Sequence[Layer], context: Context, start: float
    ) -> tuple[float, dict[str, Code]]:
        """The price, and the layers at it: for a size found between prices tried before, tested on packed files."""
        if self.price is not None:
            return self.price, all_coded(layers, self.price, self.levels)
        assert self.size is not None
        spare = TRAINED_BITS / 8 if context.seconds or context.epochs else 0.0
        low: Tried | None = None
        high: Tried | None = None
        found, at = None, math.log(FIRST_PRICE)
        rest = 0.0  # what the file takes beside the estimate
        for trial in range(TRIALS):
            price = math.exp(at)
            codes = all_coded(layers, price, self.levels)
            more = spare * sum(len(np.unique(code.places)) for code in codes.values())
            estimate = sum(code.bits for code in codes.values()) / 8 + more
            if trial == 0 or estimate < self.size:  # what is beside the codes changes with the price
                put(net, layers, codes)
                rest = size_of(net, context) + more - estimate
            tried = at, math.log(estimate + rest)
            if estimate + rest > self.size:
                low = tried
            else:
                high, found = tried, (price, codes)
                late = context.seconds is not None and time.perf_counter() - start > context.seconds
                if estimate + rest > (ROUGHLY if late else ENOUGH) * self.size:
                    break
            at = _between(low, high, math.log(AIM * self.size))
        if found is None:
            raise FlyweightError(f"clustering cannot bring the packed file to {human_bytes(self.size)}: allow more")
        return found

    def _train(self, net: Net, teacher: Net, layers: Sequence[Layer], context: Context) -> None:
        """Moves the values so that the answers become the teacher's again."""
        leaves = [net.get_submodule(layer.path) for layer in layers]
        tied = [Tied(tensor) for leaf in leaves for tensor in leaf.parameters(recurse=False)]

        def follow() -> None:
            for each in tied:
                each.follow()

        recipe = replace(
            context.recipe, optimiser="adam", learning_rate=self.rate, weight_decay=0.0, ema=0.0, distil=1.0
        )
        with after_each_step(follow):
            replace(context, recipe=recipe, teacher=teacher).fine_tune(net)
        for each in tied:
            each.settle()
