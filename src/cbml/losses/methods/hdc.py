"""Hard-aware deeply cascaded embedding (Yuan, Yang and Zhang, ICCV 2017)."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from cbml.errors import UserError
from cbml.losses.base import Batch, Loss, Sizes, pair_masks, register
from cbml.schema import Positive, PositiveShare


@register("hdc")
class HDC(Loss):
    """A contrastive loss on each part of the embedding, normalised, and there on the hardest pairs alone.

    A positive pair costs its squared distance d², a negative one `negative_factor` max(0, `margin` − d²). A part keeps
    a share of the positive pairs, the farthest, and of the negative ones, the closest, rounded down. Its loss is the
    sum of the costs by the number of kept pairs with a cost above zero; the losses of the parts are added.

    Args:
        ratios: the share of all pairs that each part keeps.
        margin: a squared distance.
        negative_factor: of the cost of negative pairs.
        nested: a part ranks only what the part before kept, as in the paper's text; else all pairs, as in its code.

    Raises:
        UserError: `ratios` are not one for each part.
    """

    def __init__(
        self,
        sizes: Sizes,
        ratios: Annotated[list[PositiveShare], Field(min_length=1)] = [1.0, 0.5, 0.2],  # noqa: B006
        margin: Positive = 1.0,
        negative_factor: Positive = 10.0,
        nested: bool = True,
    ):
        super().__init__()
        parts = sizes.of_parts()
        if len(ratios) != len(parts):
            raise UserError(f"loss hdc: {len(ratios)} ratios for {len(parts)} parts; the head must have one for each")
        self.parts, self.ratios = parts, ratios
        self.margin, self.negative_factor, self.nested = margin, negative_factor, nested

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        embeddings, labels = batch.embeddings, batch.labels
        once = torch.ones_like(embeddings @ embeddings.T, dtype=torch.bool).triu(1)
        masks = [mask & once for mask in pair_masks(labels)]
        totals = [int(mask.sum()) for mask in masks]
        terms = {}
        for number, (ratio, part) in enumerate(zip(self.ratios, embeddings.split(self.parts, 1), strict=True), 1):
            part = normalize(part, dim=1)
            squared = 2 - 2 * (part @ part.T).clamp(max=1)
            # By distance: negative pairs beyond the margin all cost nothing, and the next part ranks some of them.
            kept = [
                _hardest(hardness.detach(), mask, int(ratio * total))
                for hardness, mask, total in zip((squared, -squared), masks, totals, strict=True)
            ]
            costs = squared, self.negative_factor * (self.margin - squared).relu()
            values = torch.cat([cost[mask] for cost, mask in zip(costs, kept, strict=True)])
            terms[f"part_{number}"] = values.sum() / (values > 0).sum().clamp(min=1)
            masks = kept if self.nested else masks
        return terms


def _hardest(hardness: Tensor, mask: Tensor, count: int) -> Tensor:
    """The mask of the hardest `count` pairs among those of `mask`; of equals, those that come first."""
    ranked = hardness.masked_fill(~mask, -torch.inf).flatten().sort(descending=True, stable=True).indices
    return torch.zeros_like(mask).flatten().scatter_(0, ranked[:count], True).view_as(mask)
