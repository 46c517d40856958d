"""Trunks that run stage by stage, whose maps can be named."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from cbml.errors import UserError

T = TypeVar("T")


class Staged(nn.Module):
    """A trunk that is a chain of stages; a subclass defines `steps`."""

    def steps(self) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
        """The stages in their order: their names, and what each makes of the map before it."""
        raise NotImplementedError

    @property
    def stages(self) -> list[str]:
        """What can be named as a tap."""
        return [name for name, _ in self.steps()]

    def forward(self, x: Tensor, taps: tuple[str, ...] = ()) -> Tensor | list[Tensor]:
        """The last feature map or, if `taps` are named, a list of that and of the maps after those stages."""
        maps = {}
        for name, step in self.steps():
            x = step(x)
            if name in taps:
                maps[name] = x
        return [x, *(maps[name] for name in taps)] if taps else x


def check_stages(trunk: nn.Module, names: tuple[str, ...], what: str) -> None:
    """Make sure that a trunk has stages of these names.

    Raises:
        UserError: it has not; `what` begins the line.
    """
    stages = getattr(trunk, "stages", [])
    if names and not stages:
        raise UserError(
            f"{what}: taps {', '.join(names)}: this trunk has no stages (a timm model gives its features alone)"
        )
    if absent := [name for name in names if name not in stages]:
        raise UserError(f"{what}: the trunk has no stage {absent[0]!r}; allowed: {', '.join(stages)}")


def channels_of(trunk: nn.Module, taps: tuple[str, ...], what: str = "head") -> list[int]:
    """The channels of a trunk's stages.

    Raises:
        UserError: as `check_stages`.
    """
    check_stages(trunk, taps, what)
    if not taps:
        return []
    training = trunk.training
    with torch.no_grad():
        _, *maps = trunk.eval()(torch.zeros(1, 3, 64, 64), taps)
    trunk.train(training)
    return [found.shape[1] for found in maps]


def of_backbone(entries: Mapping[str, T], backbone: str, what: str) -> T:
    """The entry whose name is a backbone's type, or its beginning, as in `{resnet: [layer2, layer3]}`.

    Raises:
        UserError: there is none; `what` begins the line.
    """
    for beginning, entry in entries.items():
        if backbone.startswith(beginning):
            return entry
    raise UserError(f"{what}: no taps for backbones of type {backbone}; there are for {', '.join(entries)}")
