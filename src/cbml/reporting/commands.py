"""The command that computes a row of a table again."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from cbml.backbones import input_convention
from cbml.config import Cell, Recipe, flatten

PLAIN = re.compile(r"[\w./+-]+")  # what Hydra reads as a string without quotes


def command(cell: Cell, seeds: list[int]) -> str:
    """`dvc exp run` with the options and the parameters in which a cell differs from the files of `conf/`."""
    chosen = {
        "dataset": (cell.dataset, cell.dataset_config),
        "backbone": (cell.backbone, cell.backbone_config),
        "loss": (cell.loss, cell.loss_config),
        "recipe": (cell.recipe_name, cell.recipe),
    }
    settings = [
        f"dataset={cell.dataset}",
        f"recipe={cell.recipe_name}",
        f"backbone=[{cell.backbone}]",
        f"loss=[{cell.loss}]",
        f"embedding_dim=[{cell.embedding_dim}]",
        f"seed=[{','.join(map(str, seeds))}]",
    ]
    for group, (name, config) in chosen.items():
        file = Path("conf", group, f"{name}.yaml")
        entry = yaml.safe_load(file.read_text())[name] if file.is_file() else {}
        known = flatten("", entry)
        defaults = flatten("", type(config).model_validate(entry).model_dump(mode="json")) if entry else {}
        for key, value in flatten("", config.model_dump(mode="json")).items():
            follows = _set_by_the_backbone(cell) if group == "recipe" else _set_by_the_recipe(cell, group)
            if defaults.get(key) != value and key not in follows:
                settings.append(f"{'' if key in known else '++'}{group}.{name}.{key}={_hydra(value)}")
    return " ".join(["dvc exp run", *(f"-S {shlex.quote(setting)}" for setting in settings)])


def _set_by_the_backbone(cell: Cell) -> set[str]:
    """Parameters of the recipe that follow from the backbone's entry."""
    own = input_convention(cell.backbone_config).model_dump(include=set(Recipe.model_fields), exclude_none=True)
    return own.keys() | cell.backbone_config.recipe.get(cell.recipe_name, {}).keys()


def _set_by_the_recipe(cell: Cell, group: str) -> set[str]:
    return {"weights"} if group == "backbone" and cell.backbone_config.weights == cell.recipe.weights else set()


def _hydra(value: Any) -> str:
    """A value as Hydra's command line reads it."""
    if isinstance(value, list):
        return f"[{','.join(map(_hydra, value))}]"
    return value if isinstance(value, str) and PLAIN.fullmatch(value) else json.dumps(value)
