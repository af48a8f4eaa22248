"""ONNX Runtime Web, the WebAssembly that browsers run, in a node process; times include the pixels' way there."""

import shutil
import struct
import subprocess
import tempfile
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, cast

import numpy as np

from flyweight.errors import FlyweightError, UsageError
from flyweight.export import web
from flyweight.exported import Exported

NAME = "onnxruntime-web"
TARGET = "web"
OPENS = {".onnx": ()}
NEEDS = ()
EXTRA = "onnx"
SCRIPT = Path(__file__).with_suffix(".mjs")
COMMON = "node_modules/onnxruntime-common"
READY = b"ready"


def lack() -> str | None:
    """What of node and npm's onnxruntime-web is not here, or None where all is."""
    if shutil.which("node") is None:
        return "node is not here: install Node.js"
    if reason := web.lack():
        return reason
    runtime = web.runtime().resolve()
    if any((folder / COMMON).is_dir() for folder in runtime.parents):
        return None
    return f"onnxruntime-common is not beside {runtime}: npm install onnxruntime-web brings both"


class Node:
    """A node process that holds a model; it ends with this object, or with the process that this object is in."""

    def __init__(self, runtime: Path, threads: int) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (`_end` closes it)
        command = ["node", SCRIPT, runtime, str(threads)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors)
        self._to, self._from = cast("IO[bytes]", process.stdin), cast("IO[bytes]", process.stdout)
        weakref.finalize(self, _end, process, self._errors)

    def ask(self, message: bytes, length: int) -> bytes:
        """The answer to a message, of so many bytes. Raises FlyweightError where the process has ended."""
        with suppress(BrokenPipeError):  # then there is no answer either
            self._to.write(message)
            self._to.flush()
        answer = self._from.read(length)
        if len(answer) < length:
            self._errors.seek(0)
            lines = self._errors.read().decode(errors="replace").split("\n")
            raise FlyweightError(f"{NAME} ended: {' '.join(lines).strip() or 'it says not why'}")
        return answer


def _end(process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
    process.communicate()  # closes its input, upon which it ends
    errors.close()


def start(exported: Exported, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """See `engines`. The process takes one picture at a time."""
    if reason := lack():
        raise UsageError(f"the engine {NAME} cannot be used: {reason}")
    node = Node(web.runtime().resolve(), threads)
    node.ask(struct.pack("<I", len(exported.data)) + exported.data, len(READY))

    def run(images: np.ndarray) -> np.ndarray:
        messages = (struct.pack("<3I", *each.shape) + each.tobytes() for each in images)
        answers = [node.ask(each, 4 * len(exported.classes)) for each in messages]
        return np.frombuffer(b"".join(answers), "<f4").reshape(len(images), len(exported.classes))

    return run
