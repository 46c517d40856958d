"""Ranked list loss (Wang et al., CVPR 2019)."""

from typing import Literal

import torch
from torch import Tensor

from cbml.losses.base import Batch, Loss, pair_masks, register
from cbml.schema import NonNegative, Positive, Share


@register("ranked_list")
class RankedList(Loss):
    """Positives are pulled within α − m of the anchor and negatives pushed beyond α, by Euclidean distance d.

    An anchor costs (1 − λ) mean(max(0, d − (α − m))) over its positives plus λ times the mean of α − d over its
    negatives within α, weighted by exp(T (α − d)) (eq. 2, 6–8).

    Args:
        margin: m.
        alpha: α.
        temperature: T; 0 weights the negatives alike.
        balance: λ.
        positives: average over the `violating` ones, as published, or over `all`.
    """

    def __init__(
        self,
        margin: Positive = 0.4,
        alpha: Positive = 1.2,
        temperature: NonNegative = 10.0,
        balance: Share = 0.5,
        positives: Literal["violating", "all"] = "violating",
    ):
        super().__init__()
        self.margin, self.alpha, self.temperature = margin, alpha, temperature
        self.balance, self.positives = balance, positives

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        embeddings, labels = batch.embeddings, batch.labels
        distance = torch.cdist(embeddings, embeddings)
        is_positive, is_negative = pair_masks(labels)

        excess = (distance - (self.alpha - self.margin)).clamp(min=0) * is_positive
        averaged = is_positive if self.positives == "all" else excess > 0
        positive = excess.sum(1) / averaged.sum(1).clamp(min=1)

        lack = (self.alpha - distance).clamp(min=0) * is_negative
        weight = (self.temperature * lack).exp() * (lack > 0)
        negative = (weight * lack).sum(1) / weight.sum(1).clamp(min=1)
        return {"positive": (1 - self.balance) * positive.mean(), "negative": self.balance * negative.mean()}
