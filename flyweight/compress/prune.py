"""Structured pruning: the channels that matter least for what they cost go, a few at a time, with training in between.

What is left is an ordinary network, whose Spec states its widths.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flyweight.channels import Group
from flyweight.compress.precision import calibration_sample
from flyweight.compress.step import Context
from flyweight.compress.widths import Ledger, Level, Unit, cut, levels, parts_of, units, widths_at
from flyweight.costs import cost
from flyweight.errors import FlyweightError, UsageError
from flyweight.graph import trace
from flyweight.net import Net
from flyweight.train.inputs import normalise
from flyweight.transfer import Weigh, filter_norms
from flyweight.units import percent

IMPORTANCES = ("taylor", "l1", "l2")
BATCH = 16  # pictures in a calibration batch: small ones, since gradients of many pictures cancel in a trained network
# Shares of the MACs are tried so many times to find the one that meets a latency, `TRIAL_SECONDS` each.
TRIALS, TRIAL_SECONDS = 6, 0.3
LAST_ROUND = 0.5  # of the time to train: the others share the rest


def taylor(net: Net, context: Context, pictures: int) -> Weigh:
    """√ mean (Σ ∂L/∂w · w)², over batches of training pictures, of the weights w that read a channel.

    The sum is ∂L/∂x · x, to first order the loss without the channel x (arXiv:1906.10771, equation 8).
    """
    paths = [node.path for node in trace(net, net.spec.input).nodes if isinstance(node.leaf, nn.Conv2d | nn.Linear)]
    kernels = {f"{path}.weight": net.get_parameter(f"{path}.weight") for path in dict.fromkeys(paths)}
    found: defaultdict[str, list[Tensor]] = defaultdict(list)
    net.eval()
    for x, labels in _batches(context, pictures):
        gradients = torch.autograd.grad(F.cross_entropy(net(x), labels), list(kernels.values()))
        for (name, weight), gradient in zip(kernels.items(), gradients, strict=True):
            parts, (rows, columns) = parts_of(net, name), weight.shape[:2]
            products = (gradient * weight.detach()).reshape(parts, rows // parts, columns, -1)
            found[name].append(products.sum((1, 3)).flatten())
    table = {name: torch.stack(values) for name, values in found.items()}

    def weigh(group: Group) -> float:
        read = [table[each.tensor][:, list(each.positions)].sum(1) for each in group.slices if each.axis == 1]
        return float(torch.stack(read).sum(0).square().mean().sqrt()) if read else 0.0

    return weigh


def _batches(context: Context, pictures: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Training pictures as they are, in batches of equal size, and their labels."""
    data, preprocess = context.train, context.preprocess
    chosen = calibration_sample(len(data), context.seed, pictures)
    for part in np.array_split(np.random.default_rng(context.seed).permutation(chosen), max(1, len(chosen) // BATCH)):
        pixels = torch.from_numpy(data.batch(preprocess.size[0], part))
        yield normalise(pixels, preprocess), torch.from_numpy(data.labels[part])


class Plan:
    """How many channels each unit of a network is to have: all of them at first."""

    def __init__(self, net: Net, weigh: Weigh, settings: "Prune") -> None:
        self.net, self.weigh, self.units = net, weigh, units(net)
        self.chains = levels(net, self.units, settings.keep, settings.multiple)
        if all(len(chain) == 1 for chain in self.chains):
            raise UsageError(f"none of the channels of this {net.spec.family} can be taken away")
        relative = settings.importance != "taylor"
        self.losses = [_losses(u, chain, weigh, relative) for u, chain in zip(self.units, self.chains, strict=True)]
        self.ledger = Ledger(net, self.units)
        self.at = [0] * len(self.units)

    def cost(self, resource: str) -> float:
        """What the network is to cost."""
        return self.ledger.cost(resource, self._shares(0))

    def least(self, resource: str) -> float:
        """What it costs where every unit has as few channels as it can."""
        return self.ledger.cost(resource, np.array([chain[-1].share for chain in self.chains]))

    def reachable(self, resource: str, limit: float) -> float:
        """The limit. Raises FlyweightError where pruning cannot reach it."""
        least = self.least(resource)
        if least > limit:
            now, of = self.cost(resource), {"macs": "MACs", "bytes": "bytes of weights"}[resource]
            left, wanted = percent(least / now), percent(limit / now)
            raise FlyweightError(
                f"pruning can leave {left} of the {of}, not {wanted}: raise the limit, or let it keep fewer channels"
            )
        return limit

    def reduce(self, resource: str, limit: float) -> "Plan":
        """Takes what matters least for each MAC or byte that it saves, unit by unit, until the limit is met.

        Raises FlyweightError where no more can go.
        """
        while (now := self.cost(resource)) > limit:
            saved = now - self.ledger.costs(resource, self._shares(0), self._shares(1))
            prices = [self._lost(u) / max(each, 1e-9) for u, each in enumerate(saved.tolist())]
            cheapest = int(np.argmin(prices))
            if math.isinf(prices[cheapest]):
                raise FlyweightError("pruning ends above its limit, with no channels left to take: raise the limit")
            self.at[cheapest] += 1
        while (needless := self._needless(resource, limit)) is not None:
            self.at[needless] -= 1
        return self

    def _lost(self, unit: int) -> float:
        """What the channels weigh that go next; infinite where none can."""
        losses, at = self.losses[unit], self.at[unit]
        return losses[at + 1] - losses[at] if at + 1 < len(losses) else math.inf

    def _needless(self, resource: str, limit: float) -> int | None:
        """The unit whose last step, of those that the limit leaves room to undo, took what weighs the most."""
        costs = self.ledger.costs(resource, self._shares(0), self._shares(-1))
        undone = {u: self.losses[u][at] - self.losses[u][at - 1] for u, at in enumerate(self.at) if at}
        return max((u for u in undone if costs[u] <= limit), key=lambda u: undone[u], default=None)

    def cut(self) -> Net:
        """The network with those channels."""
        return cut(self.net, widths_at(self.net, self.units, self._shares(0)), self.weigh)

    def _shares(self, further: int) -> np.ndarray:
        """The units' shares, now or so many levels further down, where there are."""
        places = (min(max(at + further, 0), len(chain) - 1) for chain, at in zip(self.chains, self.at, strict=True))
        return np.array([chain[place].share for chain, place in zip(self.chains, places, strict=True)])


def _losses(unit: Unit, chain: Sequence[Level], weigh: Weigh, relative: bool) -> list[float]:
    """What all channels weigh that are gone at each level."""
    weights = {place: np.sort([weigh(group) for group in groups]) for place, groups in unit.places.items()}
    mean = sum(own.sum() for own in weights.values()) / len(unit) if relative else 1.0
    gone = [{place: len(own) - level.counts[place] for place, own in weights.items()} for level in chain]
    return [sum(float(weights[place][:n].sum()) for place, n in each.items()) / (mean or 1.0) for each in gone]


@dataclass(frozen=True)
class Prune:
    """Takes channels away until a limit is met: `macs` or `size` or `latency`, whichever is given.

    `macs` is a share of the network's own, `size` the bytes of its float32 ONNX file, `latency` milliseconds there.
    `importance` is "taylor" (arXiv:1906.10771), on so many `pictures`, or the filters' norm, "l1" or "l2"
    (arXiv:1608.08710), relative to the mean of its layer. In each of `rounds` what is least important for the MACs or
    bytes that it costs goes, over all layers, and the network is trained. A layer keeps the share `keep` of the
    channels that its family gives it, in multiples of `multiple` where it has enough.
    """

    macs: float | None = None
    size: int | None = None
    latency: float | None = None
    importance: str = "taylor"
    rounds: int = 4
    keep: float = 0.125
    multiple: int = 8
    pictures: int = 512

    name: ClassVar[str] = "prune"

    def __post_init__(self) -> None:
        if sum(limit is not None for limit in (self.macs, self.size, self.latency)) != 1:
            raise UsageError("pruning needs one limit: a share of the MACs, a size or a latency")
        if self.macs is not None and not 0 < self.macs < 1:
            raise UsageError(f"pruning leaves a share of the MACs between 0 and 1, not {self.macs:g}")
        if self.importance not in IMPORTANCES:
            raise UsageError(f"importance is one of {', '.join(IMPORTANCES)}, not {self.importance!r}")
        if self.rounds < 1 or self.multiple < 1 or not 0 < self.keep <= 1:
            raise UsageError("pruning needs a round at least, a multiple from 1 on and a share to keep in (0, 1]")

    def __call__(self, net: Net, context: Context) -> Net:
        """The pruned and trained network; where the limit is met already, the network itself.

        Raises UsageError where no channel can go, FlyweightError where the limit is out of reach.
        """
        plan = Plan(net, self.weigh(net, context), self)
        resource, limit = self._limit(plan, context)
        if plan.cost(resource) <= limit:
            context.say("nothing is pruned: the network is within the limit as it is")
            return net
        for left in reversed(range(self.rounds)):
            share = (limit / plan.cost(resource)) ** (1 / (left + 1))
            net = plan.reduce(resource, share * plan.cost(resource)).cut()
            trained = context.fine_tune(net, self._time(left))
            context.write("pruned", rounds_left=left, spec=net.spec.to_json(), val_top1=trained.accuracy)
            if left:
                plan = Plan(net, self.weigh(net, context), self)
        return net

    def _time(self, left: int) -> float:
        """A round's share of the time to train, by the rounds that are left."""
        if self.rounds == 1:
            return 1.0
        return (1 - LAST_ROUND) / (self.rounds - 1) if left else LAST_ROUND

    def _limit(self, plan: "Plan", context: Context) -> tuple[str, float]:
        """The resource that is counted, and how much of it may be left."""
        if self.latency is not None:
            return "macs", _macs_within(plan, self.latency, context)
        if self.size is not None:
            of_file = len(context.exported(plan.net)) - plan.cost("bytes")  # what it holds beside its weights
            return "bytes", plan.reachable("bytes", self.size - of_file)
        assert self.macs is not None
        return "macs", plan.reachable("macs", self.macs * plan.cost("macs"))

    def weigh(self, net: Net, context: Context) -> Weigh:
        """How much each group of channels matters."""
        if self.importance == "taylor":
            return taylor(net, context, self.pictures)
        return filter_norms(net, int(self.importance[1]))


def _macs_within(plan: Plan, milliseconds: float, context: Context) -> float:
    """The most MACs with which the network, pruned but not yet trained, is measured within a latency."""
    start, low, high = list(plan.at), plan.least("macs"), plan.cost("macs")
    whole = high

    def took(macs: float) -> float:
        net = plan.reduce("macs", macs).cut()
        plan.at[:] = start
        found = context.speeds([context.exported(net)], TRIAL_SECONDS)[0].p50
        context.write("pruned_latency", macs=cost(net).macs, latency_ms=found)
        return found

    if took(high) <= milliseconds:
        return high
    if (fastest := took(low)) > milliseconds:
        raise FlyweightError(
            f"pruning cannot reach {milliseconds:g} ms: the network takes {fastest:.3g} ms with the fewest channels "
            f"that it may be left, {percent(low / whole)} of the MACs"
        )
    for _ in range(TRIALS):
        middle = (low + high) / 2
        low, high = (middle, high) if took(middle) <= milliseconds else (low, middle)
    return low
