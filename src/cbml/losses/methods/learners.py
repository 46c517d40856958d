"""What keeps the learners of a stream apart (Chen and Deng, DeML, CVPR 2019)."""

from itertools import combinations
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from cbml.losses.base import Batch, Loss, Sizes, register
from cbml.losses.methods.adversarial import adversarial
from cbml.losses.methods.bier import streams_of
from cbml.schema import Positive


@register("learners")
class Learners(Loss):
    """A term for a sum: the learners of a stream, parts that follow each other, shall not embed an image alike.

    It is summed over the pairs m < n of learners of each stream. With a and b their parts of an image, normalised:

    - `hinge`, the authors' code: ½ max(0, `margin` − |a − b|)², in the mean over images;
    - `reversal`, an adversary as in the text: a regressor predicts a from b, and the network hinders it, as in
      `adversarial`.

    Args:
        learners: of a stream.
        adversary: which one.
        margin: of the hinge, a distance; unit vectors are at most 2 apart.
        hidden: width of a regressor's hidden layer.

    Raises:
        UserError: the parts are no streams of as many learners.
    """

    idle_on = ()

    def __init__(
        self,
        sizes: Sizes,
        learners: Annotated[int, Field(ge=2)] = 3,
        adversary: Literal["hinge", "reversal"] = "hinge",
        margin: Positive = 2.0,
        hidden: Annotated[int, Field(gt=0)] = 512,
    ):
        super().__init__()
        self.parts = streams_of("learners", sizes, learners)
        self.margin = margin
        streams = range(0, len(self.parts), learners)
        self.pairs = [pair for first in streams for pair in combinations(range(first, first + learners), 2)]
        self.regressors = nn.ModuleList()
        if adversary == "reversal":
            size = self.parts[0]
            self.regressors.extend(
                nn.Sequential(nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, size)) for _ in self.pairs
            )

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        parts = [normalize(part, dim=1) for part in batch.embeddings.split(self.parts, 1)]
        pairs = [(parts[m], parts[n]) for m, n in self.pairs]
        if self.regressors:
            terms = [adversarial(a, b, regressor) for (a, b), regressor in zip(pairs, self.regressors, strict=True)]
        else:
            terms = [self._hinge(a, b) for a, b in pairs]
        return {"loss": torch.stack(terms).sum()}

    def _hinge(self, a: Tensor, b: Tensor) -> Tensor:
        distance = (a - b).square().sum(1).clamp(min=1e-12).sqrt()  # the square root of 0 has no gradient
        return (self.margin - distance).relu().square().mean() / 2
