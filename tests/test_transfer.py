"""From one network to another: fewer channels, chosen by norm; another family's tensors; files for other classes."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flyweight.channels import RULES, groups
from flyweight.create import create_model
from flyweight.errors import UsageError
from flyweight.graph import SHAPES
from flyweight.net import Net
from flyweight.transfer import Narrowing, adopt, fill
from flyweight.weights import net_bytes
from flyweight.zoo import families

# Family → the widths of donor and network where they are not 0.125 and 0.0625, and what else makes it small.
WIDTHS = {
    "airbench": (0.25, 0.125),
    "mobilenet_v2": (0.5, 0.35),
    "mobilenet_v3": (0.5, 0.25),
    "resnext": (0.5, 0.25),
    "senet": (0.25, 0.125),
    "shufflenet_v1": (0.5, 0.25),
    "shufflenet_v2": (0.25, 0.125),
}
SMALLER = {
    "aligned_xception": {"middle": 1},
    "googlenet": {"aux": False},
    "inception_v3": {"aux": False},
    "resnext": {"layers": [1, 1, 1, 1]},
}
# Forms of channels that the first variants do not have: padded shortcuts, one more sum, a small stem, biases.
OTHERS = {
    "resnet20_cifar": {},
    "squeezenet1_0": {"bypass": "simple"},
    "shufflenet_v1_g3_cifar": {},
    "resnet18": {"norm": "none"},
}
CASES = [
    *[(next(iter(f.VARIANTS)), name, SMALLER.get(name, {})) for name, f in families().items()],
    *[(name, "", args) for name, args in OTHERS.items()],
]


def pair(name: str, family: str, **args: Any) -> tuple[Net, Net]:
    """A donor with random weights and statistics, and a narrower network, in float64."""
    torch.manual_seed(0)
    wide, thin = WIDTHS.get(family, (0.125, 0.0625) if family else (0.5, 0.25))
    donor, net = (create_model(name, width=width, num_classes=5, **args).double().eval() for width in (wide, thin))
    for leaf in donor.modules():
        if isinstance(leaf, nn.BatchNorm2d):
            nn.init.uniform_(leaf.get_buffer("running_mean"), -0.2, 0.2)
            nn.init.uniform_(leaf.get_buffer("running_var"), 0.5, 2.0)
            nn.init.uniform_(leaf.weight, 0.5, 1.5)
            nn.init.uniform_(leaf.bias, -0.2, 0.2)
        elif isinstance(leaf, nn.Conv2d | nn.Linear):
            nn.init.normal_(leaf.weight, std=(2 / leaf.weight[0].numel()) ** 0.5)
    return donor, net


def zero_dropped(donor: Net, narrowing: Narrowing) -> int:
    """Makes the donor's channels that are not kept compute 0; how many groups these are."""
    kept = {group.slices for _, group in narrowing.pairs}
    tensors = donor.state_dict()
    dropped = [group for found in narrowing.wide.values() for group in found if group.slices not in kept]
    for group in dropped:
        for each in group.slices:
            if each.axis == 0:
                tensors[each.tensor][list(each.positions)] = 0
    return len(dropped)


@pytest.mark.parametrize(("name", "family", "args"), CASES)
def test_channels_that_are_zero_are_not_missed(name: str, family: str, args: dict[str, Any]) -> None:
    donor, net = pair(name, family, **args)
    narrowing = Narrowing(net, donor)
    net.load_state_dict(narrowing.tensors(), strict=True)
    assert zero_dropped(donor, narrowing) > 0
    pictures = torch.randn(2, 3, *[min(donor.spec.input[1], 96)] * 2, dtype=torch.float64)
    with torch.no_grad():
        theirs, ours = donor(pictures), net(pictures)
    largest = theirs.abs().max().item()
    assert (theirs[0] - theirs[1]).abs().max() > 1e-4 * largest > 0
    assert (theirs - ours).abs().max() < 1e-10 * max(1.0, largest)


def test_the_largest_filters_are_kept_in_their_order() -> None:
    donor, net = (create_model("mobilenet_v1_cifar", width=width, num_classes=5) for width in (0.5, 0.25))
    stem, norm = (donor.state_dict()[f"features.stem.{name}.weight"] for name in ("conv", "norm"))
    stem.mul_(torch.tensor([1, 9, 1, 1, 9, 9, 9, 1, 1, 1, 9, 9, 9, 9, 1, 1]).view(-1, 1, 1, 1))
    norm.copy_(torch.arange(16))
    chosen = [1, 4, 5, 6, 10, 11, 12, 13]
    told = adopt(net, donor)
    kept, own = sum(made(net)), net.state_dict()
    assert told == [
        f"width 0.25 instead of 0.5 keeps {kept:,} of {sum(made(donor)):,} channels, those with the largest filters "
        "(L1 norm)"
    ]
    assert torch.equal(own["features.stem.conv.weight"], stem[chosen])
    assert own["features.stem.norm.weight"].tolist() == chosen
    depthwise = "features.block1.depthwise.conv.weight"
    assert torch.equal(own[depthwise], donor.state_dict()[depthwise][chosen])


def made(net: Net) -> list[int]:
    """The channels of each convolution that computes them."""
    return [leaf.out_channels for leaf in net.modules() if isinstance(leaf, nn.Conv2d) and leaf.groups == 1]


def test_groups_say_what_belongs_together() -> None:
    net = create_model("resnet8_cifar", width=0.5)
    found = {each for group in groups(net, net.spec.input) for each in group.slices if each.tensor.endswith("weight")}
    for name, tensor in net.state_dict().items():
        if name.endswith("weight"):
            for axis in range(min(tensor.dim(), 2)):
                positions = sorted(
                    p for each in found if (each.tensor, each.axis) == (name, axis) for p in each.positions
                )
                assert positions == list(range(tensor.shape[axis]))
    stem = next(
        g for g in groups(net, net.spec.input) if any(s.tensor == "features.stem.conv.weight" for s in g.filters)
    )
    assert {each.tensor for each in stem.filters} == {
        "features.stem.conv.weight", "features.stage1_block1.body.conv2.conv.weight",
        "features.stage2_block1.body.conv2.conv.weight", "features.stage3_block1.body.conv2.conv.weight",
    }  # fmt: skip


def test_each_leaf_has_a_rule_of_labels() -> None:
    assert set(RULES) == set(SHAPES)


def test_fewer_channels_other_classes_and_grey_pictures() -> None:
    donor = create_model("googlenet", width=0.25, num_classes=5)
    net = create_model("googlenet", width=0.125, num_classes=7, in_chans=1)
    before = net.get_classifier().get_parameter("weight").detach().clone()
    told = adopt(net, donor)
    assert [each.split(" ")[0] for each in told] == ["width", "the", "the", "the"]
    assert told[1:] == [
        "the classifier for 5 classes was dropped, that for 7 is untrained",
        "the first convolution's kernels were summed for grey",
        "the auxiliary heads are untrained",
    ]
    assert torch.equal(net.get_classifier().get_parameter("weight"), before)
    assert net.state_dict()["features.conv1.conv.weight"].shape == (8, 1, 7, 7)


@pytest.mark.parametrize(
    ("name", "wide", "thin", "message"),
    [
        ("mobilenet_v1", {"width": 0.125}, {"width": 0.25}, "channels can be taken away, not added"),
        ("mobilenet_v1", {"norm": "group"}, {"norm": "group"}, "is a GroupNorm, which mixes channels"),
        ("mobilenet_v2", {"width": 0.5}, {"width": 0.25}, r"block1\.body.* is missing"),  # a shortcut that is only here
        ("shufflenet_v2", {"width": 0.5}, {"width": 0.25}, "cannot be narrowed to this shufflenet_v2: .* 0 are read"),
        ("resnet8_cifar", {"layers": [1, 1, 1]}, {"layers": [2, 1, 1]}, "has another shape there or is missing"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changes(
    name: str, wide: dict[str, Any], thin: dict[str, Any], message: str
) -> None:
    widths: tuple[dict[str, Any], dict[str, Any]] = {"width": 0.5}, {"width": 0.25}
    donor, net = (create_model(name, num_classes=5, **(w | a)) for w, a in zip(widths, (wide, thin), strict=True))
    before = {tensor: value.clone() for tensor, value in net.state_dict().items()}
    with pytest.raises(UsageError, match=message):
        adopt(net, donor)
    assert all(torch.equal(value, before[tensor]) for tensor, value in net.state_dict().items())


def test_other_arguments_that_change_channels_alone() -> None:
    donor, net = (create_model("squeezenet1_1", width=0.5, squeeze_ratio=ratio) for ratio in (0.5, 0.25))
    assert adopt(net, donor)[0].startswith("the narrower form keeps")


def test_a_file_for_another_width_and_other_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, donor = tmp_path / "model.safetensors", create_model("mobilenet_v1_cifar", width=0.25, num_classes=5)
    path.write_bytes(net_bytes(donor))
    with caplog.at_level(logging.WARNING):
        same = create_model("mobilenet_v1_cifar", path, width=0.25, num_classes=5)
    assert not caplog.records
    assert all(torch.equal(value, donor.state_dict()[name]) for name, value in same.state_dict().items())
    with caplog.at_level(logging.WARNING):
        net = create_model("mobilenet_v1_cifar", path, width=0.125, num_classes=3)
    assert len(caplog.records) == 2
    assert "width 0.125 instead of 0.25 keeps" in caplog.records[0].getMessage()
    assert net.num_classes == 3
    with pytest.raises(UsageError, match="does not fit this network"):
        create_model("squeezenet1_1", path)


# What Aligned Xception has and Xception has not: norms after depthwise convolutions, a third convolution in the blocks
# that stride, the second one of the exit flow; and the classifier, which only sees trained features at the very end.
THIRD = [f"features.block{block}.body.conv3.{layer}"
         for block in (1, 2, 3, 20) for layer in ("depthwise.conv", "pointwise.conv", "pointwise.norm")]  # fmt: skip
UNFILLED = {
    *THIRD,
    *[f"features.block{block}.body.conv{conv}.depthwise.norm" for block in range(1, 21) for conv in (1, 2, 3)],
    *[f"features.exit.conv{conv}.depthwise.norm" for conv in (1, 2, 3)],
    "features.exit.conv2.depthwise.conv",
    "features.exit.conv2.pointwise.conv",
    "head.fc",
}


def test_xception_fills_a_part_of_aligned_xception() -> None:
    donor, net = (create_model(name, width=0.125, num_classes=5) for name in ("xception", "aligned_xception"))
    for i, tensor in enumerate(donor.state_dict().values()):
        tensor.fill_(i + 2)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    unfilled = fill(net, donor)
    assert len(unfilled) == len(UNFILLED) == 78
    assert set(unfilled) == UNFILLED
    own, given = net.state_dict(), donor.state_dict()
    for name, tensor in own.items():
        assert torch.equal(tensor, before[name]) == (name.rpartition(".")[0] in UNFILLED), name
    blocks = dict.fromkeys(range(12, 20), 11) | {20: 12, 1: 1, 5: 5}
    for ours, theirs in blocks.items():
        depthwise = given[f"features.block{theirs}.body.conv2.depthwise.weight"]
        assert torch.equal(own[f"features.block{ours}.body.conv2.depthwise.conv.weight"], depthwise)
    assert torch.equal(own["features.block20.shortcut.conv.weight"], given["features.block12.shortcut.conv.weight"])
    for ours, theirs in {"exit.conv1": "conv3", "exit.conv2": "conv3", "exit.conv3": "conv4"}.items():
        norm = given[f"features.{theirs}.pointwise.norm.weight"]
        assert torch.equal(own[f"features.{ours}.pointwise.norm.weight"], norm)
    assert torch.equal(own["features.exit.conv3.pointwise.conv.weight"], given["features.conv4.pointwise.conv.weight"])


@pytest.mark.parametrize(
    ("name", "args", "donor", "message"),
    [
        ("aligned_xception", {"width": 0.25}, "xception", "both need one width"),
        ("aligned_xception_71", {}, "xception", "nothing in common"),
        ("aligned_xception", {}, "mobilenet_v1", "it knows as donors: xception"),
    ],
)
def test_other_donors_are_refused(name: str, args: dict[str, Any], donor: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fill(create_model(name, **{"width": 0.125, **args}), create_model(donor, width=0.125))
