"""What a batch sampler is: which images make a batch, and what they are called in it."""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from cbml.schema import Schema

# Of all training images, in eval mode and on their centre crops: `embeddings` (N, D), `features` (N, C), or what a head
# of the loss's, by its name, makes of the features.
EmbedTrainSet = Callable[[str], Tensor]


class BatchRecipe(Protocol):
    """What of a `Recipe` decides on batches."""

    batch_size: int
    instances: int
    iterations: int


class SampledBatch(NamedTuple):
    """One batch.

    Attributes:
        indices: (B,) int64, rows of the training list.
        labels: (B,) int64, below the sampler's `num_classes`.
        task: see `Batch` of the losses.
    """

    indices: np.ndarray
    labels: np.ndarray
    task: int = -1


class BatchSampler:
    """The batches of a training run, in segments of `period` iterations; before each, `refresh` looks at the images.

    What `segment` yields is a function of the constructor's arguments, its number, and what `refresh` found, which is
    the state; so a run goes on in the middle of a segment.

    Args:
        labels: see `BatchSamplerConfig.build`.

    Attributes:
        num_classes: of the labels of the batches; those of the list unless a subclass has others.
        period: iterations of a segment; None: the first one has no end, and nothing is looked at.
        state: names of the attributes that `refresh` sets: tensors on the CPU, or None before the first one.
    """

    period: int | None = None
    state: ClassVar[tuple[str, ...]] = ()

    def __init__(self, labels: np.ndarray, recipe: BatchRecipe, seed: int):
        self.labels, self.num_classes, self.seed = labels, len(np.unique(labels)), seed
        self.batch_size, self.instances = recipe.batch_size, recipe.instances

    def refresh(self, embed_train_set: EmbedTrainSet, number: int) -> None:
        """Look at the images before segment `number`, counted from 0."""

    def segment(self, number: int) -> Iterator[SampledBatch]:
        """The batches of segment `number`, of which at most `period` are taken."""
        raise NotImplementedError

    def epochs(self, count: float, views: int = 1) -> int:
        """The iterations of so many epochs, at least one; `views`: how often a batch has each of its images."""
        return max(1, round(count * (len(self.labels) // (self.batch_size // views))))

    def derive_seed(self, *numbers: int) -> int:
        """A seed of its own for each of a run's parts."""
        return int(np.random.SeedSequence((self.seed, *numbers)).generate_state(1)[0])

    def state_dict(self) -> dict[str, Any]:
        """What the last refresh left."""
        return {name: value for name in self.state if (value := getattr(self, name)) is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        for name in self.state:
            if name in state:  # what is None is not
                setattr(self, name, state[name])


class BatchSamplerConfig(Schema):
    """What all kinds of batch samplers have in common.

    Attributes:
        needs_labels: whether the classes of the training list are looked at.
        labels_persist: whether a label means the same after a refresh.
    """

    needs_labels: ClassVar[bool] = True

    @property
    def labels_persist(self) -> bool:
        return True

    def build(self, labels: np.ndarray, recipe: BatchRecipe, seed: int) -> BatchSampler:
        """The batches of a training list.

        Args:
            labels: (N,) int64, from 0 to the number of classes - 1; zeros if they are not to be known.

        Raises:
            UserError: the list and the recipe do not fit together.
        """
        raise NotImplementedError
