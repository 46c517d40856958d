"""params.yaml as typed, validated objects, and what makes two cells the same."""

import hashlib
import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, ValidationError, model_validator

from cbml.data.sources import Dataset
from cbml.errors import UserError
from cbml.losses import LossConfig, config_union
from cbml.models import BackboneConfig, input_convention
from cbml.schema import Count, Name, NonNegative, Positive, PositiveShare, Schema, Seed, Share, first_error


def _distinct(values: list[int]) -> list[int]:
    if len(set(values)) < len(values):
        raise ValueError(f"{values} holds a value twice")
    return values


Distinct = (Field(min_length=1), AfterValidator(_distinct))
Whole = Annotated[int, Field(ge=0)]
if TYPE_CHECKING:
    AnyLoss = LossConfig
else:
    AnyLoss = config_union()


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
        weights: what a backbone starts from if its entry does not say: "imagenet" or None, from scratch.
        iterations: number of batches; 0 evaluates the untrained network.
        batch_size, instances: images per batch, and of each class in it; classes per batch = batch_size / instances.
        optimizer: "adam", "adamw" (its weight decay is no part of the gradient), or "sgd" with `momentum`.
        lr, weight_decay, momentum: of the optimizer.
        head_lr_factor: multiplies the learning rate of the head.
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
        deterministic: the same bits on every run of the same machine. On a CPU that is always so; on a GPU it costs
            speed.

    `resize`, `crop` and `interpolation` of a backbone's own input win over the recipe's file, but not over what is set
    for a run; so does what a backbone's entry says for this recipe, and what that of a loss says wins over both.
    """

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


class Params(Schema):
    """The whole of params.yaml. Every group maps names to options; a cell is one choice from each axis.

    `embedding_dim` 0 leaves the head out: an embedding is then the backbone's pooled features. `register_models` puts
    each evaluated model into MLflow's registry.
    """

    dataset: Annotated[dict[Name, Dataset], Field(min_length=1)]
    backbone: Annotated[dict[Name, BackboneConfig], Field(min_length=1)]
    loss: Annotated[dict[Name, AnyLoss], Field(min_length=1)]
    recipe: Annotated[dict[Name, Recipe], Field(min_length=1, max_length=1)]
    embedding_dim: Annotated[list[Annotated[int, Field(ge=0, le=2**16)]], *Distinct]
    seed: Annotated[list[Seed], *Distinct]
    register_models: bool = False
    _recipe_file: dict[str, Any] = PrivateAttr(default_factory=dict)

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
            UserError: a name is not in params.yaml, or what the backbone changes in the recipe does not fit it.
        """
        dataset_config, network, loss_config = (
            self.option(*choice) for choice in (("dataset", dataset), ("backbone", backbone), ("loss", loss))
        )
        ((recipe_name, recipe),) = self.recipe.items()
        given, changes, changed_by = recipe.model_dump(), {}, {}
        own = input_convention(network).model_dump(include={"resize", "crop", "interpolation"}, exclude_none=True)
        for owner, values in (
            (f"backbone.{backbone}", own | network.recipe.get(recipe_name, {})),
            (f"loss.{loss}", loss_config.recipe.get(recipe_name, {})),
        ):
            for name, value in values.items():
                # What differs from the recipe's file was set for this run, and wins.
                if given.get(name) == self._recipe_file.get(name, given.get(name)):
                    changes[name], changed_by[name] = value, owner
        started: dict[str, Any] = {"weights": network.weights or (given | changes).get("weights"), "recipe": {}}
        try:
            recipe = Recipe.model_validate(given | changes)
            network = BackboneConfig.model_validate(network.model_dump() | started)
        except ValidationError as error:
            where = f"{' and '.join(dict.fromkeys(changed_by.values()))} with recipe.{recipe_name}"
            raise UserError(f"params.yaml: {where}: {first_error(error, given | changes)}") from None
        if recipe.select_by and loss_config.batches and not loss_config.batches.needs_labels:
            raise UserError(
                f"params.yaml: recipe.{recipe_name}.select_by {recipe.select_by.metric} needs labels, loss.{loss} is "
                "trained without; allowed: null"
            )
        changes = {
            name: (given[name], used, owner)
            for name, owner in changed_by.items()
            if (used := getattr(recipe, name)) != given[name]
        }
        names = (dataset, backbone, loss, embedding_dim, seed)
        loss_config = loss_config.model_copy(update={"recipe": {}})
        return Cell(*names, dataset_config, network, loss_config, recipe_name, recipe, changes)

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
    """One training run: a point of the matrix with everything that determines it.

    `changes` is what the entries of backbone and loss changed in the recipe, by name: the recipe's value, the one in
    use, and the entry.
    """

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
    changes: dict[str, tuple[Any, Any, str]] = field(default_factory=dict, compare=False)

    @property
    def name(self) -> str:
        """For people, and for DVC's paths; see `key`."""
        return f"{self.backbone}-{self.loss}-{self.embedding_dim}-{self.seed}"

    def key(self, fingerprint: str, weights: str | None) -> str:
        """The name, and 10 hex digits that change with everything else that determines the cell's result.

        Cells that differ in the seed alone share these digits. Where data and weights come from is not part of them;
        what they are is.

        Args:
            fingerprint: of the dataset's images and lists.
            weights: identifies the content of the weights that the backbone starts from.
        """
        config = self.to_dict()
        backbone = config["backbone"][self.backbone]
        del config["dataset"], config["seed"], backbone["weights"], backbone["published"]
        content = json.dumps([config, fingerprint, weights], sort_keys=True)
        return f"{self.name}-{hashlib.sha256(content.encode()).hexdigest()[:10]}"

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

    def to_yaml(self) -> str:
        """`to_dict` as the text of a file that `load_cell` reads."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def flat(self) -> dict[str, Any]:
        """The configuration as `loss`, `loss.margin`, `recipe.lr`, …: the same names whatever option was chosen."""
        flat: dict[str, Any] = {"embedding_dim": self.embedding_dim, "seed": self.seed}
        for group in ("dataset", "backbone", "loss", "recipe"):
            ((name, option),) = self.to_dict()[group].items()
            flat |= {group: name, **flatten(group, option)}
        return flat


def load_params(path: Path, conf: Path | None = None) -> Params:
    """Read and validate params.yaml.

    Args:
        conf: the folder of the options' own files: what differs from them was set for this run.

    Raises:
        UserError: the file is missing, is not YAML, or holds an unknown, missing or ill-typed parameter.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; run from the repository's root, one stage after another")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        params = Params.model_validate(data)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise UserError(f"{path}: {first_error(error, data)}") from None
    for (name, loss), size in itertools.product(params.loss.items(), params.embedding_dim):
        try:  # now, and not in the train stage of a late cell
            if loss.head:
                loss.head.parts(size)
        except UserError as error:
            raise UserError(f"{path}: loss.{name}: {error}") from None
    if conf:
        ((name, recipe),) = params.recipe.items()
        entry = option_file(conf, "recipe", name)
        params._recipe_file = Recipe.model_validate(entry).model_dump() if entry else {}
    return params


def option_file(conf: Path, group: str, name: str) -> dict[str, Any]:
    """The entry of an option's own file, conf/<group>/<name>.yaml; empty if it has none."""
    file = conf / group / f"{name}.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8"))[name] if file.is_file() else {}


def load_cell(path: Path) -> Cell:
    """The cell of a file that `Cell.to_yaml` was written to.

    Raises:
        UserError: it is missing or damaged.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; the stage train writes it")
    try:
        params = load_params(path)
    except UserError as error:
        raise UserError(f"{error}; run the stage train again, which writes it") from None
    (dataset, backbone, loss, (recipe_name, recipe)) = (
        next(iter(getattr(params, group).items())) for group in ("dataset", "backbone", "loss", "recipe")
    )
    names = (dataset[0], backbone[0], loss[0], params.embedding_dim[0], params.seed[0])
    return Cell(*names, dataset[1], backbone[1], loss[1], recipe_name, recipe)
