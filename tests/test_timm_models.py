"""The zoo in timm's registry, and what timm's factory makes of it; scripts/timm_tests.py runs timm's own tests."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flyweight.create import create_model
from flyweight.errors import UsageError
from flyweight.net import Spec
from flyweight.preprocess import Preprocess
from flyweight.pretrained import table
from flyweight.ship import write_network
from flyweight.timm_models import PREFIX, config, native_config, native_name, register
from flyweight.weights import load_net, net_bytes
from flyweight.zoo import list_models, spec_of, structure

STEM = "features.stem.conv.weight"


@pytest.fixture
def timm() -> Any:
    module = pytest.importorskip("timm", reason="timm is not installed")
    register()
    return module


def test_without_timm_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.models", None)
    with pytest.raises(UsageError, match="pip install timm"):
        register()


def test_every_network_is_listed_once(timm: Any) -> None:
    names = register()
    assert sorted(names) == sorted(timm.list_models(f"{PREFIX}*")) == sorted(timm.list_models(module="flyweight"))
    assert [name.removeprefix(PREFIX) for name in names] == list_models()
    assert timm.list_models(f"{PREFIX}*", pretrained=True) == []


def test_features_of_a_grey_picture(timm: Any) -> None:
    net = timm.create_model("fw_squeezenet1_1", num_classes=10, in_chans=1, features_only=True, out_indices=(1, -1))
    features = net(torch.zeros(2, 1, 96, 96))
    assert [tuple(feature.shape) for feature in features] == [(2, 128, 23, 23), (2, 512, 5, 5)]
    assert net.feature_info.channels() == [128, 512]
    assert (net.in_chans, net.default_cfg["first_conv"]) == (1, "features.stem.conv")


def test_auxiliary_heads_are_off_unless_asked_for(timm: Any) -> None:
    assert len(timm.create_model("fw_googlenet").aux) == 0
    assert len(timm.create_model("fw_googlenet", aux=True).aux) == 2


def test_an_argument_that_no_network_takes_is_a_type_error(timm: Any) -> None:
    with pytest.raises(TypeError, match="takes no 'patch_size'"):
        timm.create_model("fw_mobilenet_v1", patch_size=16)


def test_timm_places_and_converts_the_network(timm: Any) -> None:
    net = timm.create_model("fw_mobilenet_v1_cifar", device="meta", dtype=torch.bfloat16)
    assert {(tensor.device.type, tensor.dtype) for tensor in net.parameters()} == {("meta", torch.bfloat16)}


def test_pooling_is_chosen_by_its_name_in_timm(timm: Any) -> None:
    net = timm.create_model("fw_mobilenet_v1_cifar", num_classes=0, global_pool="")
    assert net(torch.zeros(1, 3, 32, 32)).shape == (1, 1024, 2, 2)


@pytest.mark.parametrize(("num_classes", "in_chans"), [(5, 3), (7, 3), (5, 1)])
def test_weights_of_a_file_are_adapted_as_timm_does(timm: Any, tmp_path: Path, num_classes: int, in_chans: int) -> None:
    trained = create_model("mobilenet_v1_cifar", num_classes=5, width=0.25)
    (tmp_path / "model.safetensors").write_bytes(net_bytes(trained))
    source = {"file": str(tmp_path / "model.safetensors"), "num_classes": 5}
    wanted = {"num_classes": num_classes, "in_chans": in_chans, "width": 0.25}
    net = timm.create_model("fw_mobilenet_v1_cifar", True, pretrained_cfg_overlay=source, **wanted)
    ours, theirs = trained.state_dict(), net.state_dict()
    reshaped = {name for name in ours if theirs[name].shape != ours[name].shape}
    classifier = {"head.fc.weight", "head.fc.bias"} if num_classes != 5 else set()
    assert reshaped == classifier | ({STEM} if in_chans != 3 else set())
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() - reshaped)
    torch.testing.assert_close(theirs[STEM].sum(dim=1), ours[STEM].sum(dim=1))


@pytest.mark.parametrize("name", list_models())
def test_the_configuration_rebuilds_the_network(name: str) -> None:
    with torch.device("meta"):
        net = structure(spec_of(name, width=0.5, num_classes=7, in_chans=1, drop_rate=0.1))
    found = json.loads(json.dumps(config(net)))
    size = found["model_args"].pop("size")
    again = spec_of(found["architecture"].removeprefix(PREFIX), size=tuple(size), **found["model_args"])
    if len(net.aux):
        again = Spec(again.family, {k: v for k, v in again.args.items() if k != "aux"}, again.input)
    assert again.family == net.spec.family
    assert again.input == net.spec.input
    assert json.dumps(dict(again.args), sort_keys=True) == json.dumps(dict(net.spec.args), sort_keys=True)


def test_the_configuration_of_a_pruned_network_tells_its_widths() -> None:
    widths = {"features.stem.conv": 60}
    with torch.device("meta"):
        whole, pruned = (structure(spec_of("squeezenet1_1", widths=given)) for given in (None, widths))
    assert "widths" not in config(whole)["model_args"]
    assert config(pruned)["architecture"] == "fw_squeezenet1_1"
    assert config(pruned)["model_args"] == {**config(whole)["model_args"], "widths": widths}
    assert native_name(spec_of("resnet18")) == "resnet18"
    assert native_name(spec_of("resnet18", widths={"features.stage1_block1.body.conv1.conv": 60})) is None


GOLDEN = json.loads((Path(__file__).parent / "golden" / "foreign.json").read_text(encoding="utf-8"))
IN_TIMM = [
    (name, record["args"], record["source"].removeprefix("timm "))
    for name, records in GOLDEN.items() for record in records if record["source"].startswith("timm ")
]  # fmt: skip
PUBLISHED = [
    (source.model, source.args, source.name.split(".")[0])
    for sources in table().values() for source in sources if source.library == "timm" and not source.args.get("aux")
]  # fmt: skip


@pytest.mark.parametrize(("name", "args", "theirs"), [*IN_TIMM, *PUBLISHED])
def test_what_timm_has_is_known_by_its_name(name: str, args: dict[str, Any], theirs: str) -> None:
    spec = spec_of(name, **{**args, "num_classes": 7, "in_chans": 1})
    assert native_name(spec) == theirs
    assert native_name(spec.with_args(act="silu")) is None


def test_the_configuration_for_timm_alone() -> None:
    net = create_model("mobilenet_v2", width=0.5, num_classes=7, in_chans=1, size=(96, 64))
    assert native_config(net, Preprocess((96, 64), 1, (51.0,), (102.0,))) == {
        "architecture": "mobilenetv2_050",
        "num_classes": 7,
        "pretrained_cfg": {
            "input_size": [1, 96, 64], "pool_size": [3, 2], "mean": [0.2], "std": [0.4], "interpolation": "bilinear",
            "crop_pct": 1.0, "crop_mode": "squash", "first_conv": "conv_stem", "classifier": "classifier",
        },
    }  # fmt: skip
    assert native_config(create_model("mobilenet_v2", width=0.125)) is None


@pytest.mark.parametrize("widths", [{}, {"features.stem.conv": 5, "features.block2.pointwise.conv": 20}])
def test_a_folder_of_ours_in_timm(timm: Any, tmp_path: Path, widths: dict[str, int]) -> None:
    net = create_model("mobilenet_v1_cifar", width=0.25, num_classes=3, in_chans=1, size=28, widths=widths)
    write_network(tmp_path, net, "a name", Preprocess((28, 28), 1, (120.0,), (60.0,)), ("a", "b", "c"))
    theirs, ours = (
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval(),
        load_net(tmp_path / "model.safetensors"),
    )
    pictures = torch.randn(2, 1, 28, 28)
    assert torch.equal(theirs(pictures), ours(pictures))
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=5, in_chans=3).num_classes == 5
