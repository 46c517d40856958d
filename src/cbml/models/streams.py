"""A composite trunk: streams that look closer and closer at the object (Chen and Deng, DeML, CVPR 2019)."""

import copy
from typing import Annotated, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cbml.models.stages import Staged, channels_of, of_backbone
from cbml.schema import Count, Positive, Schema

CONNECTED = np.ones((3, 3))  # to the eight positions around


class Streams(Schema):
    """Copies of a backbone, one after the other; each but the first sees a crop of the input of the one before.

    Attributes:
        streams: how many copies.
        learners: channel attentions of each copy, after one of its stages.
        after: this stage, by the type of the backbone or its beginning, as in `{resnet: layer3}`.
        width: hidden channels of an attention.
        sigma: of the random walk that finds the object, as a share of the map's side.
        steps: of that walk.
    """

    type: Literal["streams"]
    streams: Count = 3
    learners: Count = 3
    after: Annotated[dict[str, str], Field(min_length=1)]
    width: Count = 64
    sigma: Positive = 0.15
    steps: Count = 10

    def build(self, trunk: nn.Module, backbone: str) -> "StreamsTrunk":
        """The composite of copies of a trunk, weights and all.

        Args:
            backbone: its type.

        Raises:
            UserError: it has not the stage.
        """
        return StreamsTrunk(self, trunk, of_backbone(self.after, backbone, "trunk streams"))


class StreamsTrunk(nn.Module):
    """See `Streams`.

    Each attention gates the map after the stage, position by position and channel by channel; the rest of the copy is
    run once for each of the gated maps. So there are S × L maps of the last stage, S streams of L learners each, and
    they follow each other as channels: a trunk of S L C channels outward, whose pooled features are those of its
    learners. The map of a stream's first learner says where the next stream looks. A tap before the gates has S maps.

    Args:
        trunk: what the streams are copies of.
        stage: of it, which the attentions follow.

    Raises:
        UserError: the trunk has no such stage.
    """

    def __init__(self, config: Streams, trunk: nn.Module, stage: str):
        super().__init__()
        self.stage, self.learners, self.sigma, self.walk = stage, config.learners, config.sigma, config.steps
        (channels,) = channels_of(trunk, (stage,), "trunk streams")
        self.trunks = nn.ModuleList([trunk, *(copy.deepcopy(trunk) for _ in range(config.streams - 1))])
        self.attentions = nn.ModuleList(
            nn.ModuleList(_attention(channels, config.width) for _ in range(config.learners))
            for _ in range(config.streams)
        )
        self.num_features = config.streams * config.learners * cast(int, trunk.num_features)

    @property
    def stages(self) -> list[str]:
        """What can be named as a tap."""
        return cast(Staged, self.trunks[0]).stages

    @property
    def added(self) -> nn.Module:
        """What no backbone's weights hold."""
        return self.attentions

    def forward(self, x: Tensor, taps: tuple[str, ...] = ()) -> Tensor | list[Tensor]:
        """The last feature maps or, if `taps` are named, a list of those and of the maps after those stages."""
        last: list[Tensor] = []
        tapped: dict[str, list[Tensor]] = {name: [] for name in taps}
        for number, (trunk, gates) in enumerate(zip(self.trunks, self.attentions, strict=True)):
            if number:
                x = crop_salient(x, last[-1].chunk(self.learners, 1)[0], self.sigma, self.walk)
            y = x
            for name, step in cast(Staged, trunk).steps():
                y = step(y)
                if name == self.stage:
                    y = torch.cat([y * gate(y) for gate in cast(nn.ModuleList, gates)])
                if name in taps:
                    tapped[name].append(_as_channels(y, len(x)))
            last.append(_as_channels(y, len(x)))
        maps = [torch.cat(each, 1) for each in (last, *tapped.values())]
        return maps if taps else maps[0]


def _attention(channels: int, width: int) -> nn.Module:
    layers = nn.Conv2d(channels, width, 1), nn.Conv2d(width, channels, 1)
    for layer in layers:  # as the authors start them
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="linear")
        nn.init.zeros_(cast(Tensor, layer.bias))
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.Sigmoid())


def _as_channels(maps: Tensor, batch: int) -> Tensor:
    """Maps of one batch after the other, (L B, C, h, w), as channels: (B, L C, h, w)."""
    return torch.cat(maps.split(batch), 1)


@torch.compiler.disable
@torch.no_grad()
def crop_salient(images: Tensor, maps: Tensor, sigma: float = 0.15, steps: int = 10) -> Tensor:
    """Of each image the square round the object, at the size of the image, bilinearly; it has no gradient.

    Args:
        images: (B, 3, H, W).
        maps: (B, C, h, w), the feature maps that say where the object is.
        sigma, steps: of `saliency`.

    Returns:
        (B, 3, H, W). The boxes are computed on the CPU, wherever the images are, in float64.
    """
    size = cast(tuple[int, int], tuple(images.shape[-2:]))
    boxes = salient_boxes(saliency(maps, sigma, steps), size).tolist()
    cut = (
        images[number : number + 1, :, top : top + side, left : left + side]
        for number, (top, left, side) in enumerate(boxes)
    )
    return torch.cat([F.interpolate(each, size, mode="bilinear", align_corners=False) for each in cut])


def saliency(maps: Tensor, sigma: float = 0.15, steps: int = 10) -> Tensor:
    """How much each position of a feature map differs from those around it, by a random walk between unlike positions.

    From position k the walk goes to j with a probability proportional to |f_j − f_k| exp(−|j − k|² / 2σ²), σ being
    `sigma` times the map's width; the saliency is where it is after some steps from anywhere.

    Args:
        maps: (B, C, h, w).

    Returns:
        (B, h, w) float64 on the CPU, which adds up to 1; uniform where all positions are alike.
    """
    batch, _, height, width = maps.shape
    vectors = maps.detach().float().cpu().double().flatten(2).transpose(1, 2).contiguous()
    # Not by a matrix product, in which vectors that are equal come out apart.
    unlike = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")
    where = torch.cartesian_prod(torch.arange(height), torch.arange(width)).double().view(-1, 2)
    near = (-(where[:, None] - where).square().sum(2) / (2 * (sigma * width) ** 2)).exp()
    to_from = unlike * near
    total = to_from.sum(1, keepdim=True)
    to_from = torch.where(total > 0, to_from / total, torch.eye(len(where), dtype=torch.float64))
    found = torch.full((batch, len(where), 1), 1 / len(where), dtype=torch.float64)
    for _ in range(steps):
        found = to_from @ found
    return found.view(batch, height, width)


def salient_boxes(saliency: Tensor, size: tuple[int, int]) -> Tensor:
    """The squares round what is salient.

    A map is brought to 256 levels and enlarged to `size`. Of what is above its mean there, the largest connected region
    counts. The square has its box's centre, and half of height and width together as its side; where it would reach
    over the border, it is moved inside.

    Args:
        saliency: (B, h, w) float64 on the CPU.
        size: (H, W) of the images.

    Returns:
        (B, 3) int64: top, left, side. A map without a region, being all equal, has the largest square, in the middle.
    """
    from scipy import ndimage  # for such trunks alone

    low, high = saliency.amin((1, 2), keepdim=True), saliency.amax((1, 2), keepdim=True)
    differs = high - low > 1e-9 * high  # else what differs is rounding
    levels = torch.where(differs, (255 * (saliency - low) / (high - low)).floor(), torch.zeros_like(saliency))
    enlarged = F.interpolate(levels[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    above = (enlarged > enlarged.mean((1, 2), keepdim=True)).numpy()
    boxes = []
    for mask in above:
        labels, count = ndimage.label(mask, CONNECTED)
        box = slice(0, size[0]), slice(0, size[1])
        if count:
            box = ndimage.find_objects(labels)[np.bincount(labels.ravel())[1:].argmax()]
        (top, bottom), (left, right) = ((each.start, each.stop) for each in box)
        side = min((bottom - top + right - left) // 2, *size)
        corner = ((top + bottom - side) // 2, (left + right - side) // 2)
        boxes.append([*(min(max(first, 0), end - side) for first, end in zip(corner, size, strict=True)), side])
    return torch.tensor(boxes)
