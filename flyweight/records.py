"""What happened, as JSON objects in `records.jsonl`: the only source of progress lines, reports and resumption."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Listener = Callable[[Record], None]


class Records:
    """Appends records to a run's file and tells a listener; reads back what an interrupted job has left."""

    def __init__(self, folder: Path, clock: Callable[[], float], listener: Listener | None = None) -> None:
        self.path = folder / "records.jsonl"
        self.clock = clock
        self.listener = listener or (lambda record: None)
        self.past = read_records(self.path)
        self._drop_partial_line()

    def write(self, kind: str, **values: Any) -> Record:
        """Appends one record, with `at`, the seconds since the job began."""
        record = {"kind": kind, "at": round(self.clock(), 2), **values}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self.past.append(record)
        self.listener(record)
        return record

    def say(self, message: str) -> None:
        """Appends a `log` record."""
        self.write("log", message=message)

    def progress(self, stage: str, share: float) -> None:
        """Tells the listener, and nobody else, how far a stage is (0 to 1)."""
        self.listener({"kind": "progress", "stage": stage, "share": share})

    def find(self, kind: str, **values: Any) -> Record | None:
        """The last record of this kind with these values."""
        for record in reversed(self.past):
            if record["kind"] == kind and all(record.get(key) == value for key, value in values.items()):
                return record
        return None

    def all(self, kind: str) -> list[Record]:
        """The records of one kind, in order."""
        return [record for record in self.past if record["kind"] == kind]

    def position(self) -> int:
        """Bytes written so far, brought to the disk itself: what `cut` goes back to."""
        if not self.path.exists():
            return 0
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size

    def positions(self) -> list[tuple[Record, int]]:
        """Each record with the byte that it begins at."""
        found, begin = [], 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            found.append((json.loads(line), begin))
            begin += len(line)
        return found

    def cut(self, position: int) -> None:
        """Drops what was written after `position`: records of work that is about to be done again."""
        if self.path.exists() and self.path.stat().st_size > position:
            os.truncate(self.path, position)
            self.past = read_records(self.path)

    def _drop_partial_line(self) -> None:
        """Cuts off a last line that a crash left unfinished, so that the next record starts on a line of its own."""
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(self.path, whole)


def decoding(listener: Listener | None) -> Callable[[int, int], None]:
    """Tells a listener how many of the pictures are decoded: what `data.prepare` reports to."""
    return lambda done, total: listener and listener({"kind": "progress", "stage": "decoding", "share": done / total})


def seconds_spent(folder: Path) -> float:
    """The work that is in a run's records, those of an interrupted one."""
    return max((float(record["at"]) for record in read_records(folder / "records.jsonl")), default=0.0)


def read_records(path: Path) -> list[Record]:
    """The whole records of a file; an unfinished last line is passed over."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines if line]
