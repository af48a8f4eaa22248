"""Weight clustering: what the values cost and do, layers that stay as they are, and a network repaired."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from flyweight.compress.cluster import (
    Cluster,
    Layer,
    Rates,
    Tied,
    all_coded,
    away,
    coded,
    entropy,
    grid,
    nearest,
    put,
    size_of,
    zero_of,
)
from flyweight.compress.curvature import curvatures
from flyweight.compress.sparsify import calibration, kernels
from flyweight.compress.step import Context
from flyweight.create import create_model
from flyweight.data import Splits, open_source, prepare
from flyweight.errors import FlyweightError, UsageError
from flyweight.net import Net
from flyweight.preprocess import Preprocess
from flyweight.records import Records
from flyweight.train.losses import distance
from flyweight.train.recipe import Recipe

FREE = 1e-20  # a price at which nothing is saved
RECIPE = Recipe(
    optimiser="adam", learning_rate=3e-3, batch_size=32, weight_decay=0.0, shift=1, flip=False, label_smoothing=0.0
)


@pytest.fixture(scope="module")
def splits() -> Splits:
    """A thousand pictures to learn from."""
    whole = prepare(open_source("demo"), [28])
    return replace(whole, train=whole.train.subset(np.arange(1000)), validation=whole.validation.subset(np.arange(300)))


def context_of(splits: Splits, epochs: float | None = None) -> Context:
    preprocess = Preprocess.of(splits.train.batch(28))
    return Context(splits.train, splits.validation, preprocess, RECIPE, epochs=epochs, mode="float32")


def new_network() -> Net:
    """SqueezeNet has biases and no norms."""
    torch.manual_seed(0)
    return create_model("squeezenet1_1", num_classes=10, in_chans=1, width=0.125, size=28, stem="cifar").eval()


def copied(net: Net) -> Net:
    twin = new_network()
    twin.load_state_dict(net.state_dict())
    return twin


@pytest.fixture(scope="module")
def trained(splits: Splits) -> Net:
    net = new_network()
    context_of(splits, 4).fine_tune(net)
    return net.eval()


@pytest.fixture(scope="module")
def layers(trained: Net, splits: Splits) -> list[Layer]:
    found = curvatures(trained, calibration(context_of(splits), 64, 32))
    return [Layer.of(path, trained.get_submodule(path), each) for path, each in found.items()]


def _moved(leaf: nn.Module, error: torch.Tensor) -> None:
    weight = leaf.get_parameter("weight")
    weight += error[:, :-1].reshape(weight.shape)
    leaf.get_parameter("bias").add_(error[:, -1])


def test_the_curvature_tells_what_a_small_error_does(splits: Splits) -> None:
    """For one linear layer its second factor is all that is approximated: classes drawn instead of all of them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10))
    batches = list(calibration(context_of(splits), 512, 64))
    found = curvatures(net, batches)["1"]
    assert found.inputs.shape == (1, 785, 785)
    assert found.inputs[0, -1, -1] == pytest.approx(1.0)
    linear = net[1]
    error = 0.02 * torch.randn(10, 785, dtype=torch.float64)
    said = float((found.outputs * torch.einsum("oi,ij,oj->o", error, found.inputs[0], error)).sum()) / 2
    with torch.no_grad():
        before = [net(x) for x in batches]
        _moved(linear, error)
        moved = [float(distance(net(x), y, 1.0)) for x, y in zip(batches, before, strict=True)]
    assert said == pytest.approx(np.mean(moved), rel=0.3)


def test_gradients_that_are_alike_over_a_map_add_up(splits: Splits) -> None:
    """Before a global average all positions have one gradient: an error that they share counts as its sum.

    Were they taken as independent, it would count a 676th of that.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    batches = list(calibration(context_of(splits), 512, 64))
    found = curvatures(net, batches)["0"]
    error = 0.02 * torch.randn(10, 10, dtype=torch.float64)
    said = float((found.outputs * torch.einsum("oi,ij,oj->o", error, found.inputs[0], error)).sum()) / 2
    with torch.no_grad():
        before = [net(x) for x in batches]
        _moved(net[0], error)
        moved = [float(distance(net(x), y, 1.0)) for x, y in zip(batches, before, strict=True)]
    assert said == pytest.approx(np.mean(moved), rel=0.6)


def test_few_values_are_left_as_they_are(trained: Net, splits: Splits) -> None:
    net = copied(trained)
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for weight in kernels(net).values():
            book = torch.from_numpy(np.append(rng.choice(weight.numpy().ravel(), 15), 0.0).astype(np.float32))
            weight.copy_(book[(weight.flatten()[:, None] - book).abs().argmin(1)].view_as(weight))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    found = curvatures(net, calibration(context_of(splits), 64, 32))
    few = [Layer.of(path, net.get_submodule(path), each) for path, each in found.items()]
    put(net, few, all_coded(few, FREE, 256))
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("levels", [3, 15, 256])
def test_no_layer_has_more_values_than_it_may(trained: Net, layers: list[Layer], levels: int) -> None:
    for layer in layers:
        code = coded(layer, 1e-7, levels)
        assert len(np.unique(code.book[code.places])) <= levels
        assert code.book[zero_of(code.book)] == 0


def test_a_higher_price_never_buys_more_bits(layers: list[Layer]) -> None:
    found = [all_coded(layers, price, 256) for price in (1e-8, 1e-6, 1e-5, 1e-3)]
    bits = [sum(code.bits for code in each.values()) for each in found]
    damages = [sum(code.damage for code in each.values()) for each in found]
    assert bits == sorted(bits, reverse=True)
    assert damages == sorted(damages)
    assert bits[-1] < 0.2 * bits[0]


def test_rates_are_what_coding_takes() -> None:
    rng = np.random.default_rng(0)
    places = np.where(rng.random((1, 40, 500)) < 0.3, rng.integers(0, 5, (1, 40, 500)), 2).astype(np.int32)
    channels = (np.arange(40) // 4).astype(np.int32)
    rates = Rates.of(places, np.arange(-2, 3, dtype=np.float32), channels)
    assert rates.bits(places, 2) == pytest.approx(entropy(places), rel=0.01)


def test_the_step_balances_damage_and_bits() -> None:
    values = np.random.default_rng(0).normal(size=100_000).astype(np.float32)

    def cost(price: float) -> float:
        book = grid(values, 2.0, price, 10_001)
        places = nearest(book, values)
        return float(2 * np.square(values - book[places]).sum()) + 1e-3 * entropy(places)

    assert cost(1e-3) < min(cost(4e-3), cost(2.5e-4))


def test_what_follows_makes_good_for_what_was_rounded(trained: Net, layers: list[Layer], splits: Splits) -> None:
    """Rounded in turn, a network answers more nearly as before than with every weight rounded by itself."""
    batches = list(calibration(context_of(splits), 64, 32))
    outputs = {}
    for name in ("float", "alone", "in turn"):
        net = copied(trained)
        codes = all_coded(layers, 1e-6, 256)
        if name == "alone":
            with torch.no_grad():
                for layer in layers:
                    book = codes[layer.path].book
                    weight = net.get_parameter(f"{layer.path}.weight")
                    places = np.abs(weight.numpy().ravel()[:, None] - book).argmin(1)
                    weight.copy_(torch.from_numpy(book[places]).view_as(weight))
        elif name == "in turn":
            put(net, layers, codes)
        with torch.no_grad():
            outputs[name] = torch.cat([net(x) for x in batches])
    lost = {name: float(distance(y, outputs["float"], 1.0)) for name, y in outputs.items()}
    assert lost["alone"] > lost["in turn"] > 0


def test_a_network_is_clustered_into_a_size_and_repaired(trained: Net, splits: Splits, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    context = context_of(splits, 5.0)
    context.records = Records(tmp_path, lambda: 0.0)
    size = round(0.15 * size_of(trained, context))
    net = Cluster(size=size, pictures=64, rate=3e-4)(trained, context)
    assert all(torch.equal(before[name], tensor) for name, tensor in trained.state_dict().items())
    record = context.records.find("clustered")
    assert record is not None
    assert 0.9 * size < record["packed_bytes"] == size_of(net, context) <= size
    assert record["layers"].keys() == kernels(net).keys()
    rounded, repaired = record["lost"]
    assert repaired == pytest.approx(away(net, trained, context), rel=1e-3)
    assert repaired < rounded


def test_weights_that_share_a_value_go_on_sharing_it() -> None:
    weight = nn.Parameter(torch.tensor([[0.0, 2.0, -1.0], [2.0, 0.0, 2.0]]))
    tied = Tied(weight)
    with torch.no_grad():
        weight += torch.tensor([[0.5, 0.1, 0.25], [0.2, -0.5, 0.3]])
    tied.follow()
    assert torch.allclose(weight, torch.tensor([[0.0, 2.2, -0.75], [2.2, 0.0, 2.2]]))
    tied.settle()
    assert torch.equal(weight, torch.tensor([[0.0, 2.25, -0.75], [2.25, 0.0, 2.25]])), "multiples of a quarter of 1"
    assert not weight[weight == 0].signbit().any()


def test_training_that_does_not_help_is_undone(trained: Net, splits: Splits, tmp_path: Path) -> None:
    context = context_of(splits, 0.1)
    context.records = Records(tmp_path, lambda: 0.0)
    net = Cluster(price=1e-6, pictures=64, rate=1.0)(trained, context)
    record = context.records.find("clustered")
    assert record is not None
    rounded, repaired = record["lost"]
    assert away(net, trained, context) == pytest.approx(rounded, rel=1e-3)
    assert rounded < repaired


def test_a_size_out_of_reach(trained: Net, splits: Splits) -> None:
    with pytest.raises(FlyweightError, match="cannot bring the packed file to"):
        Cluster(size=100, pictures=32)(trained, context_of(splits))


@pytest.mark.parametrize("settings", [{}, {"size": 1, "price": 1.0}, {"price": 0.0}, {"price": 1.0, "levels": 2}])
def test_settings_that_mean_nothing(settings: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Cluster(**settings)  # type: ignore[arg-type]
