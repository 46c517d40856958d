"""params.yaml as typed, validated objects."""

import itertools
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, Field, ValidationError

from cbml.data.sources import Dataset
from cbml.errors import UserError
from cbml.files import cure
from cbml.models import BackboneConfig, input_convention
from cbml.schema import Name, Schema, Seed, first_error
from cbml.spec.cell import Cell
from cbml.spec.method import AnyMethod
from cbml.spec.options import read_yaml
from cbml.spec.recipe import Recipe, adapt


def _distinct(values: list[int]) -> list[int]:
    if len(set(values)) < len(values):
        raise ValueError(f"{values} holds a value twice")
    return values


Distinct = (Field(min_length=1), AfterValidator(_distinct))


class Params(Schema):
    """The whole of params.yaml. Three groups map names to options; a cell is one choice from each axis.

    `embedding_dim` 0 leaves the head out: an embedding is then the backbone's pooled features. `register_models` puts
    each evaluated model into MLflow's registry.
    """

    dataset: Annotated[dict[Name, Dataset], Field(min_length=1)]
    backbone: Annotated[dict[Name, BackboneConfig], Field(min_length=1)]
    loss: Annotated[dict[Name, AnyMethod], Field(min_length=1)]
    recipe: Recipe
    embedding_dim: Annotated[list[Annotated[int, Field(ge=0, le=2**16)]], *Distinct]
    seed: Annotated[list[Seed], *Distinct]
    register_models: bool = False

    def option(self, group: str, name: str) -> Any:
        """The option `name` of a group.

        Raises:
            UserError: params.yaml does not have it.
        """
        if name not in (options := getattr(self, group)):
            raise UserError(f"params.yaml: {group} {name!r} is not there; allowed: {', '.join(options)}")
        return options[name]

    def cell(
        self,
        dataset: str,
        backbone: str,
        loss: str,
        embedding_dim: int,
        seed: int,
        recipe_file: Recipe | None = None,
    ) -> Cell:
        """The cell of these names.

        Args:
            recipe_file: the recipe as its own file has it; see `adapt`.

        Raises:
            UserError: a name is not in params.yaml, or the options do not fit together.
        """
        dataset_config = self.option("dataset", dataset)
        network = self.option("backbone", backbone)
        loss_config = self.option("loss", loss)
        name = self.recipe.name
        own = input_convention(network).model_dump(include={"resize", "crop", "interpolation"}, exclude_none=True)
        entries = {
            f"backbone.{backbone}": own | network.recipe.get(name, {}),
            f"loss.{loss}": loss_config.recipe.get(name, {}),
        }
        recipe, changes = adapt(self.recipe, entries, recipe_file)
        if recipe.select_by and loss_config.batches and not loss_config.batches.needs_labels:
            raise UserError(
                f"params.yaml: recipe.select_by {recipe.select_by.metric} needs labels, loss.{loss} is trained "
                "without; allowed: null"
            )
        started = network.model_dump() | {"weights": network.weights or recipe.weights, "recipe": {}}
        try:
            network = BackboneConfig.model_validate(started)
        except ValidationError as error:
            raise UserError(
                f"params.yaml: backbone.{backbone} with recipe={name}: {first_error(error, started)}"
            ) from None
        return Cell(
            dataset=dataset,
            backbone=backbone,
            loss=loss,
            embedding_dim=embedding_dim,
            seed=seed,
            dataset_config=dataset_config,
            backbone_config=network,
            loss_config=loss_config.model_copy(update={"recipe": {}, "search": {}}),
            recipe=recipe.model_copy(update={"search": {}}),  # which is no part of what a cell is
            changes=changes,
        )

    def cells(self, dataset: str, recipe_file: Recipe | None = None) -> list[Cell]:
        """Every cell of a dataset, in the order of params.yaml; see `cell`."""
        axes = itertools.product(self.backbone, self.loss, self.embedding_dim, self.seed)
        return [self.cell(dataset, *axis, recipe_file=recipe_file) for axis in axes]


def load_params(path: Path) -> Params:
    """Read and validate params.yaml.

    Raises:
        UserError: the file is missing, is not YAML, or holds an unknown, missing or ill-typed parameter.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; run from the repository's root, one stage after another")
    params = _validated(read_yaml(path), path)
    for group in ("dataset", "backbone", "loss"):
        for name in getattr(params, group):
            _check_name(name, f"{path}: {group}.{name}")
    _check_name(params.recipe.name, f"{path}: recipe.name {params.recipe.name!r}")
    for (name, loss), size in itertools.product(params.loss.items(), params.embedding_dim):
        try:  # now, and not in the train stage of a late cell
            if loss.head:
                loss.head.parts(size)
        except UserError as error:
            raise UserError(f"{path}: loss.{name}: {error}") from None
    return params


def _validated(data: Any, path: Path) -> Params:
    try:
        return Params.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{path}: {first_error(error, data)}") from None


def _check_name(name: str, where: str) -> None:
    """Not in `Name`: records have such names, from before they were refused."""
    if "." in name:
        raise UserError(f"{where}: to DVC a dot in a name is a level below; allowed: letters, digits, _ and -")


def load_cell(path: Path, stage: str = "train") -> Cell:
    """The cell of a file that `Cell.to_yaml` was written to, also if a recipe was not flat then.

    Args:
        stage: the one that wrote this file.

    Raises:
        UserError: it is missing or damaged.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; the stage {stage} writes it")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))  # PyYAML wrote it; to Hydra some of its text is numbers
        params = _validated(_flat(data), path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}; {cure(path, stage)}") from None
    except UserError as error:
        raise UserError(f"{error}; {cure(path, stage)}") from None
    return _only_cell(params)


def cell_from(config: dict[str, Any]) -> Cell:
    """The cell of what `Cell.to_dict` returned."""
    return _only_cell(Params.model_validate(config))


def _only_cell(params: Params) -> Cell:
    dataset, backbone, loss = (next(iter(group)) for group in (params.dataset, params.backbone, params.loss))
    return Cell(
        dataset=dataset,
        backbone=backbone,
        loss=loss,
        embedding_dim=params.embedding_dim[0],
        seed=params.seed[0],
        dataset_config=params.dataset[dataset],
        backbone_config=params.backbone[backbone],
        loss_config=params.loss[loss],
        recipe=params.recipe,
    )


def _flat(data: Any) -> Any:
    """A cell's content with its recipe in today's form; once it was {name: parameters}."""
    recipe = data.get("recipe") if isinstance(data, dict) else None
    if isinstance(recipe, dict) and "name" not in recipe and len(recipe) == 1:
        ((name, parameters),) = recipe.items()
        if isinstance(parameters, dict):
            return data | {"recipe": {"name": name, **parameters}}
    return data
