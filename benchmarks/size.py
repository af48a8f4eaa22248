"""How small networks get in the packed file: python -m benchmarks.size DATA [--json]

DATA is a folder with weights/squeezenet1_0_imagenet.safetensors and weights/imagenet_classes.txt. Tells the bytes with
everything counted (classes, preprocessing, the ONNX graph, checksums) and where they went, the seconds from file to
tensors and to the first answer, the ratio to AlexNet's float32 bytes, and what other coders make of the same codes.
ROWS has a function for each row. constriction, zstandard and brotli are compared where they are installed:

What clustering makes of it: benchmarks.size_lossy; of a run's network: flyweight compress RUN.

    pip install --target CODERS constriction zstandard brotli
    PYTHONPATH=CODERS python -m benchmarks.size DATA
"""

import argparse
import importlib.util
import json
import lzma
import statistics
import sys
import tempfile
import time
import zlib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from flyweight.bench.environment import environment
from flyweight.compress.pack import Packing, contents_of, pack
from flyweight.foreign import read_weights, take
from flyweight.net import Net
from flyweight.packed import open_packed
from flyweight.packed.container import FILTERS, START, Contents
from flyweight.packed.container import sections as parts_of
from flyweight.packed.tensors import Form, keys
from flyweight.preprocess import Preprocess
from flyweight.zoo import build, spec_of

ROUNDS = 15
ALEXNET_BYTES = 4 * 60_965_224  # float32, with the two groups of the original, as the SqueezeNet paper compares
PREPROCESS = Preprocess((224, 224), 3, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))


def squeezenet(data: Path) -> tuple[Net, tuple[str, ...]]:
    """SqueezeNet 1.0 with the published sparse weights, and ImageNet's classes."""
    net = build(spec_of("squeezenet1_0")).eval()
    take(net, read_weights(data / "weights" / "squeezenet1_0_imagenet.safetensors"))
    classes = (data / "weights" / "imagenet_classes.txt").read_text(encoding="utf-8").splitlines()
    return net, tuple(classes)


def bit_exact(data: Path) -> Contents:
    """SqueezeNet 1.0, every bit of every weight."""
    net, classes = squeezenet(data)
    return contents_of(net, PREPROCESS, classes, "squeezenet1_0")


ROWS: dict[str, Callable[[Path], Contents]] = {"SqueezeNet 1.0, bit-exact": bit_exact}


def breakdown(contents: Contents, packing: Packing) -> dict[str, int]:
    """Bytes of the file by what they say; their sum is the file's."""
    found: defaultdict[str, float] = defaultdict(float)
    names = {"mask": "which weights are not zero", "codes": "codes", "codebook": "codebooks"}
    for name, costs in packing.costs.items():
        dense = "floats" in packing.forms[name] or packing.forms[name] == ["bytes"]
        for kind, amount in costs.items():
            found[names.get(kind, "floats (biases)" if dense else "codebooks")] += amount
    text = len(packing.data) - START.size - sum(len(each) for each in parts_of(packing.data)[2:])
    listed = json.dumps(list(contents.classes), ensure_ascii=False, separators=(",", ":")).encode()
    found |= {"classes": _stored(listed), "graph": _stored(contents.skeleton)}
    found["header"] = text - found["classes"] - found["graph"] + START.size
    found["the coder's states"] = len(packing.data) - sum(found.values())
    return {key: round(value) for key, value in found.items()}


def _stored(data: bytes) -> int:
    return len(lzma.compress(data, lzma.FORMAT_RAW, filters=FILTERS))


def by_form(contents: Contents, packing: Packing) -> dict[str, dict[str, float]]:
    """Tensors, values, bytes and bits a value of each form."""
    found: defaultdict[str, dict[str, float]] = defaultdict(lambda: {"tensors": 0, "values": 0, "bytes": 0.0})
    for name, form in packing.forms.items():
        row = found[" ".join(each for each in form if isinstance(each, str))]
        row["tensors"] += 1
        row["values"] += contents.tensors[name].size
        row["bytes"] += sum(packing.costs[name].values())
    for row in found.values():
        row["bits_per_value"] = round(8 * row["bytes"] / row["values"], 3)
        row["bytes"] = round(row["bytes"])
    return dict(found)


def seconds(data: bytes) -> dict[str, dict[str, float]]:
    """Seconds that decoding takes, and opening and answering one picture, each time anew; one thread does all."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    pixels = np.zeros((224, 224, 3), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.fly"
        path.write_bytes(data)
        for _ in range(ROUNDS):
            wall, processor = time.perf_counter(), time.process_time()
            packed = open_packed(path)
            found["decode"].append(time.perf_counter() - wall)
            found["decode, of the processor"].append(time.process_time() - processor)
            packed.predict(pixels)
            found["decode and answer"].append(time.perf_counter() - wall)
            found["decode and answer, of the processor"].append(time.process_time() - processor)
    return {name: _spread(values) for name, values in found.items()}


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "n": len(values),
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


def row(name: str, contents: Contents) -> dict[str, Any]:
    """All that is told of one network."""
    packing = pack(contents)
    parts = breakdown(contents, packing)
    return {
        "name": name,
        "bytes": len(packing.data),
        "tensor_bytes": sum(each.nbytes for each in contents.tensors.values()),
        "alexnet_ratio": round(ALEXNET_BYTES / len(packing.data), 1),
        "breakdown": parts,
        "forms": by_form(contents, packing),
        "seconds": seconds(packing.data),
        "codes_alone": {"this format": parts["codes"] + parts["which weights are not zero"]}
        | others(contents, packing),
    }


def others(contents: Contents, packing: Packing) -> dict[str, int]:
    """Bytes that other coders need for the same codes, zeros among them; their frequency tables are not counted."""
    codes = [
        np.unique(keys(part), return_inverse=True)[1].ravel()
        for name, values in contents.tensors.items()
        for part, form in parts_in_forms(values, packing.forms[name])
        if "codes" in form
    ]
    whole = b"".join(each.astype(np.uint8 if each.max() < 256 else np.uint16).tobytes() for each in codes)
    found = {name: len(compress(whole)) for name, compress in _general().items()}
    found["zero-order entropy of each layer"] = sum(map(_entropy, codes))
    if importlib.util.find_spec("constriction"):
        found["constriction's range coder, a model for each layer"] = sum(map(_constricted, codes))
    return dict(sorted(found.items(), key=lambda each: each[1]))


def parts_in_forms(values: np.ndarray, form: Form) -> list[tuple[np.ndarray, Form]]:
    """A tensor with its form, or each input channel with its own."""
    if form[0] != "parts":
        return [(values, form)]
    return [(np.ascontiguousarray(values[:, i]), each) for i, each in enumerate(form[1:])]


def _general() -> dict[str, Callable[[bytes], bytes]]:
    """Coders for any data, the standard library's and those that are installed, each at its strongest."""
    found: dict[str, Callable[[bytes], bytes]] = {
        "zlib": lambda data: zlib.compress(data, 9),
        "lzma": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
    }
    if importlib.util.find_spec("zstandard"):
        found["zstandard"] = importlib.import_module("zstandard").ZstdCompressor(level=22).compress
    if importlib.util.find_spec("brotli"):
        found["brotli"] = importlib.import_module("brotli").compress
    return found


def _entropy(codes: np.ndarray) -> int:
    counts = np.bincount(codes)
    p = counts[counts > 0] / len(codes)
    return round(-(p * np.log2(p)).sum() * len(codes) / 8)


def _constricted(codes: np.ndarray) -> int:
    stream = importlib.import_module("constriction").stream
    model = stream.model.Categorical(np.bincount(codes) / len(codes), perfect=False)
    encoder = stream.queue.RangeEncoder()
    encoder.encode(codes.astype(np.int32), model)
    return encoder.get_compressed().nbytes


def show(row: dict[str, Any]) -> None:
    """A row as text, on stderr."""
    lines = [f"{row['name']}: {row['bytes']:,} bytes, {row['alexnet_ratio']} times smaller than AlexNet"]
    lines += [f"  {amount:9,}  {part}" for part, amount in row["breakdown"].items()]
    lines += ["the codes alone, by other coders too:"]
    lines += [f"  {amount:9,}  {coder}" for coder, amount in row["codes_alone"].items()]
    lines += [f"{name}: {each['median']} s ({each['min']} to {each['max']}, n = {each['n']})"
              for name, each in row["seconds"].items()]  # fmt: skip
    print("\n".join(lines), file=sys.stderr)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [row(name, make(options.data)) for name, make in ROWS.items()]
    for each in rows:
        show(each)
    if options.json:
        print(json.dumps({"environment": environment(1), "alexnet_bytes": ALEXNET_BYTES, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
