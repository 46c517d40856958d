"""Retrieval and its metrics from all similarities in float64 at once: slow, and large, but easy to check by eye."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cbml.evaluation.retrieval import RESOLUTION, STEP


def similarities(queries: Tensor, gallery: Tensor | None) -> Tensor:
    """(N, M); each query's own is -inf where they are the gallery."""
    unit_queries = F.normalize(queries.double(), dim=1)
    unit_gallery = unit_queries if gallery is None else F.normalize(gallery.double(), dim=1)
    found = (unit_queries @ unit_gallery.T).div_(STEP).round_().mul_(STEP)
    if gallery is None:
        found.diagonal().fill_(-torch.inf)
    return found


def evaluate(queries, labels, gallery=None, gallery_labels=None, ks=(1, 2, 4, 8)) -> dict[str, float]:
    """In percent: sort the positives and all negatives of each query, and count those ahead of each positive."""
    found = similarities(queries, gallery)
    same = labels[:, None] == (labels if gallery is None else gallery_labels)
    r = same.sum(dim=1, keepdim=True) - int(gallery is None)
    positives = found.masked_fill(~same, -torch.inf).sort(dim=1, descending=True).values
    negatives = found.masked_fill(same, -torch.inf).sort(dim=1, descending=True).values
    j = torch.arange(1, positives.shape[1] + 1)
    rank = j + torch.searchsorted(-negatives, RESOLUTION - positives, right=True)
    hit = ((rank <= r) & (j <= r)).double()
    scores = [(rank[:, 0] <= k).double() for k in ks] + [hit.sum(1) / r[:, 0], (hit * j / rank).sum(1) / r[:, 0]]
    scores = torch.stack(scores, dim=1)[r[:, 0] > 0]
    names = [f"recall_at_{k}" for k in ks] + ["r_precision", "map_at_r"]
    return {
        **dict(zip(names, (100 * scores.mean(dim=0)).tolist(), strict=True)),
        "queries": len(scores),
        "queries_without_answer": len(queries) - len(scores),
    }


def retrieve(queries, labels, k, gallery=None, gallery_labels=None) -> tuple[Tensor, Tensor]:
    """Sort by similarity, which is raised by the resolution for other classes; the lower index first."""
    found = similarities(queries, gallery)
    different = labels[:, None] != (labels if gallery is None else gallery_labels)
    order = (found + (RESOLUTION + STEP / 2) * different).sort(dim=1, descending=True, stable=True).indices
    indices = order[:, : min(k, found.shape[1] - (gallery is None))]
    return indices, found.gather(1, indices)
