"""What a `dvc exp run` line composes; as a script, one training step of every cell of the lines that it is given."""

import itertools
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from dvc.utils.cli_parse import to_path_overrides
from dvc.utils.hydra import compose_and_dump, get_hydra_sweeps
from helpers import ROOT

from cbml.workspace import Workspace

TINY = ["-S", "dataset.glyphs.classes=24", "-S", "dataset.glyphs.images_per_class=4"]


def words_of(command):
    """The words of a command as bash makes them: without a comment, `$(…)` replaced, up to ` && `."""
    printed = f"printf '%s\\0' {command.partition(' && ')[0]}"
    with tempfile.TemporaryDirectory() as folder:  # where a `> file` of the command may write
        Path(folder, "conf").symlink_to(ROOT / "conf")
        done = subprocess.run(["bash", "-c", printed], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.rstrip("\0").split("\0")


def compose(words, folder, conf):
    """The workspace that `dvc exp run -S …` runs in; of what is queued, that of each experiment."""
    if not (folder / "conf").exists():
        (folder / "conf").symlink_to(conf)
    overrides = to_path_overrides([word for option, word in itertools.pairwise(words) if option == "-S"])
    for sweep in get_hydra_sweeps(overrides) if "--queue" in words else [overrides]:
        settings = sweep.get("params.yaml", [])
        compose_and_dump(folder / "params.yaml", str(conf), None, "config", None, settings)
        yield Workspace(folder, folder)


def main():
    """Train one iteration of every cell, in the working directory, and print its name, trunk and head."""
    sys.modules["mlflow"] = None  # as if it were not installed: seconds less
    from cbml import network
    from cbml.stages.build_lists import build_lists
    from cbml.stages.download import download
    from cbml.stages.train import train_cell

    for line in json.loads(sys.argv[1]):
        words = words_of(line)
        words += [] if "dataset=digits" in words else TINY
        for workspace in compose(words, Path.cwd(), Path.cwd() / "conf"):
            for dataset in workspace.params().dataset:
                download(workspace, dataset)
                build_lists(workspace, dataset)
                for cell in workspace.cells(dataset):
                    short = cell.recipe.model_copy(update={"iterations": 1, "validate_every": 0})
                    folder = train_cell(replace(cell, recipe=short), workspace)
                    model = network.load(cell, folder / "final.pt")
                    print("TRAINED", dataset, cell.name, type(model.trunk).__name__, type(model.head).__name__)


if __name__ == "__main__":
    main()
