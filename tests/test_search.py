"""The budget's grammar, the candidates, and successive halving."""

from dataclasses import replace
from itertools import pairwise

import pytest

from flyweight.bench.measure import Latency
from flyweight.compress.precision import FLOAT, Variant, choose
from flyweight.errors import UsageError
from flyweight.search.budget import Budget, Limit, parse_time
from flyweight.search.space import candidates, estimate_cost, input_sizes, ranked, screen
from flyweight.search.strategy import Rung, forecast, halve, plan
from flyweight.stages import next_of_family
from flyweight.zoo import families, smallest_input


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("latency<=2ms", Limit("latency", "<=", 2.0)),
        ("latency <= 500us", Limit("latency", "<=", 0.5)),
        ("latency<=0.1s", Limit("latency", "<=", 100.0)),
        ("size<=500KB", Limit("size", "<=", 500_000)),
        ("size<=500KiB", Limit("size", "<=", 512_000)),
        ("Size<=1.5MB", Limit("size", "<=", 1_500_000)),
        ("memory<=2MiB", Limit("memory", "<=", 2 * 1024**2)),
        ("memory<=4096B", Limit("memory", "<=", 4096)),
        ("macs<=50M", Limit("macs", "<=", 5e7)),
        ("params≤300k", Limit("params", "<=", 3e5)),
        ("params<=1G", Limit("params", "<=", 1e9)),
        ("accuracy>=90%", Limit("accuracy", ">=", 0.9)),
        ("accuracy>=0.9", Limit("accuracy", ">=", 0.9)),
    ],
)
def test_limits_are_read(text: str, limit: Limit) -> None:
    (read,) = Budget.parse(text).limits
    assert (read.name, read.op, read.value) == (limit.name, limit.op, pytest.approx(limit.value))


def test_several_limits_in_one_string_or_several() -> None:
    assert Budget.parse("latency<=2ms, size<=500KB") == Budget.parse(["latency<=2ms", "size<=500KB"])


@pytest.mark.parametrize(
    "text",
    ["", " , ", "latency", "latency<=", "latency<=2", "latency>=2ms", "latency=2ms", "speed<=2ms", "size<=2ms",
     "size<=-1KB", "size<=0KB", "size<=1.2.3KB", "accuracy<=90%", "accuracy>=101%", "size<=1KB, size<=2KB",
     "macs<=1MB", "latency<=nanms"],
)  # fmt: skip
def test_a_bad_budget_shows_the_grammar(text: str) -> None:
    with pytest.raises(UsageError, match=r"latency<=2ms|once"):
        Budget.parse(text)


def test_verdicts_and_excess() -> None:
    budget = Budget.parse("size<=100KB, accuracy>=80%")
    lines = budget.check({"size": 150_000, "accuracy": 0.8})
    assert [line["met"] for line in lines] == [False, True]
    assert budget.excess({"size": 150_000, "accuracy": 0.8}) == pytest.approx(0.5)
    assert budget.excess({"accuracy": 0.6}) == pytest.approx(0.25)
    assert budget.excess({}) == 0


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400), ("45", 45), (30, 30), ("2min", 120)]
)
def test_times_are_read(text: str | float, seconds: float) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "ten", "0s", "-5m", "10x", "1.2.3s", ".", 0, float("nan")])
def test_bad_times_are_refused(text: str | float) -> None:
    with pytest.raises(UsageError, match="is no time"):
        parse_time(text)


@pytest.mark.parametrize(
    ("native", "sizes"),
    [
        ((32, 32), (24, 32)),
        ((28, 28), (20, 28)),
        ((16, 16), (16,)),
        ((8, 9), (16,)),
        ((50, 70), (50,)),
        ((224, 300), (64, 96, 128, 160)),
        ((100, 120), (64, 96)),
    ],
)
def test_input_sizes_follow_the_pictures(native: tuple[int, int], sizes: tuple[int, ...]) -> None:
    assert input_sizes(native) == sizes


def test_every_family_competes_and_every_candidate_can_be_costed() -> None:
    pool = candidates((24, 32, 64), 3, 10)
    for candidate in pool:
        estimate_cost(candidate)
        if smallest_input(candidate.spec) > candidate.spec.input[1]:
            assert candidate.why == f"needs larger pictures than {candidate.spec.input[1]} pixels"
        else:
            assert candidate.status == "not tried", candidate.why
            assert candidate.cost is not None
    assert {c.spec.family for c in pool if c.spec.input[1] == 64} == {
        c.spec.family for c in pool if c.spec.input[1] == 24
    }
    assert len({c.name for c in pool}) == len(pool)
    assert {c.spec.family for c in pool} == set(families())


@pytest.mark.parametrize("text", ["macs<=1M", "params<=20k", "memory<=60KB", "size<=20KB"])
def test_screening_drops_exactly_what_breaks_a_limit(text: str) -> None:
    budget, pool = Budget.parse(text), candidates((32,), 3, 10)
    for candidate in pool:
        estimate_cost(candidate)
        screen(candidate, budget)
        measured = candidate.measured() | {"size": 0.4 * candidate.cost.weight_values}  # type: ignore[union-attr]
        assert (candidate.status == "dropped") == (budget.excess(measured) > 0)
        assert (text.partition("<")[0] in candidate.why) == (candidate.status == "dropped")
    assert 0 < sum(candidate.status == "dropped" for candidate in pool) < len(pool)


def test_ranking_begins_with_the_family_that_trains_fastest_at_its_own_size() -> None:
    pool = candidates((32,), 3, 10)
    for candidate in pool:
        estimate_cost(candidate)
    order = ranked(pool, lambda family: 60e6 if family == "mobilenet_v1" else 5e6)
    assert order[0].name == "mobilenet_v1_cifar x1 @32"
    assert all(candidate.macs < 30e6 for candidate in order[1:5])


def test_the_next_of_a_family_takes_the_turn_of_what_falls() -> None:
    pool = candidates((32,), 3, 10)
    nin = [each for each in pool if each.spec.family == "nin"]
    others = [each for each in pool if each.spec.family in ("resnet", "alexnet")]
    order = next_of_family([*others, *nin[1:]], nin[0])
    assert order == [nin[1], *others, *nin[2:]]
    assert next_of_family(others, nin[0]) == others


def test_ranking_takes_turns_among_families() -> None:
    pool = candidates((32,), 3, 10)
    for candidate in pool:
        estimate_cost(candidate)
    order = ranked(pool, lambda family: 20e6)
    assert sorted(c.name for c in order) == sorted(c.name for c in pool)
    families = {c.spec.family for c in pool}
    assert {c.spec.family for c in order[: len(families)]} == families


@pytest.mark.parametrize(("count", "seconds"), [(2, 20), (6, 120), (30, 120), (30, 1000), (7, 60)])
def test_a_plan_fits_the_time_and_halves(count: int, seconds: float) -> None:
    rungs = plan(count, seconds, shortest=5)
    assert sum(rung.candidates * rung.seconds for rung in rungs) == pytest.approx(seconds)
    assert rungs[0].candidates <= count
    assert rungs[0].seconds >= 5
    for this, following in pairwise(rungs):
        assert following.seconds == pytest.approx(2 * this.seconds)
        assert following.candidates == -(-this.candidates // 2)


def test_no_plan_without_a_choice_or_time() -> None:
    assert plan(1, 100, 5) == []
    assert plan(8, 4, 5) == []


def test_halving_finds_the_best_of_those_tried() -> None:
    asked: list[tuple[int, int]] = []

    def evaluate(candidate: int, rung: int, seconds: float) -> float | None:
        asked.append((candidate, rung))
        return None if candidate == 9 else float(candidate)

    order = halve([3, 9, 5, 1, 7, 2], plan(6, 120, 5)[:1] + plan(3, 60, 5)[:1], evaluate)
    assert order[0] == 7
    assert 9 not in order
    assert sum(rung == 1 for _, rung in asked) == 3
    assert halve([4, 2], [], evaluate) == [4, 2]


@pytest.mark.parametrize(
    ("scores", "doublings", "expected"),
    [
        ([0.5], 4, 0.5),
        ([0.5, 0.75], 0, 0.75),
        ([0.5, 0.75], 2, 1 - 0.25 / 4),
        ([0.5, 0.9], 1, 0.95),  # more than half of the error never falls at once
        ([0.5, 0.4], 3, 0.4),
        ([1.0, 1.0], 3, 1.0),
    ],
)
def test_the_error_falls_as_a_power_of_the_time(scores: list[float], doublings: float, expected: float) -> None:
    assert forecast(scores, doublings) == pytest.approx(expected)


def test_what_learns_fast_at_first_is_overtaken() -> None:
    """Accuracies of two networks on CIFAR-10 after 10 and 20 seconds."""
    found = {"alexnet": (0.590, 0.669), "airbench": (0.493, 0.657)}
    rungs = [Rung(2, 10.0), Rung(2, 20.0)]
    assert halve(["alexnet", "airbench"], rungs, lambda name, rung, seconds: found[name][rung])[0] == "alexnet"
    assert halve(["alexnet", "airbench"], rungs, lambda name, rung, seconds: found[name][rung], 400.0)[0] == "airbench"


def variant(name: str, accuracy: float, ms: float, excess: float = 0.0, agrees: bool = True) -> Variant:
    data, speed = b"x" * (400 if name == FLOAT else 100), Latency(ms, ms, ms, "onnxruntime", 1, 9)
    return Variant(name, data, speed, accuracy, {}, excess, agrees)


@pytest.mark.parametrize(
    ("variants", "ships", "because"),
    [
        ([variant(FLOAT, 0.9, 3), variant("a", 0.898, 1), variant("b", 0.897, 0.9)], "b", "times faster"),
        ([variant(FLOAT, 0.9, 3), variant("a", 0.898, 1), variant("b", 0.89, 0.5)], "a", "times faster"),
        ([variant(FLOAT, 0.9, 3), variant("a", 0.88, 1)], FLOAT, "loses 2.00 points"),
        ([variant(FLOAT, 0.9, 1), variant("a", 0.9, 2)], FLOAT, "slower here"),
        ([variant(FLOAT, 0.9, 1, excess=0.2), variant("a", 0.8, 2)], "a", "only precision within the budget"),
        ([variant(FLOAT, 0.9, 1, excess=0.2), variant("a", 0.8, 2, excess=0.1)], "a", "only precision"),
        ([variant(FLOAT, 0.9, 1, excess=0.2), variant("a", 0.8, 2, agrees=False)], FLOAT, "shipped"),
        ([variant("a", 0.8, 1, agrees=False), variant("b", 0.89, 2, excess=0.1)], "b", "only precision"),
    ],
)
def test_the_precision_that_ships(variants: list[Variant], ships: str, because: str) -> None:
    shipped = choose(variants)
    assert shipped.format == ships
    assert because in shipped.why
    assert all(each.why for each in variants)


@pytest.mark.parametrize(("loss", "ships"), [(0.008, "openvino-bf16"), (0.012, "onnxruntime")])
def test_bfloat16_is_chosen_as_int8_is(loss: float, ships: str) -> None:
    full, half = variant(FLOAT, 0.9, 3), variant(FLOAT, 0.9 - loss, 1)
    half.latency = replace(half.latency, engine="openvino-bf16")
    shipped = choose([full, half])
    assert shipped.latency.engine == ships
    assert ("3.0 times faster than float32" if shipped is half else "bfloat16 loses 1.20 points") in shipped.why
