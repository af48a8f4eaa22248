"""Every registered model: exact counts, gradients, known leaves, the same after saving and after export."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from flyweight import zoo
from flyweight.bench.engines import onnxruntime as engine
from flyweight.costs import MACS, cost
from flyweight.create import create_model, list_models, spec_of
from flyweight.errors import UsageError
from flyweight.export import onnx
from flyweight.graph import trace
from flyweight.net import Net, Spec
from flyweight.preprocess import Preprocess
from flyweight.weights import load_net, net_bytes
from scripts.golden import GOLDEN, counts

MODELS = list_models()
# Published or counted by the reference implementations: torchvision, timm, pytorchcv.
REFERENCE_PARAMS = {
    "mobilenet_v1": 4_231_976,
    "squeezenet1_1": 1_235_496,
    "shufflenet_v1_g1": 1_531_936,
    "shufflenet_v1_g2": 1_733_848,
    "shufflenet_v1_g3": 1_865_728,
    "shufflenet_v1_g4": 1_968_344,
    "shufflenet_v1_g8": 2_434_768,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
}


def small(name: str) -> Net:
    """The model at a small width and input, with batch statistics and answers that are not trivial."""
    torch.manual_seed(0)
    size = 32 if spec_of(name).input[1] <= 32 else 64
    net = create_model(name, num_classes=5, width=0.25, size=size, drop_rate=0.0)
    for leaf in net.modules():
        if isinstance(leaf, nn.BatchNorm2d):
            nn.init.uniform_(leaf.running_mean, -0.2, 0.2)
            nn.init.uniform_(leaf.running_var, 0.5, 2.0)
            nn.init.uniform_(leaf.weight, 0.5, 1.5)
            nn.init.uniform_(leaf.bias, -0.2, 0.2)
        if isinstance(leaf, nn.Linear):
            nn.init.normal_(leaf.weight, std=0.5)
    return net.eval()


@pytest.mark.parametrize("name", MODELS)
def test_counts_are_golden(name: str) -> None:
    assert counts(name) == json.loads(GOLDEN.read_text(encoding="utf-8"))[name]


@pytest.mark.parametrize(("name", "params"), REFERENCE_PARAMS.items())
def test_params_equal_the_reference(name: str, params: int) -> None:
    assert cost(name).params == params


@pytest.mark.parametrize(
    ("name", "params", "macs"), [("mobilenet_v1_cifar", 2_142_026, 29_282_304), ("resnet20_cifar", 272_474, 40_813_184)]
)
def test_small_forms_equal_the_reference(name: str, params: int, macs: int) -> None:
    counted = cost(name, num_classes=10)
    assert (counted.params, counted.macs) == (params, macs)


@pytest.mark.parametrize("name", MODELS)
def test_layers_sum_to_the_parameters_of_the_net(name: str) -> None:
    net = small(name)
    assert cost(net).params == sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    net = small(name).train()
    x = torch.randn(4, *net.spec.input)  # type: ignore[union-attr]
    net(x).square().sum().backward()
    without = [path for path, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A ReLU before the classes may be silent for a whole class by chance, but not for all.
    assert [path for path in without if not path.startswith("head.")] == []


@pytest.mark.parametrize("name", MODELS)
def test_leaves_are_known_and_shapes_are_those_of_a_run(name: str) -> None:
    net = small(name)
    graph = trace(net, net.spec.input)  # type: ignore[union-attr]
    assert {type(node.leaf) for node in graph.nodes} <= set(MACS)
    seen: dict[str, tuple[int, ...]] = {}
    for node in graph.nodes:
        node.leaf.register_forward_hook(
            lambda leaf, args, out, path=node.path: seen.__setitem__(path, tuple(out.shape[1:]))
        )
    net(torch.zeros(1, *graph.input_shape))
    assert seen == {node.path: node.shape for node in graph.nodes}


@pytest.mark.parametrize("name", MODELS)
def test_saved_and_loaded_it_answers_the_same(name: str, tmp_path) -> None:
    net = small(name)
    (tmp_path / "model.safetensors").write_bytes(net_bytes(net))
    again = load_net(tmp_path / "model.safetensors")
    x = torch.randn(2, *net.spec.input)  # type: ignore[union-attr]
    assert again.spec == Spec.from_json(json.loads(json.dumps(net.spec.to_json())))  # type: ignore[union-attr]
    assert torch.equal(net(x), again(x))


@pytest.mark.parametrize("name", MODELS)
def test_exported_it_answers_the_same(name: str) -> None:
    net = small(name)
    channels, height, width = net.spec.input  # type: ignore[union-attr]
    preprocess = Preprocess((height, width), channels, (120.0,) * 3, (60.0,) * 3)
    noise = np.random.default_rng(0).integers(0, 256, (3, height, width, channels))
    pixels = (noise * np.array([0.2, 0.6, 1.0]).reshape(3, 1, 1, 1)).astype(np.uint8)  # dark, dim, bright
    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() - 120) / 60
    with torch.no_grad():
        outputs = net(x)
    spread = (
        outputs.std().item()
    )  # untrained logits can be so far apart that every picture gets the same certain answer
    expected = torch.softmax(outputs / spread, dim=1).numpy()
    model = onnx.export(net, preprocess, list("abcde"), temperature=spread)
    assert np.abs(expected - expected.mean(axis=0)).max() > 1e-4, "the answers must depend on the picture"
    np.testing.assert_allclose(engine.load(model.SerializeToString(), 1)(pixels), expected, atol=2e-5)


def test_a_name_claimed_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    zoo.variants.cache_clear()
    monkeypatch.setitem(zoo.families()["squeezenet"].VARIANTS, "resnet18", {})
    with pytest.raises(ValueError, match="resnet18 is claimed by"):
        zoo.variants()
    monkeypatch.undo()
    zoo.variants.cache_clear()


def test_an_unknown_name_is_answered_with_near_ones() -> None:
    with pytest.raises(UsageError, match="squeezenet1_1"):
        create_model("squeezenet")


def test_arguments_that_a_family_lacks_are_refused() -> None:
    with pytest.raises(UsageError, match="mobilenet_v1 cannot be built"):
        create_model("mobilenet_v1", groups=3)
