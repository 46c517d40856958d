"""Mining interclass characteristics (Roth et al., MIC, ICCV 2019): batches of classes, and of what classes share."""

from collections.abc import Iterator
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from cbml.errors import UserError
from cbml.samplers.base import BatchRecipe, BatchSampler, BatchSamplerConfig, EmbedTrainSet, SampledBatch
from cbml.samplers.classes import class_balanced_batches
from cbml.samplers.kmeans import kmeans
from cbml.schema import Positive, Share


class TwoTasksConfig(BatchSamplerConfig):
    """Batches of classes, task 0, and of clusters across the classes, task 1, whose labels are the clusters' numbers.

    The first clusters are of the pooled features, of unit length, less the mean of their class; later ones of the
    embeddings of the loss's head `shared`.

    Attributes:
        clusters: their number.
        refresh: epochs between clusterings.
        probability: that a batch of clusters follows a batch of classes.
        foreign: share of a batch of clusters that comes from another cluster, under the number of the first.
    """

    type: Literal["two_tasks"]
    clusters: Annotated[int, Field(ge=2)] = 30
    refresh: Positive = 4.0
    probability: Share = 0.8
    foreign: Share = 0.2

    def build(self, labels: np.ndarray, recipe: BatchRecipe, seed: int) -> BatchSampler:
        return TwoTasks(self, labels, recipe, seed)


class TwoTasks(BatchSampler):
    """See `TwoTasksConfig`."""

    state = ("clusters",)
    clusters: Tensor | None = None

    def __init__(self, config: TwoTasksConfig, labels: np.ndarray, recipe: BatchRecipe, seed: int):
        super().__init__(labels, recipe, seed)
        classes = recipe.batch_size // recipe.instances
        if not classes <= config.clusters <= len(labels):
            raise UserError(
                f"batches two_tasks: {config.clusters} clusters; allowed: from the {classes} of a batch to the "
                f"{len(labels)} images"
            )
        self.config, self.num_classes = config, max(config.clusters, self.num_classes)
        self.period = self.epochs(config.refresh)
        class_balanced_batches(labels, recipe.batch_size, recipe.instances, seed)  # raises where they do not fit

    def refresh(self, embed_train_set: EmbedTrainSet, number: int) -> None:
        points = normalize(embed_train_set("shared" if number else "features"), dim=1)
        if not number:
            points = self._without_class(points)
        found, _ = kmeans(points, self.config.clusters, seed=self.derive_seed(number), iterations=20)
        self.clusters = found.cpu()

    def _without_class(self, points: Tensor) -> Tensor:
        labels = torch.from_numpy(self.labels).to(points.device)
        sums = torch.zeros(int(labels.max()) + 1, points.shape[1], device=points.device).index_add_(0, labels, points)
        return points - (sums / labels.bincount()[:, None])[labels]

    def segment(self, number: int) -> Iterator[SampledBatch]:
        assert self.clusters is not None
        rng, clusters = np.random.default_rng([self.seed, number]), self.clusters.numpy()
        of_classes, of_clusters = (
            class_balanced_batches(labels, self.batch_size, self.instances, self.derive_seed(number, task))
            for task, labels in enumerate((self.labels, clusters))
        )
        while True:
            indices = next(of_classes)
            yield SampledBatch(indices, self.labels[indices], 0)
            if rng.random() < self.config.probability:
                indices = next(of_clusters)
                labels = clusters[indices]
                strangers = rng.random(len(indices)) < self.config.foreign
                for place in np.flatnonzero(strangers):
                    indices[place] = rng.choice(np.flatnonzero(clusters != labels[place]))
                yield SampledBatch(indices, labels, 1)
