"""What torchvision, timm and pytorchcv have too: the same parameters, MACs, features and sizes, or a named reason."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from flyweight.costs import cost
from flyweight.graph import trace
from flyweight.zoo import spec_of, structure

GOLDEN = Path(__file__).parent / "golden" / "references.json"  # written by scripts/references.py
RECORDS = [
    pytest.param(name, record, id=f"{name}-{record['source']}")
    for name, records in json.loads(GOLDEN.read_text(encoding="utf-8")).items()
    for record in records
]

COUNTS = ("params", "macs")
FINAL = "its coarsest feature is behind the last 1 × 1 convolution, which only the classifier wants"
BEFORE = "its features are taken inside the blocks, before they stride"
# Source → the fields that differ, why.
EXCEPTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "pytorchcv mobilenetv2b_w1": (("params",), "its classifier has no bias: 1,000 fewer"),
    "timm mobilenetv3_small_100": (("channels",), FINAL),
    "timm mobilenetv3_large_100": (("channels",), FINAL),
    "timm mobilenetv3_small_075": ((*COUNTS, "channels"), "the width leaves its hidden layer at 1024"),
    "timm mobilenetv3_large_075": ((*COUNTS, "channels"), "the width leaves its hidden layer at 1280"),
    "timm xception41": (("channels",), BEFORE),
    "timm xception65": (("channels",), BEFORE),
    "timm xception71": (("channels",), BEFORE),
    "timm inception_v4": (("channels",), "its feature at stride 4 is not the last one there"),
    "timm inception_resnet_v2": (("channels",), FINAL),
    "torchvision inception_v3": (("num_params",), "published with the auxiliary head: see params_with_aux"),
    "pytorchcv seresnet18": (COUNTS, "squeezes 64 channels to 4, ours and timm's to 8, the multiple of 8"),
    "timm legacy_seresnet50": (("macs",), "strides in the first 1 × 1 of a block, as Caffe's network does"),
    "pytorchcv seresnet20_cifar10": (COUNTS, "squeezes 16 channels to 1, ours to 8, the multiple of 8"),
}


@cache
def ours(name: str, args: str) -> dict[str, Any]:
    """The fields of a record, of our network with arguments in JSON."""
    spec = spec_of(name, **json.loads(args))
    with torch.device("meta"):
        net = structure(spec)
    counted, info = cost(net), net.feature_info
    return {
        "input": list(spec.input),
        "params": counted.params,
        "params_with_aux": sum(parameter.numel() for parameter in net.parameters()),
        "macs": counted.macs,
        "ops": round(counted.macs / 1e9, 3),
        "num_params": counted.params,
        "features": list(trace(net.features, spec.input).nodes[-1].shape),
        "num_features": net.num_features,
        "channels": info.channels(),
        "reduction": info.reduction(),
    }


@pytest.mark.parametrize(("name", "record"), RECORDS)
def test_counts_and_features_equal_the_reference(name: str, record: dict[str, Any]) -> None:
    mine = ours(name, json.dumps(record["args"]))
    differ = {field: (mine[field], record[field]) for field in mine.keys() & record if mine[field] != record[field]}
    excepted, reason = EXCEPTIONS.get(record["source"], ((), ""))
    assert differ.keys() == set(excepted), f"(ours, theirs): {differ}; excepted: {excepted} {reason}"


def test_every_exception_is_about_a_record() -> None:
    assert set(EXCEPTIONS) <= {param.values[1]["source"] for param in RECORDS}
