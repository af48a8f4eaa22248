"""The head that answers for every pixel, and the example that trains it on rendered scenes."""

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from flyweight import cost, create_model
from flyweight.blocks import Options
from flyweight.data import open_source
from flyweight.errors import UsageError
from flyweight.export.onnx import export
from flyweight.graph import trace
from flyweight.heads import DeepLab
from flyweight.ops import Cat, Resize
from flyweight.preprocess import Preprocess
from flyweight.train.loop import Clock

EXAMPLE = Path(__file__).parents[1] / "examples" / "segment.py"


def deeplab(name: str, output_stride: int = 16, **args: Any) -> DeepLab:
    torch.manual_seed(0)
    features = create_model(
        name, features_only=True, output_stride=output_stride, out_indices=(1, -1), width=0.125, size=64, **args
    )
    return DeepLab(features, Options(num_classes=5), channels=16, rates=(1, 2), detail=8).eval()


@pytest.fixture(scope="module")
def segment() -> ModuleType:
    spec = importlib.util.spec_from_file_location("segment", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["segment"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("name", ["mobilenet_v2", "aligned_xception_41", "aligned_xception_65"])
def test_logits_are_for_every_pixel(name: str, output_stride: int) -> None:
    net = deeplab(name, output_stride)
    for height, width in ((64, 96), (65, 79)):
        x = torch.randn(1, 3, height, width)
        with torch.no_grad():
            fine, coarse = net.backbone(x)
            assert net(x).shape == (1, 5, height, width)
        assert fine.shape[2:] == (-(-height // 4), -(-width // 4))
        assert coarse.shape[2:] == (-(-height // output_stride), -(-width // output_stride))
        assert trace(net, (3, height, width)).nodes[-1].shape == (5, height, width)


def test_atrous_branches_read_every_so_many_positions() -> None:
    net = deeplab("mobilenet_v2")
    rates = [
        leaf.dilation for leaf in net.pyramid.branches.modules() if isinstance(leaf, nn.Conv2d) and leaf.groups > 1
    ]
    assert rates == [(1, 1), (2, 2)]
    assert (
        net.pyramid.project.get_parameter("conv.weight").shape[1] == (len(rates) + 2) * 16
    )  # with the 1 x 1 branch and the picture's mean


def test_every_parameter_learns() -> None:
    net = deeplab("mobilenet_v2").train()
    net(torch.randn(2, 3, 64, 64)).square().sum().backward()
    without = [path for path, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_two_features_are_wanted() -> None:
    with pytest.raises(UsageError, match="not 1: set out_indices"):
        DeepLab(create_model("mobilenet_v2", features_only=True, out_indices=(-1,)), Options(num_classes=5))


class Pyramid(nn.Module):
    """A map made coarse, then fine again beside what it was."""

    def __init__(self) -> None:
        super().__init__()
        self.shrink = nn.Conv2d(2, 4, 3, stride=4, padding=1)
        self.resize, self.cat = Resize(), Cat()

    def forward(self, x: Tensor) -> Tensor:
        return self.cat(x, self.resize(self.shrink(x), x))


def test_a_resized_map_reads_its_own_values_alone() -> None:
    layer = next(each for each in cost(Pyramid(), (2, 16, 16)).layers if each.leaf == "Resize")
    assert (layer.shape, layer.macs, layer.params) == ((4, 16, 16), 0, 0)
    assert layer.read == 4 * 4 * 4
    assert layer.field == (3 + 4, 3 + 4)  # two windows of 3 pixels, 4 apart
    grid = trace(Pyramid(), (2, 16, 16)).fields
    assert grid["resize"].stride == 1


@pytest.mark.parametrize("size", [(64, 64), (65, 47)], ids=str)
def test_the_exported_file_answers_for_every_pixel(size: tuple[int, int]) -> None:
    net = deeplab("mobilenet_v2")
    preprocess = Preprocess(size, 3, (118.0,) * 3, (66.0,) * 3)
    pictures = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    model = export(net, preprocess, list("abcde")).SerializeToString()
    (answers,) = onnxruntime.InferenceSession(model).run(None, {"image": pictures})
    with torch.no_grad():
        ours = net((torch.from_numpy(pictures).permute(0, 3, 1, 2).float() - 118) / 66).softmax(1)
    assert np.asarray(answers).shape == (2, 5, *size)
    np.testing.assert_allclose(np.asarray(answers), ours.numpy(), atol=1e-4)


def test_a_piece_covers_what_it_surrounds(segment: ModuleType) -> None:
    drawn = ["..........", ".########.", ".#......#.", ".########.", ".##....##.", ".##....##."]
    picture = np.array([[200 * (c == "#") for c in row] for row in drawn], np.uint8)[None]
    brightness, cover = np.moveaxis(segment.cut_out(picture)[0], 2, 0)
    assert np.array_equal(brightness[1:-1, 1:-1], picture[0])
    told = ["..........", ".########.", ".########.", ".########.", ".##....##.", ".##....##."]
    assert np.array_equal(cover[1:-1, 1:-1] > 0, np.array([[c == "#" for c in row] for row in told]))


def test_the_truth_is_the_piece_in_front(segment: ModuleType) -> None:
    picture, truth = Image.new("RGB", (96, 96)), Image.new("L", (96, 96))
    rng = np.random.default_rng(0)
    wardrobe = segment.wardrobes()[0]["train"]
    expected = np.zeros((96, 96), np.uint8)
    for label, corner in ((3, (10, 10)), (7, (20, 18)), (9, (-8, 60))):  # the last beyond the border
        piece = segment.varied(wardrobe.pieces[label], rng)
        segment.paste(picture, truth, piece, corner, np.array([0.0, 0.0, 255.0]), label)
        for y, x in np.argwhere(piece[..., 1] >= 128):
            if 0 <= corner[1] + y < 96 and 0 <= corner[0] + x < 96:
                expected[corner[1] + y, corner[0] + x] = label
    assert set(np.unique(expected)) == {0, 3, 7, 9}
    assert np.array_equal(np.asarray(truth), expected)
    pixels = np.asarray(picture)
    assert not pixels[..., :2].any()
    assert (pixels[..., 2][expected > 0] >= 25).all()  # at half the cover, a tenth of the tint at least


def test_scenes_repeat_and_share_no_piece(segment: ModuleType) -> None:
    sets, classes = segment.wardrobes()
    assert classes[1:] == list(open_source("demo").classes)
    kinds = {name: {piece.tobytes() for piece in each.pieces} for name, each in sets.items()}
    assert sum(map(len, kinds.values())) == len(set.union(*kinds.values()))
    assert set(sets["test"].labels) == set(range(1, 11))
    one, again, other = (segment.scenes(sets["test"], 3, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert torch.equal(one[0], again[0])
    assert torch.equal(one[1], again[1])
    assert not torch.equal(one[1], other[1])


def test_iou_is_shared_pixels_of_all(segment: ModuleType) -> None:
    truth, predicted = torch.tensor([[0, 0, 1, 1, 1]]), torch.tensor([[0, 1, 1, 1, 0]])
    assert segment.ious(predicted, truth, 3).tolist() == pytest.approx([1 / 3, 2 / 4, 0])


def test_photographs_become_backgrounds(segment: ModuleType, tmp_path: Path) -> None:
    for i in range(8):
        Image.new("RGB", (200, 120), (20 * i, 0, 255)).save(tmp_path / f"{i}.png")
    sets, _ = segment.wardrobes(segment.read_photos(tmp_path))
    colours = {name: {photo.getpixel((0, 0)) for photo in each.photos} for name, each in sets.items()}
    assert {name: len(each) for name, each in colours.items()} == {"train": 4, "validation": 2, "test": 2}
    assert len(set.union(*colours.values())) == 8
    pictures, truth = segment.scenes(sets["train"], 2, np.random.default_rng(0))
    assert {tuple(pixel) for pixel in pictures[truth == 0][:, 1:].tolist()} >= {(0, 255)}


def test_too_few_photographs_are_told(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE), "--backgrounds", str(tmp_path), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"{tmp_path} holds 0 pictures: give at least 4, since training and test share none\n"
    assert not (tmp_path / "out").exists()


def test_a_short_training_finds_the_pieces(segment: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trousers, sneakers and bags before black, tested on other ones; all background would be 0.16."""
    monkeypatch.setattr(segment, "SIDE", 64)
    monkeypatch.setattr(segment, "SCALE", (1.0, 1.5))
    monkeypatch.setattr(segment, "RECIPE", replace(segment.RECIPE, batch_size=8))
    kinds, black = [2, 8, 9], [Image.new("RGB", (64, 64))]

    def chosen(wardrobe: Any) -> Any:
        of = np.isin(wardrobe.labels, kinds)
        return segment.Wardrobe(wardrobe.pieces[of], np.searchsorted(kinds, wardrobe.labels[of]) + 1, black)

    sets, _ = segment.wardrobes()
    torch.manual_seed(0)
    net = segment.deeplab("mobilenet_v2", 0.35, 4)
    assert segment.train(net, chosen(sets["train"]), Clock(epochs=120), seed=0) == 120 * 8
    pictures, truth = segment.scenes(chosen(sets["test"]), 100, np.random.default_rng(1))
    nothing = segment.ious(torch.zeros_like(truth), truth, 4).mean()
    assert segment.ious(segment.predict(net, pictures), truth, 4).mean() > 2 * nothing
