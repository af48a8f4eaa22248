"""The packed file: everything comes back bit for bit, every damage is told in a sentence, and torch is not needed."""

import json
import os
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from flyweight import open_packed
from flyweight.cli import main
from flyweight.compress.pack import Encoder, contents_at, contents_of, pack, unpack
from flyweight.create import create_model
from flyweight.errors import FlyweightError, UsageError
from flyweight.export import onnx
from flyweight.foreign import read_weights, take
from flyweight.packed import coder as coding
from flyweight.packed.coder import Decoder, Histogram, alike
from flyweight.packed.container import START, VALUES, Contents, read, seal, sections
from flyweight.packed.damage import DamagedError
from flyweight.packed.tensors import DTYPES, keys, values_of
from flyweight.preprocess import Preprocess
from flyweight.run import classifier
from flyweight.ship import write_model, write_network
from flyweight.weights import net_bytes, read_tensors
from flyweight.zoo import build, spec_of
from scripts.fuzz_packed import MEMORY_PER_VALUE, mutation
from scripts.packed_golden import CLASSES, GOLDEN, PREPROCESS, contents, digests, forms, small_net

PHOTOGRAPHS = sorted((Path(__file__).parent / "golden" / "photographs").glob("*.jpg"))
ROOT = Path(__file__).parents[1]
Run = Callable[..., tuple[int, str, str]]
IMAGENET = Preprocess((224, 224), 3, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))


@pytest.fixture(scope="module")
def golden() -> list[bytes]:
    return [path.read_bytes() for path in sorted(GOLDEN.glob("*.fly"))]


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def python(*words: str | Path | int) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter with one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment.pop("ORT_DISABLE_TELEMETRY", None)  # which importing flyweight has set here
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line, within this process: exit code, stdout, stderr."""

    def call(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flyweight", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return call


def changed(data: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """A packed file with its header changed, under a right checksum."""
    text, skeleton, raw, words = sections(data)
    header = json.loads(text)
    change(header)
    return seal(json.dumps(header).encode(), skeleton, raw, words)


# What comes back


def test_the_pinned_files_decode_to_the_same_tensors_for_ever() -> None:
    pinned = json.loads((GOLDEN / "digests.json").read_text(encoding="utf-8"))
    assert len(pinned) == 3
    for name, expected in pinned.items():
        assert digests(GOLDEN / name) == expected


@pytest.mark.parametrize("name", ["forms", "float", "int8"])
def test_contents_come_back_bit_for_bit(name: str) -> None:
    packed = contents()[name]
    back = read(pack(packed).data)
    assert back.tensors.keys() == packed.tensors.keys()
    for key, value in packed.tensors.items():
        found = back.tensors[key]
        assert (found.dtype, found.shape, found.tobytes()) == (value.dtype, value.shape, value.tobytes())
    assert back.onnx() == packed.onnx()
    assert (back.name, back.classes, back.preprocess) == (packed.name, packed.classes, packed.preprocess)


def test_every_form_is_chosen_where_it_suits() -> None:
    chosen = pack(forms()).forms
    assert chosen["bytes"] == chosen["number"] == ["bytes"]
    assert chosen["floats"] == chosen["odd floats"] == ["floats", 3]
    assert chosen["short floats"] == ["floats", 1]
    assert chosen["ints"] == ["ints"]
    assert chosen["grid"] == ["grid", 19]
    assert chosen["sparse grid"][:2] == ["sparse", "grid"]
    assert chosen["sparse floats"] == ["sparse", "floats", 3]
    assert chosen["codes"] == ["codes", 20]
    assert chosen["many codes"][:1] == ["codes"]
    assert chosen["sparse codes"] == ["sparse", "codes", 9]
    assert chosen["parts"][0] == "parts"


def test_an_onnx_file_of_folded_norms_takes_no_room_of_its_own() -> None:
    packed = contents()["float"]
    state = small_net().state_dict()
    assert packed.tensors.keys() == state.keys()  # nothing is there for the ONNX file alone
    assert packed.onnx() == onnx.export(small_net(), PREPROCESS, CLASSES).SerializeToString()
    assert len(packed.skeleton) < len(packed.onnx()) / 4


@pytest.mark.parametrize("name", ["mobilenet_v1_cifar", "shufflenet_v1_g3_cifar", "squeezenet1_1"])
def test_other_networks_come_back(name: str) -> None:
    net = create_model(name, num_classes=3, width=0.25).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
            torch.nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
    packed = contents_of(net, PREPROCESS, CLASSES, name)
    assert not [key for key in packed.tensors if key.startswith("onnx:")]
    assert read(pack(packed).data).onnx() == onnx.export(net, PREPROCESS, CLASSES).SerializeToString()


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "uint8", "int32"])
def test_keys_keep_values_apart_and_in_order(dtype: str) -> None:
    bits = np.random.default_rng(0).integers(0, 256, 4 << 14, dtype=np.uint8)
    values = bits.view(DTYPES[dtype])
    assert values_of(keys(values), values.dtype).tobytes() == values.tobytes()
    sure = np.sort(values[np.isfinite(values)]) + values.dtype.type(0)  # which makes 0.0 of -0.0: a sort mixes them
    assert (np.diff(keys(sure).astype(np.int64)) >= 0).all()


def test_the_coder_comes_close_to_the_entropy() -> None:
    rng = np.random.default_rng(0)
    p = np.array([0.7, 0.2, 0.06, 0.03, 0.01])
    symbols = rng.choice(5, 100_000, p=p)
    contexts = rng.integers(0, 3, len(symbols))

    def coded(coder: coding.Coder, given: bool) -> np.ndarray:
        histogram = Histogram("", alike(3), 5, Histogram("", alike(1), 5))
        found = []
        for begin in range(0, len(symbols), 1000):
            part = slice(begin, begin + 1000)
            found.append(coder.code(histogram, contexts[part], symbols[part] if given else None))
            histogram.learn(contexts[part], found[-1])
        return np.concatenate(found)

    encoder = Encoder()
    coded(encoder, given=True)
    words = encoder.close()
    decoder = Decoder(words, b"")
    assert (coded(decoder, given=False) == symbols).all()
    decoder.close()
    entropy = -(p * np.log2(p)).sum() * len(symbols) / 8
    assert entropy * 0.99 < len(words) < entropy * 1.01 + 4 * coding.LANES


def test_few_values_and_zeros_make_a_small_file() -> None:
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(64, 32, 3, 3)).astype(np.float32)
    few = np.round(kernel * 4) / 4
    sparse = np.where(np.abs(kernel) > 1.5, few, np.float32(0)).astype(np.float32)
    sizes = [len(pack(Contents("", None, PREPROCESS, CLASSES, {"w": each})).data) for each in (kernel, few, sparse)]
    assert sizes[0] < 0.9 * kernel.nbytes
    assert sizes[1] < kernel.nbytes / 7
    assert sizes[2] < kernel.nbytes / 20


# SqueezeNet 1.0 with the published sparse weights


def test_squeezenet_packs_to_530_kb_and_answers_as_before(real_data: Path, tmp_path: Path) -> None:
    net = build(spec_of("squeezenet1_0")).eval()
    take(net, read_weights(real_data / "weights" / "squeezenet1_0_imagenet.safetensors"))
    classes = (real_data / "weights" / "imagenet_classes.txt").read_text(encoding="utf-8").splitlines()
    (tmp_path / "model.onnx").write_bytes(onnx.export(net, IMAGENET, classes).SerializeToString())
    path = tmp_path / "squeezenet.fly"
    path.write_bytes(pack(contents_of(net, IMAGENET, classes, "squeezenet1_0")).data)
    assert path.stat().st_size <= 530_000
    packed = open_packed(path)
    assert packed.onnx() == (tmp_path / "model.onnx").read_bytes()
    for name, tensor in net.state_dict().items():
        assert packed.tensors[name].tobytes() == tensor.numpy().tobytes()
    plain = classifier(tmp_path / "model.onnx")
    assert (packed.predict_proba(PHOTOGRAPHS) == plain.predict_proba(PHOTOGRAPHS)).all()
    assert packed.predict(PHOTOGRAPHS) == plain.predict(PHOTOGRAPHS)


# The command line


def test_pack_and_unpack_from_the_command_line(run: Run, tmp_path: Path) -> None:
    net, names = small_net(), tmp_path / "names.txt"
    weights, path, folder = tmp_path / "net.safetensors", tmp_path / "net.fly", tmp_path / "out"
    weights.write_bytes(net_bytes(net, PREPROCESS))
    names.write_text("\n".join(CLASSES), encoding="utf-8")
    code, out, err = run("pack", weights, "--classes", names, "--out", path, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["bytes"] == path.stat().st_size < weights.stat().st_size / 3
    assert run("unpack", path, "--out", folder)[0] == 0
    write_network(tmp_path, net, "net", PREPROCESS, CLASSES)
    assert (folder / "config.json").read_bytes() == (tmp_path / "config.json").read_bytes()
    tensors, metadata = read_tensors(folder / "model.safetensors")
    assert metadata == read_tensors(tmp_path / "model.safetensors")[1]
    assert tensors.keys() == net.state_dict().keys()
    assert all(tensors[name].numpy().tobytes() == each.numpy().tobytes() for name, each in net.state_dict().items())
    assert (folder / "model.onnx").read_bytes() == onnx.export(net, PREPROCESS, CLASSES).SerializeToString()
    answers = classifier(folder / "model.onnx").predict_proba(PHOTOGRAPHS)
    code, out, err = run("predict", path, *PHOTOGRAPHS, "--json")
    assert [each["top"][0]["probability"] for each in json.loads(out)] == answers.max(axis=1).tolist()
    for words, told in (((weights,), "--classes"), ((path,), "is packed already"), ((names,), "not a finished run")):
        code, out, err = run("pack", *words)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert told in err


def test_an_int8_file_unpacks_to_itself(tmp_path: Path) -> None:
    packed = open_packed(GOLDEN / "int8.fly")
    assert packed.spec is None
    assert unpack(packed, tmp_path / "out") == ["model.onnx", "predict.py"]
    again = contents_at(tmp_path / "out" / "model.onnx")
    assert again.onnx() == packed.onnx()
    assert len(pack(again).data) < len(packed.onnx()) / 2
    with pytest.raises(UsageError, match="not an empty folder"):
        unpack(packed, tmp_path / "out")


@pytest.mark.parametrize("ships", ["float32", "int8", "packed"])
def test_a_run_is_packed_as_it_ships(ships: str, tmp_path: Path) -> None:
    packed = open_packed(GOLDEN / ("int8.fly" if ships == "int8" else "float.fly"))
    write_network(tmp_path, small_net(), "small", PREPROCESS, CLASSES)
    data = packed.path.read_bytes() if ships == "packed" else None
    result = {"shipped": write_model(tmp_path, packed.onnx(), ships, data), "winner": {"name": "small"}}
    (tmp_path / "result.json").write_text(json.dumps(result), encoding="utf-8")
    assert pack(contents_at(tmp_path)).data == packed.path.read_bytes()


def test_a_spec_that_does_not_fit_is_told(tmp_path: Path, golden: list[bytes]) -> None:
    endless = {"family": "resnet", "args": {"layers": [10**9], "channels": [4]}, "input": [3, 32, 32]}
    for spec in ({"family": "none"}, {"family": "squeezenet", "args": {}, "input": [3, 32, 32]}, {}, endless):
        path = tmp_path / "other.fly"
        path.write_bytes(changed(golden[0], lambda header, spec=spec: header.update(spec=spec)))
        with pytest.raises(FlyweightError, match="than its Spec needs"):
            unpack(open_packed(path), tmp_path / "out")
        assert not (tmp_path / "out").exists()


# Without torch


def test_prediction_needs_no_torch() -> None:
    probe = """
import sys
REFUSED = {"torch", "onnx", "safetensors", "typer", "rich", "jinja2", "matplotlib"}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in REFUSED:
            raise ImportError(f"{name} is refused")
sys.meta_path.insert(0, Refuse())
import flyweight
packed = flyweight.open_packed(sys.argv[1])
print(packed.predict(sys.argv[2])[0], packed.spec["family"], len(packed.tensors))
assert not REFUSED & set(sys.modules)
"""
    done = python("-c", probe, GOLDEN / "float.fly", PHOTOGRAPHS[0])
    assert done.returncode == 0, done.stderr
    packed = open_packed(GOLDEN / "float.fly")
    assert done.stdout.split() == [packed.predict(PHOTOGRAPHS[0])[0], "resnet", str(len(packed.tensors))]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in Linux's /proc")
def test_the_runtime_starts_no_thread_that_reports_to_its_makers() -> None:
    probe = "import os, sys, flyweight; flyweight.open_packed(sys.argv[1]); print(len(os.listdir('/proc/self/task')))"
    assert python("-c", probe, GOLDEN / "float.fly").stdout.split() == ["1"]


def test_pictures_may_be_paths_pillow_images_or_arrays() -> None:
    packed = open_packed(GOLDEN / "int8.fly")
    with Image.open(PHOTOGRAPHS[0]) as image:
        array = np.asarray(image.convert("RGB"))
        found = [packed.predict_proba(each) for each in (PHOTOGRAPHS[0], image, array)]
    assert (found[0] == found[1]).all()
    assert (found[0] == found[2]).all()


# Hostile files


def stated(at: int, value: int) -> Callable[[bytes], bytes]:
    """One of the four lengths is another, under a right checksum."""

    def change(data: bytes) -> bytes:
        body = bytearray(data[START.size - 16 :])
        struct.pack_into("<I", body, 4 * at, value)
        return data[:6] + sha256(body).digest() + bytes(body)

    return change


def entry(change: Callable[[list[Any]], Any]) -> Callable[[bytes], bytes]:
    """The last tensor is described otherwise."""
    return lambda data: changed(data, lambda header: change(header["tensors"][-1]))


def sealed(text: bytes) -> Callable[[bytes], bytes]:
    """The header is another text."""
    return lambda data: seal(text, *sections(data)[1:])


LARGEST = ["tensor", "features.stage3_block1.body.conv2.conv.weight"]
DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "is no packed file"),
    "magic": (lambda data: b"PK" + data[2:], "is no packed file"),
    "truncated start": (lambda data: data[:20], "is truncated"),
    "truncated": (lambda data: data[:-1], "is truncated or damaged: its checksum is wrong"),
    "longer": (lambda data: data + b"\0\0", "checksum is wrong"),
    "version": (lambda data: data[:4] + b"\2\0" + data[6:], "has version 2 of the format"),
    "checksum": (lambda data: data[:9] + bytes([data[9] ^ 1]) + data[10:], "checksum is wrong"),
    "text length": (stated(0, 2**32 - 1), "states lengths"),
    "header length": (stated(1, 2**32 - 1), "states a header of"),
    "header a little longer": (stated(1, 9999), "another length than it states"),
    "raw length": (stated(3, 2**31), "states lengths"),
    "no JSON": (sealed(b"{"), "no JSON"),
    "deep JSON": (sealed(b"[" * 60_000), "no JSON"),
    "no object": (sealed(b"[1]"), "no JSON object"),
    "key twice": (sealed(b'{"name": 1, "name": 2}'), "a name twice"),
    "no classes": (lambda data: changed(data, lambda header: header.pop("classes")), "no list of classes"),
    "no preprocessing": (lambda data: changed(data, lambda header: header["preprocess"].pop("std")), "made ready"),
    "huge pictures": (lambda data: changed(data, lambda header: header["preprocess"].update(size=[9**9, 1])), "ready"),
    "tensor twice": (lambda data: changed(data, lambda h: h["tensors"].append(h["tensors"][0])), "with the name"),
    "huge shape": (entry(lambda each: each.__setitem__(2, [2**12, 2**12])), "may hold"),
    "overflowing shape": (entry(lambda each: each.__setitem__(2, [2**30] * 8)), "may hold"),
    "larger shape": (entry(lambda each: each.__setitem__(2, [1001])), "too early"),
    "negative shape": (entry(lambda each: each.__setitem__(2, [-1])), "not known"),
    "type": (entry(lambda each: each.__setitem__(1, "object")), "not known"),
    "form": (entry(lambda each: each.__setitem__(3, ["zip"])), "unknown form"),
    "codebook": (entry(lambda each: each.__setitem__(3, ["codes", 10**9])), "codebook of"),
    "pieces": (lambda data: changed(data, lambda header: header["onnx"].append(["tensor", "?"])), "unknown pieces"),
    "many pieces": (lambda data: changed(data, lambda h: h["onnx"].extend([LARGEST] * 1500)), "than it holds"),
    "a line's end": (lambda data: changed(data, lambda h: h["onnx"].append(["kernel", "a\nb", "c\nd", 0.5])), "has no"),
    "skeleton": (lambda data: changed(data, lambda header: header["onnx"].append(["skeleton", 1])), "skeleton"),
    "values": (lambda data: changed(data, lambda header: header.update(crc32=1)), "other values than were packed"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_each_damage_is_one_sentence(kind: str, golden: list[bytes], tmp_path: Path) -> None:
    change, told = DAMAGE[kind]
    path = tmp_path / "damaged.fly"
    path.write_bytes(change(golden[0]))
    with pytest.raises(DamagedError) as caught:
        open_packed(path)
    message = str(caught.value)
    assert message.startswith(f"{path} ")
    assert told in message
    assert "\n" not in message


def test_damage_exits_with_the_sentence_alone(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "damaged.fly"
    path.write_bytes((GOLDEN / "float.fly").read_bytes()[:-7])
    told = f"flyweight: {path} is truncated or damaged: its checksum is wrong\n"
    assert run("unpack", path, "--out", tmp_path / "out") == (1, "", told)
    assert run("predict", path, PHOTOGRAPHS[0]) == (1, "", told)
    assert not (tmp_path / "out").exists()
    code, out, err = run("predict", tmp_path / "none.fly", PHOTOGRAPHS[0])
    assert (code, out, err) == (2, "", f"flyweight: {tmp_path / 'none.fly'} does not exist: check the path\n")


def test_what_is_stated_is_refused_before_it_is_allocated(golden: list[bytes], traced: None) -> None:
    data = entry(lambda each: each.__setitem__(2, [2**24]))(golden[0])
    tracemalloc.reset_peak()
    with pytest.raises(DamagedError, match="may hold"):
        read(data)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20


def test_a_value_takes_at_most_64_bytes(traced: None) -> None:
    count = 1 << 17
    few = np.zeros(count, np.float32)
    few[::999] = 1
    for values in (few, few[None], few.reshape(256, 512), np.zeros(count, np.int32)):
        data = pack(Contents("", None, PREPROCESS, CLASSES, {"w": values})).data
        tracemalloc.reset_peak()
        read(data)
        most = MEMORY_PER_VALUE * max(count, VALUES * len(data))
        assert tracemalloc.get_traced_memory()[1] < (4 << 20) + most


def test_a_mutation_is_always_the_same(golden: list[bytes]) -> None:
    found = [mutation(golden, 3, i) for i in range(60)]
    assert found[::-1] == [mutation(golden, 3, i) for i in reversed(range(60))]


def test_2000_mutations_neither_crash_nor_hang_nor_swell() -> None:
    done = python("-m", "scripts.fuzz_packed", "--count", 2000, "--seed", 0)
    assert done.returncode == 0, done.stderr
    *outcomes, told = done.stdout.splitlines()
    assert told.startswith("2000 executions, none failed")
    assert len(outcomes) > 30  # many kinds of damage are reached
