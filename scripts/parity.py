"""Renews docs/parity.md and tests/golden/foreign.json: the same weights give the same answers here and elsewhere.

For each network that another library has too, with random weights and statistics in float64: its tensors into ours,
and ours into it, strictly by name; then the largest difference of the answers, auxiliary heads included. And timm's
answers beside ours, in float32, for the folders that it loads by its "local-dir:".

Needs an environment with the other libraries and flyweight's own dependencies:
pip install torch==2.14.1 torchvision==0.29.1 timm==1.0.31 pytorchcv==0.0.74 pretrainedmodels==0.7.4 safetensors
Run: python -m scripts.parity, or python -m scripts.parity NAME … to compare some and write nothing;
python -m scripts.parity folders for the folders alone, whose table is in docs/timm.md.
"""

# pyright: reportMissingImports=false
import hashlib
import json
import sys
import tempfile
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
from safetensors.torch import save
from torch import Tensor, nn

from flyweight import foreign
from flyweight.create import create_model
from flyweight.net import Net, Spec
from flyweight.preprocess import Preprocess
from flyweight.ship import write_network
from flyweight.timm_models import NATIVE, native_config, register
from flyweight.weights import load_net
from flyweight.zoo import build, list_models, spec_of
from scripts.references import ROWS, document

ROOT = Path(__file__).parents[1]
GOLDEN, PAGE = ROOT / "tests" / "golden" / "foreign.json", ROOT / "docs" / "parity.md"
# Library → its package. Cadene's is the older one that many weights are published for.
PACKAGES = {"torchvision": "torchvision", "timm": "timm", "cadene": "pretrainedmodels", "pytorchcv": "pytorchcv"}
TIMM_PAGE = ROOT / "docs" / "timm.md"
MARK = "<!-- table: written by `python -m scripts.parity folders` -->\n"
MARK_END = "<!-- end of table -->\n"
LIMIT = 1e-10
SIZE = 128
FOLDER_LIMIT = 1e-5  # float32, as a part of the largest answer where that is above 1
# What computes something else although most names and shapes agree, so that its weights are not taken.
OTHERS = {
    "pytorchcv mobilenetv2b_w1": "its classifier has no bias",
    "timm mobilenetv3_*_075": "its widths are rounded at other places",
    "pytorchcv shufflenet_g*": "concatenates the pooled input behind the branch, ours before it: the channels "
    "of a grouped convolution are others, so no order of the weights makes them agree (without groups, one would)",
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


# Beside all variants: forms that none of them has.
FORMS: list[tuple[str, dict[str, Any]]] = [
    ("mobilenet_v1_cifar", {"in_chans": 1, "size": 28, "norm": "group", "act": "silu"}),
    ("mobilenet_v3_small", {"padding": "same", "eps": 1e-5}),
    ("resnet18", {"stem": "cifar", "se": 0.25, "drop_rate": 0.1}),
    ("googlenet", {"aux": False}),
    ("squeezenet1_1", {"bypass": "simple", "size": (96, 128)}),
]


def folders(wanted: list[str]) -> list[str]:
    """The rows of a table: exported folders in timm alone, then folders that runs leave, in timm with our networks."""
    rows: list[str] = []
    exported = [(ours, args, theirs) for ours, args, theirs in NATIVE if not wanted or ours in wanted]
    for ours, args, theirs in exported:
        rows.append(f"| {ours}{told(args)} | {theirs} | {exported_folder(spec_of(ours, **args, num_classes=7)):.1e} |")
        print(rows[-1], flush=True)
    register()
    for ours, args in [*((name, {"width": 0.25}) for name in list_models()), *FORMS]:
        if not wanted or ours in wanted:
            architecture, difference = run_folder(spec_of(ours, **args, num_classes=7))
            rows.append(f"| {ours}{told(args)} | {architecture} | {difference:.1e} |")
            print(rows[-1], flush=True)
    return rows


def exported_folder(spec: Spec) -> float:
    """The difference of answers for a folder as `flyweight weights export --to timm` writes it."""
    with tempfile.TemporaryDirectory() as name:
        folder, net = Path(name), build(spec).eval()
        randomise(net, 3)
        (folder / "model.safetensors").write_bytes(save(foreign.give(net, "timm"), {"format": "pt"}))
        (folder / "config.json").write_text(json.dumps(native_config(net)), encoding="utf-8")
        return answers_differ(net, folder)


def run_folder(spec: Spec) -> tuple[str, float]:
    """The architecture in the config.json that a run writes, and the difference of answers."""
    channels, *size = spec.input
    with tempfile.TemporaryDirectory() as name:
        folder, net = Path(name), build(spec)
        randomise(net, 3)
        preprocess = Preprocess((size[0], size[1]), channels, (120.0,) * channels, (60.0,) * channels)
        write_network(folder, net, "a name for people", preprocess, tuple("abcdefg"))
        architecture = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architecture"]
        return architecture, answers_differ(load_net(folder / "model.safetensors"), folder)


@torch.no_grad()
def answers_differ(net: Net, folder: Path) -> float:
    """The largest difference between a network's float32 answers and those of timm's from a folder."""
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    pictures = torch.randn(2, *net.spec.input)
    ours, others = net(pictures.clone()), theirs(pictures.clone())
    largest = ours.abs().max().item()
    difference = (ours - others).abs().max().item() / max(1.0, largest)
    assert (ours[0] - ours[1]).abs().max() > 1e-3 * largest > 0, f"{net.spec} answers the same to any picture"
    assert difference < FOLDER_LIMIT, f"{net.spec} in timm: {difference:.2g}"
    return difference


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


def write_folders(rows: list[str]) -> None:
    """Puts the folders' table into docs/timm.md."""
    before, _, rest = TIMM_PAGE.read_text(encoding="utf-8").partition(MARK)
    after = rest.partition(MARK_END)[2]
    table = "\n".join(["| network | timm's architecture | largest difference |", "|---|---|---:|", *rows])
    TIMM_PAGE.write_text(f"{before}{MARK}{table}\n{MARK_END}{after}", encoding="utf-8")
    print(f"wrote {TIMM_PAGE}")


def main(wanted: list[str]) -> None:
    """Compares all, or those of the wanted names."""
    if wanted == ["folders"]:
        write_folders(folders([]))
        return
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
