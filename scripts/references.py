"""Renews tests/golden/references.json: what torchvision, timm and pytorchcv count for the networks they share with us.

Needs these three and not flyweight: pip install torch==2.14.1 torchvision==0.29.1 timm==1.0.31 pytorchcv==0.0.74
Run: python scripts/references.py
"""

# pyright: reportMissingImports=false
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from pytorchcv.model_provider import get_model
from torch import Tensor, nn

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "references.json"
# Heads for training only, by the names that the references give them; they are not deployed and not counted.
AUX = ("aux1", "aux2", "AuxLogits")

# Ours: name, arguments; theirs: by library.
Row = tuple[str, dict[str, Any], dict[str, str]]


def row(name: str, torchvision: str = "", timm: str = "", pytorchcv: str = "", **args: Any) -> Row:
    """Our network, its arguments beyond those of its name, and what each library calls it."""
    theirs = {"torchvision": torchvision, "timm": timm, "pytorchcv": pytorchcv}
    return name, args, {library: model for library, model in theirs.items() if model}


WIDTHS = {0.25: "wd4", 0.5: "wd2", 0.75: "w3d4"}  # pytorchcv's spelling
ROWS = [
    row("alexnet", "alexnet", pytorchcv="alexnetb"),
    row("squeezenet1_0", "squeezenet1_0", pytorchcv="squeezenet_v1_0"),
    row("squeezenet1_1", "squeezenet1_1", pytorchcv="squeezenet_v1_1"),
    row("squeezenet1_0", pytorchcv="squeezeresnet_v1_0", bypass="simple"),
    row("squeezenet1_1", pytorchcv="squeezeresnet_v1_1", bypass="simple"),
    row("nin_cifar", pytorchcv="nin_cifar10", num_classes=10),
    row("mobilenet_v1", timm="mobilenetv1_100", pytorchcv="mobilenet_w1"),
    row("mobilenet_v1", timm="mobilenetv1_125", width=1.25),
    *[row(f"mobilenet_v1_{round(100 * w):03}", pytorchcv=f"mobilenet_{cv}") for w, cv in WIDTHS.items()],
    row("mobilenet_v2", "mobilenet_v2", "mobilenetv2_100", "mobilenetv2b_w1"),
    row("mobilenet_v2", timm="mobilenetv2_140", width=1.4),
    *[row(f"mobilenet_v2_{percent}", timm=f"mobilenetv2_{percent}") for percent in ("035", "050", "075")],
    row("mobilenet_v3_small", "mobilenet_v3_small", "mobilenetv3_small_100"),
    row("mobilenet_v3_small", "mobilenet_v3_small width_mult=0.75", "mobilenetv3_small_075", width=0.75),
    row("mobilenet_v3_large", "mobilenet_v3_large", "mobilenetv3_large_100"),
    row("mobilenet_v3_large", "mobilenet_v3_large width_mult=0.75", "mobilenetv3_large_075", width=0.75),
    *[row(f"shufflenet_v1_g{g}", pytorchcv=f"shufflenet_g{g}_w1") for g in (1, 2, 3, 4, 8)],
    *[row(f"shufflenet_v1_g{g}", pytorchcv=f"shufflenet_g{g}_{WIDTHS[w]}", width=w) for g in (1, 3) for w in WIDTHS],
    row("shufflenet_v2", "shufflenet_v2_x1_0", pytorchcv="shufflenetv2_w1"),
    row("shufflenet_v2_050", "shufflenet_v2_x0_5", pytorchcv="shufflenetv2_wd2"),
    row("shufflenet_v2_150", "shufflenet_v2_x1_5"),
    row("shufflenet_v2_200", "shufflenet_v2_x2_0"),
    row("xception", timm="legacy_xception", pytorchcv="xception"),
    *[row(f"aligned_xception_{depth}", timm=f"xception{depth}") for depth in (41, 65, 71)],
    row("googlenet", "googlenet"),
    row("inception_v2", pytorchcv="bninception"),
    row("inception_v3", "inception_v3", "inception_v3", "inceptionv3"),
    row("inception_v4", timm="inception_v4", pytorchcv="inceptionv4"),
    row("inception_resnet_v1", pytorchcv="inceptionresnetv1"),
    row("inception_resnet_v2", timm="inception_resnet_v2", pytorchcv="inceptionresnetv2"),
    row("resnet10", pytorchcv="resnet10"),
    *[row(name, name, name, name) for name in ("resnet18", "resnet34")],
    *[row(name, name, name, f"{name}b") for name in ("resnet50", "resnet101", "resnet152")],
    *[
        row(f"resnet{depth}_cifar", pytorchcv=f"resnet{depth}_cifar10", num_classes=10, shortcut="projection")
        for depth in (20, 56, 110)
    ],
    row("resnext50_32x4d", "resnext50_32x4d", "resnext50_32x4d", "resnext50_32x4d"),
    row("resnext101_32x8d", "resnext101_32x8d", "resnext101_32x8d"),
    row("resnext101_32x8d", timm="resnext101_32x4d", pytorchcv="resnext101_32x4d", base_width=4),
    row("resnext101_32x8d", "resnext101_64x4d", "resnext101_64x4d", "resnext101_64x4d", groups=64, base_width=4),
    row("se_resnet18", timm="seresnet18", pytorchcv="seresnet18"),
    row("se_resnet50", timm="seresnet50", pytorchcv="seresnet50b"),
    row("se_resnet50", timm="legacy_seresnet50"),
    row("se_resnext50_32x4d", timm="seresnext50_32x4d", pytorchcv="seresnext50_32x4d"),
    row("se_resnext50_32x4d", timm="legacy_seresnext50_32x4d"),
    row("se_resnet20_cifar", pytorchcv="seresnet20_cifar10", num_classes=10, shortcut="projection"),
]


def macs(net: nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply-accumulates of the convolutions and linear layers in one forward pass for one picture."""
    counted: list[int] = []

    def count(leaf: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weight = leaf.get_parameter("weight")
        counted.append(output.numel() * weight[0].numel())

    for leaf in net.modules():
        if isinstance(leaf, nn.Conv2d | nn.Linear):
            leaf.register_forward_hook(count)
    net.eval()(torch.empty(1, *shape))
    return sum(counted)


def counts(net: nn.Module, shape: tuple[int, ...]) -> dict[str, Any]:
    """Parameters as deployed, and with the auxiliary heads where there are some; multiply-accumulates."""
    params = {name: parameter.numel() for name, parameter in net.named_parameters()}
    deployed = sum(number for name, number in params.items() if name.split(".")[0] not in AUX)
    with_aux = {"params_with_aux": sum(params.values())} if deployed != sum(params.values()) else {}
    return {"input": list(shape), "params": deployed, **with_aux, "macs": macs(net, shape)}


def of_torchvision(name: str) -> dict[str, Any]:
    """Counts, and what torchvision publishes of its weights: GMACs as `ops`, parameters."""
    name, *widths = name.split()
    args: dict[str, Any] = {key: float(value) for key, value in (width.split("=") for width in widths)}
    if name in ("googlenet", "inception_v3"):
        args |= {"init_weights": False, "aux_logits": True}
    weights = torchvision.models.get_model_weights(name).DEFAULT
    size = weights.transforms().crop_size[0]
    published = {} if widths else {"ops": weights.meta["_ops"], "num_params": weights.meta["num_params"]}
    return counts(torchvision.models.get_model(name, **args), (3, size, size)) | published


def of_timm(name: str) -> dict[str, Any]:
    """Counts, the shape of the last feature map, the channels that the head reads, channels and strides of features."""
    net = timm.create_model(name)
    shape = net.default_cfg["input_size"]
    info = timm.create_model(name, features_only=True).feature_info
    features = list(net.eval().forward_features(torch.empty(1, *shape)).shape[1:])
    described = {"features": features, "num_features": net.num_features}
    return counts(net, shape) | described | {"channels": info.channels(), "reduction": info.reduction()}


def of_pytorchcv(name: str) -> dict[str, Any]:
    """Counts."""
    net = get_model(name)
    return counts(net, (3, *net.in_size))


LIBRARIES: dict[str, Callable[[str], dict[str, Any]]] = {
    "torchvision": of_torchvision,
    "timm": of_timm,
    "pytorchcv": of_pytorchcv,
}


def records() -> dict[str, list[dict[str, Any]]]:
    """Our name → a record for each reference, `args` where it is our network with further arguments."""
    found: dict[str, list[dict[str, Any]]] = {}
    for ours, args, theirs in ROWS:
        for library, name in theirs.items():
            source = {"source": f"{library} {name}", "version": version(library), "args": args}
            found.setdefault(ours, []).append(source | LIBRARIES[library](name))
    return found


def document(found: dict[str, list[dict[str, Any]]]) -> str:
    """JSON with a record in each line, so that a difference shows whose it is."""
    networks = ",\n".join(
        f" {json.dumps(name)}: [\n" + ",\n".join(f"  {json.dumps(record)}" for record in theirs) + "\n ]"
        for name, theirs in found.items()
    )
    return f"{{\n{networks}\n}}\n"


if __name__ == "__main__":
    with torch.device("meta"):
        found = records()
    GOLDEN.write_text(document(found), encoding="utf-8")
    print(f"wrote {GOLDEN}")
