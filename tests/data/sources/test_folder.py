"""Images that a user has: class folders or a table, good and bad."""

import os
import re

import pandas as pd
import pytest
import yaml
from helpers import FEW_CLASSES, tiny_params
from PIL import Image
from pydantic import ValidationError

from cbml.data import packing
from cbml.data.images import decode
from cbml.data.lists import read_list
from cbml.data.sources import FolderConfig
from cbml.data.sources.base import check_catalogue
from cbml.errors import UserError
from cbml.stages import embed
from cbml.stages.build_lists import build_lists
from cbml.stages.download import download
from cbml.workspace import Workspace

CLASSES = ["Blue, pale", "Chlorophyll grün", "Ⅻ 'quoted' \"twice\"", "d", "NA", "10"]


@pytest.fixture
def pictures(tmp_path):
    """Six class folders with three images each; names with commas, spaces, quotes and letters beyond ASCII."""
    folder = tmp_path / "my pictures, größer"
    for number, name in enumerate(CLASSES):
        for k in range(3):
            file = folder / name / ("deeper" if k == 2 else "") / f"é {k}, a.{'JPG' if k else 'png'}"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 8), (40 * number, 70 * k, 5)).save(file)
    return folder


def table_of(pictures, name="table.csv", **columns):
    """A table of all images, in order of their paths."""
    paths = sorted(path for path in pictures.rglob("*.*") if path.suffix in (".png", ".JPG"))
    labels = [path.relative_to(pictures).parts[0] for path in paths]
    table = pd.DataFrame({"path": [os.path.relpath(path, pictures) for path in paths], "label": labels, **columns})
    write(table, pictures / name)
    return table


def write(table, file):
    table.to_csv(file, index=False) if file.suffix == ".csv" else table.to_parquet(file)


def build(path, root=None, **options):
    """The stages `download` and `build_lists` of these images; their workspace and summary."""
    root = root or path.parent
    config = {"type": "folder", "path": str(path), **options}
    (root / "params.yaml").write_text(yaml.safe_dump(tiny_params(dataset={"mine": config}, recipe=FEW_CLASSES)))
    workspace = Workspace(root, root)
    download(workspace, "mine")
    return workspace, build_lists(workspace, "mine")


def lists(workspace, *names):
    return [read_list(workspace.lists("mine") / f"{name}.txt") for name in names]


def refused(path, **options):
    with pytest.raises(UserError) as error:
        build(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_of_class_folders(pictures, capsys):
    (pictures / ".hidden").mkdir()
    (pictures / "empty").mkdir()
    (pictures / "d" / "notes.txt").write_text("no image")
    (pictures / "d" / ".DS_Store").write_text("no image")
    workspace, summary = build(pictures)
    assert summary["train"] == summary["test"] == {"images": 9, "classes": 3}
    train, test = lists(workspace, "train", "test")
    assert list(train.class_names.values()) + list(test.class_names.values()) == sorted(CLASSES)
    files = [pictures / path for path in train.paths + test.paths]
    assert len(set(files)) == 18 and all(file.is_file() for file in files)
    assert "left out: 1 files that are no images in a class folder, 1 empty folders" in capsys.readouterr().err
    assert [path.name for path in (workspace.tree / "data").iterdir()] == ["mine.csv"]  # nothing was copied


def test_names_that_are_numbers_are_in_the_order_of_numbers(pictures):
    for number, name in enumerate(CLASSES):
        (pictures / name).rename(pictures / f"class {number}")
    for number in range(len(CLASSES)):
        (pictures / f"class {number}").rename(pictures / str(number + 7))
    workspace, _ = build(pictures, split=0.34)
    (train,) = lists(workspace, "train")
    assert list(train.class_names.values()) == ["7", "8"]


def test_a_linked_class_folder_is_followed_and_said(pictures, capsys):
    (pictures / "d").rename(pictures.parent / "elsewhere")
    (pictures / "d").symlink_to(pictures.parent / "elsewhere")
    _, summary = build(pictures)
    assert summary["train"]["images"] + summary["test"]["images"] == 18
    assert "1 class folders are links, behind which DVC does not look" in capsys.readouterr().err


def test_links_in_a_class_folder_are_followed_and_said(pictures, capsys):
    (pictures / "d" / "deeper").rename(pictures.parent / "elsewhere")
    (pictures / "d" / "deeper").symlink_to(pictures.parent / "elsewhere")
    _, summary = build(pictures)
    assert summary["train"]["images"] + summary["test"]["images"] == 18
    assert "1 folders in class folders are links, behind which DVC does not look" in capsys.readouterr().err


@pytest.mark.parametrize("target", [".", "..", "deeper", "../..", "/"])
def test_links_that_make_a_loop_do_not_loop_and_are_counted(pictures, capsys, target):
    (pictures / "d" / "loop").symlink_to(target)
    (pictures / "d" / "deeper" / "loop").symlink_to("..")
    workspace, summary = build(pictures)
    train, test = lists(workspace, "train", "test")
    assert len({(pictures / path).resolve() for path in train.paths + test.paths}) == 18
    assert summary["train"]["images"] + summary["test"]["images"] == 18
    assert "left out: 2 links to folders that are in there already" in capsys.readouterr().err


@pytest.mark.parametrize("target", [".", ".."])
def test_a_class_folder_that_leads_back_to_the_folder_is_no_class(pictures, capsys, target):
    (pictures / "loop").symlink_to(target)
    (pictures.parent / "elsewhere").mkdir()
    (pictures.parent / "elsewhere" / "back").symlink_to(pictures)
    (pictures / "linked").symlink_to(pictures.parent / "elsewhere")
    workspace, summary = build(pictures)
    assert summary["train"]["images"] + summary["test"]["images"] == 18
    assert "left out: 2 links to folders that are in there already" in capsys.readouterr().err


def test_one_walk_finds_the_images_of_a_dataset_and_those_to_embed(pictures, tmp_path):
    """Neither takes what is hidden, nor a folder for an image; both take what Pillow reads."""
    names = ["a.jfif", "b.JPE", "c.jp2", "d.ppm", "e.webp", "album.jpg/f.png", "linked/g.png"]
    (tmp_path / "elsewhere").mkdir()
    (pictures / "d" / "linked").symlink_to(tmp_path / "elsewhere")
    for name in (*names, "._0.png", ".ipynb_checkpoints/0.png"):
        file = pictures / "d" / name
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (9, 8)).save(file, format="JPEG" if file.suffix in (".jfif", ".JPE") else None)
    (pictures / "d" / "film.mpg").write_text("no image")
    workspace, _ = build(pictures)
    train, test = lists(workspace, "train", "test")
    found = {path.removeprefix("d/") for path in train.paths + test.paths if path.startswith("d/")}
    assert found == {*names, "é 0, a.png", "é 1, a.JPG", "deeper/é 2, a.JPG"}
    assert {str(file.relative_to(pictures)) for file in embed._pictures(pictures)} == {*train.paths, *test.paths}


@pytest.mark.parametrize("name", ["table.csv", "table.parquet"])
def test_a_table(pictures, name):
    table = table_of(pictures, name)
    workspace, _ = build(pictures / name)
    train, test = lists(workspace, "train", "test")
    labels = [each.class_names[label] for each in (train, test) for label in each.labels.tolist()]
    found = dict(zip(train.paths + test.paths, labels, strict=True))
    assert found == dict(zip(table.path, table.label, strict=True))
    assert list(train.class_names.values()) == sorted(CLASSES)[:3]


def test_labels_of_a_parquet_table_may_be_numbers(pictures):
    table = table_of(pictures)
    write(table.assign(label=table.label.map(CLASSES.index)), pictures / "table.parquet")
    workspace, _ = build(pictures / "table.parquet")
    assert list(lists(workspace, "test")[0].class_names.values()) == ["3", "4", "5"]


def test_labels_that_pandas_made_floats_are_in_the_order_of_numbers(pictures):
    table = table_of(pictures)
    numbers = table.label.map(CLASSES.index) + 7.0
    for name in ("table.csv", "table.parquet"):
        write(table.assign(label=numbers), pictures / name)
        workspace, _ = build(pictures / name)
        names = [name for each in lists(workspace, "train", "test") for name in each.class_names.values()]
        assert names == ["7.0", "8.0", "9.0", "10.0", "11.0", "12.0"]


@pytest.mark.parametrize("index", [["path"], ["path", "label"], ["label"]])
def test_columns_may_be_the_index_of_a_parquet_table(pictures, index):
    table = table_of(pictures)
    table.set_index(index).to_parquet(pictures / "table.parquet")
    workspace, _ = build(pictures / "table.parquet")
    train, test = lists(workspace, "train", "test")
    assert sorted(train.paths + test.paths) == sorted(table.path)


def test_an_index_of_its_own_is_no_matter_for_a_table(pictures):
    table = table_of(pictures)
    table.index = [5] * 18
    write(table, pictures / "table.parquet")
    build(pictures / "table.parquet")
    table.path = [*table.path[:17], table.path.iloc[0]]
    write(table, pictures / "table.parquet")
    assert "row 18: " in (said := refused(pictures / "table.parquet")) and "is listed twice" in said


@pytest.mark.parametrize(
    "rows", [["d/a.png,Blue, pale", "d/b.png,c"], ["d/b.png,c", "d/a.png,Blue, pale"], ["d/a.png,a,x", "d/a.png,b,x"]]
)
def test_a_row_of_more_values_than_the_header_is_refused(pictures, rows):
    (pictures / "table.csv").write_text("\n".join(["path,label", *rows, ""]))
    assert re.search("table.csv cannot be read .*(needs quotes|saw 3)", refused(pictures / "table.csv"))


@pytest.mark.parametrize("name", ["table.csv", "table.parquet"])
def test_a_path_up_from_behind_a_link_is_what_the_system_makes_of_it(pictures, name):
    """The text of `link/../x` leads beside the link; the path leads beside the folder that the link names."""
    table = table_of(pictures)
    (pictures / "tables").mkdir()
    write(table.assign(path="../" + table.path), pictures / "tables" / name)
    work = pictures.parent / "work"
    work.mkdir()
    (work / "linked").symlink_to(pictures / "tables")
    for path in table.path[:3]:  # others, where the text leads
        (work / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 8)).save(work / path)
    workspace, _ = build(work / "linked" / name, pictures.parent)
    train, test = lists(workspace, "train", "test")
    assert sorted(train.paths + test.paths) == sorted(str(pictures / path) for path in table.path)
    write(table, pictures / name)
    workspace, _ = build(work / "linked" / ".." / name, pictures.parent)
    assert lists(workspace, "train")[0].paths == sorted(table.path)[:9]


def test_a_table_says_what_trains(pictures):
    split = ["test" if name in ("10", "NA") else "train" for name in sorted(CLASSES) for _ in range(3)]
    table_of(pictures, split=split)
    _, summary = build(pictures / "table.csv")
    assert summary["train"] == {"images": 12, "classes": 4} and summary["test"] == {"images": 6, "classes": 2}
    _, summary = build(pictures / "table.csv", split=0.5)  # which wins over the table
    assert summary["train"] == {"images": 9, "classes": 3}


def test_a_table_says_what_is_searched_for_in_what(pictures):
    split = ["train"] * 9 + ["query", "gallery", "gallery"] * 3
    table_of(pictures, split=split)
    workspace, summary = build(pictures / "table.csv")
    assert summary["query"] == {"images": 3, "classes": 3} and summary["gallery"] == {"images": 6, "classes": 3}
    assert summary["test"] == {"images": 9, "classes": 3}
    assert sorted(path.name for path in workspace.lists("mine").iterdir()) == [
        *("classes.txt", "gallery.txt", "query.txt", "summary.json", "train.txt"),
    ]


def test_images_elsewhere_are_found_by_absolute_paths_and_by_relative_ones(pictures):
    table = table_of(pictures)
    table.path = [str(pictures / path) for path in table.path]
    (pictures.parent / "tables").mkdir()
    write(table, pictures / "absolute.csv")
    write(table.assign(path=[os.path.relpath(p, pictures.parent / "tables") for p in table.path]),
          pictures.parent / "tables" / "relative.csv")  # fmt: skip
    first, _ = build(pictures / "absolute.csv", pictures.parent)
    inside = lists(first, "train")[0].paths
    second, _ = build(pictures.parent / "tables" / "relative.csv", pictures.parent)
    outside = lists(second, "train")[0].paths
    assert not any(os.path.isabs(path) for path in inside)
    assert outside == [str(pictures / path) for path in inside]


def test_a_path_is_relative_to_the_repository(pictures):
    _, summary = build(pictures.name, pictures.parent)
    assert summary["train"]["classes"] == 3


CHANGES = {
    "an unknown column": (lambda t: t.rename(columns={"label": "class"}), "no column label; expected path, label and"),
    "no label": (lambda t: t.assign(label=[" ", *t.label[1:]]), "table.csv, row 1: no label"),
    "no path": (lambda t: t.assign(path=[*t.path[:2], "", *t.path[3:]]), "table.csv, row 3: no path"),
    "no split": (lambda t: t.assign(split=["train", ""] * 9), "table.csv, row 2: no split"),
    "a file that is not there": (
        lambda t: t.assign(path=["nothing.png", *t.path[1:]]),
        "table.csv, row 1: {pictures}/nothing.png does not exist; paths are relative to {pictures}",
    ),
    "one image twice": (lambda t: pd.concat([t, t.assign(path="./" + t.path)]), "row 19: "),
    "unknown splits": (
        lambda t: t.assign(split=["training", "val"] * 9),
        "split into training, val; allowed: train, test or train, query, gallery",
    ),
    "no gallery": (lambda t: t.assign(split=["train"] * 9 + ["query"] * 9), "split into query, train; allowed"),
    "a class in training and in test": (
        lambda t: t.assign(split=["train"] * 8 + ["test"] * 10),
        "1 classes are both in training and in test, 'Chlorophyll grün'; a class must be in one of them",
    ),
    "classes in training and in test": (
        lambda t: t.assign(split=["train", "test", "test"] * 6),
        "6 classes are both in training and in test, '10', 'Blue, pale', 'Chlorophyll grün', …; a class",
    ),
    "one class to train": (lambda t: t.assign(split=["train"] * 3 + ["test"] * 15), "has 1 classes to train and 5"),
    "one image of every class": (lambda t: t.drop_duplicates("label"), "no class has two images to train on"),
    "one image of every training class": (
        lambda t: pd.concat([t[:9].drop_duplicates("label"), t[9:]]),
        "no class has two images to train on; a loss compares images of one class",
    ),
    "one image of every test class": (
        lambda t: pd.concat([t[:9], t[9:].drop_duplicates("label")]),
        "no image to test has another one of its class to be found; at least one class needs two images",
    ),
    "queries of classes that the gallery lacks": (
        lambda t: t.assign(split=["train"] * 9 + ["query"] * 3 + ["gallery"] * 6),
        "no image to test has another one of its class to be found; at least one class needs two images, one of",
    ),
    "few classes": (lambda t: t[:9], "has 1 classes to train and 2 to test; at least 4 are needed, two of each"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_bad_table_is_refused_in_one_line(pictures, change):
    function, message = CHANGES[change]
    write(function(table_of(pictures)), pictures / "table.csv")
    assert message.format(pictures=pictures) in refused(pictures / "table.csv")
    assert not (pictures.parent / "lists").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("table.csv", b"path,label\n\xff\xfe.png,1\n", "cannot be read (UnicodeDecodeError"),
        ("table.csv", b"", "cannot be read (EmptyDataError"),
        ("table.csv", b"path,label\n", "table.csv: no rows; expected one for each image"),
        ("table.parquet", b"PAR1", "cannot be read (ArrowInvalid"),
    ],
)
def test_a_file_that_is_no_table(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert message in refused(tmp_path / name)


def test_a_path_without_images(tmp_path):
    assert "no-such does not exist; path names a folder" in refused(tmp_path / "no-such")
    assert "no-such.csv does not exist" in refused(tmp_path / "no-such.csv")
    (tmp_path / "empty").mkdir()
    assert "empty: no images; expected a folder for each class" in refused(tmp_path / "empty")
    Image.new("RGB", (9, 8)).save(tmp_path / "empty" / "a.png")
    assert "empty: no images; expected a folder for each class" in refused(tmp_path / "empty")


def test_a_name_that_no_list_can_hold(pictures):
    for name in ("a\nb.png", os.fsdecode(b"\xff.png")):
        file = pictures / "d" / name
        Image.new("RGB", (9, 8)).save(file)
        assert "no list can hold" in refused(pictures)
        file.unlink()


@pytest.mark.parametrize("path", [None, ""])
def test_no_path(path):
    with pytest.raises(ValidationError, match="path"):
        FolderConfig(type="folder", path=path)


@pytest.mark.parametrize("split", [0, 1, "half"])
def test_a_share_is_between_nothing_and_everything(split):
    with pytest.raises(ValidationError, match="split"):
        FolderConfig(type="folder", path="x", split=split)


@pytest.mark.parametrize("ks", [[], [2, 4], [1, 4, 2], [0, 1]])
def test_k_must_rise_from_one(ks):
    with pytest.raises(ValidationError, match="ks"):
        FolderConfig(type="folder", path="x", ks=ks)


def test_a_new_image_is_decoded_alone(pictures, monkeypatch):
    decoded = []
    monkeypatch.setattr(packing, "decode", lambda file: decoded.append(file) or decode(file))
    build(pictures)
    assert len(decoded) == 18
    decoded.clear()
    Image.new("RGB", (9, 8)).save(pictures / "d" / "new.png")
    build(pictures)
    assert decoded == [pictures / "d" / "new.png"]


def test_the_check_names_what_it_checks():
    table = pd.DataFrame({"label": [0, 0, 1], "name": "x", "split": "train"})
    with pytest.raises(UserError, match="^mine: its images are split into train; allowed"):
        check_catalogue(table, "mine")
