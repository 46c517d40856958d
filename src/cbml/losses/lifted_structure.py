"""Lifted structured feature embedding (Song et al., CVPR 2016)."""

import torch
from torch import Tensor

from cbml.losses.base import Batch, Loss, masked_mean, pair_masks, register
from cbml.schema import Positive


@register("lifted_structure")
class LiftedStructure(Loss):
    """Eq. 4: ½ max(0, J)² averaged over positive pairs, J = ln Σ exp(α − d) over the negatives of both images + d.

    Own code, because the library holds positive pairs × negative pairs in memory: 13 GB for a batch of 480.

    Args:
        margin: α, a Euclidean distance.
    """

    idle_on = ("single", "collapsed")  # a negative always has a cost

    def __init__(self, margin: Positive = 1.0):
        super().__init__()
        self.margin = margin

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        embeddings, labels = batch.embeddings, batch.labels
        distance = torch.cdist(embeddings, embeddings)
        is_positive, is_negative = pair_masks(labels)
        counts = is_positive & is_negative.any(1)
        # A row without negatives is left at zero: the logarithm of an empty sum has no gradient.
        exponents = (self.margin - distance).masked_fill(~is_negative & is_negative.any(1, keepdim=True), -torch.inf)
        negatives = exponents.logsumexp(1)
        cost = (torch.logaddexp(negatives[:, None], negatives) + distance).clamp(min=0).square() / 2
        return {"loss": masked_mean(cost, counts)}
