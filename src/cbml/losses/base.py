"""What a loss is here, and the registry that turns its YAML file into one.

A loss is a `Loss` subclass decorated with `@register("name")`. The keyword parameters of its constructor, with their
annotations and defaults, are the parameters that its YAML file may set; `embedding_dim` and `num_classes` are filled in
from the model and the training list where a constructor asks for them.
"""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, ForwardRef, Literal, TypeAlias, Union, cast

import torch
from pydantic import Field, create_model
from torch import Tensor, nn

from cbml.schema import NonNegative, Positive, Schema

REGISTRY: dict[str, tuple[type["Loss"], type["LossConfig"]]] = {}
FILLED_IN = ("embedding_dim", "num_classes")

# The annotation of a parameter that is itself a loss; stands for `config_union()`, known once all are registered.
if TYPE_CHECKING:
    AnyLoss: TypeAlias = "LossConfig"
else:
    AnyLoss = ForwardRef("AnyLoss")


class Loss(nn.Module):
    """Base class: a scalar from a batch, as a sum of named terms."""

    weight = 1.0
    # A subclass sets its own, the default of its option.
    lr_factor = 1.0

    def compute(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What a subclass defines: its terms before weighting, by name, each a scalar connected to the graph.

        Args:
            embeddings: (B, D), L2-normalised, float32 or float64.
            labels: (B,), int64.
        """
        raise NotImplementedError

    def terms(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The weighted terms, whose sum is the loss, by name.

        Args:
            embeddings: (B, D), L2-normalised; half precision is raised to float32, and autocast is off inside.
            labels: (B,), int64.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
            return {name: self.weight * term for name, term in self.compute(embeddings, labels).items()}

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch: the sum of `terms`."""
        return cast(Tensor, sum(self.terms(embeddings, labels).values()))

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Optimiser groups of the loss's own parameters at `lr` times its `lr_factor`; empty if it has none."""
        parameters = list(self.parameters())
        return [{"params": parameters, "lr": lr * self.lr_factor}] if parameters else []


class LossConfig(Schema):
    """The parameters of one loss; subclasses are made by `register` from constructor signatures.

    Every loss has a `weight` that multiplies it, and an `lr_factor` that multiplies the learning rate of its own
    parameters (proxies, centres, classifier).
    """

    type: str
    weight: NonNegative = 1.0
    lr_factor: Positive = 1.0


def pair_masks(labels: Tensor) -> tuple[Tensor, Tensor]:
    """(B, B) bool masks of the positives of each anchor, itself left out, and of its negatives."""
    same = labels[:, None] == labels
    return same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device), ~same


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask`; zero, and connected to the graph, where the mask is empty."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def register(name: str) -> Callable[[type[Loss]], type[Loss]]:
    """Class decorator: make a loss available as `type: name`."""

    def add(cls: type[Loss]) -> type[Loss]:
        parameters = inspect.signature(cls).parameters.values()
        fields: dict[str, Any] = {
            p.name: (p.annotation, ... if p.default is p.empty else p.default)
            for p in parameters
            if p.name not in FILLED_IN
        }
        common: dict[str, Any] = {"type": (Literal[name], ...), "lr_factor": (Positive, cls.lr_factor)}
        REGISTRY[name] = cls, create_model(cls.__name__, __base__=LossConfig, **common, **fields)
        return cls

    return add


def config_union() -> Any:
    """The type of any registered loss's parameters, told apart by `type`."""
    return Annotated[Union[tuple(config for _, config in REGISTRY.values())], Field(discriminator="type")]  # noqa: UP007


def build_loss(config: LossConfig, *, embedding_dim: int, num_classes: int) -> Loss:
    """The loss that `config` describes, for embeddings (B, `embedding_dim`) and labels below `num_classes`.

    Raises:
        UserError: as the constructor of the loss.
    """
    cls, _ = REGISTRY[config.type]
    known = {"embedding_dim": embedding_dim, "num_classes": num_classes}
    own = type(config).model_fields.keys() - LossConfig.model_fields.keys()
    arguments = {name: getattr(config, name) for name in own}
    arguments |= {name: known[name] for name in FILLED_IN if name in inspect.signature(cls).parameters}
    loss = cls(**arguments)
    loss.weight, loss.lr_factor = config.weight, config.lr_factor
    return loss
