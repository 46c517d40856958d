"""High-order moments as a regulariser (Jacob et al., HORDE, ICCV 2019)."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from cbml.losses.base import AnyLoss, Batch, Loss, Losses, Sizes, build_loss, masked_mean, pair_masks, register, total


@register("cosine_contrastive")
class CosineContrastive(Loss):
    """The contrastive loss of HORDE, on cosine similarities s, linear in the negatives.

    Mean over positive pairs of (1 − s)² / 2, and over the negative pairs with s above the margin of (s − margin) / 2.

    Args:
        margin: a similarity.
    """

    def __init__(self, margin: Annotated[float, Field(gt=-1, lt=1)] = 0.5):
        super().__init__()
        self.margin = margin

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        embeddings, labels = batch.embeddings, batch.labels
        similarity = embeddings @ embeddings.T
        is_positive, is_negative = pair_masks(labels)
        above = similarity - self.margin
        return {
            "positive": masked_mean((1 - similarity).square() / 2, is_positive),
            "negative": masked_mean(above / 2, is_negative & (above > 0)),
        }


@register("horde")
class HORDE(Loss):
    """A loss on the embedding and on embeddings of the moments of the feature map x, which only training has.

    With 1×1 projections A_k, φ_2 = (A_1 x) ∘ (A_2 x) and φ_k = φ_{k−1} ∘ (A_k x); a moment is the mean of φ_k over the
    positions of the map, projected to the size of the embedding and normalised.

    Args:
        loss: what is on each of them, with its `type` and parameters; each order has its own.
        orders: the highest k; 1 is the loss on the embedding alone.
        width: outputs of the A_k.
        trainable: train the A_k and the last projections; else A_k is of random signs, and nothing is projected.
    """

    needs = ("map",)
    idle_on = ()  # products do not tell opposite points apart

    def __init__(
        self,
        sizes: Sizes,
        loss: AnyLoss,
        orders: Annotated[int, Field(ge=1, le=8)] = 5,
        width: Annotated[int, Field(gt=0)] = 8192,
        trainable: bool = True,
    ):
        super().__init__()
        of_moments = sizes if trainable else Sizes(width, sizes.num_classes)
        self.losses = Losses(build_loss(loss, of_moments if order else sizes) for order in range(orders))
        count = orders if orders > 1 else 0
        self.projections = nn.ParameterList(torch.empty(width, sizes.get("feature_dim")) for _ in range(count))
        self.outputs = nn.ModuleList(
            nn.Linear(width, sizes.embedding_dim, bias=False) for _ in range(orders - 1) if trainable
        )
        for projection in self.projections:
            if trainable:
                nn.init.xavier_uniform_(projection)
            else:
                projection.data.bernoulli_().mul_(2).sub_(1)
                projection.requires_grad_(False)

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        terms = {"order_1": total(self.losses[0].terms(batch))}
        if len(self.losses) > 1:
            positions = batch.get("map").flatten(2).transpose(1, 2)  # (B, hw, C)
            first, *others = self.projections
            phi = positions @ first.T
            for order, projection in enumerate(others, 2):
                phi = phi * (positions @ projection.T)
                moment = phi.mean(1)
                moment = self.outputs[order - 2](moment) if self.outputs else moment
                of_order = Batch(normalize(moment, dim=1), batch.labels)
                terms[f"order_{order}"] = total(self.losses[order - 1].terms(of_order))
        return terms
