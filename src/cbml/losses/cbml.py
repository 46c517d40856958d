"""The contrastive Bayesian loss with its metric variance constraint (Kan et al., TPAMI 2023)."""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from cbml.losses.base import Batch, Loss, pair_masks, register
from cbml.schema import NonNegative, Positive, Share

# So low an exponent vanishes beside the 1 of F, in float64 too; exp of lower ones is subnormal and 100 times slower.
FLOOR = -80.0


@register("cbml")
class CBML(Loss):
    """CBML in its three forms, with `s` the cosine similarities of an anchor to the rest of the batch.

    With F_p = 1 + Σ_P exp(−(s − a_p) / b_p) over mined positives and F_n = 1 + Σ_N exp((s − a_n) / b_n) over mined
    negatives, an anchor costs ln F_p + ln F_n (`log`), √F_p + √F_n (`sqrt`), or F_p + F_n with the two sums weighted
    by w_p and w_n (`const`), plus λ Σ (s⁻ − ξ)² over all of its negatives with ξ = γ mean(s⁺) + (1 − γ) mean(s⁻).
    The loss is the sum over anchors by the batch size. An anchor without positives or negatives, or with all of one
    kind mined away, contributes nothing.

        criterion = CBML(form="log")
        loss = criterion(embeddings, labels)

    `embeddings` (B, D) may be of any length: they are normalised here, as by pytorch-metric-learning's pair losses.
    With that library's miners and memory: `cbml.losses.metric_learning`.

    Args:
        form: `log`, `sqrt` or `const`.
        margin: m of the mining rule: positives with s − m < max s⁻, negatives with s + m > min s⁺.
        adaptive_neg: mine negatives by that rule; otherwise take the `top_negatives` most similar ones.
        positive_offset, positive_scale: a_p, b_p.
        negative_offset, negative_scale: a_n, b_n.
        positive_weight, negative_weight: w_p, w_n; used by `const` alone.
        variance_weight: λ; 0 leaves the constraint out.
        gamma: γ.
        variance_reduction: `sum` over an anchor's negatives, as published, or `mean`.
    """

    def __init__(
        self,
        form: Literal["log", "sqrt", "const"] = "log",
        margin: float = 0.1,
        adaptive_neg: bool = True,
        top_negatives: Annotated[int, Field(gt=0)] = 100,
        positive_offset: float = 0.5,
        positive_scale: Positive = 0.5,
        negative_offset: float = 1.0,
        negative_scale: Positive = 0.01,
        positive_weight: Positive = 0.25,
        negative_weight: Positive = 0.25,
        variance_weight: NonNegative = 1.0,
        gamma: Share = 0.2,
        variance_reduction: Literal["sum", "mean"] = "sum",
    ):
        super().__init__()
        self.form, self.margin = form, margin
        self.adaptive_neg, self.top_negatives = adaptive_neg, top_negatives
        self.positive = (positive_offset, positive_scale, positive_weight if form == "const" else 1.0)
        self.negative = (negative_offset, negative_scale, negative_weight if form == "const" else 1.0)
        self.variance_weight, self.gamma, self.variance_reduction = variance_weight, gamma, variance_reduction

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        """`positive`, `negative` and `variance`: each a scalar, zero and connected where nothing is to learn."""
        similarity = batch.embeddings @ batch.embeddings.T
        positive, negative, variance = self.by_anchor(similarity, *pair_masks(batch.labels))
        return {
            "positive": positive.mean(),
            "negative": negative.mean(),
            "variance": self.variance_weight * variance.mean(),
        }

    def by_anchor(self, similarity: Tensor, is_positive: Tensor, is_negative: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What each anchor costs, (B,) each: its positives, its negatives, and the constraint before λ.

        Args:
            similarity: (B, M), cosines of the anchors to whatever they are compared with.
            is_positive, is_negative: (B, M), bool: an anchor's pairs of either kind.
        """
        hardest_negative = similarity.masked_fill(~is_negative, -torch.inf).amax(1, keepdim=True)
        hardest_positive = similarity.masked_fill(~is_positive, torch.inf).amin(1, keepdim=True)
        mined_positive = is_positive & (similarity - self.margin < hardest_negative)
        if self.adaptive_neg:
            mined_negative = is_negative & (similarity + self.margin > hardest_positive)
        else:
            ranked = similarity.masked_fill(~is_negative, -torch.inf).topk(
                min(self.top_negatives, similarity.shape[1]), dim=1
            )
            mined_negative = torch.zeros_like(is_negative).scatter_(1, ranked.indices, True) & is_negative
        # Without positives or negatives one of the two sets is empty as well.
        counts = (mined_positive.any(1) & mined_negative.any(1)).to(similarity.dtype)

        offset, scale, weight = self.positive
        positive = self._shape((offset - similarity) / scale + math.log(weight), mined_positive)
        offset, scale, weight = self.negative
        negative = self._shape((similarity - offset) / scale + math.log(weight), mined_negative)

        is_positive, is_negative = is_positive.to(similarity.dtype), is_negative.to(similarity.dtype)
        positives, negatives = is_positive.sum(1).clamp(min=1), is_negative.sum(1).clamp(min=1)
        mean_positive = (similarity * is_positive).sum(1) / positives
        mean_negative = (similarity * is_negative).sum(1) / negatives
        xi = self.gamma * mean_positive + (1 - self.gamma) * mean_negative
        variance = ((similarity - xi[:, None]).square() * is_negative).sum(1)
        if self.variance_reduction == "mean":
            variance = variance / negatives

        return positive * counts, negative * counts, variance * counts

    def _shape(self, exponents: Tensor, mined: Tensor) -> Tensor:
        """(B,): ln F, √F or F of F = 1 + Σ exp(exponents) over the mined entries of each row."""
        one = exponents.new_zeros(len(exponents), 1)
        log_f = torch.cat([one, exponents.masked_fill(~mined, FLOOR).clamp(min=FLOOR)], 1).logsumexp(1)
        if self.form == "log":
            return log_f
        return (log_f / 2).exp() if self.form == "sqrt" else log_f.exp()
