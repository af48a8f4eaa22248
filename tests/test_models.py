"""Every registered model: exact counts, one contract, gradients, known leaves, the same after saving and after export.

The conformance tests run at a small width and input; `make test-all` repeats them at full size.
"""

import copy
import functools
import itertools
import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flyweight import zoo
from flyweight.bench.engines import onnxruntime as engine
from flyweight.blocks import SqueezeExcite
from flyweight.costs import MACS, cost
from flyweight.create import create_model
from flyweight.data import open_source, prepare
from flyweight.data.dataset import Dataset
from flyweight.errors import UsageError
from flyweight.export import onnx
from flyweight.graph import GraphError, trace
from flyweight.net import FeatureNet, Net, Spec
from flyweight.ops import SameAvgPool2d, SameConv2d, SameMaxPool2d
from flyweight.preprocess import Preprocess
from flyweight.train.loop import Clock, Training, train
from flyweight.train.recipe import Recipe
from flyweight.transfer import adopt
from flyweight.weights import load_net, net_bytes
from flyweight.zoo import list_models, smallest_input, spec_of
from scripts.golden import GOLDEN, counts

MODELS = list_models()
FAMILIES = sorted(zoo.families())
# Families with shortcuts, and the MobileNets: squeeze-and-excitation and dilation are options of theirs.
EXCITED = {
    "aligned_xception", "inception_resnet", "mobilenet_v1", "mobilenet_v2", "mobilenet_v3", "resnet", "resnext",
    "senet", "shufflenet_v1", "shufflenet_v2", "xception",
}  # fmt: skip
DILATED = [
    "aligned_xception", "aligned_xception_41", "mobilenet_v1", "mobilenet_v2", "mobilenet_v3_large", "resnet18",
    "resnet50", "resnext50_32x4d", "se_resnet50", "xception",
]  # fmt: skip


def lively(net: Net) -> Net:
    """Gives the net weights, batch statistics and answers that are not trivial, as after training."""
    for leaf in net.modules():
        if isinstance(leaf, nn.Conv2d):
            nn.init.kaiming_uniform_(leaf.weight)
        if isinstance(leaf, nn.BatchNorm2d):
            leaf.momentum = 1.0
            nn.init.uniform_(leaf.weight, 0.5, 1.5)
            nn.init.uniform_(leaf.bias, -0.2, 0.2)
        if isinstance(leaf, nn.Linear):
            nn.init.normal_(leaf.weight, std=leaf.in_features**-0.5)
    with torch.no_grad():
        net.train().forward_aux(torch.randn(4, *net.spec.input))
    return net.eval()


def small(name: str, **args: object) -> Net:
    """The model at a small width and about the smallest input, five classes, without dropout."""
    torch.manual_seed(0)
    spec = spec_of(name, **args)  # type: ignore[arg-type]
    side = max(smallest_input(spec), min(64, spec.input[1]))
    return lively(create_model(name, num_classes=5, width=0.125, size=side, drop_rate=0.0, **args))  # type: ignore[arg-type]


def full(name: str) -> Net:
    """The model as it is registered, but without dropout."""
    torch.manual_seed(0)
    return lively(create_model(name, drop_rate=0.0))


FORMS = [
    pytest.param((name, form), id=f"{name}-{form.__name__}", marks=[pytest.mark.full] if form is full else [])
    for name, form in itertools.product(MODELS, (small, full))
]


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[int]:
    """One for small networks, which are slower on two, and much slower where something else runs."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    yield usual
    torch.set_num_threads(usual)


@pytest.fixture(scope="module", params=FORMS)
def net(request: pytest.FixtureRequest, threads: int) -> Iterator[Net]:
    """Each model once: tests that change it change a copy."""
    name, form = request.param
    torch.set_num_threads(threads if form is full else 1)
    yield form(name)
    torch.set_num_threads(1)


def picture(net: Net, n: int = 2) -> torch.Tensor:
    return torch.randn(n, *net.spec.input, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_counts_are_golden(name: str) -> None:
    assert counts(name) == json.loads(GOLDEN.read_text(encoding="utf-8"))[name]


@pytest.mark.parametrize(
    ("name", "args", "params", "macs"),
    [
        ("mobilenet_v1_cifar", {}, 2_142_026, 29_282_304),
        ("resnet20_cifar", {}, 269_722, 40_551_040),
        ("resnet20_cifar", {"shortcut": "projection"}, 272_474, 40_813_184),
        ("shufflenet_v1_g2_cifar", {}, 887_582, 39_614_080),
        ("shufflenet_v1_g3_cifar", {}, 862_768, 38_605_056),
        ("nin_cifar", {}, 966_986, None),
    ],
)
def test_small_forms_equal_the_reference(name: str, args: dict, params: int, macs: int | None) -> None:
    counted = cost(name, num_classes=10, **args)
    assert counted.params == params
    assert macs is None or counted.macs == macs


@pytest.mark.parametrize(
    ("name", "args", "params"),
    [
        ("googlenet", {}, 13_004_888),
        ("inception_v3", {}, 27_161_264),
        ("aligned_xception", {"num_classes": 0}, 37_867_312),
        ("squeezenet1_0", {"bypass": "complex"}, 1_589_672),
        ("squeezenet1_0", {"bypass": "simple"}, 1_248_424),
    ],
)
def test_forms_have_their_published_parameters(name: str, args: dict, params: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in create_model(name, **args).parameters()) == params


@pytest.mark.parametrize(
    ("args", "mebibytes"),
    [
        ({"squeeze_ratio": 0.75}, 18.5),
        ({"squeeze_ratio": 0.5, "pct_3x3": 0.01}, 5.6),
        ({"squeeze_ratio": 0.5, "pct_3x3": 0.5}, 13.0),
        ({"squeeze_ratio": 0.5, "pct_3x3": 0.99}, 20.3),
    ],
)
def test_squeezenets_design_space_has_the_papers_sizes(args: dict, mebibytes: float) -> None:
    assert round(4 * cost("squeezenet1_0", **args).params / 2**20, 1) == mebibytes


def test_layers_sum_to_the_parameters_of_the_net(net: Net) -> None:
    aux = sum(p.numel() for p in net.aux.parameters())
    assert cost(net).params == sum(p.numel() for p in net.parameters()) - aux


def test_every_parameter_gets_a_gradient(net: Net) -> None:
    learner = copy.deepcopy(net).train()
    logits, aux = learner.forward_aux(picture(net, 4))
    torch.stack([each.square().sum() for each in (logits, *aux)]).sum().backward()
    without = [path for path, p in learner.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A ReLU before the classes may be silent for a whole class by chance, but not for all.
    assert [path for path in without if not path.startswith("head.")] == []


def test_leaves_are_known_and_shapes_are_those_of_a_run(net: Net) -> None:
    graph = trace(net, net.spec.input)
    assert {type(node.leaf) for node in graph.nodes} <= set(MACS)
    seen: dict[str, tuple[int, ...]] = {}
    hooks = [
        node.leaf.register_forward_hook(
            lambda leaf, args, out, path=node.path: seen.__setitem__(path, tuple(out.shape[1:]))
        )
        for node in graph.nodes
    ]
    net(torch.zeros(1, *graph.input_shape))
    for hook in hooks:
        hook.remove()
    assert seen == {node.path: node.shape for node in graph.nodes}


def test_features_come_at_each_stride(net: Net) -> None:
    features = FeatureNet(copy.deepcopy(net)).eval()
    info = features.feature_info
    strides = {field.stride for field in trace(net.features, net.spec.input).fields.values()}
    assert info.reduction() == sorted(strides - ({1} - set(info.reduction())))
    x = picture(net)
    maps = features(x)
    assert [each.shape[1] for each in maps] == info.channels()
    for each, name in zip(maps, info.module_name(), strict=True):
        taken: list[torch.Tensor] = []
        hook = net.get_submodule(name).register_forward_hook(
            lambda leaf, args, out, taken=taken: taken.append(out.clone())
        )
        net(x)
        hook.remove()
        assert torch.equal(each, taken[0])
    last = FeatureNet(copy.deepcopy(net), out_indices=1).eval()
    assert torch.equal(last(x)[0], maps[-1])
    chosen = FeatureNet(copy.deepcopy(net), out_indices=(0, -1)).eval()
    assert [torch.equal(a, b) for a, b in zip(chosen(x), (maps[0], maps[-1]), strict=True)] == [True, True]


def test_the_head_is_timms(net: Net) -> None:
    x = picture(net)
    features = net.forward_features(x)
    assert features.shape[1] == net.num_features
    assert torch.equal(net.forward_head(features), net(x))
    assert net.forward_head(features, pre_logits=True).shape == (2, net.head_hidden_size)
    assert net.get_classifier() is net.get_submodule(net.pretrained_cfg["classifier"])
    assert net.get_submodule(net.pretrained_cfg["first_conv"]).get_parameter("weight").shape[1] == net.spec.input[0]
    assert tuple(features.shape[2:]) == tuple(net.pretrained_cfg["pool_size"])


def test_the_classifier_can_be_reset(net: Net) -> None:
    other, x = copy.deepcopy(net), picture(net)
    features = other.forward_features(x)
    other.reset_classifier(7)
    assert other(x).shape == (2, 7)
    assert other.num_classes == 7
    assert torch.equal(other.forward_features(x), features)
    other.reset_classifier(0)
    assert other(x).shape == (2, net.head_hidden_size)
    other.reset_classifier(0, "")
    assert torch.equal(other(x), features)
    with pytest.raises(UsageError, match="no classifier takes"):
        other.reset_classifier(3, "")


def test_saved_and_loaded_it_answers_the_same(net: Net, tmp_path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(net_bytes(net))
    again = load_net(path)
    x = picture(net)
    assert again.spec == Spec.from_json(json.loads(json.dumps(net.spec.to_json())))
    assert torch.equal(net(x), again(x))


def exported_as_computed(net: Net) -> None:
    """The ONNX file answers as the network does, on dark, dim and bright noise."""
    channels, height, width = net.spec.input
    preprocess = Preprocess((height, width), channels, (120.0,) * channels, (60.0,) * channels)
    noise = np.random.default_rng(0).integers(0, 256, (3, height, width, channels))
    pixels = (noise * np.array([0.2, 0.6, 1.0]).reshape(3, 1, 1, 1)).astype(np.uint8)
    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2).double() - 120) / 60
    with torch.no_grad():  # in float64: torch's own float32 is up to 1e-4 off in these nets
        outputs, rounded = copy.deepcopy(net).double()(x), net(x.float())
    # Untrained logits can be so far apart that every picture gets the same certain answer.
    spread = outputs.std().item()
    expected = torch.softmax(outputs / spread, dim=1).numpy()
    model = onnx.export(net, preprocess, [str(i) for i in range(outputs.shape[1])], temperature=spread)
    assert np.abs(expected - expected.mean(axis=0)).max() > 1e-3 / outputs.shape[1], (
        "answers must depend on the picture"
    )
    own = np.abs(torch.softmax(rounded / spread, dim=1).numpy() - expected).max()
    np.testing.assert_allclose(engine.load(model.SerializeToString(), 1)(pixels), expected, atol=max(1e-4, 4 * own))


def test_exported_it_answers_the_same(net: Net) -> None:
    exported_as_computed(net)


@functools.cache
def pictures(side: int) -> Dataset:
    """Sixteen real pictures, grey."""
    return prepare(open_source("demo"), [side]).validation.subset(np.arange(16))


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_real_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flyweight.train.loop.set_threads", lambda: None)  # stays with the one thread of these tests
    torch.manual_seed(0)
    side = max(smallest_input(spec_of(name)), 28)
    net = create_model(name, num_classes=10, in_chans=1, width=0.125, size=side)
    before = {path: p.detach().clone() for path, p in net.named_parameters()}
    preprocess = Preprocess((side, side), 1, (72.0,), (90.0,))
    data = pictures(side)
    job = Training(
        net, data, data, preprocess, Recipe(batch_size=4, learning_rate=0.01), Clock(epochs=1), mode="float32"
    )
    done = train(job)
    assert done.steps == 4  # as often as the averaged weights are renewed
    assert np.isfinite(done.loss)
    moved = [path for path, p in net.named_parameters() if not torch.equal(p, before[path])]
    assert len(moved) > 0.9 * len(before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "option", [{"act": "silu"}, {"norm": "group"}, {"norm": "batch", "in_chans": 1}, {"se": 0.25}, {"se": 4}]
)
def test_options_reach_every_family(family: str, option: dict) -> None:
    name = zoo.families()[family].CANDIDATES["small"][0]
    if "se" in option and family not in EXCITED:
        with pytest.raises(UsageError, match="squeeze-and-excitation"):
            small(name, stem="cifar", **option)
        return
    net = small(name, stem="cifar", **option)
    kinds = {type(leaf) for leaf in net.modules()}
    wanted = {
        "act": nn.SiLU,
        "norm": nn.GroupNorm if option.get("norm") == "group" else nn.BatchNorm2d,
        "se": SqueezeExcite,
    }
    assert all(wanted[key] in kinds for key in option if key in wanted)
    exported_as_computed(net)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", [24, 32])
def test_every_family_has_a_form_for_small_pictures(family: str, side: int) -> None:
    for name in zoo.families()[family].CANDIDATES["small"]:
        for width in zoo.families()[family].WIDTHS:
            counted = cost(name, stem="cifar", width=width, size=side, num_classes=10)
            assert counted.macs > 0


@pytest.mark.parametrize("name", DILATED)
@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilation_computes_the_same_at_more_positions(name: str, output_stride: int) -> None:
    side = 1 + 32 * (2 if smallest_input(spec_of(name)) <= 65 else 4)
    torch.manual_seed(0)
    args = {"size": side, "width": 0.125, "se": 0.0}
    strided = lively(create_model(name, drop_rate=0.0, **args)).double()
    dense = create_model(name, output_stride=output_stride, **args).eval().double()
    dense.load_state_dict(strided.state_dict())
    x = picture(strided, 1).double()
    few, many = strided.forward_features(x), dense.forward_features(x)
    step = strided.feature_info.reduction()[-1] // output_stride
    assert many.shape[2] > few.shape[2]
    sampled = many[..., ::step, ::step][..., : few.shape[2], : few.shape[3]]
    torch.testing.assert_close(sampled, few, rtol=0, atol=1e-12 * few.abs().max().item())
    info = FeatureNet(dense).feature_info
    assert info.reduction() == [min(each, output_stride) for each in strided.feature_info.reduction()]
    assert info.channels() == strided.feature_info.channels()


def test_deeplabs_backbone_gives_low_and_deep_features() -> None:
    with torch.device("meta"):
        net = create_model("aligned_xception", features_only=True, out_indices=(1, -1), output_stride=16, size=512)
        low, deep = net(torch.empty(1, 3, 512, 512))
    assert (low.shape, deep.shape) == ((1, 128, 128, 128), (1, 2048, 32, 32))
    assert cost(net).params == 37_867_312


@pytest.mark.parametrize("size", [6, 7, 8, 9])
@pytest.mark.parametrize("kernel", [2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_same_padding_is_tensorflows(size: int, kernel: int, stride: int) -> None:
    x = torch.randn(1, 2, size, size)
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    padded = F.pad(x, (total // 2, total - total // 2) * 2)
    conv = SameConv2d(2, 3, kernel, stride)
    torch.testing.assert_close(conv(x), F.conv2d(padded, conv.weight, conv.bias, stride))
    lowest = F.pad(x, (total // 2, total - total // 2) * 2, value=-1e9)
    torch.testing.assert_close(SameMaxPool2d(kernel, stride)(x), F.max_pool2d(lowest, kernel, stride))
    counted = F.avg_pool2d(F.pad(torch.ones_like(x), (total // 2, total - total // 2) * 2), kernel, stride)
    torch.testing.assert_close(SameAvgPool2d(kernel, stride)(x), F.avg_pool2d(padded, kernel, stride) / counted)
    assert conv(x).shape[2] == -(-size // stride)


@pytest.mark.parametrize("family", FAMILIES)
def test_same_padding_is_an_option_of_every_family(family: str) -> None:
    name = zoo.families()[family].CANDIDATES["large"][0]
    plain, same = small(name), small(name, padding="same")
    assert same.spec.args["padding"] == "same"
    assert {path: p.shape for path, p in same.named_parameters()} == {
        path: p.shape for path, p in plain.named_parameters()
    }
    assert not any(type(leaf) is nn.Conv2d and any(leaf.padding) for leaf in same.features.modules())
    exported_as_computed(same)


def test_a_skip_reads_the_input_before_its_relu() -> None:
    net = small("aligned_xception").double()
    block = net.features.get_submodule("block5")
    x = torch.randn(1, net.feature_info.channels()[3], 6, 6).double()
    kept = x.clone()
    out = block(x)
    assert torch.equal(x, kept), "the block must not change its input"
    torch.testing.assert_close(out, block.get_submodule("body")(kept) + kept)


def test_features_beyond_those_there_are_refused() -> None:
    with pytest.raises(UsageError, match="beyond the 5 features"):
        create_model("resnet18", features_only=True, out_indices=(7,))


def test_an_input_that_is_too_small_is_refused_by_layer() -> None:
    least = smallest_input(spec_of("squeezenet1_0"))
    assert cost("squeezenet1_0", size=least).macs > 0
    with pytest.raises(GraphError, match=r"features\.pool"):
        cost("squeezenet1_0", size=least - 1)


def test_weights_of_another_net_are_refused_by_tensor(tmp_path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(net_bytes(small("mobilenet_v1")))
    with pytest.raises(UsageError, match=r"features.block1.* there or is missing: channels can be taken away"):
        create_model("mobilenet_v1", pretrained=path, width=0.25)
    with pytest.raises(UsageError, match="no weights of airbench94 are published"):
        create_model("airbench94", pretrained=True)


def test_a_file_of_weights_fills_a_model(tmp_path) -> None:
    path, net = tmp_path / "model.safetensors", small("resnet18")
    path.write_bytes(net_bytes(net))
    again = create_model("resnet18", pretrained=path, width=0.125, num_classes=5).eval()
    assert torch.equal(again(picture(net)), net(picture(net)))


def test_a_name_claimed_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    zoo.variants.cache_clear()
    monkeypatch.setitem(zoo.families()["squeezenet"].VARIANTS, "resnet18", {})
    with pytest.raises(ValueError, match="resnet18 is claimed by"):
        zoo.variants()
    monkeypatch.undo()
    zoo.variants.cache_clear()


@pytest.mark.parametrize(
    ("name", "args", "told"),
    [
        ("squeezenet", {}, "squeezenet1_1"),
        ("resnet18", {"deep": 3}, "takes no 'deep'; its own arguments: layers"),
        ("resnet18", {"stem": "none"}, "resnet has no form 'none'"),
        ("resnet18", {"act": "tanh"}, "act is one of relu"),
        ("resnet18", {"width": 0}, "width is a number from 0.01 on, not 0"),
        ("resnet18", {"output_stride": 3}, "output_stride is 1, 2, 4"),
        ("squeezenet1_0", {"bypass": "half"}, "bypass is one of none, simple, complex"),
        ("resnet18", {"size": 0}, "0 x 0 pixels"),
    ],
)
def test_what_cannot_be_built_is_told_in_a_sentence(name: str, args: dict, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        create_model(name, **args)


def stds(net: nn.Module) -> list[tuple[nn.Conv2d | nn.Linear, float]]:
    """Each large layer with the standard deviation of its weights."""
    layers = [leaf for leaf in net.modules() if isinstance(leaf, nn.Conv2d | nn.Linear) and leaf.weight.numel() > 4000]
    return [(leaf, leaf.weight.std().item()) for leaf in layers]


def fan_out_std(leaf: nn.Module, per_group: bool) -> float:
    """√(2 / (k² · C_out)), with `per_group` of one group's outputs."""
    assert isinstance(leaf, nn.Conv2d)
    groups = leaf.groups if per_group else 1
    return (2 * groups / (leaf.kernel_size[0] * leaf.kernel_size[1] * leaf.out_channels)) ** 0.5


@pytest.mark.parametrize("name", ["aligned_xception", "resnet18", "xception", "mobilenet_v3_large"])
def test_convolutions_start_by_their_fan_out(name: str) -> None:
    torch.manual_seed(0)
    for leaf, std in stds(create_model(name, width=0.5, num_classes=0).features):
        assert std == pytest.approx(fan_out_std(leaf, per_group=False), rel=0.06)


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2"])
def test_mobilenets_start_by_the_fan_out_of_a_group(name: str) -> None:
    torch.manual_seed(0)
    layers = [(leaf, std) for leaf, std in stds(create_model(name)) if isinstance(leaf, nn.Conv2d)]
    assert any(leaf.groups > 1 for leaf, _ in layers)
    for leaf, std in layers:
        assert std == pytest.approx(fan_out_std(leaf, per_group=True), rel=0.06)


@pytest.mark.parametrize("name", ["squeezenet1_0", "squeezenet1_1", "nin"])
def test_networks_from_caffe_start_uniform(name: str) -> None:
    torch.manual_seed(0)
    net = create_model(name)
    last = net.get_classifier()
    for leaf, std in stds(net.features):
        assert isinstance(leaf, nn.Conv2d)
        bound = (6 / (leaf.kernel_size[0] * leaf.kernel_size[1] * leaf.in_channels)) ** 0.5
        assert leaf.weight.abs().max() <= bound
        assert std == pytest.approx(bound / 3**0.5, rel=0.06)
    assert isinstance(last, nn.Conv2d)
    assert last.weight.std().item() == pytest.approx(0.01, rel=0.06)
    biases = [p for path, p in net.named_parameters() if path.endswith("bias")]
    assert biases
    assert all(not p.any() for p in biases)


@pytest.mark.parametrize(("name", "std"), [("googlenet", 0.01), ("inception_v3", 0.1)])
def test_inceptions_start_with_one_deviation(name: str, std: float) -> None:
    torch.manual_seed(0)
    assert {round(found, 2) for _, found in stds(create_model(name, width=0.5, aux=False))} == {std}


@pytest.mark.parametrize("name", ["alexnet", "shufflenet_v2", "inception_v4"])
def test_others_start_as_torch_leaves_it(name: str) -> None:
    torch.manual_seed(0)
    for leaf, std in stds(create_model(name, width=0.5)):
        fan_in = leaf.weight[0].numel()
        assert std == pytest.approx((3 * fan_in) ** -0.5, rel=0.06)


def test_weights_for_other_classes_and_channels_are_kept_where_they_fit(tmp_path) -> None:
    path, net = tmp_path / "model.safetensors", small("mobilenet_v1")
    path.write_bytes(net_bytes(net))
    again = create_model("mobilenet_v1", width=0.125, num_classes=7, in_chans=1)
    before = again.get_classifier().get_parameter("weight").detach().clone()
    told = adopt(again, load_net(path))
    assert told == [
        "the classifier for 5 classes was dropped, that for 7 is untrained",
        "the first convolution's kernels were summed for grey",
    ]
    assert torch.equal(again.get_classifier().get_parameter("weight"), before)
    kept = [name for name, t in again.state_dict().items() if torch.equal(t, net.state_dict().get(name, t - 1))]
    assert len(kept) == len(net.state_dict()) - 3
    grey = torch.randn(2, 1, 64, 64)
    ours, theirs = again.eval().forward_features(grey), net.forward_features(grey.expand(2, 3, 64, 64))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    with pytest.raises(UsageError, match=r"features\.block1.* has another shape there"):
        adopt(create_model("mobilenet_v1", width=0.25), load_net(path))
