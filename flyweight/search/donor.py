"""A file of weights that a network starts from: one of ours, or a published one under its library's names."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flyweight.adapt import normalise_features
from flyweight.errors import UsageError
from flyweight.net import Net, Spec
from flyweight.preprocess import Preprocess
from flyweight.pretrained import HUB_FILE, Source, choose, fetch, read, table
from flyweight.train.inputs import normalise
from flyweight.transfer import adopt
from flyweight.weights import load_into, load_preprocess, load_spec
from flyweight.zoo import structure, variants


@dataclass(frozen=True)
class Donor:
    """Weights at `path`, known by their checksum; `source` is their entry in the table of published ones, if any."""

    path: Path
    sha256: str
    source: Source | None = None

    @property
    def name(self) -> str:
        """The publisher's name, else the file's, or its folder's where it has the name that all runs give."""
        if self.source:
            return self.source.name
        return self.path.parent.name if self.path.name == HUB_FILE else self.path.stem

    @property
    def licence(self) -> str:
        """What the publisher states; empty where nobody does."""
        return self.source.licence if self.source else ""

    def told(self) -> str:
        """Whose weights they are, their licence and where they lie, in words."""
        if self.source is None:
            return f"{self.name} ({self.path})"
        return f"{self.source.library}'s {self.name} (licence: {self.licence or 'not stated'}; {self.path})"

    def spec(self) -> Spec:
        """The network that was trained."""
        return self.source.spec() if self.source else load_spec(self.path)

    def net(self) -> Net:
        """The network with its weights, in evaluation mode. Raises FlyweightError where the file holds others."""
        if self.source:
            return read(self.source, self.path).eval()
        net = structure(self.spec())
        load_into(net, self.path)
        return net.eval()

    def preprocess(self) -> Preprocess:
        """How pictures were made ready for it, as far as mean, deviation and size tell. Raises UsageError."""
        if self.source is None:
            return load_preprocess(self.path)
        mean, std = (tuple(255 * value for value in values) for values in (self.source.mean, self.source.std))
        return Preprocess(self.source.size, self.spec().input[0], mean, std)

    def into(self, net: Net, pictures: np.ndarray) -> tuple[Preprocess, list[str]]:
        """Fills a network for other classes with these weights; its preprocessing, and what was changed, in words.

        `pictures` are some of those it will learn from, at its size: uint8 [N, H, W, C].
        """
        donor, preprocess = self.net(), self.preprocess().at(pictures.shape[1], pictures.shape[3])
        changes = adopt(net, donor)
        if net.num_classes != donor.num_classes:  # a classifier that is kept knows the scale
            scale = normalise_features(net, normalise(torch.from_numpy(pictures), preprocess))
            if scale != 1:
                changes.append(f"its features, which nothing normalises, were divided by {scale:.3g}")
        return preprocess, changes

    def check(self) -> None:
        """Raises UsageError where the file is gone or has changed."""
        if not self.path.is_file():
            raise UsageError(f"{self.path}, which the job starts from, is gone: put it back, or start the job anew")
        if _sha256(self.path) != self.sha256:
            raise UsageError(
                f"{self.path} is not the file that the job started from (sha256 {self.sha256[:8]}…): put that back, or "
                "start the job anew"
            )

    def to_json(self) -> dict[str, Any]:
        """As in run.json and result.json."""
        return {
            "name": self.name,
            "library": self.source.library if self.source else None,
            "licence": self.licence or None,
            "address": self.source.address if self.source else None,
            "path": str(self.path),
            "sha256": self.sha256,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Donor":
        """The inverse of `to_json`. Raises UsageError where the table no longer has the weights."""
        path, sha256, library = Path(value["path"]), value["sha256"], value["library"]
        if library is None:
            return cls(path, sha256)
        for source in (each for entries in table().values() for each in entries):
            if (source.library, source.name) == (library, value["name"]):
                return cls(path, sha256, source)
        raise UsageError(f"this version knows no weights {value['name']} of {library}: start the job anew")


def open_donor(path: Path, source: Source | None = None) -> Donor:
    """The weights in a file, read once to know that they are some. Raises UsageError or FlyweightError."""
    donor = Donor(path.absolute(), "", source)
    donor.preprocess()
    donor.net()
    return Donor(donor.path, _sha256(path), source)


def find_donor(model: str) -> Donor:
    """The weights of a run's folder, of a model.safetensors, or the best published ones of a network, by its name.

    Published ones are downloaded where they are not cached. Raises UsageError, FlyweightError.
    """
    path = Path(model)
    if path.exists():
        return open_donor(path / HUB_FILE if path.is_dir() else path)
    if model not in variants():
        near = get_close_matches(model, table(), 4, 0.5)
        like = f" such as {', '.join(near)}" if near else ""
        raise UsageError(
            f"{model} does not exist: give a run's folder, a model.safetensors, or the name of a network that weights "
            f"are published of{like} (docs/weights.md)"
        )
    source = choose(model)
    return open_donor(fetch(source), source)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
