"""Recipes: every field is honoured by the training, and does what its formula says."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flyweight.create import create_model
from flyweight.data import augment, open_source, prepare
from flyweight.errors import UsageError
from flyweight.net import Net
from flyweight.train import loop
from flyweight.train.inputs import augmented, epoch_order, normalise, shrunk
from flyweight.train.loop import Clock, Training, train
from flyweight.train.losses import distance, loss_of
from flyweight.train.optimisers import MuonWithSgd, make
from flyweight.train.recipe import (
    BASELINE,
    FINE_TUNING,
    OPTIMISERS,
    Recipe,
    preprocess_for,
    rate,
    recipe_for,
    recipe_named,
    side,
)
from flyweight.train.statistics import reestimate

PLAIN = Recipe(batch_size=32, learning_rate=0.05, shift=0, flip=False)


@pytest.fixture(scope="module")
def splits():
    """Real pictures: the data that comes along, as small pictures and as photographs are treated."""
    return prepare(open_source("demo"), [28, 56])


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_net(size: int = 28) -> Net:
    torch.manual_seed(0)
    form: dict[str, Any] = {"stem": "cifar", "norm": "batch", "drop_rate": 0.0, "size": size}
    return create_model("squeezenet1_1", num_classes=10, in_chans=1, width=0.125, **form)


def job(splits, recipe: Recipe, size: int = 28, epochs: float = 3.0) -> Training:
    data = splits.train.subset(np.arange(64))
    preprocess = preprocess_for(recipe, data.batch(size))
    validation = splits.validation.subset(np.arange(40))
    return Training(small_net(size), data, validation, preprocess, recipe, Clock(epochs=epochs), mode="float32")


def weights(task: Training) -> list[Tensor]:
    train(task)
    return [t.clone() for t in task.net.state_dict().values()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# A value that differs, by field, and what the field needs to matter at all.
CHANGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "batch_size": (16, {}),
    "optimiser": ("muon", {}),
    "learning_rate": (0.02, {}),
    "momentum": (0.5, {}),
    "others": (0.5, {"optimiser": "muon"}),
    "weight_decay": (0.1, {}),
    "schedule": ("constant", {}),
    "warm_up": (0.6, {}),
    "label_smoothing": (0.4, {}),
    "ema": (0.0, {}),
    "reestimate": (2, {}),
    "balanced": (True, {}),
    "resize": (((0.5, 0.75),), {}),
    "shift": (2, {}),
    "border": ("black", {"shift": 3}),
    "flip": (True, {}),
    "operations": (2, {}),
    "magnitude": (0.9, {"operations": 1}),
    "cutout": (0.3, {}),
    "mixup": (0.4, {}),
    "cutmix": (1.0, {}),
    "mixed": (0.0, {"mixup": 0.4}),
    "features": (0.5, {}),
    "depth": (0.5, {}),
    "head_first": (0.5, {"features": 0.9}),
    "zoom": (0.9, {"size": 56}),
    "tone": (0.8, {"size": 56}),
    "mean": ((0.5,), {"std": (0.3,)}),
    "std": ((0.3,), {"mean": (0.29,)}),
    "distil": (0.5, {"teacher": True}),
    "temperature": (1.0, {"teacher": True, "distil": 0.5}),
}
# Their tests are below: they change when a training ends, and how it computes but not what.
APART = {"patience", "plain"}


def test_every_field_is_covered() -> None:
    assert {field.name for field in fields(Recipe)} == CHANGES.keys() | APART


@pytest.mark.parametrize("name", CHANGES)
def test_every_field_changes_what_is_learnt(splits, name: str) -> None:
    value, needed = CHANGES[name]
    needed = dict(needed)
    size, teacher = needed.pop("size", 28), needed.pop("teacher", False)
    base = replace(PLAIN, **needed)
    if name in ("mean", "std"):
        base = replace(base, mean=base.mean or (0.29,), std=base.std or (0.35,))
    changed = replace(base, **{name: value})
    assert not equal(trained(splits, base, size, teacher), trained(splits, changed, size, teacher))


def trained(splits, recipe: Recipe, size: int, teacher: bool) -> list[Tensor]:
    task = job(splits, recipe, size)
    if teacher:
        torch.manual_seed(5)
        task.teacher = create_model("squeezenet1_1", num_classes=10, in_chans=1, width=0.25, size=28, stem="cifar")
    return weights(task)


def test_the_same_recipe_gives_the_same_weights(splits) -> None:
    """Without which the test above would say nothing."""
    recipe = replace(PLAIN, operations=2, cutout=0.2, mixup=0.4, cutmix=0.4, shift=2, flip=True, balanced=True)
    assert equal(trained(splits, recipe, 28, False), trained(splits, recipe, 28, False))


def test_patience_ends_a_training_that_no_longer_learns(splits) -> None:
    still = replace(PLAIN, learning_rate=0.0)
    assert train(job(splits, still, epochs=20)).epochs == pytest.approx(20)
    task = job(splits, replace(still, patience=2), epochs=20)
    scored: list[float] = []
    task.emit = lambda record: scored.append(record["val_top1"])
    trained = train(task)
    assert trained.epochs < 20
    assert len(scored) - 1 - scored.index(max(scored)) == 2
    assert trained.accuracy == max(scored), "the best weights are kept"


@pytest.mark.parametrize("plain", [True, False])
def test_a_plain_recipe_computes_as_torch_does_by_itself(splits, plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(loop, "keep_freed_memory", lambda: asked.append("memory"))
    task = job(splits, replace(PLAIN, plain=plain))
    task.mode = None
    train(task)
    assert asked == ([] if plain else ["memory"])
    assert task.mode == "float32" or not plain
    filters = [leaf.weight for leaf in task.net.modules() if isinstance(leaf, nn.Conv2d) and leaf.kernel_size[0] > 1]
    deep = [weight for weight in filters if weight.shape[1] > 1]
    assert deep
    assert {weight.is_contiguous() for weight in deep} == {plain}


def test_the_baseline_is_what_the_tutorials_do() -> None:
    images = torch.randint(0, 256, (64, 32, 32, 3), dtype=torch.uint8, generator=rng())
    preprocess = preprocess_for(BASELINE, images.numpy())
    x, targets = augmented(images, torch.arange(64) % 10, 10, preprocess, BASELINE, rng(1))
    assert x.is_contiguous()
    assert torch.equal(targets, torch.arange(64) % 10)
    mean = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
    std = torch.tensor([0.2023, 0.1994, 0.2010]).view(3, 1, 1)
    padded = F.pad((images.permute(0, 3, 1, 2) / 255), (4, 4, 4, 4))  # black before it is normalised
    for picture, given in zip(x, padded, strict=True):
        crops = [given[:, i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
        crops += [crop.flip(2) for crop in crops]
        assert min(((crop - mean) / std - picture).abs().max() for crop in crops) < 1e-5
    optimiser = make(small_net(), BASELINE)
    assert type(optimiser) is torch.optim.Adam
    assert {group["weight_decay"] for group in optimiser.param_groups} == {0.0}
    assert {rate(BASELINE, p) for p in (0.0, 0.5, 1.0)} == {1e-3}
    assert (BASELINE.batch_size, BASELINE.label_smoothing, BASELINE.ema) == (128, 0.0, 0.0)


def test_recipes_have_names() -> None:
    assert recipe_named("default", 32) == recipe_for(32) != recipe_for(224) == recipe_named("default", 224)
    assert recipe_named("baseline", 32) is BASELINE
    assert recipe_named("fine-tuning", 224) is FINE_TUNING
    with pytest.raises(UsageError, match="default, baseline, fine-tuning"):
        recipe_named("best", 32)


@pytest.mark.parametrize("field", ["optimiser", "schedule", "border"])
def test_unknown_words_are_told(field: str) -> None:
    with pytest.raises(UsageError, match=f"recipe's {field} is one of .*, not 'other'"):
        Recipe(**{field: "other"})


def test_statistics_of_other_channels_are_told() -> None:
    with pytest.raises(UsageError, match="3 channels, not 1"):
        preprocess_for(BASELINE, np.zeros((4, 28, 28, 1), np.uint8))


@pytest.mark.parametrize(
    ("schedule", "middle", "end"), [("one-cycle", 0.5, 0.0), ("cosine", 0.5, 0.0), ("constant", 1.0, 1.0)]
)
def test_schedules_rise_alike_and_fall_apart(schedule: str, middle: float, end: float) -> None:
    recipe = Recipe(learning_rate=2.0, warm_up=0.2, schedule=schedule)
    assert rate(recipe, 0.1) == pytest.approx(1.0)
    assert rate(recipe, 0.2) == pytest.approx(2.0)
    assert rate(recipe, 0.6) == pytest.approx(2.0 * middle)
    assert rate(recipe, 1.0) == rate(recipe, 1.2) == pytest.approx(2.0 * end)
    quarter = {"one-cycle": 0.75, "cosine": (1 + 2**-0.5) / 2, "constant": 1.0}[schedule]
    assert rate(recipe, 0.4) == pytest.approx(2.0 * quarter)
    assert rate(replace(recipe, warm_up=0.0), 0.0) == 2.0


def test_pictures_grow_in_stages() -> None:
    recipe = Recipe(resize=((0.3, 0.5), (0.6, 0.75)))
    assert [side(recipe, p, 32) for p in (0.0, 0.29, 0.3, 0.59, 0.6, 1.0)] == [16, 16, 24, 24, 32, 32]
    x = torch.rand(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    small = shrunk(x, 16)
    torch.testing.assert_close(small[0, 0, 0, 0], x[0, 0, :2, :2].mean())
    assert small.is_contiguous(memory_format=torch.channels_last)
    assert shrunk(x, 32) is x


def test_stages_too_small_for_the_network_are_left_out_with_a_word(splits) -> None:
    task = job(splits, Recipe(resize=((0.3, 0.1), (0.6, 0.75))), epochs=1.0)
    said: list[str] = []
    task.note = said.append
    train(task)
    assert task.recipe.resize == ((0.6, 0.75),)
    assert [note for note in said if "3 pixels" in note] == [said[0]], "3 of 28 pixels, which its pools make nothing of"


@pytest.mark.parametrize("name", OPTIMISERS)
def test_every_optimiser_learns_a_batch(name: str, splits) -> None:
    data = splits.train.subset(np.arange(64))
    net = small_net().to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    recipe = Recipe(optimiser=name, others=1.0)
    optimiser = make(net, recipe)
    x = normalise(torch.from_numpy(data.batch(28)), preprocess_for(recipe, data.batch(28)))
    truth = torch.from_numpy(data.labels)
    before = [p.detach().clone() for p in net.parameters()]
    losses = []
    for _ in range(12):
        for group in optimiser.param_groups:
            group["lr"] = {"adam": 2e-3, "adamw": 2e-3, "muon": 0.02}.get(name, 0.05) * group["share"]
        loss = loss_of(net, x, truth, recipe)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        assert all(p.grad is None for p in net.parameters())
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    assert not any(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_rmsprop_is_that_of_inception_v3() -> None:
    (group, *_) = make(small_net(), Recipe(optimiser="rmsprop")).param_groups
    assert (group["alpha"], group["eps"], group["momentum"]) == (0.9, 1.0, 0.9)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_steps_are_orthogonal(layout: torch.memory_format) -> None:
    """After one step a hidden convolution has moved by a matrix whose singular values are all about alike."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3), nn.Conv2d(32, 32, 3, groups=32), nn.Flatten())
    net.append(nn.Linear(32 * 4, 2))
    net.to(memory_format=layout)  # type: ignore[call-overload]
    optimiser = make(net, Recipe(optimiser="muon", weight_decay=0.0))
    assert isinstance(optimiser, MuonWithSgd)
    before = net[1].weight.detach().clone()
    for group in optimiser.param_groups:
        group["lr"] = 0.1
    net(torch.randn(8, 3, 8, 8)).square().sum().backward()
    gradient = net[1].weight.grad.clone()  # type: ignore[union-attr]
    optimiser.step()
    moved = (before - net[1].weight.detach()) / 0.1
    sizes = torch.linalg.svdvals(moved.flatten(1))
    assert (sizes > 0.5).sum() >= 31, "of 32; the fixed number of iterations leaves the smallest behind"
    assert sizes.max() < 1.5
    u, _, v = torch.linalg.svd(gradient.flatten(1), full_matrices=False)
    assert F.cosine_similarity(moved.flatten(), (u @ v).flatten(), dim=0) > 0.95, "in the weights' own order"
    plain = torch.linalg.svdvals(gradient.flatten(1))
    assert plain.max() / plain.min() > 3 * sizes.max() / sizes.min()
    hidden = [weight for weight, _ in optimiser.views]
    assert len(hidden) == 1
    assert hidden[0] is net[1].weight


def test_muon_goes_on_from_what_was_stored() -> None:
    def steps(net: nn.Module, optimiser: torch.optim.Optimizer, count: int, start: int) -> None:
        for i in range(start, start + count):
            for group in optimiser.param_groups:
                group["lr"] = 0.05 * group["share"]
            net(torch.randn(4, 3, 6, 6, generator=rng(i))).square().mean().backward()
            optimiser.step()
            optimiser.zero_grad()

    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
        return net, make(net, Recipe(optimiser="muon", others=0.5))

    whole, optimiser = made()
    steps(whole, optimiser, 6, 0)
    first, optimiser = made()
    steps(first, optimiser, 3, 0)
    second, resumed = made()
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(optimiser.state_dict())
    steps(second, resumed, 3, 3)
    assert equal([*whole.state_dict().values()], [*second.state_dict().values()])


@pytest.mark.parametrize("mix", [augment.mixup, augment.cutmix])
def test_mixed_pictures_have_mixed_targets(mix: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Each picture is plain, and its value tells its class: so the pixels' mean must be that of the targets."""
    shares = []
    for seed in range(30):
        values = torch.arange(6.0)
        images = values.view(6, 1, 1, 1).expand(6, 1, 16, 16).clone()
        x, targets = mix(images, F.one_hot(torch.arange(6), 6).float(), 1.0, rng(seed))
        torch.testing.assert_close(x.mean(dim=(1, 2, 3)), targets @ values)
        torch.testing.assert_close(targets.sum(1), torch.ones(6))
        assert (targets > 0).sum(1).max() <= 2
        shares.append(targets.diagonal().mean().item())
        if mix is augment.cutmix:
            assert set(x.unique().tolist()) <= set(range(6))
    assert min(shares) < 0.3
    assert max(shares) > 0.7


def test_beta_has_its_mean_and_spread() -> None:
    for alpha in (0.2, 1.0, 2.0):
        generator = rng()
        drawn = torch.tensor([augment._beta(alpha, generator) for _ in range(2000)])
        assert drawn.mean() == pytest.approx(0.5, abs=0.03)
        assert drawn.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


def test_a_share_of_the_batches_is_mixed() -> None:
    images = torch.zeros(4, 8, 8, 1, dtype=torch.uint8)
    preprocess = preprocess_for(Recipe(), np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), dtype=np.uint8))
    recipe, generator = Recipe(mixup=1.0, cutmix=1.0, mixed=0.25), rng()
    kinds = [augmented(images, torch.arange(4), 4, preprocess, recipe, generator)[1].dtype for _ in range(300)]
    assert 0.15 < kinds.count(torch.float32) / 300 < 0.35


def test_varied_pictures_change_by_what_was_asked_for() -> None:
    images = torch.rand(200, 3, 24, 24, generator=rng())
    assert torch.allclose(augment.vary(images, 0, 1.0, rng()), images, atol=1e-4)
    assert torch.allclose(augment.vary(images, 5, 0.0, rng()), images, atol=1e-4)
    some = augment.vary(images, 1, 0.6, rng())
    level = (some.mean(dim=(1, 2, 3)) - images.mean(dim=(1, 2, 3))).abs()
    spread = (some.std(dim=(1, 2, 3)) / images.std(dim=(1, 2, 3)) - 1).abs()
    bright = level > 0.02
    assert 0.1 < bright.float().mean() < 0.3, "one operation of five"
    assert level.max() < 0.61 + 0.05
    torch.testing.assert_close(spread[bright], torch.zeros(int(bright.sum())), atol=1e-3, rtol=0)
    all_of_them = augment.vary(images, 5, 0.6, rng())
    assert ((all_of_them - images).abs().mean(dim=(1, 2, 3)) > 0.05).float().mean() > 0.9


def test_a_balanced_epoch_draws_every_class_equally_often() -> None:
    labels = np.repeat([0, 1, 2], [80, 15, 5])
    order = epoch_order(labels, True, np.random.default_rng(0))
    assert len(order) == 100
    assert sorted(np.bincount(labels[order]).tolist()) in ([32, 34, 34], [33, 33, 34])
    counts = np.bincount(order, minlength=100)
    assert counts[labels == 0].max() == 1
    assert counts[labels == 2].min() >= 6, "the few are used up before any comes again"
    assert sorted(epoch_order(labels, False, np.random.default_rng(0))) == list(range(100))


def test_a_teacher_s_answers_draw_the_student_s() -> None:
    torch.manual_seed(0)
    student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
    x, truth = torch.randn(16, 4), torch.randint(0, 3, (16,))
    recipe = Recipe(label_smoothing=0.0, distil=0.3, temperature=2.0)
    hard = F.cross_entropy(student(x), truth)
    p, q = (teacher(x) / 2).softmax(1), (student(x) / 2).softmax(1)
    soft = 4 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(loss_of(student, x, truth, recipe, teacher), 0.7 * hard + 0.3 * soft)
    torch.testing.assert_close(loss_of(student, x, truth, recipe), hard)
    loss_of(student, x, truth, recipe, teacher).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert distance(teacher(x), teacher(x), 2.0).item() == pytest.approx(0, abs=1e-6)


def test_auxiliary_heads_learn_at_their_weight_and_mixed_targets_are_theirs_too() -> None:
    torch.manual_seed(0)
    net = create_model("googlenet", num_classes=4, size=64, width=0.25, aux=True).eval()
    x, targets = torch.randn(2, 3, 64, 64), torch.tensor([[0.7, 0.3, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
    outputs, others = net.forward_aux(x)
    assert len(others) == 2
    main, *aux = (-(targets * each.log_softmax(1)).sum(1).mean() for each in (outputs, *others))
    expected = main + net.aux_weight * sum(aux)
    torch.testing.assert_close(loss_of(net, x, targets, Recipe(label_smoothing=0.0)), expected)


def test_batch_statistics_are_taken_anew_without_dropout() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Dropout(0.9), nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    batches = [torch.randn(8, 2, 5, 5) * (i + 1) for i in range(4)]
    norm = net[2]
    assert isinstance(norm, nn.BatchNorm2d)
    norm.train()(torch.randn(8, 3, 5, 5) + 100)  # statistics of before
    kept = [p.clone() for p in net.parameters()]
    reestimate(net, batches)
    found = [net[1](x) for x in batches]
    torch.testing.assert_close(norm.running_mean, torch.stack([f.mean(dim=(0, 2, 3)) for f in found]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([f.var(dim=(0, 2, 3)) for f in found]).mean(0))
    assert norm.momentum == 0.1
    assert not any(module.training for module in net.modules())
    assert all(torch.equal(a, b) for a, b in zip(kept, net.parameters(), strict=True))


def test_channels_are_normalised_each_by_its_own() -> None:
    images = torch.randint(0, 256, (3, 8, 10, 3), dtype=torch.uint8, generator=rng())
    preprocess = replace(preprocess_for(BASELINE, images.numpy()), size=(8, 10))
    x = normalise(images, preprocess)
    assert x.is_contiguous(memory_format=torch.channels_last)
    expected = (images.double() - torch.tensor(preprocess.mean)) / torch.tensor(preprocess.std)
    torch.testing.assert_close(x, expected.permute(0, 3, 1, 2).float())
