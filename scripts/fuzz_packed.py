"""Opens mutated packed files: python -m scripts.fuzz_packed --count 100000 --seed 1

Whatever is done to a file, reading it must give its contents or raise a FlyweightError, soon, within its limit of
memory, which the kernel keeps (Linux): what asks for more fails with a MemoryError. Most mutations get a right
checksum, so that they reach what lies under it. Mutation i of a seed is always the same.
"""

import argparse
import copy
import json
import random
import re
import resource
import time
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from flyweight.errors import FlyweightError
from flyweight.packed.container import ALWAYS, START, VALUES, read, seal, sections

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "packed"
SECONDS = 10.0
OWN = re.compile(r"'[^']*'|\d[\d,]*")  # of a message what belongs to one file
MEMORY, MEMORY_PER_VALUE = 128 << 20, 64
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 255, 256, 4096, 4097, 65536, 2**31, 2**32, 2**63, 2**64, 10**30, 0.5, -1e308, 1e999,
    "", "x", [], {}, [[]], [0], [1, 1, 8, 8], [2**20, 2**20], [10**6, 1, 8, 8], "float32", "int8", "int64",
    ["bytes"], ["floats", 3], ["floats", 1], ["floats", 0], ["ints"], ["grid", 7], ["sparse", "grid", 3],
    ["codes", 255], ["codes", 0], ["codes", 4096], ["sparse", "codes", 3], ["sparse", "floats", 2], ["sparse"],
    ["parts"], ["parts", ["bytes"]], ["tensor", "floats"], ["kernel", "a", "b", 1e-5], ["skeleton", 10**9], ["classes"],
]  # fmt: skip


def bits(data: bytes, rng: random.Random) -> bytes:
    """Some bits flipped, under the old checksum."""
    return _flipped(data, rng)


def cut(data: bytes, rng: random.Random) -> bytes:
    """The end missing, or something after it."""
    return data[: rng.randrange(len(data))] if rng.random() < 0.7 else data + rng.randbytes(rng.randrange(1, 64))


def body(data: bytes, rng: random.Random) -> bytes:
    """Some bits flipped under a right checksum, mostly in the stored text."""
    begin = START.size - 16
    changed = _flipped(data[begin : begin + 200], rng) + data[begin + 200 :]
    return data[:6] + sha256(changed).digest() + changed


def lengths(data: bytes, rng: random.Random) -> bytes:
    """One of the stated lengths is another, under a right checksum."""
    changed = bytearray(data[38:])
    at = 4 * rng.randrange(4)
    old = int.from_bytes(changed[at : at + 4], "little")
    new = rng.choice([0, 1, old - 1, old + 1, old * 2, 2**31, 2**32 - 1, rng.randrange(2 * old + 9)])
    changed[at : at + 4] = (new % 2**32).to_bytes(4, "little")
    return data[:6] + sha256(changed).digest() + bytes(changed)


def header(data: bytes, rng: random.Random) -> bytes:
    """Some values of the header replaced by odd ones, or taken away, or there twice."""
    text, skeleton, raw, words = sections(data)
    found = json.loads(text)
    for _ in range(rng.randrange(1, 4)):
        _change(found, rng)
    return seal(json.dumps(found).encode(), skeleton, raw, words)


def entries(data: bytes, rng: random.Random) -> bytes:
    """Other types, shapes and forms of tensors."""
    text, skeleton, raw, words = sections(data)
    found = json.loads(text)
    for _ in range(rng.randrange(1, 3)):
        entry = rng.choice(found["tensors"])
        kind = rng.randrange(4)
        if kind == 0:
            entry[1] = rng.choice(["float32", "float16", "int8", "uint8", "int32", "int64"])
        elif kind == 1:
            entry[2] = [rng.choice([1, 2, 3, 7, 8, 9, 64, 1000]) for _ in range(rng.randrange(6))]
        elif kind == 2:
            odd = [each for each in ODD if isinstance(each, list)]
            entry[3] = copy.deepcopy(rng.choice(odd + [each[3] for each in found["tensors"]]))
        else:
            entry[2] = [max(1, side + rng.choice([-1, 0, 1])) for side in entry[2]]
    return seal(json.dumps(found).encode(), skeleton, raw, words)


def text(data: bytes, rng: random.Random) -> bytes:
    """Some characters of the header are others."""
    plain, skeleton, raw, words = sections(data)
    changed = bytearray(plain)
    for _ in range(rng.randrange(1, 4)):
        changed[rng.randrange(len(changed))] = rng.choice(b'0123456789[]{}",:-e.\\\x00\xff')
    return seal(bytes(changed), skeleton, raw, words)


def coded(data: bytes, rng: random.Random) -> bytes:
    """Other words and other raw bytes, more of them or fewer."""
    plain, skeleton, raw, words = sections(data)
    kind = rng.randrange(4)
    if kind == 0:
        words = _flipped(words, rng)
    elif kind == 1:
        raw = _flipped(raw, rng) if raw else raw
    elif kind == 2:
        words = words[: 2 * rng.randrange(len(words) // 2)]
    else:
        raw = raw[: rng.randrange(len(raw) + 1)] + rng.randbytes(rng.randrange(8))
    return seal(plain, skeleton, raw, words)


MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    bits, cut, body, lengths, header, entries, text, coded,
)  # fmt: skip


def _flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _change(value: Any, rng: random.Random) -> None:
    """Changes one value somewhere within lists and dicts."""
    while True:
        if not value:
            return
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        inner = value[key]
        if isinstance(inner, list | dict) and inner and rng.random() < 0.8:
            value = inner
            continue
        kind = rng.random()
        if kind < 0.7:
            value[key] = copy.deepcopy(rng.choice(ODD))
        elif kind < 0.85:
            del value[key]
        elif isinstance(value, list):
            value.append(copy.deepcopy(inner))
        return


def mutation(files: list[bytes], seed: int, i: int) -> tuple[str, bytes]:
    """Mutation i of a seed: its name and the bytes."""
    rng = random.Random(f"{seed}.{i}")
    mutate = rng.choice(MUTATIONS)
    return mutate.__name__, mutate(rng.choice(files), rng)


def limit(data: bytes) -> int:
    """Bytes of memory that reading a file may take."""
    return MEMORY + MEMORY_PER_VALUE * (ALWAYS + VALUES * len(data))


def memory(name: str) -> int:
    """Bytes of memory that this process has ("VmSize") or had at most ("VmPeak"), used or not."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def attempt(data: bytes) -> str:
    """Reads a file; says how that ended. Raises AssertionError for too much time."""
    begun = time.process_time()
    try:
        read(data)
        outcome = "read"
    except FlyweightError as error:
        outcome = str(error)
        assert len(outcome) < 300, outcome
        assert "\n" not in outcome, outcome
    seconds = time.process_time() - begun
    assert seconds < SECONDS, f"took {seconds:.1f} s"
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    asked = parser.parse_args()
    files = [path.read_bytes() for path in sorted(GOLDEN.glob("*.fly"))]
    outcomes: Counter[str] = Counter()
    before, most = memory("VmSize"), limit(max(files, key=len))
    resource.setrlimit(resource.RLIMIT_AS, (before + most, before + most))
    begun, longest = time.perf_counter(), 0.0
    for i in range(asked.first, asked.first + asked.count):
        name, data = mutation(files, asked.seed, i)
        try:
            start = time.process_time()
            outcomes[" ".join(OWN.sub("…", attempt(data)).split()[:5])] += 1
            longest = max(longest, time.process_time() - start)
        except BaseException as error:
            raise SystemExit(f"mutation {i} of seed {asked.seed} ({name}): {type(error).__name__}: {error}") from error
    seconds = time.perf_counter() - begun
    for outcome, count in outcomes.most_common():
        print(f"{count:8d}  {outcome}")
    print(
        f"{asked.count} executions, none failed; {asked.count / seconds:.0f} a second; at most {longest:.2f} s and "
        f"{(memory('VmPeak') - before) / 1e6:.0f} MB, of {SECONDS:.0f} s and {most / 1e6:.0f} MB allowed"
    )


if __name__ == "__main__":
    main()
