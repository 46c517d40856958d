"""params.yaml as typed, validated objects."""

import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator

from cbml.backbones import BackboneConfig, input_convention
from cbml.datasets import Dataset
from cbml.errors import UserError
from cbml.losses import LossConfig, config_union
from cbml.schema import Count, NonNegative, Positive, Schema, Share, first_error

PositiveShare = Annotated[float, Field(gt=0, le=1)]


def _distinct(values: list[int]) -> list[int]:
    if len(set(values)) < len(values):
        raise ValueError(f"{values} holds a value twice")
    return values


Axis = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1), AfterValidator(_distinct)]


class Recipe(Schema):
    """How a cell is trained.

    Attributes:
        weights: what a backbone starts from if its entry does not say: "imagenet" or None, from scratch.
        iterations: batches in all; 0 evaluates the untrained network.
        batch_size, instances: images a batch, and of each class in it; classes a batch = batch_size / instances.
        lr, weight_decay: of Adam.
        lr_steps, lr_gamma: iterations after which the learning rate is multiplied by `lr_gamma`.
        freeze_bn: batch normalisation uses its stored statistics; its affine parameters are trained all the same.
        resize: images are resized to this short side, in pixels, before any crop. A backbone's own wins over it.
        crop: side of the network's input, in pixels. A backbone's own wins over it.
        scale, ratio: of the random crop: share of the image's area, aspect ratio.
        flip: mirror half of the training images.
        validate_every: iterations between evaluations on the test list; 0: only before the first and after the last.
        select_by: also report the protocol `validated`: train without the validation classes first, find the validated
            iteration where this metric is highest on them, and score that iteration of the run on all training classes.
        checkpoint_every: iterations between checkpoints.
        precision: of the backbone, in Lightning Fabric's words; embeddings and loss are float32 always.
        channels_last: keep the backbone's weights and feature maps in that memory format.
        compile: run the trunk through `torch.compile`, where a compiler is at hand.
    """

    weights: Literal["imagenet"] | None = None
    iterations: Annotated[int, Field(ge=0)]
    batch_size: Count
    instances: Annotated[int, Field(ge=2)]
    lr: NonNegative
    weight_decay: NonNegative
    lr_steps: list[Count] = []
    lr_gamma: PositiveShare = 0.1
    freeze_bn: bool = True
    resize: Count
    crop: Count
    scale: tuple[PositiveShare, PositiveShare] = (0.16, 1.0)
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    flip: bool = True
    validate_every: Annotated[int, Field(ge=0)] = 0
    select_by: Literal["recall_at_1", "map_at_r"] | None = None
    checkpoint_every: Count = 100
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    channels_last: bool = False
    compile: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.batch_size % self.instances:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of instances {self.instances}")
        if self.crop > self.resize:
            raise ValueError(f"crop {self.crop} is larger than resize {self.resize}")
        if self.select_by and not (self.validate_every and self.iterations):
            raise ValueError(f"select_by {self.select_by} needs iterations and validate_every of at least 1")
        if self.scale[0] > self.scale[1] or self.ratio[0] > self.ratio[1]:
            raise ValueError(f"scale {self.scale} and ratio {self.ratio} must each be (smallest, largest)")
        return self


class Params(Schema):
    """The whole of params.yaml. Every group maps names to options; a cell is one choice from each axis.

    `embedding_dim` 0 leaves the head out: an embedding is then the backbone's pooled features. `validation_classes` is
    the share of the training classes, the last ones, that `build_lists` puts into a list of their own.
    `register_models` puts each evaluated model into MLflow's registry.
    """

    dataset: Annotated[dict[str, Dataset], Field(min_length=1)]
    backbone: Annotated[dict[str, BackboneConfig], Field(min_length=1)]
    loss: Annotated[dict[str, config_union()], Field(min_length=1)]
    recipe: Annotated[dict[str, Recipe], Field(min_length=1, max_length=1)]
    embedding_dim: Axis
    seed: Axis
    validation_classes: Share = 0.0
    register_models: bool = False

    def option(self, group: str, name: str) -> Any:
        """The option `name` of a group.

        Raises:
            UserError: params.yaml does not have it.
        """
        if name not in (options := getattr(self, group)):
            raise UserError(f"params.yaml: {group} {name!r} is not there; allowed: {', '.join(options)}")
        return options[name]

    def cell(self, dataset: str, backbone: str, loss: str, embedding_dim: int, seed: int) -> "Cell":
        """The cell of these names.

        Raises:
            UserError: a name is not in params.yaml, or the backbone's changes to the recipe do not fit it.
        """
        dataset_config, network, loss_config = (
            self.option(*choice) for choice in (("dataset", dataset), ("backbone", backbone), ("loss", loss))
        )
        ((recipe_name, recipe),) = self.recipe.items()
        convention = input_convention(network)
        own = {"resize": convention.resize, "crop": convention.crop}
        changed = recipe.model_dump() | {name: value for name, value in own.items() if value is not None}
        changed |= network.recipe.get(recipe_name, {})
        started = network.model_dump() | {"weights": network.weights or changed.get("weights")}
        try:
            recipe = Recipe.model_validate(changed)
            network = BackboneConfig.model_validate(started)
        except ValidationError as error:
            where = f"backbone.{backbone} with recipe.{recipe_name}"
            raise UserError(f"params.yaml: {where}: {first_error(error, changed)}") from None
        names = (dataset, backbone, loss, embedding_dim, seed)
        return Cell(*names, dataset_config, network, loss_config, recipe_name, recipe, convention.interpolation)

    def cells(self, dataset: str) -> list["Cell"]:
        """Every cell of a dataset, in the order of params.yaml."""
        axes = itertools.product(self.backbone, self.loss, self.embedding_dim, self.seed)
        return [self.cell(dataset, *axis) for axis in axes]


def flatten(prefix: str, tree: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings as one, with keys like `prefix.outer.inner`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}.{key}".lstrip(".")
        flat |= flatten(name, value) if isinstance(value, dict) else {name: value}
    return flat


@dataclass(frozen=True)
class Cell:
    """One training run: a point of the matrix with everything that determines it."""

    dataset: str
    backbone: str
    loss: str
    embedding_dim: int
    seed: int
    dataset_config: Dataset
    backbone_config: BackboneConfig
    loss_config: LossConfig
    recipe_name: str
    recipe: Recipe
    interpolation: str

    @property
    def name(self) -> str:
        return f"{self.backbone}-{self.loss}-{self.embedding_dim}-{self.seed}"

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values, in the shape of a params.yaml that holds this cell alone."""
        return {
            "dataset": {self.dataset: self.dataset_config.model_dump(mode="json")},
            "backbone": {self.backbone: self.backbone_config.model_dump(mode="json")},
            "loss": {self.loss: self.loss_config.model_dump(mode="json")},
            "recipe": {self.recipe_name: self.recipe.model_dump(mode="json")},
            "embedding_dim": [self.embedding_dim],
            "seed": [self.seed],
        }

    def flat(self) -> dict[str, Any]:
        """The configuration as `loss`, `loss.margin`, `recipe.lr`, …: the same names whatever option was chosen."""
        flat: dict[str, Any] = {"embedding_dim": self.embedding_dim, "seed": self.seed}
        for group in ("dataset", "backbone", "loss", "recipe"):
            ((name, option),) = self.to_dict()[group].items()
            flat |= {group: name, **flatten(group, option)}
        return flat

    def hash(self, *contents: str) -> str:
        """16 hex digits that change with the configuration and with `contents`, what it names but does not hold."""
        return hashlib.sha256(json.dumps([self.to_dict(), *contents], sort_keys=True).encode()).hexdigest()[:16]


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read and validate params.yaml.

    Raises:
        UserError: the file is missing, is not YAML, or holds an unknown, missing or ill-typed parameter.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; run from the repository's root, one stage after another")
    try:
        data = yaml.safe_load(path.read_text())
        return Params.model_validate(data)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise UserError(f"{path}: {first_error(error, data)}") from None


def load_cell(path: str | Path) -> Cell:
    """The cell of a file that `Cell.to_dict` was written to."""
    params = load_params(path)
    return params.cell(
        next(iter(params.dataset)),
        next(iter(params.backbone)),
        next(iter(params.loss)),
        params.embedding_dim[0],
        params.seed[0],
    )
