"""Losses made of losses: weighted sums, one loss on each part, and the cross-batch memory round one of them."""

from dataclasses import replace
from typing import Annotated, Any, Literal, cast

from pydantic import Field
from pytorch_metric_learning.losses import CrossBatchMemory
from torch import Tensor
from torch.nn.functional import normalize

from cbml.errors import UserError
from cbml.losses.base import AnyLoss, Batch, Loss, Losses, Sizes, build_loss, register, total

PAIR_LOSSES = ("angular", "contrastive", "margin", "multi_similarity", "triplet")
Name = Annotated[str, Field(pattern=r"^\w+$")]


@register("sum")
class Sum(Loss):
    """The sum of other losses, each logged under its name and multiplied by its own `weight`.

    Args:
        terms: the losses by name, each with its `type` and parameters.
    """

    def __init__(self, sizes: Sizes, terms: Annotated[dict[Name, AnyLoss], Field(min_length=1)]):
        super().__init__()
        self.names = list(terms)
        self.losses = Losses(build_loss(loss, sizes) for loss in terms.values())

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        return {name: total(loss.terms(batch)) for name, loss in zip(self.names, self.losses, strict=True)}


@register("per_part")
class PerPart(Loss):
    """The sum of a loss on each part of the embedding, normalised; the parts are those of the network's head.

    Args:
        loss: the loss, with its `type` and parameters; each part has its own.
        select: `all` parts, or in a batch of a `task` the part of that number alone, and the whole embedding in a batch
            of all tasks.
    """

    def __init__(self, sizes: Sizes, loss: AnyLoss, select: Literal["all", "task"] = "all"):
        super().__init__()
        self.parts, self.select = sizes.of_parts(), select
        of_parts = [replace(sizes, embedding_dim=size, parts=()) for size in self.parts]
        self.losses = Losses(build_loss(loss, each) for each in of_parts)
        if select == "task":
            self.whole = build_loss(loss, sizes)

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        if self.select == "task" and batch.task < 0:
            return {"loss": total(self.whole.terms(batch))}
        slices = [normalize(part, dim=1) for part in batch.embeddings.split(self.parts, 1)]
        chosen = range(len(self.parts)) if self.select == "all" else [batch.task]
        of_parts = (self.losses[number].terms(replace(batch, embeddings=slices[number])) for number in chosen)
        return {"loss": cast(Tensor, sum(total(terms) for terms in of_parts))}


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
        self,
        sizes: Sizes,
        loss: AnyLoss,
        memory_size: Annotated[int, Field(gt=0)] = 1024,
    ):
        super().__init__()
        if loss.type not in PAIR_LOSSES:
            raise UserError(f"loss xbm: cannot hold {loss.type}; allowed: {', '.join(PAIR_LOSSES)}")
        if getattr(loss, "one_sided", False):
            raise UserError("loss xbm: a triplet inside has no order of images in a batch; allowed: one_sided: false")
        self.loss = build_loss(loss, sizes)
        self.memory = CrossBatchMemory(self.loss.loss, sizes.embedding_dim, memory_size, self.loss.miner)

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        embeddings, labels = batch.embeddings, batch.labels
        if len(labels) > self.memory.memory_size:
            raise UserError(f"loss xbm: memory_size {self.memory.memory_size} is below the batch of {len(labels)}")
        return {"loss": self.loss.weight * self.memory(embeddings, labels)}

    def get_extra_state(self) -> dict[str, Any]:
        return {"queue_idx": self.memory.queue_idx, "has_been_filled": self.memory.has_been_filled}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.memory.queue_idx, self.memory.has_been_filled = state["queue_idx"], state["has_been_filled"]
