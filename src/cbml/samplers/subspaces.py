"""Divide and conquer the embedding space (Sanakoyeu et al., CVPR 2019): a cluster of the images for each part."""

from collections.abc import Iterator
from itertools import count
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize

from cbml.errors import UserError
from cbml.samplers.base import BatchRecipe, BatchSampler, BatchSamplerConfig, EmbedTrainSet, SampledBatch
from cbml.samplers.classes import class_balanced_batches
from cbml.samplers.kmeans import kmeans
from cbml.schema import Positive, Share


class SubspacesConfig(BatchSamplerConfig):
    """Batches of one cluster after the other; a batch's task is the number of its cluster.

    The images are clustered by their pooled features. A class that has a single image in a cluster loses it until the
    next clustering. The last batches are of all images, and of all tasks.

    Attributes:
        clusters: as many as the embedding has parts.
        refresh: epochs between clusterings; an epoch has as many batches as the list has batches of images.
        whole: share of the iterations, the last ones, whose batches are of all images.
    """

    type: Literal["subspaces"]
    clusters: Annotated[int, Field(ge=2)] = 4
    refresh: Positive = 2.0
    whole: Share = 0.05

    def build(self, labels: np.ndarray, recipe: BatchRecipe, seed: int) -> BatchSampler:
        return Subspaces(self, labels, recipe, seed)


class Subspaces(BatchSampler):
    """See `SubspacesConfig`."""

    period: int
    state = ("clusters",)
    clusters: Tensor | None = None

    def __init__(self, config: SubspacesConfig, labels: np.ndarray, recipe: BatchRecipe, seed: int):
        super().__init__(labels, recipe, seed)
        if config.clusters > len(labels):
            raise UserError(f"batches subspaces: {config.clusters} clusters of {len(labels)} images")
        self.config = config
        self.period = self.epochs(config.refresh)
        self.all_from = round(recipe.iterations * (1 - config.whole))
        class_balanced_batches(labels, recipe.batch_size, recipe.instances, seed)  # raises where they do not fit

    def refresh(self, embed_train_set: EmbedTrainSet, number: int) -> None:
        features = normalize(embed_train_set("features"), dim=1)
        found, _ = kmeans(features, self.config.clusters, seed=self.derive_seed(number), starts=5)
        new = found.cpu()
        self.clusters = new if self.clusters is None else match_clusters(new, self.clusters, self.config.clusters)

    def segment(self, number: int) -> Iterator[SampledBatch]:
        assert self.clusters is not None
        clusters = self.clusters.numpy()
        found = {
            cluster: self._of(cluster, np.flatnonzero(clusters == cluster), number)
            for cluster in range(self.config.clusters)
        }
        streams = {task: stream for task, stream in found.items() if stream}
        tasks = list(streams)
        if not streams:
            raise UserError("batches subspaces: no cluster has two images of a class; take fewer clusters")
        everything = class_balanced_batches(
            self.labels, self.batch_size, self.instances, self.derive_seed(number, self.config.clusters)
        )
        for done in count(number * self.period):
            task = -1 if done >= self.all_from else tasks[done % len(tasks)]
            indices = next(everything if task < 0 else streams[task])
            yield SampledBatch(indices, self.labels[indices], task)

    def _of(self, cluster: int, members: np.ndarray, number: int) -> Iterator[np.ndarray] | None:
        """Batches of a cluster, of which these images are members; None if it has none."""
        counts = np.bincount(self.labels[members], minlength=self.num_classes)
        members = members[counts[self.labels[members]] > 1]
        if not len(members):
            return None
        seed, classes = self.derive_seed(number, cluster), self.batch_size // self.instances
        if (counts > 1).sum() < classes:
            return _with_replacement(members, self.labels[members], classes, self.instances, seed)
        batches = class_balanced_batches(self.labels[members], self.batch_size, self.instances, seed)
        return (members[indices] for indices in batches)


def _with_replacement(
    members: np.ndarray, labels: np.ndarray, classes: int, instances: int, seed: int
) -> Iterator[np.ndarray]:
    """Batches of a cluster with too few classes: some occur twice."""
    rng, groups = np.random.default_rng(seed), [members[labels == label] for label in np.unique(labels)]
    while True:
        chosen = [groups[number] for number in rng.choice(len(groups), classes)]
        yield np.concatenate([rng.choice(group, instances, replace=len(group) < instances) for group in chosen])


def match_clusters(new: Tensor, old: Tensor, count: int) -> Tensor:
    """The clusters `new` under the numbers with which they overlap the `old` ones most (Hungarian method).

    The cost of a number is how many images are in one of the two clusters and not in the other.
    """
    overlap = np.zeros((count, count), dtype=np.int64)
    np.add.at(overlap, (new.numpy(), old.numpy()), 1)
    cost = overlap.sum(1, keepdims=True) + overlap.sum(0) - 2 * overlap
    _, names = linear_sum_assignment(cost)
    return torch.from_numpy(names)[new]
