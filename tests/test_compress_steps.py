"""The frame of compression on real pictures: steps that chain, records that tell what each bought and cost."""

import json
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from flyweight.bench.measure import Latency
from flyweight.compress.prune import Prune
from flyweight.compress.step import Context, Figures, compress, repair_recipe, told
from flyweight.costs import cost
from flyweight.create import create_model
from flyweight.data import Splits, open_source, prepare
from flyweight.errors import FlyweightError
from flyweight.evaluation import evaluate
from flyweight.net import Net
from flyweight.preprocess import Preprocess
from flyweight.records import Record, Records
from flyweight.ship import write_network
from flyweight.train.loop import Clock, Training, train
from flyweight.train.recipe import recipe_for


@pytest.fixture(scope="module")
def splits() -> Splits:
    """Real pictures: the data that comes along."""
    return prepare(open_source("demo"), [28])


@pytest.fixture(scope="module")
def trained(splits: Splits) -> tuple[Net, Preprocess]:
    """A network that was trained for some seconds."""
    torch.manual_seed(0)
    net = create_model("resnet8_cifar", num_classes=10, in_chans=1, size=28, width=0.5)
    preprocess = Preprocess.of(splits.train.batch(28, np.arange(1000)))
    recipe = replace(recipe_for(28), learning_rate=0.2, batch_size=64, resize=())
    train(Training(net, splits.train, splits.validation, preprocess, recipe, Clock(epochs=2), mode="float32"))
    return net, preprocess


@pytest.fixture
def context(splits: Splits, trained: tuple[Net, Preprocess], tmp_path: Path) -> Context:
    recipe = replace(repair_recipe(28), batch_size=64)
    records = Records(tmp_path, lambda: 0.0)
    return Context(
        splits.train, splits.validation, trained[1], recipe, epochs=1.0, records=records, mode="float32",
        teacher=trained[0],
    )  # fmt: skip


def kept(context: Context, kind: str) -> list[Record]:
    assert context.records is not None
    return context.records.all(kind)


def copied(net: Net) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def unchanged(net: Net, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_half_of_the_macs_go_and_training_brings_the_accuracy_back(
    trained: tuple[Net, Preprocess], splits: Splits, context: Context, tmp_path: Path
) -> None:
    net, preprocess = trained
    before, context.latency = copied(net), True
    untrained = Prune(macs=0.5, rounds=1)(net, replace(context, records=None, epochs=1e-6))
    context.mode = "float32"
    pruned = compress(net, [Prune(macs=0.5, rounds=2)], context)
    assert unchanged(net, before)
    [record] = kept(context, "compression")
    assert record["step"] == "prune"
    assert record["settings"]["macs"] == 0.5
    old, new = record["before"], record["after"]
    assert old["macs"] == cost(net).macs
    assert new["macs"] == cost(pruned).macs <= 0.5 * old["macs"]
    assert new["params"] == cost(pruned).params < old["params"]
    assert new["size_bytes"] == len(context.exported(pruned)) < old["size_bytes"]
    assert old["latency_ms"] > 0 < new["latency_ms"]
    assert "of the time" in record["note"]
    assert old["val_top1"] == context.accuracy(net) > 0.6
    assert new["val_top1"] == context.accuracy(pruned) > old["val_top1"] - 0.04
    assert context.accuracy(untrained) < new["val_top1"] - 0.02  # it was training that brought it back
    rounds = kept(context, "pruned")
    assert [each["rounds_left"] for each in rounds] == [1, 0]
    assert rounds[-1]["spec"] == json.loads(json.dumps(pruned.spec.to_json()))
    assert {each["stage"] for each in kept(context, "epoch")} == {"compress"}
    write_network(tmp_path, pruned, "resnet8_cifar", preprocess, splits.train.classes)
    found = evaluate(tmp_path, "demo", "validation")
    assert found["top1"] == pytest.approx(new["val_top1"], abs=1e-3)


def test_a_size_is_met_by_the_file_itself(trained: tuple[Net, Preprocess], context: Context) -> None:
    net, _ = trained
    context.epochs = 0.02
    limit = int(0.6 * len(context.exported(net)))
    pruned = Prune(size=limit, rounds=1, importance="l1")(net, context)
    assert 0.4 * limit < len(context.exported(pruned)) <= limit


@dataclass
class Measured(Context):
    """Latencies as if they were so much for a file, and so much for each of its bytes."""

    constant: float = 0.0
    each: float = 1e-5

    def speeds(self, models: Any, seconds: float = 0.5) -> list[Latency]:
        return [
            Latency(value, value, value, "bytes", 1, 1)
            for value in (self.constant + self.each * len(model) for model in models)
        ]


def measured(context: Context, **changes: float) -> Measured:
    fields: dict[str, Any] = {name: getattr(context, name) for name in Context.__dataclass_fields__}
    return Measured(**{**fields, "epochs": 0.02, **changes})


def test_a_latency_is_met_with_as_many_channels_as_it_allows(trained: tuple[Net, Preprocess], context: Context) -> None:
    net, stand_in = trained[0], measured(context)
    limit = 0.7 * stand_in.speeds([context.exported(net)])[0].p50
    pruned = Prune(latency=limit, rounds=1, importance="l1")(net, stand_in)
    found = stand_in.speeds([context.exported(pruned)])[0].p50
    assert 0.8 * limit < found <= limit
    assert len(kept(context, "pruned_latency")) > 2


def test_a_latency_out_of_reach_is_told_before_anything_is_trained(
    trained: tuple[Net, Preprocess], context: Context
) -> None:
    with pytest.raises(FlyweightError, match=r"pruning cannot reach 1 ms: the network takes .* ms with the fewest"):
        Prune(latency=1.0, importance="l1")(trained[0], measured(context, constant=1.0))
    assert not kept(context, "epoch")


def test_what_is_within_the_limit_stays_as_it_is(trained: tuple[Net, Preprocess], context: Context) -> None:
    assert Prune(size=10**8, importance="l1")(trained[0], context) is trained[0]
    assert Prune(latency=10.0**6, importance="l1")(trained[0], measured(context)) is trained[0]
    assert "nothing is pruned" in kept(context, "log")[-1]["message"]


@dataclass(frozen=True)
class Scaled:
    """A step of one's own: the classifier's weights times a factor."""

    factor: float
    name: ClassVar[str] = "scaled"

    def __call__(self, net: Net, context: Context) -> Net:
        scaled = create_model("resnet8_cifar", num_classes=10, in_chans=1, size=28, width=0.5).eval()
        scaled.load_state_dict(net.state_dict())
        with torch.no_grad():
            fc = scaled.get_classifier()
            assert isinstance(fc, nn.Linear)
            fc.weight.mul_(self.factor)
            fc.bias.mul_(self.factor)
        return scaled


def test_steps_chain_and_each_leaves_a_record(trained: tuple[Net, Preprocess], context: Context) -> None:
    net = trained[0]
    before = copied(net)
    last = compress(net, [Scaled(-1.0), Scaled(-2.0)], context)
    first, second = kept(context, "compression")
    assert [each["settings"] for each in (first, second)] == [{"factor": -1.0}, {"factor": -2.0}]
    assert first["after"] == second["before"]
    assert first["after"]["val_top1"] < 0.3 < second["after"]["val_top1"] == first["before"]["val_top1"]
    assert first["before"]["latency_ms"] is None  # not asked for
    assert unchanged(net, before)
    pictures = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(last(pictures), 2 * net(pictures), atol=1e-4, rtol=1e-4)


def test_the_step_of_the_instructions(trained: tuple[Net, Preprocess], context: Context) -> None:
    """What CONTRIBUTING.md shows is a step."""
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    code = textwrap.dedent(text.partition("## A compression step")[2].partition("```python\n")[2].partition("```")[0])
    known: dict[str, Any] = {}
    exec(code, known)
    rounded = compress(trained[0], [known["Round"](digits=1)], context)
    [record] = kept(context, "compression")
    assert (record["step"], record["settings"]) == ("round", {"digits": 1})
    assert record["after"]["packed_bytes"] < 0.5 * record["before"]["packed_bytes"]
    assert all(torch.equal(weight, weight.round(decimals=1)) for weight in rounded.parameters())


def test_training_that_diverges_starts_again_slower_and_at_last_gives_up(
    trained: tuple[Net, Preprocess], context: Context
) -> None:
    net = Scaled(1.0)(trained[0], context)
    context.recipe, context.epochs = replace(context.recipe, learning_rate=1e30, warm_up=0.0), 0.05
    before = copied(net)
    with pytest.raises(FlyweightError, match="diverges at every learning rate"):
        context.fine_tune(net)
    assert [each["message"].split(":")[0] for each in kept(context, "log")] == [
        "fine-tuning starts again at half the learning rate"
    ] * 4
    assert unchanged(net, before)


BEFORE = Figures(1000, 1000, 4000, 1000, 0.9, 1.0)
LEFT = "50.0 % of the MACs and 40.0 % of the packed bytes are left, at"


@pytest.mark.parametrize(
    ("after", "sentence"),
    [
        (Figures(500, 500, 2000, 400, 0.88), f"{LEFT} -2.00 points"),
        (
            Figures(500, 500, 2000, 400, 0.91, 0.5),
            f"{LEFT} +1.00 points and 50.0 % of the time (1 to 0.5 ms)",
        ),
        (
            Figures(500, 500, 2000, 400, 0.9, 0.97),
            f"{LEFT} +0.00 points and 97.0 % of the time (1 to 0.97 ms): the MACs that are gone bought no time",
        ),
    ],
)
def test_what_a_step_bought_is_told_plainly(after: Figures, sentence: str) -> None:
    assert told(BEFORE, after) == sentence
