"""CBML as a loss of pytorch-metric-learning: with its miners, reducers, cross-batch memory and distributed wrapper.

from pytorch_metric_learning import losses, miners
from cbml.losses.metric_learning import CBMLLoss, CrossBatchMemory

criterion, miner = CBMLLoss(), miners.MultiSimilarityMiner()
loss = criterion(embeddings, labels, miner(embeddings, labels))
loss = CrossBatchMemory(CBMLLoss(), embedding_size=512, memory_size=1024)(embeddings, labels)
"""

from typing import Any

import torch
from pytorch_metric_learning import losses
from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity
from pytorch_metric_learning.losses.generic_pair_loss import GenericPairLoss
from torch import Tensor

from cbml.errors import UserError
from cbml.losses.base import raised
from cbml.losses.cbml import CBML


class CBMLLoss(GenericPairLoss):
    """`CBML` with the interface of pytorch-metric-learning's pair losses: `loss(embeddings, labels, indices_tuple)`.

    It normalises embeddings itself. Pairs or triplets of a miner stand for all positives and negatives of their
    anchors: CBML mines among them by its own rule, and its variance constraint is over these negatives alone. As with
    all pair losses of the library, a miner that selects one pair of either kind or none gives zero.

    What it hands to the reducer is one value for each anchor of the batch. The default, `MeanReducer`, makes them
    `CBML`'s loss, the sum over anchors by the size of the batch, in which those without a mined pair count as zeros.
    `AvgNonZeroReducer` divides by the number of anchors with a cost instead, so that the size of the loss no longer
    falls as mining keeps fewer; `SumReducer` does not divide. `ThresholdReducer` leaves anchors out by their cost,
    `ClassWeightedReducer` weighs them by their class, `PerAnchorReducer` finds them summed up already.

    Args:
        criterion: the loss with its parameters.
        distance: a similarity of the library.
        parameters: `reducer`, `embedding_regularizer` and `embedding_reg_weight`, as of all losses of the library.

    Raises:
        UserError: `distance` is no similarity.
    """

    def __init__(self, criterion: CBML | None = None, distance: BaseDistance | None = None, **parameters: Any):
        super().__init__(mat_based_loss=True, distance=distance, **parameters)
        if not self.distance.is_inverted:
            raise UserError(
                f"CBMLLoss: {type(self.distance).__name__} is no similarity; allowed: CosineSimilarity, or another "
                "distance with is_inverted"
            )
        self.criterion = criterion or CBML()

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, ref_emb: Tensor, ref_labels: Tensor
    ) -> dict[str, Any]:
        with torch.autocast(embeddings.device.type, enabled=False):
            return super().compute_loss(raised(embeddings), labels, indices_tuple, raised(ref_emb), ref_labels)

    def _compute_loss(self, mat: Tensor, pos_mask: Tensor, neg_mask: Tensor) -> dict[str, Any]:
        positive, negative, variance = self.criterion.by_anchor(mat, pos_mask.bool(), neg_mask.bool())
        costs = self.criterion.weight * (positive + negative + self.criterion.variance_weight * variance)
        anchors = torch.arange(len(mat), device=mat.device)
        return {"loss": {"losses": costs, "indices": anchors, "reduction_type": "element"}}

    def get_default_distance(self) -> BaseDistance:
        return CosineSimilarity()


class CrossBatchMemory(losses.CrossBatchMemory):
    """The library's, which knows the losses that it can hold by their names, for `CBMLLoss` too."""

    @staticmethod
    def supported_losses() -> list[str]:
        return [*losses.CrossBatchMemory.supported_losses(), CBMLLoss.__name__]
