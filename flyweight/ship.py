"""What a run leaves beside its measurements: network, config, model card and a script that needs no flyweight."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flyweight import __version__
from flyweight.exported import CONTRACT, Exported
from flyweight.net import Net
from flyweight.preprocess import Preprocess
from flyweight.timm_models import config
from flyweight.train.checkpoint import write_atomically
from flyweight.units import budget_value
from flyweight.weights import net_bytes

PREDICT = '''\
"""Classifies pictures with model.onnx: python predict.py PICTURE… (needs onnxruntime, numpy and pillow)."""
import json, pathlib, sys
import numpy as np, onnxruntime
from PIL import Image, ImageOps

model = onnxruntime.InferenceSession((pathlib.Path(__file__).parent / "model.onnx").read_bytes())
meta = model.get_modelmeta().custom_metadata_map
classes, (height, width) = json.loads(meta["classes"]), json.loads(meta["preprocess"])["size"]
mode = "L" if json.loads(meta["preprocess"])["channels"] == 1 else "RGB"
for path in sys.argv[1:]:
    picture = ImageOps.exif_transpose(Image.open(path)).convert(mode).resize((width, height), Image.Resampling.BILINEAR)
    p = model.run(None, {"image": np.asarray(picture).reshape(1, height, width, -1)})[0][0]
    print(path, classes[p.argmax()], f"{p.max():.3f}")
'''


def write_network(folder: Path, net: Net, name: str, preprocess: Preprocess, classes: tuple[str, ...]) -> None:
    """Writes model.safetensors and config.json, by which timm loads it (`timm_models.config`); `name` is for people."""
    write_atomically(folder / "model.safetensors", net_bytes(net, preprocess, classes))
    more = {
        "name": name,
        "label_names": list(classes),
        "preprocess": preprocess.to_json(),
        "spec": net.spec.to_json(),
        "flyweight": __version__,
    }
    write_json(folder / "config.json", config(net, preprocess) | more)


def write_model(folder: Path, model: bytes, form: str, packed: bytes | None) -> dict[str, Any]:
    """Writes model.onnx and predict.py, and model.fly where it is packed; the `shipped` entry of result.json."""
    write_atomically(folder / "model.onnx", model)
    write_atomically(folder / "predict.py", PREDICT.encode())
    if packed is not None:
        write_atomically(folder / "model.fly", packed)
    name, data = ("model.onnx", model) if packed is None else ("model.fly", packed)
    return {"file": name, "format": form, "size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def write_export(folder: Path, exported: Exported) -> dict[str, Any]:
    """Writes what ships for another runtime than ONNX Runtime beside model.onnx; the `shipped` entry of result.json."""
    for name, data in {**exported.files, CONTRACT: exported.contract()}.items():
        write_atomically(folder / name, data)
    digest = hashlib.sha256(b"".join(exported.files.values())).hexdigest()
    about = {"file": exported.name, "format": exported.format, "size_bytes": exported.size, "sha256": digest}
    return about | {"files": list(exported.files)}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes one JSON object, indented."""
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_card(folder: Path, result: Mapping[str, Any]) -> None:
    """Writes MODEL_CARD.md from the result."""
    data, test, latency = result["data"], result["test"], result["latency_ms"]
    low, high = (f"{100 * v:.1f}" for v in test["ci95"])
    clean = result.get("test_clean")
    leaked = (
        f"- Without the {clean['duplicates']} test images that repeat a training image: {100 * clean['top1']:.1f} % "
        f"of {clean['n']}\n"
        if clean
        else ""
    )
    limits = "".join(
        f"- {b['name']} {b['op']} {budget_value(b['name'], b['limit'])}: {budget_value(b['name'], b['measured'])}, "
        f"{'met' if b['met'] else 'not met'}\n"
        for b in result["budget"]
    )
    count, shipped, winner = len(data["classes"]), result["shipped"], result["winner"]
    how = f"median of {latency['n']}, {latency['threads']} thread(s), {latency['engine']}"
    names = ", ".join(data["classes"][:30]) + (" …" if count > 30 else "")
    packed = (
        "`model.fly` is the same classifier packed, the file that keeps to the budget's size:\n"
        '`flyweight.open_packed("model.fly").predict(picture)` runs it with numpy and onnxruntime.\n'
        if shipped["file"] == "model.fly"
        else ""
    )
    text = f"""# {winner["name"]}, {shipped["format"]}

An image classifier for {count} classes ({names}), made by Flyweight {result["version"]}.

## Use
`model.onnx` takes `image`, uint8 [N, H, W, {data["channels"]}], and gives `probabilities`, float32 [N, {count}];
`predict.py` shows the whole of it.
{packed}The pictures must look like those it was trained on; a picture of anything else
still gets one of these classes. Budget ({result["status"]}):

{limits}
## Data
{data["name"]}: {data["train"]} pictures to train, {data["validation"]} to choose, {data["test"]} to test.
Licence of the data: {data["licence"]}

## Accuracy and speed
- Test: {100 * test["top1"]:.1f} % of {test["n"]} (95 % interval {low} to {high}), scored once, by the shipped file
{leaked}- One picture: {latency["p50"]:.3g} ms ({how})
- File: {shipped["size_bytes"]} bytes; parameters {winner["params"]}; multiply-accumulates {winner["macs"]}

## Training
{_origin(winner["weights"])}
Seed {result["seed"]}; the whole job took {result["seconds"]["total"]:.0f} s. Details: `report.html`, `records.jsonl`.
"""
    write_atomically(folder / "MODEL_CARD.md", text.encode())


def _origin(weights: Mapping[str, Any] | None) -> str:
    """Which weights the network started from, and whose licence it inherits with them."""
    if weights is None:
        return "From random weights, so no licence of inherited weights applies."
    file = f"file {Path(weights['path']).name}, sha256 {weights['sha256']}"
    if weights["library"] is None:
        return f"Fine-tuned from the weights {weights['name']} ({file}).\nLicence of these weights: not known."
    licence = weights["licence"] or f"not stated by {weights['library']}"
    return (
        f"Fine-tuned from {weights['library']}'s weights {weights['name']} ({weights['address']}, {file}).\n"
        f"Licence of these weights: {licence}."
    )
