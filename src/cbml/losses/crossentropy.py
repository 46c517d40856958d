"""Cross-entropy with a classifier of its own (Zhai and Wu, BMVC 2019)."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from cbml.losses.base import Batch, Loss, Sizes, register
from cbml.schema import Positive, Share


@register("crossentropy")
class CrossEntropy(Loss):
    """Normalised softmax, eq. 3: cross-entropy of the cosines to a trained vector for each class over a temperature.

    Args:
        temperature: divides the cosines.
        label_smoothing: share of the target spread evenly over all classes.
    """

    per_class = True
    lr_factor = 10.0
    idle_on = ()

    def __init__(self, sizes: Sizes, temperature: Positive = 0.05, label_smoothing: Share = 0.0):
        super().__init__()
        self.temperature, self.label_smoothing = temperature, label_smoothing
        self.classifier = nn.Parameter(torch.randn(sizes.num_classes, sizes.embedding_dim))

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        embeddings, labels = batch.embeddings, batch.labels
        logits = embeddings @ normalize(self.classifier, dim=1).T / self.temperature
        return {"loss": cross_entropy(logits, labels, label_smoothing=self.label_smoothing)}
