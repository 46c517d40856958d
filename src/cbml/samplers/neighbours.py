"""Batches of single images and of their neighbours, without labels: an image's label is its row of the list."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from cbml.errors import UserError
from cbml.samplers.base import BatchRecipe, BatchSampler, BatchSamplerConfig, EmbedTrainSet, SampledBatch
from cbml.schema import Positive, Share

BLOCK = 2**25  # distances held at once


class NeighboursConfig(BatchSamplerConfig):
    """Images with their nearest neighbours, each in several crops (Kim et al., STML, CVPR 2022).

    Neighbours are by Euclidean distance of what the loss's head `projection` makes of the features.

    Attributes:
        count: of each chosen image and its neighbours, together.
        views: crops of each.
        refresh: epochs between searches; an epoch visits 1 / `count` of the images as queries.
    """

    needs_labels: ClassVar[bool] = False

    type: Literal["neighbours"]
    count: Annotated[int, Field(ge=1)] = 5
    views: Annotated[int, Field(ge=1)] = 2
    refresh: Positive = 1.0

    def build(self, labels: np.ndarray, recipe: BatchRecipe, seed: int) -> BatchSampler:
        return Neighbours(self, labels, recipe, seed)


class Neighbours(BatchSampler):
    """See `NeighboursConfig`."""

    state = ("neighbours",)
    neighbours: Tensor | None = None

    def __init__(self, config: NeighboursConfig, labels: np.ndarray, recipe: BatchRecipe, seed: int):
        super().__init__(labels, recipe, seed)
        images, batch_size, group = len(labels), recipe.batch_size, config.count * config.views
        if batch_size % group or config.count * (batch_size // group) > images:
            raise UserError(
                f"batches neighbours: batch_size {batch_size}; allowed: multiples of count {config.count} × views "
                f"{config.views}, with no more than the {images} images in them"
            )
        self.config, self.num_classes = config, images
        self.queries = batch_size // group
        self.period = self.epochs(config.refresh, config.views)

    def refresh(self, embed_train_set: EmbedTrainSet, number: int) -> None:
        self.neighbours = nearest(embed_train_set("projection"), self.config.count).cpu()

    def segment(self, number: int) -> Iterator[SampledBatch]:
        assert self.neighbours is not None
        rng, neighbours = np.random.default_rng([self.seed, number]), self.neighbours.numpy()
        while True:
            order = rng.permutation(self.num_classes)
            for start in range(0, len(order) - self.queries + 1, self.queries):
                chosen = neighbours[order[start : start + self.queries]].ravel()
                indices = np.tile(chosen, self.config.views)
                yield SampledBatch(indices, indices)


class InstancesConfig(BatchSamplerConfig):
    """Images twice: two crops, or a crop and one of the nearest neighbour (Ye et al., ISIF, CVPR 2019).

    Neighbours are by cosine similarity of the pooled features.

    Attributes:
        neighbour_share: how often the second is of the neighbour.
        refresh: epochs between searches.
    """

    needs_labels: ClassVar[bool] = False

    type: Literal["instances"]
    neighbour_share: Share = 0.5
    refresh: Positive = 1.0

    def build(self, labels: np.ndarray, recipe: BatchRecipe, seed: int) -> BatchSampler:
        return Instances(self, labels, recipe, seed)


class Instances(BatchSampler):
    """See `InstancesConfig`. The second half of a batch are the seconds of the first half, under its labels."""

    state = ("neighbours",)

    def __init__(self, config: InstancesConfig, labels: np.ndarray, recipe: BatchRecipe, seed: int):
        super().__init__(labels, recipe, seed)
        images, batch_size = len(labels), recipe.batch_size
        if batch_size % 2 or batch_size // 2 > images:
            raise UserError(
                f"batches instances: batch_size {batch_size}; allowed: even, up to twice the {images} images"
            )
        self.config, self.num_classes = config, images
        self.chosen = batch_size // 2
        self.period = self.epochs(config.refresh, 2)
        self.neighbours = torch.arange(images)

    def refresh(self, embed_train_set: EmbedTrainSet, number: int) -> None:
        if self.config.neighbour_share:
            self.neighbours = nearest(normalize(embed_train_set("features"), dim=1), 2)[:, 1].cpu()

    def segment(self, number: int) -> Iterator[SampledBatch]:
        rng, neighbours = np.random.default_rng([self.seed, number]), self.neighbours.numpy()
        while True:
            order = rng.permutation(self.num_classes)
            for start in range(0, len(order) - self.chosen + 1, self.chosen):
                first = order[start : start + self.chosen]
                other = rng.random(self.chosen) < self.config.neighbour_share
                second = np.where(other, neighbours[first], first)
                yield SampledBatch(np.concatenate([first, second]), np.tile(first, 2))


@torch.no_grad()
def nearest(points: Tensor, count: int) -> Tensor:
    """The `count` points (N, count) nearest to each by Euclidean distance, itself first."""
    squares, found = points.square().sum(1), []
    step = max(1, BLOCK // len(points))
    for start in range(0, len(points), step):
        block = points[start : start + step]
        closeness = 2 * block @ points.T - squares
        closeness[torch.arange(len(block)), torch.arange(start, start + len(block))] = torch.inf
        found.append(closeness.topk(count).indices)
    return torch.cat(found)
