"""Invariant and spreading instance features (Ye et al., CVPR 2019), on the batches `instances`."""

import torch
from torch import Tensor

from cbml.losses.base import Batch, Loss, pair_masks, register
from cbml.schema import Positive


@register("isif")
class ISIF(Loss):
    """Each image is a class of its own, told from the rest of the batch by the softmax of its similarities.

    With q_a(b) the softmax over the batch without a of the cosine similarities to a by the temperature, an anchor costs
    −ln q_a(a′) − Σ_k ln(1 − q_a(k)), a′ the other crop and k all the rest. Gradients take the way through the anchor
    alone.

    Args:
        temperature: of the softmax.
    """

    own_batches = True
    idle_on = ()  # each image is one to learn from

    def __init__(self, temperature: Positive = 0.1):
        super().__init__()
        self.temperature = temperature

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        embeddings, labels = batch.embeddings, batch.labels
        is_positive, is_negative = pair_masks(labels)
        has_other = is_positive.any(1)
        logits = embeddings @ embeddings.detach().T / self.temperature
        itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        log_q = logits.masked_fill(itself, -1e4).log_softmax(1)
        invariant = -(log_q * is_positive).sum(1) / is_positive.sum(1).clamp(min=1)
        spreading = -((1 - log_q.exp()).clamp(min=1e-7).log() * is_negative).sum(1)
        return {"invariant": (invariant * has_other).mean(), "spreading": (spreading * has_other).mean()}
