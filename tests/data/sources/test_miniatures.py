"""A miniature of each published dataset, in its real layout, from a server to the table of its cells."""

import functools
import http.server
import json
import shutil
import tarfile
import threading
import zipfile

import numpy as np
import pytest
import torch
import yaml
from helpers import ROOT, TINY_RECIPE, tiny_params
from PIL import Image
from scipy.io import savemat

from cbml import trained
from cbml.data.lists import read_list
from cbml.errors import UserError
from cbml.stages.build_lists import build_lists
from cbml.stages.download import download
from cbml.stages.draw import draw_cell
from cbml.stages.evaluate import evaluate_cell
from cbml.stages.tabulate import tabulate
from cbml.stages.train import train_cell
from cbml.tracking import store as tracking
from cbml.workspace import Workspace


@pytest.fixture(autouse=True)
def no_store(monkeypatch):
    monkeypatch.setattr(tracking, "mlflow", None)


def photograph(file, label, k):
    """A picture that tells its class, in a mode that the field's photographs have."""
    rng = np.random.default_rng([label, k])
    colour = np.random.default_rng(label).integers(40, 215, 3)
    pixels = (colour + rng.normal(0, 25, (30 + k, 36, 3))).clip(0, 255).astype(np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert("L" if k == 1 else "RGB").save(file)


def cub200(folder):
    lines = {"images": [], "labels": [], "classes": []}
    for c in range(1, 9):
        lines["classes"].append(f"{c} {c:03}.Small_Bird_{c}")
        for k in range(4):
            path = f"{c:03}.Small_Bird_{c}/Small_Bird_{c}_{k:04}.jpg"
            photograph(folder / "CUB_200_2011/images" / path, c, k)
            lines["images"].append(f"{len(lines['images']) + 1} {path}")
            lines["labels"].append(f"{len(lines['images'])} {c}")
    files = {"images.txt": lines["images"], "image_class_labels.txt": lines["labels"], "classes.txt": lines["classes"]}
    files["train_test_split.txt"] = [f"{n} {n % 2}" for n in range(1, 33)]
    for name, content in files.items():
        (folder / "CUB_200_2011" / name).write_text("".join(f"{line}\n" for line in content))
    with tarfile.open(folder / "CUB_200_2011.tgz", "w:gz") as archive:
        archive.add(folder / "CUB_200_2011", "CUB_200_2011")
    return {"mirrors": [["CUB_200_2011.tgz"]], "counts": {"train": (16, 4), "test": (16, 4)}}


def cars196(folder):
    """The classes of the photographs are in no order, as in the real file; some are of the official test part."""
    classes = np.random.default_rng(0).permutation(np.repeat(np.arange(1, 9), 4))
    fields = [(name, object) for name in ("relative_im_path", "bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")]
    annotations = np.zeros((1, 32), [*fields, ("class", object), ("test", object)])
    for n, label in enumerate(classes.tolist()):
        path = f"car_ims/{n + 1:06}.jpg"
        photograph(folder / path, label, n % 4)
        annotations[0, n] = (path, *map(np.uint8, (1, 2, 20, 20)), np.uint8(label), np.uint8(n % 2))
    names = np.array([[f"AM General Hummer {c} 2000" for c in range(1, 9)]], dtype=object)
    savemat(folder / "cars_annos.mat", {"annotations": annotations, "class_names": names})
    with tarfile.open(folder / "car_ims.tgz", "w:gz") as archive:
        archive.add(folder / "car_ims", "car_ims")
    with zipfile.ZipFile(folder / "CARS196.zip", "w") as archive:
        for file in [*folder.glob("car_ims/*.jpg"), folder / "cars_annos.mat"]:
            archive.write(file, f"cars196/{file.relative_to(folder)}")
    mirrors = [["nothing.tgz"], ["car_ims.tgz", "cars_annos.mat"], ["CARS196.zip"]]
    return {"mirrors": mirrors, "counts": {"train": (16, 4), "test": (16, 4)}}


def sop(folder):
    top = folder / "Stanford_Online_Products"
    lines = {"train": [], "test": []}
    for c in range(1, 11):
        category = ("bicycle", "coffee_maker")[c % 2]
        for k in range(2 + c % 3):
            path = f"{category}_final/{111085122871 + c}_{k}.JPG"
            photograph(top / path, c, k)
            lines["train" if c <= 5 else "test"].append(f"{c} {1 + c % 2} {path}")
    start = 1
    for split, content in lines.items():
        numbered = [f"{start + n} {line}\n" for n, line in enumerate(content)]
        (top / f"Ebay_{split}.txt").write_text("image_id class_id super_class_id path\n" + "".join(numbered))
        start += len(content)
    (top / "Ebay_info.txt").write_text("not needed\n")
    with zipfile.ZipFile(folder / "Stanford_Online_Products.zip", "w") as archive:
        for file in top.rglob("*"):
            archive.write(file, file.relative_to(folder))
    counts = {"train": (len(lines["train"]), 5), "test": (len(lines["test"]), 5)}
    return {"mirrors": [["Stanford_Online_Products.zip"]], "counts": counts, "ks": [1, 10, 100, 1000]}


def inshop(folder):
    rows, counts = [], {"train": 0, "query": 0, "gallery": 0}
    for item in range(1, 11):
        group = ("MEN", "WOMEN")[item % 2]
        for k in range(4):
            path = f"img/{group}/Tees_Tanks/id_{item:08}/{k:02}_1_front.jpg"
            photograph(folder / "mine/Img" / path, item, k)
            split = "train" if item <= 5 else "gallery" if k > 1 else "query"
            counts[split] += 1
            rows.append(f"{path:<70} id_{item:08} {split}")
    photograph(folder / "mine/Img/img/WOMEN/Tees_Tanks/id_00000011/01_1_front.jpg", 11, 0)
    rows.append(f"{'img/WOMEN/Tees_Tanks/id_00000011/01_1_front.jpg':<70} id_00000011 query")  # without an answer
    (folder / "mine/Eval").mkdir()
    text = f"{len(rows)}\nimage_name item_id evaluation_status\n" + "\n".join(rows) + "\n"
    (folder / "mine/Eval/list_eval_partition.txt").write_text(text)
    return {"source": str(folder / "mine"), "counts": {"train": (20, 5), "query": (11, 6), "gallery": (10, 5)},
            "ks": [1, 10, 20, 30, 40]}  # fmt: skip


MINIATURES = {each.__name__: each for each in (cub200, cars196, sop, inshop)}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The options of the miniatures, by name, as a server has them."""
    folders = {name: tmp_path_factory.mktemp(name) for name in MINIATURES}
    options = {name: make(folders[name]) for name, make in MINIATURES.items()}
    parent = folders["sop"].parent
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=parent)
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        for name, option in options.items():
            url = f"http://127.0.0.1:{server.server_port}/{folders[name].name}"
            option["type"] = name
            option["mirrors"] = [[{"url": f"{url}/{file}"} for file in files] for files in option.get("mirrors", [])]
        yield options
        server.shutdown()
        thread.join()


def workspace_of(folder, name, option):
    recipe = TINY_RECIPE | {"iterations": 2}
    params = tiny_params(dataset={name: option}, recipe=recipe)
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    return Workspace(folder, folder)


def run_all(workspace, name):
    """All stages; the one cell's evaluation, its metrics, and the table."""
    download(workspace, name)
    build_lists(workspace, name)
    (cell,) = workspace.cells(name)
    metrics = evaluate_cell(train_cell(cell, workspace), workspace)
    draw_cell(workspace.evaluation(cell), workspace)
    return workspace.evaluation(cell), metrics, tabulate(workspace, name)


@pytest.mark.parametrize("name", MINIATURES)
def test_from_the_server_to_the_table(published, tmp_path, name):
    option = published[name]
    workspace = workspace_of(tmp_path, name, option)
    folder, metrics, table = run_all(workspace, name)
    summary = json.loads((workspace.lists(name) / "summary.json").read_text())
    for split, (images, classes) in option["counts"].items():
        assert summary[split] == {"images": images, "classes": classes}
    ks = option.get("ks", [1, 2, 4, 8])
    header = next(line for line in table.splitlines() if line.startswith("| Backbone"))
    assert [word for word in header.split() if word.startswith("R@")] == [f"R@{k}" for k in ks] + ["R@1"]
    for protocol in ("final", "untrained"):
        assert {f"recall_at_{k}" for k in ks} == {key for key in metrics[protocol] if key.startswith("recall_at")}
    brought = [each.name for each in (tmp_path / "data").iterdir() if each.is_dir()]
    assert len(brought) == (0 if "source" in option else 1) and not any("download" in each for each in brought)
    assert all((workspace.images(workspace.params().dataset[name]) / path).is_file() for path in paths(workspace, name))


def paths(workspace, name):
    files = [file for file in workspace.lists(name).glob("*.txt") if file.name != "classes.txt"]
    return [path for file in files for path in read_list(file).paths]


NAMES = {
    "cub200": {0: "Small Bird 1", 3: "Small Bird 4"},
    "cars196": {0: "AM General Hummer 1 2000", 3: "AM General Hummer 4 2000"},
    "sop": {0: "coffee maker 111085122872", 1: "bicycle 111085122873"},
    "inshop": {0: "WOMEN Tees Tanks 1", 1: "MEN Tees Tanks 2"},
}


@pytest.mark.parametrize("name", MINIATURES)
def test_names_of_classes_come_with_the_lists(published, tmp_path, name):
    workspace = workspace_of(tmp_path, name, published[name])
    download(workspace, name)
    build_lists(workspace, name)
    assert NAMES[name].items() <= read_list(workspace.lists(name) / "train.txt").class_names.items()


def test_labels_of_cars_are_those_of_the_annotations(published, tmp_path):
    workspace = workspace_of(tmp_path, "cars196", published["cars196"])
    download(workspace, "cars196")
    build_lists(workspace, "cars196")
    classes = np.random.default_rng(0).permutation(np.repeat(np.arange(1, 9), 4))
    for name in ("train", "test"):
        found = read_list(workspace.lists("cars196") / f"{name}.txt")
        expected = [classes[int(path[8:14]) - 1] - 1 for path in found.paths]
        assert found.labels.tolist() == expected


def test_query_against_gallery_is_what_a_loop_over_the_queries_says(published, tmp_path):
    workspace = workspace_of(tmp_path, "inshop", published["inshop"])
    folder, metrics, table = run_all(workspace, "inshop")
    queries, gallery = (read_list(workspace.lists("inshop") / f"{name}.txt") for name in ("query", "gallery"))
    root = workspace.images(workspace.params().dataset["inshop"])
    model = trained.load(workspace.tree / "runs/inshop" / folder.name)
    embedded = [model.embed([root / path for path in each.paths]).astype(np.float64) for each in (queries, gallery)]
    nearest, answered = [], 0
    hits = dict.fromkeys(published["inshop"]["ks"], 0)
    for query, label in zip(embedded[0], queries.labels, strict=True):
        similarities = [float(query @ other) for other in embedded[1]]
        order = sorted(range(len(similarities)), key=lambda index: -similarities[index])
        nearest.append(len(queries.paths) + order[0])
        answered += label in gallery.labels
        for k in hits:
            hits[k] += any(gallery.labels[index] == label for index in order[:k])
    assert answered == 10 == metrics["final"]["queries"] and metrics["final"]["queries_without_answer"] == 1
    for k, count in hits.items():
        assert metrics["final"][f"recall_at_{k}"] == pytest.approx(100 * count / answered)
    assert "nmi" not in metrics["final"]
    (page,) = (workspace.tree / "pages").rglob("index.html")
    assert "NMI is left out: queries are searched for in a gallery" in page.read_text()
    with np.load(folder / "neighbours.npz") as arrays:
        assert arrays["indices"][:, 0].tolist() == nearest
    assert "21 images of 6 classes: 11 queries, which are searched for in a gallery of 10" in table


def test_held_out_training_classes_are_searched_for_among_themselves(published, tmp_path):
    workspace = workspace_of(tmp_path, "inshop", published["inshop"])
    params = yaml.safe_load((tmp_path / "params.yaml").read_text())
    selection = {"metric": "recall_at_1", "validation_classes": 0.4}
    params["recipe"] |= {"select_by": selection, "batch_size": 4}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    _, metrics, _ = run_all(workspace, "inshop")
    assert metrics["validated"]["queries"] == 10


def test_other_k_need_no_other_training(published, tmp_path):
    workspace = workspace_of(tmp_path, "sop", published["sop"])
    folder, _, _ = run_all(workspace, "sop")
    workspace_of(tmp_path, "sop", published["sop"] | {"ks": [1, 3]})
    metrics = evaluate_cell(workspace.tree / "runs/sop" / folder.name, workspace)
    assert [key for key in metrics["final"] if key.startswith("recall")] == ["recall_at_1", "recall_at_3"]


@pytest.mark.parametrize("name", MINIATURES)
def test_the_counts_are_checked(published, tmp_path, name):
    counts = published[name]["counts"] | {"train": (17, 4)}
    workspace = workspace_of(tmp_path, name, published[name] | {"counts": counts})
    with pytest.raises(UserError, match=r"expected train 17 images of 4 classes, .* \(counts=null: anything\)"):
        download(workspace, name)
    assert not list((tmp_path / "data").glob("[!.]*"))


def test_inshop_cannot_be_fetched_and_says_what_to_do(published, tmp_path):
    workspace = workspace_of(tmp_path, "inshop", published["inshop"] | {"source": None})
    with pytest.raises(UserError) as error:
        download(workspace, "inshop")
    text = str(error.value)
    assert "\n" not in text
    assert all(part in text for part in ("Img/img.zip", "Eval/list_eval_partition.txt", "dataset.inshop.source=PATH"))


def test_inshop_in_one_folder_and_in_the_larger_size(published, tmp_path):
    source = tmp_path / "in one"
    given = published["inshop"]["source"]
    source.mkdir()
    (source / "img_highres").symlink_to(f"{given}/Img/img")
    (source / "list_eval_partition.txt").symlink_to(f"{given}/Eval/list_eval_partition.txt")
    workspace = workspace_of(tmp_path, "inshop", published["inshop"] | {"source": str(source)})
    download(workspace, "inshop")
    build_lists(workspace, "inshop")
    assert paths(workspace, "inshop")[0].startswith("img_highres/")


DAMAGES = {
    "cars196": [
        ("cars_annos.mat", b"no annotations", r"cars_annos\.mat cannot be read \(\w+Error"),
        ("cars_annos.mat", None, r"cars_annos\.mat not found; expected car_ims \(a folder\) and cars_annos\.mat"),
        ("car_ims/000003.jpg", None, r"car_ims/000003\.jpg is missing; cars_annos\.mat lists it"),
    ],
    "sop": [
        ("Ebay_test.txt", b"header\n1 2\n", r"Ebay_test\.txt, line 2: '1 2'; expected 'image_id class_id"),
        ("Ebay_test.txt", b"header\n1 2 3 ../a.JPG\n", r"line 2: '1 2 3 \.\./a\.JPG'; expected"),
        ("Ebay_train.txt", None, r"Ebay_train\.txt cannot be read"),
        ("bicycle_final/111085122873_0.JPG", None, r"111085122873_0\.JPG is missing; Ebay_train\.txt lists it"),
    ],
    "inshop": [
        ("Eval/list_eval_partition.txt", None, "is not in the layout of In-Shop Clothes Retrieval: expected"),
        (
            "Eval/list_eval_partition.txt",
            b"1\nheader\nimg/a.jpg id_1 val\n",
            r"line 3: 'img/a\.jpg id_1 val'; expected",
        ),
        ("Eval/list_eval_partition.txt", b"1\nheader\nimg/a.jpg 0 query\n", r"line 3: 'img/a\.jpg 0 query'; expected"),
        ("Eval/list_eval_partition.txt", b"1\n\nimg/a.jpg id_1 query\n", r"Img/img/a\.jpg is missing"),
    ],
}


@pytest.mark.parametrize(
    ("name", "file", "content", "message"), [(name, *damage) for name, damages in DAMAGES.items() for damage in damages]
)
def test_a_folder_that_is_not_the_dataset(published, tmp_path_factory, tmp_path, name, file, content, message):
    made = tmp_path_factory.mktemp("damaged")
    option = published[name] | MINIATURES[name](made) | {"mirrors": []}
    source = {"cars196": made, "sop": made / "Stanford_Online_Products", "inshop": made / "mine"}[name]
    (source / file).unlink() if content is None else (source / file).write_bytes(content)
    workspace = workspace_of(tmp_path, name, option | {"source": str(source)})
    with pytest.raises(UserError, match=message) as error:
        download(workspace, name)
    assert "\n" not in str(error.value) and str(source) in str(error.value)


@pytest.mark.parametrize("name", MINIATURES)
def test_the_option_in_conf_has_the_same_k_and_the_published_counts(name):
    option = yaml.safe_load((ROOT / "conf/dataset" / f"{name}.yaml").read_text())[name]
    assert option["ks"] == {"sop": [1, 10, 100, 1000], "inshop": [1, 10, 20, 30, 40]}.get(name, [1, 2, 4, 8])
    assert (ROOT / option["watch"]).is_file()
    totals = {"cars196": 16185, "sop": 120053, "inshop": 52712}
    if name in totals:
        assert sum(images for images, _ in option["counts"].values()) == totals[name]


def test_images_that_were_deleted_are_brought_again_when_they_are_needed(published, tmp_path, monkeypatch):
    workspace = workspace_of(tmp_path, "sop", published["sop"])
    download(workspace, "sop")
    build_lists(workspace, "sop")
    root = workspace.images(workspace.params().dataset["sop"])
    for folder in [root, *workspace.cache.glob("*-bilinear")]:
        folder.rename(tmp_path / f"away-{folder.name}")
    (cell,) = workspace.cells("sop")
    train_cell(cell, workspace)
    assert root.is_dir()


def test_changed_images_are_not_trained_on_under_the_name_of_others(published, tmp_path):
    workspace = workspace_of(tmp_path, "sop", published["sop"])
    download(workspace, "sop")
    build_lists(workspace, "sop")
    root = workspace.images(workspace.params().dataset["sop"])
    photograph(root / paths(workspace, "sop")[0], 77, 7)
    (cell,) = workspace.cells("sop")
    train_cell(cell, workspace)  # on those that were decoded before
    for folder in workspace.cache.glob("*-bilinear"):
        folder.rename(tmp_path / folder.name)
    shutil.rmtree(tmp_path / ".checkpoints")
    with pytest.raises(UserError, match=r"have changed since .*`dvc repro -f -s download@sop build_lists@sop`"):
        train_cell(cell, workspace)


def test_images_too_large_for_the_disk_give_the_same_result(published, tmp_path, monkeypatch, capsys):
    runs = []
    for name, allowed in (("kept", "1"), ("not kept", "0")):
        monkeypatch.setenv("CBML_PACKED_GB", allowed)
        (tmp_path / name).mkdir()
        workspace = workspace_of(tmp_path / name, "inshop", published["inshop"])
        folder, metrics, _ = run_all(workspace, "inshop")
        runs.append((metrics, torch.load(workspace.tree / "runs/inshop" / folder.name / "final.pt")))
        said = capsys.readouterr().err
        assert ("they are decoded each time that they are needed" in said) == (allowed == "0")
        assert ("decoded from their files as they are needed" in said) == (allowed == "0")
        assert bool(list(workspace.cache.rglob("images.bin"))) == (allowed == "1")
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(runs[0][1][name], runs[1][1][name]) for name in runs[0][1])
