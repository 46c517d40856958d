"""A trained cell used elsewhere: the same embeddings from its run, from an exported folder, and from ONNX."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from finished_cells import cells, finish
from helpers import HIDE, environment, tiny_params
from huggingface_hub import ModelCard

from cbml import progress, trained
from cbml.data.lists import read_list
from cbml.data.packing import pack_images
from cbml.errors import UserError
from cbml.evaluation.embedding import embed as embed_list
from cbml.report.tables import rows as tables
from cbml.stages.embed import Embedded, as_text, embed, embed_images, load_model
from cbml.stages.export import model_card, scores_of
from cbml.trained import portable
from cbml.workspace import Workspace


@pytest.fixture
def expected(untrained, workspace):
    """The embeddings of all test images as `evaluate` computes them."""
    images = read_list(Path("lists/glyphs/test.txt"))
    size = {"resize": 24, "interpolation": "bilinear"}
    packed = pack_images(images, Path("data/glyphs"), workspace.cache, fingerprint="-", **size)
    where = {"crop": 20, "interpolation": "bilinear", "device": torch.device("cpu")}
    return embed_list(trained.load(untrained).network, packed, **where).numpy()


def test_the_embeddings_are_those_of_evaluate(untrained, pictures, expected):
    model = trained.load(untrained)
    embeddings = model.embed([*map(str, pictures[:3]), pictures[3].open("rb"), *pictures[4:]])
    assert embeddings.dtype == np.float32 and np.abs(embeddings - expected).max() < 1e-6
    assert model.device == torch.device("cpu") and trained.load(untrained, "meta").device == torch.device("meta")
    with pytest.raises(UserError, match="none are given"):
        model.embed([])


def test_a_few_batches_are_in_memory_and_progress_is_shown(untrained, pictures, expected, monkeypatch, capsys):
    loaded, ahead = [], []
    load_image = trained.load_image

    def counted(source, **size):
        loaded.append(source)
        return load_image(source, **size)

    model = trained.load(untrained)
    monkeypatch.setattr(trained, "load_image", counted)
    monkeypatch.setattr(trained, "batch_size", lambda crop, device: 2)
    monkeypatch.setattr(progress, "LOG_SECONDS", 0)
    model.network.register_forward_hook(lambda *_: ahead.append(len(loaded) - 2 * len(ahead)))
    assert np.abs(model.embed(pictures) - expected).max() < 1e-5
    assert len(ahead) == 18 and max(ahead) <= 2 * (trained.WORKERS + 1) < 36
    assert "embed: 100%|" in capsys.readouterr().err


def test_three_lines_of_python_and_the_script_need_neither_mlflow_nor_dvc(untrained, pictures, expected):
    code = f"""
{HIDE}
from cbml import trained
model = trained.load({str(untrained)!r})
print(*model.embed([{str(pictures[0])!r}])[0])
import runpy
runpy.run_module("pipeline.embed", run_name="__main__", alter_sys=True)
"""
    command = [sys.executable, "-c", code, str(untrained), str(pictures[0].parent), *map(str, pictures[-2:])]
    done = subprocess.run(
        [*command, "--out", "e.npz", "--neighbours", "2"], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    first, written, *shown = done.stdout.splitlines()
    assert np.abs(np.array(first.split(), dtype=float) - expected[0]).max() < 1e-6
    files = [*sorted(pictures[0].parent.iterdir()), *pictures[-2:]]
    assert written == f"e.npz: {len(files)} embeddings of 16" and shown[::3] == list(map(str, files))
    with np.load("e.npz") as arrays:
        assert arrays["paths"].tolist() == list(map(str, files))
        assert np.abs(arrays["embeddings"][-2:] - expected[-2:]).max() < 1e-5


def test_neighbours_are_shown_whatever_their_names_are(untrained, pictures, tmp_path):
    """The work is done by then."""
    (tmp_path / "mine").mkdir()
    for name in (b"\xff.png", "grün ±.png".encode()):
        shutil.copy(pictures[0], os.path.join(os.fsencode(tmp_path / "mine"), name))
    command = [sys.executable, "-m", "pipeline.embed", str(untrained), "mine", "--neighbours", "1", "--overwrite"]
    lost = rb"mine/\udcff.png"
    for encoding, shown in ((None, lost), ("utf-8:strict", lost), ("ascii", rb"mine/gr\xfcn \xb1.png")):
        env = environment() | ({"PYTHONIOENCODING": encoding} if encoding else {"PYTHONUTF8": "1"})
        done = subprocess.run(command, env=env, capture_output=True)
        assert done.returncode == 0 and shown in done.stdout, done.stderr


def test_a_login_node_of_a_cluster_gives_no_hints(untrained, workspace, pictures, tmp_path, monkeypatch, recwarn):
    """Lightning's, about a `srun` that it finds."""
    (tmp_path / "srun").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    embed_images(load_model(str(untrained), workspace), pictures[:1])
    assert not [each for each in recwarn if "srun" in str(each.message)]


def test_neighbours_are_the_most_similar_others(untrained, pictures, expected):
    lines = as_text(pictures, Embedded(pictures, expected).nearest(3))
    similarities = expected[0] @ expected[1:].T
    order = np.argsort(-similarities)[:3]
    assert lines[:5] == [
        str(pictures[0]),
        *(f"    {similarities[index]:.3f} {pictures[index + 1]}" for index in order),
        str(pictures[1]),
    ]
    assert as_text(pictures[:1], Embedded(pictures[:1], expected[:1]).nearest(3)) == [str(pictures[0])]


def test_a_new_image_has_neighbours_in_a_gallery_and_a_page_of_them(untrained, workspace, pictures, expected):
    new = Path("new.png")
    shutil.copy(pictures[0], new)
    options = {"out": Path("e.npz"), "page": Path("found.html"), "gallery": pictures[1:], "neighbours": 2}
    first, second, *found, last = embed(str(untrained), [new], workspace, **options).splitlines()
    similarities = expected[0] @ expected[1:].T
    order = np.argsort(-similarities)[:2]
    assert (first, second) == ("e.npz: 1 embeddings of 16", "new.png")
    assert found == [f"    {similarities[index]:.3f} {pictures[index + 1]}" for index in order]
    page = Path("found.html").read_text()
    assert last == f"The page: {Path('found.html').resolve().as_uri()}"
    titles = re.findall(r'title="([^"]+)"', page)
    assert titles == ["new.png", *(f"{pictures[i + 1].name}, {similarities[i]:.3f}" for i in order)]
    assert page.count("data:image/jpeg;base64,") == 1 and "<h1>Nearest images by resnet18-cbml_log-16-0</h1>" in page


def test_an_image_of_the_gallery_is_not_found_for_itself(untrained, pictures, expected, tmp_path):
    gallery = Embedded(pictures, expected)
    here = Embedded([tmp_path / pictures[3]], expected[3:4])  # by another path
    (found,) = here.nearest(len(pictures), gallery)
    assert len(found) == len(pictures) - 1 and pictures[3] not in dict(found)


def test_files_are_replaced_on_request_alone(untrained, workspace, pictures):
    options = {"out": Path("e.npz"), "page": Path("page.html"), "neighbours": 1}
    embed(str(untrained), pictures[:2], workspace, **options)
    before = Path("e.npz").read_bytes()
    with pytest.raises(UserError, match=r"^e\.npz, page\.html: exists; name another .* --overwrite"):
        embed(str(untrained), pictures[:3], workspace, **options)
    assert Path("e.npz").read_bytes() == before
    embed(str(untrained), pictures[:3], workspace, **options, overwrite=True)
    assert len(np.load("e.npz")["paths"]) == 3


def test_one_image_without_a_gallery_has_no_neighbours_and_says_so(untrained, workspace, pictures):
    with pytest.raises(UserError, match="one image has no neighbours; name where to search for them: --gallery PATH"):
        embed(str(untrained), pictures[:1], workspace, out=Path("e.npz"), neighbours=5)
    assert not Path("e.npz").exists()


def test_a_card_has_figures_with_their_protocol_and_no_path_of_this_machine(tmp_path):
    weights, images = tmp_path / "w" / "mine.pth", tmp_path / "my images"
    backbone = {"resnet18": tiny_params()["backbone"]["resnet18"] | {"weights": str(weights)}}
    dataset = {"glyphs": {"type": "folder", "path": str(images)}}
    (cell,) = cells(backbone=backbone, dataset=dataset)
    workspace = Workspace(tmp_path, tmp_path)
    finish(workspace, cell, 50.0)
    run = workspace.run(cell)
    run.mkdir(parents=True)
    shutil.copy(workspace.evaluation(cell) / "run.json", run)
    scores = scores_of(str(run), cell, workspace)
    card = model_card(cell, scores, 16)
    assert "| final " in card and " 50.0 " in card and tables.PROTOCOLS["final"] in card
    assert "`mine.pth`" in card and "path: my images" in card and str(tmp_path) not in card
    head = ModelCard(card).data
    assert head.library_name == "cbml" and head.eval_results[0].metric_type == "recall_at_1"
    assert head.eval_results[0].metric_value == 50.0
    assert str(tmp_path) not in portable(cell).to_yaml() and portable(portable(cell)) == portable(cell)
    (workspace.evaluation(cell) / "run.json").unlink()
    assert scores_of(str(run), cell, workspace) == {} and "Not known" in model_card(cell, {}, 16)


def test_an_exported_cell_gives_the_same_and_so_does_onnx(untrained, pictures, expected):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed (pip install 'cbml[onnx]')")
    if torch.__version__.startswith("2.6."):
        pytest.skip("torch 2.6 cannot write ONNX")
    import onnxruntime

    command = [sys.executable, "-m", "pipeline.export", str(untrained), "exported"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.stdout == "exported\n" and done.stderr.count("\n") == 1, done.stderr
    names = ["README.md", "cell.yaml", "model.onnx", "model.safetensors"]
    assert sorted(file.name for file in Path("exported").iterdir()) == names
    assert (
        b"cbml/models/embedding_model.py" not in Path("exported/model.onnx").read_bytes()
    )  # nor other paths of this machine
    model = trained.load("exported")
    assert np.abs(model.embed(pictures) - expected).max() < 1e-6
    session = onnxruntime.InferenceSession("exported/model.onnx")
    for count in (1, 7):
        images = torch.randint(0, 256, (count, 3, 20, 20), generator=torch.Generator().manual_seed(0)).float()
        (embeddings,) = session.run(["embeddings"], {"images": images.numpy()})
        with torch.no_grad():
            assert np.abs(embeddings - model.network(images).numpy()).max() < 1e-4


def test_an_export_is_whole_or_absent(untrained, monkeypatch):
    model = trained.load(untrained)
    Path("there").mkdir()
    with pytest.raises(UserError, match="there: exists; name a folder that does not"):
        model.export(Path("there"))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"ONNX: .*onnxscript.*; pip install 'cbml\[onnx\]'"):
        model.export(Path("out"))
    assert not Path("out").exists() and not list(Path().glob(".out*"))


def test_what_is_no_model_or_no_picture_is_one_line(untrained, workspace, tmp_path):
    (tmp_path / "empty").mkdir()
    for model, message in (
        ("nowhere", "nowhere: no such folder, and no store"),
        ("data", "data/cell.yaml: no such file"),
    ):
        with pytest.raises(UserError, match=message):
            load_model(model, workspace)
    assert not Path("mlflow.db").exists()
    model = load_model(str(untrained), workspace)
    with pytest.raises(UserError, match=r"empty: no images; expected \.avif, \.bmp"):
        embed_images(model, [tmp_path / "empty"])
    with pytest.raises(UserError, match="params.yaml: not an image that Pillow can read"):
        embed_images(model, [Path("params.yaml")])
    (untrained / "final.pt").unlink()
    with pytest.raises(UserError, match=r"final\.pt: no such file; the stage train writes it"):
        trained.load(untrained)
    (untrained / "model.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match=r"model\.safetensors: unreadable: truncated"):
        trained.load(untrained)
