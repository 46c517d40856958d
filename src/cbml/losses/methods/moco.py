"""Momentum contrast (He et al., MoCo, CVPR 2020; v2: Chen et al., 2020), on the batches `instances`."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from cbml.losses.base import Batch, Loss, Sizes, register
from cbml.models.teacher import follow, teacher_of
from cbml.schema import Positive


@register("moco")
class MoCo(Loss):
    """The first crop of an image finds the teacher's second among those of many other images: a queue of the latest.

    Both are projected by a hidden layer and a last one, which only training has, on the raw embedding; a trained
    network is used without them.

    Args:
        projection_dim: of the projections.
        queue: their number.
        temperature: of the softmax over cosine similarities.
    """

    needs = ("raw", "teacher")
    ordered = True
    own_batches = True
    idle_on = ()  # each image is one to learn from
    queue: Tensor

    def __init__(
        self,
        sizes: Sizes,
        projection_dim: Annotated[int, Field(gt=0)] = 128,
        queue: Annotated[int, Field(gt=0)] = 9600,
        temperature: Positive = 0.07,
    ):
        super().__init__()
        size = sizes.embedding_dim
        layers = nn.Linear(size, size), nn.ReLU(), nn.Linear(size, projection_dim)
        self.projection = nn.Sequential(*layers)
        self.teacher = teacher_of(self.projection)
        self.temperature = temperature
        self.register_buffer("queue", normalize(torch.randn(queue, projection_dim), dim=1))

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        half = len(batch.labels) // 2
        queries = normalize(self.projection(batch.get("raw")[:half]), dim=1)
        with torch.no_grad():
            keys = normalize(self.teacher(batch.get("teacher").raw[half:]), dim=1)
        positive = (queries * keys).sum(1, keepdim=True)
        logits = torch.cat([positive, queries @ self.queue.T], 1) / self.temperature
        if self.training:
            self.queue = torch.cat([keys, self.queue])[: len(self.queue)]
        first = torch.zeros(half, dtype=torch.int64, device=logits.device)
        return {"loss": cross_entropy(logits, first, reduction="sum") / max(1, half)}

    def follow(self, momentum: float) -> None:
        follow(self.teacher, self.projection, momentum)
