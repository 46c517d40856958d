"""Centre loss (Wen et al., ECCV 2016)."""

import torch
from torch import Tensor, nn

from cbml.losses.base import Loss, register


@register("center")
class Center(Loss):
    """Eq. 2: ½ ‖x − c‖², averaged over the batch, with a trained centre for each class.

    The centres follow the optimiser, at `lr_factor`, in place of the paper's own update rule.
    """

    lr_factor = 50.0

    def __init__(self, embedding_dim: int, num_classes: int):
        super().__init__()
        self.centers = nn.Parameter(torch.randn(num_classes, embedding_dim))

    def compute(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": (embeddings - self.centers[labels]).square().sum(1).mean() / 2}
