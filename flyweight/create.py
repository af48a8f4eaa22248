"""Networks by name: the one contract (timm's names) over every family of the zoo."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, overload

from flyweight.net import FeatureNet, Net
from flyweight.pretrained import choose, load_pretrained
from flyweight.transfer import adopt
from flyweight.weights import load_into, load_net, stored_spec
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
    path of a model.safetensors of the same network, which may be for other classes or channels, or wider (what changes
    is logged); else the weights are random. `args` are those of `flyweight.blocks.Options` (`num_classes`, `in_chans`,
    `width`, `drop_rate`, `act`, `se`, `output_stride` …), `size` (of the pictures), and the family's own. With
    `features_only` the answer is a list of feature maps, one for each stride or those that `out_indices` choose. Raises
    UsageError for what cannot be built or loaded.
    """
    source = choose(name, **args) if pretrained is True else None
    net = build(spec_of(name, **{**(source.args if source else {}), **args}))
    if source:
        for change in load_pretrained(net, source):
            logging.getLogger(__name__).warning("%s: %s", source.name, change)
    elif pretrained:
        _load(net, name, Path(str(pretrained)))
    return FeatureNet(net, out_indices) if features_only else net


def _load(net: Net, name: str, path: Path) -> None:
    spec = stored_spec(path)
    if spec is None or spec.family != net.spec.family:
        load_into(net, path)
        return
    for change in adopt(net, load_net(path)):
        logging.getLogger(__name__).warning("%s from %s: %s", name, path, change)
