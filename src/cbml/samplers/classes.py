"""Batches of P classes × K images."""

import itertools
from collections.abc import Iterator
from typing import Literal

import numpy as np

from cbml.errors import UserError
from cbml.samplers.base import BatchRecipe, BatchSampler, BatchSamplerConfig, SampledBatch


class ClassesConfig(BatchSamplerConfig):
    """Some images of each of some classes: what every loss gets unless it says otherwise."""

    type: Literal["classes"] = "classes"

    def build(self, labels: np.ndarray, recipe: BatchRecipe, seed: int) -> BatchSampler:
        return Classes(labels, recipe, seed)


class Classes(BatchSampler):
    """See `ClassesConfig` and `class_balanced_batches`."""

    def __init__(self, labels: np.ndarray, recipe: BatchRecipe, seed: int):
        super().__init__(labels, recipe, seed)
        self.segment(0)  # raises where they do not fit together

    def segment(self, number: int) -> Iterator[SampledBatch]:
        batches = class_balanced_batches(self.labels, self.batch_size, self.instances, self.seed)
        return (SampledBatch(indices, self.labels[indices]) for indices in batches)


def class_balanced_batches(labels: np.ndarray, batch_size: int, instances: int, seed: int) -> Iterator[np.ndarray]:
    """Endless batches of `batch_size / instances` distinct classes with `instances` images each.

    Each pass shuffles every class into groups of `instances` images (a class with fewer is topped up with replacement,
    the remainder of a class is dropped) and draws classes that still have groups; it ends when too few have. A pass
    depends on `seed` and its number alone, so a run continues by skipping the batches that it has seen.

    Returns:
        An iterator of (batch_size,) int64 indices into `labels`, the images of a class side by side.

    Raises:
        UserError: a batch needs more classes than there are.
    """
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    classes = batch_size // instances
    if classes > len(members):
        fits = next(
            n for n in range(instances, batch_size + 1) if batch_size % n == 0 and batch_size // n <= len(members)
        )
        raise UserError(
            f"recipe: batch_size {batch_size} / instances {instances} = {classes} classes a batch, "
            f"but the training list has {len(members)}; there are enough with -S recipe.instances={fits}"
        )
    return _passes(members, classes, instances, seed)


def _passes(members: list[np.ndarray], classes: int, instances: int, seed: int) -> Iterator[np.ndarray]:
    for number in itertools.count():
        rng = np.random.default_rng([seed, number])
        groups = [_groups(indices, instances, rng) for indices in members]
        while len(alive := [c for c, rest in enumerate(groups) if rest]) >= classes:
            yield np.concatenate([groups[c].pop() for c in rng.choice(alive, classes, replace=False)])


def _groups(indices: np.ndarray, size: int, rng: np.random.Generator) -> list[np.ndarray]:
    if len(indices) < size:
        indices = np.concatenate([indices, rng.choice(indices, size - len(indices))])
    indices = rng.permutation(indices)
    return [indices[i : i + size] for i in range(0, len(indices) - size + 1, size)]
