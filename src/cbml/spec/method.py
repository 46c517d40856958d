"""What a file of conf/loss says: a loss, and what else its method changes."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, create_model, model_serializer, model_validator

from cbml.losses.base import METHOD, REGISTRY, LossConfig, loss_type
from cbml.models.heads import Head, Slices
from cbml.models.streams import Streams
from cbml.samplers.config import AnyBatchSampler
from cbml.schema import Range


class MethodConfig(LossConfig):
    """The outermost loss of a cell, with its own parameters in a subclass for each loss.

    It may say what else its method changes: the `trunk` and the `head` of the network, the `batches`, the momentum of a
    `teacher`, the moving average of the network, and parameters of a `recipe` by its name, which win over what the
    backbone's entry says, and not over what is set for a run. `search` is what `pipeline.tune` may change of its
    parameters, by name; `tuned` says by what budget the constants here were found, and changes nothing.
    """

    trunk: Streams | None = None
    head: Head | None = None
    batches: AnyBatchSampler | None = None
    teacher: Annotated[float, Field(ge=0, lt=1)] | None = None
    recipe: dict[str, dict[str, Any]] = {}
    search: dict[str, Range] = {}
    tuned: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _labels_mean_the_same_all_the_time(self) -> Self:
        of_classes = [loss.type for loss in losses_of(self) if REGISTRY[loss.type].per_class]
        if self.batches and not self.batches.labels_persist and of_classes:
            raise ValueError(
                f"{of_classes[0]} has parameters of its own for each class, and the labels of these batches change "
                "their meaning; allowed: batches whose labels persist (clusters: warm: true), or a loss of pairs"
            )
        return self

    @model_validator(mode="after")
    def _slices_are_of_the_streams(self) -> Self:
        if self.trunk and isinstance(self.head, Slices):
            there, sliced = ((each.streams, each.learners) for each in (self.trunk, self.head))
            if there != sliced:
                raise ValueError(
                    f"trunk has {there[0]} streams of {there[1]} learners, head slices is for {sliced[0]} of "
                    f"{sliced[1]}; allowed: the same numbers"
                )
        return self

    @model_serializer(mode="wrap")
    def _what_is_used(self, serialize: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in serialize(self).items() if name not in METHOD or value not in (None, {})}


def losses_of(config: LossConfig) -> Iterator[LossConfig]:
    """A loss, and those that it is made of."""
    yield config
    for name in type(config).model_fields:
        value = getattr(config, name)
        for each in value.values() if isinstance(value, dict) else [value]:
            if isinstance(each, LossConfig):
                yield from losses_of(each)


@cache
def _with_method(config: type[LossConfig]) -> type[MethodConfig]:
    bases: Any = (config, MethodConfig)  # in this order the loss's own `type` and defaults hold
    return create_model(config.__name__, __base__=bases)


def parse_method(data: Any) -> MethodConfig:
    """The parameters of the method whose loss `data`, a mapping, names by its `type`.

    Raises:
        ValueError: there is no such loss, or a parameter is not one of its own or not allowed.
    """
    return data if isinstance(data, MethodConfig) else _with_method(loss_type(data).Config).model_validate(data)


AnyMethod = Annotated[SerializeAsAny[MethodConfig], BeforeValidator(parse_method)]
