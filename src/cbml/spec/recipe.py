"""How a cell is trained. Knows nothing of datasets, backbones or losses."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_serializer, model_validator

from cbml.errors import UserError
from cbml.schema import Count, Name, NonNegative, Positive, PositiveShare, Range, Schema, Share, first_error

Whole = Annotated[int, Field(ge=0)]


class Selection(Schema):
    """How the protocol `validated` finds its iteration.

    Attributes:
        metric: what is to be highest on the validation classes.
        validation_classes: share of the training classes, the last ones, that are held out for it.
    """

    metric: Literal["recall_at_1", "map_at_r"]
    validation_classes: Annotated[float, Field(gt=0, lt=1)] = 0.2


class Recipe(Schema):
    """How a cell is trained.

    Attributes:
        name: of the recipe that the other parameters are from, but for what was set.
        weights: what a backbone starts from if its entry does not say: "imagenet" or None, from scratch.
        iterations: number of batches; 0 evaluates the untrained network.
        batch_size, instances: images per batch, and of each class in it; classes per batch = batch_size / instances.
        optimizer: "adam", "adamw" (its weight decay is no part of the gradient), or "sgd" with `momentum`.
        lr, weight_decay, momentum: of the optimizer.
        head_lr_factor: multiplies the learning rate of the head, and of attentions in the trunk.
        warmup: iterations over which the learning rate rises linearly to its value.
        schedule: what it does then: "steps", or "cosine" down to zero at the end.
        lr_steps, lr_gamma: from each of these iterations on, the learning rate is multiplied by `lr_gamma` once more;
            of schedule "steps".
        clip_norm: gradients of network and loss are scaled down to this norm; 0 leaves them as they are.
        freeze_bn: the trunk's batch normalisation uses its stored statistics; its affine parameters are trained all
            the same.
        resize: images are resized to this short side, in pixels, before any crop.
        crop: side of the network's input, in pixels.
        interpolation: of every resize.
        scale, ratio: of the random crop: share of the image's area, aspect ratio.
        flip: mirror half of the training images.
        color_jitter: brightness, contrast, saturation and hue of each crop are changed by up to these shares, the
            factors drawn as by torchvision's `ColorJitter`; None leaves them.
        validate_every: iterations between evaluations on the test list; 0: only before the first and after the last.
        select_by: also report the protocol `validated`: train without the validation classes first, find the validated
            iteration where a metric is highest on them, and score that iteration of the run on all training classes.
            A metric's name alone stands for a `Selection` with its default share.
        checkpoint_every: iterations between checkpoints, at least.
        precision: of the backbone, in Lightning Fabric's words; embeddings and loss are float32 always.
        channels_last: keep the backbone's weights and feature maps in that memory format.
        compile: run the trunk through `torch.compile`, where a compiler is at hand.
        train: "all", or "head": the trunk stays as it is, and its pooled features are computed once.
        views: of `train: head`: how many crops of each training image features are computed of.
        search: what `pipeline.tune` may change of it, for every loss.
        deterministic: the same bits on every run of the same machine. On a CPU that is always so; on a GPU it costs
            speed.

    See `adapt` for what a cell's backbone and loss change.
    """

    name: Name
    weights: Literal["imagenet"] | None = None
    iterations: Whole
    batch_size: Count
    instances: Annotated[int, Field(ge=2)]
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    lr: NonNegative
    weight_decay: NonNegative
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    head_lr_factor: Positive = 1.0
    warmup: Whole = 0
    schedule: Literal["steps", "cosine"] = "steps"
    lr_steps: list[Count] = []
    lr_gamma: PositiveShare = 0.1
    clip_norm: NonNegative = 0.0
    freeze_bn: bool = True
    resize: Count
    crop: Count
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    scale: tuple[PositiveShare, PositiveShare] = (0.16, 1.0)
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    flip: bool = True
    color_jitter: tuple[Share, Share, Share, Annotated[float, Field(ge=0, le=0.5)]] | None = None
    validate_every: Whole = 0
    select_by: Annotated[
        Selection | None, BeforeValidator(lambda value: {"metric": value} if isinstance(value, str) else value)
    ] = None
    checkpoint_every: Count = 100
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    channels_last: bool = False
    compile: bool = False
    deterministic: bool = False
    train: Literal["all", "head"] = "all"
    views: Count = 4
    search: dict[str, Range] = {}

    @model_serializer(mode="wrap")
    def _what_is_used(self, serialize: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Without what an earlier recipe did not have, where it changes nothing: a cell keeps its key."""
        unused = {"search"} if not self.search else set()
        unused |= {"train", "views"} if self.train == "all" else set()
        return {name: value for name, value in serialize(self).items() if name not in unused}

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, data: Any) -> Any:
        for name, values in data.items() if isinstance(data, dict) else ():
            if isinstance(values, dict) and name not in cls.model_fields:
                key, value = next(iter(values.items()), ("lr", "…"))
                raise ValueError(f"no parameter {name}: a recipe is flat, -S recipe={name} -S recipe.{key}={value}")
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.batch_size % self.instances:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of instances {self.instances}")
        if self.crop > self.resize:
            raise ValueError(f"crop {self.crop} is larger than resize {self.resize}")
        if self.schedule == "cosine" and self.lr_steps:
            raise ValueError(
                f"lr_steps {self.lr_steps} are for schedule steps, not for cosine: lr_steps=[] leaves them out"
            )
        if self.select_by and not (self.validate_every and self.iterations):
            raise ValueError(f"select_by {self.select_by.metric} needs iterations and validate_every of at least 1")
        if self.scale[0] > self.scale[1] or self.ratio[0] > self.ratio[1]:
            raise ValueError(f"scale {self.scale} and ratio {self.ratio} must each be (smallest, largest)")
        return self


def adapt(
    recipe: Recipe, entries: Mapping[str, dict[str, Any]], file: Recipe | None = None
) -> tuple[Recipe, dict[str, tuple[Any, Any, str]]]:
    """The recipe that a cell is trained by, and what changed in it.

    Args:
        recipe: of params.yaml.
        entries: what the entries of backbone and loss want otherwise, by the entry's name; a later one wins.
        file: the recipe as its own file has it: what differs from it was set for this run, and wins over all entries.

    Returns:
        The recipe, and the changes by parameter: the value in `recipe`, the one in use, and the name of the entry.

    Raises:
        UserError: an entry has an unknown parameter, or one that does not fit the others.
    """
    given = recipe.model_dump()
    default = file.model_dump() if file else given
    wanted, by = {}, {}
    for entry, values in entries.items():
        for name, value in values.items():
            if given.get(name) == default.get(name):
                wanted[name], by[name] = value, entry
    try:
        adapted = Recipe.model_validate(given | wanted)
    except ValidationError as error:
        where = f"{' and '.join(dict.fromkeys(by.values()))} with recipe={recipe.name}"
        raise UserError(f"params.yaml: {where}: {first_error(error, given | wanted)}") from None
    used = adapted.model_dump()
    return adapted, {name: (given[name], used[name], by[name]) for name in wanted if used[name] != given[name]}
