"""Losses made of losses: weighted sums, and the cross-batch memory round one of them."""

from typing import Annotated, Any

from pydantic import Field
from pytorch_metric_learning.losses import CrossBatchMemory
from torch import Tensor, nn

from cbml.errors import UserError
from cbml.losses.base import AnyLoss, Loss, build_loss, register

PAIR_LOSSES = ("angular", "contrastive", "margin", "multi_similarity", "triplet")
Name = Annotated[str, Field(pattern=r"^\w+$")]


@register("sum")
class Sum(Loss):
    """The sum of other losses, each logged under its name and multiplied by its own `weight`.

    Args:
        terms: the losses by name, each with its `type` and parameters.
    """

    def __init__(
        self, embedding_dim: int, num_classes: int, terms: Annotated[dict[Name, AnyLoss], Field(min_length=1)]
    ):
        super().__init__()
        self.names = list(terms)
        self.parts = [
            build_loss(config, embedding_dim=embedding_dim, num_classes=num_classes) for config in terms.values()
        ]
        self.losses = nn.ModuleList(self.parts)

    def compute(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {name: loss(embeddings, labels) for name, loss in zip(self.names, self.parts, strict=True)}

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        return [group for loss in self.parts for group in loss.parameter_groups(lr * self.lr_factor)]


@register("xbm")
class XBM(Loss):
    """Cross-batch memory (Wang et al., CVPR 2020): anchors meet the embeddings of earlier batches too.

    The memory is part of the state, so that a resumed run goes on with it.

    Args:
        loss: a pair loss, with its `type` and parameters.
        memory_size: embeddings kept, at least a batch.

    Raises:
        UserError: `loss` is none of `PAIR_LOSSES`, or a `one_sided` triplet; `compute`: a batch larger than the memory.
    """

    def __init__(
        self, embedding_dim: int, num_classes: int, loss: AnyLoss, memory_size: Annotated[int, Field(gt=0)] = 1024
    ):
        super().__init__()
        if loss.type not in PAIR_LOSSES:
            raise UserError(f"loss xbm: cannot hold {loss.type}; allowed: {', '.join(PAIR_LOSSES)}")
        if getattr(loss, "one_sided", False):
            raise UserError("loss xbm: a triplet inside has no order of images in a batch; allowed: one_sided: false")
        self.loss = build_loss(loss, embedding_dim=embedding_dim, num_classes=num_classes)
        self.memory = CrossBatchMemory(self.loss.loss, embedding_dim, memory_size, self.loss.miner)

    def compute(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if len(labels) > self.memory.memory_size:
            raise UserError(f"loss xbm: memory_size {self.memory.memory_size} is below the batch of {len(labels)}")
        return {"loss": self.loss.weight * self.memory(embeddings, labels)}

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        return self.loss.parameter_groups(lr * self.lr_factor)

    def get_extra_state(self) -> dict[str, Any]:
        return {"queue_idx": self.memory.queue_idx, "has_been_filled": self.memory.has_been_filled}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.memory.queue_idx, self.memory.has_been_filled = state["queue_idx"], state["has_been_filled"]
