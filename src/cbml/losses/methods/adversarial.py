"""Adversarial decorrelation of two parts of the embedding (Opitz et al., BIER, TPAMI 42(2), 2020)."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from cbml.errors import UserError
from cbml.losses.base import Batch, Loss, Sizes, register


class ReverseGradient(torch.autograd.Function):
    """The identity, whose gradient has the other sign (Ganin and Lempitsky, ICML 2015)."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


@register("adversarial")
class Adversarial(Loss):
    """A term for a sum: a regressor predicts one half of the embedding from the other, and the network hinders it.

    The term is −mean((a ∘ h(b))²) over images and dimensions, with a and b the halves behind a gradient reversal and h
    the regressor, all of unit length, in place of BIER's penalty on the regressor's weights.

    Args:
        hidden: width of the regressor's hidden layer.
        activation: after the hidden layer.

    Raises:
        UserError: `embedding_dim` below 2.
    """

    idle_on = ()

    def __init__(
        self,
        sizes: Sizes,
        hidden: Annotated[int, Field(gt=0)] = 512,
        activation: Literal["relu", "none"] = "relu",
    ):
        super().__init__()
        size = sizes.embedding_dim
        if size < 2:
            raise UserError(f"loss adversarial: embedding_dim {size} has no two parts; allowed: 2 or more")
        self.first = size // 2
        self.regressor = nn.Sequential(
            nn.Linear(size - self.first, hidden),
            nn.ReLU() if activation == "relu" else nn.Identity(),
            nn.Linear(hidden, self.first),
        )

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        embeddings = batch.embeddings
        a, b = embeddings.split([self.first, embeddings.shape[1] - self.first], dim=1)
        return {"loss": adversarial(a, b, self.regressor)}


def adversarial(a: Tensor, b: Tensor, regressor: nn.Module) -> Tensor:
    """−mean((a ∘ h(b))²), of unit length, for `a` and `b` behind a gradient reversal and h the regressor."""
    a, b = (normalize(ReverseGradient.apply(part), dim=1) for part in (a, b))
    return -(a * normalize(regressor(b), dim=1)).square().mean()
