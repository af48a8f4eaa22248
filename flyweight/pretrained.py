"""Published weights: which there are, how a file of them is fetched and checked, and how a network is filled with it.

`pretrained.json` is the table, written by scripts/pretrained_table.py from what the publishers state. Nothing is
downloaded before somebody asks for it.
"""

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.client import HTTPException, HTTPMessage, HTTPResponse
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import torch

from flyweight import __version__, foreign, zoo
from flyweight.blocks import Options
from flyweight.data.pack import cache_folder
from flyweight.errors import FlyweightError, UsageError
from flyweight.net import Net, Spec
from flyweight.transfer import adopt, compare

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

TABLE = Path(__file__).with_name("pretrained.json")
HUB = "https://huggingface.co"
HUB_FILE = "model.safetensors"
FOLDER = "FLYWEIGHT_WEIGHTS"  # the environment variable that names a folder with files that are there already
TRIES = 5
PAUSE = 0.5  # seconds before the second try; the next pauses are longer by as much
TIMEOUT = 30.0  # seconds without a byte
BLOCK = 1 << 20
LIMIT = 1_000_000_000  # bytes; the largest file in the table has 360 million


@dataclass(frozen=True)
class Source:
    """One file of weights as its publisher describes it; empty or None where the publisher says nothing.

    `args` are what the network needs beside its name to be the one that was trained; `size` (height, width) is cut from
    the middle after the picture's smaller side was resized to `resize`; mean and std are of pixels in 0…1. Of weights
    at a `url`, `sha256` is the prefix that the file's name holds; the `hub` states it when the file is fetched.
    """

    model: str
    library: str
    name: str
    url: str = ""
    hub: str = ""
    sha256: str = ""
    args: Mapping[str, Any] = field(default_factory=dict)
    bytes: int = 0
    size: tuple[int, int] = (224, 224)
    resize: int | None = None
    interpolation: str = ""
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    licence: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def padding(self) -> str:
        """How windows are padded: "same" as in TensorFlow, or "symmetric"."""
        return str(self.args.get("padding", Options.padding))

    @property
    def file(self) -> str:
        """The file's name, in the cache and in the folder that FLYWEIGHT_WEIGHTS names."""
        return self.url.rpartition("/")[2] if self.url else f"{self.name}.safetensors"

    @property
    def address(self) -> str:
        """Where the file is downloaded from; HF_ENDPOINT names another server for files of the hub."""
        endpoint = (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
        return self.url or f"{endpoint}/{self.hub}/resolve/main/{HUB_FILE}"

    def spec(self) -> Spec:
        """The network that was trained."""
        return zoo.spec_of(self.model, **self.args)

    @property
    def host(self) -> str:
        """The server of the address."""
        return urlsplit(self.address).netloc


@cache
def table() -> dict[str, tuple[Source, ...]]:
    """Model name → its published weights, best first."""
    models = json.loads(TABLE.read_text(encoding="utf-8"))
    return {name: tuple(_source(name, each) for each in entries) for name, entries in models.items()}


def _source(model: str, entry: Mapping[str, Any]) -> Source:
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    return Source(model=model, **values)


def sources(name: str) -> list[Source]:
    """The published weights of a named model, best first; none for most narrow or small ones."""
    return list(table().get(name, ()))


def choose(name: str, **args: Any) -> Source:
    """The best published weights that fit a named model with these arguments.

    Another `num_classes`, `in_chans`, `size` or `aux` fits; another shape elsewhere does not. Raises UsageError.
    """
    known = sources(name)
    if not known:
        family = zoo.spec_of(name).family
        near = [each for each in table() if zoo.spec_of(each).family == family] or list(table())
        raise UsageError(
            f"no weights of {name} are published, but of {', '.join(near)}; `pretrained` may be the path of a file"
        )
    misfits: list[str] = []
    with torch.device("meta"):
        asked = zoo.structure(zoo.spec_of(name, **args))
        for source in known:
            changes = compare(asked, zoo.structure(source.spec()))
            misfits = [key for key, change in changes.items() if change == "misfit"]
            if not misfits:
                return source
    told = ", ".join(f"{key}={value!r}" for key, value in args.items())
    raise UsageError(f"no published weights of {name} fit {told}: {min(misfits)} has another shape there or is missing")


def load_pretrained(net: Net, source: Source, folder: Path | None = None) -> list[str]:
    """Fills a network with published weights, fetched where need be; says in words what was dropped or changed.

    With other `num_classes` the classifier stays as it is; with other `in_chans` the first convolution is adapted.
    The network's `pretrained_cfg` then tells the input that the weights want. `choose` finds a source that fits.
    """
    changes = adopt(net, read(source, fetch(source, folder)))
    net.pretrained_cfg = _input(source, net)
    return changes


def read(source: Source, path: Path) -> Net:
    """The network of a source with the weights in its file. Raises FlyweightError where the file holds others."""
    net = zoo.structure(source.spec())
    try:
        foreign.take(net, foreign.read_weights(path))
    except UsageError as error:
        raise FlyweightError(f"{path} does not hold {source.name}: {error}") from error
    return net


def local(source: Source, folder: Path | None = None) -> Path | None:
    """The file of a source if it is there: in the folder that FLYWEIGHT_WEIGHTS names, or in the cache `folder`.

    Raises FlyweightError where it has not the checksum that its publisher states.
    """
    own = os.environ.get(FOLDER)
    for place in (Path(own) if own else None, folder or cache_folder() / "weights"):
        if place and (path := place / source.file).is_file():
            if source.sha256 and not _sha256(path).startswith(source.sha256):
                raise FlyweightError(
                    f"{path} is not the published file, whose sha256 begins with {source.sha256}: remove it"
                )
            return path
    return None


def fetch(source: Source, folder: Path | None = None) -> Path:
    """The file of a source: where it is there (`local`), without any request, or else downloaded into the cache.

    A download that broke off goes on where it stopped, and the file appears under its name only when its length and its
    checksum are right. Raises FlyweightError, with the remedy, where there is no way to the right file.
    """
    folder = folder or cache_folder() / "weights"
    path = folder / source.file
    if found := local(source, folder):
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(f"{path.name}.lock")):
            return local(source, folder) or _download(source, path)  # another process may have fetched it meanwhile
    except OSError as error:
        reason = error.strerror or error
        raise FlyweightError(f"cannot write {path}: {reason}; set FLYWEIGHT_CACHE to another folder") from error


class _Broken(Exception):
    """The server or the line failed in a way that may pass."""


class _Redirects(HTTPRedirectHandler):
    """Follows redirects, never to an unprotected address, and keeps what the hub states of the file on the way."""

    def __init__(self) -> None:
        self.stated: dict[str, str] = {}

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise FlyweightError(f"{req.full_url} leads to {newurl}, which is not protected: it was not followed")
        self.stated |= _linked(headers)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@dataclass
class _Part:
    """What is there of a download, and the mark (ETag or date) of the version that it is a part of."""

    path: Path

    @property
    def mark_path(self) -> Path:
        return self.path.with_name(f"{self.path.name}.mark")

    def mark(self) -> str:
        return self.mark_path.read_text(encoding="utf-8") if self.mark_path.is_file() else ""

    def length(self) -> int:
        """The bytes that can be gone on from: none where nobody could say whether the file has changed since."""
        return self.path.stat().st_size if self.path.is_file() and self.mark() else 0

    def begin(self, mark: str) -> None:
        self.path.write_bytes(b"")  # first: an old part must never have a new mark
        self.mark_path.write_text(mark, encoding="utf-8")

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.mark_path.unlink(missing_ok=True)


def _download(source: Source, path: Path) -> Path:
    part = _Part(path.with_name(f"{path.name}.part"))
    reason = ""
    for attempt in range(TRIES):
        time.sleep(PAUSE * attempt)
        try:
            sha256 = _receive(source, part, first=attempt == 0)
        except _Broken as error:
            reason = str(error)
            continue
        actual = _sha256(part.path)
        if not actual.startswith(sha256):
            part.remove()
            raise FlyweightError(
                f"{source.address} is not the published file: its sha256 begins with {actual[: len(sha256)]} instead "
                f"of {sha256}; it was not kept"
            )
        part.path.replace(path)
        part.remove()
        return path
    raise FlyweightError(
        f"{source.host} failed {TRIES} times ({reason}): {part.length():,} bytes of {path.name} are kept, and the same "
        "command goes on from there"
    )


def _receive(source: Source, part: _Part, first: bool) -> str:
    """Asks for what is missing of a file and appends it; returns the sha256, or its prefix, of the whole."""
    headers = {"User-Agent": f"flyweight/{__version__}", "Accept-Encoding": "identity"}
    if part.length():
        headers |= {"Range": f"bytes={part.length()}-", "If-Range": part.mark()}
    redirects = _Redirects()
    try:
        response = build_opener(redirects).open(Request(source.address, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        raise _refused(error, source, part) from error
    except (URLError, HTTPException, OSError) as error:
        reason = getattr(error, "reason", error) or type(error).__name__
        if first:
            raise FlyweightError(
                f"cannot reach {source.host} ({reason}): put {source.address} as {source.file} into "
                f"{part.path.parent} or into a folder that {FOLDER} names"
            ) from error
        raise _Broken(str(reason)) from error
    with response:
        linked = {**_linked(response.headers), **redirects.stated}  # what the hub says counts, not whom it refers to
        sha256 = source.sha256 or linked.get("sha256", "")
        if not sha256:
            raise FlyweightError(
                f"{source.host} states no sha256 of {source.file}, so it was not taken: put a file that you trust into "
                f"{part.path.parent}"
            )
        total = _length(response, part, source)
        if linked.get("size", str(total)) != str(total):
            part.remove()
            raise FlyweightError(
                f"{source.host} offers {total:,} bytes of {source.file}, which has {int(linked['size']):,}: try later"
            )
        _append(response, part.path, total)
    return sha256


def _refused(error: HTTPError, source: Source, part: _Part) -> Exception:
    """What an error's status means: whether another try can help."""
    told = f"{error.code} {error.reason}"
    error.close()
    if error.code == 416:  # nothing lies beyond what is there: begin anew
        part.remove()
        return _Broken(told)
    if error.code in (408, 429) or error.code >= 500:
        return _Broken(told)
    return FlyweightError(
        f"{source.host} answers {told} for {source.address}: put the file as {source.file} into {part.path.parent}"
    )


def _linked(headers: HTTPMessage) -> dict[str, str]:
    """What the hub states of a large file: its size, and as ETag its sha256."""
    found: dict[str, str] = {}
    if (headers.get("X-Linked-Size") or "").isdecimal():
        found["size"] = headers["X-Linked-Size"]
    for name in ("ETag", "X-Linked-ETag"):
        if match := re.fullmatch(r'(?:W/)?"?([0-9a-f]{64})"?', headers.get(name) or ""):
            found["sha256"] = match[1]
    return found


def _length(response: HTTPResponse, part: _Part, source: Source) -> int:
    """The length of the whole file; the part is emptied where the server does not go on from its end.

    Raises FlyweightError where the length is not stated or is beyond all reason.
    """
    headers = response.headers
    tag = headers.get("ETag") or ""
    mark = tag if tag and not tag.startswith("W/") else headers.get("Last-Modified") or ""
    if response.status == 206:
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", headers.get("Content-Range") or "")
        if not match or int(match[1]) != part.length() or mark not in ("", part.mark()):
            part.remove()
            raise _Broken("the server went on with something else")
        total = int(match[3])
    else:
        stated = headers.get("Content-Length") or ""
        if not stated.isdecimal():
            raise FlyweightError(
                f"{source.host} does not say how long {source.file} is, so it was not taken: put it into "
                f"{part.path.parent} yourself"
            )
        total = int(stated)
        part.begin(mark)
    if total > LIMIT:
        part.remove()
        raise FlyweightError(f"{source.host} offers {total:,} bytes as {source.file}, more than any weights have")
    return total


def _append(response: HTTPResponse, path: Path, total: int) -> None:
    """Appends what is sent, up to `total` bytes in all. Raises _Broken where it ends before."""
    with path.open("ab") as file:
        at = file.tell()
        while at < total:
            try:
                block = response.read(min(BLOCK, total - at))
            except (HTTPException, OSError) as error:
                raise _Broken(str(error) or type(error).__name__) from error
            if not block:
                raise _Broken(f"the connection ended after {at:,} of {total:,} bytes")
            file.write(block)
            at += len(block)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _locked(path: Path) -> Generator[None, None, None]:
    """Holds a lock between processes, which ends with the process at the latest; the empty file stays."""
    with path.open("ab") as file:
        if sys.platform == "win32":
            while True:
                try:
                    msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
                    break
                except OSError:  # after ten seconds
                    continue
        else:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _input(source: Source, net: Net) -> dict[str, Any]:
    """What the weights want as input, in timm's terms; grey takes the mean over the colours."""
    found: dict[str, Any] = {"source": source.name, "interpolation": source.interpolation}
    for key, values in (("mean", source.mean), ("std", source.std)):
        grey = (sum(values) / len(values),)
        found[key] = grey if net.in_chans == 1 else tuple(values[i % len(values)] for i in range(net.in_chans))
    if source.resize:
        found["crop_pct"] = source.size[0] / source.resize
    return found
