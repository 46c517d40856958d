"""What an entry of `conf/backbone/` may say."""

from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from cbml.schema import Schema

BOTTLENECK_RESNETS = ("resnet50", "resnet101", "resnet152")


class InputConvention(Schema):
    """The pixels that a set of weights was trained on.

    `mean` and `std` are in the order of `channels` and in the units of `range` (1: values 0–1, 255: values 0–255).
    `resize` (short side, pixels) and `crop` (square, pixels) are the recipe's where they are None.
    """

    channels: Literal["RGB", "BGR"] = "RGB"
    range: Literal[1, 255] = 1
    mean: tuple[float, float, float]
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat]
    resize: PositiveInt | None = None
    crop: PositiveInt | None = None
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"


class PublishedWeights(Schema):
    """Where a weights file is published, and the first digits (8 or more) of its SHA-256."""

    url: str = Field(pattern=r"^(https?|file)://.+/[^/?#]+$")
    sha256: str = Field(pattern=r"^[0-9a-f]{8,64}$")

    @property
    def file_name(self) -> str:
        return self.url.rsplit("/", 1)[1]


class BackboneConfig(Schema):
    """One backbone.

    Attributes:
        type: how the trunk is built.
        model: the model's name, for `type: timm` only.
        arguments: further arguments of `timm.create_model`, for `type: timm` only. `img_size` stands for the crop that
            the model brings, instead of its own.
        stride_in: the convolution of a bottleneck that holds its stride: the 3×3 (`conv2`, torchvision) or the first
            1×1 (`conv1`, as He et al. published it). ResNet-50, -101 and -152 only.
        weights: None (as the recipe says), "imagenet" (the published file; for timm its own), or the path of a file,
            relative to the repository's root.
        published: what "imagenet" stands for.
        pooling: global pooling of the feature map. A timm model has its own: leave it out.
        input: the pixels expected. A timm model has its own: leave it out.
        recipe: what this backbone changes in a recipe, by the recipe's name.
    """

    type: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "googlenet", "bn_inception", "timm"]
    model: str | None = None
    arguments: dict[str, Any] = {}
    stride_in: Literal["conv1", "conv2"] = "conv2"
    weights: str | None = Field(default=None, min_length=1)
    published: PublishedWeights | None = None
    pooling: Literal["avg", "max"] | None = None
    input: InputConvention | None = None
    recipe: dict[str, dict[str, Any]] = {}

    @model_validator(mode="after")
    def _options_fit_the_type(self) -> "BackboneConfig":
        own: dict[str, Any] = {"pooling": self.pooling, "input": self.input}
        if self.type == "timm":
            if self.model is None:
                raise ValueError("type timm needs `model`, a name from timm.list_models()")
            own["published"] = self.published
            if given := [name for name, value in own.items() if value is not None]:
                raise ValueError(f"a timm model brings its own {' and '.join(given)}: leave out or null")
            if not isinstance(self.arguments.get("img_size", 0), int):
                raise ValueError("arguments.img_size is the side of a square, in whole pixels")
        else:
            if given := [name for name in ("model", "arguments") if getattr(self, name)]:
                raise ValueError(f"`{given[0]}` is for type timm only, not for {self.type}")
            if absent := [name for name, value in own.items() if value is None]:
                raise ValueError(f"type {self.type} needs `{'` and `'.join(absent)}`")
            if self.weights == "imagenet" and self.published is None:
                raise ValueError("weights 'imagenet' needs `published` (url, sha256); or give the path of a file")
        if self.stride_in == "conv1" and self.type not in BOTTLENECK_RESNETS:
            raise ValueError(f"stride_in 'conv1' is for {', '.join(BOTTLENECK_RESNETS)} only, not for {self.type}")
        return self
