"""Renews flyweight/pretrained.json, what publishers state of their weights for our networks, and docs/weights.md.

Needs the environment of scripts/parity.py, and of timm's repository results/results-imagenet.csv for its accuracies.
Run: python -m scripts.pretrained_table results-imagenet.csv, or without a file to write the page's table anew.
"""

# pyright: reportMissingImports=false
import csv
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flyweight.pretrained import TABLE, Source, table
from flyweight.units import DASH, human_bytes

PAGE = Path(__file__).parents[1] / "docs" / "weights.md"
MARK = "<!-- table: written by `python -m scripts.pretrained_table` -->\n"
MARK_END = "<!-- end of table -->\n"
CLASSES = 1000
HASH = re.compile(r"-([0-9a-f]{8,64})\.\w+$")  # what torch.hub checks: the file's name ends in a prefix of its sha256
# timm's ports of TensorFlow's weights, of networks whose other weights have another padding and ε.
TENSORFLOW = {"mobilenet_v3_large": "tf_mobilenetv3_large_100", "mobilenet_v3_small": "tf_mobilenetv3_small_100"}
AUX = ("inception_v3.tv_in1k",)  # the only file of timm's that holds auxiliary heads, as its inception_v3.py says
RENORMALISES = "the library's network re-normalises its input (transform_input); mean and std are those it arrives at"
Entry = dict[str, Any]


def stated(entry: Mapping[str, Any]) -> Entry:
    """An entry without what the publisher does not state."""
    return {key: value for key, value in entry.items() if value not in (None, "", {}, [])}


def of_torchvision(pair: Any) -> Iterator[Entry]:
    """What the enums of torchvision's weights state."""
    from torchvision.models import get_model_weights

    for weights in get_model_weights(pair.name):
        seen = weights.transforms()
        metrics = weights.meta["_metrics"]["ImageNet-1K"]
        mean, std = normalisation(pair.reference(), seen.mean, seen.std)
        yield {
            "library": "torchvision",
            "name": str(weights),
            "url": weights.url,
            "args": pair.args,
            "size": seen.crop_size * 2,
            "resize": seen.resize_size[0],
            "interpolation": seen.interpolation.value,
            "mean": mean,
            "std": std,
            "metrics": {"top1": metrics["acc@1"], "top5": metrics["acc@5"], "size": seen.crop_size[0]},
            "note": RENORMALISES if mean != list(seen.mean) else "",
        }


def normalisation(reference: Any, mean: Sequence[float], std: Sequence[float]) -> tuple[list[float], list[float]]:
    """The mean and deviation that a network's first layer sees, by what it does to pictures normalised as stated."""
    import torch

    if not hasattr(reference, "transform_input"):
        return list(mean), list(std)
    reference.transform_input = True  # as it is for the published weights
    zeros, ones = (torch.full((1, 3, 1, 1), value, dtype=torch.float64) for value in (0.0, 1.0))
    shift = reference._transform_input(zeros).flatten().tolist()
    scale = [one - zero for one, zero in zip(reference._transform_input(ones).flatten().tolist(), shift, strict=True)]
    means = [round(m - s * b / a, 6) for m, s, a, b in zip(mean, std, scale, shift, strict=True)]
    return means, [round(s / a, 6) for s, a in zip(std, scale, strict=True)]


def of_timm(pair: Any, accuracies: Mapping[str, Mapping[str, str]]) -> Iterator[Entry]:
    """What timm's configurations state, with its published accuracies."""
    from timm.models import get_pretrained_cfg, list_pretrained

    for name in list_pretrained(f"{pair.name}.*"):
        cfg = get_pretrained_cfg(name)
        if cfg.num_classes != CLASSES or not (cfg.hf_hub_id or HASH.search(cfg.url)):
            continue
        seen = accuracies.get(name)
        metrics = seen and {"top1": float(seen["top1"]), "top5": float(seen["top5"]), "size": int(seen["img_size"])}
        yield {
            "library": "timm",
            "name": name,
            "hub": cfg.hf_hub_id,
            "url": "" if cfg.hf_hub_id else cfg.url,
            "args": {**pair.args, "aux": True} if name in AUX else pair.args,
            "size": list(cfg.input_size[1:]),
            "resize": int(cfg.input_size[1] / cfg.crop_pct),
            "interpolation": cfg.interpolation,
            "mean": list(cfg.mean),
            "std": list(cfg.std),
            "licence": cfg.license,
            "metrics": metrics,
        }


def completed(ours: str, entry: Entry) -> Entry:
    """The entry with the prefix of its checksum, its bytes, and its input's size where that is not the usual one."""
    import torch

    from flyweight import zoo

    found = HASH.search(entry.get("url", ""))
    spec = zoo.spec_of(ours, **entry["args"])
    args = {**entry["args"], "size": entry["size"][0]} if spec.input[1:] != tuple(entry["size"]) else entry["args"]
    with torch.device("meta"):
        tensors = zoo.structure(spec).state_dict().values()
    amount = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return stated({**entry, "args": args, "sha256": found[1] if found else "", "bytes": amount})


def rank(entry: Mapping[str, Any]) -> tuple[bool, float]:
    """Best first: licences for any use before others, then by published top-1 accuracy; unknown ones last."""
    return "-nc" in entry.get("licence", ""), -entry.get("metrics", {}).get("top1", 0.0)


def collect(results: Path) -> dict[str, list[Entry]]:
    """Our name → its sources, best first; each network was compared with its reference, answer by answer."""
    from scripts.parity import PAIRS, Pair, compare

    with results.open(encoding="utf-8", newline="") as file:
        accuracies = {row["model"]: row for row in csv.DictReader(file)}
    tensorflow = [Pair(ours, {"padding": "same"}, "timm", name) for ours, name in TENSORFLOW.items()]
    found: dict[str, list[Entry]] = {}
    for pair in [*PAIRS, *tensorflow]:
        if " " in pair.name or pair.library not in ("torchvision", "timm"):
            continue  # a form that nobody has published weights of
        entries = list(of_torchvision(pair) if pair.library == "torchvision" else of_timm(pair, accuracies))
        if entries:
            compare(pair, "import")
            print(f"{pair.ours} {pair.source}: {len(entries)} files", flush=True)
            found.setdefault(pair.ours, []).extend(completed(pair.ours, entry) for entry in entries)
    return {ours: sorted(entries, key=rank) for ours, entries in sorted(found.items())}


def document(found: Mapping[str, Sequence[Entry]]) -> str:
    """The JSON file: a line for each source."""
    models = [
        f'  "{ours}": [\n' + ",\n".join(f"    {json.dumps(each)}" for each in entries) + "\n  ]"
        for ours, entries in found.items()
    ]
    return "{\n" + ",\n".join(models) + "\n}\n"


def line(source: Source) -> str:
    """One file's line of the page's table."""
    args = "".join(f", `{key}={value!r}`" for key, value in source.args.items())
    top1, side = source.metrics.get("top1"), source.metrics.get("size", source.size[0])
    accuracy = DASH if top1 is None else f"{top1:.1f}" + ("" if side == source.size[0] else f" at {side:g}")
    cells = (
        f"`{source.model}`{args}",
        f"{source.library} {source.name}",
        str(source.size[0]),
        accuracy,
        source.licence or DASH,
        human_bytes(source.bytes),
    )
    return f"| {' | '.join(cells)} |"


def with_table(text: str, models: Mapping[str, Sequence[Source]]) -> str:
    """docs/weights.md with what stands between its two marks replaced."""
    head, _, rest = text.partition(MARK)
    rows = [
        "| model | publisher, name | input | top-1 in % | licence | size |",
        "|---|---|---:|---:|---|---:|",
        *(line(source) for entries in models.values() for source in entries),
    ]
    return head + MARK + "\n".join(rows) + "\n" + MARK_END + rest.partition(MARK_END)[2]


def main(arguments: Sequence[str]) -> None:
    """Writes the table where timm's accuracies are given, and the page."""
    if arguments:
        TABLE.write_text(document(collect(Path(arguments[0]))), encoding="utf-8", newline="\n")
        print(f"wrote {TABLE}")
    table.cache_clear()
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), table()), encoding="utf-8", newline="\n")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main(sys.argv[1:])
