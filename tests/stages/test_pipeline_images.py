"""Images of one's own, alone and beside another dataset, through DVC."""

import json
import re
import subprocess

import pytest
from helpers import CELL, environment, ran, stages
from PIL import Image

pytestmark = pytest.mark.slow
EVERYTHING = ["download@folder", "build_lists@folder", *stages("cbml_sqrt", *CELL, dataset="folder")]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of ten class folders of four images."""
    folder = tmp_path_factory.mktemp("images") / "my pictures, größer"
    for label in range(10):
        for k in range(4):
            file = folder / f"class {label}" / f"{k}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (30, 24 + k), (25 * label, 60 * k, 90)).save(file)
    return folder


def test_images_of_ones_own(repository, pictures):
    """What the README shows; what is added to the folder is noticed, and what is taken away again."""
    command = f"dvc exp run -S dataset=folder -S 'dataset.folder.path=\"{pictures}\"' -S loss=cbml_sqrt"
    assert ran(repository, command) == [*EVERYTHING, "tabulate@folder"]
    table = (repository / "reports" / "folder" / "tables.md").read_text()
    assert "Test list: 20 images of 5 classes" in table
    (command,) = re.findall("^dvc exp run .*", table, re.MULTILINE)
    assert "dataset.folder.path=" in command and "watch" not in command
    assert ran(repository, command) == []
    Image.new("RGB", (30, 30)).save(new := pictures / "class 9" / "new.jpg")
    assert ran(repository, "dvc repro build_lists@folder") == EVERYTHING[:2]
    lists = json.loads((repository / "lists" / "folder" / "summary.json").read_text())
    assert lists["test"] == {"images": 21, "classes": 5}
    done = subprocess.run(
        ["dvc", "exp", "run", "-S", "dataset=folder"],
        cwd=repository,
        env=environment() | {"PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "dataset.folder.path" in done.stderr
    new.unlink()


def test_two_datasets_have_a_page_each_and_one_over_both(repository, pictures):
    both = f"-S 'dataset=[folder,runes]' -S 'dataset.folder.path=\"{pictures}\"'"
    done = ran(repository, f"dvc exp run -S loss=cbml_sqrt {both}")
    assert set(stages("cbml_sqrt", *CELL, dataset="runes")) | {"tabulate@runes", "download@runes"} <= set(done)
    assert not set(EVERYTHING[2:]) & set(done)
    index = (repository / "reports" / "index.html").read_text()
    for name in ("folder", "runes"):
        assert f'href="{name}/index.html"' in index and (repository / "reports" / name / "index.html").is_file()
