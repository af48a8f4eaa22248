"""Networks by name: the one contract (timm's names) over every family of the zoo."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, overload

from flyweight.net import FeatureNet, Net
from flyweight.pretrained import choose, load_pretrained
from flyweight.weights import load_into
from flyweight.zoo import build, spec_of


@overload
def create_model(
    name: str, pretrained: bool | str | Path = False, *, features_only: Literal[False] = False, **args: Any
) -> Net: ...
@overload
def create_model(
    name: str,
    pretrained: bool | str | Path = False,
    *,
    features_only: Literal[True],
    out_indices: int | Sequence[int] | None = None,
    **args: Any,
) -> FeatureNet: ...


def create_model(
    name: str,
    pretrained: bool | str | Path = False,
    *,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    **args: Any,
) -> Net | FeatureNet:
    """A named network: normalised pictures [N, in_chans, H, W] → logits [N, num_classes].

    `pretrained` is True for the best published weights that fit (docs/weights.md; downloaded where need be), or the
    path of a model.safetensors of the same network; else the weights are random. `args` are those
    of `flyweight.blocks.Options` (`num_classes`, `in_chans`, `width`, `drop_rate`, `act`, `se`, `output_stride` …),
    `size` (of the pictures), and the family's own. With `features_only` the answer is a list of feature maps, one for
    each stride or those that `out_indices` choose. Raises UsageError for what cannot be built or loaded.
    """
    source = choose(name, **args) if pretrained is True else None
    net = build(spec_of(name, **{**(source.args if source else {}), **args}))
    if source:
        for change in load_pretrained(net, source):
            logging.getLogger(__name__).warning("%s: %s", source.name, change)
    elif pretrained:
        load_into(net, Path(str(pretrained)))
    return FeatureNet(net, out_indices) if features_only else net
