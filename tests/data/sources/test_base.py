"""What a dataset has to offer: one written to the documented contract works, and mypy sees whether it is kept."""

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args

import pandas as pd
import pytest
from helpers import ROOT, environment
from PIL import Image

from cbml.data.sources import Dataset
from cbml.data.sources.base import DatasetConfig, check_catalogue
from cbml.errors import UserError
from cbml.stages.inputs import ensure_images
from cbml.workspace import Workspace


class Stripes(DatasetConfig):
    """Four classes of two images."""

    type: Literal["stripes"] = "stripes"

    def folder(self, data: Path, root: Path) -> Path:
        return data / "stripes"

    def download(self, folder: Path, root: Path = Path()) -> None:
        folder.mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (9, 8), (0, 30 * number, 0)).save(folder / f"{number}.png")

    def catalogue(self, folder: Path) -> pd.DataFrame:
        rows = [(f"{i}.png", i // 2, f"stripe {i // 2}", "train" if i < 4 else "test") for i in range(8)]
        return pd.DataFrame(rows, columns=["path", "label", "name", "split"])


def test_a_dataset_that_is_written_to_the_contract_works(tmp_path):
    folder = ensure_images(Workspace(tmp_path, tmp_path), Stripes())
    table = Stripes().catalogue(folder)
    check_catalogue(table, folder)
    assert all((folder / path).is_file() for path in table.path)


@pytest.mark.parametrize("method", ["folder", "download"])
@pytest.mark.parametrize("dataset", [Stripes, *get_args(get_args(Dataset)[0])])
def test_every_dataset_has_the_contract_of_the_base(dataset, method):
    contract = inspect.signature(getattr(DatasetConfig, method))
    assert inspect.signature(getattr(dataset, method)) == contract


@pytest.mark.slow
def test_mypy_sees_a_dataset_that_breaks_the_contract(tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed (pip install 'cbml[dev]')")
    text = Path(__file__).read_text().partition("def test_")[0]
    (tmp_path / "kept.py").write_text(text)
    (tmp_path / "broken.py").write_text(
        text.replace("folder: Path, root: Path = Path()) -> None", "folder: Path) -> None")
    )
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--ignore-missing-imports"]
    for name, wrong in (("kept.py", 0), ("broken.py", 1)):
        done = subprocess.run(
            [*command, f"--cache-dir={tmp_path}", str(tmp_path / name)],
            env=environment() | {"MYPYPATH": str(ROOT / "src")},
            capture_output=True,
            text=True,
        )
        assert done.stdout.count('Signature of "download" incompatible with supertype') == wrong, done.stdout


@pytest.mark.parametrize("again", ["0.png", "./0.png"])
def test_an_image_is_in_one_row_alone(again):
    """Under two labels or two ids it would be its own answer."""
    table = Stripes().catalogue(Path())
    with pytest.raises(UserError, match="1 images are in two rows, e.g. '0.png'"):
        check_catalogue(table.assign(path=[*table.path[:7], again]), "stripes")
