"""How long it takes to count 1000 different networks exactly, on one core: python -m benchmarks.cost_speed

Every family's candidates at widths and sizes spread over their ranges, each built and traced anew. Prints JSON.
"""

import itertools
import json
import statistics
import time

import torch

from flyweight import zoo
from flyweight.costs import cost
from flyweight.net import Spec
from flyweight.zoo import spec_of

SPECS, ROUNDS = 1000, 3


def specs() -> list[Spec]:
    """SPECS different networks, families in turn."""
    queues = []
    for family in zoo.families().values():
        names, widths, sides = family.CANDIDATES["large"], family.WIDTHS, range(96, 320, 8)
        grid = itertools.product(sides, widths, names)
        queues.append([spec_of(name, size=side, width=width) for side, width, name in grid])
    turns = itertools.zip_longest(*queues)
    return [spec for turn in turns for spec in turn if spec is not None][:SPECS]


def main() -> None:
    torch.set_num_threads(1)
    found = specs()
    cost(found[0])
    seconds = []
    for _ in range(ROUNDS):
        begun = time.process_time()
        for spec in found:
            cost(spec)
        seconds.append(round(time.process_time() - begun, 2))
    result = {"specs": len(found), "rounds": ROUNDS, "cpu_seconds": seconds, "median": statistics.median(seconds)}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
