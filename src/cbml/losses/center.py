"""Centre loss (Wen et al., ECCV 2016)."""

import torch
from torch import Tensor, nn

from cbml.losses.base import Batch, Loss, Sizes, register


@register("center")
class Center(Loss):
    """Eq. 2: ½ ‖x − c‖², averaged over the batch, with a trained centre for each class.

    The centres follow the optimiser, at `lr_factor`, in place of the paper's own update rule.
    """

    per_class = True
    lr_factor = 50.0
    idle_on = ()

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.centers = nn.Parameter(torch.randn(sizes.num_classes, sizes.embedding_dim))

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        embeddings, labels = batch.embeddings, batch.labels
        return {"loss": (embeddings - self.centers[labels]).square().sum(1).mean() / 2}
