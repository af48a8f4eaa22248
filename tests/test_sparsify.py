"""Unstructured pruning: what goes, what stays gone while the network learns on, and which layers pay for it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from flyweight.compress.sparsify import SHARES, Sparsify, allot, calibration, held, kernels, sensitivity, smallest
from flyweight.compress.step import Context
from flyweight.create import create_model
from flyweight.data import Splits, open_source, prepare
from flyweight.errors import FlyweightError, UsageError
from flyweight.net import Net
from flyweight.preprocess import Preprocess
from flyweight.records import Records
from flyweight.train.recipe import Recipe, recipe_for


@pytest.fixture(scope="module")
def splits() -> Splits:
    """A thousand pictures to learn from."""
    whole = prepare(open_source("demo"), [28])
    return replace(whole, train=whole.train.subset(np.arange(1000)), validation=whole.validation.subset(np.arange(300)))


def context_of(splits: Splits, recipe: Recipe | None = None, epochs: float = 2.0) -> Context:
    recipe = recipe or replace(recipe_for(28), learning_rate=0.1, batch_size=64, resize=())
    preprocess = Preprocess.of(splits.train.batch(28))
    return Context(splits.train, splits.validation, preprocess, recipe, epochs=epochs, mode="float32")


@pytest.fixture(scope="module")
def trained(splits: Splits) -> Net:
    torch.manual_seed(0)
    net = create_model("airbench94", num_classes=10, in_chans=1, width=0.125, size=28)
    context_of(splits, epochs=4).fine_tune(net)
    return net


@pytest.mark.parametrize("optimiser", ["sgd", "adamw", "muon"])
def test_masks_hold_while_the_network_learns(trained: Net, splits: Splits, optimiser: str) -> None:
    net = create_model("airbench94", num_classes=10, in_chans=1, width=0.125, size=28)
    net.load_state_dict(trained.state_dict())
    masks = {path: smallest(weight, weight.numel() // 3) for path, weight in kernels(net).items()}
    rate = {"sgd": 0.1, "adamw": 1e-3, "muon": 0.05}[optimiser]
    with held(net, masks):
        context_of(splits, Recipe(optimiser=optimiser, learning_rate=rate), epochs=1).fine_tune(net)
    for path, weight in kernels(net).items():
        assert not weight[~masks[path]].any(), path
        assert not torch.equal(weight[masks[path]], trained.get_parameter(f"{path}.weight")[masks[path]]), path
    context_of(splits, epochs=0.5).fine_tune(net)
    assert any(weight[~masks[path]].any() for path, weight in kernels(net).items()), "no mask outlives its block"


def test_the_smallest_go() -> None:
    weight = torch.tensor([[0.5, -0.1, 0.0], [-2.0, 0.2, 0.0]])
    assert smallest(weight, 3).tolist() == [[True, False, False], [True, True, False]]
    assert smallest(weight, 6).sum() == 4, "what is zero already is not kept"


class TwoPaths(nn.Module):
    """One layer that answers and one that nobody asks."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Conv2d(1, 10, 28), nn.Conv2d(1, 10, 28)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x).flatten(1)


def test_sensitivity_is_what_pruning_a_layer_alone_does(splits: Splits) -> None:
    torch.manual_seed(0)
    net, batches = TwoPaths(), list(calibration(context_of(splits), 64, 48))
    assert [len(x) for x in batches] == [48, 16]
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    found = sensitivity(net, batches, SHARES)
    assert found["unused"] == [0.0] * len(SHARES)
    assert found["used"][0] == pytest.approx(0.0, abs=1e-9)
    assert found["used"][-1] > found["used"][1] > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_layers_that_bear_it_lose_more() -> None:
    sizes, shares = {"tough": 1000, "tender": 1000}, (1.0, 0.5, 0.25)
    damages = {"tough": [0.0, 0.01, 0.05], "tender": [0.0, 0.5, 1.0]}
    assert allot(damages, sizes, shares, 1300) == {"tough": 300, "tender": 1000}
    assert allot(damages, sizes, shares, 2000) == sizes
    assert sum(allot(damages, sizes, shares, 777).values()) == 777
    with pytest.raises(FlyweightError, match="500 are at the least, not 499"):
        allot(damages, sizes, shares, 499)


def test_a_network_is_sparsified(trained: Net, splits: Splits, tmp_path: Path) -> None:
    context = context_of(splits, epochs=3)
    context.records = Records(tmp_path, lambda: 0.0)
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    sparse = Sparsify(0.2, rounds=2, pictures=64)(trained, context)
    assert all(torch.equal(before[name], tensor) for name, tensor in trained.state_dict().items())
    weights = kernels(sparse).values()
    left = sum(int(weight.count_nonzero()) for weight in weights) / sum(weight.numel() for weight in weights)
    assert left == pytest.approx(0.2, abs=1e-3)
    assert context.accuracy(sparse) > context.accuracy(trained) - 0.15
    rounds = context.records.all("sparsified")
    assert [round(each["density"], 3) for each in rounds] == [0.447, 0.2]
    assert rounds[0]["layers"].keys() == kernels(trained).keys()
    assert len(set(rounds[1]["layers"].values())) > 1, "layers differ"


@pytest.mark.parametrize("settings", [{"density": 0.0}, {"density": 1.0}, {"density": 0.5, "rounds": 0}])
def test_settings_that_mean_nothing(settings: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Sparsify(**settings)  # type: ignore[arg-type]
