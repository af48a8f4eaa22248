"""OpenVINO's first int8 layer: the ONNX file as it is, and what the target `openvino` makes of it.

    python -m benchmarks.first_layer [--rounds 5] [--json]

Random weights, one core; both files run in turns, so that what slows the machine slows both.
"""

import argparse
import json

import numpy as np

from flyweight.bench.engines import engine
from flyweight.bench.environment import environment
from flyweight.bench.measure import interleaved
from flyweight.export import int8
from flyweight.export.targets import target
from flyweight.profiling import task
from flyweight.terminal import print_table
from flyweight.zoo import spec_of

NETS = [("googlenet", 1.0, 224), ("resnet10", 1.5, 192), ("nin", 0.5, 128), ("mobilenet_v1", 0.25, 128)]
NETS += [("squeezenet1_1", 1.0, 64), ("mobilenet_v2", 0.5, 64)]
SECONDS = 1.0  # of each round, for both files


def measured(name: str, width: float, size: int, rounds: int) -> dict[str, str]:
    """A row: the median of the rounds' medians, their least and largest."""
    net = task(spec_of(name, width=width, size=size, num_classes=10))
    pictures = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    small, known = net.quantised(int8.schemes()[0], pictures), engine("openvino")
    runs = [known.start(target(to).export(small), 1) for to in ("onnx", "openvino")]
    names = ["openvino"] * len(runs)
    found = [interleaved(runs, names, pictures[:1], 1, SECONDS / 2, 5) for _ in range(rounds)]
    as_it_is, exported = (sorted(each.p50 for each in one) for one in zip(*found, strict=True))

    def told(ms: list[float]) -> str:
        return f"{np.median(ms):.3f} ({ms[0]:.3f} to {ms[-1]:.3f})"

    return {"network": f"{name} x{width:g} @{size}", "ONNX file": told(as_it_is), "as exported": told(exported)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    rows = [measured(*net, asked.rounds) for net in NETS]
    if asked.json:
        print(json.dumps({"environment": environment(1), "ms": rows}, indent=2))
    else:
        print_table(rows)


if __name__ == "__main__":
    main()
