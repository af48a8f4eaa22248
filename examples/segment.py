"""DeepLabV3+ learns to name every pixel of scenes of clothes, in minutes on a CPU.

python examples/segment.py --time 5m                          (scenes before coloured textures)
python examples/segment.py --time 5m --backgrounds photos/    (scenes before pieces of your photographs)

The scenes are rendered from the pictures of clothes that come with the package: two to five pieces, scaled, turned,
tinted and overlapping, so that the truth is known to the pixel. Those of the test are made of test pictures alone.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor, nn

from flyweight import cost, create_model
from flyweight.blocks import Options
from flyweight.data import open_source, read_image
from flyweight.data.images import FORMATS
from flyweight.errors import FlyweightError, UsageError
from flyweight.export.onnx import export
from flyweight.heads import DeepLab
from flyweight.preprocess import Preprocess
from flyweight.search.budget import parse_time
from flyweight.train.ema import Ema
from flyweight.train.loop import Clock, normalise
from flyweight.train.platform import faster_precision, keep_freed_memory, precision, set_threads
from flyweight.train.recipe import Recipe, rate
from flyweight.units import human_count, percent

SIDE = 96  # pixels of a scene
PIECES = (2, 5)  # of clothing in it, from … to
SCALE, TURN = (1.2, 2.2), 40  # of a piece of 28 pixels; degrees to either side
LIT = 12  # a pixel of the black-backed originals from which on it is cloth
EDGE = 128  # the cover, of 255, from which on a pixel is the piece's
SCORED = 500  # scenes
PREPROCESS = Preprocess((SIDE, SIDE), 3, (118.0,) * 3, (66.0,) * 3)
BACKBONES = {"mobilenet_v2": 0.5, "aligned_xception_41": 0.25}  # with the width that suits some minutes
RATES = (1, 2, 3)  # the last map has 6 x 6 positions; the paper's 6, 12, 18 are for 33 x 33
RECIPE = Recipe(batch_size=16, learning_rate=0.2, weight_decay=1e-4, ema=0.05)
EMA_EVERY = 4
# Background, then the demo's ten classes.
COLOURS = [
    (40, 40, 40), (230, 60, 60), (60, 120, 230), (250, 165, 40), (200, 80, 200), (30, 160, 90),
    (150, 225, 60), (80, 215, 235), (255, 235, 90), (245, 160, 200), (150, 105, 70),
]  # fmt: skip


@dataclass(frozen=True)
class Wardrobe:
    """What scenes are made of: pieces, uint8 [N, 30, 30, 2] (brightness and cover), and photographs, if any."""

    pieces: np.ndarray
    labels: np.ndarray
    photos: Sequence[Image.Image]


def wardrobes(photos: Sequence[Image.Image] = ()) -> tuple[dict[str, Wardrobe], list[str]]:
    """Those for training, validation and test, which share neither clothes nor photographs; and the classes."""
    source = open_source("demo")
    assert isinstance(source.images, np.ndarray)
    pieces, labels = cut_out(source.images[..., 0]), source.labels + 1
    test, train = (np.flatnonzero(source.splits == name) for name in ("test", "train"))
    train = np.random.default_rng(0).permutation(train)
    quarter = len(photos) // 4
    return {
        "train": Wardrobe(pieces[train[1000:]], labels[train[1000:]], photos[2 * quarter :]),
        "validation": Wardrobe(pieces[train[:1000]], labels[train[:1000]], photos[:quarter]),
        "test": Wardrobe(pieces[test], labels[test], photos[quarter : 2 * quarter]),
    }, ["Background", *source.classes]


def cut_out(images: np.ndarray) -> np.ndarray:
    """Grey on black → brightness and cover; the piece covers what has some of it above, below, left and right."""
    grey = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    lit = grey >= LIT
    before = [np.maximum.accumulate(lit, axis) for axis in (1, 2)]
    after = [np.flip(np.maximum.accumulate(np.flip(lit, axis), axis), axis) for axis in (1, 2)]
    return np.stack([grey, 255 * np.logical_and.reduce(before + after).astype(np.uint8)], axis=3)


def scene(wardrobe: Wardrobe, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """A picture (RGB) of several pieces, later ones before earlier ones, and the class of each of its pixels (grey)."""
    picture, truth = background(wardrobe.photos, rng), Image.new("L", (SIDE, SIDE))
    for i in rng.integers(len(wardrobe.labels), size=rng.integers(PIECES[0], PIECES[1] + 1)):
        piece = varied(wardrobe.pieces[i], rng)
        corner = rng.integers(SIDE // 8, SIDE - SIDE // 8, size=2) - np.array(piece.shape[1::-1]) // 2
        paste(picture, truth, piece, (int(corner[0]), int(corner[1])), rng.uniform(90, 255, 3), int(wardrobe.labels[i]))
    return picture, truth


def varied(piece: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The piece at a random size and angle, mirrored half of the time."""
    side = round(len(piece) * rng.uniform(*SCALE))
    image = Image.fromarray(np.ascontiguousarray(piece[:, :: rng.choice((1, -1))]))
    image = image.resize((side, side), Image.Resampling.BICUBIC)
    return np.array(image.rotate(rng.uniform(-TURN, TURN), Image.Resampling.BILINEAR, expand=True))


def paste(
    picture: Image.Image, truth: Image.Image, piece: np.ndarray, corner: tuple[int, int], tint: np.ndarray, label: int
) -> None:
    """Puts a piece into a scene; what lies beyond the border is lost."""
    shade, cover = piece[..., :1], np.ascontiguousarray(piece[..., 1])
    colours = tint * (0.2 + 0.8 * shade / 255)
    picture.paste(Image.fromarray(colours.astype(np.uint8)), corner, Image.fromarray(cover))
    truth.paste(label, corner, Image.fromarray(np.where(cover >= EDGE, 255, 0).astype(np.uint8)))


def background(photos: Sequence[Image.Image], rng: np.random.Generator) -> Image.Image:
    """A square piece of a photograph, or where there is none blots, patches and grain of random colours."""
    if photos:
        photo = photos[int(rng.integers(len(photos)))]
        side = min(photo.size) * rng.uniform(0.5, 1)
        left, top = (rng.uniform(0, whole - side) for whole in photo.size)
        return photo.resize((SIDE, SIDE), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
    total = np.full((SIDE, SIDE, 3), rng.uniform(30, 170, 3), np.float32)
    for cells, strength in ((3, 0.5), (8, 0.3), (24, 0.15)):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        noise = noise.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        total += rng.uniform(0, strength) * (np.asarray(noise, np.float32) - 128)
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def scenes(wardrobe: Wardrobe, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Pictures, uint8 [N, H, W, 3], and the truth, int64 [N, H, W]."""
    pictures, truths = zip(*(scene(wardrobe, rng) for _ in range(count)), strict=True)
    return torch.from_numpy(np.stack(pictures)), torch.from_numpy(np.stack(truths)).long()


def read_photos(folder: Path) -> list[Image.Image]:
    """All pictures below a folder, small, in an order that neither names nor folders decide."""
    endings = {ending for ending, name in Image.registered_extensions().items() if name in FORMATS}
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in endings)
    if len(paths) < 4:
        raise UsageError(f"{folder} holds {len(paths)} pictures: give at least 4, since training and test share none")
    photos = [read_image(paths[i], 3) for i in np.random.default_rng(0).permutation(len(paths))]
    for photo in photos:
        photo.thumbnail((3 * SIDE, 3 * SIDE))
    return photos


def deeplab(backbone: str, width: float, classes: int) -> DeepLab:
    """The network: features at strides 4 and 16, at which the backbone goes on with dilation."""
    features = create_model(backbone, features_only=True, output_stride=16, out_indices=(1, -1), width=width, size=SIDE)
    net = DeepLab(features, Options(num_classes=classes, act="relu"), channels=64, rates=RATES, detail=24)
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def train(net: nn.Module, wardrobe: Wardrobe, clock: Clock, seed: int) -> int:
    """Trains on ever new scenes until the clock has run out (its epochs are steps); returns the scenes seen.

    Leaves the averaged weights in the network.
    """
    step, rng = 0, np.random.default_rng(seed)
    flat = [p for p in net.parameters() if p.ndim <= 1]  # norms and biases are not decayed
    groups = [{"params": [p for p in net.parameters() if p.ndim > 1]}, {"params": flat, "weight_decay": 0.0}]
    optimiser = torch.optim.SGD(groups, momentum=RECIPE.momentum, nesterov=True, weight_decay=RECIPE.weight_decay)
    ema = Ema(net, RECIPE.ema)

    def loss() -> Tensor:
        pictures, truth = scenes(wardrobe, RECIPE.batch_size, rng)
        return F.cross_entropy(net(normalise(pictures, PREPROCESS)).float(), truth)

    net.train()
    clock.start()
    with precision(net, faster_precision(net, lambda: loss().backward())):
        while (progress := clock.progress(step)) < 1:
            for group in optimiser.param_groups:
                group["lr"] = rate(RECIPE, progress)
            optimiser.zero_grad()
            loss().backward()
            optimiser.step()
            step += 1
            if step % EMA_EVERY == 0:
                ema.update(step, EMA_EVERY)
    net.load_state_dict(ema.average, strict=False)  # all but the norms' counters
    return step * RECIPE.batch_size


@torch.no_grad()
def predict(net: nn.Module, pictures: Tensor) -> Tensor:
    """int64 [N, H, W]: the class of each pixel."""
    net.eval()
    return torch.cat([net(normalise(part, PREPROCESS)).argmax(1) for part in pictures.split(50)])


def ious(predicted: Tensor, truth: Tensor, classes: int) -> Tensor:
    """For each class its pixels that were found, of all that are its own or were said to be, over all scenes."""
    table = torch.bincount((truth * classes + predicted).flatten(), minlength=classes**2).view(classes, classes)
    return table.diagonal() / (table.sum(0) + table.sum(1) - table.diagonal()).clamp(min=1)


def drawn(pictures: Tensor, truth: Tensor, predicted: Tensor, classes: Sequence[str]) -> Image.Image:
    """Scenes in columns: the picture, the truth, the prediction; below them which colour is which class."""
    colours = np.array(COLOURS, np.uint8)
    rows = [pictures.numpy(), colours[truth.numpy()], colours[predicted.numpy()]]
    sheet = Image.fromarray(np.concatenate([np.concatenate([*row], axis=1) for row in rows]))
    sheet = sheet.resize((sheet.width * 3 // 2, sheet.height * 3 // 2), Image.Resampling.NEAREST)
    whole = Image.new("RGB", (sheet.width, sheet.height + 52), "white")
    whole.paste(sheet)
    pen, columns = ImageDraw.Draw(whole), -(-len(classes) // 2)
    for i, name in enumerate(classes):
        x, y = 8 + i % columns * sheet.width // columns, sheet.height + 8 + i // columns * 22
        pen.rectangle((x, y, x + 14, y + 14), COLOURS[i])
        pen.text((x + 22, y), name, "black", font_size=14)
    return whole.quantize(256, dither=Image.Dither.NONE)


def main() -> None:
    """Trains, scores on scenes that nothing was chosen by, and writes predictions, weights and an ONNX file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time", default="5m", help="for everything: 90s, 5m")
    parser.add_argument("--backbone", default="mobilenet_v2", choices=sorted(BACKBONES))
    parser.add_argument("--width", type=float, help="the backbone's width multiplier")
    parser.add_argument("--backgrounds", type=Path, help="a folder of photographs that scenes are put before")
    parser.add_argument("--on", default="test", choices=["test", "validation"], help="the scenes that are scored")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("segment"), help="the folder for what is written")
    args = parser.parse_args()
    try:
        run(args)
    except FlyweightError as error:
        parser.exit(error.exit_code, f"{error}\n")


def run(args: argparse.Namespace) -> None:
    """The whole job."""
    start, seconds = time.perf_counter(), parse_time(args.time)
    keep_freed_memory()
    set_threads()
    torch.manual_seed(args.seed)
    sets, classes = wardrobes(read_photos(args.backgrounds) if args.backgrounds else ())
    pictures, truth = scenes(sets[args.on], SCORED, np.random.default_rng(2))
    net = deeplab(args.backbone, args.width or BACKBONES[args.backbone], len(classes))
    count = cost(net, (3, SIDE, SIDE))
    print(f"{args.backbone}: {human_count(count.params)} parameters, {human_count(count.macs)} MACs a scene")

    before = time.perf_counter()
    predict(net, pictures)  # for its time, which is kept back
    now = time.perf_counter()
    left = seconds - (now - start) - 1.5 * (now - before) - 1
    seen = train(net, sets["train"], Clock(seconds=left), args.seed)

    predicted = predict(net, pictures)
    found = ious(predicted, truth, len(classes))
    for name, iou in zip(classes, found.tolist(), strict=True):
        print(f"{name:>12}  {percent(iou)}")
    share = (predicted == truth).float().mean().item()
    print(f"mIoU {percent(found.mean().item())}, pixels right {percent(share)}: {SCORED} {args.on} scenes")
    args.out.mkdir(parents=True, exist_ok=True)
    drawn(pictures[:8], truth[:8], predicted[:8], classes).save(args.out / "predictions.png", optimize=True)
    told = {"backbone": json.dumps(net.backbone.spec.to_json()), "classes": json.dumps(classes)}
    save_file({name: t.contiguous() for name, t in net.state_dict().items()}, args.out / "model.safetensors", told)
    (args.out / "model.onnx").write_bytes(export(net, PREPROCESS, classes).SerializeToString())
    print(f"{seen} scenes seen, {time.perf_counter() - start:.0f} s; {args.out} holds predictions.png and the network")


if __name__ == "__main__":
    main()
