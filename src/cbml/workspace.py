"""Where everything lies. The one module that spells a path of the repository."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cbml.data.sources import Dataset
from cbml.errors import UserError
from cbml.spec.cell import Cell
from cbml.spec.options import recipe_file
from cbml.spec.params import Params, load_params


@dataclass(frozen=True)
class Workspace:
    """A checkout, as its stages see it.

    Attributes:
        tree: the working tree with the stages' inputs and outputs; of a queued experiment, DVC's temporary copy.
        root: the repository itself, for what outlives an experiment.
    """

    tree: Path = Path()
    root: Path = Path()

    @classmethod
    def here(cls) -> "Workspace":
        """The working directory, and the repository that DVC names if it runs a stage in a copy of it."""
        return cls(root=Path(os.environ.get("DVC_ROOT", ".")).resolve())

    def params(self) -> Params:
        """The validated parameters; see `load_params`."""
        try:
            return load_params(self.tree / "params.yaml")
        except UserError as error:
            if not (absent := self._not_copied()):
                raise
            hint = f"a queued experiment has only what git knows: `git add {' '.join(absent)}`, and queue it again"
            raise UserError(f"{error}; {hint}") from None

    def cell(self, **names: Any) -> Cell:
        """The cell of params.yaml that these name; see `Params.cell`."""
        params = self.params()
        return params.cell(**names, recipe_file=recipe_file(self.conf, params.recipe.name))

    def cells(self, dataset: str) -> list[Cell]:
        """Every cell of a dataset in params.yaml."""
        params = self.params()
        return params.cells(dataset, recipe_file(self.conf, params.recipe.name))

    def _not_copied(self) -> list[str]:
        """Source and options of the repository that DVC's copy of it lacks."""
        files = [*self.root.glob("conf/**/*.yaml"), *self.root.glob("src/**/*.py")]
        names = [file.relative_to(self.root) for file in sorted(files)]
        return [str(name) for name in names if not (self.tree / name).exists()]

    @property
    def conf(self) -> Path:
        """The options' own files."""
        return self.tree / "conf"

    def images(self, dataset: Dataset) -> Path:
        """The images of a dataset's option: where the user has them, or a folder that all experiments share."""
        return dataset.folder(self.root / "data", self.root)

    def catalogue(self, dataset: str) -> Path:
        """What images a dataset has: a table."""
        return self.tree / "data" / f"{dataset}.csv"

    def lists(self, dataset: str) -> Path:
        """Lists of images, and their summary."""
        return self.tree / "lists" / dataset

    def run(self, cell: Cell) -> Path:
        """What training a cell leaves."""
        return self.tree / "runs" / cell.dataset / cell.name

    def evaluation(self, cell: Cell) -> Path:
        """What its evaluation leaves."""
        return self.tree / "evaluations" / cell.dataset / cell.name

    def evaluations(self) -> list[Path]:
        """Every evaluated cell."""
        return [file.parent for file in sorted(self.tree.glob("evaluations/*/*/cell.yaml"))]

    def page(self, cell: Cell) -> Path:
        """Its pictures, and the page with them."""
        return self.tree / "pages" / cell.dataset / cell.name

    @property
    def reports(self) -> Path:
        """What people read."""
        return self.tree / "reports"

    def report(self, dataset: str) -> Path:
        """The tables of a dataset, and the page with them."""
        return self.reports / dataset

    @property
    def index(self) -> Path:
        """The page over all reports."""
        return self.reports / "index.html"

    @property
    def cache(self) -> Path:
        """Decoded images and fetched records: what can be deleted at any time."""
        return self.root / ".cache"

    def checkpoint(self, key: str) -> Path:
        """What an interrupted training run continues from. Outside the outputs of its stage, which DVC deletes."""
        return self.root / ".checkpoints" / key

    def log(self, key: str) -> Path:
        """What a cell's training said that `pipeline.launch` began."""
        return self.cache / "logs" / f"{key}.log"

    @property
    def studies(self) -> Path:
        """Optuna's studies, unless another storage is named."""
        return self.root / "studies.db"

    @property
    def database(self) -> Path:
        """MLflow's own store, unless `MLFLOW_TRACKING_URI` names another."""
        return self.root / "mlflow.db"

    @property
    def artifacts(self) -> Path:
        """The files of MLflow's own store."""
        return self.root / "mlruns"
