"""The main job, several seeds: accuracy, latency, size and seconds with their spread.

python benchmarks/main_job.py cifar10:PATH --budget "size<=500KB,latency<=1ms" --time 10m --seeds 0 1 2 --out runs/bench

Each seed is a job of its own in a process of its own, one after the other; leave the machine alone meanwhile. Finished
runs in --out are not repeated. Prints a table on stderr and JSON on stdout.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any


def job(data: str, budget: str, time: str, seed: int, folder: Path) -> dict[str, Any]:
    """The figures of one run."""
    if not (folder / "result.json").exists():
        words = ["fit", data, "--budget", budget, "--time", time, "--seed", str(seed), "--out", str(folder)]
        subprocess.run([sys.executable, "-m", "flyweight", *words], check=False, stdout=subprocess.DEVNULL)
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return {
        "seed": seed,
        "status": result["status"],
        "winner": result["winner"]["name"],
        "format": result["shipped"]["format"],
        "top1": result["test"]["top1"],
        "clean_top1": result.get("test_clean", result["test"])["top1"],
        "clean_n": result.get("test_clean", result["test"])["n"],
        "ms": result["latency_ms"]["p50"],
        "bytes": result["shipped"]["size_bytes"],
        "seconds": result["seconds"]["total"],
    }


def spread(rows: list[dict[str, Any]], key: str) -> dict[str, float]:
    """Median and range of one figure."""
    values = [row[key] for row in rows]
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def main() -> None:
    """Runs the jobs and prints them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--budget", required=True)
    parser.add_argument("--time", default="10m")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in options.seeds:
        rows.append(job(options.data, options.budget, options.time, seed, options.out / f"seed{seed}"))
        row = rows[-1]
        print(
            f"seed {seed}: {row['winner']}, {row['format']}: {100 * row['top1']:.2f} % (without repeats "
            f"{100 * row['clean_top1']:.2f} % of {row['clean_n']}), {row['ms']:.3f} ms, {row['bytes']} bytes, "
            f"{row['seconds']:.0f} s, budget {row['status']}",
            file=sys.stderr,
            flush=True,
        )
    keys = ("top1", "clean_top1", "ms", "bytes", "seconds")
    print(json.dumps({"rows": rows, "spread": {key: spread(rows, key) for key in keys}}, indent=2))


if __name__ == "__main__":
    main()
