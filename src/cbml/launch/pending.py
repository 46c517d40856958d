"""Which cells are to be trained: DVC is asked, and nothing is run."""

import logging
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cbml import provenance
from cbml.errors import UserError
from cbml.files import Damaged
from cbml.models.trunks import weights_content
from cbml.stages.inputs import open_data
from cbml.stages.records import record_of
from cbml.stages.train import FINISHED
from cbml.workspace import Workspace

SCRIPT = "pipeline.train"


@dataclass(frozen=True)
class Pending:
    """A cell that DVC has no result of, or a process of `pipeline.tune`.

    Attributes:
        key: see `Cell.key`.
        arguments: of `pipeline.train` or `pipeline.tune`.
        run_folder: where in the working tree that leaves its result.
        batch_size, iterations: of its recipe.
        finished: it is trained, by today's code and packages, and waits for `dvc repro`.
    """

    key: str
    arguments: list[str]
    run_folder: Path | None = None
    batch_size: int = 1
    iterations: int = 0
    finished: bool = False


def pending_cells(workspace: Workspace) -> tuple[list[Pending], int]:
    """The cells of params.yaml whose result DVC lacks, and how many it has: in the workspace, or in its run cache.

    Raises:
        UserError: lists are missing or not of today's parameters; DVC is busy, or refuses params.yaml.
    """
    commands, known = ask_dvc(workspace.tree)
    cells = []
    for command in commands:
        arguments = shlex.split(command.partition(f"{SCRIPT} ")[2])
        pairs = zip(arguments[::2], arguments[1::2], strict=True)
        axes: dict[str, Any] = {name.lstrip("-").replace("-", "_"): value for name, value in pairs}
        cell = workspace.cell(**axes | {name: int(axes[name]) for name in ("embedding_dim", "seed")})
        weights = weights_content(cell.backbone_config, workspace.root)
        key, recipe = cell.key(open_data(workspace, cell).fingerprint, weights), cell.recipe
        finished = any(map(_of_today, workspace.checkpoint(key).glob(f"*/{FINISHED}")))
        folder = workspace.run(cell).relative_to(workspace.tree)
        cells.append(Pending(key, arguments, folder, recipe.batch_size, recipe.iterations, finished))
    return cells, known


def ask_dvc(tree: Path) -> tuple[list[str], int]:
    """The commands of the stages `train` that `dvc repro` would run, and how many others there are.

    `dvc status` alone calls those changed as well that the run cache has. What is asked here are DVC's internals.
    """
    from dvc.exceptions import DvcException
    from dvc.lock import LockError
    from dvc.repo import Repo
    from dvc.stage.cache import RunCacheNotFoundError

    commands, known = [], 0
    logging.getLogger("dvc").setLevel(logging.WARNING)  # else it says of each stage what it would do
    try:
        with Repo(str(tree)) as repo, repo.lock:
            stages = {name: stage for stage in repo.index.stages if (name := getattr(stage, "name", None))}
            for name, stage in stages.items():
                if name.partition("@")[0] in ("download", "build_lists") and stage.changed():
                    raise UserError(f"{name}: has not run with these parameters and this code; first: dvc repro {name}")
            for name, stage in stages.items():
                if not name.startswith("train@"):
                    continue
                if stage.changed():
                    stage.save_deps(allow_missing=True)
                    try:
                        repo.stage_cache.restore(stage, dry=True)
                    except RunCacheNotFoundError:
                        commands.append(stage.cmd)
                        continue
                known += 1
    except LockError:
        raise UserError("DVC is busy: another dvc command runs in this repository; wait for it") from None
    except DvcException as error:
        raise UserError(f"DVC: {' '.join(str(error).split())}") from None
    return commands, known


def _of_today(folder: Path) -> bool:
    """Whether `train` would take a finished run folder, as far as its record tells."""
    try:
        record = record_of(folder)
    except (Damaged, UserError):
        return False
    return not provenance.changed(record["code"]) and provenance.packages_of(record) == provenance.packages()
