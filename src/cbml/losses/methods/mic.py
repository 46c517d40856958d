"""Mining interclass characteristics (Roth et al., MIC, ICCV 2019), on the batches `two_tasks`."""

from collections.abc import Callable
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from cbml.losses.base import AnyLoss, Batch, Loss, Losses, register
from cbml.losses.methods.adversarial import adversarial
from cbml.schema import NonNegative


@register("mic")
class MIC(Loss):
    """A loss on the embedding, for classes, and one on a second head, for what they share, kept apart from each other.

    The second head is linear, on the pooled features, of the embedding's size; only training has it. Each batch is of
    one of the two tasks, and has besides `adversarial_weight` times the adversarial term of the two embeddings: the
    class embedding against its prediction from the shared one.

    Args:
        loss: of both tasks, with its `type` and parameters; each has its own.
        adversarial_weight: of the adversarial term.
        hidden: of its regressor.
    """

    needs = ("features",)

    def __init__(
        self,
        build: Callable[..., Loss],
        embedding_dim: int,
        feature_dim: int,
        loss: AnyLoss,
        adversarial_weight: NonNegative = 2500.0,
        hidden: Annotated[int, Field(gt=0)] = 512,
    ):
        super().__init__()
        self.shared = nn.Linear(feature_dim, embedding_dim)
        self.losses = Losses([build(loss), build(loss)])
        self.adversarial_weight = adversarial_weight
        self.regressor = nn.Sequential(nn.Linear(embedding_dim, hidden), nn.ReLU(), nn.Linear(hidden, embedding_dim))

    def compute_batch(self, batch: Batch) -> dict[str, Tensor]:
        shared = normalize(self.shared(batch.get("features")), dim=1)
        task = max(batch.task, 0)
        embeddings = (batch.embeddings, shared)[task]
        terms = {"task": self.losses[task](embeddings, batch.labels)}
        terms["adversarial"] = self.adversarial_weight * adversarial(batch.embeddings, shared, self.regressor)
        return terms
