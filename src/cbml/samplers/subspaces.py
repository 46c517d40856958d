"""Divide and conquer the embedding space (Sanakoyeu et al., CVPR 2019): a cluster of the images for each part."""

from collections.abc import Iterator
from itertools import count
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from scipy.optimize import linear_sum_assignment
from torch.nn.functional import normalize

from cbml.errors import UserError
from cbml.samplers.base import BatchSampler, BatchSamplerConfig, EmbedTrainSet, SampledBatch, epochs, seed_of
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

    def build(self, labels: np.ndarray, *, batch_size: int, instances: int, iterations: int, seed: int) -> BatchSampler:
        return Subspaces(self, labels, batch_size, instances, iterations, seed)


class Subspaces(BatchSampler):
    """See `SubspacesConfig`."""

    period: int

    def __init__(
        self, config: SubspacesConfig, labels: np.ndarray, batch_size: int, instances: int, iterations: int, seed: int
    ):
        if config.clusters > len(labels):
            raise UserError(f"batches subspaces: {config.clusters} clusters of {len(labels)} images")
        self.config, self.labels, self.num_classes = config, labels, len(np.unique(labels))
        self.batch_size, self.instances, self.seed = batch_size, instances, seed
        self.period = epochs(config.refresh, len(labels), batch_size)
        self.all_from = round(iterations * (1 - config.whole))
        self.clusters: np.ndarray | None = None
        class_balanced_batches(labels, batch_size, instances, seed)  # raises where they do not fit together

    def refresh(self, embed_train_set: EmbedTrainSet, number: int) -> None:
        features = normalize(embed_train_set("features"), dim=1)
        found, _ = kmeans(features, self.config.clusters, seed=seed_of(self.seed, number), starts=5)
        new = found.cpu().numpy()
        self.clusters = new if self.clusters is None else renamed(new, self.clusters, self.config.clusters)

    def segment(self, number: int) -> Iterator[SampledBatch]:
        assert self.clusters is not None
        found = {cluster: self._of(cluster, number) for cluster in range(self.config.clusters)}
        streams = {task: stream for task, stream in found.items() if stream}
        tasks = list(streams)
        if not streams:
            raise UserError("batches subspaces: no cluster has two images of a class; take fewer clusters")
        everything = class_balanced_batches(
            self.labels, self.batch_size, self.instances, seed_of(self.seed, number, self.config.clusters)
        )
        for done in count(number * self.period):
            task = -1 if done >= self.all_from else tasks[done % len(tasks)]
            indices = next(everything if task < 0 else streams[task])
            yield SampledBatch(indices, self.labels[indices], task)

    def _of(self, cluster: int, number: int) -> Iterator[np.ndarray] | None:
        """Batches of a cluster; None if it has none."""
        members = np.flatnonzero(self.clusters == cluster)
        counts = np.bincount(self.labels[members], minlength=self.num_classes)
        members = members[counts[self.labels[members]] > 1]
        if not len(members):
            return None
        seed, classes = seed_of(self.seed, number, cluster), self.batch_size // self.instances
        if (counts > 1).sum() < classes:
            return _with_replacement(members, self.labels[members], classes, self.instances, seed)
        batches = class_balanced_batches(self.labels[members], self.batch_size, self.instances, seed)
        return (members[indices] for indices in batches)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.clusters is None else {"clusters": torch.from_numpy(self.clusters)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.clusters = state["clusters"].numpy()


def _with_replacement(
    members: np.ndarray, labels: np.ndarray, classes: int, instances: int, seed: int
) -> Iterator[np.ndarray]:
    """Batches of a cluster with too few classes: some occur twice."""
    rng, groups = np.random.default_rng(seed), [members[labels == label] for label in np.unique(labels)]
    while True:
        chosen = [groups[number] for number in rng.choice(len(groups), classes)]
        yield np.concatenate([rng.choice(group, instances, replace=len(group) < instances) for group in chosen])


def renamed(new: np.ndarray, old: np.ndarray, count: int) -> np.ndarray:
    """The clusters `new` under the numbers with which they overlap the `old` ones most (Hungarian method).

    The cost of a number is how many images are in one of the two clusters and not in the other.
    """
    overlap = np.zeros((count, count), dtype=np.int64)
    np.add.at(overlap, (new, old), 1)
    cost = overlap.sum(1, keepdims=True) + overlap.sum(0) - 2 * overlap
    _, names = linear_sum_assignment(cost)
    return names[new]
