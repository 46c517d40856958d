"""The files of conf/, as Hydra composes them for params.yaml."""

from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from cbml.errors import UserError
from cbml.schema import first_error
from cbml.spec.recipe import Recipe


def read_yaml(path: Path) -> Any:
    """A YAML file as Hydra reads it: to PyYAML alone, 1e-5 is text.

    Raises:
        UserError: it is not YAML.
    """
    try:
        return OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, UnicodeDecodeError, OSError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None


def option_file(conf: Path, group: str, name: str) -> dict[str, Any]:
    """The entry of an option's own file, conf/<group>/<name>.yaml, with what it builds on; empty without a file.

    Raises:
        UserError: it is no option of Hydra's.
    """
    if not (conf / group / f"{name}.yaml").is_file():
        return {}
    try:
        with initialize_config_dir(str(conf.resolve()), version_base=None):
            option: Any = OmegaConf.to_container(compose(f"{group}/{name}")[group])
    except (yaml.YAMLError, ValueError, OSError, HydraException, OmegaConfBaseException) as error:
        raise UserError(
            f"{conf}/{group}/{name}.yaml: Hydra cannot compose it: {' '.join(str(error).split())}"
        ) from None
    return option if group == "recipe" else option.get(name, {})


def recipe_file(conf: Path, name: str) -> Recipe | None:
    """A recipe as its own file has it; None without a file.

    Raises:
        UserError: it is not one.
    """
    entry = option_file(conf, "recipe", name)
    try:
        return Recipe.model_validate(entry) if entry else None
    except ValidationError as error:
        raise UserError(f"{conf}/recipe/{name}.yaml: {first_error(error, entry)}") from None
