"""The page that classifies in the browser: one and two threads, float32 and int8, bytes and time.

    python -m benchmarks.web FLOWERS WEIGHTS [--rounds 5] [--runs 8] [--json]

Needs Chromium, Node.js and onnxruntime-web, and the pictures and weights of `benchmarks.engines`. In each round every
page is opened anew and given the same photograph `--runs` times; what it says its answers took is what is told here.
"""

import argparse
import gzip
import json
import re
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.engines import NETS, subject_of
from flyweight.bench.environment import environment
from flyweight.export import int8
from flyweight.export.targets import target
from flyweight.exporting import Subject
from flyweight.terminal import print_table
from scripts.chromium import Browser, chromium, served

CALIBRATED = 64  # training photographs that place the ranges


@dataclass
class Page:
    """An export in its folder; `ms` by threads and round."""

    name: str
    precision: str
    folder: Path
    ms: dict[int, list[list[float]]] = field(default_factory=lambda: {1: [], 2: []})

    def look(self, browser: Browser, threads: int, photograph: Path, runs: int) -> None:
        """One round: what the page says of each answer."""
        with served(self.folder, isolated=threads == 2) as address:
            browser.open(address)
            said = [browser.choose(photograph) for _ in range(runs)]
        browser.do("Page.close")
        self.ms[threads].append([float(found[1]) for each in said if (found := re.search(r"in ([\d.]+) ms", each))])

    def row(self) -> dict[str, Any]:
        """For the table."""
        files = [each.read_bytes() for each in self.folder.iterdir()]
        model = next(each.read_bytes() for each in self.folder.glob("*.onnx"))
        told: dict[str, Any] = {"net": self.name, "precision": self.precision, "model bytes": len(model)}
        told |= {"with gzip": squeezed(model), "whole page, with gzip": sum(map(squeezed, files))}
        for threads, rounds in self.ms.items():
            medians = sorted(map(statistics.median, rounds))
            told[f"ms, {threads} thread{'s' * (threads > 1)}"] = (
                f"{statistics.median(medians):.1f} ({medians[0]:.1f} to {medians[-1]:.1f})"
            )
        return told


def squeezed(data: bytes) -> int:
    """Bytes with gzip at its usual level."""
    return len(gzip.compress(data, 6))


def pages(name: str, subject: Subject, place: Path) -> Iterator[Page]:
    """A network's export in both precisions."""
    size, train = subject.task.preprocess.size[0], subject.train
    pictures = train.batch(size, range(0, len(train), max(1, len(train) // CALIBRATED)))
    for task in (subject.task, subject.task.quantised(int8.SCHEMES[0], pictures)):
        folder = place / f"{name}-{task.format.partition(' ')[0]}"
        target("web").export(task).written(folder)
        yield Page(name, task.format, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("flowers")
    parser.add_argument("weights", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    photograph = sorted((Path(asked.flowers) / "test").rglob("*.jpg"))[0]
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        found = [
            page for name in NETS for page in pages(name, subject_of(name, asked.weights, asked.flowers)[0], place)
        ]
        (place / "chromium").mkdir()
        browser = stack.enter_context(chromium(place / "chromium"))
        for _ in range(asked.rounds):
            for page in found:
                for threads in page.ms:
                    page.look(browser, threads, photograph, asked.runs)
        rows = [page.row() for page in found]
    if asked.json:
        print(json.dumps({"environment": environment(2), "pages": rows}, indent=2))
    else:
        print_table(rows)


if __name__ == "__main__":
    main()
