"""What a loss is here, and the registry that turns its YAML file into one.

A loss is a `Loss` subclass decorated with `@register("name")`. The keyword parameters of its constructor, with their
annotations and defaults, are the parameters that its YAML file may set, and what is given in Python is held to the same
annotations. A constructor that also asks for `sizes` gets the `Sizes` of the model and the batches.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import wraps
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast

import torch
from pydantic import BeforeValidator, SerializeAsAny, ValidationError, create_model, model_validator
from torch import Tensor, nn
from torch.nn.functional import normalize

from cbml.errors import UserError
from cbml.schema import NonNegative, Positive, Schema, first_error

L = TypeVar("L", bound="type[Loss]")

REGISTRY: dict[str, type["Loss"]] = {}
# What the file of a method sets beside its loss: see spec/method.py.
METHOD = ("trunk", "head", "batches", "teacher", "recipe", "search", "tuned")


@dataclass(frozen=True)
class Sizes:
    """What a loss with parameters of its own must know of the model and the batches.

    Attributes:
        embedding_dim: D of the embeddings (B, D).
        num_classes: the labels are below it.
        feature_dim: C of the pooled features (B, C).
        parts: of the embedding, which add up to D; none: it is one.
    """

    embedding_dim: int
    num_classes: int
    feature_dim: int | None = None
    parts: tuple[int, ...] = ()

    def get(self, name: str) -> int:
        """A size that must be known.

        Raises:
            UserError: it is not.
        """
        if (value := getattr(self, name)) is None:
            raise UserError(f"loss: needs the size {name}, which is not there")
        return int(value)

    def of_parts(self) -> list[int]:
        """The sizes of the embedding's parts, at least one."""
        return list(self.parts) or [self.embedding_dim]


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
        if name == "teacher":
            return value._make(raised(each) for each in value)
        return raised(value)


def raised(value: Any) -> Any:
    """A tensor of half precision in float32; anything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16) else value


def total(terms: dict[str, Tensor]) -> Tensor:
    """The sum of a loss's terms: a scalar."""
    return cast(Tensor, sum(terms.values()))


class Loss(nn.Module):
    """Base class: a scalar from a batch, as a sum of named terms.

    A subclass defines `compute`. The training loop, and losses that are made of losses, call `terms`; a loop of one's
    own calls the loss itself: `loss(embeddings, labels)`.

    Class attributes, which a subclass sets where it differs:
        needs: what `compute` looks at beside embeddings and labels: names of `Outputs`, and `teacher`.
        per_class: it has parameters for each class, so that a label must mean the same all the time.
        lr_factor: multiplies the learning rate of its own parameters, the default of its option.
        ordered: the order of a batch matters, because pairs are drawn at random or by their place.
        own_batches: it does not learn from batches of labelled images alone, but from those that its option sets.
        idle_on: batches with nothing to learn, on which it is exactly zero with zero gradients: a `single` image; one
            class `collapsed` to a point; two such classes `apart`, at opposite points.
    """

    needs: tuple[str, ...] = ()
    per_class = False
    lr_factor = 1.0
    ordered = False
    own_batches = False
    idle_on: tuple[str, ...] = ("single", "collapsed", "apart")

    Config: ClassVar[type["LossConfig"]]
    weight = 1.0
    arguments: dict[str, Any] = {}  # what the constructor was given, defaults filled in

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        """What a subclass defines: its terms before weighting, by name, each a scalar connected to the graph."""
        raise NotImplementedError

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """The weighted terms, whose sum is the loss, by name.

        Autocast is off inside, and embeddings of half precision are raised to float32.
        """
        with torch.autocast(batch.embeddings.device.type, enabled=False):
            batch = replace(batch, embeddings=raised(batch.embeddings))
            return {name: self.weight * term for name, term in self.compute(batch).items()}

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch: a scalar.

        The embeddings are L2-normalised here, as the pair losses of pytorch-metric-learning do it, so they may be of
        any length, and gradients have no radial part. (`terms` takes embeddings that are normalised already.)

        Args:
            embeddings: (B, D), of a floating dtype.
            labels: (B,), integers: a tensor, an array or a list.

        Raises:
            UserError: other shapes or dtypes; a loss that `needs` more of a batch, which `terms` can be given.
        """
        name, labels = type(self).__name__, torch.as_tensor(labels)
        if embeddings.ndim != 2 or not embeddings.is_floating_point():
            raise UserError(
                f"{name}: embeddings have shape {tuple(embeddings.shape)} and dtype {embeddings.dtype}; "
                "allowed: (B, D), floating"
            )
        if labels.shape != embeddings.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
            raise UserError(
                f"{name}: labels have shape {tuple(labels.shape)} and dtype {labels.dtype}; "
                f"allowed: ({len(embeddings)},), one whole number for each embedding"
            )
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = normalize(raised(embeddings), dim=1)
        return total(self.terms(Batch(embeddings, labels.to(embeddings.device, torch.int64))))

    def extra_repr(self) -> str:
        shown = {name: value for name, value in self.arguments.items() if not isinstance(value, LossConfig | dict)}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

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
    """The parameters of one loss; `register` makes a subclass of each constructor's signature.

    Every loss has a `weight` that multiplies it, and an `lr_factor` that multiplies the learning rate of its own
    parameters (proxies, centres, classifier).
    """

    type: str
    weight: NonNegative = 1.0
    lr_factor: Positive = 1.0

    @model_validator(mode="before")
    @classmethod
    def _methods_are_outermost(cls, data: Any) -> Any:
        if isinstance(data, dict) and (given := [name for name in METHOD if name in data.keys() - cls.model_fields]):
            raise ValueError(f"{', '.join(given)}: for the outermost loss only, not for {data.get('type')} inside it")
        return data


def parse(data: Any) -> LossConfig:
    """The parameters of the loss that `data`, a mapping, names by its `type`.

    Raises:
        ValueError: there is no such loss, or a parameter is not one of its own or not allowed.
    """
    return data if isinstance(data, LossConfig) else loss_type(data).Config.model_validate(data)


def loss_type(data: Any) -> type[Loss]:
    """The class of the loss that `data`, a mapping, names by its `type`.

    Raises:
        ValueError: there is none.
    """
    name = data.get("type") if isinstance(data, dict) else None
    if name not in REGISTRY:
        raise ValueError(f"type {name!r} is no loss; allowed: {', '.join(map(repr, sorted(REGISTRY)))}")
    return REGISTRY[name]


# The annotation of a parameter that is itself a loss: a mapping with its `type` and parameters.
AnyLoss = Annotated[SerializeAsAny[LossConfig], BeforeValidator(parse)]


def pair_masks(labels: Tensor) -> tuple[Tensor, Tensor]:
    """(B, B) bool masks of the positives of each anchor, itself left out, and of its negatives."""
    same = labels[:, None] == labels
    return same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device), ~same


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask`; zero, and connected to the graph, where the mask is empty."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def register(name: str) -> Callable[[L], L]:
    """Class decorator: make a loss available as `type: name`, and its constructor refuse what the file may not say."""

    def add(cls: L) -> L:
        fields: dict[str, Any] = {
            p.name: (p.annotation, ... if p.default is p.empty else p.default)
            for p in inspect.signature(cls).parameters.values()
            if p.name != "sizes"
        }
        common: dict[str, Any] = {"type": (Literal[name], ...), "lr_factor": (Positive, cls.lr_factor)}
        cls.Config = create_model(cls.__name__, __base__=LossConfig, **common, **fields)
        cls.__init__ = _strict(cls.__init__, name, cls.Config)  # type: ignore[method-assign]
        REGISTRY[name] = cls
        return cls

    return add


def _strict(init: Callable[..., None], name: str, config: type[LossConfig]) -> Callable[..., None]:
    """A constructor whose arguments are those of `config`, and `sizes` if `init` takes them."""
    signature = inspect.signature(init)

    @wraps(init)
    def strict(self: Loss, *args: Any, **kwargs: Any) -> None:
        given = dict(list(signature.bind_partial(self, *args).arguments.items())[1:]) | kwargs
        sizes = {"sizes": given.pop("sizes")} if "sizes" in given and "sizes" in signature.parameters else {}
        if not all(isinstance(value, Sizes) for value in sizes.values()):
            raise UserError(f"loss {name}: sizes: allowed is Sizes(embedding_dim, num_classes), got {sizes['sizes']!r}")
        try:
            checked = config.model_validate({"type": name} | given)
        except ValidationError as error:
            raise UserError(f"loss {name}: {first_error(error, given)}") from None
        own = {key: getattr(checked, key) for key in config.model_fields if key not in LossConfig.model_fields}
        init(self, **sizes, **own)
        self.weight, self.lr_factor = checked.weight, checked.lr_factor
        common = {key: config.model_fields[key].default for key in ("weight", "lr_factor")}
        self.arguments = own | {key: getattr(self, key) for key in common if getattr(self, key) != common[key]}

    return strict


def build_loss(config: LossConfig, sizes: Sizes) -> Loss:
    """The loss that `config` describes.

    Raises:
        UserError: as the constructor of the loss.
    """
    cls = REGISTRY[config.type]
    arguments = {name: getattr(config, name) for name in cls.Config.model_fields if name != "type"}
    return cls(**arguments, **({"sizes": sizes} if "sizes" in inspect.signature(cls).parameters else {}))


def needs(loss: nn.Module) -> tuple[str, ...]:
    """What a loss, or those that it is made of, need of the network's `Outputs`."""
    return tuple(sorted({name for module in loss.modules() for name in getattr(module, "needs", ())}))
