"""Successive halving (Jamieson & Talwalkar, arXiv:1502.07943): little time for many, more for the better half."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
# No error is taken to fall by more than this with twice the time: two short trials are noisy.
STEEPEST = 0.5


@dataclass(frozen=True)
class Rung:
    """One round: how many candidates are tried, each for how many seconds."""

    candidates: int
    seconds: float


def plan(candidates: int, seconds: float, shortest: float) -> list[Rung]:
    """The rungs that fit into `seconds`: each halves the candidates and doubles what each is given, down to two.

    A trial under `shortest` seconds tells nothing, so fewer candidates are tried where the time is short. Empty where
    there is no choice to make, or no time to make it.
    """
    best: list[Rung] = []
    for start in range(2, candidates + 1):
        counts = [start]
        while counts[-1] > 3:
            counts.append(-(-counts[-1] // 2))
        first = seconds / sum(count * 2**i for i, count in enumerate(counts))
        if first < shortest:
            break
        best = [Rung(count, first * 2**i) for i, count in enumerate(counts)]
    return best


def halve(
    pool: Sequence[T], rungs: Sequence[Rung], evaluate: Callable[[T, int, float], float | None], until: float = 0.0
) -> list[T]:
    """Runs the rungs over the pool, best first in and out; `evaluate(candidate, rung, seconds)` gives an accuracy.

    None takes the candidate out. What was beaten in an earlier rung stands behind what went further. Those that were
    tried twice are ranked by what they are to reach in `until` seconds (`forecast`).
    """
    alive, beaten = [(candidate, list[float]()) for candidate in pool], list[T]()
    for number, rung in enumerate(rungs):
        beaten = [candidate for candidate, _ in alive[rung.candidates :]] + beaten
        finished: list[tuple[T, list[float]]] = []
        for candidate, scores in alive[: rung.candidates]:
            score = evaluate(candidate, number, rung.seconds)
            if score is not None:
                finished.append((candidate, [*scores, score]))
        doublings = math.log2(until / rung.seconds) if until else 0.0
        alive = sorted(finished, key=lambda pair: -forecast(pair[1], doublings))
    return [candidate for candidate, _ in alive] + beaten


def forecast(scores: Sequence[float], doublings: float) -> float:
    """The accuracy to expect when the time doubles so often again; each of `scores` had twice the time of the last.

    The error falls as a power of the time (Hestness et al., arXiv:1712.00409, figure 6), which the last two tell: what
    learns fast at first, and less from twice the time, is overtaken.
    """
    if len(scores) < 2 or doublings <= 0 or scores[-2] >= 1:
        return scores[-1]
    before, now = 1 - scores[-2], 1 - scores[-1]
    return 1 - now * min(1.0, max(STEEPEST, now / before)) ** doublings
