"""Losses that are a metric of ranks, smoothed: average precision and Recall@K."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from cbml.losses.base import Batch, Loss, pair_masks, register
from cbml.schema import Positive


def _ranks(embeddings: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of each positive pair the anchor's row and the positive's rank, all (P,): among the others, among the positives.

    Ranks begin at 1. They count sigmoids of the differences of similarities to the anchor over `temperature`, where
    ranking counts steps. An anchor is not among its others.
    """
    same, _ = pair_masks(labels)
    anchors, positives = same.nonzero(as_tuple=True)
    similarities = embeddings @ embeddings.T
    before = torch.sigmoid((similarities[anchors] - similarities[anchors, positives][:, None]) / temperature)
    row = torch.arange(len(labels), device=labels.device)
    before = before * ((row != anchors[:, None]) & (row != positives[:, None]))
    return anchors, 1 + before.sum(1), 1 + (before * same[anchors]).sum(1)


def _by_anchor(values: Tensor, anchors: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sums of pairs' values by anchor and their number, for the anchors that have pairs."""
    numbers = anchors.bincount(minlength=count)
    sums = values.new_zeros(count, *values.shape[1:]).index_add(0, anchors, values)
    return sums[numbers > 0], numbers[numbers > 0]


@register("smooth_ap")
class SmoothAP(Loss):
    """One minus the smoothed average precision of each image as a query (Brown et al., ECCV 2020, eq. 6).

    Args:
        temperature: τ of the sigmoids that replace steps.
    """

    idle_on = ("single", "collapsed")  # a negative always has a cost

    def __init__(self, temperature: Positive = 0.01):
        super().__init__()
        self.temperature = temperature

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        embeddings, labels = batch.embeddings, batch.labels
        anchors, among_all, among_positives = _ranks(embeddings, labels, self.temperature)
        if not len(anchors):
            return {"loss": 0 * embeddings.sum()}
        sums, numbers = _by_anchor(among_positives / among_all, anchors, len(labels))
        return {"loss": 1 - (sums / numbers).mean()}


@register("recall_at_k")
class RecallAtK(Loss):
    """One minus the smoothed Recall@K, averaged over several K (Patel et al., CVPR 2022), without their mixup.

    The share of an image's positives, of those that fit, that are among its K nearest: a sigmoid of K - rank over K.

    Args:
        ks: the K.
        temperature: τ₂, of the sigmoids that count a rank.
    """

    idle_on = ()

    def __init__(
        self,
        ks: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = [1, 2, 4, 8, 16],  # noqa: B006
        temperature: Positive = 0.01,
    ):
        super().__init__()
        self.ks, self.temperature = ks, temperature

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        embeddings, labels = batch.embeddings, batch.labels
        anchors, ranks, _ = _ranks(embeddings, labels, self.temperature)
        if not len(anchors):
            return {"loss": 0 * embeddings.sum()}
        ks = ranks.new_tensor(self.ks)
        found, numbers = _by_anchor(torch.sigmoid((ks - ranks[:, None]) / ks), anchors, len(labels))
        return {"loss": 1 - (torch.minimum(found, ks) / torch.minimum(ks, numbers[:, None])).mean()}
