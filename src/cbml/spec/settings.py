"""What was set for a cell: in what it differs from the files of conf/ that its options are from."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cbml.spec.cell import Cell
from cbml.spec.options import option_file
from cbml.spec.params import Params

ABSENT = object()
GROUPS = ("dataset", "backbone", "loss", "recipe")

# Composed once: a table has many rows of the same options.
cached_option_file = functools.cache(option_file)


def option_files(cell: Cell, conf: Path) -> dict[str, dict[str, Any]]:
    """The file of each of a cell's options as it is now; empty where there is none."""
    names = {"dataset": cell.dataset, "backbone": cell.backbone, "loss": cell.loss, "recipe": cell.recipe_name}
    return {group: cached_option_file(conf, group, name) for group, name in names.items()}


def options_of(cell: Cell) -> dict[str, Any]:
    """A cell's dataset, backbone, loss and recipe, as their files have them."""
    config = cell.to_dict()
    return {group: config[group][getattr(cell, group)] for group in GROUPS[:3]} | {"recipe": config["recipe"]}


def default_options(cell: Cell, files: dict[str, dict]) -> dict[str, Any]:
    """The options of a cell when nothing is set; empty if a file is no longer an option."""
    options = {group: files[group] or own for group, own in options_of(cell).items()}
    if cell.backbone_config.weights not in (None, "imagenet"):  # a path; what the file means may not be to be had
        options["backbone"] = options["backbone"] | {"weights": "none"}
    groups: dict[str, Any] = {name: {getattr(cell, name): options[name]} for name in GROUPS[:3]}
    groups |= {"recipe": options["recipe"], "embedding_dim": [cell.embedding_dim], "seed": [cell.seed]}
    try:
        params = Params.model_validate(groups)
    except ValidationError:
        return {}
    return options_of(params.cells(cell.dataset, params.recipe)[0])


def changed_entries(prefix: str, value: Any, default: Any) -> Iterator[tuple[str, Any]]:
    """The innermost entries of a configuration that are not those of the default, by their path; or `ABSENT`."""
    if isinstance(value, dict) and isinstance(default, dict):
        for key in [*value, *(key for key in default if key not in value)]:
            yield from changed_entries(f"{prefix}.{key}".lstrip("."), value.get(key, ABSENT), default.get(key, ABSENT))
    elif value != default:
        yield prefix, value


def settings_of(cell: Cell, conf: Path) -> dict[str, dict[str, Any]]:
    """What was set for a cell, by group, and in it by the path of the parameter.

    A group without a file, or whose file cannot be read, is left out: there is nothing to compare it with.
    """
    try:
        files = option_files(cell, conf)
        default = default_options(cell, files)
        own = options_of(cell)
        return {
            group: {path: value for path, value in changed_entries("", own[group], default[group]) if path != "name"}
            for group in GROUPS
            if files[group] and group in default
        }
    except Exception:  # as in `command`: names are shown beside results, and must not end them
        return {}
