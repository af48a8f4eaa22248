"""Kills a training with SIGKILL at random moments, many times over, and compares what is left with an undisturbed one.

    python -m benchmarks.kill --data cifar10:PATH --model mobilenet_v1_cifar --epochs 3 --kills 20 --threads 1

Every life is a fresh `flyweight train` process. Weights must agree to the last bit, and so must the epochs' records,
the scores and the number of steps. Prints one line for each life and a verdict; exits with 1 where anything differs.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

MINE = ("at", "seconds")  # what depends on the hour


def life(words: list[str], seconds: float | None) -> int:
    """One process, killed so many seconds after its first checkpoint if they are given; its exit code."""
    begun = time.time()
    process = subprocess.Popen([sys.executable, "-m", "flyweight", "train", *words], stderr=subprocess.DEVNULL)
    state = Path(words[-1]) / "state" / "training.safetensors"
    while seconds is not None and process.poll() is None and not _written_since(state, begun):
        time.sleep(0.01)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        return process.wait()


def _written_since(path: Path, begun: float) -> bool:
    try:
        return path.stat().st_mtime > begun
    except FileNotFoundError:  # not yet, or at this moment between its two names
        return False


def records(folder: Path) -> list[dict[str, Any]]:
    """What was recorded, without what is said and what depends on the hour."""
    lines = (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    return [{k: v for k, v in each.items() if k not in MINE} for each in found if each["kind"] != "log"]


def differences(whole: Path, killed: Path) -> list[str]:
    """What the two trainings do not have in common."""
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, killed))
    found = [name for name in one if one[name].tobytes() != other[name].tobytes()]
    results = [json.loads((folder / "result.json").read_text(encoding="utf-8")) for folder in (whole, killed)]
    found += [key for key in ("train", "validation", "test", "epochs", "steps") if results[0][key] != results[1][key]]
    return found + ["records"] * (records(whole) != records(killed))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="demo")
    parser.add_argument("--model", default="resnet8_cifar")
    parser.add_argument("--epochs", default="6")
    parser.add_argument("--threads", default="1")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--longest", type=float, default=6.0, help="seconds of a life after its first checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    draw = random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as place:
        whole, killed = Path(place) / "whole", Path(place) / "killed"
        words = [asked.data, "--model", asked.model, "--epochs", asked.epochs, "--threads", asked.threads]
        words += ["--checkpoint-every", "0.5", "--set", "patience=1000", "--set", "plain=true", "--out"]
        assert life([*words, str(whole)], None) == 0
        again = [*words, str(killed)]
        kills = 0
        while kills < asked.kills:
            seconds = draw.uniform(0.2, asked.longest)
            code = life(again, seconds)
            if code != -signal.SIGKILL:
                sys.exit(f"the training ended with {code} after {kills} kills: give more --epochs")
            kills += 1
            print(f"killed {kills} times, {seconds:.1f} s after a checkpoint", flush=True)
            again = ["--resume", str(killed)]
        assert life(again, None) == 0
        found = differences(whole, killed)
        print(f"{kills} kills: " + (f"these differ: {', '.join(found)}" if found else "nothing differs"))
        sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
