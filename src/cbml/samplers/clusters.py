"""Pseudo-labels: batches of clusters of the images, without labels."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from cbml.errors import UserError
from cbml.samplers.base import BatchRecipe, BatchSampler, BatchSamplerConfig, EmbedTrainSet, SampledBatch
from cbml.samplers.classes import class_balanced_batches
from cbml.samplers.kmeans import kmeans
from cbml.schema import Positive, PositiveShare


class ClustersConfig(BatchSamplerConfig):
    """Some images of each of some clusters, which stand for classes. Labels are not looked at.

    The first clusters are of the pooled features, by k-means++, the best of ten, or above 1,000 clusters, where that
    would take hours on a CPU, of one; the next are of the embeddings. Their centres are then where k-means goes on
    from, so that a cluster keeps its number.

    Attributes:
        k: number of clusters.
        refresh: epochs between clusterings; an epoch has as many batches as the list has batches of images.
        keep: share of the images, those whose cluster is clearest, that batches are made of: with the largest
            difference between the cosine similarities to the nearest centre and to the next.
        warm: go on from the centres before; else start anew, and numbers change their meaning.
        permuted: hand the clusters' numbers out to images by chance: a control. A loss can gain from that,
            too; only what clusters gain beyond it is due to them.
    """

    needs_labels: ClassVar[bool] = False

    type: Literal["clusters"]
    k: Annotated[int, Field(ge=2)] = 100
    refresh: Positive = 1.0
    keep: PositiveShare = 0.8
    warm: bool = True
    permuted: bool = False

    @property
    def labels_persist(self) -> bool:
        return self.warm

    def build(self, labels: np.ndarray, recipe: BatchRecipe, seed: int) -> BatchSampler:
        return Clusters(self, labels, recipe, seed)


class Clusters(BatchSampler):
    """See `ClustersConfig`."""

    state = ("centres", "history")
    centres: Tensor | None = None

    def __init__(self, config: ClustersConfig, labels: np.ndarray, recipe: BatchRecipe, seed: int):
        super().__init__(labels, recipe, seed)
        images, classes = len(labels), recipe.batch_size // recipe.instances
        if not classes <= config.k <= images:
            raise UserError(
                f"batches clusters: k {config.k}; allowed: from the {classes} clusters of a batch to the {images} "
                "images"
            )
        self.config, self.num_classes = config, config.k
        self.period = self.epochs(config.refresh)
        # By refresh: each image's cluster, or -1 - cluster if it is left out.
        self.history = torch.empty(0, images, dtype=torch.int32)

    def refresh(self, embed_train_set: EmbedTrainSet, number: int) -> None:
        points = normalize(embed_train_set("embeddings" if number else "features"), dim=1)
        seed = self.derive_seed(number)
        warm = self.config.warm and number > 1  # before, they were centres of features
        starts = 1 if number or self.config.k > 1000 else 10
        clusters, centres = kmeans(
            points, self.config.k, seed=seed, starts=starts, centres=self.centres if warm else None
        )
        self.centres = centres.cpu()
        nearest = (points @ normalize(centres, dim=1).T).topk(2).values
        clear = (nearest[:, 0] - nearest[:, 1]).argsort(descending=True, stable=True).cpu()
        found = clusters.cpu().int()
        if self.config.permuted:
            found = found[torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))]
        left_out = clear[max(1, round(self.config.keep * len(clear))) :]
        found[left_out] = -1 - found[left_out]
        self.history = torch.cat([self.history, found[None]])

    def segment(self, number: int) -> Iterator[SampledBatch]:
        labels = self.history[number].numpy()
        kept = np.flatnonzero(labels >= 0)
        if (found := len(np.unique(labels[kept]))) < self.batch_size // self.instances:
            raise UserError(
                f"batches clusters: {found} clusters have images that are kept, a batch needs "
                f"{self.batch_size // self.instances}; take a larger keep, or fewer clusters in a batch"
            )
        batches = class_balanced_batches(labels[kept], self.batch_size, self.instances, self.derive_seed(number))
        return (SampledBatch(kept[rows], labels[kept[rows]].astype(np.int64)) for rows in batches)
