"""A cell, and what makes two cells the same."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import yaml

from cbml.data.sources import Dataset
from cbml.models import BackboneConfig
from cbml.spec.method import MethodConfig
from cbml.spec.recipe import Recipe


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

    `changes` is what the entries of backbone and loss changed in the recipe; see `adapt`.
    """

    dataset: str
    backbone: str
    loss: str
    embedding_dim: int
    seed: int
    dataset_config: Dataset
    backbone_config: BackboneConfig
    loss_config: MethodConfig
    recipe: Recipe
    changes: dict[str, tuple[Any, Any, str]] = field(default_factory=dict, compare=False)

    @property
    def recipe_name(self) -> str:
        """The name of the recipe."""
        return self.recipe.name

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
        config = self._by_name() | {"backbone": {self.backbone: self.trunk}}
        del config["dataset"], config["seed"]
        config["loss"][self.loss].pop("tuned", None)
        content = json.dumps([config, fingerprint, weights], sort_keys=True)
        return f"{self.name}-{hashlib.sha256(content.encode()).hexdigest()[:10]}"

    @property
    def trunk(self) -> dict[str, Any]:
        """The configuration of the backbone, without where its weights come from."""
        return self.backbone_config.model_dump(mode="json", exclude={"weights", "published"})

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values, in the shape of a params.yaml that holds this cell alone."""
        return {
            "dataset": {self.dataset: self.dataset_config.model_dump(mode="json")},
            "backbone": {self.backbone: self.backbone_config.model_dump(mode="json")},
            "loss": {self.loss: self.loss_config.model_dump(mode="json")},
            "recipe": self.recipe.model_dump(mode="json"),
            "embedding_dim": [self.embedding_dim],
            "seed": [self.seed],
        }

    def to_yaml(self) -> str:
        """`to_dict` as the text of a file that `load_cell` reads."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def flat(self) -> dict[str, Any]:
        """The configuration as `loss`, `loss.margin`, `recipe.lr`, …: the same names whatever option was chosen."""
        flat: dict[str, Any] = {"embedding_dim": self.embedding_dim, "seed": self.seed}
        config = self._by_name()
        for group in ("dataset", "backbone", "loss", "recipe"):
            ((name, option),) = config[group].items()
            flat |= {group: name, **flatten(group, option)}
        return flat

    def _by_name(self) -> dict[str, Any]:
        """`to_dict` with the recipe under its name, as the other groups are. Keys hash this shape: it stays."""
        config = self.to_dict()
        recipe = config["recipe"]
        return config | {"recipe": {recipe.pop("name"): recipe}}
