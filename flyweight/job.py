"""One main job as it was asked for, its folder, and the time it takes."""

import errno
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from flyweight.errors import FlyweightError, Interrupted, UsageError

FILE = "run.json"
Asked = TypeVar("Asked")


@dataclass(frozen=True)
class Job:
    """What `flyweight fit` was asked to do; `weights` are what candidates start from, `notes` what was said of them."""

    source: str
    budget: str
    seconds: float
    threads: int
    seed: int
    skip_corrupt: bool
    version: str
    command: str
    pretrained: str | None = None
    weights: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()
    verb: str = "fit"
    engine: str = "onnxruntime"
    device: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As in run.json."""
        return asdict(self)


def new_folder(out: Path | None, source_name: str) -> Path:
    """Makes the run's folder: `out`, or runs/<data>-<time>. Raises UsageError where something is there already."""
    if out is None:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", source_name).strip("-.") or "data"
        out = Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
        while out.exists():  # two jobs within a second
            out = out.with_name(f"{out.name}-2")
    check_free(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the folder {out} cannot be made ({error.strerror}): choose another --out") from error
    return out


def check_free(out: Path) -> None:
    """Raises UsageError where `out` is a file or a folder that holds anything."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file: choose a new folder for --out")
    if out.exists() and any(out.iterdir()):
        resume = f", or go on with it: flyweight fit --resume {out}" if (out / FILE).exists() else ""
        what = "already holds a run" if (out / FILE).exists() else "is not empty"
        raise UsageError(f"{out} {what}: choose a new folder for --out{resume}")


def load(path: Path, verb: str, kind: Callable[..., Asked]) -> Asked:
    """What `flyweight VERB` was asked to do, from the file that it left. Raises UsageError where there is none such."""
    if not path.exists():
        raise UsageError(f"{path.parent} holds nothing that flyweight {verb} can resume: it has no {path.name}")
    try:
        values: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if (other := values.get("verb", verb)) != verb:
            raise UsageError(f"{path.parent} was made by another command: flyweight {other} --resume {path.parent}")
        return kind(**values)
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is damaged ({error}): start anew") from error


@contextmanager
def guarded(folder: Path, again: str) -> Iterator[None]:
    """Within it an interruption, and a full or read-only disk, become one sentence with the command that goes on."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; go on with: {again}") from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG):
            raise
        place, full = error.filename or folder, error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "make room" if full else "make it writable"
        raise FlyweightError(f"{place} cannot be written ({error.strerror}): {remedy}, then {again}") from error


class Stopwatch:
    """Seconds since the job began, those of an interrupted earlier part included, and the seconds of each stage."""

    def __init__(self, before: float = 0.0) -> None:
        self._start = time.perf_counter() - before
        self._stage_start = self.elapsed
        self.stages: dict[str, float] = {}

    @property
    def elapsed(self) -> float:
        """Seconds of work on the job so far."""
        return time.perf_counter() - self._start

    def ends(self, stage: str) -> None:
        """Books the time since the last stage's end under this stage."""
        now = self.elapsed
        self.stages[stage] = self.stages.get(stage, 0.0) + now - self._stage_start
        self._stage_start = now
