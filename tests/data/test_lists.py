"""From images in CUB's layout to their lists, and back from the lists."""

import hashlib
import json

import numpy as np
import pytest
import yaml
from helpers import FEW_CLASSES, tiny_params
from PIL import Image

from cbml.data.lists import ImageList, check_disjoint, hold_out, read_list
from cbml.errors import UserError
from cbml.stages.build_lists import build_lists
from cbml.stages.download import download
from cbml.workspace import Workspace

COUNTS = {1: 2, 2: 3, 4: 1, 7: 2, 8: 2, 9: 1, 12: 2, 13: 2}  # class id: images; ids need not be contiguous


@pytest.fixture
def dataset(tmp_path):
    """Eight classes in CUB's layout; the image ids do not follow the alphabet."""
    root = tmp_path / "data"
    pairs = [(c, f"{c:03}.Bird/{k}.png") for c, count in COUNTS.items() for k in reversed(range(count))]
    for c, path in pairs:
        (root / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (c, 0, 0)).save(root / "images" / path)
    (root / "images.txt").write_text("".join(f"{n} {path}\n" for n, (_, path) in enumerate(pairs, 1)))
    (root / "image_class_labels.txt").write_text("".join(f"{n} {c}\n" for n, (c, _) in enumerate(pairs, 1)))
    (root / "classes.txt").write_text("".join(f"{c} {c:03}.Bird\n" for c in COUNTS))
    (root / "train_test_split.txt").write_text("".join(f"{n} 0\n" for n, _ in enumerate(pairs, 1)))
    return root


def build(dataset, **options):
    """The stages `download` and `build_lists` of a dataset that is at hand; their summary."""
    root = dataset.parent
    config = {"type": "cub200", "source": str(dataset), **options}
    (root / "params.yaml").write_text(yaml.safe_dump(tiny_params(dataset={"birds": config}, recipe=FEW_CLASSES)))
    workspace = Workspace(root, root)
    download(workspace, "birds")
    return build_lists(workspace, "birds")


def lists(dataset, *names):
    found = [read_list(dataset.parent / f"lists/birds/{name}.txt") for name in names]
    return found[0] if len(found) == 1 else found


def error_of(function, *args, **kwargs):
    with pytest.raises(UserError) as info:
        function(*args, **kwargs)
    assert "\n" not in str(info.value)
    return str(info.value)


def test_first_half_of_the_classes_trains_in_image_order(dataset, tmp_path):
    summary = build(dataset)
    out = tmp_path / "lists/birds"
    assert (out / "train.txt").read_text().splitlines() == [
        "images/001.Bird/1.png,0",
        "images/001.Bird/0.png,0",
        "images/002.Bird/2.png,1",
        "images/002.Bird/1.png,1",
        "images/002.Bird/0.png,1",
        "images/004.Bird/0.png,3",
        "images/007.Bird/1.png,6",
        "images/007.Bird/0.png,6",
    ]
    assert summary["train"] == {"images": 8, "classes": 4}
    assert summary["test"] == {"images": 7, "classes": 4}
    assert summary == json.loads((out / "summary.json").read_text())
    assert sorted(p.name for p in out.iterdir()) == ["classes.txt", "summary.json", "test.txt", "train.txt"]
    train, test = lists(dataset, "train", "test")
    assert train.labels.dtype == np.int64
    assert train.num_classes == 4
    assert test.class_names == {7: "Bird", 8: "Bird", 11: "Bird", 12: "Bird"}
    check_disjoint(train, test)


@pytest.mark.parametrize(("share", "classes"), [(0.3, 2), (0.5, 4), (0.56, 4), (0.7, 6)])
def test_another_share_of_the_classes_trains(dataset, share, classes):
    assert build(dataset, split=share)["train"]["classes"] == classes


@pytest.mark.parametrize(("share", "split"), [(0.1, "1 classes to train and 7"), (0.9, "7 classes to train and 1")])
def test_two_classes_are_needed_to_train_and_two_to_test(dataset, share, split):
    assert f"has {split} to test; at least 4 are needed, two of each" in error_of(build, dataset, split=share)


def test_images_are_sorted_by_number_and_not_by_text(dataset):
    lines = (dataset / "images.txt").read_text().splitlines(keepends=True)
    (dataset / "images.txt").write_text("".join(sorted(lines)))  # 1, 10, 11, …, 2
    build(dataset)
    assert lists(dataset, "train").paths[1] == "images/001.Bird/0.png"


def test_the_last_training_classes_are_held_out(dataset):
    build(dataset)
    train = lists(dataset, "train")
    rest, held_out = hold_out(train, 0.5)
    assert rest.paths + held_out.paths == train.paths
    assert (rest.labels.tolist(), held_out.labels.tolist()) == ([0, 0, 1, 1, 1], [3, 6, 6])


@pytest.mark.parametrize("share", [0.1, 0.9, -0.5])
def test_two_classes_are_needed_on_either_side(share):
    images = ImageList(["x"] * 4, np.arange(4))
    assert f"validation_classes={share} holds out" in error_of(hold_out, images, share)


def test_fingerprint_covers_lists_paths_labels_and_content(dataset, tmp_path):
    digest = hashlib.sha256()
    first = build(dataset)["fingerprint"]
    for name in ("train", "test"):
        for line in (tmp_path / f"lists/birds/{name}.txt").read_text().splitlines():
            content = (dataset / line.rpartition(",")[0]).read_bytes()
            digest.update(f"{name},{line},{hashlib.sha256(content).hexdigest()}\n".encode())
    assert first == digest.hexdigest()[:16]
    Image.new("RGB", (4, 4), (0, 9, 0)).save(dataset / "images/001.Bird/0.png")
    second = build(dataset)["fingerprint"]
    labels = dataset / "image_class_labels.txt"
    labels.write_text(labels.read_text().replace("2 1\n", "2 2\n"))
    third = build(dataset)["fingerprint"]
    assert len({first, second, third, build(dataset, split=0.3)["fingerprint"]}) == 4


def test_the_catalogue_changes_with_any_image(dataset, tmp_path):
    build(dataset)
    catalogue = (tmp_path / "data/birds.csv").read_text()
    build(dataset)
    assert (tmp_path / "data/birds.csv").read_text() == catalogue
    Image.new("RGB", (4, 4), (0, 9, 0)).save(dataset / "images/001.Bird/0.png")
    build(dataset)
    assert (tmp_path / "data/birds.csv").read_text() != catalogue


def test_every_unreadable_image_is_named_and_nothing_is_written(dataset, tmp_path):
    images = sorted((dataset / "images").rglob("*.png"))
    images[2].write_bytes(b"no image")
    images[5].write_bytes(images[5].read_bytes()[:-30])
    error = error_of(build, dataset)
    assert error.startswith("2 of 15 images cannot be read: ") and "skip_unreadable=true leaves them out" in error
    for image in (images[2], images[5]):
        assert f"{image}: not an image that Pillow can read (" in error
    assert not (tmp_path / "lists").exists() and not list((tmp_path / ".cache").glob("*.partial"))


def test_the_names_of_unreadable_images_end_somewhere(dataset, monkeypatch):
    monkeypatch.setattr("cbml.data.packing.NAMED", 3)
    for image in (dataset / "images").rglob("*.png"):
        image.write_bytes(b"no image")
    error = error_of(build, dataset)
    assert error.startswith("15 of 15 images") and error.count(".png: ") == 3 and "; and 12 more" in error


def test_unreadable_images_are_left_out_and_counted_if_that_is_wanted(dataset, capsys):
    whole = build(dataset)
    (dataset / "images/002.Bird/1.png").write_bytes(b"no image")
    file = dataset / "images/013.Bird/0.png"
    file.write_bytes(file.read_bytes()[:-30])
    capsys.readouterr()
    summary = build(dataset, skip_unreadable=True)
    assert summary["skipped"] == 2 and summary["fingerprint"] != whole["fingerprint"]
    assert summary["train"] == {"images": 7, "classes": 4} and summary["test"] == {"images": 6, "classes": 4}
    assert "birds: 2 images that cannot be read are left out" in capsys.readouterr().err
    for name in ("train", "test"):
        assert not {"images/002.Bird/1.png", "images/013.Bird/0.png"} & set(lists(dataset, name).paths)


def test_what_remains_without_unreadable_images_must_be_enough(dataset):
    for number in ("009", "012", "013"):
        for image in (dataset / f"images/{number}.Bird").iterdir():
            image.write_bytes(b"no image")
    assert "has 4 classes to train and 1 to test" in error_of(build, dataset, skip_unreadable=True)


def test_one_image_under_two_classes_is_a_warning_that_names_both(dataset, capsys):
    for number in ("002", "012"):
        (dataset / f"images/{number}.Bird/0.png").write_bytes((dataset / "images/001.Bird/0.png").read_bytes())
    build(dataset)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "same image" in line]
    assert line == (
        "birds: the same image under two classes: images/001.Bird/1.png (Bird) and images/002.Bird/0.png (Bird), "
        "and 1 more pairs"
    )


@pytest.mark.parametrize(
    ("file", "line", "replacement", "message"),
    [
        ("images.txt", "1 001.Bird/1.png", "1", "images.txt, line 1: '1'; expected"),
        ("images.txt", "1 001.Bird/1.png", "x 001.Bird/1.png", "images.txt, line 1: 'x 001.Bird/1.png'; expected"),
        ("images.txt", "2 001.Bird/0.png", "1 001.Bird/0.png", "images.txt, line 2: id 1 is listed twice"),
        (
            "images.txt",
            "2 001.Bird/0.png",
            "2 001.Bird/./1.png",
            "images.txt: '001.Bird/./1.png' is image 1 and image 2; an image has one id",
        ),
        ("images.txt", "2 001.Bird/0.png", "2 001.Bird/9.png", "images/001.Bird/9.png is missing"),
        ("image_class_labels.txt", "2 1", "2 99", "image 2 has class id '99', which classes.txt does not list"),
        ("image_class_labels.txt", "2 1", "2 one", "image 2 has class id 'one', which classes.txt does not list"),
        ("image_class_labels.txt", "2 1\n", "", "image id 2 is in only one of images.txt and image_class_labels.txt"),
        (
            "images.txt",
            "2 001.Bird/0.png",
            "2 ../images/001.Bird/0.png",
            "images.txt: image 2 is '../images/001.Bird/0.png'",
        ),
        ("images.txt", "2 001.Bird/0.png", "2 {dataset}/images/001.Bird/0.png", "images.txt: image 2 is '/"),
        (
            "images.txt",
            "2 001.Bird/0.png",
            f"2 001.Bird/{'0' * 256}.png",
            ".png is missing; images.txt lists it as image 2",
        ),
        ("images.txt", "2 001.Bird/0.png", "2 001.Bird/0\0.png", "images.txt cannot be read (NUL byte)"),
        (
            "images.txt",
            "2 001.Bird/0.png",
            "2 001.Bird/\udcff.png",
            "images.txt cannot be read ('utf-8' codec can't decode",
        ),
        ("images.txt", "2 001", f"{'2' * 5000} 001", f"images.txt, line 2: '{'2' * 100}'; expected"),
        ("image_class_labels.txt", "2 1", f"2 {'1' * 5000}", f"image 2 has class id '{'1' * 100}', which"),
        ("classes.txt", "1 001.Bird", "1 001.Bird\udcff", "classes.txt cannot be read"),
        ("classes.txt", "13 013.Bird", "13 013.Bird\n14 014.Wren", "class 14 (014.Wren) has no images"),
    ],
)
def test_a_broken_table_is_named(dataset, file, line, replacement, message):
    text = (dataset / file).read_text()
    assert line in text
    replacement = replacement.replace("{dataset}", str(dataset))
    (dataset / file).write_text(text.replace(line, replacement, 1), errors="surrogateescape")
    assert message in error_of(build, dataset)


@pytest.mark.parametrize("name", ["classes.txt", "images"])
def test_a_folder_for_a_file_or_a_file_for_a_folder(dataset, tmp_path, name):
    (dataset / name).rename(tmp_path / name)
    (dataset / name).touch() if name == "images" else (dataset / name).mkdir()
    assert f"{name} not found; expected images (a folder), images.txt" in error_of(build, dataset)


def test_missing_image_file(dataset):
    (dataset / "images/004.Bird/0.png").unlink()
    assert "images/004.Bird/0.png is missing; images.txt lists it as image 6" in error_of(build, dataset)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("images/001.Bird/0.png,0\nimages/001.Bird/1.png\n", "line 2: 'images/001.Bird/1.png'; expected"),
        ("images/001.Bird/0.png,-1\n", "line 1: 'images/001.Bird/0.png,-1'; expected"),
        ("images/001.Bird/0.png,0\n\n", "line 2: ''; expected"),
        ("images/../images/001.Bird/0.png,0\n", "line 1: 'images/../images/001.Bird/0.png,0'; expected"),
        (f"images/001.Bird/0.png,{'0' * 5000}\n", "line 1: 'images/001.Bird/0.png,000"),
        ("images/001.Bird/0.png,99\n", "line 1: label 99 is not in classes.txt"),
        ("images/001.Bird/\0.png,0\n", "train.txt cannot be read (NUL byte)"),
        ("images/001.Bird/\udcff.png,0\n", "train.txt cannot be read ('utf-8' codec"),
        ("", "is empty"),
    ],
)
def test_a_broken_list_is_named(tmp_path, text, message):
    (tmp_path / "classes.txt").write_text("0 Bird\n")
    (tmp_path / "train.txt").write_text(text, errors="surrogateescape")
    error = error_of(read_list, tmp_path / "train.txt")
    assert message in error and str(tmp_path / "train.txt") in error
    assert error.endswith("run the stage build_lists again, which writes it")


@pytest.mark.parametrize(("text", "message"), [("0\n", "line 1: '0'; expected"), ("", "is empty"), ("x y\n", "line 1")])
def test_broken_names_of_classes_are_named(tmp_path, text, message):
    (tmp_path / "classes.txt").write_text(text)
    (tmp_path / "train.txt").write_text("a.png,0\n")
    assert message in (error := error_of(read_list, tmp_path / "train.txt")) and "classes.txt" in error


@pytest.mark.parametrize("name", ["train.txt", "classes.txt"])
def test_a_list_that_is_cut_in_the_middle_of_a_line_is_damaged(dataset, name):
    """Here the label 12 would become 1, with a name and images of its own."""
    build(dataset)
    file = dataset.parent / "lists/birds" / name
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{name}: damaged \(it ends in the middle of a line\); run .* build_lists"):
        lists(dataset, "train")


def test_missing_list(tmp_path):
    (tmp_path / "classes.txt").write_text("0 Bird\n")
    assert "nothing.txt does not exist" in error_of(read_list, tmp_path / "nothing.txt")


def test_overlapping_classes_are_named():
    train, test = (ImageList(["x"] * 3, np.array(labels)) for labels in ([0, 1, 2], [2, 1, 5]))
    error = error_of(check_disjoint, train, test)
    assert "2 classes are in both the training and the test list, e.g. labels 1, 2;" in error
