"""Self-taught metric learning without labels (Kim et al., STML, CVPR 2022), on the batches `neighbours`."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax, normalize, relu

from cbml.losses.base import Batch, Loss, Sizes, register
from cbml.models.teacher import follow, teacher_of
from cbml.schema import NonNegative, Positive


@register("stml")
class STML(Loss):
    """A relaxed contrastive loss under the teacher's contextual similarity, on the embedding and a larger projection.

    With f the raw embedding and g the projection of the student, RC the relaxed contrastive loss and w the similarity
    of the teacher's projections, the loss is (RC(f) + RC(g)) / 2 + KD: the distances between the f of a batch learn
    from those between its g.

    Args:
        projection_dim: of g, which only training has.
        sigma: σ of exp(−d² / σ), the pairwise similarity.
        neighbours: k of the contextual similarity; two crops of an image are each other's.
        delta: δ, the relative distance that dissimilar images are pushed to.
        distillation_weight: of KD.
    """

    needs = ("features", "raw", "teacher")
    own_batches = True
    idle_on = ()  # each image is one to learn from

    def __init__(
        self,
        sizes: Sizes,
        projection_dim: Annotated[int, Field(gt=0)] = 1024,
        sigma: Positive = 3.0,
        neighbours: Annotated[int, Field(ge=2)] = 10,
        delta: Positive = 1.0,
        distillation_weight: NonNegative = 1.0,
    ):
        super().__init__()
        self.projection = nn.Linear(sizes.get("feature_dim"), projection_dim)
        nn.init.orthogonal_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)
        self.teacher = teacher_of(self.projection)
        self.sigma, self.neighbours, self.delta = sigma, neighbours, delta
        self.distillation_weight = distillation_weight

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            taught = self.teacher(batch.get("teacher").features)
            weights = contextual_similarity(taught, batch.get("indices"), self.sigma, self.neighbours)
        f = relative_distances(batch.get("raw"))
        g = relative_distances(self.projection(batch.get("features")))
        return {
            "embedding": relaxed_contrastive(f, weights, self.delta) / 2,
            "projection": relaxed_contrastive(g, weights, self.delta) / 2,
            "distillation": self.distillation_weight
            * kl_div(log_softmax(-f, 1), log_softmax(-g.detach(), 1), reduction="batchmean", log_target=True),
        }

    def follow(self, momentum: float) -> None:
        follow(self.teacher, self.projection, momentum)


def contextual_similarity(embeddings: Tensor, indices: Tensor, sigma: float, k: int) -> Tensor:
    """w of a batch (B, B), symmetric, in [0, 1]: the mean of the pairwise and of the contextual similarity.

    The latter is the overlap of the images' k-reciprocal neighbours, averaged over the nearest k / 2 of each.

    Args:
        embeddings: (B, D), of any norm.
        indices: (B,): crops of one image have one index, and count as equal when neighbours are looked for.
    """
    embeddings = normalize(embeddings, dim=1)
    pairwise = (-(2 - 2 * embeddings @ embeddings.T).clamp(min=0) / sigma).exp()
    ranked = pairwise.masked_fill(indices[:, None] == indices, 1.0).sort(dim=1, descending=True, stable=True).indices
    near = torch.zeros_like(pairwise).scatter_(1, ranked[:, :k], 1.0)
    reciprocal = near * near.T
    overlap = reciprocal * (reciprocal @ reciprocal.T) / reciprocal.sum(1, keepdim=True).clamp(min=1)
    expanded = overlap[ranked[:, : round(k / 2)]].mean(1)
    return (pairwise + (expanded + expanded.T) / 2) / 2


def relative_distances(embeddings: Tensor) -> Tensor:
    """(B, B): Euclidean distances by the mean of their row, the distance to itself included."""
    distances = torch.cdist(embeddings, embeddings, compute_mode="donot_use_mm_for_euclid_dist")
    return distances / distances.mean(1, keepdim=True).clamp(min=1e-12)


def relaxed_contrastive(distances: Tensor, weights: Tensor, delta: float) -> Tensor:
    """Mean over ordered pairs of w d² + (1 − w) max(0, δ − d)² (Kim et al., CVPR 2021)."""
    costs = weights * distances.square() + (1 - weights) * relu(delta - distances).square()
    count = len(costs)
    return (costs.sum() - costs.diagonal().sum()) / max(1, count * (count - 1))
