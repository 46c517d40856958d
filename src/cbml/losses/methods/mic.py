"""Mining interclass characteristics (Roth et al., MIC, ICCV 2019), on the batches `two_tasks`."""

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from cbml.losses.base import AnyLoss, Batch, Loss, Losses, Sizes, build_loss, register, total
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
    own_batches = True
    idle_on = ()

    def __init__(
        self,
        sizes: Sizes,
        loss: AnyLoss,
        adversarial_weight: NonNegative = 2500.0,
        hidden: Annotated[int, Field(gt=0)] = 512,
    ):
        super().__init__()
        size = sizes.embedding_dim
        self.shared = nn.Linear(sizes.get("feature_dim"), size)
        self.losses = Losses(build_loss(loss, sizes) for _ in range(2))
        self.adversarial_weight = adversarial_weight
        self.regressor = nn.Sequential(nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, size))

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        shared = normalize(self.shared(batch.get("features")), dim=1)
        task = max(batch.task, 0)
        embeddings = (batch.embeddings, shared)[task]
        terms = {"task": total(self.losses[task].terms(Batch(embeddings, batch.labels)))}
        terms["adversarial"] = self.adversarial_weight * adversarial(batch.embeddings, shared, self.regressor)
        return terms
