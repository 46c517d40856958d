"""The command that computes a row of a table again."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cbml.progress import message
from cbml.spec.cell import Cell, flatten
from cbml.spec.params import Params, option_file
from cbml.spec.recipe import Recipe

PLAIN = re.compile(r"(?!(true|false|null|nan|inf)$)[a-z/][\w./+-]*", re.ASCII | re.IGNORECASE)  # a string to Hydra
ABSENT = object()


def command(cell: Cell, seeds: list[int], conf: Path) -> str | None:
    """`dvc exp run` with the options and the parameters in which a cell differs from the files of the folder `conf`.

    None, which is said, if an option's file cannot be read: a command is shown beside results, and must not end them.
    """
    try:
        return _command(cell, seeds, conf)
    except Exception as error:  # a file that was edited by hand fails in as many ways as there are readers
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        message(f"{cell.name}: no command is shown for it: an option's file in {conf} cannot be read ({reason})")
        return None


def _command(cell: Cell, seeds: list[int], conf: Path) -> str:
    groups = {"dataset": cell.dataset, "backbone": cell.backbone, "loss": cell.loss, "recipe": cell.recipe_name}
    files = {group: option_file(conf, group, name) for group, name in groups.items()}
    # An option without a file, as of a preset, is not one to choose, but can be added.
    backbone, loss = (groups[group] if files[group] else "" for group in ("backbone", "loss"))
    settings = [
        f"dataset={cell.dataset}",
        f"recipe={cell.recipe_name}",
        f"backbone=[{backbone}]",
        f"loss=[{loss}]",
        f"embedding_dim=[{cell.embedding_dim}]",
        f"seed=[{','.join(map(str, seeds))}]",
    ]
    own = cell.to_dict()
    default = _default(cell, {group: {name: files[group] or own[group][name]} for group, name in groups.items()})
    for group, name in groups.items():
        if not files[group]:
            settings.append(f"+{group}.{name}={_hydra(own[group][name])}")
            continue
        known = flatten("", files[group])
        for path, value in _changed_entries("", own[group][name], default.get(group, {}).get(name, {})):
            owner = f"{group}.{name}"
            new = path not in known
            if str(known.get(path)).startswith("${"):  # Hydra makes it of another
                continue
            if group == "recipe" and known.get(path, ...) == value:  # else what backbone or loss has would win
                owner, new = f"loss.{cell.loss}.{owner}", True
            if value is not ABSENT:
                settings.append(f"{'++' if new else ''}{owner}.{path}={_hydra(value)}")
            elif any(name == path or name.startswith(f"{path}.") for name in known):
                settings.append(f"~{owner}.{path}")
    return " ".join(["dvc exp run", *(f"-S {shlex.quote(setting)}" for setting in settings)])


def _default(cell: Cell, groups: dict[str, dict[str, dict]]) -> dict[str, Any]:
    """The configuration that these options have when nothing is set."""
    if cell.backbone_config.weights not in (None, "imagenet"):  # a path; what the file means may not be to be had
        groups |= {"backbone": {cell.backbone: groups["backbone"][cell.backbone] | {"weights": "none"}}}
    try:
        params = Params.model_validate(groups | {"embedding_dim": [cell.embedding_dim], "seed": [cell.seed]})
    except ValidationError:  # a file that is no longer an option
        return {}
    params._recipe_file = Recipe.model_validate(groups["recipe"][cell.recipe_name]).model_dump()
    return params.cells(cell.dataset)[0].to_dict()


def _changed_entries(prefix: str, value: Any, default: Any) -> Iterator[tuple[str, Any]]:
    """The innermost entries of a configuration that are not those of the default, by their path; or `ABSENT`."""
    if isinstance(value, dict) and isinstance(default, dict):
        for key in [*value, *(key for key in default if key not in value)]:
            yield from _changed_entries(f"{prefix}.{key}".lstrip("."), value.get(key, ABSENT), default.get(key, ABSENT))
    elif value != default:
        yield prefix, value


def _hydra(value: Any) -> str:
    """A value as Hydra's command line reads it."""
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_hydra(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, list):
        return f"[{','.join(map(_hydra, value))}]"
    if not isinstance(value, str):
        return json.dumps(value)
    if PLAIN.fullmatch(value):
        return value
    escaped = re.sub(r'\\+(?="|\Z)', lambda found: 2 * found[0], value).replace('"', r"\"")
    return f'"{escaped}"'
