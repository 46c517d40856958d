"""Tuplet margin loss with intra-pair variance (Yu and Tao, ICCV 2019, pp. 6490-6499)."""

import math
from typing import Annotated

from pydantic import Field
from torch import Tensor
from torch.nn.functional import softplus

from cbml.losses.base import Batch, Loss, masked_mean, pair_masks, register
from cbml.schema import NonNegative, Positive

ABSENT = -1e4  # in place of a logit that is left out: far below all others, and exp of it is zero


@register("tml")
class TupletMargin(Loss):
    """With s the cosine similarities, mean over positive pairs (a, p) of ln(1 + Σ_n exp(scale (s_an − cos(θ_ap − β)))).

    The sum is over all negatives of the anchor. The variance is the mean over positive pairs of
    max(0, (1 − ε) m⁺ − s)², and over negative pairs of max(0, s − (1 + ε) m⁻)², with m⁺ and m⁻ the means of s.

    Args:
        scale: of the similarities.
        margin: β, in degrees.
        variance_weight: of the variance.
        epsilon: ε.
    """

    idle_on = ("single", "collapsed")  # a negative always has a cost

    def __init__(
        self,
        scale: Positive = 64.0,
        margin: Annotated[float, Field(ge=0, lt=90)] = 5.73,
        variance_weight: NonNegative = 0.5,
        epsilon: NonNegative = 0.01,
    ):
        super().__init__()
        self.scale, self.margin = scale, math.radians(margin)
        self.variance_weight, self.epsilon = variance_weight, epsilon

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        embeddings, labels = batch.embeddings, batch.labels
        similarity = embeddings @ embeddings.T
        is_positive, is_negative = pair_masks(labels)
        # cos(θ − β) without the angle: the derivative of acos has no bound at 1.
        sine = (1 - similarity.square()).clamp(min=1e-12).sqrt()
        closer = similarity * math.cos(self.margin) + sine * math.sin(self.margin)
        negatives = (self.scale * similarity).masked_fill(~is_negative, ABSENT).logsumexp(1, keepdim=True)
        tuplet = masked_mean(softplus(negatives - self.scale * closer), is_positive)
        below = (1 - self.epsilon) * masked_mean(similarity, is_positive) - similarity
        above = similarity - (1 + self.epsilon) * masked_mean(similarity, is_negative)
        variance = masked_mean(below.relu().square(), is_positive) + masked_mean(above.relu().square(), is_negative)
        return {"tuplet": tuplet, "variance": self.variance_weight * variance}
