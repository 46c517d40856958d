"""One cell of the tables, from lists to files."""

import hashlib
import json
from pathlib import Path

import pandas as pd
import torch
import yaml
from filelock import FileLock
from torch import Tensor

from cbml import tracking
from cbml.config import Cell
from cbml.datasets.images import pack_images
from cbml.datasets.lists import check_disjoint, read_list
from cbml.files import atomic_write
from cbml.training.loop import train


def weights_sha256(state: dict[str, Tensor]) -> str:
    """A hash of a state dict's names and values."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def run_cell(cell: Cell, *, state: Path) -> Path:
    """Train a cell and write runs/<dataset>/<cell>, a complete folder or none.

    It holds `final.pt` and, if another iteration was best, `best_on_test.pt` (state dicts), `losses.csv` and
    `validations.csv` by iteration, `cell.yaml` (the configuration) and `run.json` (MLflow's run id, the best iteration,
    a hash of the final weights).

    Args:
        state: where decoded images and checkpoints are kept between runs.
    """
    data, lists = Path("data", cell.dataset), Path("lists", cell.dataset)
    train_list, test_list = read_list(lists / "train.txt", data), read_list(lists / "test.txt", data)
    check_disjoint(train_list, test_list)
    fingerprint = json.loads((lists / "summary.json").read_text())["fingerprint"]
    key = cell.hash(fingerprint + (lists / "train.txt").read_text() + (lists / "test.txt").read_text())
    # Named after everything that determines the run: a changed parameter never continues an old one.
    checkpoint = state / ".checkpoints" / f"{cell.dataset}-{cell.name}-{key}.pt"
    run_id_file = checkpoint.with_suffix(".run")
    checkpoint.parent.mkdir(exist_ok=True)

    with FileLock(checkpoint.with_suffix(".lock")):  # two queued experiments may hold the same cell
        images = [pack_images(each, data, state / ".cache", resize=cell.recipe.resize, fingerprint=fingerprint,
                              interpolation=cell.interpolation) for each in (train_list, test_list)]
        run_id = run_id_file.read_text() if run_id_file.is_file() else None
        with tracking.cell_run(cell, fingerprint=fingerprint, run_id=run_id) as run:
            run_id_file.write_text(run.id)
            trained = train(cell, *images, root=state, checkpoint=checkpoint, log=run.log)
            out = Path("runs", cell.dataset, cell.name)
            with atomic_write(out) as folder:
                folder.mkdir()
                torch.save(trained.final, folder / "final.pt")
                if trained.best_iteration != cell.recipe.iterations:
                    torch.save(trained.best_on_test, folder / "best_on_test.pt")
                pd.DataFrame(trained.losses).to_csv(folder / "losses.csv", index=False)
                pd.DataFrame(trained.validations).to_csv(folder / "validations.csv", index=False)
                (folder / "cell.yaml").write_text(yaml.safe_dump(cell.to_dict(), sort_keys=False))
                (folder / "run.json").write_text(json.dumps({
                    "run_id": run.id, "best_iteration": trained.best_iteration,
                    "final_weights_sha256": weights_sha256(trained.final)}, indent=2))
        checkpoint.unlink(missing_ok=True)
        run_id_file.unlink()
    return out
