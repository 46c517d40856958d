"""A trained cell used elsewhere: the same embeddings from its run, from an exported folder, from ONNX, from the store."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import environment
from test_training import run

from cbml import network, trained
from cbml.config import load_cell
from cbml.datasets.lists import read_list
from cbml.datasets.packing import pack_images
from cbml.errors import UserError
from cbml.evaluation.embedding import embed
from cbml.stages.evaluate import evaluate_cell


@pytest.fixture
def cell(workspace):
    """A run folder, five test images, and their embeddings as `evaluate` computes them."""
    folder = run(workspace)
    images = read_list(Path("lists/glyphs/test.txt")).subset(np.arange(5))
    packed = pack_images(
        images, Path("data/glyphs"), workspace.cache, resize=24, interpolation="bilinear", fingerprint="-"
    )
    model = network.load(load_cell(folder / "cell.yaml"), folder / "final.pt")
    expected = embed(model, packed, crop=20, interpolation="bilinear", device=torch.device("cpu")).numpy()
    return folder, [Path("data/glyphs") / path for path in images.paths], expected


def test_three_lines_give_the_embeddings_of_pictures(cell):
    folder, pictures, expected = cell
    model = trained.load(folder)
    embeddings = model.embed(pictures)
    assert np.abs(embeddings - expected).max() < 1e-5
    assert np.abs(model.embed([str(path) for path in pictures]) - expected).max() < 1e-5
    assert np.linalg.norm(embeddings, axis=1) == pytest.approx(1, abs=1e-5)
    with pytest.raises(UserError, match="none are given"):
        model.embed([])


def test_an_exported_cell_gives_the_same_and_so_does_onnx(cell, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (pip install 'cbml[onnx]')")
    folder, pictures, expected = cell
    out = trained.load(folder).export(tmp_path / "exported")
    assert sorted(file.name for file in out.iterdir()) == ["cell.yaml", "model.onnx", "model.safetensors"]
    assert np.abs(trained.load(out).embed(pictures) - expected).max() < 1e-6
    session = runtime.InferenceSession(str(out / "model.onnx"))
    images = torch.randint(0, 256, (7, 3, 20, 20), generator=torch.Generator().manual_seed(0)).float()
    with torch.no_grad():
        ours = trained.load(out).network(images).numpy()
    (onnx,) = session.run(None, {"images": images.numpy()})
    assert onnx.shape == (7, 16) and np.abs(onnx - ours).max() < 1e-4
    with pytest.raises(UserError, match="exported: exists"):
        trained.load(folder).export(out)


def script(*command):
    return subprocess.run([sys.executable, "-m", *map(str, command)], env=environment(), capture_output=True, text=True)


def test_the_script_takes_a_folder_or_a_run_and_files_or_folders(cell, workspace):
    folder, pictures, expected = cell
    evaluate_cell(folder, workspace)
    (run_id,) = (file.parent.name for file in workspace.artifacts.glob("glyphs/*/artifacts"))
    for model in (folder, run_id):
        done = script("pipeline.embed", model, *pictures, "--out", "e.npz", "--neighbours", 2)
        assert done.returncode == 0, done.stderr
        with np.load("e.npz") as arrays:
            assert arrays["paths"].tolist() == list(map(str, pictures))
            assert np.abs(arrays["embeddings"] - expected).max() < 1e-5
        lines = done.stdout.splitlines()
        assert lines[0] == "e.npz: 5 embeddings of 16" and lines[1] == str(pictures[0])
        first = (expected @ expected[0])[1:]
        assert lines[2] == f"    {first.max():.3f} {pictures[1 + int(first.argmax())]}" and len(lines) == 1 + 3 * 5
    assert "36 embeddings" not in script("pipeline.embed", folder, pictures[0].parent).stdout
    assert (
        f"{len(list(pictures[0].parent.iterdir()))} embeddings of 16"
        in script("pipeline.embed", folder, pictures[0].parent).stdout
    )


@pytest.mark.parametrize(
    "model, message",
    [("nowhere", "nowhere: neither a folder nor a run with a model"), ("data", "data/cell.yaml: no such file")],
)
def test_what_is_no_model_is_one_line(workspace, model, message):
    done = script("pipeline.embed", model, "data")
    assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1


def test_a_folder_without_images(cell, tmp_path):
    done = script("pipeline.embed", cell[0], tmp_path)
    assert done.returncode == 1 and "no images; expected .avif, .bmp" in done.stderr
