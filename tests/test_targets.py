"""Every export target with one network of each block type; the parity gate with planted faults; what is written."""

import copy
import json
import sys
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from flyweight.bench import engines as bench_engines
from flyweight.bench.engines import engine, engines, lacking, read_export
from flyweight.blocks import Classifier, DepthwiseSeparable, Fire, InvertedResidual, Options, Residual, Row, module
from flyweight.create import create_model
from flyweight.data import Dataset, open_source, prepare
from flyweight.errors import ParityError, UsageError
from flyweight.export import int8
from flyweight.export import targets as export_targets
from flyweight.export.targets import targets
from flyweight.export.task import Task
from flyweight.export.verify import APART, answers, gate
from flyweight.exported import CONTRACT, Exported
from flyweight.exporting import Outcome, Subject, export_run, open_subject, prove
from flyweight.net import Net
from flyweight.ops import GlobalAvgPool
from flyweight.preprocess import Preprocess
from flyweight.run import classifier
from flyweight.train.loop import logits
from flyweight.weights import net_bytes
from flyweight.zoo import shufflenet_v1, shufflenet_v2

SIDE = 64
PLAIN = Options()
SE = Options(act="hardswish", gate="hardsigmoid", se=0.25)
SPLIT: Row = [[(8, 1)], [(8, 1), (8, 3)], [partial(nn.MaxPool2d, 3, 1, 1), (8, 1)]]
# One network of each block type, behind a stem of 16 channels: the block and its output channels.
BLOCKS: dict[str, Callable[[], tuple[nn.Module, int]]] = {
    "convolution": lambda: (PLAIN.conv(16, 24), 24),
    "mlpconv": lambda: (nn.Sequential(PLAIN.conv(16, 24, 5), PLAIN.conv(24, 24, 1), PLAIN.conv(24, 24, 1)), 24),
    "fire": lambda: (Fire(PLAIN, 16, 8, (12, 12)), 24),
    "depthwise separable": lambda: (DepthwiseSeparable(PLAIN, 16, 24, 2), 24),
    "inverted residual": lambda: (Residual(InvertedResidual(PLAIN, 16, 48, 16)), 16),
    "squeeze-and-excitation": lambda: (InvertedResidual(SE, 16, 48, 24, 5, 2), 24),
    "grouped shuffle": lambda: (shufflenet_v1.unit(PLAIN, 16, 48, 4, 2, False, True), 48),
    "split shuffle": lambda: (shufflenet_v2.unit(PLAIN, 16, 16, 1), 16),
    "residual": lambda: (Residual(nn.Sequential(PLAIN.conv(16, 16), PLAIN.conv(16, 16, act=False)), act=nn.ReLU()), 16),
    "grouped residual": lambda: (Residual(PLAIN.conv(16, 16, groups=4, act=False), act=nn.ReLU()), 16),
    "separable residual": lambda: (Residual(PLAIN.separable(16, 24, act=False), PLAIN.conv(16, 24, 1, act=False)), 24),
    "branches": lambda: module(PLAIN, 16, SPLIT),
}
# ExecuTorch's quantiser takes 8 s for each network: it has these.
QUANTISED_SLOWLY = {"convolution", "depthwise separable", "residual"}
SHARED_MEAN = Preprocess((SIDE, SIDE), 3, (120.0,) * 3, (64.0,) * 3)
IMAGENET = Preprocess((SIDE, SIDE), 3, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))


def usable(name: str) -> bool:
    to = targets()[name]
    return lacking(to) is None and lacking(engines()[to.ENGINE]) is None


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of class folders: crops of two photographs, larger than the networks take them."""
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for path in (Path(__file__).parent / "golden" / "photographs").glob("*.jpg"):
        (folder / path.stem).mkdir()
        whole = Image.open(path).convert("RGB")
        for number in range(60):
            side = int(rng.integers(80, min(whole.size)))
            left, top = (int(rng.integers(0, edge - side + 1)) for edge in whole.size)
            crop = whole.crop((left, top, left + side, top + side)).resize((131, 97))
            crop.save(folder / path.stem / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def pictures(photographs: Path) -> tuple[Dataset, Dataset]:
    splits = prepare(open_source(str(photographs)), [SIDE])
    return splits.train, splits.validation


def subject_of(net: nn.Module, preprocess: Preprocess, pictures: tuple[Dataset, Dataset]) -> Subject:
    """A network with its own answers for labels, both of which occur about as often."""
    train, validation = pictures
    task = Task(net, preprocess, ("cat", "espresso"), 1.5)
    labels = [logits(net, each, preprocess).argmax(1).numpy() for each in (train, validation)]
    sets = [replace(each, labels=own, classes=task.classes) for each, own in zip(pictures, labels, strict=True)]
    return Subject(task, *sets)


def between(apart: torch.Tensor) -> torch.Tensor:
    """A value in the middle of the widest gap about the median: no picture lies on the border of two answers."""
    ordered = apart.sort().values
    low, high = len(ordered) // 3, 2 * len(ordered) // 3
    at = low + int((ordered[low + 1 : high] - ordered[low : high - 1]).argmax())
    return (ordered[at] + ordered[at + 1]) / 2


def settled(net: nn.Module, preprocess: Preprocess, pictures: tuple[Dataset, Dataset]) -> nn.Module:
    """The network with statistics of real pictures in its norms; neither answer prevails."""
    with torch.no_grad():
        net.train()
        for leaf in net.modules():
            if isinstance(leaf, nn.BatchNorm2d):
                leaf.momentum = None  # the mean of what is seen
        x = torch.from_numpy(pictures[0].batch(SIDE, range(64))).float().permute(0, 3, 1, 2)
        mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (preprocess.mean, preprocess.std))
        net((x - mean) / std)
        net.eval()
        last = [leaf for leaf in net.modules() if isinstance(leaf, nn.Linear)][-1]
        seen: list[torch.Tensor] = []
        hook = last.register_forward_pre_hook(lambda leaf, inputs: seen.append(inputs[0]))
        net((x - mean) / std)
        hook.remove()
        # Along the direction in which the pictures differ most: others would be lost in the rounding.
        along = torch.linalg.svd(seen[0] - seen[0].mean(0)).Vh[0]
        apart = 2 * seen[0] @ along
        assert last.bias is not None
        last.weight.copy_(torch.stack([along, -along]) * 3 / apart.std())
        last.bias.copy_(torch.tensor([-3.0, 0.0]) * between(apart) / apart.std())
    return net


def made(name: str, preprocess: Preprocess, pictures: tuple[Dataset, Dataset]) -> nn.Module:
    """A block between a stem and a classifier, with random weights."""
    torch.manual_seed(3)
    block, channels = BLOCKS[name]()
    return settled(nn.Sequential(PLAIN.conv(3, 16, 3, 2), block, Classifier(channels, 2)), preprocess, pictures)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("to", targets())
def test_a_target_answers_as_the_network_does(to: str, name: str, pictures: tuple[Dataset, Dataset]) -> None:
    if not usable(to):
        pytest.skip(str(lacking(targets()[to]) or lacking(engines()[targets()[to].ENGINE])))
    preprocess = SHARED_MEAN if name in ("residual", "depthwise separable") else IMAGENET
    subject = subject_of(made(name, preprocess, pictures), preprocess, pictures)
    counts = np.bincount(subject.validation.labels, minlength=2)
    assert counts.min() > 0.1 * counts.sum()
    exported = targets()[to].export(subject.task)
    found = answers(engine(targets()[to].ENGINE).start(exported, 1), subject.validation, preprocess)
    assert gate(subject.reference, found, subject.validation, exact=True).passed
    np.testing.assert_allclose(found, subject.reference, atol=2e-3)
    if to == "executorch" and name not in QUANTISED_SLOWLY:
        return
    small = subject.task.quantised(int8.schemes()[0], subject.train.batch(SIDE, range(32)))
    exported = targets()[to].export(small)
    found = answers(engine(targets()[to].ENGINE).start(exported, 1), subject.validation, preprocess)
    # Random weights tell pictures apart by little, which is scaled up to answers: ranks hold, not every answer.
    assert np.corrcoef(found[:, 0], subject.reference[:, 0])[0, 1] > 0.8
    assert exported.name.startswith("model_int8") or to == "web"


@pytest.mark.parametrize("to", targets())
def test_weights_in_any_order_of_memory_are_exported(to: str, pictures: tuple[Dataset, Dataset]) -> None:
    """Training leaves them with their channels last."""
    if not usable(to):
        pytest.skip(f"{to} cannot be used here")
    net = made("convolution", SHARED_MEAN, pictures)
    files = [
        targets()[to].export(Task(net.to(memory_format=order), SHARED_MEAN, ("cat", "espresso")))
        for order in (torch.contiguous_format, torch.channels_last)
    ]
    images = pictures[1].batch(SIDE, range(3))
    found, again = (engine(targets()[to].ENGINE).start(file, 1)(images) for file in files)
    np.testing.assert_allclose(again, found, atol=1e-5)


def probe(pictures: tuple[Dataset, Dataset]) -> nn.Module:
    """Answers that hang on brightness, on the order of channels and on how sharp a picture is; both equally often."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), GlobalAvgPool(), nn.Linear(16, 2)).eval()
    with torch.no_grad():
        kernels = net[0].weight
        assert isinstance(kernels, torch.Tensor)
        kernels[:8] -= kernels[:8].mean((1, 2, 3), keepdim=True)  # of no answer to what is even
        kernels[:8] *= 20
        outputs = logits(net, pictures[1], IMAGENET)
        apart = outputs[:, 0] - outputs[:, 1]
        net[3].weight.mul_(3 / apart.std())  # type: ignore[operator, union-attr]
        net[3].bias.mul_(3 / apart.std())  # type: ignore[operator, union-attr]
        net[3].bias[0] -= 3 * between(apart) / apart.std()  # type: ignore[index, operator]
    return net


FAULTS = ["none", "forgotten mean", "swapped channels", "wrong resize"]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("to", targets())
def test_the_gate_stops_planted_faults(
    to: str, fault: str, pictures: tuple[Dataset, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not usable(to):
        pytest.skip(f"{to} cannot be used here")
    subject = subject_of(probe(pictures), IMAGENET, pictures)
    task = subject.task
    _ = subject.reference
    if fault == "forgotten mean":
        task = replace(task, preprocess=replace(IMAGENET, mean=(0.0, 0.0, 0.0)))
    if fault == "swapped channels":
        net = copy.deepcopy(task.net)
        net[0].weight.data = net[0].weight.data.flip(1)  # type: ignore[index, operator, union-attr]
        task = replace(task, net=net)
    if fault == "wrong resize":

        def nearest(self: Preprocess, source: object) -> np.ndarray:
            assert isinstance(source, Path)
            return np.asarray(Image.open(source).convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST))

        monkeypatch.setattr(Preprocess, "pixels", nearest)
    outcome = prove(targets()[to].ENGINE, [task], subject)
    assert outcome.proven == (fault == "none"), outcome.told
    assert outcome.parity is not None
    assert outcome.parity.worst is not None
    assert outcome.parity.worst["name"] in subject.validation.names
    if fault != "none":
        assert outcome.parity.worst["difference"] > APART


def test_the_fastest_form_that_answers_rightly_is_taken(
    pictures: tuple[Dataset, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = subject_of(probe(pictures), IMAGENET, pictures)
    held = gate(subject.reference, subject.reference, subject.validation, exact=True)
    wrong = replace(held, agreement=0.2, passed=False)
    made = [Outcome("onnx", "onnxruntime", "int8", 0.0, parity=parity, ms=ms) for parity, ms in
            ((held, 2.0), (wrong, 0.1), (held, 1.0), (held, 0.99))]  # fmt: skip
    monkeypatch.setattr("flyweight.exporting._proof", lambda engine, task, *_: made[int(task)])

    def taken(*numbers: int) -> int:
        return made.index(prove("onnxruntime", numbers, subject))  # type: ignore[arg-type]

    assert taken(0, 1, 2, 3) == 2  # the last is faster by less than two measurements differ by
    assert taken(0, 1) == 0
    assert taken(1) == 1


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="reads /proc/cpuinfo")
def test_bfloat16_is_there_where_the_processor_has_it() -> None:
    if lacking(engines()["openvino"]):
        pytest.skip("openvino is not installed")
    flags = Path("/proc/cpuinfo").read_text().split()
    assert (lacking(engines()["openvino-bf16"]) is None) == bool({"avx512_bf16", "amx_bf16"} & {*flags})


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_openvino_opens_an_onnx_file_too(precision: str, pictures: tuple[Dataset, Dataset]) -> None:
    if lack := lacking(engines()["openvino"]):
        pytest.skip(lack)
    images = pictures[1].batch(SIDE, range(5))
    task = subject_of(probe(pictures), IMAGENET, pictures).task
    file = targets()["onnx"].export(task if precision == "float32" else task.quantised(int8.schemes()[0], images))
    own, other = (engines()[name].start(file, 1)(images) for name in ("onnxruntime", "openvino"))
    np.testing.assert_allclose(other, own, atol=1e-5 if precision == "float32" else 0.05)
    assert own.std() > 0.05


def test_bfloat16_is_gated_as_int8_is(pictures: tuple[Dataset, Dataset]) -> None:
    if lack := lacking(engines()["openvino-bf16"]):
        pytest.skip(lack)
    subject = subject_of(probe(pictures), IMAGENET, pictures)
    exact, rounded = (prove(name, [subject.task], subject) for name in ("openvino", "openvino-bf16"))
    assert exact.parity is not None
    assert rounded.parity is not None
    assert exact.parity.tolerance == pytest.approx(0.001)
    assert rounded.parity.tolerance >= 0.01
    assert exact.parity.worst is not None
    assert rounded.parity.worst is not None
    assert rounded.parity.worst["difference"] > exact.parity.worst["difference"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, photographs: Path, pictures: tuple[Dataset, Dataset]) -> Path:
    """What a finished run's folder must hold to be exported."""
    folder = tmp_path_factory.mktemp("run")
    net = settled(create_model("mobilenet_v1", num_classes=2, width=0.25, size=SIDE), SHARED_MEAN, pictures)
    assert isinstance(net, Net)
    (folder / "model.safetensors").write_bytes(net_bytes(net, SHARED_MEAN, pictures[0].classes))
    job = {"source": str(photographs), "seed": 0, "skip_corrupt": False}
    (folder / "run.json").write_text(json.dumps(job), encoding="utf-8")
    return folder


def test_exports_are_written_proven_and_read_again(run: Path, tmp_path: Path, photographs: Path) -> None:
    names = [name for name in ("onnx", "openvino", "litert", "ncnn") if usable(name)]
    summary = export_run(run, names, out=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "export.json").read_text()) == summary
    assert {each["target"] for each in summary["exports"]} == set(names)
    picture = next(photographs.glob("cat/*.png"))
    true = classifier(tmp_path / "out" / "onnx" / "model.onnx").predict_proba(picture)
    for each in summary["exports"]:
        folder = tmp_path / "out" / each["place"]
        assert each["proven"]
        assert {path.name for path in folder.iterdir()} == {*each["files"], CONTRACT}
        opened = classifier(folder / next(iter(each["files"])))
        assert opened.classes == ("cat", "espresso")
        assert opened.preprocess == SHARED_MEAN
        np.testing.assert_allclose(
            opened.predict_proba(picture), true, atol=1e-3 if each["format"] == "float32" else 0.3
        )


def test_what_cannot_be_exported_is_told_in_a_sentence(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no target 'tflite'; there are executorch, litert, ncnn, onnx, openvino, web"):
        export_run(run, ["tflite"], out=tmp_path / "a")
    with pytest.raises(UsageError, match="no precision 'int4'; there are float32, int8"):
        export_run(run, ["onnx"], ["int4"], out=tmp_path / "b")
    with pytest.raises(UsageError, match="already holds a run"):
        export_run(run, ["onnx"], out=run)
    alone = tmp_path / "model.safetensors"
    alone.write_bytes((run / "model.safetensors").read_bytes())
    with pytest.raises(UsageError, match="name them: --data"):
        open_subject(alone)
    with pytest.raises(UsageError, match="neither a run's folder"):
        open_subject(tmp_path / "nothing")


def test_a_converter_that_is_missing_is_named_with_its_remedy(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines()["ncnn"], "NEEDS", ("no_such_module",))
    with pytest.raises(UsageError, match=r"no_such_module is not installed: pip install 'flyweight\[ncnn\]'"):
        export_run(run, ["ncnn"])


def test_a_file_that_answers_otherwise_is_not_left(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = targets()["onnx"].export
    wrong = replace(SHARED_MEAN, mean=(0.0, 0.0, 0.0))
    monkeypatch.setattr(targets()["onnx"], "export", lambda task: true(replace(task, preprocess=wrong)))
    with pytest.raises(
        ParityError, match=r"not exported, since the answers differ too much: onnx, float32: .* most on "
    ):
        export_run(run, ["onnx"], ["float32"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_engine_runs_the_files_of_a_target_that_there_is() -> None:
    for each in engines().values():
        assert each.TARGET in {*targets(), "pytorch"}
    for each in targets().values():
        assert engines()[each.ENGINE].TARGET == each.NAME


def test_an_export_reads_as_it_was_written(tmp_path: Path) -> None:
    exported = Exported("openvino", "float32", {"model.xml": b"x", "model.bin": b"yy"}, SHARED_MEAN, ("a", "b"))
    assert exported.size == 3
    again = read_export(exported.written(tmp_path / "new"))
    assert (again.files, again.preprocess, again.classes) == (exported.files, SHARED_MEAN, ("a", "b"))
    (tmp_path / "new" / "model.bin").unlink()
    with pytest.raises(UsageError, match=r"model.bin does not exist"):
        read_export(tmp_path / "new" / "model.xml")


def test_a_new_target_and_a_new_engine_are_one_file_each(
    tmp_path: Path, pictures: tuple[Dataset, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those in CONTRIBUTING.md, put into the folders."""
    guide = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for title, package in {"An export target": export_targets, "An engine": bench_engines}.items():
        section = guide.partition(f"## {title}\n")[2].partition("\n## ")[0]
        code = textwrap.dedent(section.partition("   ```python\n")[2].partition("   ```\n")[0])
        (tmp_path / title).mkdir()
        (tmp_path / title / "torchscript.py").write_text(code, encoding="utf-8")
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / title)])
    targets.cache_clear()
    engines.cache_clear()
    try:
        subject = subject_of(probe(pictures), IMAGENET, pictures)
        exported = targets()["torchscript"].export(subject.task)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of TorchScript
            found = answers(engine("torchscript").start(exported, 1), subject.validation, IMAGENET)
        assert gate(subject.reference, found, subject.validation, exact=True).passed
    finally:
        targets.cache_clear()
        engines.cache_clear()
        for name in ("flyweight.export.targets.torchscript", "flyweight.bench.engines.torchscript"):
            sys.modules.pop(name, None)
