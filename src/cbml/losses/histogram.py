"""Histogram loss (Ustinova and Lempitsky, NIPS 2016)."""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from cbml.losses.base import Batch, Loss, register


@register("histogram")
class Histogram(Loss):
    """Eq. 2–4: the probability that a negative pair is more similar than a positive one, from soft histograms.

    Own code, because the library fails where a similarity is exactly 1, and passes every pair through a Python list.

    Args:
        bins: between similarities −1 and 1; there is a node at each end of a bin.
    """

    def __init__(self, bins: Annotated[int, Field(gt=0)] = 200):
        super().__init__()
        self.bins = bins

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        embeddings, labels = batch.embeddings, batch.labels
        similarity = (embeddings @ embeddings.T).clamp(-1, 1)
        same = labels[:, None] == labels
        positive, negative = (self._histogram(similarity[mask.triu(1)]) for mask in (same, ~same))
        return {"loss": (negative * positive.cumsum(0)).sum()}

    def _histogram(self, similarities: Tensor) -> Tensor:
        """(bins + 1,): shares at the nodes, each pair divided linearly between its two; zero without pairs."""
        position = (similarities + 1) * self.bins / 2
        lower = position.detach().floor().long().clamp(max=self.bins - 1)
        upper_share = position - lower
        nodes = similarities.new_zeros(self.bins + 1)
        nodes = nodes.index_add(0, lower, 1 - upper_share).index_add(0, lower + 1, upper_share)
        return nodes / max(len(similarities), 1)
