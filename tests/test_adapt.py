"""Changes to a built network that leave its answers as they are."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from flyweight.adapt import normalise_features
from flyweight.create import create_model
from flyweight.preprocess import Preprocess
from flyweight.search.donor import open_donor
from flyweight.weights import net_bytes

SIDE = 64


WITHOUT_NORMS = [("squeezenet1_0", {}), ("squeezenet1_1", {"bypass": "simple"}), ("nin", {}), ("alexnet", {})]


@pytest.mark.parametrize(("name", "args"), WITHOUT_NORMS)
def test_features_without_norms_are_divided_exactly(name: str, args: dict[str, str]) -> None:
    torch.manual_seed(0)
    net = create_model(name, num_classes=7, **args).double().eval()
    for leaf in net.modules():
        if isinstance(leaf, nn.Conv2d | nn.Linear):
            nn.init.normal_(leaf.get_parameter("bias"))
    x = 255 * torch.rand(4, 3, SIDE, SIDE, dtype=torch.float64)
    before = net.forward_head(net.forward_features(x), pre_logits=True)
    scale = normalise_features(net, x)
    after = net.forward_head(net.forward_features(x), pre_logits=True)
    assert abs(scale - 1) > 0.05
    torch.testing.assert_close(after * scale, before, rtol=1e-10, atol=1e-10)
    assert after.square().mean().item() == pytest.approx(1)


def test_weights_without_norms_say_what_was_divided(tmp_path: Path) -> None:
    file = tmp_path / "own.safetensors"
    net = create_model("squeezenet1_1", num_classes=7, width=0.25)
    file.write_bytes(net_bytes(net, Preprocess((SIDE, SIDE), 3, (127.5,) * 3, (60.0,) * 3)))
    pictures = np.random.default_rng(0).integers(0, 256, (4, SIDE, SIDE, 3), np.uint8)
    for classes, divided in ((3, True), (7, False)):  # a classifier that is kept knows the scale
        _, changes = open_donor(file).into(create_model("squeezenet1_1", num_classes=classes, width=0.25), pictures)
        assert any("divided by" in change for change in changes) is divided


@pytest.mark.parametrize("name", ["mobilenet_v2", "squeezenet1_1_batch"])
def test_others_stay_as_they_are(name: str) -> None:
    args = {"norm": "batch"} if name.endswith("_batch") else {}
    net = create_model(name.removesuffix("_batch"), num_classes=7, **args).eval()
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    assert normalise_features(net, 255 * torch.rand(2, 3, SIDE, SIDE)) == 1
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
