"""A tiny dataset and a parameter file that trains on it in a second."""

import os
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

# Only a CPU repeats bits; before torch looks for GPUs. tests/test_cuda.py is run on its own, with CBML_TEST_GPU=1.
if os.environ.get("CBML_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch
import yaml
from helpers import FOREIGN, ROOT, TINY_GLYPHS, TINY_RECIPE, tiny_params

from cbml import fetch, network
from cbml.data.lists import read_list
from cbml.files import write_tensors
from cbml.stages.build_lists import build_lists
from cbml.stages.download import download
from cbml.tracking import store as tracking
from cbml.training import checkpoint
from cbml.workspace import Workspace

# Two threads on two cores that other processes use as well wait for each other most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


def clear():
    """Leave nothing of the environment that names a store or a repository."""
    for name in FOREIGN:
        os.environ.pop(name, None)


clear()
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


@pytest.fixture(autouse=True)
def nothing_foreign():
    """MLflow leaves the store of a test in the environment, where fixtures of a whole file would find it."""
    clear()
    yield
    clear()


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
    monkeypatch.setattr(checkpoint, "SHARE", 1.0)  # else which iterations have one depends on the machine's speed
    return tmp_path


@pytest.fixture
def workspace(project):
    return Workspace.here()


@pytest.fixture
def untrained(workspace):
    """The run folder of the one cell, as far as a model is loaded from it: of no training."""
    (cell,) = workspace.cells("glyphs")
    model, _ = network.build(cell, num_classes=6, root=Path())
    folder = workspace.run(cell)
    folder.mkdir(parents=True)
    (folder / "cell.yaml").write_text(cell.to_yaml())
    write_tensors(folder / "final.pt", model.state_dict())
    return folder


@pytest.fixture
def pictures(workspace):
    """The files of the test images."""
    return [Path("data/glyphs") / path for path in read_list(Path("lists/glyphs/test.txt")).paths]


@pytest.fixture
def server(monkeypatch):
    """Serves `state.content`; `state.breaks` lists after how many bytes each of the next answers breaks off.

    The next answers start as `state.stalls` names them, and then neither end nor break off.
    """
    monkeypatch.setattr(fetch, "BACKOFF", 0.0)
    monkeypatch.setattr(fetch, "CHUNK", 100)
    state = SimpleNamespace(content=b"", breaks=[], stalls=[], ranges=True, status=None, location=None, log=[])
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def stall(self, kind, body):
            if kind == "hang":
                over.wait()
                return
            if kind in ("header", "100 Continue"):
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX: " if kind == "header" else b"")
                while not over.wait(0.02):
                    self.wfile.write(b"x" if kind == "header" else b"HTTP/1.1 100 Continue\r\n\r\n")
                return
            self.send_response(206)
            self.send_header(*{"drip": ("Content-Length", "9999"), "chunks": ("Transfer-Encoding", "chunked")}[kind])
            self.end_headers()
            while not over.wait(0.02):
                byte, body = body[:1], body[1:]
                self.wfile.write({"drip": byte, "chunks": b"1\r\n" + byte + b"\r\n"}[kind])

        def do_GET(self):
            if state.location and self.path != state.location:
                self.send_response(302)
                self.send_header("Location", state.location)
                self.end_headers()
                return
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            state.log.append(start)
            if state.stalls:
                self.stall(state.stalls.pop(0), state.content[start:])
                return
            start = start if state.ranges else 0
            out_of_range = start > 0 and start >= len(state.content)
            self.send_response(state.status or (416 if out_of_range else 206 if start else 200))
            if out_of_range:
                self.send_header("Content-Range", f"bytes */{len(state.content)}")
            body = b"" if state.status or out_of_range else state.content[start:]
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: state.breaks.pop(0)] if state.breaks else body)

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{http.server_port}/CUB_200_2011.tgz?download=1"
    yield state
    over.set()
    http.shutdown()
    thread.join()
    http.server_close()
