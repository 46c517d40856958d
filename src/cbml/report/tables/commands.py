"""The command that computes a row of a table again."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

from cbml.progress import message
from cbml.spec.cell import Cell, flatten
from cbml.spec.settings import ABSENT, changed_entries, default_options, option_files, options_of

PLAIN = re.compile(r"(?!(true|false|null|nan|inf)$)[a-z/][\w./+-]*", re.ASCII | re.IGNORECASE)  # a string to Hydra


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
    chosen = {"dataset": cell.dataset, "backbone": cell.backbone, "loss": cell.loss, "recipe": cell.recipe_name}
    files = option_files(cell, conf)
    # An option without a file, as of a preset, is not one to choose, but can be added.
    backbone, loss = (chosen[group] if files[group] else "" for group in ("backbone", "loss"))
    settings = [
        f"dataset={cell.dataset}",
        *([f"recipe={cell.recipe_name}"] if files["recipe"] else []),
        f"backbone=[{backbone}]",
        f"loss=[{loss}]",
        f"embedding_dim=[{cell.embedding_dim}]",
        f"seed=[{','.join(map(str, seeds))}]",
    ]
    own, default = options_of(cell), default_options(cell, files)
    for group, name in chosen.items():
        owner = group if group == "recipe" else f"{group}.{name}"
        if not files[group]:
            settings.append(f"{'++' if group == 'recipe' else '+'}{owner}={_hydra(own[group])}")
            continue
        known = flatten("", files[group])
        for path, value in changed_entries("", own[group], default.get(group, {})):
            parameter, new = f"{owner}.{path}", path not in known
            if str(known.get(path)).startswith("${"):  # Hydra makes it of another
                continue
            if group == "recipe" and known.get(path, ...) == value:  # else what backbone or loss has would win
                parameter, new = f"loss.{cell.loss}.recipe.{name}.{path}", True
            if value is not ABSENT:
                settings.append(f"{'++' if new else ''}{parameter}={_hydra(value)}")
            elif any(name == path or name.startswith(f"{path}.") for name in known):
                settings.append(f"~{parameter}")
    return " ".join(["dvc exp run", *(f"-S {shlex.quote(setting)}" for setting in settings)])


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
