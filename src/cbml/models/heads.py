"""The registry of heads: from the trunk to the raw embedding, which is made of parts.

An embedding is one unit vector. Its parts are slices of it, each proportional to a unit vector of its own, so that any
loss works on a part: `normalize(embedding[slice])`.
"""

from typing import Annotated, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cbml.errors import UserError
from cbml.models.stages import of_backbone
from cbml.schema import Count, Positive, Schema, Share


class HeadConfig(Schema):
    """What all heads have in common: one linear layer, one part, unless they say otherwise."""

    def parts(self, embedding_dim: int) -> list[int]:
        """The sizes of the parts, which add up to `embedding_dim`."""
        return [embedding_dim]

    def part_weights(self, parts: list[int]) -> list[float]:
        """Of each part at test time: its share of a similarity is the square of this, by the sum of these squares."""
        return [1.0] * len(parts)

    def stages(self, backbone: str) -> tuple[str, ...]:
        """The trunk's stages, beside its end, that the head takes."""
        return ()

    def build(self, features: int, channels: list[int], parts: list[int]) -> nn.Module:
        """A module from pooled features (B, `features`) to the raw embedding (B, D).

        Args:
            channels: of each of the `stages`, whose maps (B, C, h, w) it takes as further arguments.
        """
        return linear(features, sum(parts))


class Linear(HeadConfig):
    """One linear layer, one part.

    Attributes:
        norm: of the features before it.
    """

    type: Literal["linear"] = "linear"
    norm: Literal["layer"] | None = None

    def build(self, features: int, channels: list[int], parts: list[int]) -> nn.Module:
        layer = linear(features, sum(parts))
        return nn.Sequential(nn.LayerNorm(features), layer) if self.norm else layer


class Groups(HeadConfig):
    """One linear layer whose outputs are in groups (Opitz et al., BIER, TPAMI 42(2), 2020).

    Attributes:
        shares: of `embedding_dim`, relative to each other.
        weights: of the groups at test time: their `shares`, or `equal`.
    """

    type: Literal["groups"]
    shares: Annotated[list[Count], Field(min_length=2)]
    weights: Literal["shares", "equal"] = "equal"

    def parts(self, embedding_dim: int) -> list[int]:
        whole = sum(self.shares)
        if embedding_dim < 1 or embedding_dim % whole:
            raise UserError(
                f"head groups: shares {self.shares} do not divide embedding_dim {embedding_dim}; allowed: multiples of "
                f"{whole}"
            )
        return [share * embedding_dim // whole for share in self.shares]

    def part_weights(self, parts: list[int]) -> list[float]:
        return [float(part) for part in parts] if self.weights == "shares" else super().part_weights(parts)


class Branches(HeadConfig):
    """A head at the end of the trunk and one at each of some of its earlier stages, all of equal size.

    That of a stage: average pooling to `grid` × `grid`, a 1×1 convolution, and a hidden layer before the last one
    (Yuan et al., HDC, ICCV 2017; Wang et al., Ranked List, CVPR 2019). The parts are in the order of the trunk.

    Attributes:
        taps: the stages, by the type of the backbone or its beginning, as in `{resnet: [layer2, layer3]}`.
        weights: of the parts at test time, the end's last.
        grid, width, hidden: of the head of a stage.
        norm: batch normalisation after its convolution and its hidden layer.
        dropout: before its last layer.
    """

    type: Literal["branches"]
    taps: Annotated[dict[str, Annotated[list[str], Field(min_length=1)]], Field(min_length=1)]
    weights: list[Positive] | None = None
    grid: Count = 4
    width: Count = 128
    hidden: Count = 1024
    norm: bool = True
    dropout: Share = 0.0

    def parts(self, embedding_dim: int) -> list[int]:
        counts = {len(stages) + 1 for stages in self.taps.values()}
        if len(counts) > 1:
            raise UserError(f"head branches: taps {self.taps} have different numbers of stages; allowed is one number")
        (count,) = counts
        if embedding_dim < 1 or embedding_dim % count:
            raise UserError(
                f"head branches: embedding_dim {embedding_dim} has no {count} parts of equal size; allowed: multiples "
                f"of {count}"
            )
        if self.weights and len(self.weights) != count:
            raise UserError(f"head branches: {len(self.weights)} weights for {count} parts; allowed is one for each")
        return [embedding_dim // count] * count

    def part_weights(self, parts: list[int]) -> list[float]:
        return self.weights or super().part_weights(parts)

    def stages(self, backbone: str) -> tuple[str, ...]:
        return tuple(of_backbone(self.taps, backbone, "head branches"))

    def build(self, features: int, channels: list[int], parts: list[int]) -> nn.Module:
        return BranchesHead(self, features, channels, parts)


class BranchesHead(nn.Module):
    """See `Branches`."""

    def __init__(self, config: Branches, features: int, channels: list[int], parts: list[int]):
        super().__init__()

        def layer(module: nn.Module, norm: type[nn.Module], width: int) -> list[nn.Module]:
            return [module, *([norm(width)] if config.norm else []), nn.ReLU()]

        self.taps = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveAvgPool2d(config.grid),
                *layer(nn.Conv2d(inputs, config.width, 1), nn.BatchNorm2d, config.width),
                nn.Flatten(),
                *layer(nn.Linear(config.width * config.grid**2, config.hidden), nn.BatchNorm1d, config.hidden),
                nn.Dropout(config.dropout),
                linear(config.hidden, size),
            )
            for inputs, size in zip(channels, parts, strict=False)
        )
        self.end = linear(features, parts[-1])

    def forward(self, features: Tensor, *maps: Tensor) -> Tensor:
        return torch.cat([*(tap(x) for tap, x in zip(self.taps, maps, strict=True)), self.end(features)], 1)


class Slices(HeadConfig):
    """A part for each learner of a trunk of streams, by a linear layer that the learners of a stream share.

    The parts are in the order of the features: the learners of the first stream, those of the second, and so on. Any
    trunk will do whose features divide into as many slices.

    Attributes:
        streams, learners: S and L, of S × L parts of equal size.
    """

    type: Literal["slices"]
    streams: Count = 3
    learners: Count = 3

    def parts(self, embedding_dim: int) -> list[int]:
        count = self.streams * self.learners
        if embedding_dim < 1 or embedding_dim % count:
            raise UserError(
                f"head slices: embedding_dim {embedding_dim} has no {count} parts of equal size; allowed: multiples of "
                f"{count}"
            )
        return [embedding_dim // count] * count

    def build(self, features: int, channels: list[int], parts: list[int]) -> nn.Module:
        if features % len(parts):
            raise UserError(
                f"head slices: {features} features do not divide into {len(parts)} slices; allowed: the features of a "
                "trunk of as many streams and learners"
            )
        return SlicesHead(self, features // len(parts), parts[0])


class SlicesHead(nn.Module):
    """See `Slices`."""

    def __init__(self, config: Slices, features: int, size: int):
        super().__init__()
        self.shape = config.streams, config.learners, features
        self.streams = nn.ModuleList(nn.Linear(features, size, bias=False) for _ in range(config.streams))
        for layer in self.streams:  # rows of about unit length, as the authors start them
            nn.init.kaiming_uniform_(cast(nn.Linear, layer).weight, nonlinearity="linear")

    def split(self, features: Tensor) -> tuple[Tensor, ...]:
        """(B, L, C) of each stream."""
        return features.unflatten(1, self.shape).unbind(1)

    def forward(self, features: Tensor) -> Tensor:
        streams = zip(self.streams, self.split(features), strict=True)
        return torch.cat([layer(x).flatten(1) for layer, x in streams], 1)


def activations(head: nn.Module, features: Tensor, parts: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """What a head's weights make of pooled features for each part, without a bias, and these weights.

    Args:
        features: (B, C).

    Returns:
        (B, size) of each part; (size, C) of each part or, where parts share them, of each set of such parts.

    Raises:
        UserError: the head is more than weights.
    """
    if isinstance(head, SlicesHead):
        weights = [cast(nn.Linear, layer).weight for layer in head.streams]
        streams = zip(head.split(features), weights, strict=True)
        return [part for x, weight in streams for part in (x @ weight.to(x.dtype).T).unbind(1)], weights
    if isinstance(head, nn.Linear):
        weights = list(head.weight.split(parts))
        return [features @ weight.to(features.dtype).T for weight in weights], weights
    raise UserError("loss: the network's head is not one linear layer; allowed: head groups, head slices")


Head = Annotated[Linear | Groups | Branches | Slices, Field(discriminator="type")]


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A last layer, as the paper starts it."""
    layer = nn.Linear(inputs, outputs)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out")
    nn.init.zeros_(layer.bias)
    return layer


def join(raw: Tensor, parts: list[int], weights: list[float]) -> Tensor:
    """Unit vectors (B, D) whose parts are those of `raw` (B, D), each of a length proportional to its weight."""
    if len(parts) == 1:
        return F.normalize(raw, dim=1)
    length = sum(weight**2 for weight in weights) ** 0.5
    units = [
        F.normalize(part, dim=1) * (weight / length) for part, weight in zip(raw.split(parts, 1), weights, strict=True)
    ]
    return torch.cat(units, 1)
