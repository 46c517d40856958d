"""A tiny dataset and a parameter file that trains on it in a second."""

import os
import shutil
import subprocess

# Only a CPU repeats bits; before torch looks for GPUs. tests/test_cuda.py is run on its own, with CBML_TEST_GPU=1.
if os.environ.get("CBML_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch
import yaml
from helpers import FOREIGN, ROOT, TINY_GLYPHS, TINY_RECIPE, tiny_params

from cbml.stages.build_lists import build_lists
from cbml.stages.download import download
from cbml.tracking import store as tracking
from cbml.training import checkpoint
from cbml.workspace import Workspace

# Two threads on two cores that other processes use as well wait for each other most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


LONGEST = ("pipeline", "pipeline_images", "training", "tracking", "checkpoint", "import_cells")


def pytest_collection_modifyitems(items):
    """The longest files first: else a worker is left alone with one in the end."""
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_xdist_auto_num_workers():
    """One more than cores: tests of processes wait for the disk and for one another much of the time."""
    return os.cpu_count() + 1


@pytest.fixture(scope="session", autouse=True)
def empty_stores(tmp_path_factory):
    """MLflow takes seconds for an empty store: others are copies of one. Stages as processes make their own.

    The value is what makes one.
    """
    made, template = tracking.make_database, tmp_path_factory.mktemp("store") / "mlflow.db"

    def copy(file):
        if not template.exists():
            made(template)
        shutil.copy(template, file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking, "make_database", copy)
        yield made


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory):
    """A folder with data/glyphs, the images, and lists/glyphs."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "params.yaml").write_text(yaml.safe_dump(tiny_params(), sort_keys=False))
    here = Workspace(folder, folder)
    download(here, "glyphs")
    build_lists(here, "glyphs")
    (folder / "data" / "glyphs").symlink_to(here.images(here.params().dataset["glyphs"]).name)
    return folder


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A copy of this repository whose default experiment is two losses on tiny data."""
    folder = tmp_path_factory.mktemp("repository")
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    for file in files:
        if file != "dvc.lock" and not file.startswith("reports/") and (ROOT / file).is_file():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, folder / file)
    config = (folder / "conf" / "config.yaml").read_text()
    for old, new in (("[cbml_const, ", "["), ("[512]", "[16]")):
        assert old in config
        config = config.replace(old, new)
    (folder / "conf" / "config.yaml").write_text(config)
    for name, seed in (("glyphs", 0), ("runes", 1)):
        option = {name: TINY_GLYPHS | {"seed": seed}}
        (folder / "conf" / "dataset" / f"{name}.yaml").write_text(yaml.safe_dump(option))
    (folder / "conf" / "recipe" / "quick.yaml").write_text(yaml.safe_dump(TINY_RECIPE | {"name": "quick"}))
    for command in (
        "git init -q",
        "git config user.name x",
        "git config user.email x@x",
        "git add -A",
        "git commit -qm x",
    ):
        subprocess.run(command.split(), cwd=folder, check=True)
    return folder


@pytest.fixture
def project(tiny_dataset, tmp_path, monkeypatch):
    """An empty working directory with that data, the tiny parameters and no tracking store yet."""
    for name in ("data", "lists"):
        (tmp_path / name).symlink_to(tiny_dataset / name)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tiny_params(), sort_keys=False))
    monkeypatch.chdir(tmp_path)
    for name in FOREIGN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(checkpoint, "SHARE", 1.0)  # else which iterations have one depends on the machine's speed
    return tmp_path


@pytest.fixture
def workspace(project):
    return Workspace.here()
