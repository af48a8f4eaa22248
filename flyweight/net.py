"""What a network is: the Spec that rebuilds it, and the Net, one contract (timm's names) for every family."""

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

from torch import Tensor, nn

from flyweight.channels import narrow
from flyweight.errors import UsageError
from flyweight.graph import Field, trace
from flyweight.initialise import draw, small_normal
from flyweight.ops import GlobalAvgPool, GlobalMaxPool

# The last 1 × 1 convolution of some families, which only the classifier wants: no feature for other tasks.
FINAL = "final"
POOLS = {"avg": GlobalAvgPool, "max": GlobalMaxPool, "": nn.Identity}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Spec:
    """All that rebuilds a network's structure, in JSON values: registry, search, checkpoints and reports exchange it.

    `input` is (channels, height, width); `widths` the channels that are left where pruning took some away, by the path
    of the leaf that computes them (`channels.narrow`).
    """

    family: str
    args: Mapping[str, Any] = field(default_factory=dict)
    input: tuple[int, int, int] = (3, 224, 224)
    widths: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The Spec as JSON values."""
        return {"family": self.family, "args": dict(self.args), "input": list(self.input), "widths": dict(self.widths)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Spec":
        """The inverse of `to_json`."""
        channels, height, width = value["input"]
        return cls(value["family"], value["args"], (channels, height, width), value.get("widths", {}))

    def with_args(self, **args: Any) -> "Spec":
        """The Spec with some arguments changed."""
        return replace(self, args={**self.args, **args})


# What another library calls our modules: a pattern for the whole path of ours, and theirs as a template for
# `re.Match.expand` or a function of the match.
Rules = list[tuple[str, str | Callable[[re.Match[str]], str]]]


class Head(Protocol):
    """What a Net asks of the module that turns its last feature map into logits."""

    in_features: int
    hidden_features: int
    pool: nn.Module
    fc: nn.Module

    def linear(self, num_classes: int) -> nn.Module: ...
    def pre_logits(self, x: Tensor) -> Tensor: ...


class FeatureInfo(list[dict[str, Any]]):
    """A dict per feature: `num_chs`, `reduction` (its stride in pixels) and `module`, the path of what computes it."""

    def channels(self) -> list[int]:
        """The channels of each feature."""
        return [each["num_chs"] for each in self]

    def reduction(self) -> list[int]:
        """The stride of each feature."""
        return [each["reduction"] for each in self]

    def module_name(self) -> list[str]:
        """The path of the module behind each feature."""
        return [each["module"] for each in self]


class Net(nn.Module):
    """Stages that shrink the picture and a head that names it: normalised [N, C, H, W] → logits [N, classes].

    `aux` holds heads on inner stages, by the stage's name, that help training and are not deployed.
    """

    def __init__(
        self,
        stages: "OrderedDict[str, nn.Module]",
        head: nn.Module,
        aux: "OrderedDict[str, nn.Module] | None" = None,
        aux_weight: float = 0.3,
    ) -> None:
        super().__init__()
        self.features = nn.Sequential(stages)
        self.head = head
        self.aux = nn.ModuleDict(aux or {})
        self.aux_weight = aux_weight
        self.spec = Spec("")
        self.taps: tuple[str, ...] | None = None
        self._cfg: dict[str, Any] = {}

    @property
    def _head(self) -> Head:
        return cast(Head, self.head)

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, C, H, W] → the last feature map."""
        return self.features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last feature map → logits [N, classes], or with `pre_logits` what the last layer reads."""
        return self._head.pre_logits(x) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_aux(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The logits, and those of the auxiliary heads: what the loss asks for in training."""
        logits: list[Tensor] = []
        for name, stage in self.features.named_children():
            x = stage(x)
            if name in self.aux:
                logits.append(self.aux[name](x))
        return self.forward_head(x), logits

    @property
    def num_features(self) -> int:
        """The channels of the last feature map."""
        return self._head.in_features

    @property
    def head_hidden_size(self) -> int:
        """The values that the last layer reads."""
        return self._head.hidden_features

    @property
    def in_chans(self) -> int:
        """The channels of the pictures."""
        return self.spec.input[0]

    @property
    def num_classes(self) -> int:
        """How many classes the logits are for; 0 without a classifier."""
        return int(self.spec.args.get("num_classes", 1000))

    def get_classifier(self) -> nn.Module:
        """The layer that makes the logits."""
        return self._head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, untrained classifier for `num_classes`; 0: none, so that the answers are features.

        `global_pool` "avg" or "max" changes the pooling where no hidden layers depend on it; "", for no classes, takes
        pooling and hidden layers away, so that the answer is the last feature map.
        """
        if global_pool is not None:
            self._change_pool(global_pool, num_classes)
        like = next(self.parameters())
        for head in (self.head, *self.aux.values()):
            new = cast(Head, head).linear(num_classes).to(like).train(self.training)
            draw(new, small_normal, small_normal)
            cast(Head, head).fc = new
        self.spec = self.spec.with_args(num_classes=num_classes)

    def _change_pool(self, name: str, num_classes: int) -> None:
        if name not in POOLS:
            raise UsageError(f"global_pool is one of {', '.join(map(repr, POOLS))}, not {name!r}")
        hidden = getattr(self.head, "hidden", nn.Identity())
        if name == "":
            if num_classes:
                raise UsageError('global_pool="" leaves a map, which no classifier takes: it needs num_classes=0')
            self.head.add_module("hidden", nn.Identity())
            self._head.hidden_features = self._head.in_features
        elif type(self._head.pool) is POOLS[name]:
            return
        elif not isinstance(hidden, nn.Identity):
            raise UsageError(f"the hidden layers of {self.spec.family}'s classifier fix its pooling")
        self._head.pool = POOLS[name]()

    def narrow(self, widths: Mapping[str, int]) -> None:
        """Leaves so many channels (`channels.narrow`). Auxiliary heads, which only help training, are taken away."""
        self.aux.clear()
        narrow(self, self.spec.input, widths)
        graph = trace(self, self.spec.input)
        fc = next(node for node in graph.nodes if node.leaf is self.get_classifier())
        self._head.in_features = [node for node in graph.nodes if node.path.startswith("features.")][-1].shape[0]
        self._head.hidden_features = graph.shapes[fc.inputs[0]][0]

    @property
    def feature_info(self) -> FeatureInfo:
        """The last feature at each stride of the net (before dilation took strides away)."""
        fields, shapes = self._stage_ends()
        taps = self.taps or tap_names(fields)
        info = [{"num_chs": shapes[n], "reduction": fields[n].stride, "module": f"features.{n}"} for n in taps]
        return FeatureInfo(info)

    def _stage_ends(self) -> tuple[dict[str, Field], dict[str, int]]:
        """The field and the channels of each stage's output."""
        graph = trace(self.features, self.spec.input)
        fields: dict[str, Field] = {}
        channels: dict[str, int] = {}
        for node in graph.nodes:
            stage = node.path.split(".")[0]
            fields[stage], channels[stage] = graph.fields[node.name], node.shape[0]
        return fields, channels

    def keep_taps(self) -> None:
        """Remembers at which stages the strides end, before some of them are replaced by dilation."""
        self.taps = tap_names(self._stage_ends()[0])

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """timm's description of a model: input, normalisation, the names of its first and last layer."""
        first = next(name for name, leaf in self.named_modules() if isinstance(leaf, nn.Conv2d))
        last = next((name for name, leaf in self.named_modules() if leaf is self.get_classifier()), "")
        pool_size = trace(self.features, self.spec.input).nodes[-1].shape[1:]
        return {
            "architecture": self.spec.family,
            "num_classes": self.num_classes,
            "input_size": self.spec.input,
            "pool_size": pool_size,
            "crop_pct": 0.875,
            "interpolation": "bilinear",
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
            "first_conv": first,
            "classifier": last,
            **self._cfg,
        }

    @pretrained_cfg.setter
    def pretrained_cfg(self, cfg: Mapping[str, Any]) -> None:
        self._cfg = dict(cfg)

    default_cfg = pretrained_cfg  # timm's older name


def tap_names(fields: Mapping[str, Field]) -> tuple[str, ...]:
    """The last stage at each stride, from fine to coarse."""
    last = {field.stride: name for name, field in fields.items() if name != FINAL}
    return tuple(last.values())


class FeatureNet(nn.Module):
    """A Net without its head: [N, C, H, W] → a list of features, from fine to coarse.

    `out_indices` choose among `net.feature_info`, as in a list, negative ones from the end; a number means the last so
    many. Raises UsageError where they reach beyond.
    """

    def __init__(self, net: Net, out_indices: int | Sequence[int] | None = None) -> None:
        super().__init__()
        info = net.feature_info
        if isinstance(out_indices, int):
            out_indices = range(-out_indices, 0)
        indices = range(len(info)) if out_indices is None else out_indices
        try:
            chosen = sorted({range(len(info))[i] for i in indices})
        except IndexError:
            raise UsageError(
                f"out_indices {list(indices)} reach beyond the {len(info)} features of {net.spec.family}"
            ) from None
        self.feature_info = FeatureInfo(info[i] for i in chosen)
        names = [name for name, _ in net.features.named_children()]
        self.taken = {each["module"].removeprefix("features.") for each in self.feature_info}
        end = max(names.index(name) for name in self.taken)
        self.features = net.features[: end + 1]
        self.spec = net.spec
        self.default_cfg = self.pretrained_cfg = net.pretrained_cfg

    def forward(self, x: Tensor) -> list[Tensor]:
        found: list[Tensor] = []
        for name, stage in self.features.named_children():
            x = stage(x)
            if name in self.taken:
                found.append(x)
        return found
