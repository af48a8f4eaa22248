"""Given splits stay; what is missing is held out in proportion, by the seed, with every class in every split."""

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from flyweight.data.split import complete, held_out_count, split_problems


def labels_of(*counts: int) -> NDArray[np.int64]:
    return np.repeat(np.arange(len(counts)), counts)


def none_repeated(labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    return np.zeros(len(labels), dtype=np.bool_)


@pytest.mark.parametrize(("n", "count"), [(10, 2), (960, 192), (5_000, 1_000), (8_000, 1_000), (10_000, 1_000),
                                          (30_000, 3_000), (50_000, 5_000), (1_000_000, 5_000)])  # fmt: skip
def test_how_many_are_held_out(n: int, count: int) -> None:
    assert held_out_count(n) == count


def test_more_data_never_hold_out_less() -> None:
    assert all(held_out_count(n) <= held_out_count(n + 1) for n in range(1, 12_000))


@pytest.mark.parametrize("given", [[""], ["train"], ["train", "test"], ["train", "validation"],
                                   ["train", "validation", "test"]])  # fmt: skip
def test_given_splits_stay_and_the_rest_is_stratified(given: list[str]) -> None:
    labels = np.tile(labels_of(200, 100, 40), len(given))
    splits = np.repeat(given, 340)
    completed = complete(splits, labels, none_repeated(labels), seed=3)
    assert set(completed.tolist()) == {"train", "validation", "test"}
    for name in ("validation", "test"):
        assert not (completed[(splits == name)] != name).any()
        if name not in given:
            drawn = np.bincount(labels[completed == name])
            assert np.allclose(drawn / drawn.sum(), [200 / 340, 100 / 340, 40 / 340], atol=0.02)
    pool = 340
    if "test" not in given:
        assert (completed == "test").sum() == held_out_count(pool)
        pool -= held_out_count(pool)
    if "validation" not in given:
        assert (completed == "validation").sum() == held_out_count(pool)


def test_the_seed_decides() -> None:
    labels = labels_of(50, 50)
    blank = np.full(100, "")
    first, same, other = (complete(blank, labels, none_repeated(labels), seed) for seed in (0, 0, 1))
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)


def test_rare_classes_reach_every_split() -> None:
    labels = labels_of(1000, 3, 4)
    completed = complete(np.full(1007, ""), labels, none_repeated(labels), seed=0)
    for label in range(3):
        assert set(completed[labels == label].tolist()) == {"train", "validation", "test"}


def test_at_most_5000_are_held_out() -> None:
    labels = np.random.default_rng(0).integers(0, 100, 80_000)
    completed = complete(np.full(80_000, ""), labels, none_repeated(labels), seed=0)
    assert (completed == "test").sum() == (completed == "validation").sum() == 5_000


def test_repeated_images_stay_in_training_while_there_are_others() -> None:
    labels = labels_of(100, 10)
    repeated = np.arange(110) % 2 == 0
    repeated[100:] = True
    completed = complete(np.full(110, ""), labels, repeated, seed=0)
    held_out = completed != "train"
    assert not (held_out & repeated)[:100].any()
    assert held_out[:100].any()
    assert held_out[100:].sum() >= 2, "a class of repeats alone is held out all the same"


def test_too_few_images_are_named_with_how_many_it_takes() -> None:
    problems = split_problems(labels_of(9, 2, 1), np.full(12, ""), ("a", "b", "c"))
    assert [problem.split(":")[0] for problem in problems] == [
        "the class b has 2 images to train on, but needs 3, one each for train, test and validation",
        "the class c has 1 image to train on, but needs 3, one each for train, test and validation",
    ]
    given = np.array(["train", "train", "test", "validation"])
    assert split_problems(np.array([0, 1, 0, 1]), given, ("a", "b")) == []
    two = split_problems(np.array([0, 0, 1, 0, 1]), np.array(["train"] * 3 + ["test"] * 2), ("a", "b"))
    assert len(two) == 1
    assert "needs 2" in two[0]


def test_shares_are_fair_for_many_small_classes() -> None:
    labels = labels_of(*[7] * 100)
    completed = complete(np.full(700, "train"), labels, none_repeated(labels), seed=0)
    drawn = np.bincount(labels[completed == "test"])
    assert drawn.sum() == held_out_count(700)
    assert all(abs(a - b) <= 1 for a, b in pairwise(drawn.tolist()))
