"""Boosting independent embeddings robustly (Opitz et al., BIER, TPAMI 42(2), 2020), on the groups of an embedding."""

from itertools import combinations
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize, softplus

from cbml.errors import UserError
from cbml.losses.base import Batch, Loss, Sizes, pair_masks, register
from cbml.losses.methods.adversarial import ReverseGradient
from cbml.models.heads import activations
from cbml.schema import NonNegative, Positive


@register("bier")
class BIER(Loss):
    """Binomial deviance on each part of the embedding, where a part has the pairs that those before it got wrong.

    With s the cosine similarities of a part and c = 1 for positive and −`cost` for negative pairs, a = α (s − β) c; a
    pair costs ln(1 + exp(−a)) times its weight, 1 for the first part, in means over all positive pairs (an image with
    itself counted, at no cost) and all negative pairs, and over the parts. The weight is no way for gradients; in the
    next part it is σ(−A) with A = A + `shrinkage` a from 0.5 on, doubled for negative pairs (`linear`, the authors'
    code), or with A = (1 − ν) A + ν a and ν = 2 / (m + 1) after part m (`online`, the text).

    Besides, the parts are decorrelated: with f_m the part's weights times the pooled features, which get no gradient,

    - `activation` (BIER): Σ_{m<n} mean (f_m,i f_n,j)² over images, i and j; and a penalty, mean (|w|² − 1)² over the
      weight vectors w of the outputs;
    - `adversarial` (A-BIER): −Σ_{m<n} mean (f_m ∘ r(f_n))² with a regressor r from the larger to the smaller part, and
      both behind a gradient reversal; and that penalty on the weights of r and of the parts by inputs, and one on
      biases of r longer than 1.

    Args:
        alpha, beta, cost: α, β, C of the deviance.
        boosting: how weights follow from earlier parts.
        shrinkage: of `linear`.
        decorrelation: which one.
        decorrelation_weight: of the decorrelation with its penalty.
        penalty_weight: of the penalty in it.
        hidden: of the regressors.

    Raises:
        UserError: the embedding has one part; the network's head is more than weights.
    """

    needs = ("features",)
    idle_on = ()

    def __init__(
        self,
        sizes: Sizes,
        alpha: Positive = 2.0,
        beta: float = 0.5,
        cost: Positive = 25.0,
        boosting: Literal["linear", "online"] = "linear",
        shrinkage: Positive = 0.06,
        decorrelation: Literal["activation", "adversarial"] = "activation",
        decorrelation_weight: NonNegative = 5e-5,
        penalty_weight: NonNegative = 100.0,
        hidden: Annotated[int, Field(gt=0)] = 512,
    ):
        super().__init__()
        parts = sizes.of_parts()
        if len(parts) < 2:
            raise UserError(f"loss bier: an embedding of {len(parts)} part; the head must give several, as groups does")
        self.parts, self.boosting, self.shrinkage = parts, boosting, shrinkage
        self.alpha, self.beta, self.cost = alpha, beta, cost
        self.decorrelation_weight, self.penalty_weight = decorrelation_weight, penalty_weight
        self.pairs = [sorted(pair, key=lambda number: parts[number]) for pair in combinations(range(len(parts)), 2)]
        self.regressors = nn.ModuleList()
        if decorrelation == "adversarial":
            self.regressors.extend(
                nn.Sequential(nn.Linear(parts[n], hidden), nn.ReLU(), nn.Linear(hidden, parts[m]))
                for m, n in self.pairs
            )

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        terms = {"boosting": self._boosting(batch.embeddings, batch.labels)}
        if self.decorrelation_weight:
            of_parts, weights = activations(batch.get("head"), batch.get("features").detach(), self.parts)
            decorrelation = self._adversarial if self.regressors else self._activation
            terms["decorrelation"] = self.decorrelation_weight * decorrelation(of_parts, weights)
        return terms

    def _boosting(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        is_positive, is_negative = pair_masks(labels)
        is_positive, is_negative = is_positive.to(embeddings.dtype), is_negative.to(embeddings.dtype)
        sign = is_positive - self.cost * is_negative
        mean = is_positive / (is_positive.sum() + len(labels)) + is_negative / is_negative.sum().clamp(min=1)
        loss, weight = embeddings.new_zeros(()), torch.ones_like(sign)
        sum_so_far = torch.full_like(sign, 0.5 if self.boosting == "linear" else 0.0)
        for number, part in enumerate(embeddings.split(self.parts, 1), 1):
            part = normalize(part, dim=1)
            margin = self.alpha * (part @ part.T - self.beta) * sign
            loss = loss + (mean * weight * softplus(-margin)).sum()
            if self.boosting == "linear":
                sum_so_far = sum_so_far + self.shrinkage * margin.detach()
                weight = (-sum_so_far).sigmoid() * (1 + is_negative)
            else:
                share = 2 / (number + 1)
                sum_so_far = (1 - share) * sum_so_far + share * margin.detach()
                weight = (-sum_so_far).sigmoid()
        return loss / len(self.parts)

    def _activation(self, activations: list[Tensor], weights: list[Tensor]) -> Tensor:
        return products_of_squares(activations, 2) + self.penalty_weight * unlike_one(weights)

    def _adversarial(self, activations: list[Tensor], weights: list[Tensor]) -> Tensor:
        reversed_ = [ReverseGradient.apply(activation) for activation in activations]
        products = [
            -(reversed_[m] * regressor(reversed_[n])).square().mean()
            for (m, n), regressor in zip(self.pairs, self.regressors, strict=True)
        ]
        layers = [layer for layer in self.regressors.modules() if isinstance(layer, nn.Linear)]
        biases = torch.stack([(layer.bias.square().sum() - 1).relu() for layer in layers]).sum()
        penalty = unlike_one([*weights, *(layer.weight for layer in layers)], dim=0) + biases
        return torch.stack(products).sum() + self.penalty_weight * penalty


@register("activation")
class Activation(Loss):
    """The term of `bier` that decorrelates activations, as a loss of its own, within each stream of learners.

    Of a stream, with f_m the weights of part m times the pooled features, which get no gradient: the sum over all sets
    of `order` parts of the mean over images of the product of their mean squares, mean_i f_m,i²; and the penalty of
    `bier` on weight vectors that are not of unit length. It trains the head alone.

    Args:
        learners: of a stream, parts that follow each other.
        order: 2 for pairs of parts, as in BIER; 1 for each alone.
        penalty_weight: of the penalty.

    Raises:
        UserError: the parts are no streams of as many learners, or `order` is above their number; the network's head is
            more than weights.
    """

    needs = ("features",)
    idle_on = ()

    def __init__(
        self,
        sizes: Sizes,
        learners: Annotated[int, Field(ge=1)] = 3,
        order: Literal[1, 2] = 2,
        penalty_weight: NonNegative = 100.0,
    ):
        super().__init__()
        self.parts, self.learners, self.order = streams_of("activation", sizes, max(learners, order)), learners, order
        self.penalty_weight = penalty_weight

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        of_parts, weights = activations(batch.get("head"), batch.get("features").detach(), self.parts)
        streams = range(0, len(of_parts), self.learners)
        products = [products_of_squares(of_parts[first : first + self.learners], self.order) for first in streams]
        return {"product": torch.stack(products).sum(), "penalty": self.penalty_weight * unlike_one(weights)}


def products_of_squares(activations: list[Tensor], order: int) -> Tensor:
    """Over all sets of `order` parts, the sum of the means over images of the products of mean squares."""
    squares = [activation.square().mean(1) for activation in activations]
    return torch.stack([torch.stack(some).prod(0).mean() for some in combinations(squares, order)]).sum()


def unlike_one(weights: list[Tensor], dim: int = 1) -> Tensor:
    """The sum over matrices of the mean over their vectors along `dim` of (|w|² − 1)²."""
    return torch.stack([(weight.square().sum(dim) - 1).square().mean() for weight in weights]).sum()


def streams_of(name: str, sizes: Sizes, learners: int) -> list[int]:
    """The sizes of the parts, which are streams of as many learners, all of one size.

    Raises:
        UserError: they are not.
    """
    parts = sizes.of_parts()
    if len(parts) % learners or len(set(parts)) > 1:
        raise UserError(
            f"loss {name}: parts {parts} are no streams of {learners} equal learners; the head must give them, as "
            "slices does"
        )
    return parts
