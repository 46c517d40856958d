"""Which images make a batch, and what they are called in it."""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import numpy as np
from torch import Tensor

from cbml.schema import Schema

# Of all training images, in eval mode and on their centre crops: `embeddings` (N, D), `features` (N, C), or what a head
# of the loss's, by its name, makes of the features.
EmbedTrainSet = Callable[[str], Tensor]


class SampledBatch(NamedTuple):
    """One batch.

    Attributes:
        indices: (B,) int64, rows of the training list.
        labels: (B,) int64, below the batches' `num_classes`.
        task: see `Batch` of the losses.
    """

    indices: np.ndarray
    labels: np.ndarray
    task: int = -1


class BatchSampler:
    """The batches of a training run, in segments of `period` iterations; before each, `refresh` looks at the images.

    What `segment` yields is a function of the constructor's arguments, its number, and what `refresh` found, which is
    the state; so a run goes on in the middle of a segment.

    Attributes:
        num_classes: of the labels.
        period: iterations of a segment; None: the first one has no end, and nothing is looked at.
    """

    num_classes: int
    period: int | None = None

    def refresh(self, embed_train_set: EmbedTrainSet, number: int) -> None:
        """Look at the images before segment `number`, counted from 0."""

    def segment(self, number: int) -> Iterator[SampledBatch]:
        """The batches of segment `number`, of which at most `period` are taken."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What the last refresh left: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""


class BatchSamplerConfig(Schema):
    """What all kinds of batches have in common.

    Attributes:
        needs_labels: whether the classes of the training list are looked at.
        labels_persist: whether a label means the same after a refresh.
    """

    needs_labels: ClassVar[bool] = True

    @property
    def labels_persist(self) -> bool:
        return True

    def build(self, labels: np.ndarray, *, batch_size: int, instances: int, iterations: int, seed: int) -> BatchSampler:
        """The batches of a training list.

        Args:
            labels: (N,) int64, from 0 to the number of classes - 1; zeros if they are not to be known.
            batch_size, instances, iterations: of the recipe.

        Raises:
            UserError: the list and these numbers do not fit together.
        """
        raise NotImplementedError


def epochs(count: float, images: int, batch_size: int) -> int:
    """The iterations of so many epochs, at least one."""
    return max(1, round(count * (images // batch_size)))


def seed_of(*numbers: int) -> int:
    """A seed of its own for each of a run's parts."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
