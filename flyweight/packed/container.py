"""The file around the tensors: FORMAT.md is its description, and what is read here is checked before it is used."""

import hashlib
import json
import lzma
import math
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from flyweight.affine import fold_bias, fold_kernel, norm_scale
from flyweight.packed import models
from flyweight.packed.coder import Decoder
from flyweight.packed.damage import DamagedError
from flyweight.packed.tensors import DTYPES, Form, Numbers, tensor
from flyweight.preprocess import Preprocess

MAGIC, VERSION = b"FLYW", 1
START = struct.Struct("<4sH32sIIII")  # magic, version, SHA-256 of all that follows it, four lengths
DIGESTED = 4 + 2 + 32  # bytes that the digest does not cover
MOST_BYTES = 1 << 30  # of a file, and of all tensors that it may hold
VALUES, ALWAYS = 32, 1 << 20  # tensors may have VALUES values for each byte of the file, and ALWAYS so many
PLANE = 1024  # values that a plane of a tensor counts for beside its own: what its time amounts to
MOST_HEADER, HEADER_EXPANSION, HEADER_ALWAYS = 1 << 22, 32, 1 << 16
MOST_AXES, MOST_SIDE = 8, 8192
FILTERS = [{"id": lzma.FILTER_LZMA1, "dict_size": 1 << 20, "lc": 3, "lp": 0, "pb": 0}]

NORM = ("weight", "bias", "running_mean", "running_var")  # a norm's tensors by the names of its network

Piece = list[Any]
Tensors = Mapping[str, NDArray]


@dataclass
class Contents:
    """All that a packed file holds. `pieces` tell how the ONNX file is put together from `skeleton` and tensors:

    ["skeleton", n] its next n bytes, ["tensor", name], ["classes"], ["preprocess"], and ["kernel" or "bias", conv,
    norm, epsilon], a convolution with the batch normalisation after it folded in.
    """

    name: str
    spec: Mapping[str, Any] | None
    preprocess: Preprocess
    classes: tuple[str, ...]
    tensors: dict[str, NDArray]
    pieces: list[Piece] = field(default_factory=list)
    skeleton: bytes = b""

    def onnx(self) -> bytes:
        """The ONNX file. Raises DamagedError where its pieces do not fit together."""
        at, found = 0, []
        room = 2 * (sum(each.nbytes for each in self.tensors.values()) + MOST_HEADER)
        for piece in self.pieces:
            if piece[0] == "skeleton":
                found.append(self.skeleton[at : at + piece[1]])
                at += piece[1]
            else:
                found.append(self.piece(piece))
                room -= len(found[-1])
            if room < 0:
                raise DamagedError("puts its ONNX file together from more than it holds")
        return b"".join(found)

    def piece(self, piece: Piece) -> bytes:
        """What a piece that is not of the skeleton stands for."""
        match piece:
            case ["classes"]:
                return json.dumps(list(self.classes)).encode()
            case ["preprocess"]:
                return json.dumps(self.preprocess.to_json()).encode()
            case ["tensor", str(name)] if name in self.tensors:
                return self.tensors[name].tobytes()
            case ["kernel" | "bias" as part, str(conv), str(norm), float(epsilon)]:
                return folded(self.tensors, part, conv, norm, epsilon)
        raise DamagedError("puts its ONNX file together from unknown pieces")

    def checksum(self) -> int:
        """CRC-32 of the tensors and the ONNX file: what decoding must arrive at."""
        found = zlib.crc32(self.onnx())
        for each in self.tensors.values():
            found = zlib.crc32(each.reshape(-1).view(np.uint8).data, found)
        return found


def folded(tensors: Tensors, part: str, conv: str, norm: str, epsilon: float) -> bytes:
    """A kernel or a bias with batch normalisation folded in, as export folds it."""
    try:
        weight, shift, mean, variance = vectors = [tensors[f"{norm}.{each}"] for each in NORM]
        kernel, before = tensors[f"{conv}.weight"], tensors.get(f"{conv}.bias", np.zeros_like(mean))
    except KeyError as error:
        raise DamagedError(f"folds {norm!r} into {conv!r}, and has no {error}") from error
    vectors.append(before)
    if any(each.shape != kernel.shape[:1] or not each.dtype == kernel.dtype == np.float32 for each in vectors):
        raise DamagedError(f"folds {norm!r} into {conv!r}, which do not fit together")
    scale = norm_scale(weight, variance, epsilon)
    return (fold_kernel(kernel, scale) if part == "kernel" else fold_bias(before, mean, scale, shift)).tobytes()


def read(data: bytes) -> Contents:
    """What a packed file holds. Raises DamagedError, whose message is what the file does wrong."""
    text, skeleton, raw, words = sections(data)
    header = _json(text)
    contents = _contents(header, skeleton)
    coder, numbers = Decoder(words, raw), Numbers()
    entries = _entries(header.get("tensors"), len(data))
    for name, dtype, shape, form in entries:
        contents.tensors[name] = tensor(coder, numbers, form, dtype, shape, None)
    coder.close()
    if contents.checksum() != header.get("crc32"):
        raise DamagedError("decodes to other values than were packed")
    return contents


def write(contents: Contents, forms: Iterable[Form], words: bytes, raw: bytes) -> bytes:
    """The bytes of a packed file; `words` and `raw` hold the tensors in these forms."""
    header = json.dumps(
        {
            "name": contents.name,
            "spec": contents.spec,
            "preprocess": contents.preprocess.to_json(),
            "classes": list(contents.classes),
            "tensors": [
                [name, each.dtype.name, list(each.shape), form]
                for (name, each), form in zip(contents.tensors.items(), forms, strict=True)
            ],
            "onnx": contents.pieces,
            "crc32": contents.checksum(),
        },
        ensure_ascii=False,
        separators=(",", ":"),
    ).encode()
    return seal(header, contents.skeleton, raw, words)


def seal(header: bytes, skeleton: bytes, raw: bytes, words: bytes) -> bytes:
    """The parts of a packed file as one, under their checksum."""
    text = lzma.compress(header + skeleton, lzma.FORMAT_RAW, filters=FILTERS)
    lengths = struct.pack("<IIII", len(text), len(header), len(skeleton), len(raw))
    body = lengths + text + raw + words
    return MAGIC + struct.pack("<H", VERSION) + hashlib.sha256(body).digest() + body


def sections(data: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    """The inverse of `seal`. Raises DamagedError where checksum or lengths are wrong."""
    if data[: len(MAGIC)] != MAGIC[: len(data)] or not data:
        raise DamagedError("is no packed file: it does not begin with FLYW")
    if len(data) < START.size:
        raise DamagedError("is truncated")
    _, version, digest, packed, length, skeleton, raw = START.unpack_from(data)
    if version != VERSION:
        raise DamagedError(f"has version {version} of the format, and this flyweight reads {VERSION}: update it")
    if hashlib.sha256(data[DIGESTED:]).digest() != digest:
        raise DamagedError("is truncated or damaged: its checksum is wrong")
    if START.size + packed + raw > len(data) or (len(data) - START.size - packed - raw) % 2:
        raise DamagedError("states lengths that are not those of its parts")
    most = min(MOST_HEADER, HEADER_EXPANSION * packed + HEADER_ALWAYS)
    if length + skeleton > most:
        raise DamagedError(f"states a header of {length + skeleton:,} bytes, more than the {most:,} that are read")
    plain = _inflated(data[START.size : START.size + packed], length + skeleton)
    rest = START.size + packed
    return plain[:length], plain[length:], data[rest : rest + raw], data[rest + raw :]


def _inflated(text: bytes, length: int) -> bytes:
    try:
        found = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=FILTERS).decompress(text, max_length=length + 1)
    except lzma.LZMAError as error:
        raise DamagedError("has a damaged header") from error
    if len(found) != length:
        raise DamagedError("has a header of another length than it states")
    return found


def _json(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise DamagedError("has a header that is no JSON") from error
    if not isinstance(found, dict):
        raise DamagedError("has a header that is no JSON object")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise DamagedError("has a name twice in its header")
    return found


def _contents(header: Mapping[str, Any], skeleton: bytes) -> Contents:
    """The header's other values, without the tensors."""
    name, spec, classes, pieces = (header.get(key) for key in ("name", "spec", "classes", "onnx"))
    if not isinstance(name, str) or not (spec is None or isinstance(spec, dict)):
        raise DamagedError("has no name or no Spec in its header")
    if not isinstance(classes, list) or not all(isinstance(each, str) for each in classes):
        raise DamagedError("has no list of classes in its header")
    if not isinstance(pieces, list) or not all(isinstance(each, list) and each for each in pieces):
        raise DamagedError("does not say how its ONNX file is put together")
    lengths = [each[1:] for each in pieces if each[0] == "skeleton"]
    counts = [each[0] for each in lengths if len(each) == 1 and _is_count(each[0])]
    if len(counts) < len(lengths) or sum(counts) != len(skeleton):
        raise DamagedError("has an ONNX skeleton of another length than its pieces")
    return Contents(name, spec, _preprocess(header.get("preprocess")), tuple(classes), {}, pieces, skeleton)


def _preprocess(value: Any) -> Preprocess:
    try:
        found = Preprocess.from_json(value)
        numbers = [*found.mean, *found.std]
        sides = all(_is_count(side) and 0 < side <= MOST_SIDE for side in found.size)
        known = found.channels in (1, 3) and len(found.mean) == len(found.std) == found.channels
        if sides and known and all(isinstance(each, int | float) and math.isfinite(each) for each in numbers):
            return found
    except (TypeError, KeyError, ValueError, OverflowError):
        pass
    raise DamagedError("does not say how pictures are made ready")


def _entries(value: Any, file_bytes: int) -> list[tuple[str, np.dtype, tuple[int, ...], Form]]:
    """Name, type, shape and form of each tensor, once it is known that all of them may be decoded."""
    if not isinstance(value, list):
        raise DamagedError("has no list of tensors in its header")
    limit = ALWAYS + VALUES * file_bytes
    found, names, total, size = [], set(), 0, 0
    for each in value:
        match each:
            case [str(name), str(kind), list(shape), list(form)] if kind in DTYPES and _is_shape(shape):
                total += math.prod(shape) + PLANE * models.planes(tuple(shape))[0]
                size += DTYPES[kind].itemsize * math.prod(shape)
                found.append((name, DTYPES[kind], tuple(shape), form))
            case _:
                raise DamagedError("describes a tensor in a way that is not known")
        if name in names:
            raise DamagedError(f"has two tensors with the name {name!r}")
        names.add(name)
        if total > limit or size > MOST_BYTES:
            raise DamagedError(f"states tensors of more than the {limit:,} values that a file of its size may hold")
    return found


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and value >= 0


def _is_shape(shape: list[Any]) -> bool:
    return len(shape) <= MOST_AXES and all(_is_count(side) and 0 < side <= MOST_BYTES for side in shape)
