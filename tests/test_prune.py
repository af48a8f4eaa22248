"""Structured pruning: what is zero is not missed, in every family; the pruned network is a network like any other."""

import json
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto
from test_transfer import SMALLER
from torch import nn

from flyweight.bench.engines import onnxruntime as engine
from flyweight.channels import Group
from flyweight.compress.prune import Plan, Prune, taylor
from flyweight.compress.step import Context, repair_recipe
from flyweight.compress.widths import Ledger, Level, Unit, cut, levels, units, widths_at
from flyweight.costs import cost
from flyweight.create import create_model
from flyweight.data import open_source, prepare
from flyweight.errors import FlyweightError, UsageError
from flyweight.export import onnx
from flyweight.foreign import give
from flyweight.net import Net, Spec
from flyweight.preprocess import Preprocess
from flyweight.train.inputs import normalise
from flyweight.transfer import filter_norms
from flyweight.weights import load_net, net_bytes
from flyweight.zoo import build, families, spec_of, structure, variants

# Families that 0.0625 of the width leaves too few channels, or with one to a group.
WIDTHS = {"resnext": 0.5, "senet": 0.5} | dict.fromkeys(
    ("mobilenet_v2", "shufflenet_v1", "shufflenet_v2", "squeezenet"), 0.25
)


def forms() -> list[tuple[str, dict[str, Any]]]:
    """Every network of the zoo, narrow and shallow; those that differ in width or depth alone, once."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, (family, own) in variants().items():
        args: dict[str, Any] = {"width": WIDTHS.get(family, 0.0625), **SMALLER.get(family, {})}
        if "layers" in own:
            args |= {"layers": [2, 1], "channels": [*own.get("channels", (64, 128))][:2]}
        found.setdefault(json.dumps(spec_of(name, **args).to_json()), (name, args))
    return list(found.values())


# What they do not have: sums of channels that a concatenation splits, layers whose only constants are biases.
OTHERS = [("squeezenet1_0", {"bypass": "simple", "width": 0.25}), ("resnet18", {"norm": "none", "width": 0.25})]


def chosen(chains: list[list[Level]], seed: int = 0) -> list[Level]:
    """A narrower level of every unit that has one, at random."""
    rng = random.Random(seed)
    return [rng.choice(chain[1:] or chain) for chain in chains]


def drawn(seed: int = 0) -> Callable[[Group], float]:
    """An importance that is random, the same for a group whenever it is asked for."""
    return lambda group: random.Random(f"{seed} {group.slices[0]}").random()


def silence(net: Net, groups: Iterable[Group]) -> None:
    """Makes channels compute 0."""
    tensors = net.state_dict()
    for each in (each for group in groups for each in group.slices if each.axis == 0):
        tensors[each.tensor][list(each.positions)] = 0


def lively(name: str, **args: Any) -> Net:
    """A network in float64 whose weights, biases and norms are all random."""
    torch.manual_seed(0)
    net = create_model(name, num_classes=5, **args).double().eval()
    for leaf in net.modules():
        if isinstance(leaf, nn.Conv2d | nn.Linear):
            nn.init.normal_(leaf.weight, std=(2 / leaf.weight[0].numel()) ** 0.5)
        elif isinstance(leaf, nn.BatchNorm2d):
            nn.init.uniform_(leaf.weight, 0.5, 1.5)
        if isinstance(leaf, nn.Conv2d | nn.Linear | nn.BatchNorm2d) and leaf.bias is not None:
            nn.init.uniform_(leaf.bias, 0, 0.2)
    return net


def settle(net: Net, pictures: torch.Tensor) -> None:
    """Takes the statistics of these pictures: else the answers of a deep network hardly depend on its input."""
    for leaf in net.modules():
        if isinstance(leaf, nn.BatchNorm2d):
            leaf.train().momentum = 1.0
    with torch.no_grad():
        net(pictures)
    net.eval()


@pytest.mark.parametrize(("name", "args"), [*forms(), *OTHERS])
def test_channels_made_zero_are_channels_removed(name: str, args: dict[str, Any]) -> None:
    net = lively(name, **args)
    found = units(net)
    # Grouped convolutions lose as many channels in each group, halves of a concatenation as many on each side.
    grouped = any(isinstance(leaf, nn.Conv2d) and 1 < leaf.groups < leaf.in_channels for leaf in net.modules())
    assert any(len(unit.places) > 1 for unit in found) == (grouped or name == "shufflenet_v2")
    chains = levels(net, found, keep=0.2, multiple=64)
    fixed = sum(len(chain) == 1 for chain in chains)  # as 24 and 248 channels together that go on in 4 groups
    assert fixed <= (len(found) // 3 if grouped else 0)
    at = chosen(chains)
    gone = [
        group
        for unit, level in zip(found, at, strict=True)
        for place, groups in unit.places.items()
        for group in sorted(groups, key=drawn())[: len(groups) - level.counts[place]]
    ]
    assert len(gone) >= len(found) - fixed
    pictures = torch.randn(2, 3, *[min(net.spec.input[1], 96)] * 2, dtype=torch.float64)
    silence(net, gone)
    settle(net, pictures)
    pruned = cut(net, widths_at(net, found, [level.share for level in at]), drawn())
    with torch.no_grad():
        whole, ours = net(pictures), pruned(pictures)
    largest = whole.abs().max()
    assert (whole[0] - whole[1]).abs().max() > 1e-3 * largest > 0
    assert (whole - ours).abs().max() < 1e-10 * largest
    same_cost(Ledger(net, found), at, pruned)


def same_cost(ledger: Ledger, at: list[Level], pruned: Net) -> None:
    """What the plan says, what the network costs and what its Spec does are one."""
    shares, counted = np.array([level.share for level in at]), cost(pruned)
    assert counted == cost(pruned.spec)
    assert counted.macs == round(ledger.cost("macs", shares))
    assert counted.weight_bytes() == round(ledger.cost("bytes", shares))


def narrowed(name: str, seed: int = 0, multiple: int = 2, **args: Any) -> Net:
    """A network with random weights of which channels were taken away at random."""
    torch.manual_seed(seed)
    net = create_model(name, num_classes=5, **args).eval()
    found = units(net)
    at = chosen(levels(net, found, 0.2, multiple), seed)
    return cut(net, widths_at(net, found, [level.share for level in at]), drawn(seed))


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "resnet8_cifar", "googlenet", "shufflenet_v1_g3_cifar"])
def test_a_pruned_network_is_a_checkpoint_like_any_other(name: str, tmp_path: Path) -> None:
    net, path = narrowed(name, width=0.25, size=64, multiple=8), tmp_path / "model.safetensors"
    path.write_bytes(net_bytes(net))
    again, pictures = load_net(path), torch.randn(2, *net.spec.input)
    assert again.spec == net.spec == Spec.from_json(json.loads(json.dumps(net.spec.to_json())))
    assert torch.equal(again(pictures), net(pictures))
    assert again.num_features == net.forward_features(pictures).shape[1]
    assert again.head_hidden_size == net.forward_head(net.forward_features(pictures), pre_logits=True).shape[1]
    created = create_model(name, path, width=0.25, num_classes=5, size=64).eval()
    assert torch.equal(created(pictures), net(pictures))
    again.reset_classifier(7)
    assert again(pictures).shape == (2, 7)
    features = create_model(name, features_only=True, width=0.25, size=64, widths=net.spec.widths)
    assert [each.shape[1] for each in features(pictures)] == features.feature_info.channels()


def test_other_classes_and_grey_pictures(tmp_path: Path) -> None:
    net, path = narrowed("mobilenet_v1_cifar", width=0.25), tmp_path / "model.safetensors"
    path.write_bytes(net_bytes(net))
    created = create_model("mobilenet_v1_cifar", path, width=0.25, num_classes=3, in_chans=1)
    assert created.spec.widths == net.spec.widths
    assert created(torch.randn(2, 1, 32, 32)).shape == (2, 3)


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet20_cifar", "shufflenet_v2", "se_resnet18", "squeezenet1_1"])
def test_a_pruned_network_is_exported_as_it_answers(name: str) -> None:
    net = narrowed(name, width=0.25, size=64, multiple=8)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    model = onnx.export(net, Preprocess((64, 64), 3, (120.0,) * 3, (60.0,) * 3), list("abcde"))
    held = [math.prod(each.dims) for each in model.graph.initializer if each.data_type == TensorProto.FLOAT]
    assert sum(4 * count for count in held if count > 1) == cost(net).weight_bytes()
    with torch.no_grad():
        expected = net((torch.from_numpy(pixels).permute(0, 3, 1, 2).float() - 120) / 60).softmax(1)
    np.testing.assert_allclose(engine.load(model.SerializeToString(), 1)(pixels), expected, atol=1e-5)


def test_what_was_pruned_is_pruned_again() -> None:
    net = narrowed("resnet20_cifar")
    found = units(net)
    twice = cut(net, widths_at(net, found, [level.share for level in chosen(levels(net, found, 0.05, 1))]), drawn())
    assert cost(twice).macs < cost(net).macs
    assert twice.spec.widths.keys() >= net.spec.widths.keys()
    assert all(width < net.spec.widths[path] for path, width in twice.spec.widths.items() if path in net.spec.widths)
    assert twice(torch.randn(2, 3, 32, 32)).shape == (2, 5)


def test_other_libraries_have_no_such_network() -> None:
    with pytest.raises(UsageError, match="timm has no mobilenet_v1 of these widths"):
        give(narrowed("mobilenet_v1", width=0.25, size=64, multiple=8), "timm")


def test_a_spec_without_widths_is_what_it_was() -> None:
    assert json.dumps(spec_of("squeezenet1_0").to_json()) == (
        '{"family": "squeezenet", "args": {"version": "1.0"}, "input": [3, 224, 224], "widths": {}}'
    )


@pytest.mark.parametrize("family", families())
def test_group_norm_is_refused_in_one_sentence(family: str) -> None:
    with torch.device("meta"):
        net = structure(spec_of(next(iter(families()[family].VARIANTS)), norm="group"))
    with pytest.raises(UsageError, match=r"^\S+ is a GroupNorm, which mixes channels: none can be taken away$"):
        units(net)


STEM = "features.stem.conv"


@pytest.mark.parametrize(
    ("name", "widths", "message"),
    [
        ("mobilenet_v1", {"features.stem.norm": 8}, "computes no channels at features.stem.norm"),
        ("mobilenet_v1", 5, "5 does not tell them by the path of a leaf"),
        ("mobilenet_v1", {STEM: 64}, f"at {STEM}, 64 is not a whole number from 1 to the family's 32"),
        ("mobilenet_v1", {STEM: 0}, "0 is not a whole number"),
        ("mobilenet_v1", {STEM: 4.0}, "4.0 is not a whole number"),
        ("mobilenet_v1", {STEM: True}, "True is not a whole number"),
        ("resnet8_cifar", {STEM: 8}, r"at features\.stage1_block1\.add, they differ"),
        ("resnext50_32x4d", {"features.stage1_block1.body.conv1.conv": 120}, "32 groups do not divide 120 and 128"),
        ("shufflenet_v1", {"features.stage2_unit1.body.squeeze.conv": 58}, "3 groups do not divide"),
    ],
)
def test_widths_that_do_not_fit_are_refused(name: str, widths: Any, message: str) -> None:
    with torch.device("meta"), pytest.raises(UsageError, match=f"^the widths do not fit this network: .*{message}"):
        structure(replace(spec_of(name), widths=widths))


def test_a_file_with_widths_of_another_network_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(net_bytes(narrowed("mobilenet_v1_cifar", width=0.5)))
    with pytest.raises(UsageError, match="the widths do not fit this network"):
        create_model("mobilenet_v1_cifar", path, width=0.25, num_classes=5)


def test_auxiliary_heads_go() -> None:
    net = narrowed("googlenet", width=0.25, aux=True)
    assert len(net.aux) == 0
    assert len(build(net.spec).aux) == 0
    assert net.forward_aux(torch.randn(1, 3, 224, 224))[1] == []


def unit_of(net: Net, path: str) -> Unit:
    return next(unit for unit in units(net) if path in unit.widths)


def test_widths_suit_the_engine() -> None:
    with torch.device("meta"):
        net, small = (structure(spec_of("mobilenet_v1", width=width)) for width in (0.5, 0.25))
    for chain, unit in zip(levels(net, units(net), 0.25, 4), units(net), strict=True):
        widths = [level.share * len(unit) for level in chain]
        assert all(width % 4 == 0 for width in widths)
        assert min(widths) == 0.25 * len(unit)
    stem = levels(small, [unit_of(small, STEM)], 0.25, 8)[0]
    assert [8 * level.share for level in stem] == [8, 6, 4, 2]


def test_a_grouped_convolution_keeps_equal_groups() -> None:
    with torch.device("meta"):
        net = structure(spec_of("resnext50_32x4d", width=0.5, layers=[1, 1, 1, 1]))
    unit = unit_of(net, "features.stage1_block1.body.conv2.conv")
    assert len(unit.places) == 32
    chain = levels(net, [unit], 0.1, 8)[0]
    assert len(chain) > 1
    for level in chain:
        assert len(set(level.counts.values())) == 1


@pytest.fixture(scope="module")
def context() -> Context:
    """Real pictures: the data that comes along."""
    splits = prepare(open_source("demo"), [28])
    preprocess = Preprocess.of(splits.train.batch(28, np.arange(1000)))
    return Context(splits.train, splits.validation, preprocess, repair_recipe(28), epochs=1.0)


def grey(name: str, **args: Any) -> Net:
    torch.manual_seed(0)
    return create_model(name, num_classes=10, in_chans=1, size=28, **args).eval()


@pytest.mark.parametrize("name", ["resnet8_cifar", "shufflenet_v1_g3_cifar"])
def test_taylor_is_the_slope_of_the_loss(name: str, context: Context) -> None:
    """The derivative along a channel's disappearance, against a small step of it."""
    net, few = grey(name, width=0.25), replace(context, train=context.train.subset(np.arange(16)))
    weigh = taylor(net, few, 16)
    net.double()
    pictures = normalise(torch.from_numpy(few.train.batch(28)), few.preprocess).double()
    labels = torch.from_numpy(few.train.labels)

    def loss() -> float:
        with torch.no_grad():
            return nn.functional.cross_entropy(net(pictures), labels).item()

    rng, tensors = random.Random(0), net.state_dict()
    for found in rng.sample([groups[0] for unit in units(net) for groups in unit.places.values()], 6):
        losses = []
        for factor in (1 + 1e-6, 1 - 1e-6):
            kept = {each.tensor: tensors[each.tensor].clone() for each in found.slices if each.axis == 1}
            for each in (each for each in found.slices if each.axis == 1):
                scale(net, each.tensor, each.positions, factor)
            losses.append(loss())
            for tensor, values in kept.items():
                tensors[tensor].copy_(values)
        slope = abs(losses[0] - losses[1]) / 2e-6
        assert weigh(found) == pytest.approx(slope, rel=0.01, abs=1e-6)


def scale(net: Net, tensor: str, positions: tuple[int, ...], factor: float) -> None:
    """Multiplies what a kernel reads of a channel."""
    leaf = net.get_submodule(tensor.rpartition(".")[0])
    groups = leaf.groups if isinstance(leaf, nn.Conv2d) else 1
    weight = net.state_dict()[tensor]
    rows, columns = weight.shape[0] // groups, weight.shape[1]
    for position in positions:
        part, column = divmod(position, columns)
        weight[part * rows : (part + 1) * rows, column] *= factor


@pytest.mark.parametrize("importance", ["taylor", "l1", "l2"])
def test_dead_channels_go_first(importance: str, context: Context) -> None:
    net = grey("squeezenet1_1", width=0.25, stem="cifar")
    dead = {path: unit for unit in units(net) for path in unit.widths if "fire4" in path or "fire7" in path}
    tensors = net.state_dict()
    for unit in dead.values():
        for groups in unit.places.values():
            for each in (each for group in groups[::2] for each in group.slices if each.axis == 0):
                tensors[each.tensor][list(each.positions)] = 0
    settings = Prune(macs=0.9, importance=importance, multiple=1, pictures=64)
    plan = Plan(net, settings.weigh(net, context), settings)
    half_of_the_dead = [0.75 if dead.keys() & unit.widths else 1.0 for unit in plan.units]
    limit = plan.ledger.cost("macs", np.array(half_of_the_dead))
    pruned = plan.reduce("macs", limit).cut()
    assert cost(pruned).macs <= limit
    pictures = torch.randn(4, 1, 28, 28)
    assert torch.allclose(net(pictures), pruned(pictures), atol=1e-5)
    if importance != "taylor":  # to the slope of the loss, ReLUs of a random network that never fire are dead as well
        assert set(pruned.spec.widths) <= set(dead)


@pytest.mark.parametrize("resource", ["macs", "bytes"])
def test_of_channels_that_matter_alike_the_dearest_go(resource: str) -> None:
    net = grey("resnet8_cifar", width=0.5)
    plan = Plan(net, lambda group: 1.0, Prune(macs=0.9, multiple=1))
    pruned = plan.reduce(resource, plan.cost(resource) - 1).cut()

    def without_one(unit: Unit) -> int:
        counted = cost(replace(net.spec, widths=widths_at(net, [unit], [1 - 1 / len(unit)])))
        return counted.macs if resource == "macs" else counted.weight_bytes()

    assert pruned.spec.widths.keys() == min(plan.units, key=without_one).widths.keys()


def test_no_more_goes_than_must() -> None:
    net = grey("resnet8_cifar")
    for seed in range(5):
        plan = Plan(net, drawn(seed), Prune(macs=0.5))
        limit = 0.5 * plan.cost("macs")
        plan.reduce("macs", limit)
        assert plan.cost("macs") <= limit
        for unit in (unit for unit, at in enumerate(plan.at) if at):
            plan.at[unit] -= 1
            assert plan.cost("macs") > limit
            plan.at[unit] += 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "needs one limit"),
        ({"macs": 0.5, "size": 1000}, "needs one limit"),
        ({"macs": 1.5}, "between 0 and 1, not 1.5"),
        ({"macs": 0.5, "importance": "best"}, "one of taylor, l1, l2, not 'best'"),
        ({"macs": 0.5, "rounds": 0}, "a round at least"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Prune(**settings)


def test_a_limit_out_of_reach_is_told_before_anything_is_trained(context: Context) -> None:
    net = grey("resnet8_cifar", width=0.5)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for settings in (Prune(macs=0.001), Prune(size=1000)):
        with pytest.raises(FlyweightError, match=r"pruning can leave .* % of the (MACs|bytes of weights), not .* %"):
            settings(net, context)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_where_nothing_can_go_it_is_said(context: Context) -> None:
    net = grey("resnet8_cifar", width=0.5)
    with pytest.raises(UsageError, match="none of the channels of this resnet can be taken away"):
        Prune(macs=0.5, keep=1.0)(net, context)


def test_filters_weigh_their_norms() -> None:
    net = grey("resnet8_cifar", width=0.5)
    group = unit_of(net, "features.stage1_block1.body.conv1.conv").places.popitem()[1][3]  # type: ignore[attr-defined]
    kernel = net.state_dict()["features.stage1_block1.body.conv1.conv.weight"][3]
    assert filter_norms(net, 1)(group) == pytest.approx(kernel.abs().sum().item())
    assert filter_norms(net, 2)(group) == pytest.approx(kernel.square().sum().sqrt().item())
