"""Weights of other libraries: their names and shapes, there and back, what does not fit, and real weights at work.

That the answers are the same is shown in docs/parity.md. The photographs of the cat (Stefan van der Walt) and of the
coffee (Rachel Michetti) are parts of those that come with scikit-image, CC0.
"""

import hashlib
import json
import pickle
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from flyweight import foreign
from flyweight.create import create_model
from flyweight.errors import FlyweightError, UsageError
from flyweight.net import Net
from flyweight.preprocess import Preprocess
from flyweight.timm_models import native_config
from flyweight.weights import load_net, load_preprocess, net_bytes, read_tensors
from flyweight.zoo import families, spec_of, structure

GOLDEN = Path(__file__).parent / "golden"
RECORDS = [  # written by scripts/parity.py
    pytest.param(name, record, id=f"{name}-{record['source']}")
    for name, records in json.loads((GOLDEN / "foreign.json").read_text(encoding="utf-8")).items()
    for record in records
]
NAMED = [name for name, family in families().items() if hasattr(family, "NAMES")]
Tensors = dict[str, Tensor]


@pytest.mark.parametrize(("name", "record"), RECORDS)
def test_tensors_have_the_names_and_shapes_of_the_reference(name: str, record: dict[str, Any]) -> None:
    with torch.device("meta"):
        net = structure(spec_of(name, **record["args"]))
        given = foreign.give(net, record["source"].split()[0])
    lines = sorted(f"{theirs} {'x'.join(map(str, tensor.shape))}" for theirs, tensor in given.items())
    assert len(lines) == record["tensors"]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == record["sha256"]


@pytest.mark.parametrize("family", NAMED)
def test_weights_come_back_as_they_went(family: str) -> None:
    name = [*families()[family].VARIANTS][-1]
    first, second = (create_model(name, width=0.25, num_classes=5) for _ in range(2))
    assert foreign.libraries(first)
    for library in foreign.libraries(first):
        fresh = create_model(name, width=0.25, num_classes=5)
        taken = foreign.take(fresh, foreign.give(first, library))
        assert foreign.names(fresh, taken) == foreign.names(first, library)
        assert same(fresh, first.state_dict())
        assert not same(second, first.state_dict())


def same(net: Net, tensors: Mapping[str, Tensor]) -> bool:
    own = net.state_dict()
    return own.keys() == tensors.keys() and all(torch.equal(own[name], tensors[name]) for name in own)


def small() -> Net:
    return create_model("squeezenet1_1", width=0.25, num_classes=3)


@pytest.fixture
def tensors() -> Tensors:
    """SqueezeNet's, by torchvision's names."""
    return foreign.give(small(), "torchvision")


def test_a_tensor_is_missing(tensors: Tensors) -> None:
    del tensors["features.3.squeeze.bias"]
    with pytest.raises(UsageError, match=r"by torchvision's names: features\.3\.squeeze\.bias is missing$"):
        foreign.take(small(), tensors)


def test_a_tensor_is_left_over(tensors: Tensors) -> None:
    tensors["features.13.weight"] = torch.zeros(1)
    with pytest.raises(UsageError, match=r"features\.13\.weight has no place$"):
        foreign.take(small(), tensors)


def test_a_tensor_has_another_shape_and_none_is_taken(tensors: Tensors) -> None:
    net = small()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    tensors["classifier.1.weight"] = torch.zeros(4, 128, 1, 1)
    with pytest.raises(UsageError, match=r"classifier\.1\.weight is 4 x 128 x 1 x 1 instead of 3 x 128 x 1 x 1$"):
        foreign.take(net, tensors)
    assert same(net, before)


def test_many_misfits_are_counted() -> None:
    with pytest.raises(UsageError, match=r"; .*; .*, and \d+ more$"):
        foreign.take(small(), {"conv1.weight": torch.zeros(3)})


def test_a_linear_layer_may_be_a_1x1_convolution() -> None:
    net = create_model("mobilenet_v3_small", width=0.25, num_classes=3)
    given = foreign.give(net, "timm")
    assert given["conv_head.weight"].dim() == 4
    given["conv_head.weight"] = given["conv_head.weight"].flatten(1)
    assert foreign.take(create_model("mobilenet_v3_small", width=0.25, num_classes=3), given) == "timm"


def test_counters_that_older_files_lack_are_not_asked_for() -> None:
    net = create_model("resnet8_cifar", num_classes=3)
    older = {name: t for name, t in foreign.give(net, "timm").items() if not name.endswith("num_batches_tracked")}
    fresh = create_model("resnet8_cifar", num_classes=3)
    foreign.take(fresh, older)
    assert same(fresh, net.state_dict())


def test_forms_that_a_library_lacks_have_no_names_there() -> None:
    with pytest.raises(UsageError, match="torchvision has no network of this form"):
        foreign.give(create_model("resnet8_cifar", se=0.25), "torchvision")
    assert foreign.libraries(create_model("resnet8_cifar", se=0.25)) == ["timm", "pytorchcv"]
    with pytest.raises(UsageError, match="known: torchvision, cadene, pytorchcv"):
        foreign.give(small(), "timm")
    with pytest.raises(UsageError, match="no other library is known to have airbench"):
        foreign.take(create_model("airbench94"), {})


def test_state_dicts_of_training_scripts_are_unwrapped(tensors: Tensors, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()}, "epoch": 3}, path)
    found = foreign.read_weights(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


class Writes:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "executed")


def test_a_pth_runs_no_code(tensors: Tensors, tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / "hostile.pth"
    pickle.loads(pickle.dumps(Writes(trace)))
    assert trace.read_text() == "executed"
    trace.unlink()
    torch.save({**tensors, "extra": Writes(trace)}, path)
    with pytest.raises(FlyweightError, match="cannot be read as weights alone"):
        foreign.read_weights(path)
    assert not trace.exists()


def test_a_pth_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "numbers.pth"
    torch.save({"weight": [1, 2, 3]}, path)
    with pytest.raises(FlyweightError, match="holds something else than named tensors"):
        foreign.read_weights(path)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_damaged_and_missing_files(name: str, tensors: Tensors, tmp_path: Path) -> None:
    path = tmp_path / name
    with pytest.raises(UsageError, match="does not exist"):
        foreign.read_weights(path)
    if path.suffix == ".pth":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    assert foreign.read_weights(path).keys() == tensors.keys()
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(FlyweightError, match=path.name) as refused:
        foreign.read_weights(path)
    assert refused.value.exit_code == 1


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flyweight", "weights", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_command_line_imports_and_exports(tensors: Tensors, tmp_path: Path) -> None:
    theirs, ours, back = (tmp_path / name for name in ("theirs.pth", "model.safetensors", "back.safetensors"))
    torch.save(tensors, theirs)
    words = ["import", theirs, "--as", "squeezenet1_1", "--arg", "width=0.25", "--arg", "num_classes=3"]
    words += ["--resolution", "96", "--mean", "0.5", "--out", ours]
    done = run(*words)
    assert (done.returncode, done.stderr) == (0, "")
    assert "torchvision's names" in done.stdout
    net = load_net(ours)
    assert net.spec.input == (3, 96, 96)
    assert torch.equal(net.state_dict()["features.stem.conv.weight"], tensors["features.0.weight"])
    assert load_preprocess(ours) == Preprocess((96, 96), 3, (127.5,) * 3, (58.395, 57.12, 57.375))
    done = run("export", ours, "--to", "torchvision", "--out", back)
    assert (done.returncode, done.stderr) == (0, "")
    found = load_file(back)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    again = run(*words)
    assert again.returncode == 2
    assert "exists already" in again.stderr


def test_an_export_to_timm_describes_the_network_where_timm_has_it(tmp_path: Path) -> None:
    file, folder = tmp_path / "ours.safetensors", tmp_path / "folder"
    folder.mkdir()
    net = create_model("mobilenet_v1", num_classes=3)
    file.write_bytes(net_bytes(net))
    done = run("export", file, "--to", "timm", "--out", folder / "model.safetensors")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((folder / "config.json").read_text(encoding="utf-8")) == native_config(net)
    assert "local-dir:" in done.stdout
    (folder / "model.safetensors").unlink()
    (folder / "config.json").write_text("mine")
    done = run("export", file, "--to", "timm", "--out", folder / "model.safetensors")
    assert "stays as it is" in done.stdout
    assert (folder / "config.json").read_text() == "mine"
    file.write_bytes(net_bytes(create_model("mobilenet_v1", act="silu", width=0.25)))
    done = run("export", file, "--to", "timm", "--out", tmp_path / "model.safetensors")
    assert "no config.json: timm has no mobilenet_v1 that computes the same" in done.stdout
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["import", "nowhere.pth", "--as", "squeezenet1_1"], 2, "does not exist"),
        (["import", "theirs.pth", "--as", "squeezenet1_1"], 2, "do not fit squeezenet by torchvision's names"),
        (["import", "theirs.pth", "--as", "squeezenet1_1", "--std", "a"], 2, "--mean and --std take"),
        (["export", "theirs.pth", "--to", "timm", "--out", "x.safetensors"], 1, "no safetensors file"),
    ],
)
def test_the_command_line_refuses_in_one_sentence(
    words: list[str], code: int, message: str, tensors: Tensors, tmp_path: Path
) -> None:
    torch.save(tensors, tmp_path / "theirs.pth")
    done = run(words[0], tmp_path / words[1], *words[2:-1], *(tmp_path / w if "x." in w else w for w in words[-1:]))
    assert done.returncode == code
    assert done.stderr.startswith("flyweight: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


# File, network, what it needs beside the width and size that the file states, library.
REAL = [
    ("squeezenet1_0", "squeezenet1_0", {}, "torchvision"),
    ("mobilenet_v1_025_128", "mobilenet_v1", {"padding": "same"}, "timm"),
    ("mobilenet_v1_025_224", "mobilenet_v1", {"padding": "same"}, "timm"),
    ("mobilenet_v1_050_160", "mobilenet_v1", {"padding": "same"}, "timm"),
    ("mobilenet_v1_075_192", "mobilenet_v1", {"padding": "same"}, "timm"),
]


@pytest.fixture(params=REAL, ids=lambda row: row[0])
def real(request: pytest.FixtureRequest, real_data: Path) -> tuple[Net, Preprocess]:
    """A network with published ImageNet weights, and how its pictures are made ready."""
    file, name, args, library = request.param
    path = real_data / "weights" / f"{file}_imagenet.safetensors"
    stated = read_tensors(path)[1]
    size = json.loads(stated["input_size"])[1]
    given: dict[str, Any] = {"size": size, **args}
    if "width_multiplier" in stated:
        given["width"] = float(stated["width_multiplier"])
    net = create_model(name, **given)
    assert foreign.take(net, foreign.read_weights(path)) == library
    mean, std = (tuple(255 * value for value in json.loads(stated[each])) for each in ("mean", "std"))
    return net.eval(), Preprocess((size, size), 3, mean, std)


def answers(net: Net, preprocess: Preprocess, photographs: list[Path], classes: list[str]) -> list[str]:
    mean, std = torch.tensor(preprocess.mean), torch.tensor(preprocess.std)
    pixels = torch.stack([torch.from_numpy(preprocess.pixels(Image.open(path))) for path in photographs])
    with torch.no_grad():
        logits = net(((pixels - mean) / std).permute(0, 3, 1, 2))
    return [classes[i] for i in logits.argmax(1)]


def test_real_weights_name_real_photographs(real: tuple[Net, Preprocess], real_data: Path) -> None:
    classes = (real_data / "weights" / "imagenet_classes.txt").read_text(encoding="utf-8").splitlines()
    photographs = [GOLDEN / "photographs" / name for name in ("espresso.jpg", "cat.jpg")]
    assert answers(*real, photographs, classes) == ["espresso", "Egyptian cat"]
    daisies = sorted((real_data / "flowers12" / "test" / "daisy").iterdir())
    assert len(daisies) == 20
    assert answers(*real, daisies, classes).count("daisy") >= 19
