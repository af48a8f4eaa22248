"""Successive halving (Jamieson & Talwalkar, arXiv:1502.07943): little time for many, more for the better half."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


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


def halve(pool: Sequence[T], rungs: Sequence[Rung], evaluate: Callable[[T, int, float], float | None]) -> list[T]:
    """Runs the rungs over the pool, best first in and out; `evaluate(candidate, rung, seconds)` gives a score.

    A score of None takes the candidate out. What was beaten in an earlier rung stands behind what went further.
    """
    alive, beaten = list(pool), list[T]()
    for number, rung in enumerate(rungs):
        tried, rest = alive[: rung.candidates], alive[rung.candidates :]
        scores = [(evaluate(candidate, number, rung.seconds), candidate) for candidate in tried]
        finished = sorted((pair for pair in scores if pair[0] is not None), key=lambda pair: -(pair[0] or 0.0))
        beaten = rest + beaten
        alive = [candidate for _, candidate in finished]
    return alive + beaten
