"""The trainer: augmentation, the clock, averages, precision, checkpoints that continue exactly."""

import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from flyweight.create import create_model
from flyweight.data import augment, open_source, prepare
from flyweight.data.dataset import Dataset
from flyweight.errors import FlyweightError
from flyweight.net import Net
from flyweight.preprocess import Preprocess
from flyweight.train.checkpoint import load_checkpoint, save_checkpoint
from flyweight.train.ema import Ema
from flyweight.train.inputs import augmented, normalise
from flyweight.train.loop import Clock, Diverged, Training, _step, logits, score, train
from flyweight.train.optimisers import make
from flyweight.train.platform import precision
from flyweight.train.recipe import Recipe, rate, recipe_for
from flyweight.train.state import State


@pytest.fixture(scope="module")
def splits():
    """Real pictures: the data that comes along."""
    return prepare(open_source("demo"), [28])


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_squeezenet(classes: int) -> Net:
    form = {"stem": "cifar", "norm": "batch", "drop_rate": 0.0, "size": 28}
    return create_model("squeezenet1_1", num_classes=classes, in_chans=1, width=0.25, **form)


def job(splits, seed: int = 0, epochs: float = 1.0, images: int = 1024, **changes) -> Training:
    torch.manual_seed(seed)
    net = small_squeezenet(10)
    data = splits.train.subset(np.arange(images))
    recipe = replace(recipe_for(28), learning_rate=0.05, batch_size=64, **changes)
    preprocess = Preprocess.of(data.batch(28))
    return Training(
        net,
        data,
        splits.validation.subset(np.arange(200)),
        preprocess,
        recipe,
        Clock(epochs=epochs),
        seed,
        mode="float32",
    )


@pytest.mark.parametrize("pixels", [0, 1, 3])
def test_shifted_pictures_hold_only_what_was_there(pixels: int) -> None:
    images = torch.arange(2 * 8 * 8).view(2, 8, 8, 1).to(torch.uint8)
    for seed in range(5):
        moved = augment.shift_and_flip(images, pixels, False, rng(seed))
        assert moved.shape == images.shape
        for before, after in zip(images, moved, strict=True):
            assert set(after.flatten().tolist()) <= set(before.flatten().tolist())
            # The middle of the shifted picture is an exact window of the original.
            window = after[3:5, 3:5, 0]
            positions = before[..., 0].unfold(0, 2, 1).unfold(1, 2, 1)
            assert (positions == window).all(-1).all(-1).any()
    if pixels == 0:
        assert torch.equal(augment.shift_and_flip(images, 0, False, rng()), images)


def test_half_of_the_pictures_are_mirrored() -> None:
    images = torch.arange(4).view(1, 1, 4, 1).expand(1000, 1, 4, 1).to(torch.uint8)
    moved = augment.shift_and_flip(images, 0, True, rng())
    mirrored = (moved[:, 0, 0, 0] == 3).float().mean()
    assert 0.45 < mirrored < 0.55
    assert torch.equal(moved.sum(dim=(1, 2, 3)), images.sum(dim=(1, 2, 3)))


def test_zoomed_pictures_stay_within_the_values_that_were_there() -> None:
    images = torch.rand(16, 3, 64, 64, generator=rng())
    zoomed = augment.zoom_and_turn(images, 0.3, True, rng())
    assert zoomed.shape == images.shape
    assert images.min() <= zoomed.min()
    assert zoomed.max() <= images.max()
    assert not torch.equal(zoomed, images)


def test_cutout_hides_a_square_of_the_size_asked_for() -> None:
    images = torch.ones(200, 3, 32, 32)
    hidden = (augment.cutout(images, 0.25, rng()) == 0).float().mean(dim=(1, 2, 3))
    assert hidden.max() <= (9 / 32) ** 2
    assert hidden.max() >= (8 / 32) ** 2
    assert hidden.min() > 0


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (32, 3), (64, 3)])
def test_a_batch_is_normalised_and_channels_last(size: int, channels: int) -> None:
    images = torch.randint(0, 256, (8, size, size, channels), dtype=torch.uint8, generator=rng())
    preprocess = Preprocess((size, size), channels, (100.0,) * channels, (50.0,) * channels)
    recipe = replace(recipe_for(size), cutout=0.2)
    batch, _ = augmented(images, torch.zeros(8, dtype=torch.int64), 10, preprocess, recipe, rng())
    assert batch.shape == (8, channels, size, size)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    plain = normalise(images, preprocess)
    torch.testing.assert_close(plain, (images.permute(0, 3, 1, 2).float() - 100) / 50)


def test_the_rate_rises_and_falls() -> None:
    recipe = Recipe(learning_rate=1.0, warm_up=0.2)
    rates = [rate(recipe, p) for p in np.linspace(0, 1, 11)]
    assert rates[0] == 0
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) == 2
    assert rates[-1] == 0
    assert rate(recipe, 1.3) == 0


def test_averages_follow_and_are_lent() -> None:
    net = nn.Linear(2, 1)
    ema = Ema(net, share=0.5)
    start = net.weight.detach().clone()
    with torch.no_grad():
        net.weight += 1
    ema.update(step=10, every=1)  # moves by 1 / (0.5 · 10)
    torch.testing.assert_close(ema.average["weight"], start + 0.2)
    with ema.applied():
        torch.testing.assert_close(net.weight.detach(), start + 0.2)
    torch.testing.assert_close(net.weight.detach(), start + 1)


@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize("name", ["mobilenet_v1_cifar", "resnet8_cifar", "shufflenet_v1_g3_cifar"])
def test_bfloat16_is_close_and_leaves_no_trace(name: str, padding: str) -> None:
    torch.manual_seed(0)
    net = create_model(name, num_classes=10, width=0.5, padding=padding).eval()
    x = torch.randn(4, 3, 32, 32)
    exact = net(x)
    with precision(net, "bfloat16"):
        rough = net(x)
        assert rough.dtype == torch.float32
    assert not torch.equal(exact, rough), "it did compute in another precision"
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max() + 1e-3
    assert torch.equal(net(x), exact)
    assert not any("forward" in vars(leaf) for leaf in net.modules())


def test_it_learns_real_pictures(splits) -> None:
    task = job(splits, epochs=10)
    seen: list[dict] = []
    task.emit = seen.append
    trained = train(task)
    assert trained.accuracy > 0.5  # chance is 0.1
    assert seen[-1]["val_top1"] == trained.accuracy
    assert seen[-1]["train_loss"] < seen[0]["train_loss"]
    assert trained.epochs == pytest.approx(10, abs=0.01)
    again = score(logits(task.net, task.validation, task.preprocess), task.validation.labels)
    assert again == (trained.accuracy, trained.loss), "the averaged weights are what is left in the network"


def test_the_same_seed_gives_the_same_weights(splits) -> None:
    first, second, other = job(splits), job(splits), job(splits, seed=1)
    for task in (first, second, other):
        train(task)
    assert same(first.net, second.net)
    assert not same(first.net, other.net)


def same(a: Net, b: Net) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("stop_after", [1, 7, 16, 23])
def test_interrupted_and_resumed_it_ends_with_the_same_weights(splits, tmp_path: Path, stop_after: int) -> None:
    whole = job(splits, epochs=1.9)
    train(whole)
    part = job(splits, epochs=1.9)
    part.checkpoint = tmp_path / "state" / "final.safetensors"
    steps = iter(range(stop_after))

    def stop(share: float) -> None:
        if next(steps, None) is None:
            raise KeyboardInterrupt

    part.progress = stop
    with pytest.raises(KeyboardInterrupt):
        train(part)
    rest = job(splits, epochs=1.9)
    rest.checkpoint = part.checkpoint
    train(rest)
    assert same(whole.net, rest.net)


def test_a_signal_waits_for_the_end_of_the_step() -> None:
    """In a process of its own, which a signal at the wrong moment would end."""
    code = """
        import os, signal, time
        from flyweight.train.faults import signals_between_steps

        handler = signal.getsignal(signal.SIGTERM)
        with signals_between_steps() as signals:
            os.kill(os.getpid(), signal.SIGTERM)
            while not signals.came:  # it may come by way of another thread, and so a little later
                time.sleep(0.01)
            print("noted", flush=True)
            try:  # the second does not wait
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(60)
            except KeyboardInterrupt:
                print("interrupted", flush=True)
        print("restored" if signal.getsignal(signal.SIGTERM) is handler else "changed")
        """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["noted", "interrupted", "restored"]


def test_a_network_that_never_saw_mirror_images_tells_left_from_right(splits) -> None:
    """Boots that point left and boots that point right: what the decision on mirroring is based on."""
    boots = np.flatnonzero(splits.train.labels == 9)[:400]
    pixels = splits.train.batch(28, boots)
    labels = np.arange(400) % 2
    pixels[labels == 1] = pixels[labels == 1][:, :, ::-1]
    data = Dataset({28: pixels}, pixels, np.arange(400), labels, ("left", "right"), "train", ("",) * 400)
    task = job(splits, epochs=6, flip=False)
    task.net = small_squeezenet(2)
    task.data, task.validation = data.subset(np.arange(300)), data.subset(np.arange(300, 400))
    trained = train(task)
    mirrored, _ = score(logits(task.net, task.validation, task.preprocess, mirror=True), task.validation.labels)
    assert trained.accuracy > 0.9
    assert mirrored < 0.1


def test_a_clock_of_seconds_ends_on_time(splits) -> None:
    task = job(splits)
    task.clock = Clock(seconds=1.5)
    trained = train(task)
    assert trained.seconds >= 1.5
    assert trained.steps > 0


def test_a_loss_that_is_no_number_is_told(splits) -> None:
    task = job(splits, epochs=20)
    task.recipe = replace(task.recipe, learning_rate=1e6)
    with pytest.raises(Diverged, match="lower the learning rate"):
        train(task)


def test_a_damaged_checkpoint_is_told(tmp_path: Path) -> None:
    path = tmp_path / "state" / "c.safetensors"
    save_checkpoint(path, {"a": torch.ones(3)}, {"step": 1})
    tensors, values = load_checkpoint(path)
    assert torch.equal(tensors["a"], torch.ones(3))
    assert values == {"step": 1}
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(FlyweightError, match=r"c.safetensors is damaged"):
        load_checkpoint(path)


def test_a_checkpoint_of_another_network_is_told(splits, tmp_path: Path) -> None:
    task = job(splits, epochs=0.2)
    task.checkpoint = tmp_path / "c.safetensors"
    save_checkpoint(task.checkpoint, {"rng": rng().get_state(), "net.x": torch.ones(1)}, {"step": 1})
    with pytest.raises(FlyweightError, match="another network"):
        train(task)


def test_data_smaller_than_a_batch_trains(splits) -> None:
    task = job(splits, images=20, epochs=3)
    assert train(task).steps == 3


def test_preprocess_statistics_are_those_of_the_pictures(splits) -> None:
    data: Dataset = splits.train
    found = Preprocess.of(data.batch(28))
    assert found.mean[0] == round(float(data.batch(28).mean()))
    assert found.std[0] == pytest.approx(float(data.batch(28).astype(np.float64).std()), rel=0.02)
    assert Preprocess.from_json(found.to_json()) == found


STRIDED = """
import torch
from torch import nn
from flyweight.train.platform import precision
torch.set_num_threads(1)
net = nn.Sequential(nn.Conv2d(8, 16, 1, 2)).to(memory_format=torch.channels_last)
x = torch.randn(8, 8, 48, 48).contiguous(memory_format=torch.channels_last).requires_grad_()
with precision(net, "{mode}"):
    for _ in range(20):
        net(x).float().square().mean().backward()
own, kept = net[0].weight.grad / 20, x.grad / 20
x.grad = net[0].weight.grad = None
net.double()(x.double()).square().mean().backward()
assert (own - net[0].weight.grad).abs().max() < {tolerance}
assert (kept - x.grad).abs().max() < {tolerance}
"""


@pytest.mark.parametrize(("mode", "tolerance"), [("float32", 1e-6), ("bfloat16", 0.02), ("fused", 0.02)])
def test_a_strided_point_convolution_survives(mode: str, tolerance: float) -> None:
    """oneDNN's own backward pass kills the process in float32 (torch 2.13), so this runs in one of its own."""
    script = STRIDED.format(mode=mode, tolerance=tolerance)
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_fine_tuning_learns_the_head_first_and_then_less_the_deeper(splits) -> None:
    task = job(splits, epochs=1.0, images=512, features=0.1, depth=0.5, head_first=0.5)
    stages = list(task.net.features.children())  # type: ignore[union-attr]
    shares = {id(p): group["share"] for group in make(task.net, task.recipe).param_groups for p in group["params"]}
    assert len(shares) == len(list(task.net.parameters()))
    assert {shares[id(p)] for p in task.net.head.parameters()} == {1.0}  # type: ignore[union-attr]
    last, before = (list(stage.parameters()) for stage in (stages[-1], stages[-2]))
    assert {shares[id(p)] for p in last} == {0.1}
    assert {shares[id(p)] for p in before} == {0.05}

    first = [p.detach().clone() for p in task.net.features.parameters()]  # type: ignore[union-attr]
    head = [p.detach().clone() for p in task.net.head.parameters()]  # type: ignore[union-attr]
    state = State(task)
    task.net.train()
    _step(task, state, np.arange(64), progress=0.4)
    assert all(torch.equal(a, b) for a, b in zip(first, task.net.features.parameters(), strict=True))  # type: ignore[union-attr]
    assert not any(torch.equal(a, b) for a, b in zip(head, task.net.head.parameters(), strict=True))  # type: ignore[union-attr]
    _step(task, state, np.arange(64), progress=0.6)
    moved = [not torch.equal(a, b) for a, b in zip(first, task.net.features.parameters(), strict=True)]  # type: ignore[union-attr]
    assert all(moved)
