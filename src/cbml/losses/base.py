"""What a loss is here, and the registry that turns its YAML file into one.

A loss is a `Loss` subclass decorated with `@register("name")`. The keyword parameters of its constructor, with their
annotations and defaults, are the parameters that its YAML file may set; those of `FILLED_IN` are filled in from the
model and the batches where a constructor asks for them.

A method that is more than a loss says in the same file what else it changes: the head, the batches, the recipe.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ForwardRef, Literal, Self, TypeAlias, Union, cast

import torch
from pydantic import Field, create_model, model_serializer, model_validator
from torch import Tensor, nn

from cbml.errors import UserError
from cbml.models.heads import Head
from cbml.samplers.config import AnyBatchSampler
from cbml.schema import NonNegative, Positive, Schema

REGISTRY: dict[str, tuple[type["Loss"], type["LossConfig"]]] = {}
# feature_dim: C of the pooled features; parts: sizes of the embedding's parts; build: `build_loss` for an inner loss,
# with these sizes filled in.
FILLED_IN = ("embedding_dim", "num_classes", "feature_dim", "parts", "build")
METHOD = ("head", "batches", "teacher", "recipe")  # what only the outermost loss may set

# The annotation of a parameter that is itself a loss; stands for `config_union()`, known once all are registered.
if TYPE_CHECKING:
    AnyLoss: TypeAlias = "LossConfig"
else:
    AnyLoss = ForwardRef("AnyLoss")


@dataclass(frozen=True)
class Batch:
    """What a loss may look at; the rows belong together.

    Attributes:
        embeddings: (B, D), L2-normalised, float32 or float64.
        labels: (B,), int64: the classes, or what the batches call the images.
        raw, features, map: see `Outputs` of the network; there if the loss `needs` them.
        head: the network's, for a loss that needs its weights.
        indices: (B,), int64, rows of the training list; two crops of an image are one row.
        task: which of the batches' problems this is a batch of; -1 for all of them.
        teacher: the teacher's `Outputs` for the same images, those that the loss `needs` too.
    """

    embeddings: Tensor
    labels: Tensor
    raw: Tensor | None = None
    features: Tensor | None = None
    map: Tensor | None = None
    head: nn.Module | None = None
    indices: Tensor | None = None
    task: int = -1
    teacher: Any = None

    def get(self, name: str) -> Any:
        """An attribute that must be there, half precision raised to float32.

        Raises:
            UserError: it is not there.
        """
        value = getattr(self, name)
        if value is None:
            raise UserError(f"loss: needs the {name} of its batch, which are not there")
        return type(value)(*map(_raised, value)) if isinstance(value, tuple) else _raised(value)


def _raised(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16) else value


class Loss(nn.Module):
    """Base class: a scalar from a batch, as a sum of named terms."""

    weight = 1.0
    # A subclass sets its own, the default of its option.
    lr_factor = 1.0
    needs: tuple[str, ...] = ()  # of `Outputs`, beside the embeddings; and `teacher`

    def compute(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What a subclass defines: its terms before weighting, by name, each a scalar connected to the graph.

        Args:
            embeddings: (B, D), L2-normalised, float32 or float64.
            labels: (B,), int64.
        """
        raise NotImplementedError

    def compute_batch(self, batch: Batch) -> dict[str, Tensor]:
        """`compute` for a subclass that looks at more of a batch than embeddings and labels."""
        return self.compute(batch.embeddings, batch.labels)

    def terms(self, embeddings: Tensor, labels: Tensor, **more: Any) -> dict[str, Tensor]:
        """The weighted terms, whose sum is the loss, by name.

        Args:
            embeddings: (B, D), L2-normalised; half precision is raised to float32, and autocast is off inside.
            labels: (B,), int64.
            more: further attributes of `Batch`.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
            return self.weighted(Batch(embeddings, labels, **more))

    def weighted(self, batch: Batch) -> dict[str, Tensor]:
        """`terms` of a batch that is in float32 already."""
        return {name: self.weight * term for name, term in self.compute_batch(batch).items()}

    def total(self, batch: Batch) -> Tensor:
        """The sum of `weighted`: for a loss made of losses."""
        return cast(Tensor, sum(self.weighted(batch).values()))

    def forward(self, embeddings: Tensor, labels: Tensor, **more: Any) -> Tensor:
        """The loss of a batch: the sum of `terms`."""
        return cast(Tensor, sum(self.terms(embeddings, labels, **more).values()))

    def follow(self, momentum: float) -> None:
        """Let the teachers of the loss's own heads follow them; called before each step of the optimiser."""

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Optimiser groups of the loss's own parameters at `lr` times its `lr_factor`, and of the losses inside."""
        lr = lr * self.lr_factor
        inner = list(_nearest(self))
        theirs = {id(parameter) for loss in inner for parameter in loss.parameters()}
        own = [parameter for parameter in self.parameters() if parameter.requires_grad and id(parameter) not in theirs]
        groups = [{"params": own, "lr": lr}] if own else []
        return groups + [group for loss in inner for group in loss.parameter_groups(lr)]


class Losses(nn.ModuleList):
    """A `ModuleList` of losses."""

    def __getitem__(self, index: int) -> Loss:  # type: ignore[override]
        return cast(Loss, super().__getitem__(index))

    def __iter__(self) -> Iterator[Loss]:
        return cast(Iterator[Loss], super().__iter__())


def _nearest(module: nn.Module) -> Iterator[Loss]:
    """The losses inside, but not those inside of them."""
    for child in module.children():
        yield from [child] if isinstance(child, Loss) else _nearest(child)


class LossConfig(Schema):
    """The parameters of one loss; subclasses are made by `register` from constructor signatures.

    Every loss has a `weight` that multiplies it, and an `lr_factor` that multiplies the learning rate of its own
    parameters (proxies, centres, classifier).

    The outermost one may say what else its method changes: the `head` of the network, the `batches`, the momentum of a
    `teacher`, the moving average of the network, and parameters of a `recipe` by its name, which win over what the
    backbone's entry says, and not over what is set for a run.
    """

    type: str
    weight: NonNegative = 1.0
    lr_factor: Positive = 1.0
    head: Head | None = None
    batches: AnyBatchSampler | None = None
    teacher: Annotated[float, Field(ge=0, lt=1)] | None = None
    recipe: dict[str, dict[str, Any]] = {}

    def inner(self) -> Iterator["LossConfig"]:
        """The losses that this one is made of."""
        for name in type(self).model_fields:
            value = getattr(self, name)
            values = value.values() if isinstance(value, dict) else [value]
            yield from (each for each in values if isinstance(each, LossConfig))

    @model_validator(mode="after")
    def _methods_are_outermost(self) -> Self:
        for loss in self.inner():
            if given := [name for name in METHOD if getattr(loss, name) not in (None, {})]:
                raise ValueError(f"{', '.join(given)}: for the outermost loss only, not for {loss.type} in {self.type}")
        return self

    @model_validator(mode="after")
    def _labels_mean_the_same_all_the_time(self) -> Self:
        if self.batches and not self.batches.labels_persist and (of_classes := self.with_classes()):
            raise ValueError(
                f"{of_classes} has parameters of its own for each class, and the labels of these batches change their "
                "meaning; allowed: batches whose labels persist (clusters: warm: true), or a loss of pairs"
            )
        return self

    def with_classes(self) -> str | None:
        """The type of a loss, this one or one inside, that has parameters for each class."""
        if "num_classes" in inspect.signature(REGISTRY[self.type][0]).parameters:
            return self.type
        return next(filter(None, (loss.with_classes() for loss in self.inner())), None)

    @model_serializer(mode="wrap")
    def _what_is_used(self, serialize: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in serialize(self).items() if name not in METHOD or value not in (None, {})}


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


def build_loss(
    config: LossConfig,
    *,
    embedding_dim: int,
    num_classes: int,
    feature_dim: int | None = None,
    parts: list[int] | None = None,
) -> Loss:
    """The loss that `config` describes, for embeddings (B, `embedding_dim`) and labels below `num_classes`.

    Args:
        feature_dim: C of the pooled features (B, C).
        parts: sizes of the embedding's parts, if it has several.

    Raises:
        UserError: as the constructor of the loss.
    """
    cls, _ = REGISTRY[config.type]
    known: dict[str, Any] = {"embedding_dim": embedding_dim, "num_classes": num_classes, "feature_dim": feature_dim}
    known["parts"] = parts or [embedding_dim]
    known["build"] = partial(build_loss, **known)
    own = type(config).model_fields.keys() - LossConfig.model_fields.keys()
    arguments = {name: getattr(config, name) for name in own}
    arguments |= {name: known[name] for name in FILLED_IN if name in inspect.signature(cls).parameters}
    loss = cls(**arguments)
    loss.weight, loss.lr_factor = config.weight, config.lr_factor
    return loss


def needs(loss: nn.Module) -> tuple[str, ...]:
    """What a loss, or those that it is made of, need of the network's `Outputs`."""
    return tuple(sorted({name for module in loss.modules() for name in getattr(module, "needs", ())}))
