"""Easy positives with semi-hard negatives (Xuan et al., WACV 2020)."""

from pytorch_metric_learning.distances import DotProductSimilarity
from pytorch_metric_learning.miners import BatchEasyHardMiner
from torch import Tensor
from torch.nn.functional import softplus

from cbml.losses.base import Batch, Loss, register
from cbml.schema import Positive


@register("epshn")
class EPSHN(Loss):
    """−ln(exp(s⁺) / (exp(s⁺) + exp(s⁻))) of cosines over a temperature, averaged over anchors.

    s⁺ is an anchor's most similar positive and s⁻ its most similar negative among those less similar than s⁺; an
    anchor without such a pair is left out.

    Args:
        temperature: divides the cosines.
    """

    idle_on = ("single", "collapsed")  # a negative always has a cost

    def __init__(self, temperature: Positive = 0.1):
        super().__init__()
        self.temperature = temperature
        self.miner = BatchEasyHardMiner("easy", "semihard", distance=DotProductSimilarity(normalize_embeddings=False))

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        embeddings, labels = batch.embeddings, batch.labels
        anchors, positives, _, negatives = self.miner(embeddings, labels)
        similarity = embeddings @ embeddings.T
        gap = similarity[anchors, negatives] - similarity[anchors, positives]
        return {"loss": softplus(gap / self.temperature).sum() / max(len(gap), 1)}
