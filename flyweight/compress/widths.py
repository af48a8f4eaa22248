"""Which widths the layers of a network can have, and what it costs at them: units of channels that go together."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import nn

from flyweight import ops
from flyweight.channels import Group, Slice
from flyweight.costs import PRECISIONS
from flyweight.graph import trace
from flyweight.net import Net, Spec
from flyweight.transfer import Narrowing, Weigh, numbers, places
from flyweight.zoo import structure

Place = frozenset[str]
# Widths are multiples of a power of two that leaves a unit at least, and at most, so many widths to go to.
LEAST_CHOICE, MOST_CHOICE = 3, 16


@dataclass(frozen=True)
class Unit:
    """Channels that go in equal shares: those of one place, or of places whose shares of a layer must stay equal."""

    places: Mapping[Place, Sequence[Group]]

    @cached_property
    def steps(self) -> int:
        """Into how many equal shares the unit's channels can be cut, at every leaf that they pass."""
        seats = Counter(seat for place, groups in self.places.items() for seat in place for _ in groups)
        return math.gcd(*seats.values())

    @cached_property
    def widths(self) -> Counter[str]:
        """How many of a leaf's channels, by the path of what computes or pads them, are the unit's."""
        found: Counter[str] = Counter()
        for place, groups in self.places.items():
            padded = [seat for seat in place if ":" not in seat]
            for group in groups:
                found.update({each.tensor.rpartition(".")[0]: len(each.positions) for each in group.filters})
                found.update(padded)
        return found

    @property
    def slices(self) -> Iterator[Slice]:
        """All that the network holds of them."""
        return (each for groups in self.places.values() for group in groups for each in group.slices)

    def __len__(self) -> int:
        return sum(map(len, self.places.values()))


def units(net: Net) -> list[Unit]:
    """The units of a network's channels, but for its input and its classes.

    Raises GraphError or UsageError where a leaf mixes channels, so that none can be taken away.
    """
    found = places(net)
    layers: defaultdict[str, defaultdict[str, list[Place]]] = defaultdict(lambda: defaultdict(list))
    for place in found:
        for seat in place:
            layer, _, part = seat.rpartition(":")
            if layer:
                layers[layer][part].append(place)
    bound = {place: {place} for place in found}
    for parts in layers.values():
        if len(parts) > 1:
            tied = set().union(*(bound[place] for members in parts.values() for place in members))
            bound.update(dict.fromkeys(tied, tied))
    distinct = {id(tied): tied for tied in bound.values()}
    return [Unit({place: found[place] for place in found if place in tied}) for tied in distinct.values()]


@dataclass(frozen=True)
class Level:
    """A unit with `share` of its channels, as many at each place as `counts` tells."""

    share: float
    counts: Mapping[Place, int]


def levels(net: Net, found: Sequence[Unit], keep: float, multiple: int) -> list[list[Level]]:
    """For each unit the numbers of channels that it can have, from all of them down to `keep` of its family's.

    They are multiples of `multiple`, less where that leaves too small a choice, more where it leaves a needless one.
    Where several places are bound together, the narrower network itself tells how many channels each of them has.
    """
    with torch.device("meta"):
        whole = numbers(structure(replace(net.spec, widths={})))
    wanted = [_shares(unit, math.ceil(keep * sum(whole[p] for p in unit.places)), multiple) for unit in found]
    chains = [[Level(1.0, {place: len(groups) for place, groups in unit.places.items()})] for unit in found]
    for i in range(max(map(len, wanted), default=0)):
        chosen = [shares[i] if i < len(shares) else 1.0 for shares in wanted]
        bound = any(share < 1 and len(unit.places) > 1 for unit, share in zip(found, chosen, strict=True))
        narrower = _narrower(net, widths_at(net, found, chosen)) if bound else Counter()
        for unit, share, chain in zip(found, chosen, chains, strict=True):
            level = _level(unit, share, narrower)
            if share < 1 and level is not None:
                chain.append(level)
    return chains


def _shares(unit: Unit, least: int, multiple: int) -> list[float]:
    """The shares below 1 that leave `least` channels, and two at every leaf, in widths that suit the engine."""
    own, steps = unit.widths.values(), unit.steps
    possible = [k for k in range(steps - 1, 0, -1) if k * len(unit) >= least * steps]
    possible = [k for k in possible if all(k * width >= 2 * steps for width in own)]

    def suited(multiple: int) -> list[int]:
        return [k for k in possible if all(k * width % (multiple * steps) == 0 for width in own)]

    while multiple > 1 and len(suited(multiple)) < LEAST_CHOICE:
        multiple //= 2
    while len(suited(multiple)) > MOST_CHOICE and len(suited(2 * multiple)) >= LEAST_CHOICE:
        multiple *= 2
    return [k / steps for k in suited(multiple)]


def widths_at(net: Net, found: Sequence[Unit], shares: Iterable[float]) -> dict[str, int]:
    """The widths of the layers where the units have these shares of their channels (`Spec.widths`)."""
    gone: Counter[str] = Counter()
    for unit, share in zip(found, shares, strict=True):
        gone.update({path: round((1 - share) * width) for path, width in unit.widths.items()})
    return {path: _width(net, path) - less for path, less in gone.items() if less}


def _width(net: Net, path: str) -> int:
    parent, _, attribute = path.rpartition(".")
    leaf = net.get_submodule(parent)
    if isinstance(leaf, ops.PadChannels):
        return getattr(leaf, attribute)
    leaf = net.get_submodule(path)
    return leaf.out_features if isinstance(leaf, nn.Linear) else leaf.out_channels  # type: ignore[return-value]


def _narrower(net: Net, widths: Mapping[str, int]) -> Counter[Place]:
    with torch.device("meta"):
        return numbers(structure(_narrowed(net.spec, widths)))


def _narrowed(spec: Spec, widths: Mapping[str, int]) -> Spec:
    return replace(spec, widths={**spec.widths, **widths})


def _level(unit: Unit, share: float, narrower: Counter[Place]) -> Level | None:
    """A unit at a share, or None where the narrower network reads or adds channels that were not read or added."""
    if len(unit.places) == 1:
        return Level(share, {place: round(share * len(unit)) for place in unit.places})
    counts = {place: narrower[place] for place in unit.places}
    fits = all(count <= len(unit.places[place]) for place, count in counts.items())
    return Level(share, counts) if fits and sum(counts.values()) == round(share * len(unit)) else None


def cut(net: Net, widths: Mapping[str, int], weigh: Weigh) -> Net:
    """The network with fewer channels, those that weigh the most at their places; in evaluation mode, untrained since.

    Where the channels that go compute zero, it answers the same.
    """
    pruned = structure(_narrowed(net.spec, widths)).to(next(net.parameters()))
    pruned.load_state_dict(Narrowing(pruned, net, weigh).tensors())
    pruned.pretrained_cfg = net.pretrained_cfg
    return pruned.eval()


class Ledger:
    """What a network costs when its units have only shares of their channels, [units], each in (0, 1].

    A kernel has rows · columns · area values, and its MACs are these times the positions of its output.
    """

    def __init__(self, net: Net, found: Sequence[Unit]) -> None:
        tensors, of_weight, of_bias = net.state_dict(), *PRECISIONS["float32"]
        index, macs, size, biases = dict[str, int](), list[float](), list[float](), list[float]()
        for node in trace(net, net.spec.input).nodes:
            if isinstance(node.leaf, nn.Conv2d | nn.Linear):
                name = f"{node.path}.weight"
                area = math.prod(tensors[name].shape[2:])
                if name not in index:
                    index[name] = len(index)
                    macs.append(0)
                    size.append(of_weight * area)
                    # A convolution has a bias when it is deployed, its own or its norm's.
                    biases.append(of_bias * (isinstance(node.leaf, nn.Conv2d) or node.leaf.bias is not None))
                macs[index[name]] += area * math.prod(node.shape[1:])
        self.prices = {"macs": (np.array(macs), np.zeros(len(macs))), "bytes": (np.array(size), np.array(biases))}
        self.owned = [np.zeros((len(index), len(found))) for _ in (0, 1)]
        for u, unit in enumerate(found):
            for each in unit.slices:
                if each.tensor in index:
                    parts = parts_of(net, each.tensor) if each.axis else 1
                    self.owned[each.axis][index[each.tensor], u] += len(each.positions) / parts
        whole = [np.array([tensors[name].shape[axis] for name in index], float) for axis in (0, 1)]
        self.fixed = [size - owned.sum(1) for size, owned in zip(whole, self.owned, strict=True)]

    def cost(self, resource: str, shares: np.ndarray) -> float:
        """The "macs", or the "bytes" of the deployed float32 weights."""
        return float(self._priced(resource, *(f + o @ shares for f, o in zip(self.fixed, self.owned, strict=True))))

    def costs(self, resource: str, shares: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """[units]: the cost when one unit alone goes to its lower share."""
        sizes = [(f + o @ shares)[:, None] + o * (lower - shares) for f, o in zip(self.fixed, self.owned, strict=True)]
        return self._priced(resource, *sizes)

    def _priced(self, resource: str, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        of_value, of_row = self.prices[resource]
        return of_value @ (rows * columns) + of_row @ rows


def parts_of(net: Net, tensor: str) -> int:
    """In how many groups a leaf convolves."""
    leaf = net.get_submodule(tensor.rpartition(".")[0])
    return leaf.groups if isinstance(leaf, nn.Conv2d) else 1
