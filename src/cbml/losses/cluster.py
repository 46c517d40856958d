"""Cluster loss (Alex et al., "Cluster Loss for Person Re-Identification", ICVGIP 2018)."""

import torch
from torch import Tensor

from cbml.losses.base import Batch, Loss, register
from cbml.schema import Positive


@register("cluster")
class Cluster(Loss):
    """max(0, r − g + m) averaged over the classes of the batch, in Euclidean distances.

    r is the distance from a class's mean to its farthest image, g the distance from that mean to the nearest other.

    Args:
        margin: m.
    """

    def __init__(self, margin: Positive = 1.0):
        super().__init__()
        self.margin = margin

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        embeddings, labels = batch.embeddings, batch.labels
        classes, index = labels.unique(return_inverse=True)
        if len(classes) == 1:
            return {"loss": 0 * embeddings.sum()}
        member = (index == torch.arange(len(classes), device=labels.device)[:, None]).to(embeddings.dtype)
        means = member @ embeddings / member.sum(1, keepdim=True)
        spread = torch.linalg.vector_norm(embeddings - means[index], dim=1)
        radius = (spread * member).amax(1)
        itself = torch.eye(len(classes), dtype=torch.bool, device=labels.device)
        gap = torch.cdist(means, means).masked_fill(itself, torch.inf).amin(1)
        return {"loss": (radius - gap + self.margin).clamp(min=0).mean()}
