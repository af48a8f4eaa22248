"""Renews tests/golden/packed, files that must decode to the same tensors for ever: python -m scripts.packed_golden

`forms.fly` has a tensor in each form, `float.fly` a network with batch normalisation, sparse and of few values,
`int8.fly` the same quantised. Renew them for a new version of the format only, and keep reading the old ones.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from flyweight.compress.pack import contents_of, contents_of_onnx, pack
from flyweight.export import int8
from flyweight.export.onnx import export
from flyweight.net import Net
from flyweight.packed import open_packed
from flyweight.packed.container import Contents
from flyweight.preprocess import Preprocess
from flyweight.zoo import build, spec_of

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "packed"
PREPROCESS = Preprocess((32, 32), 3, (120.0, 120.0, 120.0), (64.0, 64.0, 64.0))
CLASSES = ("ant", "bee", "cat")


def small_net() -> Net:
    """A ResNet of few channels; two thirds of its convolutions' weights are 0, the rest of 16 values."""
    torch.manual_seed(0)
    net = build(spec_of("resnet8_cifar", num_classes=3, width=0.25)).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for value in net.state_dict().values():
            if value.dim() == 4:
                levels = np.sort(rng.normal(0, 0.2, 16)).astype(np.float32)
                kept = rng.random(tuple(value.shape)) < 1 / 3
                value.copy_(torch.from_numpy(np.where(kept, rng.choice(levels, tuple(value.shape)), np.float32(0))))
            elif value.is_floating_point():
                value.copy_(torch.from_numpy(rng.uniform(0.5, 1.5, tuple(value.shape)).astype(np.float32)))
    return net


def forms() -> Contents:
    """A tensor for each form, and the values of float32 that are easily lost: −0, infinities, NaN, the smallest."""
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(12, 8, 3, 3)).astype(np.float32)
    levels = np.sort(rng.normal(size=300)).astype(np.float32)
    bits = np.array([0x80000000, 0x7F800000, 0xFF800000, 0x7FC00001, 1, 0], np.uint32).view(np.float32)
    tensors = {
        "bytes": rng.integers(-(2**62), 2**62, 7),
        "number": np.array(5),
        "floats": normal[0],
        "odd floats": np.concatenate([bits, rng.normal(size=70).astype(np.float32)]),
        "short floats": (normal[1].ravel().view(np.uint32) & 0xFFFF0000).view(np.float32),
        "grid": rng.integers(-9, 10, (16, 12, 3, 3)).astype(np.float32) * np.float32(0.0371),
        "sparse grid": (rng.random((12, 8, 3, 3)) < 0.3) * rng.integers(2, 40, (12, 8, 3, 3)).astype(np.float32) / 3,
        "odd codes": rng.choice(bits, (9, 31)),
        "ints": rng.normal(0, 5000, 200).astype(np.int32),
        "codes": rng.choice(levels[:20], (16, 12, 3, 3)),
        "many codes": rng.choice(levels, (30, 50)),
        "sparse floats": np.where(rng.random(normal.shape) < 0.2, normal, np.float32(0)),
        "sparse codes": np.where(rng.random((12, 8, 5, 5)) < 0.3, rng.choice(levels[:9], (12, 8, 5, 5)), np.float32(0)),
        "parts": np.stack([rng.choice(levels[i : i + 5], (20, 3, 3)) for i in (0, 100, 200)], axis=1),
        "int8": rng.normal(0, 20, (32, 9)).astype(np.int8),
        "half": rng.choice(levels[:7].astype(np.float16), (10, 11)),
    }
    return Contents("forms", None, PREPROCESS, CLASSES, tensors)


def contents() -> dict[str, Contents]:
    """File name → what it holds."""
    net = small_net()
    model = export(net, PREPROCESS, CLASSES)
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    quantised = int8.quantise(model, images, int8.SCHEMES[0])
    return {
        "forms": forms(),
        "float": contents_of(net, PREPROCESS, CLASSES, "small"),
        "int8": contents_of_onnx(quantised.SerializeToString(), "small"),
    }


def digests(path: Path) -> dict[str, str]:
    """SHA-256 of each tensor in a packed file, and of its ONNX file."""
    packed = open_packed(path)
    found = {name: hashlib.sha256(value.tobytes()).hexdigest() for name, value in packed.tensors.items()}
    return found | {"model.onnx": hashlib.sha256(packed.onnx()).hexdigest()}


def main() -> None:
    for name, each in contents().items():
        (GOLDEN / f"{name}.fly").write_bytes(pack(each).data)
    found = {path.name: digests(path) for path in sorted(GOLDEN.glob("*.fly"))}
    (GOLDEN / "digests.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {', '.join(found)} to {GOLDEN}")


if __name__ == "__main__":
    main()
