"""Renews docs/parity.md and tests/golden/foreign.json: the same weights give the same answers here and elsewhere.

For each network that another library has too, with random weights and statistics in float64: its tensors into ours,
and ours into it, strictly by name; then the largest difference of the answers, auxiliary heads included.

Needs an environment with the other libraries and flyweight's own dependencies:
pip install torch==2.14.1 torchvision==0.29.1 timm==1.0.31 pytorchcv==0.0.74 pretrainedmodels==0.7.4 safetensors
Run: python -m scripts.parity, or python -m scripts.parity NAME … to compare some and write nothing.
"""

# pyright: reportMissingImports=false
import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pretrainedmodels.models as cadene
import timm
import torch
import torchvision
from pytorchcv.model_provider import get_model
from torch import Tensor, nn

from flyweight import foreign
from flyweight.create import create_model
from flyweight.net import Net
from scripts.references import ROWS, document

ROOT = Path(__file__).parents[1]
GOLDEN, PAGE = ROOT / "tests" / "golden" / "foreign.json", ROOT / "docs" / "parity.md"
# Library → its package. Cadene's is the older one that many weights are published for.
PACKAGES = {"torchvision": "torchvision", "timm": "timm", "cadene": "pretrainedmodels", "pytorchcv": "pytorchcv"}
LIMIT = 1e-10
SIZE = 128
# What computes something else although most names and shapes agree, so that its weights are not taken.
OTHERS = {
    "pytorchcv mobilenetv2b_w1": "its classifier has no bias",
    "timm mobilenetv3_*_075": "its widths are rounded at other places",
    "pytorchcv shufflenet_g*": "concatenates the pooled input behind the branch, ours before it",
    "pytorchcv shufflenetv2*": "its first pool reads other windows: not padded, rounded up",
    "pytorchcv seresnet18": "squeezes 64 channels to 4, ours to 8",
    "pytorchcv seresnet20_cifar10": "squeezes 16 channels to 1, ours to 8",
    "timm legacy_seresnet50": "is the network of cadene, see above",
    "timm legacy_seresnext50_32x4d": "is the network of cadene, see above",
}
# What our network needs to be the same function.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "timm mobilenetv3_small_100": {"eps": 1e-5},
    "timm mobilenetv3_large_100": {"eps": 1e-5},
    "timm inception_v3": {"aux": False},
    "pytorchcv inceptionv3": {"aux": False},
    **{f"pytorchcv mobilenet_{width}": {"act": "relu"} for width in ("w1", "w3d4", "wd2", "wd4")},
}


@dataclass(frozen=True)
class Pair:
    """One of our networks and the same of another library."""

    ours: str
    args: Mapping[str, Any]
    library: str
    name: str

    @property
    def source(self) -> str:
        """What the other one is called, after its library."""
        return f"{self.library} {self.name}"

    def reference(self) -> nn.Module:
        """The other library's network."""
        name, *widths = self.name.split()
        args: dict[str, Any] = {key: float(value) for key, value in (width.split("=") for width in widths)}
        if name in ("googlenet", "inception_v3") and self.library == "torchvision":
            args |= {"init_weights": False, "aux_logits": True}
        if self.library == "cadene":
            return getattr(cadene, name)(pretrained=None)
        make = {"torchvision": torchvision.models.get_model, "timm": timm.create_model, "pytorchcv": get_model}
        return make[self.library](name, **args)

    def net(self) -> Net:
        """Our network."""
        return create_model(self.ours, **self.args)


# The names in pretrained-models.pytorch where they are not ours.
CADENE = {
    **{name: name for name in ("alexnet", "squeezenet1_0", "squeezenet1_1", "resnet18", "resnet50", "xception")},
    "inception_v2": "bninception",
    "inception_v3": "inceptionv3",
    "inception_v4": "inceptionv4",
    "inception_resnet_v2": "inceptionresnetv2",
}
# Its SENets are Caffe's: the first pool is not padded, and se_resnet50 strides in the first 1 × 1 of a block.
CADENE_SE: list[tuple[str, dict[str, Any], dict[str, str]]] = [
    ("se_resnet50", {"stem": "caffe", "stride_first": True}, {"cadene": "se_resnet50"}),
    ("se_resnext50_32x4d", {"stem": "caffe"}, {"cadene": "se_resnext50_32x4d"}),
]
PAIRS = [
    Pair(ours, {**args, **ARGUMENTS.get(f"{library} {name}", {})}, library, name)
    for ours, args, theirs in [*ROWS, *CADENE_SE, *((ours, {}, {"cadene": name}) for ours, name in CADENE.items())]
    for library, name in theirs.items()
    if not any(fnmatch(f"{library} {name}", other) for other in OTHERS)
]


def listing(tensors: Mapping[str, Tensor]) -> list[str]:
    """Name and shape of each tensor, sorted."""
    return sorted(f"{name} {'x'.join(map(str, tensor.shape))}" for name, tensor in tensors.items())


def golden() -> dict[str, list[dict[str, Any]]]:
    """Our name → a record for each reference: how many tensors it has, and the hash of their listing."""
    found: dict[str, list[dict[str, Any]]] = {}
    for pair in PAIRS:
        with torch.device("meta"):
            lines = listing(pair.reference().state_dict())
        record = {
            "source": pair.source,
            "version": version(PACKAGES[pair.library]),
            "args": pair.args,
            "tensors": len(lines),
        }
        record["sha256"] = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        found.setdefault(pair.ours, []).append(record)
    return found


def randomise(net: nn.Module, seed: int) -> None:
    """Weights that keep the scale of the values, and statistics and biases that all matter."""
    torch.manual_seed(seed)
    for leaf in net.modules():
        if isinstance(leaf, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(leaf.get_buffer("running_mean"), -0.2, 0.2)
            nn.init.uniform_(leaf.get_buffer("running_var"), 0.5, 2.0)
            nn.init.uniform_(leaf.weight, 0.5, 1.5)
            nn.init.uniform_(leaf.bias, -0.2, 0.2)
        elif isinstance(leaf, nn.Conv2d | nn.Linear):
            nn.init.normal_(leaf.weight, std=(2 / leaf.weight[0].numel()) ** 0.5)
            if leaf.bias is not None:
                nn.init.normal_(leaf.bias, std=0.1)


@torch.no_grad()
def answers(net: nn.Module, pictures: Tensor, aux: bool) -> Tensor:
    """The logits of a network, with `aux` also those of its auxiliary heads, in evaluation mode, beside each other."""
    net.eval()
    if isinstance(net, Net):
        logits, others = net.forward_aux(pictures.clone())
        return torch.cat([logits, *others], dim=1) if aux else logits
    net.training = aux  # the flag of the outermost module alone: torchvision's nets then return their auxiliary logits
    found = net(pictures.clone())
    return torch.cat([found[0], *reversed(found[1:])], dim=1) if aux else found.flatten(1)


def compare(pair: Pair, direction: str) -> float:
    """The largest difference of the answers, as a part of the largest answer where that is above 1."""
    reference, ours = pair.reference().double(), pair.net().double()
    if direction == "import":
        randomise(reference, 1)
        foreign.take(ours, reference.state_dict())
    else:
        randomise(ours, 2)
        reference.load_state_dict(foreign.give(ours, pair.library), strict=True)
    aux = len(ours.aux) > 0 and pair.library == "torchvision"  # Cadene's Inception-v3 does not return its own
    pictures = torch.randn(2, 3, side(pair), side(pair), dtype=torch.float64)
    theirs, own = answers(reference, pictures, aux), answers(ours, pictures, aux)
    assert theirs.shape == own.shape, f"{pair}: {tuple(theirs.shape)}, {tuple(own.shape)}"
    largest = theirs.abs().max().item()
    difference = (theirs - own).abs().max().item() / max(1.0, largest)
    assert (theirs[0] - theirs[1]).abs().max() > 1e-3 * largest > 0, f"{pair} answers the same to any picture"
    assert difference < LIMIT, f"{pair}, {direction}: {difference:.2g}"
    return difference


def side(pair: Pair) -> int:
    """The pictures' side: a small one, or the native one where pooling or an auxiliary head takes no other."""
    native = pair.library in ("pytorchcv", "cadene") or pair.source == "torchvision inception_v3"
    return pair.net().spec.input[1] if native else SIZE


def told(args: Mapping[str, Any]) -> str:
    return "".join(f", {name}={value}" for name, value in args.items())


def page(rows: list[str], worst: float) -> str:
    """docs/parity.md."""
    versions = ", ".join(f"{each} {version(each)}" for each in ("torch", *PACKAGES.values()))
    pairs = "\n".join(rows)
    others = "\n".join(f"| {source} | {reason} |" for source, reason in OTHERS.items())
    return f"""# The same weights, the same answers

Weights of other libraries are taken and given back by name, strictly both ways (`flyweight weights import` and
`export`). Below: the largest difference between the other library's answers and ours, logits and auxiliary logits, in
float64 and evaluation mode, on two random pictures. Weights, biases and the statistics of batch normalisation are
random. "Import" puts the library's tensors into our network, "export" ours into the library's by
`load_state_dict(strict=True)`. Where answers are above 1, a difference is given as a part of the largest. Each must be
below {LIMIT:g}; the worst of {len(rows)} pairs is {worst:.1e}.

The names do not tell a network's ε, activation or padding: where ours needs arguments to be the same function, they are
in the first column. Weights from TensorFlow mostly need `padding=same`, whatever library's names they bear.

Written by `python -m scripts.parity`, with {versions}.

| network | reference | input | import | export |
|---|---|---:|---:|---:|
{pairs}

`cadene` is pretrained-models.pytorch.

These have most names and shapes in common with ours, but compute something else, so their weights are refused:

| reference | what differs |
|---|---|
{others}
"""


def main(wanted: list[str]) -> None:
    """Compares all, or those of the wanted names."""
    rows, worst = [], 0.0
    for pair in PAIRS:
        if wanted and pair.ours not in wanted:
            continue
        taken, given = compare(pair, "import"), compare(pair, "export")
        worst = max(worst, taken, given)
        rows.append(f"| {pair.ours}{told(pair.args)} | {pair.source} | {side(pair)} | {taken:.1e} | {given:.1e} |")
        print(rows[-1], flush=True)
    if not wanted:
        GOLDEN.write_text(document(golden()), encoding="utf-8")
        PAGE.write_text(page(rows, worst), encoding="utf-8")
        print(f"wrote {GOLDEN} and {PAGE}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
