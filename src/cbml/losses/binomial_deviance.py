"""Binomial deviance (Yi et al., "Deep Metric Learning for Practical Person Re-Identification", 2014)."""

from torch import Tensor
from torch.nn.functional import softplus

from cbml.losses.base import Batch, Loss, masked_mean, pair_masks, register
from cbml.schema import Positive


@register("binomial_deviance")
class BinomialDeviance(Loss):
    """Eq. 9: ln(1 + exp(−α (s − β))) averaged over positive pairs, ln(1 + exp(α C (s − β))) over negative ones.

    Args:
        alpha: α, the scale.
        beta: β, the similarity of the boundary.
        cost: C, of negative pairs.
    """

    idle_on = ("single",)  # any pair has a cost

    def __init__(self, alpha: Positive = 2.0, beta: float = 0.5, cost: Positive = 25.0):
        super().__init__()
        self.alpha, self.beta, self.cost = alpha, beta, cost

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        embeddings, labels = batch.embeddings, batch.labels
        logits = self.alpha * (embeddings @ embeddings.T - self.beta)
        is_positive, is_negative = pair_masks(labels)
        return {
            "positive": masked_mean(softplus(-logits), is_positive),
            "negative": masked_mean(softplus(self.cost * logits), is_negative),
        }
