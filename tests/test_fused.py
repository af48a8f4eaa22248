"""Fused layers against PyTorch's own: in float32 nearly to the bit, in bfloat16 within its rounding."""

import copy
import logging
import threading
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flyweight import zoo
from flyweight.blocks import Residual
from flyweight.data import open_source
from flyweight.ops import SameConv2d
from flyweight.train import kernels, platform
from flyweight.train.fused import fused
from flyweight.train.platform import faster_precision, precision

ROUGH = 0.02  # of bfloat16's rounding, whose unit is 0.004, in sums and products


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    torch.manual_seed(0)


def results(net: nn.Module, x: Tensor, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Output, gradients and buffers after one step of a copy, plain where `dtype` is None."""
    net, x = copy.deepcopy(net), x.clone().requires_grad_()
    with fused(net, dtype) if dtype else nullcontext():
        out = net(x).float()
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    found = {"out": out.detach(), "x": x.grad}
    found |= {name: p.grad for name, p in net.named_parameters()} | dict(net.named_buffers())
    return {name: t.float() for name, t in found.items() if t is not None}


def distance(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm().clamp(min=1e-6)).item()


def assert_alike(net: nn.Module, x: Tensor, rough: float = ROUGH) -> None:
    """In float32 within 1e-4, in bfloat16 within `rough`, of the plain network."""
    wanted = results(net, x, None)
    for dtype, most in ((torch.float32, 1e-4), (torch.bfloat16, rough)):
        found = results(net, x, dtype)
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert distance(found[name], tensor) <= most, f"{name} in {dtype}"


# Channels, height, width, and the convolution's kernel, stride, padding and dilation.
DEPTHWISE = [
    (16, 8, 8, 3, 1, 1, 1),
    (2, 6, 5, 3, 1, 1, 1),
    (7, 5, 9, 3, 1, 1, 1),
    (33, 8, 8, 3, 1, 1, 1),
    (54, 9, 7, 3, 2, 1, 1),
    (32, 8, 8, 3, 2, 1, 1),
    (17, 1, 1, 3, 2, 1, 1),
    (48, 8, 8, 3, 1, 0, 1),
    (40, 9, 9, 3, 1, 2, 2),
    (24, 8, 8, 5, 2, 2, 1),
    (5, 11, 7, 7, 1, 3, 1),
]


@pytest.mark.parametrize("case", DEPTHWISE, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_depthwise(case: tuple[int, ...], batch: int) -> None:
    c, height, width, kernel, stride, padding, gap = case
    conv = nn.Conv2d(c, c, kernel, stride, padding, gap, groups=c, bias=c == 7)
    assert_alike(conv, torch.randn(batch, c, height, width))


@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize("groups", [20, 1])
def test_padding_of_tensorflow(size: int, groups: int) -> None:
    assert_alike(SameConv2d(20, 20, 3, 2, groups=groups), torch.randn(2, 20, size, size))


# Input and output channels, groups, kernel, stride.
CONVOLUTIONS = [
    (24, 54, 1, 1, 1),
    (3, 16, 1, 1, 1),
    (60, 240, 3, 1, 1),
    (240, 60, 3, 1, 1),
    (12, 6, 3, 1, 1),
    (9, 6, 3, 1, 1),
    (16, 32, 1, 1, 2),
    (12, 24, 3, 1, 2),
    (3, 20, 1, 3, 1),
    (64, 64, 16, 3, 1),
    (24, 24, 6, 3, 2),
    (12, 24, 12, 3, 1),
]


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("batch", [1, 5])
def test_convolutions(case: tuple[int, ...], batch: int) -> None:
    channels, out, groups, kernel, stride = case
    conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups)
    assert_alike(conv, torch.randn(batch, channels, 7, 6))


def norm(channels: int, momentum: float = 0.1) -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(channels, momentum=momentum)
    nn.init.uniform_(made.weight, 0.5, 1.5)
    nn.init.normal_(made.bias)
    made.running_mean.normal_()  # type: ignore[union-attr]
    made.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return made


@pytest.mark.parametrize("act", [None, nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(4, 16, 6, 6), (1, 5, 3, 3), (3, 70, 5, 1), (2, 300, 2, 3)], ids=str)
def test_norm_and_activation(act: type[nn.Module] | None, training: bool, shape: tuple[int, ...]) -> None:
    net = nn.Sequential(norm(shape[1], 0.3), *([act(inplace=True)] if act else []))
    # Where rounding moves a value over an activation's edge, its gradient changes: inputs that bfloat16 holds exactly.
    x = (2 + 3 * torch.randn(shape)).bfloat16().float()
    assert_alike(net.train(training), x, rough=0.03)


@pytest.mark.parametrize("act", [None, nn.ReLU, nn.ReLU6, nn.Hardswish])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(4, 16, 6, 6), (1, 33, 5, 4), (2, 7, 3, 3)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_norm_before_depthwise(
    act: type[nn.Module] | None, training: bool, shape: tuple[int, ...], stride: int
) -> None:
    c = shape[1]
    acts = [act(inplace=True)] if act else []
    net = nn.Sequential(norm(c), *acts, nn.Conv2d(c, c, 3, stride, 1, groups=c, bias=False)).train(training)
    assert_alike(net, (2 + 3 * torch.randn(shape)).bfloat16().float(), rough=0.05)
    with fused(net):
        last = net(torch.randn(shape)).grad_fn
        assert last is not None
        assert last.name() == "_NormDepthwiseBackward"
        assert net[0](torch.randn(shape)).shape == shape, "a member alone computes its own part"


def test_who_listens_is_called() -> None:
    net, heard = nn.Sequential(norm(8), nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)), []
    net[0].register_forward_hook(lambda module, inputs, output: heard.append(output.shape))
    with fused(net):
        net(torch.randn(2, 8, 4, 4))
    assert heard == [(2, 8, 4, 4)]


def test_one_value_has_no_statistics() -> None:
    net = norm(4)
    with fused(net), pytest.raises(ValueError, match="more than 1 value per channel"):
        net(torch.randn(1, 4, 1, 1))
    assert net.num_batches_tracked == 0


def test_threads_share_the_work() -> None:
    net = zoo.build(zoo.spec_of("shufflenet_v1_g3_cifar", width=0.5, num_classes=10, size=16)).eval()
    x, threads = torch.randn(5, 3, 16, 16), torch.get_num_threads()
    one = results(net, x, torch.float32)
    try:
        torch.set_num_threads(3)
        three = results(net, x, torch.float32)
    finally:
        torch.set_num_threads(threads)
    assert all(distance(three[name], one[name]) < 1e-4 for name in one)


def test_statistics_of_large_means() -> None:
    net = nn.BatchNorm2d(8, momentum=1.0)
    x = 1000 + torch.randn(16, 8, 9, 9)
    found, wanted = results(net, x, torch.float32), results(net, x, None)
    assert found["num_batches_tracked"] == 1
    assert distance(found["running_var"], x.var(dim=(0, 2, 3))) < 1e-4
    assert distance(found["out"], wanted["out"]) < 1e-3


@pytest.mark.parametrize("act", [None, nn.ReLU(inplace=True)])
@pytest.mark.parametrize("training", [True, False])
def test_a_residual_is_one_pass(act: nn.Module | None, training: bool) -> None:
    body = nn.Sequential(nn.Conv2d(20, 20, 1, bias=False), norm(20))
    net = Residual(body, nn.Sequential(nn.Conv2d(20, 20, 1, bias=False), norm(20)), act).train(training)
    assert_alike(net, torch.randn(3, 20, 5, 5), rough=0.06)
    x = torch.randn(3, 20, 5, 5)
    with fused(net):
        last = net(x).grad_fn
        assert last is not None
        assert last.name() == "_NormBackward"
        assert sum(step is not None for step, _ in last.next_functions) == 4, "y, the side, and two parameters"


@pytest.mark.parametrize("family", sorted(zoo.families()))
def test_every_family(family: str) -> None:
    module = zoo.families()[family]
    name = (*module.CANDIDATES["small"], *module.CANDIDATES["large"])[0]
    spec = zoo.spec_of(name, num_classes=5, width=min(module.WIDTHS))
    spec = zoo.spec_of(name, num_classes=5, width=min(module.WIDTHS), size=min(spec.input[1], zoo.smallest_input(spec)))
    net = zoo.build(spec).eval()
    x = torch.randn(3, *spec.input)
    with torch.no_grad():
        wanted = net(x)
        with fused(net, torch.float32):
            exact = net(x)
        with fused(net):
            rough = net(x)
    assert distance(exact, wanted) < 1e-4
    assert distance(rough.float(), wanted) < 0.1
    with fused(net.train()):
        F.cross_entropy(net(x).float(), torch.tensor([0, 1, 2])).backward()
    used = [p.grad for name, p in net.named_parameters() if not name.startswith("aux.")]
    assert all(grad is not None and grad.isfinite().all() for grad in used)
    assert all("forward" not in part.__dict__ for part in net.modules()), "everything is as it was"


@pytest.mark.parametrize("args", [{"norm": "group"}, {"norm": "none"}, {"se": 0.25}, {"act": "silu"}], ids=str)
def test_what_is_not_fused_still_computes(args: dict[str, object]) -> None:
    net = zoo.build(zoo.spec_of("mobilenet_v1_cifar", width=0.25, num_classes=4, size=8, **args)).eval()
    x = torch.randn(4, 3, 8, 8)
    wanted, exact, rough = (results(net, x, dtype) for dtype in (None, torch.float32, torch.bfloat16))
    assert all(distance(exact[name], tensor) < 1e-4 for name, tensor in wanted.items())
    assert distance(rough["out"], wanted["out"]) < 0.1
    # Activations near an edge tip over: through so many layers only the direction is the same.
    directions = [torch.cat([found[name].flatten() for name, _ in net.named_parameters()]) for found in (wanted, rough)]
    assert F.cosine_similarity(*directions, dim=0) > 0.9


def test_dropout_keeps_its_share() -> None:
    net, x = nn.Dropout(0.3), torch.ones(64, 24, 9, 9)
    with fused(net):
        torch.manual_seed(1)
        first = net(x)
        torch.manual_seed(1)
        assert torch.equal(first, net(x))
        assert net.eval()(x) is x
    assert set(first.unique().tolist()) == {0.0, 1 / 0.7} or torch.allclose(first[first > 0], torch.tensor(1 / 0.7))
    assert abs((first > 0).float().mean().item() - 0.7) < 0.01


def test_the_same_bits_again() -> None:
    net = zoo.build(zoo.spec_of("shufflenet_v1_g3_cifar", width=0.5, num_classes=10))
    x = torch.randn(8, 3, 32, 32)
    first, second = results(net, x, torch.bfloat16), results(net, x, torch.bfloat16)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_number_shows(wrong: float) -> None:
    net = zoo.build(zoo.spec_of("mobilenet_v1_cifar", width=0.25, num_classes=10))
    x = torch.randn(4, 3, 32, 32)
    x[1, 2, 3, 4] = wrong
    with fused(net):
        assert not F.cross_entropy(net(x).float(), torch.zeros(4, dtype=torch.long)).isfinite()


def losses(mode: str, seed: int, images: Tensor, labels: Tensor) -> list[float]:
    """Of 60 steps of plain gradient descent with momentum."""
    torch.manual_seed(seed)
    net = zoo.build(zoo.spec_of("mobilenet_v1_cifar", width=0.25, num_classes=10, in_chans=1, size=16)).train()
    optimiser = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    found = []
    with precision(net, mode):
        for _ in range(60):
            chosen = torch.randint(len(images), (32,))
            loss = F.cross_entropy(net(images[chosen]).float(), labels[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            found.append(loss.item())
    return found


def test_it_learns_as_float32_does() -> None:
    """Mean loss of the last 20 of 60 steps over 3 seeds: apart by less than what seeds change."""
    source = open_source("demo")
    pixels = torch.from_numpy(np.asarray(source.images[:2000])).float()
    images = F.avg_pool2d(pixels.view(2000, 1, 28, 28) / 255, 2)
    images, labels = F.pad(images, (1, 1, 1, 1)), torch.from_numpy(source.labels[:2000])
    means = {
        mode: [float(np.mean(losses(mode, seed, images, labels)[-20:])) for seed in range(3)]
        for mode in ("float32", "fused")
    }
    spread = max(np.std(each, ddof=1) for each in means.values())
    assert max(means["fused"]) < 1.5, "it learns"
    assert abs(np.mean(means["fused"]) - np.mean(means["float32"])) < 3 * spread


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("FLYWEIGHT_CACHE", str(tmp_path))
    monkeypatch.setattr(kernels, "library", kernels.library.__wrapped__)  # what it found before does not count
    monkeypatch.setattr(kernels, "missing", kernels.missing.__wrapped__)
    net = nn.Conv2d(3, 4, 1)
    with caplog.at_level(logging.WARNING), precision(net, "fused"):
        assert net(torch.randn(1, 3, 2, 2)).dtype == torch.bfloat16
    assert "there is no C++ compiler (no-such-compiler)" in caplog.text
    assert faster_precision(net, lambda: None) in ("float32", "bfloat16")


def test_two_may_build_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernels, "FLAGS", ["-std=c++17", "-O0", "-fPIC", "-Wno-psabi"])
    place = tmp_path / "kernels" / "made.so"
    command = [kernels._compiler(), *kernels.FLAGS]
    builders = [threading.Thread(target=kernels._build, args=(command, place)) for _ in range(2)]
    for each in builders:
        each.start()
    for each in builders:
        each.join()
    assert [path.name for path in place.parent.iterdir()] == ["made.so"]
    assert kernels.ctypes.CDLL(str(place)).pointwise


def test_a_failed_build_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.cpp"
    wrong.write_text("this is no C++\n", encoding="utf-8")
    monkeypatch.setattr(kernels, "SOURCE", wrong)
    with pytest.raises(kernels.NoKernels, match=r"could not build the training kernels: .*wrong\.cpp:1"):
        kernels._build([kernels._compiler()], tmp_path / "kernels" / "made.so")
    assert not list((tmp_path / "kernels").iterdir())


def test_the_choice_is_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert kernels.missing() is None
    monkeypatch.setenv("FLYWEIGHT_CACHE", str(tmp_path))
    seconds = {"float32": 3.0, "bfloat16": 2.0, "fused": 1.0}
    measured: list[str] = []

    def measure(net: nn.Module, name: str, step: object) -> float:
        measured.append(name)
        return seconds[name]

    monkeypatch.setattr(platform, "_seconds", measure)
    net = nn.Conv2d(3, 4, 1)
    assert faster_precision(net, lambda: None) == "fused"
    assert measured.count("fused") > measured.count("float32") == 1, "what is slow is measured once"
    measured.clear()
    assert faster_precision(net, lambda: None) == "fused"
    assert not measured
