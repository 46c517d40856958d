"""params.yaml as typed, validated objects."""

import itertools
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, Field, PrivateAttr, ValidationError

from cbml.data.sources import Dataset
from cbml.errors import UserError
from cbml.models import BackboneConfig, input_convention
from cbml.schema import Name, Schema, Seed, first_error
from cbml.spec.cell import Cell
from cbml.spec.method import AnyMethod
from cbml.spec.recipe import Recipe


def _distinct(values: list[int]) -> list[int]:
    if len(set(values)) < len(values):
        raise ValueError(f"{values} holds a value twice")
    return values


Distinct = (Field(min_length=1), AfterValidator(_distinct))


class Params(Schema):
    """The whole of params.yaml. Every group maps names to options; a cell is one choice from each axis.

    `embedding_dim` 0 leaves the head out: an embedding is then the backbone's pooled features. `register_models` puts
    each evaluated model into MLflow's registry.
    """

    dataset: Annotated[dict[Name, Dataset], Field(min_length=1)]
    backbone: Annotated[dict[Name, BackboneConfig], Field(min_length=1)]
    loss: Annotated[dict[Name, AnyMethod], Field(min_length=1)]
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

    def cell(self, dataset: str, backbone: str, loss: str, embedding_dim: int, seed: int) -> Cell:
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

    def cells(self, dataset: str) -> list[Cell]:
        """Every cell of a dataset, in the order of params.yaml."""
        axes = itertools.product(self.backbone, self.loss, self.embedding_dim, self.seed)
        return [self.cell(dataset, *axis) for axis in axes]


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
